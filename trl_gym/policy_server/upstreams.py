"""Answer ASGI requests by asking OpenAI servers elsewhere: the inner half of `trl-gym gateway`.

    request ──► control route?  ── yes ──► every upstream at once; all must answer 200
                    │ no
                    ▼
                choose an upstream in rotation:  with `scope["trl_gym.affinity"]`: rendezvous hashing
                    │                            without: the one with the fewest running requests
                    ▼
                forward, stream the answer back ── lost before its first byte ──► the next upstream

An upstream is in rotation unless it is *down* (it cannot be reached, `/health` says no, or its engine does not answer,
which `/is_paused` asks; it is probed in the background and comes back by itself) or *excluded* (it may hold other
weights than the rest):

  * A control call failed on it. It is admitted again when a whole weight update that began after that failure, from
    `/start_weight_update` to `/finish_weight_update`, has succeeded on it; or when it has loaded a new adapter and
    taken its version, and was not left in the middle of such an update.
  * It came back from being down with another weight version than it held: it was restarted. The same admits it again.

When every upstream refuses a control call alike (the same 4xx, e.g. a route that stock servers do not have), nothing
has changed anywhere and nobody is excluded.

Requests and answers have vLLM's form. To a server that speaks another one leads another `Wire`, which translates.

No reply that is made up here has the status 429, 502, 503, 504 or 520, which Gym retries forever, except that of
`/health`, which Gym does not ask. Bodies of control calls are passed on as they are; an `init_weight_transfer_engine`
for `nccl` needs other ranks for every replica and cannot be sent through here to more than one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import aiohttp
from yarl import URL

from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.client import ENGINE_PATH
from trl_gym.policy_server.middleware.app import AFFINITY
from trl_gym.policy_server.middleware.http import (
    CONTROL_PATHS,
    MAX_REQUEST_BYTES,
    AnsweredError,
    ClientGoneError,
    Message,
    Receive,
    Reply,
    Scope,
    Send,
    path_of,
    read_body,
)
from trl_gym.untrusted import MAX_BODY_BYTES, BodyTooLongError, redirect_problem
from trl_gym.untrusted import read_body as read_answer

_logger = logging.getLogger("trl_gym.gateway")


# -- one request on its way to an upstream, and its answer on the way back --------------------------------------------

# Of a connection, not of a message (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
# Written by the client library, replaced here, or (`expect`) answered by our own server already.
_REPLACED = frozenset({b"host", b"content-length", b"authorization", b"accept-encoding", b"expect"})

_CONNECT_TIMEOUT_S = 10.0
# vLLM closes idle connections after 5 s by default; a request on one that is just being closed would be lost.
_IDLE_CONNECTION_S = 2.0
_MAX_QUOTED_CHARS = 500


class UpstreamLostError(PolicyServerError):
    """The answer had begun and cannot be completed: whoever forwards it must break off the client's connection."""


class RedirectedError(aiohttp.ClientError):
    """The upstream answered with a redirect, which is neither followed nor passed on: the client's key would go along.
    Nothing has been answered."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A request as it is sent to an upstream."""

    method: str  # HTTP method, e.g. `"POST"`
    path: str  # path, decoded, below the application's root
    target: str  # path and query as they stand in the request line, still encoded
    headers: tuple[tuple[str, str], ...] = ()  # names and values
    body: bytes = b""  # the whole body, so that another upstream can be asked

    @classmethod
    def from_scope(cls, scope: Scope, body: bytes, api_key: str | None) -> ForwardedRequest:
        """Return the client's request, with its `Authorization` replaced by `api_key` (or removed)."""
        raw_path = scope.get("raw_path") or scope["path"].encode()
        target = raw_path.decode("latin-1").removeprefix(scope.get("root_path", ""))
        if scope.get("query_string"):
            target += "?" + scope["query_string"].decode("latin-1")
        dropped = _REPLACED | _hop_by_hop(scope["headers"])
        kept = ((k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k.lower() not in dropped)
        # Uncompressed: the middleware reads these answers.
        request = cls(scope["method"], path_of(scope), target, (*kept, ("Accept-Encoding", "identity")), body)
        return request.with_key(api_key)

    @classmethod
    def of(cls, method: str, path: str, payload: dict[str, Any] | None = None) -> ForwardedRequest:
        """Return a request of our own, with a JSON body if there is a `payload`."""
        if payload is None:
            return cls(method, path, path)
        headers = (("Content-Type", "application/json"),)
        return cls(method, path, path, headers, json.dumps(payload, separators=(",", ":")).encode())

    def with_key(self, api_key: str | None) -> ForwardedRequest:
        return replace(self, headers=(*self.headers, ("Authorization", f"Bearer {api_key}"))) if api_key else self

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Answering:
    """A `send` that remembers whether the answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        self.has_begun = True
        await self._send(message)


def open_session() -> aiohttp.ClientSession:
    """Open a connection pool for upstreams: unlimited, without cookies, proxies or a timeout on answers."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
        trust_env=False,  # a proxy for the outer world must not get requests to our own nodes
    )


async def stream(session: aiohttp.ClientSession, url: str, request: ForwardedRequest, answering: Answering) -> None:
    """Pass one answer through, piece by piece as it arrives. Raises `RedirectedError` or `aiohttp.ClientError` if
    nothing has been answered; `UpstreamLostError` if something has."""
    try:
        async with _open(session, url, request) as answer:
            _refuse_redirect(answer)
            start = {"type": "http.response.start", "status": answer.status, "headers": _answer_headers(answer)}
            await answering(start)
            room = MAX_BODY_BYTES
            async for chunk in answer.content.iter_any():
                room -= len(chunk)
                if room < 0:
                    raise aiohttp.ClientPayloadError(str(BodyTooLongError(MAX_BODY_BYTES)))
                await answering({"type": "http.response.body", "body": chunk, "more_body": True})
        await answering({"type": "http.response.body", "body": b""})
    except aiohttp.ClientError as error:
        if answering.has_begun:
            raise UpstreamLostError(f"{url} broke off its answer to {request}: {words(error)}") from error
        raise


async def ask(session: aiohttp.ClientSession, url: str, request: ForwardedRequest) -> Reply:
    """Return one whole answer. Raises `aiohttp.ClientError`, also for one that is too long, and `RedirectedError`."""
    async with _open(session, url, request) as answer:
        _refuse_redirect(answer)
        content_type = answer.headers.get("Content-Type", "application/json").encode("latin-1")
        try:
            return Reply(answer.status, await read_answer(answer, MAX_BODY_BYTES), content_type)
        except BodyTooLongError as error:
            raise aiohttp.ClientPayloadError(str(error)) from error


async def hang_up(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def words(error: BaseException) -> str:
    """Return an exception as part of a sentence; some of them have no text."""
    return str(error) or type(error).__name__


def quote(body: bytes) -> str:
    """Return the beginning of an answer, for messages."""
    text = body.decode(errors="replace").strip()
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]} …"


def listed(said: Mapping[str, str]) -> str:
    """Return `"URL: what it said; URL: …"`."""
    return "; ".join(f"{url}: {text}" for url, text in said.items())


def _open(
    session: aiohttp.ClientSession, url: str, request: ForwardedRequest
) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
    return session.request(
        request.method,
        URL(url + request.target, encoded=True),
        headers=request.headers,
        data=request.body or None,
        allow_redirects=False,
    )


def _refuse_redirect(answer: aiohttp.ClientResponse) -> None:
    problem = redirect_problem(str(answer.url), answer.status, answer.headers.get("Location"))
    if problem is not None:
        raise RedirectedError(problem)


def _answer_headers(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    dropped = _hop_by_hop(answer.raw_headers)
    if "Content-Encoding" in answer.headers:  # undone while it was read, although we asked for none
        dropped |= {b"content-encoding", b"content-length"}
    return [(key, value) for key, value in answer.raw_headers if key.lower() not in dropped]


def _hop_by_hop(headers: list[tuple[bytes, bytes]] | tuple[tuple[bytes, bytes], ...]) -> frozenset[bytes]:
    named = b",".join(value for key, value in headers if key.lower() == b"connection")
    return _HOP_BY_HOP | {name.strip().lower() for name in named.split(b",")}


class Wire(Protocol):
    """The way to one upstream, which is asked and answers in vLLM's form."""

    async def ask(self, session: aiohttp.ClientSession, request: ForwardedRequest) -> Reply:
        """Return one whole answer. Raises `aiohttp.ClientError`."""

    async def stream(self, session: aiohttp.ClientSession, request: ForwardedRequest, answering: Answering) -> None:
        """Pass one answer through; see `upstreams.stream`."""


@dataclass(frozen=True, slots=True)
class PlainWire:
    """The way to a server that speaks vLLM's form itself."""

    url: str  # root URL, without `/v1`

    async def ask(self, session: aiohttp.ClientSession, request: ForwardedRequest) -> Reply:
        return await ask(session, self.url, request)

    async def stream(self, session: aiohttp.ClientSession, request: ForwardedRequest, answering: Answering) -> None:
        return await stream(session, self.url, request, answering)


# -- the upstreams ----------------------------------------------------------------------------------------------------

_START, _FINISH = "/start_weight_update", "/finish_weight_update"
_LOAD_ADAPTER, _SET_VERSION = "/v1/load_lora_adapter", "/update_weight_version"
_VERSION_PATHS = (_FINISH, _SET_VERSION)

_PROBE_TIMEOUT_S = 30.0  # an event loop that loads weights is slow to answer, and not dead
# A request whose connection was lost after it had been sent may be what killed the server: it must not kill them all.
_MAX_LOST = 2
_NO_ANSWER = 599  # stands for "no answer" among statuses, as the worst of them; never sent
_SHUTTING_DOWN = "the gateway is shutting down"


@dataclass(slots=True)
class Upstream:
    """One server behind the gateway."""

    url: str  # root URL, without `/v1`
    wire: Wire  # the way to it
    num_running: int = 0  # number of requests that it is answering now
    num_sent: int = 0  # number of requests that it was ever given
    down: str | None = None  # why it is not asked until a probe succeeds, or `None`
    excluded: str | None = None  # why it must not answer although it may be up, or `None`
    # The version that it held when it was last asked, `None` if it has no `/weight_info`.
    weight_version: str | None = None
    updates_whole: bool = False  # whether no control call has failed since its last `/start_weight_update`
    is_half_updated: bool = False  # whether such an update was begun and has not succeeded
    has_newest_adapter: bool = False  # whether no control call has failed since it loaded an adapter

    @property
    def in_rotation(self) -> bool:
        return self.down is None and self.excluded is None

    def mark_down(self, reason: str) -> None:
        if self.down is None:
            _logger.warning("%s is down: %s", self.url, reason)
        self.down = reason

    def mark_up(self) -> None:
        if self.down is not None:
            _logger.warning("%s is up again", self.url)
        self.down = None

    def exclude(self, reason: str) -> None:
        if self.excluded is None:
            _logger.warning("%s is excluded until a weight update succeeds on it: %s", self.url, reason)
        self.excluded = reason
        self.updates_whole = self.has_newest_adapter = False

    def admit(self) -> None:
        if self.excluded is not None:
            _logger.warning("%s holds the current weights and is admitted again", self.url)
        self.excluded = None


class UpstreamApp:
    """ASGI (http and lifespan) in front of one or more OpenAI servers that hold the same model.

    Args:
        urls: Root URLs without `/v1`, all different.
        api_key: Sent as bearer token to each of them; a client's own `Authorization` never is.
        probe_every_s: Seconds between two looks at `/health` of an upstream.
        engine_timeout_s: Seconds within which its engine must answer. Fewer than a trainer waits for the gateway
            (`gym_server_hang_timeout`): it hears of the others.
        wire: Makes the way to an upstream from its URL.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None = None,
        probe_every_s: float = 5.0,
        engine_timeout_s: float = 120.0,
        wire: Callable[[str], Wire] = PlainWire,
    ) -> None:
        self.upstreams = [Upstream(url, wire(url)) for url in urls]
        self._api_key = api_key
        self._probe_every_s, self._engine_timeout_s = probe_every_s, engine_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._monitors: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._is_cut_off = False

    async def start(self) -> None:
        """Open the connection pool and begin to watch the upstreams. Called by the lifespan protocol."""
        self._session = open_session()
        await asyncio.gather(*(self._learn_version(upstream) for upstream in self.upstreams))
        self._monitors = [
            asyncio.create_task(monitor(upstream))
            for upstream in self.upstreams
            for monitor in (self._monitor, self._monitor_engine)
        ]
        for monitor in self._monitors:
            monitor.add_done_callback(_report_death)

    async def close(self) -> None:
        """Cancel what is running and close every connection. Idempotent."""
        self.cut_off()
        for monitor in self._monitors:
            monitor.cancel()
        await asyncio.gather(*self._monitors, *self._running, return_exceptions=True)
        self._monitors = []
        if self._session is not None:
            await self._session.close()

    def cut_off(self) -> None:
        """Cancel every running request, and refuse later ones: the client is told 500, or its answer breaks off."""
        self._is_cut_off = True
        for work in self._running:
            work.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises `UpstreamLostError`, see there; every other failure is an answer."""
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1011, "reason": "the gateway forwards HTTP only"})
        try:
            # The middleware in front adds the exact prompt to what its client has sent.
            request = ForwardedRequest.from_scope(
                scope, await read_body(receive, 2 * MAX_REQUEST_BYTES), self._api_key
            )
        except ClientGoneError:
            return None
        except AnsweredError as answered:
            return await answered.reply.send(send)
        if not request.target.startswith("/"):  # `OPTIONS *`: must not become part of the host name
            return await Reply.error(400, f"{request.target!r} is not a path").send(send)
        if self._is_cut_off:
            return await Reply.error(500, _SHUTTING_DOWN).send(send)
        answering = Answering(send)
        await self._while_client_waits(self._answer(request, scope.get(AFFINITY), answering), receive, answering)
        return None

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.close()
                return await send({"type": "lifespan.shutdown.complete"})

    async def _while_client_waits(
        self, work: Coroutine[Any, Any, None], receive: Receive, answering: Answering
    ) -> None:
        """Run `work` until the client hangs up: the upstream notices that, and stops generating."""
        working = asyncio.create_task(work)
        hanging_up = asyncio.create_task(hang_up(receive))
        self._running.add(working)
        try:
            await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                return hanging_up.result()
            if not working.cancelled():
                return working.result()
        finally:
            self._running.discard(working)
            working.cancel()
            hanging_up.cancel()
            await asyncio.gather(working, hanging_up, return_exceptions=True)
        if answering.has_begun:
            raise UpstreamLostError(_SHUTTING_DOWN)
        return await Reply.error(500, _SHUTTING_DOWN).send(answering)

    async def _answer(self, request: ForwardedRequest, affinity: str | None, answering: Answering) -> None:
        try:
            if request.method == "POST" and request.path in CONTROL_PATHS:
                reply = await self._fan_out(request)
            elif (request.method, request.path) == ("GET", "/weight_info"):
                reply = await self._weight_info(request)
            elif (request.method, request.path) == ("GET", "/health"):
                reply = self._health()
            elif (request.method, request.path) == ("GET", ENGINE_PATH):
                reply = await self._is_paused(request)
            elif (request.method, request.path) == ("GET", "/metrics"):
                reply = await self._metrics(request)
            else:
                return await self._forward(request, affinity, answering)
        except UpstreamLostError:
            raise
        except PolicyServerError as error:
            reply = Reply.error(500, str(error))
        return await reply.send(answering)

    # -- one upstream -------------------------------------------------------------------------------------------------

    async def _forward(self, request: ForwardedRequest, affinity: str | None, answering: Answering) -> None:
        lost: list[str] = []
        while len(lost) < _MAX_LOST:
            upstream = self._choose(request, affinity, lost)
            upstream.num_running += 1
            upstream.num_sent += 1
            try:
                return await upstream.wire.stream(self._open_session, request, answering)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                upstream.mark_down(words(error))
            except RedirectedError as error:
                raise PolicyServerError(f"The upstream {upstream.url} sends {request} elsewhere: {error}.") from error
            except aiohttp.ClientError as error:
                _logger.warning("%s gave no answer to %s: %s", upstream.url, request, words(error))
                lost.append(upstream.url)
                await self._probe(upstream)
            finally:
                upstream.num_running -= 1
        raise PolicyServerError(
            f"The connection to {' and then to '.join(lost)} was lost before {request} was answered. It is not sent "
            "again, for it may be what ended them.",
            "Read the logs of these servers.",
        )

    def _choose(self, request: ForwardedRequest, affinity: str | None, lost: Sequence[str]) -> Upstream:
        alive = [upstream for upstream in self.upstreams if upstream.in_rotation]
        candidates = [upstream for upstream in alive if upstream.url not in lost] or alive
        if not candidates:
            raise self._nobody_left()
        if affinity is not None:
            return max(candidates, key=lambda upstream: _rank(affinity, upstream.url))
        if request.method == "GET":
            return candidates[0]  # a question about the server: the same one answers as long as it can
        return min(candidates, key=lambda upstream: (upstream.num_running, upstream.num_sent))

    def _nobody_left(self) -> PolicyServerError:
        return PolicyServerError(f"No upstream of the gateway can answer: {self._absences()}.")

    def _absences(self) -> str:
        reasons = {u.url: f"excluded ({u.excluded})" if u.excluded else f"down ({u.down})" for u in self.upstreams}
        return listed(reasons)

    async def _ask(self, upstream: Upstream, request: ForwardedRequest) -> Reply:
        return await upstream.wire.ask(self._open_session, request)

    @property
    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise PolicyServerError(
                "The gateway was not started: its server must speak the lifespan protocol.", "Use `trl-gym gateway`."
            )
        return self._session

    # -- all upstreams ------------------------------------------------------------------------------------------------

    async def _fan_out(self, request: ForwardedRequest) -> Reply:
        """Send a control call to every upstream, down or not: one that missed an update must not serve old weights."""
        before = [(upstream.excluded, upstream.updates_whole) for upstream in self.upstreams]
        replies = await asyncio.gather(*(self._control(upstream, request) for upstream in self.upstreams))
        statuses = {reply.status for reply in replies}
        if statuses == {200}:
            return next((reply for reply in replies if _says_no(reply)), replies[0])
        if len(statuses) == 1 and 400 <= replies[0].status < 500:  # all refused alike, before they did anything
            for upstream, (excluded, updates_whole) in zip(self.upstreams, before, strict=True):
                upstream.excluded, upstream.updates_whole = excluded, updates_whole
        worst, upstream = max(zip(replies, self.upstreams, strict=True), key=lambda pair: pair[0].status)
        how = "gave no answer" if worst.status == _NO_ANSWER else f"answered HTTP {worst.status}"
        return Reply.error(500, f"upstream {upstream.url} {how} to {request}: {quote(worst.body)}")

    async def _control(self, upstream: Upstream, request: ForwardedRequest) -> Reply:
        """Send a control call to one upstream, never twice. One that is down is not waited for as long as one whose
        calls in flight end first, or that loads weights."""
        patience_s = None if upstream.down is None else self._engine_timeout_s
        try:
            async with asyncio.timeout(patience_s):
                reply = await self._ask(upstream, request)
            if reply.ok and request.path in _VERSION_PATHS:
                upstream.weight_version = await self._read_version(upstream)
            if reply.ok and upstream.down is not None:
                await self._come_back(upstream)
        except asyncio.CancelledError:
            upstream.exclude(f"{request} was cut off before it was answered")
            raise
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = self._silence() if isinstance(error, TimeoutError) else words(error)
            upstream.exclude(f"{request}: {reason}")
            return Reply(_NO_ANSWER, reason.encode())
        if not reply.ok:
            upstream.exclude(f"{request}: HTTP {reply.status}: {quote(reply.body)}")
            return reply
        if request.path == _START:
            upstream.updates_whole = upstream.is_half_updated = True
        if request.path == _FINISH and upstream.updates_whole:
            upstream.is_half_updated = False
            upstream.admit()
        if request.path == _LOAD_ADAPTER:
            upstream.has_newest_adapter = True
        if request.path == _SET_VERSION and upstream.has_newest_adapter and not upstream.is_half_updated:
            upstream.admit()
        return reply

    async def _weight_info(self, request: ForwardedRequest) -> Reply:
        replies = await self._ask_all(request)
        versions = {url: quote(r.body) if r.ok else f"HTTP {r.status}" for url, r in replies.items()}
        if len(set(versions.values())) > 1:
            raise PolicyServerError(
                f"The upstreams hold different weights: {listed(versions)}.", "Repeat the weight update."
            )
        return next(iter(replies.values()))

    async def _is_paused(self, request: ForwardedRequest) -> Reply:
        """Ask the engines of all upstreams in rotation, and return what one says that is paused, or has no such
        question."""
        replies = list((await self._ask_all(request)).values())
        refusals = [reply for reply in replies if not reply.ok]
        return next(iter([*refusals, *(one for one in replies if _object(one).get("is_paused")), *replies]))

    async def _metrics(self, request: ForwardedRequest) -> Reply:
        """Return the metrics of all upstreams in rotation in one text, each told by a label `upstream`."""
        replies = await self._ask_all(request)
        if (refusal := next((reply for reply in replies.values() if not reply.ok), None)) is not None:
            return refusal  # those of some would be taken for those of all
        lines = [_labelled(line, url) for url, reply in replies.items() for line in reply.body.splitlines()]
        lines = sorted(filter(None, lines), key=lambda line: line.partition(b"{")[0])  # a metric's lines are together
        return Reply(200, b"\n".join(lines) + b"\n", b"text/plain; version=0.0.4; charset=utf-8")

    async def _ask_all(self, request: ForwardedRequest) -> dict[str, Reply]:
        """Return the answers of all upstreams in rotation, by URL. Raises `PolicyServerError` if there is none."""
        asked = [upstream for upstream in self.upstreams if upstream.in_rotation]
        answers = await asyncio.gather(*(self._ask_or_mark_down(upstream, request) for upstream in asked))
        replies = {upstream.url: reply for upstream, reply in zip(asked, answers, strict=True) if reply is not None}
        if not replies:
            raise self._nobody_left()
        return replies

    async def _ask_or_mark_down(self, upstream: Upstream, request: ForwardedRequest) -> Reply | None:
        try:
            async with asyncio.timeout(self._engine_timeout_s):
                return await self._ask(upstream, request)
        except TimeoutError:
            upstream.mark_down(self._silence())
        except aiohttp.ClientError as error:
            upstream.mark_down(words(error))
        return None

    def _silence(self) -> str:
        return f"its engine has not answered for {self._engine_timeout_s:g} s"

    def _health(self) -> Reply:
        if any(upstream.in_rotation for upstream in self.upstreams):
            return Reply.from_json(200, {})
        return Reply.error(503, self._absences())

    # -- watching -----------------------------------------------------------------------------------------------------

    async def _monitor(self, upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(self._probe_every_s)
            await self._probe(upstream)

    async def _monitor_engine(self, upstream: Upstream) -> None:
        """Have the engine of an upstream answer, which may be in a forward pass or load weights."""
        while True:
            await asyncio.sleep(self._probe_every_s)
            with contextlib.suppress(aiohttp.ClientError):  # the other monitor marks it down
                try:
                    async with asyncio.timeout(self._engine_timeout_s):
                        await self._ask(upstream, self._get(ENGINE_PATH))
                except TimeoutError:
                    upstream.mark_down(self._silence())

    async def _probe(self, upstream: Upstream) -> None:
        """Ask `/health` and mark the upstream accordingly."""
        try:
            async with asyncio.timeout(min(_PROBE_TIMEOUT_S, self._engine_timeout_s)):
                health = await self._ask(upstream, self._get("/health"))
                if health.ok and upstream.down is not None:
                    await self._ask(upstream, self._get(ENGINE_PATH))
                    await self._come_back(upstream)
        except (aiohttp.ClientError, TimeoutError) as error:
            return upstream.mark_down(f"GET /health: {words(error)}")
        if not health.ok:
            upstream.mark_down(f"GET /health: HTTP {health.status}")
        return None

    async def _come_back(self, upstream: Upstream) -> None:
        version = await self._read_version(upstream)
        if upstream.weight_version is not None and version != upstream.weight_version:
            held = f"weights {version!r} where it held {upstream.weight_version!r}"
            upstream.exclude(f"it was restarted and holds {held}")
            upstream.is_half_updated = False  # its own weights are those of the checkpoint again
        upstream.mark_up()

    async def _learn_version(self, upstream: Upstream) -> None:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                upstream.weight_version = await self._read_version(upstream)
        except (aiohttp.ClientError, TimeoutError) as error:
            upstream.mark_down(words(error))

    async def _read_version(self, upstream: Upstream) -> str | None:
        """Return None for a server that does not say: it has no way to get other weights either."""
        reply = await self._ask(upstream, self._get("/weight_info"))
        version = _object(reply).get("weight_version") if reply.ok else None
        return None if version is None else str(version)

    def _get(self, path: str) -> ForwardedRequest:
        return ForwardedRequest.of("GET", path).with_key(self._api_key)


def _rank(affinity: str, url: str) -> bytes:
    """Rendezvous hashing: the highest rank answers; without that upstream only its own keys move."""
    return hashlib.blake2b(f"{affinity}\0{url}".encode(), digest_size=8).digest()


def _labelled(line: bytes, url: str) -> bytes:
    """Return a sample of Prometheus' text format with one label more; nothing for a comment."""
    if not line or line.startswith(b"#"):
        return b""
    label = b'upstream="' + url.encode() + b'"'
    name, brace, rest = line.partition(b"{")
    if not brace:
        name, _, value = line.partition(b" ")
        return name + b"{" + label + b"} " + value
    return name + b"{" + label + (b"" if rest.startswith(b"}") else b",") + rest


def _says_no(reply: Reply) -> bool:
    """`/reset_prefix_cache` says so with status 200."""
    return _object(reply).get("success") is False


def _object(reply: Reply) -> dict[str, Any]:
    try:
        parsed = reply.json()
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _report_death(monitor: asyncio.Task[None]) -> None:
    if not monitor.cancelled() and (error := monitor.exception()) is not None:
        _logger.error("an upstream is not watched any more", exc_info=error)
