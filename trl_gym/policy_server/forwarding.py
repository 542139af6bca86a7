"""One HTTP request on its way to an upstream, and its answer on the way back. No state, and no choice of upstream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from yarl import URL

from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.middleware.http import Message, Receive, Reply, Scope, Send, path_of

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
    """The answer had begun and cannot be completed: whoever forwards it must break the client's connection off."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """What is sent to an upstream.

    Attributes:
        method: E.g. `"POST"`.
        path: Decoded, below the application's root.
        target: Path and query as they stand in the request line, still encoded.
        headers: Names and values.
        body: All of it, so that another upstream can be asked.
    """

    method: str
    path: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    @classmethod
    def from_scope(cls, scope: Scope, body: bytes, api_key: str | None) -> ForwardedRequest:
        """The client's request, with its `Authorization` replaced by `api_key` (or removed)."""
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
        """A request of our own, with a JSON body if there is a `payload`."""
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
    """A connection pool for upstreams: unlimited, without cookies, proxies or a limit of time on answers."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
        trust_env=False,  # a proxy for the outer world must not get requests to our own nodes
    )


async def stream(session: aiohttp.ClientSession, url: str, request: ForwardedRequest, answering: Answering) -> None:
    """Pass one answer through, piece by piece as it arrives.

    Raises:
        aiohttp.ClientError: If nothing has been answered.
        UpstreamLostError: If something has.
    """
    try:
        async with _open(session, url, request) as answer:
            start = {"type": "http.response.start", "status": answer.status, "headers": _answer_headers(answer)}
            await answering(start)
            async for chunk in answer.content.iter_any():
                await answering({"type": "http.response.body", "body": chunk, "more_body": True})
        await answering({"type": "http.response.body", "body": b""})
    except aiohttp.ClientError as error:
        if answering.has_begun:
            raise UpstreamLostError(f"{url} broke its answer to {request} off: {words(error)}") from error
        raise


async def ask(session: aiohttp.ClientSession, url: str, request: ForwardedRequest) -> Reply:
    """One whole answer. Raises `aiohttp.ClientError`."""
    async with _open(session, url, request) as answer:
        content_type = answer.headers.get("Content-Type", "application/json").encode("latin-1")
        return Reply(answer.status, await answer.read(), content_type)


async def hang_up(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def words(error: BaseException) -> str:
    """An exception as part of a sentence; some of them have no text."""
    return str(error) or type(error).__name__


def quote(body: bytes) -> str:
    """The beginning of an answer, for messages."""
    text = body.decode(errors="replace").strip()
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]} …"


def listed(said: Mapping[str, str]) -> str:
    """`"URL: what it said; URL: …"`."""
    return "; ".join(f"{url}: {text}" for url, text in said.items())


def _open(
    session: aiohttp.ClientSession, url: str, request: ForwardedRequest
) -> aiohttp.client._RequestContextManager:
    return session.request(
        request.method,
        URL(url + request.target, encoded=True),
        headers=request.headers,
        data=request.body or None,
        allow_redirects=False,
    )


def _answer_headers(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    dropped = _hop_by_hop(answer.raw_headers)
    if "Content-Encoding" in answer.headers:  # undone while it was read, although we asked for none
        dropped |= {b"content-encoding", b"content-length"}
    return [(key, value) for key, value in answer.raw_headers if key.lower() not in dropped]


def _hop_by_hop(headers: list[tuple[bytes, bytes]] | tuple[tuple[bytes, bytes], ...]) -> frozenset[bytes]:
    named = b",".join(value for key, value in headers if key.lower() == b"connection")
    return _HOP_BY_HOP | {name.strip().lower() for name in named.split(b",")}
