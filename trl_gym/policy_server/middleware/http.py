"""The little ASGI that `on_policy.py` needs: read a body, replay it, ask the inner application, answer with JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from trl_gym.policy_server.middleware.templates import RenderRefusedError

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


# --------------------------------------------------------------------------------------------------------------------
# The wrapped application as one request sees it: ask its own HTTP routes, in process, on behalf of the client.


class AnsweredError(Exception):
    """The request ends here with this reply (an error of the server's or ours)."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body.decode(errors="replace"))
        self.reply = reply


class AbortedError(Exception):
    """The call was aborted from our side."""


@dataclass(frozen=True, slots=True)
class Inner:
    """The application behind the middleware, for the time of one request.

    Attributes:
        app: It.
        scope: Of the client's request: its headers go along.
        receive: Of the client's request: its hang-up cancels what we ask.
    """

    app: App
    scope: Scope
    receive: Receive

    async def ask(self, method: str, path: str, payload: dict[str, Any] | bytes = b"") -> Reply:
        """Any answer. Raises `ClientGoneError`."""
        return await ask(self.app, self.scope, self.receive, method, path, payload)

    async def ask_json(self, method: str, path: str, payload: dict[str, Any] | bytes = b"") -> Any:
        """JSON of an answer with status 200. Raises `AnsweredError` with any other."""
        reply = await self.ask(method, path, payload)
        if not reply.ok:
            raise AnsweredError(reply)
        return reply.json()

    async def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """`POST /tokenize`. Raises `RenderRefusedError` with the server's words."""
        reply = await self.ask("POST", "/tokenize", body)
        if not reply.ok:
            raise RenderRefusedError(reply.error_text())
        return reply.json()

    async def ask_until(self, abort: asyncio.Event, method: str, path: str, payload: dict[str, Any]) -> Reply:
        """As `ask`, but hang up when `abort` is set. Raises `AbortedError` then."""

        async def receive() -> Message:
            client, aborted = asyncio.ensure_future(self.receive()), asyncio.ensure_future(abort.wait())
            try:
                await asyncio.wait({client, aborted}, return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if abort.is_set() else client.result()
            finally:
                client.cancel()
                aborted.cancel()

        try:
            reply = await ask(self.app, self.scope, receive, method, path, payload)
        except ClientGoneError as error:
            if abort.is_set():
                raise AbortedError from error
            raise
        return reply


# --------------------------------------------------------------------------------------------------------------------
# What a server says about itself, asked once; and which weights it holds, asked again when they change.

_NOT_FOUND = 404


class ServerFacts:
    """Cached facts about the wrapped server."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] | None = None
        self._version: str | None = None
        self._has_versions = True
        self._num_changes = 0

    async def all(self, inner: Inner) -> dict[str, Any]:
        """`vllm_version`, `max_model_len` and `model_names` (of the model itself, adapters have others)."""
        if self._facts is None:
            models, version = await asyncio.gather(
                inner.ask_json("GET", "/v1/models"), inner.ask_json("GET", "/version")
            )
            self._facts = {
                "vllm_version": version["version"],
                "max_model_len": models["data"][0]["max_model_len"],
                "model_names": [model["id"] for model in models["data"] if model.get("parent") is None],
            }
        return self._facts

    async def max_model_len(self, inner: Inner) -> int:
        return (await self.all(inner))["max_model_len"]

    async def weight_version(self, inner: Inner) -> str | None:
        """The version of the weights; None for a server that has none (stock vLLM outside development mode)."""
        if self._version is not None or not self._has_versions:
            return self._version
        changes = self._num_changes
        try:
            version = str((await inner.ask_json("GET", "/weight_info"))["weight_version"])
        except AnsweredError as answered:
            if answered.reply.status != _NOT_FOUND:
                raise
            self._has_versions = False
            return None
        if changes == self._num_changes:  # else it may be the old one: an update ended while we asked
            self._version = version
        return version

    def weights_changed(self) -> None:
        """Ask for the version again before anybody can hear that the new one is there."""
        self._version = None
        self._num_changes += 1
