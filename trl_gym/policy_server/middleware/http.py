"""Speak ASGI for the middleware: read and replay a body, ask the wrapped server's own routes in process, reply.

`ServerInfo` caches what the wrapped server says about itself.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from trl_gym.errors import error_body_text
from trl_gym.policy_server.middleware.templates import RenderRefusedError
from trl_gym.policy_server.middleware.versions import WeightHistory
from trl_gym.untrusted import parse_json, require_shape

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_REQUEST_BYTES = 64 * 2**20  # a turn with the ids of 30 earlier ones has a megabyte
_NOT_FOUND = 404
_BODY_HEADERS = (b"content-length", b"content-type", b"transfer-encoding", b"expect")
# Of an answer that is read whole: what is said of its body, which is another afterwards, and of its connection.
_OWN_ANSWER_HEADERS = frozenset({*_BODY_HEADERS, b"content-encoding", b"connection", b"keep-alive"})

# Calls that change the state of a server: every replica must do them, or they are no longer replicas.
CONTROL_PATHS = frozenset(
    {
        *("/pause", "/resume", "/sleep", "/wake_up", "/release_kv_cache_memory"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
        *("/init_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update", "/update_weights"),
        *("/finish_weight_update", "/update_weight_version", "/shutdown_weight_transfer_engine", "/weight_checker"),
        *("/collective_rpc", "/abort_requests", "/inference/v1/abort_requests"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    }
)


class _Model(TypedDict):
    id: str
    max_model_len: NotRequired[int | None]  # adapters have none


class _Models(TypedDict):
    data: Annotated[list[_Model], msgspec.Meta(min_length=1)]


class _Version(TypedDict):
    version: str
    engine: NotRequired[str]  # vLLM does not name itself; every other engine does


class _WeightInfo(TypedDict):
    weight_version: str | int | None


class _Tokens(TypedDict):
    tokens: list[int]


class ClientGoneError(Exception):
    """The client closed the connection; no answer is needed."""


class AnsweredError(Exception):
    """The request ends with this reply: an error of the server's or ours."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body.decode(errors="replace"))
        self.reply = reply


class AbortedError(Exception):
    """We aborted the call."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with its whole body."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()  # the others of the server: CORS, load metrics, id of the request

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> Any:
        """Parse the body. Raises `ValueError` if it is not JSON, see `parse_json`."""
        return parse_json(self.body)

    def read(self, shape: Any) -> Any:
        """Parse the body; see `read`."""
        return read(self.body, shape)

    def checked_json(self, request: str, shape: Any) -> Any:
        """Parse the body of an answer.

        Args:
            request: Method and path of the request, for the message.
            shape: See `shape_problem`.

        Raises:
            AnsweredError: It is no JSON (NaN is none), or of another shape: a server behind the gateway may send it.
        """
        with expecting_vllm(request):
            return self.read(shape)

    def error_text(self) -> str:
        return error_body_text(self.body)

    @classmethod
    def from_json(cls, status: int, payload: Any) -> Reply:
        """Make a JSON reply. Raises `ValueError` for NaN and infinities, which are not JSON."""
        return cls(status, compact_json(payload))

    @classmethod
    def error(cls, status: int, message: str, *, kind: str | None = None) -> Reply:
        """Make an error reply in the form of OpenAI and vLLM; its `type` goes by the status if it has no `kind`."""
        kinds = {
            400: "BadRequestError",
            401: "AuthenticationError",
            403: "PermissionDeniedError",
            404: "NotFoundError",
            409: "ConflictError",
            413: "RequestTooLargeError",
        }
        kind = kind or kinds.get(status, "InternalServerError")
        return cls.from_json(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type), (b"content-length", str(len(self.body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": [*headers, *self.headers]})
        await send({"type": "http.response.body", "body": self.body})


@contextmanager
def expecting_vllm(request: str) -> Iterator[None]:
    """Turn a `ValueError` about the answer to a request (method and path) into an `AnsweredError`."""
    try:
        yield
    except ValueError as error:
        raise AnsweredError(Reply.error(500, f"{request}: the server answers as vLLM does not ({error})")) from error


def strict_json(body: bytes) -> Any:
    """Parse JSON. Raises `ValueError` for what is none, NaN and infinities included, see `parse_json`."""
    return parse_json(body, constant=_refuse_constant)


def read(body: bytes, shape: Any) -> Any:
    """Parse a body of a shape, as for `shape_problem`. Raises `ValueError`: it is no JSON (NaN is none), or of
    another shape."""
    return require_shape(strict_json(body), shape)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def compact_json(payload: Any) -> bytes:
    """Write JSON without blanks. Raises `ValueError` for NaN and infinities."""
    return json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()


def json_object(body: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None for anything else."""
    try:
        parsed = parse_json(body)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def header(scope: Scope | Message, name: bytes) -> bytes | None:
    """Return the first header of that (lower case) name."""
    return next((value for key, value in scope.get("headers", ()) if key.lower() == name), None)


def path_of(scope: Scope) -> str:
    """Return the path below the application's root."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def check_content_type(scope: Scope) -> None:
    """Check that a body is said to be JSON: what a web page may send without asking first is not. Raises
    `AnsweredError`: it is not; with vLLM's words."""
    media_type = (header(scope, b"content-type") or b"").lower().partition(b";")[0]
    if media_type != b"application/json":
        text = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise AnsweredError(Reply.error(400, text, kind="Bad Request"))


def check_length(scope: Scope) -> None:
    """Check the length that a request says its body has. Raises `AnsweredError` if that is too many bytes."""
    said = header(scope, b"content-length") or b""
    if said.isdigit() and int(said[:20]) > MAX_REQUEST_BYTES:
        raise _too_long(MAX_REQUEST_BYTES)


def _too_long(limit: int) -> AnsweredError:
    return AnsweredError(Reply.error(413, f"the body of this request is longer than {limit:,} bytes"))


async def read_body(receive: Receive, limit: int = MAX_REQUEST_BYTES) -> bytes:
    """Read the whole request body. Raises `AnsweredError`: it has more than `limit` bytes, or is JSON in another
    encoding than UTF-8, which servers read and we would not: a tag in it would not be seen; `ClientGoneError` if the
    client hangs up before it is complete."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise _too_long(limit)
        if not message.get("more_body"):
            body = b"".join(chunks)
            if not (encoding := json.detect_encoding(body)).startswith("utf-8"):
                raise AnsweredError(Reply.error(400, f"the body is {encoding}: JSON must be sent in UTF-8"))
            return body


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` first, then what the client sends: a hang-up cancels the work."""
    pending = True

    async def replayed() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


@dataclass(frozen=True, slots=True)
class WrappedServer:
    """The application behind the middleware, for the time of one request of a client."""

    app: App  # the wrapped application
    scope: Scope  # the client's scope: its headers go along
    receive: Receive  # the client's `receive`: its hang-up cancels our requests too

    async def ask(self, method: str, path: str, payload: dict[str, Any] | bytes = b"") -> Reply:
        """Send a request of our own to the application.

        Args:
            payload: Its JSON, without NaN and infinities (`msgspec` would write null), or its body.

        Raises:
            ClientGoneError: If the client hung up and the application gave no answer for that reason.
        """
        body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        gone = False

        async def watched() -> Message:
            nonlocal gone
            message = await self.receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        status: int | None = None
        content_type = b"application/json"
        headers: tuple[tuple[bytes, bytes], ...] = ()
        chunks: list[bytes] = []

        async def collect(message: Message) -> None:
            nonlocal status, content_type, headers
            if message["type"] == "http.response.start":
                status = message["status"]
                content_type = header(message, b"content-type") or content_type
                given = message.get("headers", ())
                headers = tuple((key, value) for key, value in given if key.lower() not in _OWN_ANSWER_HEADERS)
            elif message["type"] == "http.response.body":
                chunks.append(message.get("body", b""))

        await self.app(_own_scope(self.scope, method, path, len(body)), replay(body, watched), collect)
        if gone:
            raise ClientGoneError
        if status is None:
            raise RuntimeError(f"the application gave no answer to {method} {path}")
        return Reply(status, b"".join(chunks), content_type, headers)

    async def ask_json(
        self, method: str, path: str, payload: dict[str, Any] | bytes = b"", *, shape: Any = Any
    ) -> Any:
        """Return the JSON of an answer with status 200. Raises `AnsweredError` with any other; else `checked_json`."""
        reply = await self.ask(method, path, payload)
        if not reply.ok:
            raise AnsweredError(reply)
        return reply.checked_json(f"{method} {path}", shape)

    async def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """Call `POST /tokenize`. Raises `RenderRefusedError` with the server's words, else as `ask_json`."""
        try:
            return await self.ask_json("POST", "/tokenize", body, shape=_Tokens)
        except AnsweredError as answered:
            raise RenderRefusedError(answered.reply.error_text()) from answered

    async def ask_until(self, abort: asyncio.Event, method: str, path: str, payload: dict[str, Any]) -> Reply:
        """Do what `ask` does, but hang up and raise `AbortedError` when `abort` is set."""
        if abort.is_set():
            raise AbortedError

        async def receive() -> Message:
            client, aborted = asyncio.ensure_future(self.receive()), asyncio.ensure_future(abort.wait())
            try:
                await asyncio.wait({client, aborted}, return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if abort.is_set() else client.result()
            finally:
                client.cancel()
                aborted.cancel()

        try:
            return await replace(self, receive=receive).ask(method, path, payload)
        except ClientGoneError as error:
            if abort.is_set():
                raise AbortedError from error
            raise


def _own_scope(scope: Scope, method: str, path: str, num_body_bytes: int) -> Scope:
    """Return a new scope, since routers write into the one that they get."""
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


# What vLLM says of a prompt that it refuses before it is tokenized (`vllm/renderers/params.py`), as other engines of
# ours do: from it follows how many characters the longest token of the vocabulary has.
TOO_MANY_CHARS = (
    "This model's maximum context length is {max_model_len} tokens. However, you requested {num_output} output tokens "
    "and your prompt contains {num_chars} characters (more than {most} characters, which is the upper bound for "
    "{num_input} input tokens). Please reduce the length of the input prompt or the number of requested output tokens."
)
_UPPER_BOUND = re.compile(r"\(more than (\d+) characters, which is the upper bound for (\d+) input tokens\)")
_LONGEST_TOKEN = 1024  # characters, where a server does not tell; vocabularies have runs of some hundred blanks
MANY_CHARS = 2**16  # more than any token has; a prompt of fewer is tokenized in no time


class ServerInfo:
    """Cache what the wrapped server says about itself; ask for the weight version again when weights change.

    Attributes:
        history: When its own weights changed.
    """

    def __init__(self) -> None:
        self._info: dict[str, Any] | None = None
        self._tokenizer: dict[str, Any] | None = None
        self._longest_token: int | None = None
        self._version: str | None = None
        self._has_versions = True
        self._num_changes = 0
        self.history = WeightHistory()

    async def all(self, server: WrappedServer) -> dict[str, Any]:
        """Return `engine` (`"vllm"`, `"transformers"`, …), `engine_version` (of vLLM also by its older name,
        `vllm_version`), `max_model_len` and `model_names` (of the model itself, without adapters)."""
        if self._info is None:
            models, version = await asyncio.gather(
                server.ask_json("GET", "/v1/models", shape=_Models), server.ask_json("GET", "/version", shape=_Version)
            )
            if not models["data"][0].get("max_model_len"):
                raise AnsweredError(Reply.error(500, "GET /v1/models: the first model has no max_model_len"))
            engine = version.get("engine", "vllm")
            self._info = {
                "engine": engine,
                "engine_version": version["version"],
                **({"vllm_version": version["version"]} if engine == "vllm" else {}),
                "max_model_len": models["data"][0]["max_model_len"],
                "model_names": [model["id"] for model in models["data"] if model.get("parent") is None],
            }
        return self._info

    async def max_model_len(self, server: WrappedServer) -> int:
        return (await self.all(server))["max_model_len"]

    async def check_size(self, server: WrappedServer, num_chars: int) -> None:
        """Check the length of a prompt before it is tokenized, which takes seconds and gigabytes for a long one.

        Args:
            num_chars: A number of characters that the prompt has at least.

        Raises:
            AnsweredError: More than the context can have, as vLLM answers it.
        """
        if num_chars <= MANY_CHARS:
            return
        max_model_len = await self.max_model_len(server)
        if self._longest_token is None:
            self._longest_token = await self._find_longest_token(server, max_model_len)
        most = max_model_len * self._longest_token
        if num_chars > most:
            how = {"max_model_len": max_model_len, "num_output": 0, "num_input": max_model_len}
            raise AnsweredError(Reply.error(400, TOO_MANY_CHARS.format(**how, num_chars=num_chars, most=most)))

    async def _find_longest_token(self, server: WrappedServer, max_model_len: int) -> int:
        """Ask for a completion that leaves room for a prompt of one token: it is refused, in the words above."""
        if (await self.all(server))["engine"] not in ("vllm", "transformers"):
            return _LONGEST_TOKEN
        request = {"prompt": "0" * MANY_CHARS, "max_tokens": max_model_len - 1}
        found = _UPPER_BOUND.search((await server.ask("POST", "/v1/completions", request)).error_text())
        return int(found[1]) // int(found[2]) if found and int(found[2]) else _LONGEST_TOKEN

    async def chat_template(self, server: WrappedServer) -> str | None:
        """Return the source of the server's chat template; None if it does not tell, or has several."""
        if self._tokenizer is None:
            reply = await server.ask("GET", "/tokenizer_info")
            if not reply.ok and reply.status != _NOT_FOUND:
                return None  # not now; asked again in the next turn
            self._tokenizer = json_object(reply.body) or {}
        source = self._tokenizer.get("chat_template")
        return source if isinstance(source, str) else None

    async def weight_version(self, server: WrappedServer) -> str | None:
        """Return the weight version; None if the server has none (stock vLLM outside development mode)."""
        if self._version is not None or not self._has_versions:
            return self._version
        changes = self._num_changes
        try:
            version = str((await server.ask_json("GET", "/weight_info", shape=_WeightInfo))["weight_version"])
        except AnsweredError as answered:
            if answered.reply.status != _NOT_FOUND:
                raise
            self._has_versions = False
            return None
        if changes == self._num_changes:  # else it may be old: an update ended during the request
            self._version = version
        return version

    def weights_changed(self) -> None:
        """Ask for the version again in the next call."""
        self._version = None
        self._num_changes += 1

    async def follow_change(self, server: WrappedServer, before: str | None) -> None:
        """Ask for the version at once, while a call that is answered later can still be told from one of before.

        Args:
            server: The wrapped server, after new weights or a new version.
            before: The version until then, as far as it is known.
        """
        self.weights_changed()
        try:
            now = await self.weight_version(server)
        except AnsweredError:  # of a gateway whose servers differ, which says so to every later call
            now = None
        if now != before:
            self.history.changed(before)

    @property
    def known_version(self) -> str | None:
        """The weight version if it was asked for since weights changed, without a request."""
        return self._version
