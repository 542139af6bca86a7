"""Carry the rollout of a `/run` request to every model call that is made for it. For Gym's interpreter, see `host.py`.

    trainer ──/run, header──► agent ──► agent ──► model server ──header──► policy server
                                ├─────► resources server ──► model server ──header──► policy server
                                └─ subprocess ──URL prefix──► model server ──header──► policy server

Gym's model server passes on what the agent puts into `metadata.extra_body`, and many agents put nothing there: they
build requests of their own. Therefore every co-hosted server keeps the rollout key of the request that it answers in a
context variable. The HTTP clients of this process add it to what they send to a co-hosted server or to the policy, and
to nothing else: tools call the internet. The variable goes along into tasks, `asyncio.to_thread` and thread pools. An
agent that hands the model server's URL to a subprocess gets it from `ServerClient`, with the key as prefix.

The second header names the server that called: the nearest agent, or the resources server behind which the call was
made, whose calls are not the agent's turns.

Keys are opaque here: the policy server reads and checks them (`policy_server/middleware/identity.py`).
"""

from __future__ import annotations

import contextvars
import functools
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
import httpx
import requests
from nemo_gym import server_utils

ROLLOUT_HEADER = "x-trl-gym-rollout"
CALLER_HEADER = "x-trl-gym-caller"
PREFIX = "/trl_gym/rollouts/"
AGENTS, MODELS, RESOURCES = "responses_api_agents", "responses_api_models", "resources_servers"

_ROLLOUT_BYTES, _CALLER_BYTES = ROLLOUT_HEADER.encode(), CALLER_HEADER.encode()  # ASGI's names are in lower case
_PREFIXED = re.compile(rf"^{PREFIX}(?P<key>[^/]+)(?P<rest>/.*)$")
_LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Call(NamedTuple):
    """The request that is being answered."""

    key: str | None = None  # rollout key
    caller: str | None = None  # `kind/name` of the server that calls from here on
    kind: str = ""  # of the server that answers


_NO_CALL = Call()


class Carrier:
    """The rollouts of the requests that this process answers.

    Args:
        servers: Kind, host and port of each co-hosted server.
    """

    def __init__(self, servers: Sequence[tuple[str, str, int]], policy_urls: Sequence[str]) -> None:
        self._current: contextvars.ContextVar[Call] = contextvars.ContextVar("trl_gym_call", default=_NO_CALL)
        self._running: Counter[str] = Counter()  # `/run` requests by agent
        urls = [(kind, f"http://{name}:{port}") for kind, host, port in servers for name in {host, *_LOOPBACK}]
        self._model_servers = {_origin(url) for kind, url in urls if kind == MODELS}
        self._reached = {_origin(url) for url in [*policy_urls, *(url for _, url in urls)]}

    def install(self) -> None:
        """Let the HTTP clients and thread pools that are made from here on carry the current rollout."""
        _extend_init(aiohttp.ClientSession, self._trace_session)
        _extend_init(httpx.Client, self._hook_client)
        _extend_init(httpx.AsyncClient, self._hook_async_client)
        self._wrap_requests()
        self._wrap_thread_pools()
        self._wrap_server_client()

    # -- requests that come in ------------------------------------------------------------------------------------

    def around(self, app: App, kind: str, name: str) -> App:
        """Return a server's application with the rollout of each request as the current one.

        Args:
            kind: Its kind, e.g. `responses_api_agents`.
        """

        own = f"{kind}/{name}"

        async def carrying(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            prefixed, (given, caller) = _strip_prefix(scope), _carried(scope)
            if prefixed and given and prefixed != given:
                return await _refuse(send, name)
            call = Call(prefixed or given, self._caller(caller, kind, own), kind)
            # Set for every request, also to nothing: a server may start one in the context of another.
            token = self._current.set(call)
            is_rollout = scope["path"] == "/run"
            self._running[own] += is_rollout
            try:
                await app(scope, receive, send)
            finally:
                self._running[own] -= is_rollout
                self._current.reset(token)

        return carrying

    def _caller(self, caller: str | None, kind: str, own: str) -> str | None:
        if kind != MODELS:
            is_side = caller is not None and caller.startswith(f"{RESOURCES}/")
            return caller if is_side else own
        if caller is None:  # a subprocess, or a client that does not carry: whose it is may be known all the same
            running = [agent for agent, number in self._running.items() if number > 0]
            return running[0] if len(running) == 1 else None
        return caller

    # -- requests that go out -------------------------------------------------------------------------------------

    def mark(self, headers: MutableMapping[str, Any], url: str) -> None:
        """Add the current rollout to the headers of a request, or take it out of those of a request that goes
        elsewhere (a redirect has the headers of the first one).

        Args:
            headers: Headers of the request; changed in place.
        """
        call = self._current.get()
        is_reached = _origin(url) in self._reached
        for name, value in ((ROLLOUT_HEADER, call.key), (CALLER_HEADER, call.caller)):
            if is_reached and value is not None:
                headers[name] = value
            elif not is_reached:
                headers.pop(name, None)

    def _trace_session(self, _session: aiohttp.ClientSession, options: dict[str, Any]) -> None:
        trace = aiohttp.TraceConfig()

        async def start(_session: Any, _context: Any, params: aiohttp.TraceRequestStartParams) -> None:
            self.mark(params.headers, str(params.url))

        async def redirect(_session: Any, _context: Any, params: aiohttp.TraceRequestRedirectParams) -> None:
            location = params.response.headers.get("Location") or params.response.headers.get("URI") or ""
            self.mark(params.headers, urljoin(str(params.url), location))

        trace.on_request_start.append(start)
        trace.on_request_redirect.append(redirect)
        options["trace_configs"] = [*(options.get("trace_configs") or ()), trace]

    def _hook_client(self, _client: httpx.Client, options: dict[str, Any]) -> None:
        def mark(request: httpx.Request) -> None:  # once per redirect
            self.mark(request.headers, str(request.url))

        options["event_hooks"] = _with_hook(options.get("event_hooks"), mark)

    def _hook_async_client(self, _client: httpx.AsyncClient, options: dict[str, Any]) -> None:
        async def mark(request: httpx.Request) -> None:
            self.mark(request.headers, str(request.url))

        options["event_hooks"] = _with_hook(options.get("event_hooks"), mark)

    def _wrap_requests(self) -> None:
        client: Any = requests.Session
        original = client.send

        @functools.wraps(original)
        def send(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
            self.mark(request.headers, request.url or "")  # once per redirect
            return original(session, request, **options)

        client.send = send

    def _wrap_thread_pools(self) -> None:
        """`loop.run_in_executor`, unlike `asyncio.to_thread`, leaves the context behind."""
        pools: Any = ThreadPoolExecutor
        original = pools.submit

        @functools.wraps(original)
        def submit(pool: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            return original(pool, contextvars.copy_context().run, function, *args, **kwargs)

        pools.submit = submit

    def _wrap_server_client(self) -> None:
        """Let agents that ask for the model server's URL have it with their rollout in it.

        Gym's own requests go to plain URLs, since they have the header: a URL gets into logs. What Gym keeps for later
        (`_resolve_base_url`, 0.7) is plain, too.
        """
        client = server_utils.ServerClient
        if not hasattr(client, "_build_server_base_url"):
            raise RuntimeError(
                "This version of nemo-gym builds the URLs of servers in a way that trl-gym does not know."
            )
        build, request = client._build_server_base_url, client.request

        def build_server_base_url(self_: Any, server_config: Any) -> str:
            return self.url_for_rollout(build(self_, server_config))

        async def plain_request(self_: Any, *args: Any, **kwargs: Any) -> Any:
            call = self._current.get()
            token = self._current.set(Call(call.key, call.caller))
            try:
                return await request(self_, *args, **kwargs)
            finally:
                self._current.reset(token)

        client._build_server_base_url = build_server_base_url
        client.request = plain_request
        if hasattr(client, "_resolve_base_url"):
            resolve = client._resolve_base_url

            def resolve_base_url(self_: Any, server_name: str) -> str:
                token = self._current.set(_NO_CALL)
                try:
                    return resolve(self_, server_name)
                finally:
                    self._current.reset(token)

            client._resolve_base_url = resolve_base_url

    def url_for_rollout(self, base_url: str) -> str:
        """Return a model server's base URL with the current rollout as prefix, if an agent asks; others unchanged."""
        call = self._current.get()
        if call.kind != AGENTS or call.key is None or _origin(base_url) not in self._model_servers:
            return base_url
        return f"{base_url}{PREFIX}{call.key}"


def _extend_init(client_class: Any, extend: Callable[[Any, dict[str, Any]], None]) -> None:
    original = client_class.__init__

    @functools.wraps(original)
    def init(client: Any, *args: Any, **options: Any) -> None:
        extend(client, options)
        original(client, *args, **options)

    client_class.__init__ = init


def _with_hook(hooks: Any, mark: Callable[[httpx.Request], Any]) -> dict[str, list[Any]]:
    given = dict(hooks or {})
    return {**given, "request": [*given.get("request", ()), mark]}


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _strip_prefix(scope: Scope) -> str | None:
    match = _PREFIXED.match(scope["path"])
    if match is None:
        return None
    scope["path"] = match["rest"]
    scope["raw_path"] = quote(match["rest"]).encode()
    return match["key"]


def _carried(scope: Scope) -> tuple[str | None, str | None]:
    """Return the rollout and the caller that a request names."""
    rollout = caller = None
    for name, value in scope["headers"]:
        if rollout is None and name == _ROLLOUT_BYTES:
            rollout = value.decode("latin-1")
        elif caller is None and name == _CALLER_BYTES:
            caller = value.decode("latin-1")
    return rollout, caller


async def _refuse(send: Any, name: str) -> None:
    text = (
        f"{name}: this request has the URL of one rollout and the header of another: its client was made in one "
        "rollout and used in another. Make it where it is used"
    )
    body = json.dumps({"error": {"message": text, "type": "BadRequestError", "code": 400}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
