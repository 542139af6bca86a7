"""The little ASGI that `on_policy.py` needs: read a body, replay it, ask the inner application, answer with JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_HEADERS = (b"content-length", b"content-type", b"transfer-encoding", b"expect")


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer of the inner application."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> Any:
        """The body as JSON. Raises `ValueError` if it is something else."""
        return json.loads(self.body)

    def error_text(self) -> str:
        """What an error says, in OpenAI's form or any other."""
        try:
            payload = self.json()
            return str(payload["error"]["message"])
        except (ValueError, TypeError, KeyError):
            return self.body.decode(errors="replace")

    @classmethod
    def from_json(cls, status: int, payload: Any) -> Reply:
        """Raises `ValueError` for NaN and infinities: they are not JSON, and no client could read them."""
        return cls(status, json.dumps(payload, separators=(",", ":"), allow_nan=False).encode())

    @classmethod
    def error(cls, status: int, message: str) -> Reply:
        """An error in the form that OpenAI and vLLM give it."""
        kinds = {400: "BadRequestError", 401: "AuthenticationError", 409: "ConflictError"}
        kind = kinds.get(status, "InternalServerError")
        return cls.from_json(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type), (b"content-length", str(len(self.body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def header(scope: Scope | Message, name: bytes) -> bytes | None:
    """The first header of that (lower case) name."""
    return next((value for key, value in scope.get("headers", ()) if key.lower() == name), None)


def path_of(scope: Scope) -> str:
    """The path below the application's root."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


async def read_body(receive: Receive) -> bytes:
    """The whole request body.

    Raises:
        ClientGoneError: If the client hangs up before it is complete.
    """
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first and then what the client does, so that a hang-up cancels the work."""
    pending = True

    async def replayed() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


async def ask(
    app: App, scope: Scope, receive: Receive, method: str, path: str, payload: dict[str, Any] | bytes = b""
) -> Reply:
    """Send a request of our own to the inner application, with the caller's headers and connection.

    The caller's `receive` is passed on, so that its hang-up cancels the inner request too.

    Raises:
        ClientGoneError: If the client hung up and the inner application gave no answer for that reason.
    """
    body = payload if isinstance(payload, bytes) else json.dumps(payload, separators=(",", ":")).encode()
    gone = False

    async def watched() -> Message:
        nonlocal gone
        message = await receive()
        gone = gone or message["type"] == "http.disconnect"
        return message

    status: int | None = None
    content_type = b"application/json"
    chunks: list[bytes] = []

    async def collect(message: Message) -> None:
        nonlocal status, content_type
        if message["type"] == "http.response.start":
            status = message["status"]
            content_type = header(message, b"content-type") or content_type
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    await app(_inner_scope(scope, method, path, len(body)), replay(body, watched), collect)
    if gone:
        raise ClientGoneError
    if status is None:
        raise RuntimeError(f"the application gave no answer to {method} {path}")
    return Reply(status, b"".join(chunks), content_type)


def _inner_scope(scope: Scope, method: str, path: str, num_body_bytes: int) -> Scope:
    """A scope of its own: routers write into the one that they are given."""
    full_path = scope.get("root_path", "") + path
    headers = [(key, value) for key, value in scope["headers"] if key.lower() not in _BODY_HEADERS]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(num_body_bytes).encode())]
    return {
        **scope,
        "method": method,
        "path": full_path,
        "raw_path": full_path.encode(),
        "query_string": b"",
        "headers": headers,
    }
