"""Let the servers of one process call each other without sockets. For Gym's interpreter, see `host.py`.

    server ── nemo_gym.server_utils.request ── aiohttp's session ──┬── the application of a co-hosted server
                                                                   └── a socket: everything else

A rollout of two turns makes six such calls, all through one aiohttp session. `LocalCalls` stands in for the requests
of that session; Gym's code before it (JSON, retries, tracing) is Gym's own. A request has the headers that aiohttp
would send, cookies by its rules included, and an answer is an `aiohttp.ClientResponse` with those that uvicorn would
send.

The application gets the ASGI scope that uvicorn would make of the request, and runs in a task of its own, in the
context in which its server started: nothing of the caller gets there but what the request carries. A caller that is
cancelled or closes the response is gone for the application: `receive` says `http.disconnect`, and what it sends is
dropped. It is not cancelled, unless its own middleware does that. What an application breaks (no answer, half an
answer, an exception) looks to the caller as over a wire.

A request goes over a socket if its server is not of this process, has not started or is stopping, if it comes from
another event loop, or if it asks for what this file does not know: timeouts, query parameters, streams, forms. So do
requests of HTTP clients that are not Gym's. All servers keep their sockets.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import Morsel, SimpleCookie
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import aiohttp
import uvicorn
from aiohttp import hdrs, http_parser
from aiohttp.http import SERVER_SOFTWARE
from aiohttp.http_exceptions import ContentLengthError, TransferEncodingError
from multidict import CIMultiDict, CIMultiDictProxy, istr
from nemo_gym import server_utils
from yarl import URL

logger = logging.getLogger("trl_gym.host")
_uvicorn_logger = logging.getLogger("uvicorn.error")

_KNOWN_OPTIONS = {"data", "json", "headers", "cookies", "allow_redirects"}
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}
# Headers from which aiohttp or uvicorn conclude something.
_TELLING = {
    "connection",
    "content-encoding",
    "content-length",
    "cookie",
    "expect",
    "host",
    "transfer-encoding",
    "upgrade",
}
_AUTOMATIC = [*aiohttp.ClientRequest.DEFAULT_HEADERS.items(), (hdrs.USER_AGENT, SERVER_SOFTWARE)]
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # a token
_VALUE = re.compile(r"(?!\s)[^\x00-\x08\x0a-\x1f\x7f]*(?<!\s)")  # servers strip blanks in different ways
_BAD_NAME = re.compile(rb'[\x00-\x20\x7f()<>@,;:\[\]={}\\"]')
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_COMPRESSIONS = ("gzip", "deflate", "br", "zstd")
_REDIRECTS = (301, 302, 303, 307, 308)
_STREAM_LIMIT = 2**16
_SPELLINGS = {name.lower().encode(): name for name in vars(hdrs).values() if isinstance(name, istr)}
_QUOTE = SimpleCookie().value_encode
# What builds an answer takes a connection and a protocol; an `_Exchange` is both, as far as they use them.
_RESPONSE: Any = aiohttp.ClientResponse
_STREAM: Any = aiohttp.StreamReader

Message = MutableMapping[str, Any]
RequestFunction = Callable[..., Awaitable[aiohttp.ClientResponse]]


@dataclass(frozen=True)
class _Target:
    """A server of this process that has started."""

    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop
    context: contextvars.Context  # in which the server accepts connections
    address: tuple[str, int]


@dataclass(frozen=True)
class PlainRequest:
    """A request of which every byte is known."""

    method: str
    url: URL
    headers: CIMultiDict[str]
    body: bytes


class LocalCalls:
    """The servers of this process, as Gym's HTTP client reaches them.

    Args:
        mark: Adds what a request to a URL carries to its headers (`carrier.Carrier.mark`).
        gone_extension: Key in a scope's `extensions` of a function that takes what to call when the caller is gone
            before it has the whole answer.
    """

    def __init__(self, mark: Callable[[MutableMapping[str, Any], str], None], gone_extension: str) -> None:
        self._mark = mark
        self._gone_extension = gone_extension
        self._targets: dict[tuple[str, str | None, int | None], _Target] = {}

    def install(self) -> None:
        """Take over the requests of Gym's HTTP session, which is made with the first of them.

        Where aiohttp has another form than this file knows, all calls stay on sockets, and the log says so.
        """
        original = server_utils.ClientSession

        def make_session(**options: Any) -> aiohttp.ClientSession:
            session = original(**options)
            try:
                _check(session)
            except (TypeError, AttributeError) as error:
                logger.warning("servers call each other over sockets: aiohttp %s: %s", aiohttp.__version__, error)
            else:
                session._request = functools.partial(self.call, session._request)
            return session

        server_utils.ClientSession = make_session

    def open(self, server: uvicorn.Server, host: str, port: int) -> None:
        """Let requests for `http://host:port` reach a server that has started. Called on its event loop."""
        context = contextvars.copy_context()
        self._targets["http", host, port] = _Target(server, asyncio.get_running_loop(), context, (host, port))

    async def call(
        self, over_socket: RequestFunction, method: str, url: str | URL, **options: Any
    ) -> aiohttp.ClientResponse:
        """Make a request; arguments and result are those of `aiohttp.ClientSession.request`."""
        parsed = URL(url)
        target = self._targets.get((parsed.scheme, parsed.raw_host, parsed.port))
        if target is None or target.server.should_exit or asyncio.get_running_loop() is not target.loop:
            return await over_socket(method, url, **options)
        request = plain_request(method, parsed, options)
        if request is None:
            return await over_socket(method, url, **options)
        self._mark(request.headers, str(url))
        exchange = _Exchange(request, target)
        response = _new_response(request, target.loop)
        exchange.begin(self._gone_extension)
        try:
            await response.start(exchange)
        except BaseException:
            response.close()
            raise
        if response.status in _REDIRECTS and (hdrs.LOCATION in response.headers or hdrs.URI in response.headers):
            response.release()
            return await over_socket(method, url, **options)  # aiohttp knows how to follow
        return response


def _check(session: aiohttp.ClientSession) -> None:
    """Raise `TypeError` or `AttributeError` if aiohttp has another form, or its session adds to requests."""
    names = ("writer", "continue100", "timer", "request_info", "traces", "loop", "session", "stream_writer")
    inspect.signature(aiohttp.ClientResponse).bind("GET", URL(), **dict.fromkeys(names))
    inspect.signature(aiohttp.StreamReader).bind(None, 1, loop=None)
    inspect.signature(http_parser.DeflateBuffer).bind(None, "gzip")
    is_plain = (
        isinstance(session.cookie_jar, aiohttp.DummyCookieJar)
        and session.timeout == aiohttp.ClientTimeout()
        and not (session.headers or session.auth or session.trust_env or session.raise_for_status)
        and session.auto_decompress
    )
    if not is_plain or not inspect.iscoroutinefunction(session._request):
        raise TypeError("Gym's session has defaults for requests")


def _new_response(request: PlainRequest, loop: asyncio.AbstractEventLoop) -> Any:
    info = aiohttp.RequestInfo(request.url, request.method, CIMultiDictProxy(request.headers), request.url)
    return _RESPONSE(
        request.method,
        request.url,
        writer=None,
        continue100=None,
        timer=None,
        request_info=info,
        traces=[],
        loop=loop,
        session=None,
        stream_writer=SimpleNamespace(output_size=0),
    )


# -- what aiohttp would send ------------------------------------------------------------------------------------------


def plain_request(method: str, url: URL, options: Mapping[str, Any]) -> PlainRequest | None:
    """Return the request that aiohttp would send, or None if only aiohttp knows.

    Args:
        url: Absolute URL.
        options: Options of `aiohttp.ClientSession.request`.
    """
    method, body, given = method.upper(), options.get("data"), options.get("headers") or {}
    if not options.keys() <= _KNOWN_OPTIONS or method not in _METHODS or url.raw_user or url.raw_fragment:
        return None
    if (
        options.get("allow_redirects") is False
        or type(given) is not dict
        or (body is not None and (type(body) is not bytes or not body))
    ):
        return None
    headers = CIMultiDict({hdrs.HOST: url.host_port_subcomponent or ""})
    for name, value in given.items():
        if not (type(name) is type(value) is str and _NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            return None
        if name.lower() in _TELLING:
            return None
        headers.add(name, value)
    for name, value in _AUTOMATIC:
        headers.setdefault(name, value)
    if options.get("cookies"):
        cookies = cookie_header(options["cookies"])
        if cookies is None:
            return None
        if cookies:
            headers[hdrs.COOKIE] = cookies
    content_type = "application/octet-stream"
    if options.get("json") is not None:
        if body is not None:
            return None
        body, content_type = json.dumps(options["json"]).encode(), "application/json"
    if body is not None or method not in aiohttp.ClientRequest.GET_METHODS:
        headers[hdrs.CONTENT_LENGTH] = str(len(body or b""))
    if body is not None or method in aiohttp.ClientRequest.POST_METHODS:
        headers.setdefault(hdrs.CONTENT_TYPE, content_type)
    return PlainRequest(method, url, headers, body or b"")


def cookie_header(cookies: Any) -> str | None:
    """Return the `Cookie` header that aiohttp would send, or None if the cookies' attributes have a say in it.

    Args:
        cookies: Names → values, or `http.cookies.Morsel` of an earlier answer.
    """
    if not isinstance(cookies, Mapping):
        return None
    pairs = []
    for name, cookie in sorted(cookies.items()):
        value, coded = cookie, ""
        if isinstance(cookie, Morsel):
            lasts = not cookie["expires"] and re.fullmatch("|0*[1-9][0-9]{,9}", str(cookie["max-age"]))
            if (
                cookie.key != name
                or cookie["domain"]
                or cookie["secure"]
                or cookie["path"] not in ("", "/")
                or not lasts
            ):
                return None
            value, coded = cookie.value, cookie.coded_value
        if type(value) is not str or not _NAME.fullmatch(name):
            return None
        sent = coded if coded.startswith('"') else _QUOTE(value)[1]
        if not (value + sent).isprintable() or not (value + sent).isascii():
            return None
        pairs.append(f"{name}={sent}")
    return "; ".join(pairs)


# -- an application answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Head:
    """What `aiohttp.ClientResponse` takes from a parsed head."""

    code: int
    reason: str
    headers: CIMultiDictProxy[str]
    raw_headers: tuple[tuple[bytes, bytes], ...]
    version: aiohttp.HttpVersion = aiohttp.HttpVersion11


class _Exchange:
    """One request to an application of this process, and its answer.

    To the application it is what uvicorn's request cycle is, and to the `aiohttp.ClientResponse` and its stream their
    connection and protocol.
    """

    upgraded = False

    def __init__(self, request: PlainRequest, target: _Target) -> None:
        self._request = request
        self._target = target
        self._content: aiohttp.StreamReader = _STREAM(self, _STREAM_LIMIT, loop=target.loop)
        self._decoder: Any = None
        self._head: asyncio.Future[_Head] = target.loop.create_future()
        self._body: bytes | None = request.body  # until the application has it
        self._ended = asyncio.Event()  # closed or complete
        self._writable: asyncio.Event | None = None  # while the reader lags behind
        self._when_gone: list[Callable[[], object]] = []
        self._is_closed = False
        self._is_started = False
        self._is_read = False
        self._is_complete = False
        self._length: int | None = None  # of the body, as announced; None: it is sent in chunks
        self._sent = 0

    def begin(self, gone_extension: str) -> None:
        """Run the application in a task that its server knows as its own."""
        target = self._target
        scope = {**self._scope(), "extensions": {gone_extension: self._when_gone.append}}
        task = target.loop.create_task(self._run(scope), context=target.context.copy())
        tasks = target.server.server_state.tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    # -- the caller's side: connection and protocol ---------------------------------------------------------------

    @property
    def protocol(self) -> _Exchange:
        return self

    @property
    def connected(self) -> bool:
        return not self._is_closed

    @property
    def _reading_paused(self) -> bool:
        return self._writable is not None

    async def read(self) -> tuple[_Head, aiohttp.StreamReader]:
        head, content = await self._head, self._content
        self._is_read = True
        self._let_go()
        return head, content

    def release(self) -> None:
        """The response has been read, or nobody will read it."""
        if not self._is_complete:
            self.close()

    def close(self) -> None:
        """The caller is gone."""
        for tell in () if self._is_closed or self._is_complete else self._when_gone:
            tell()
        self._is_closed = True
        self._ended.set()
        self.resume_reading()

    def pause_reading(self) -> None:
        self._writable = self._writable or asyncio.Event()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    # -- the application's side -----------------------------------------------------------------------------------

    def _scope(self) -> dict[str, Any]:
        """Return the scope that uvicorn makes of such a request."""
        url, config = self._request.url, self._target.server.config
        path = unquote(url.raw_path) if "%" in url.raw_path else url.raw_path
        return {
            "type": "http",
            "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self._target.address,
            "client": (self._target.address[0], 0),
            "scheme": "http",
            "root_path": config.root_path,
            "headers": [(n.lower().encode(), v.encode()) for n, v in self._request.headers.items()],
            "state": self._target.server.lifespan.state.copy(),
            "method": self._request.method,
            "path": config.root_path + path,
            "raw_path": (config.root_path + url.raw_path).encode("ascii"),
            "query_string": url.raw_query_string.encode("ascii"),
        }

    async def _run(self, scope: dict[str, Any]) -> None:
        """Run the application to its end, and do what uvicorn does where it leaves the answer out."""
        try:
            result = await self._target.server.config.loaded_app(scope, self.receive, self.send)
        except BaseException as error:
            _uvicorn_logger.error("Exception in ASGI application\n", exc_info=error)
            await self._answer_500_or_hang_up()
            return
        if result is not None:
            _uvicorn_logger.error("ASGI callable should return None, but returned '%s'.", result)
            self._hang_up()
        elif not self._is_complete and not self._is_closed:
            missing = "completing" if self._is_started else "starting"
            _uvicorn_logger.error("ASGI callable returned without %s response.", missing)
            await self._answer_500_or_hang_up()

    async def _answer_500_or_hang_up(self) -> None:
        if self._is_started:
            self._hang_up()
            return
        text = b"Internal Server Error"
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
        headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": text})

    def _hang_up(self) -> None:
        """Tell the caller what a lost connection would."""
        if not self._is_closed and not self._is_complete:
            error: Exception = TransferEncodingError("Not enough data to satisfy transfer length header.")
            if self._length is not None:
                received = f"(received {self._content.total_bytes} of {self._length} bytes)"
                error = ContentLengthError(f"Not enough data to satisfy content length header {received}.")
            self._content.set_exception(aiohttp.ClientPayloadError(f"Response payload is not completed: {error!r}"))
            if not self._head.done():
                self._head.set_exception(aiohttp.ServerDisconnectedError())
        self.close()

    async def receive(self) -> Message:
        if self._body is None:
            await self._ended.wait()
        if self._is_closed or self._is_complete:
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if self._writable is not None:
            await self._writable.wait()
        if self._is_closed:
            return
        if self._is_complete:
            kind = message["type"]
            raise RuntimeError(f"Unexpected ASGI message '{kind}' sent, after response already completed.")
        expected = "http.response.body" if self._is_started else "http.response.start"
        if message["type"] != expected:
            raise RuntimeError(f"Expected ASGI message '{expected}', but got '{message['type']}'.")
        if self._is_started:
            self._send_body(message.get("body", b""), is_last=not message.get("more_body", False))
        else:
            self._is_started = True
            self._send_head(message["status"], message.get("headers", ()))

    def _send_head(self, status: int, headers: Any) -> None:
        sent = [*self._target.server.server_state.default_headers, *((name.lower(), value) for name, value in headers)]
        for name, value in sent:
            if _BAD_NAME.search(name):
                raise RuntimeError("Invalid HTTP header name.")
            if _BAD_VALUE.search(value):
                raise RuntimeError("Invalid HTTP header value.")
            if name == b"content-length":
                self._length = int(value)
            elif name == b"content-encoding" and value.lower().decode() in _COMPRESSIONS:
                self._decoder = http_parser.DeflateBuffer(self._content, value.lower().decode())
        if status in (204, 304):
            self._length = 0
        elif self._length is None and (b"transfer-encoding", b"chunked") not in sent:
            sent.append((b"transfer-encoding", b"chunked"))
        raw = tuple((name, value.strip(b" \t")) for name, value in sent)
        decoded = CIMultiDict([(_SPELLINGS.get(name) or _text(name), _text(value)) for name, value in raw])
        if not self._head.done():
            self._head.set_result(_Head(status, _reason(status), CIMultiDictProxy(decoded), raw))

    def _send_body(self, body: bytes, *, is_last: bool) -> None:
        self._sent += len(body)
        if self._length is not None and self._sent > self._length:
            raise RuntimeError("Response content longer than Content-Length")
        if self._decoder is None:
            self._content.feed_data(bytes(body))
        else:
            self._decode(body)
        if is_last and self._length is not None and self._sent < self._length:
            raise RuntimeError("Response content shorter than Content-Length")
        if is_last:
            self._is_complete = True
            self._ended.set()
            self._content.feed_eof()
            self._let_go()

    def _let_go(self) -> None:
        """Forget the stream, which knows this exchange, so that nothing is left for the garbage collector."""
        if self._is_complete and self._is_read:
            del self._content

    def _decode(self, body: bytes) -> None:
        try:
            has_more = self._decoder.feed_data(body, len(body))
            while has_more:
                has_more = self._decoder.feed_data(b"", 0)
        except Exception as error:
            self._content.set_exception(aiohttp.ClientPayloadError(str(error)))


def _text(header: bytes) -> str:
    return header.decode("utf-8", "surrogateescape")


@functools.cache
def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
