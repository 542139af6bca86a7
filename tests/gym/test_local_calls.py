"""Calls in process against the same calls over a socket: small applications on a real uvicorn, asked in both ways."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib.util
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.cookies import Morsel, SimpleCookie
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, RedirectResponse, StreamingResponse
from yarl import URL

SCRIPT = Path(__file__).parents[2] / "trl_gym" / "gym" / "local_calls.py"
DEADLINE_S = 60.0
BIG = b"x" * 3_000_000
place = contextvars.ContextVar("place", default="where the server started")


def load() -> Any:
    """Load the script as `host.py` does, with what it takes from nemo_gym, which is not installed here."""
    gym: Any = ModuleType("nemo_gym")
    gym.server_utils = SimpleNamespace(ClientSession=aiohttp.ClientSession)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nemo_gym", gym)
        spec = importlib.util.spec_from_file_location("trl_gym_local_calls", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


local_calls = load()


def gyms_session(**options: Any) -> aiohttp.ClientSession:
    """Return a session as `nemo_gym.server_utils` makes its only one."""
    defaults = {"timeout": aiohttp.ClientTimeout(), "cookie_jar": aiohttp.DummyCookieJar()}
    session: aiohttp.ClientSession = local_calls.server_utils.ClientSession(**(defaults | options))
    return session


class Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


@dataclass
class Ways:
    """One application, and two sessions: one reaches it over its socket, the other in process."""

    url: str
    server: Server
    sessions: dict[str, aiohttp.ClientSession]
    calls: Any
    marks: list[str]

    async def ask(self, path: str, method: str = "POST", **options: Any) -> Any:
        """Ask in both ways, and return what is the same."""
        seen = [await observe(session, method, self.url + path, options) for session in self.sessions.values()]
        assert seen[0] == seen[1]
        return seen[0]


async def observe(session: aiohttp.ClientSession, method: str, url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return everything that a caller can tell of an answer."""
    try:
        response = await asyncio.wait_for(session.request(method=method, url=url, **options), DEADLINE_S)
    except aiohttp.ClientError as error:
        return {"error": repr(error)}
    info = response.request_info
    seen: dict[str, Any] = {
        "status": (response.status, response.reason, response.ok, response.version),
        "headers": (list(response.headers.items()), response.raw_headers),
        "cookies": {name: (one.value, one.coded_value, one.OutputString()) for name, one in response.cookies.items()},
        "urls": (response.url, response.real_url, [one.status for one in response.history]),
        "request": (info.url, info.method, info.real_url, list(info.headers.items())),
    }
    try:
        seen["body"], seen["again"] = await response.content.read(), await response.read()
        seen["text"] = await response.text()
    except (aiohttp.ClientError, UnicodeDecodeError) as error:
        seen["broken"] = repr(error)
    try:
        response.raise_for_status()
    except aiohttp.ClientResponseError as error:
        seen["raised"] = (str(error), repr(error), error.status, error.message, error.history)
    return seen


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[Ways]:
    server = Server(uvicorn.Config(app, port=0, log_level="critical", date_header=False, timeout_graceful_shutdown=1))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    port = server.servers[0].sockets[0].getsockname()[1]
    marks: list[str] = []
    calls = local_calls.LocalCalls(lambda _headers, url: marks.append(url), "gone")
    over_socket = gyms_session()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_calls.server_utils, "ClientSession", aiohttp.ClientSession)
        calls.install()
        in_process = gyms_session()
    calls.open(server, "127.0.0.1", port)
    try:
        sessions = {"socket": over_socket, "process": in_process}
        yield Ways(f"http://127.0.0.1:{port}", server, sessions, calls, marks)
    finally:
        await over_socket.close()
        await in_process.close()
        server.should_exit = True
        await running


# -- what the application sees ----------------------------------------------------------------------------------------


class Mirror:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.is_local: list[bool] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.is_local.append("gone" in scope.pop("extensions", ()))
        scope = {**scope, "client": scope["client"][0], "headers": sorted(scope["headers"]), "app": None}
        text = repr((sorted(scope.items()), len(body), body[:1000])).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/plain")]})
        await send({"type": "http.response.body", "body": text})


async def lifespan(receive: Any, send: Any) -> None:
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GET": ("GET", "/", {}),
    "without a body": ("POST", "/verify", {}),
    "Gym's JSON": ("POST", "/v1/responses", {"data": b'{"a": 1}', "headers": {"Content-Type": "application/json"}}),
    "empty JSON": ("post", "/tool", {"json": {}}),
    "bytes": ("PUT", "/bytes", {"data": b"\x00\xff"}),
    "DELETE": ("DELETE", "/one", {}),
    "a GET with a body": ("GET", "/one", {"json": []}),
    "a path and a query": ("GET", "/a%20b/%C3%BC/c%2Fd?q=1&r=%20x", {}),
    "letters in a path": ("GET", "/ü ß", {}),
    "headers": ("POST", "/", {"headers": {"X-Mixed-Case": "a b", "Accept": "text/plain", "X-Letters": "ü"}}),
    "cookies": ("POST", "/", {"json": {}, "cookies": {"b": "2", "a": "1", "c": 'x="y"; z'}}),
    "big": ("POST", "/", {"data": BIG}),
}
NOT_KNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "params": ("GET", "/", {"params": {"q": "1"}}),
    "a timeout": ("GET", "/", {"timeout": aiohttp.ClientTimeout(total=60)}),
    "a form": ("POST", "/", {"data": {"a": "1"}}),
    "text": ("POST", "/", {"data": "text"}),
    "a header for the connection": ("POST", "/", {"headers": {"Connection": "close"}}),
    "a Cookie header": ("POST", "/", {"headers": {"Cookie": "a=1"}, "cookies": {"b": "2"}}),
    "headers of another type": ("POST", "/", {"headers": [("A", "1"), ("A", "2")]}),
    "a header with blanks": ("POST", "/", {"headers": {"X-Blank": " v "}}),
    "HEAD": ("HEAD", "/", {}),
    "no redirects": ("GET", "/", {"allow_redirects": False}),
}


async def test_the_application_sees_what_it_would_over_a_socket() -> None:
    async with serving(mirror := Mirror()) as ways:
        for method, path, options in [*REQUESTS.values(), *NOT_KNOWN.values()]:
            await ways.ask(path, method, **options)
    assert mirror.is_local[1::2] == [True] * len(REQUESTS) + [False] * len(NOT_KNOWN)
    assert not any(mirror.is_local[::2]) and len(ways.marks) == len(REQUESTS)


async def test_what_is_not_of_this_process_goes_over_a_socket() -> None:
    async def over_socket(*_: Any, **__: Any) -> str:
        return "over a socket"

    async with serving(Mirror()) as ways, serving(Mirror()) as elsewhere:
        assert (await ways.calls.call(over_socket, "GET", ways.url)).status == 200
        for url in (elsewhere.url, ways.url.replace("127.0.0.1", "localhost"), ways.url.replace("//", "//user:key@")):
            assert await ways.calls.call(over_socket, "GET", url) == "over a socket"
        other_loop = ways.calls.call(over_socket, "GET", ways.url)
        assert await asyncio.to_thread(asyncio.run, other_loop) == "over a socket"
        ways.server.should_exit = True
        assert await ways.calls.call(over_socket, "GET", ways.url) == "over a socket"


@pytest.mark.parametrize(
    "options", [{"timeout": aiohttp.ClientTimeout(total=5)}, {"headers": {"A": "1"}}, {"cookie_jar": None}]
)
async def test_a_session_that_adds_to_requests_keeps_to_sockets(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    calls = local_calls.LocalCalls(lambda *_: None, "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_calls.server_utils, "ClientSession", aiohttp.ClientSession)
        calls.install()
        async with gyms_session(**options) as session:
            assert "_request" not in vars(session)
    assert "servers call each other over sockets" in caplog.text


# -- requests as aiohttp makes them -----------------------------------------------------------------------------------


class Captured(Exception):
    pass


async def capture(request: aiohttp.ClientRequest, _: Any) -> aiohttp.ClientResponse:
    raise Captured(request)


def as_aiohttp(method: str, url: str, options: dict[str, Any]) -> aiohttp.ClientRequest:
    async def make() -> aiohttp.ClientRequest:
        async with gyms_session(middlewares=(capture,)) as session:
            try:
                await session.request(method, url, **options)
            except Captured as captured:
                request: aiohttp.ClientRequest = captured.args[0]
                return request
        raise AssertionError("not captured")

    return asyncio.run(make())


def morsel(name: str, value: str, attributes: dict[str, Any]) -> Morsel[str]:
    cookie = SimpleCookie()
    cookie[name] = value
    for key, text in attributes.items():
        cookie[name][key] = text
    return cookie[name]


ATTRIBUTES = st.fixed_dictionaries(
    {},
    optional={
        "path": st.sampled_from(["/", "", "/x", "x"]),
        "domain": st.sampled_from(["", "127.0.0.1", "example.com"]),
        "max-age": st.sampled_from(["", "0", "-1", "1209600", "soon", 60]),
        "expires": st.sampled_from(["", "Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 01 Jan 2099 00:00:00 GMT"]),
        "secure": st.booleans(),
        "httponly": st.booleans(),
        "samesite": st.just("lax"),
    },
)
NAMES = st.text("abcXYZ_-.~1", min_size=1, max_size=4)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12) | st.just("eyJhIjoxfQ==.aX-_.s")
COOKIES = st.dictionaries(NAMES, VALUES | st.tuples(VALUES, ATTRIBUTES), max_size=3)


@given(
    method=st.sampled_from(["GET", "post", "PUT", "DELETE", "PATCH"]),
    url=st.sampled_from(["http://127.0.0.1:9/v1/x", "http://h:9/a%20b?q=%C3%BC+1", "http://10.0.0.1"]),
    headers=st.none() | st.dictionaries(NAMES, st.text("ab ü;=", max_size=5).map(str.strip)),
    cookies=st.none() | COOKIES,
    body=st.none() | st.binary(min_size=1, max_size=5),
    value=st.none() | st.sampled_from([{}, [], {"a": "ü"}]),
)
def test_requests_are_those_of_aiohttp(
    method: str, url: str, headers: Any, cookies: Any, body: bytes | None, value: Any
) -> None:
    options: dict[str, Any] = {"data": body} if body else {"json": value}
    options["cookies"] = cookies and {
        name: morsel(name, *one) if isinstance(one, tuple) else one for name, one in cookies.items()
    }
    ours = local_calls.plain_request(method, URL(url), {**options, "headers": headers})
    theirs = as_aiohttp(method, url, {**options, "headers": headers})
    if ours is None:  # only what attributes of cookies decide
        assert any(isinstance(one, tuple) for one in (cookies or {}).values())
        return
    content_type = theirs.headers.setdefault("Content-Type", "application/octet-stream")  # comes with the first byte
    assert ours.headers.setdefault("Content-Type", content_type) == content_type
    assert list(ours.headers.items()) == list(theirs.headers.items())
    assert (ours.method, ours.url) == (theirs.method, theirs.url)
    assert ours.body == (b"" if theirs.body == b"" else asyncio.run(theirs.body.as_bytes()))


async def test_cookies_go_from_answer_to_request_as_over_a_socket() -> None:
    """A session, as Gym's servers keep it, and what an agent sets for the call after the next."""
    app = FastAPI()

    @app.post("/count")
    async def count(request: Request, response: Response) -> dict[str, Any]:
        number = len(request.cookies.get("server___one", "")) + 1
        session = f"server___one={'=' * number}; path=/; Max-Age=1209600; httponly; samesite=lax"  # as starlette's
        response.headers.append("set-cookie", session)
        for name, value in request.cookies.items():
            response.set_cookie(f"again_{name}"[:18], value)
        return {"count": number, "cookies": sorted(request.cookies.items())}

    async def walk(session: aiohttp.ClientSession, url: str) -> list[Any]:
        cookies: Any = {"plain": "1"}
        seen = []
        for _ in range(4):
            response = await session.post(url, json={}, cookies=cookies)
            seen.append(await response.json())
            cookies = response.cookies
        return seen

    async with serving(app) as ways:
        over_socket, in_process = [await walk(one, f"{ways.url}/count") for one in ways.sessions.values()]
        assert over_socket == in_process and [one["count"] for one in in_process] == [1, 2, 3, 4]
        assert len(ways.marks) == 4, "none of them needed a socket"


# -- what the caller sees ---------------------------------------------------------------------------------------------


def answering(*messages: dict[str, Any], result: Any = None, error: BaseException | None = None) -> Any:
    """An ASGI application that sends these messages and returns or raises."""

    async def app(scope: Any, receive: Any, send: Any) -> Any:
        for message in messages:
            await send(message)
        if error is not None:
            raise error
        return result

    return app


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def part(body: bytes = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


LENGTH = (b"content-length", b"5")
APPLICATIONS = {
    "whole": answering(start(200, (b"X-Name", b" v "), LENGTH), part(b"hello")),
    "in chunks": answering(start(), part(b"hel", more=True), part(b"lo")),
    "letters": answering(
        start(200, (b"x-letters", "ü".encode("latin-1")), (b"set-cookie", b"a=1; Path=/")), part(b"\xff")
    ),
    "nothing to say": answering(start(204), part()),
    "not modified": answering(start(304, (b"etag", b"1")), part()),
    "a status of its own": answering(start(299), part()),
    "failed": answering(start(418, LENGTH), part(b"error")),
    "raises": answering(error=ValueError("boom")),
    "cancelled": answering(error=asyncio.CancelledError()),
    "raises half-way, chunks": answering(start(), part(b"he", more=True), error=ValueError("boom")),
    "raises half-way, length": answering(start(200, LENGTH), part(b"he", more=True), error=ValueError("boom")),
    "says nothing": answering(),
    "says half": answering(start(200, LENGTH), part(b"he", more=True)),
    "only a head": answering(start()),
    "too long": answering(start(200, LENGTH), part(b"too long")),
    "too short": answering(start(200, LENGTH), part(b"he")),
    "no head": answering(part(b"hello")),
    "returns something": answering(start(200, LENGTH), part(b"hello"), result=1),
    "returns something at once": answering(result=1),
    "sends after the end": answering(start(200, LENGTH), part(b"hello"), part(b"more")),
    "a broken header": answering(start(200, (b"x", b"a\nb")), part(b"hello")),
    "says that it is compressed": answering(start(200, (b"content-encoding", b"gzip")), part(b"hello")),
}


async def test_answers_and_their_absence_are_as_over_a_socket() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        return await APPLICATIONS[scope["path"][1:]](scope, receive, send)

    async with serving(app) as ways:
        for name in APPLICATIONS:
            seen = await ways.ask(f"/{name}", json={"a": 1})
            assert "broken" in seen or "error" in seen or "body" in seen, name
        assert len(ways.marks) == len(APPLICATIONS), "none of them needed a socket"


def real_application() -> FastAPI:
    """Routes as environments have them."""
    app = FastAPI()
    app.add_middleware(GZipMiddleware, minimum_size=1000)

    @app.middleware("http")
    async def failures(request: Request, call_next: Any) -> Any:
        try:
            return await call_next(request)
        except Exception as error:
            return JSONResponse(repr(error), status_code=500)

    @app.post("/number")
    async def number(body: dict[str, int]) -> dict[str, int]:
        return body

    @app.post("/raises")
    async def raises() -> None:
        raise RuntimeError("ü" * 3)

    @app.post("/refuses")
    async def refuses() -> None:
        raise HTTPException(403, "no")

    @app.post("/big")
    async def big() -> Response:
        return Response(BIG)

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse((b"%d," % number for number in range(1000)), media_type="text/event-stream")

    @app.post("/away")
    async def away() -> RedirectResponse:
        return RedirectResponse("/number")

    @app.post("/slash/")
    async def slash(body: dict[str, int]) -> dict[str, int]:
        return body

    return app


async def test_routes_answer_as_over_a_socket() -> None:
    statuses = {"/number": 200, "/raises": 500, "/refuses": 403, "/nowhere": 404, "/big": 200, "/stream": 200}
    async with serving(real_application()) as ways:
        for path, status in {**statuses, "/away": 200, "/slash": 200}.items():
            assert (await ways.ask(path, json={"a": 1}))["status"][0] == status, path
        assert (await ways.ask("/number", json={"a": "x"}))["status"][0] == 422
        assert (await ways.ask("/number", "GET"))["status"][0] == 405


# -- who is gone, and what goes along ---------------------------------------------------------------------------------


class Long:
    """Answers in parts, and writes down what happens to it."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.is_asked, self.may_go_on, self.has_ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        try:
            self.events.append((await receive())["type"])
            if scope["path"] == "/stream":
                await send(start())
                await send(part(b"first", more=True))
            self.is_asked.set()
            self.events.append((await receive())["type"])
            await send(start() if scope["path"] != "/stream" else part(b"second"))
            self.events.append("sent")
        except BaseException as error:
            self.events.append(repr(error))
            raise
        finally:
            self.has_ended.set()


@pytest.mark.parametrize("way", ["socket", "process"])
async def test_a_cancelled_caller_is_gone_for_the_application(way: str) -> None:
    async with serving(long := Long()) as ways, asyncio.timeout(DEADLINE_S):
        caller = asyncio.create_task(ways.sessions[way].post(ways.url, json={})._coro)  # type: ignore[attr-defined]
        await long.is_asked.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await long.has_ended.wait()
    assert long.events == ["http.request", "http.disconnect", "sent"]


@pytest.mark.parametrize("way", ["socket", "process"])
@pytest.mark.parametrize("leave", ["close", "release"])
async def test_parts_arrive_as_they_are_sent_and_a_caller_may_leave(way: str, leave: str) -> None:
    async with serving(long := Long()) as ways, asyncio.timeout(DEADLINE_S):
        response = await ways.sessions[way].post(f"{ways.url}/stream", json={})
        assert await response.content.readany() == b"first"
        getattr(response, leave)()
        await long.has_ended.wait()
        with pytest.raises(aiohttp.ClientConnectionError):
            await response.read()
    assert long.events == ["http.request", "http.disconnect", "sent"]


async def test_an_application_waits_for_a_reader_that_lags_behind() -> None:
    ahead = [0]
    read = [0]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        await send(start())
        for number in range(1, 201):
            await send(part(b"x" * 10_000, more=number < 200))
            ahead[0] = max(ahead[0], number * 10_000 - read[0])

    async with serving(app) as ways, asyncio.timeout(DEADLINE_S):
        response = await ways.sessions["process"].get(ways.url)
        async for chunk in response.content.iter_any():
            read[0] += len(chunk)
    assert read[0] == 2_000_000 and ahead[0] < 400_000


async def test_only_what_the_request_carries_gets_to_the_application() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        before = place.get()
        place.set("an earlier request")
        await send(start())
        await send(part(before.encode()))

    async with serving(app) as ways:
        token = place.set("the caller")
        for _ in range(2):
            assert (await ways.ask("/"))["body"] == b"where the server started"
        assert place.get() == "the caller"
        place.reset(token)


async def test_lifespan_state_and_tasks_are_those_of_the_server() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["made"] = "at the start"
            return await lifespan(receive, send)
        scope["state"].setdefault("mine", str(len(ways.server.server_state.tasks)))
        await send(start())
        await send(part(json.dumps(scope["state"]).encode()))

    async with serving(app) as ways:
        assert json.loads((await ways.ask("/"))["body"]) == {"made": "at the start", "mine": "1"}


def test_the_log_says_what_uvicorn_would(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        async with serving(answering(error=ValueError("boom"))) as ways:
            log = logging.getLogger("uvicorn.error")
            log.setLevel(logging.ERROR)
            log.addHandler(caplog.handler)
            await ways.ask("/")
            log.removeHandler(caplog.handler)

    asyncio.run(ask())
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    assert lines == ["Exception in ASGI application\n"] * 2
