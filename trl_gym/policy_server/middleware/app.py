"""Make multi-turn sampling on a stock OpenAI server token-exact: the ASGI middleware and its routes.

A stock server renders the chat again on every turn. The new prompt then tokenizes old answers again, and training
would see tokens that were never sampled. This middleware makes every prompt start with the tokens already seen and
returns the tokens of each answer; `chat.py` says how.

    POST /v1/chat/completions        one turn, called by Gym's model server
    POST /v1/completions             one turn as a text, called by Gym's model server with `use_completions_api`
    GET  /trl_gym/info               identity, versions, counters
    POST /trl_gym/rollouts/records   the model calls of rollouts so far: numbers of tokens, seconds, versions, drift
    POST /trl_gym/rollouts/take      the model calls of rollouts that have ended, with their tokens, as MessagePack
    POST /trl_gym/rollouts/cancel    refuse and abort the calls of rollouts
    POST /trl_gym/sampling           pin sampling parameters for rollouts whose calls pin none
    POST /trl_gym/adapters           load a new version of the LoRA adapter that is the policy (`adapters.py`)

A request with `trl_gym = {"rollout": …, "sampling": {…}, "completion_budget": …}` in its body, or in a key
(`identity.py`), is a turn of that rollout, sampled with exactly these parameters: whatever else in the request would
change the distribution is left out (`sampling.py`). Without it (and without token ids in its messages) a request gets
the stock answer plus the bundle, and a stream is the stock stream.

Only the server's HTTP surface is used, so nothing here depends on vLLM's internals.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

import trl_gym
from trl_gym.policy_server.command import (
    ENV_API_KEYS,
    ENV_NONCE,
    ENV_PROMPT_FIELD,
    ENV_REPLICAS,
    ENV_WEIGHT_TRANSPORTS,
)
from trl_gym.policy_server.middleware.adapters import AdapterControl, on_its_own
from trl_gym.policy_server.middleware.chat import ChatTurns
from trl_gym.policy_server.middleware.http import (
    CONTROL_PATHS,
    MANY_CHARS,
    AnsweredError,
    App,
    ClientGoneError,
    Message,
    Receive,
    Reply,
    Scope,
    Send,
    ServerInfo,
    WrappedServer,
    check_content_type,
    check_length,
    json_object,
    path_of,
    read_body,
    replay,
    strict_json,
)
from trl_gym.policy_server.middleware.identity import Gate, RefusedError, UntaggedCalls, identity_of
from trl_gym.policy_server.middleware.ledger import CallRecord, Taken
from trl_gym.policy_server.middleware.replicas import Replicas
from trl_gym.policy_server.middleware.splice import NoBoundaryError
from trl_gym.policy_server.middleware.templates import RenderRefusedError
from trl_gym.policy_server.middleware.turn import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    InvalidTurnError,
    Turn,
    checked_sampling,
    num_chars,
)

AFFINITY = "trl_gym.affinity"  # key in the scope: requests with the same value should reach the same engine
INFO_PATH = "/trl_gym/info"
_RESUME_PATHS = ("/resume", "/wake_up")
_FINISH_PATH = "/finish_weight_update"
_VERSION_PATHS = (_FINISH_PATH, "/update_weight_version")
# Calls that sample nothing, beside those that change the server's state; on every other route a rollout is refused.
UNSAMPLED_PATHS = CONTROL_PATHS | {
    *("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/ping", "/start_profile", "/stop_profile"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply"),
}
_Handler = Callable[[WrappedServer, Send], Awaitable[Reply | None]]
_RETRIED_FOREVER = (429, 502, 503, 504, 520)  # by Gym, every half second; a 500 three times


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one middleware."""

    nonce: str | None = None  # returned by `/trl_gym/info`, which proves who answers
    # Accepted bearer tokens, needed on every route but `/health`; if it is empty, `Gate` says what is open.
    api_keys: tuple[str, ...] = ()
    has_prompt_field: bool = False  # whether the server takes `prompt_token_ids` as a field of a chat request
    weight_transports: tuple[str, ...] | None = None  # ways in which it accepts weights; None if only vLLM knows
    num_replicas: int = 1  # of a data-parallel engine, which a request may name in `X-data-parallel-rank`

    @classmethod
    def from_env(cls) -> Settings:
        """Read the variables named in `command.py`: vLLM builds middleware itself."""
        transports = os.environ.get(ENV_WEIGHT_TRANSPORTS)
        return cls(
            nonce=os.environ.get(ENV_NONCE) or None,
            api_keys=tuple(key for key in os.environ.get(ENV_API_KEYS, "").splitlines() if key),
            has_prompt_field=os.environ.get(ENV_PROMPT_FIELD) == "1",
            weight_transports=tuple(transports.split(",")) if transports else None,
            num_replicas=int(os.environ.get(ENV_REPLICAS) or 1),
        )


class OnPolicyMiddleware:
    """The ASGI middleware.

    Routes handled here never answer 429, 502, 503, 504 or 520, whatever the server says: Gym retries these forever.

    Args:
        app: The wrapped application: vLLM's, or the gateway's client side.
        settings: Default: from the environment.
    """

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self.app = app
        settings = settings or Settings.from_env()
        self._nonce = settings.nonce
        self._weight_transports = settings.weight_transports
        self._instance = secrets.token_hex(8)
        self._gate, self._has_key = Gate(settings.api_keys), bool(settings.api_keys)
        self._untagged = UntaggedCalls()
        self._replicas = Replicas(settings.num_replicas)
        self._server_info = ServerInfo()
        self._adapters = AdapterControl(self._server_info)
        self._chat = ChatTurns(self._server_info, self._adapters, has_prompt_field=settings.has_prompt_field)
        self._handlers: dict[tuple[str, str], _Handler] = {
            ("GET", INFO_PATH): self._info,
            ("POST", CHAT_PATH): self._complete_chat,
            ("POST", COMPLETIONS_PATH): self._complete_text,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/trl_gym/rollouts/records"): self._records,
            ("POST", "/trl_gym/rollouts/take"): self._take,
            ("POST", "/trl_gym/rollouts/cancel"): self._cancel,
            ("POST", "/trl_gym/sampling"): self._pin_sampling,
            ("POST", "/trl_gym/adapters"): self._load_adapter,
            ("POST", "/trl_gym/adapters/clear"): self._clear_adapters,
            ("POST", "/pause"): self._pause,
            **{("POST", path): self._resume for path in _RESUME_PATHS},
            **{("POST", path): self._change_version for path in _VERSION_PATHS},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        try:
            self._gate.admit(scope)
            if scope["type"] == "websocket" and identity_of(scope).turn_tag is not None:
                raise RefusedError(f"a turn of a rollout must be sent to {CHAT_PATH}, not to a websocket", 403)
        except RefusedError as error:
            return await _refuse(scope, send, error)
        handler = self._handler(scope)
        if handler is None:
            return await self.app(scope, receive, send)
        try:
            check_length(scope)
            reply = await handler(WrappedServer(self.app, scope, receive), send)
        except AnsweredError as answered:
            reply = answered.reply
        except InvalidTurnError as error:
            reply = Reply.error(400, str(error))
        except RefusedError as error:
            reply = Reply.error(error.status, str(error))
        except RecursionError:
            reply = Reply.error(400, "the request is nested too deeply to be read")
        except ClientGoneError:
            return None
        if reply is None:
            return None  # the handler has let the application answer directly
        if reply.status in _RETRIED_FOREVER:
            reply = replace(reply, status=500)
        await reply.send(send)
        return None

    def _handler(self, scope: Scope) -> _Handler | None:
        """Return what handles a request; None for one that is passed on as it is, since it has no body that counts."""
        method, path = scope.get("method", ""), path_of(scope)
        if (known := self._handlers.get((method, path))) is not None or method in ("", "GET", "HEAD", "OPTIONS"):
            return known
        return self._pass_on if path in UNSAMPLED_PATHS else self._refuse_turns

    async def _pass_on(self, server: WrappedServer, send: Send) -> None:
        body = await read_body(server.receive)
        await self.app(server.scope, replay(body, server.receive), send)

    async def _tokenize(self, server: WrappedServer, send: Send) -> None:
        """Refuse by size what a stock server tokenizes at any length, since its answer is no prompt."""
        body = await read_body(server.receive)
        if len(body) > MANY_CHARS and (request := json_object(body)) is not None:
            text = request.get("prompt")
            size = len(text) if isinstance(text, str) else num_chars(request.get("messages"))
            await self._server_info.check_size(server, size)
        await self.app(server.scope, replay(body, server.receive), send)

    async def _complete_chat(self, server: WrappedServer, send: Send) -> Reply | None:
        check_content_type(server.scope)
        body = await read_body(server.receive)
        identity = identity_of(server.scope)
        if (refusal := self._chat.refusal(identity.rollout)) is not None:
            return refusal
        turn = Turn.from_json(body, identity)
        if turn is None and (identity.turn_tag is not None or _is_tagged(body)):
            raise InvalidTurnError("a turn of a rollout must be a JSON object (no NaN) with a list of `messages`")
        if identity.rollout is None and (turn is None or not turn.is_tagged):
            self._untagged.count(identity)
        if turn is None or (turn.is_streamed and not turn.is_ours):
            await self._forward(server, body, send)  # vLLM's own answer, or its own complaint
            return None
        return await self._answer(server, turn)

    async def _complete_text(self, server: WrappedServer, send: Send) -> Reply | None:
        body = await read_body(server.receive)
        identity = identity_of(server.scope)
        if identity.turn_tag is None and not _is_tagged(body):
            return await self._pass_on_untagged(server, body, send)
        check_content_type(server.scope)
        turn = Turn.from_completion(body, identity)
        return self._chat.refusal(turn.rollout) or await self._answer(server, turn)

    async def _answer(self, server: WrappedServer, turn: Turn) -> Reply:
        if (affinity := _affinity(turn)) is not None:
            scope: Scope = {**server.scope, AFFINITY: affinity}
            if turn.rollout is not None and not self._chat.book.has_ended(turn.rollout):
                scope = self._replicas.placed(scope, turn.rollout, lambda: _beginning(turn))
            server = WrappedServer(server.app, scope, server.receive)
        return await self._chat.answer(server, turn)

    async def _refuse_turns(self, server: WrappedServer, send: Send) -> Reply | None:
        """Refuse rollouts on the other routes that sample, or may: what is not known here is not sampled as pinned."""
        body = await read_body(server.receive)
        identity = identity_of(server.scope)
        if identity.turn_tag is not None or _is_tagged(body):
            raise InvalidTurnError(
                f"a turn of a rollout must be sent to {CHAT_PATH} or {COMPLETIONS_PATH}, not to "
                f"{path_of(server.scope)}: there alone it is sampled with the parameters of its rollout, within its "
                "budget, and recorded"
            )
        return await self._pass_on_untagged(server, body, send)

    async def _pass_on_untagged(self, server: WrappedServer, body: bytes, send: Send) -> Reply | None:
        identity = identity_of(server.scope)
        if identity.rollout is None:
            self._untagged.count(identity)
        elif (refusal := self._chat.refusal(identity.rollout)) is not None:
            return refusal
        await self._forward(server, body, send)
        return None

    async def _forward(self, server: WrappedServer, body: bytes, send: Send) -> None:
        """Pass a request on; the newest adapter answers it if the policy is an adapter."""
        policy_names = await self._adapters.policy_names(server)
        with self._adapters.rerouted(server.scope, body, send, policy_names) as (scope, body, send):
            await self.app(scope, replay(body, server.receive), send)

    async def _info(self, server: WrappedServer, _send: Send) -> Reply:
        server_info = await self._server_info.all(server)
        try:
            options = {"model": server_info["model_names"][0]}
            turn_end = (await self._chat.templates.closing(server.tokenize, options)).turn_end
        except (RenderRefusedError, NoBoundaryError):
            turn_end = None  # no chat template, or one without a turn end: chat requests report the effect
        templates = self._chat.templates
        return Reply.from_json(
            200,
            {
                "nonce": self._nonce,
                "instance": self._instance,  # changes with a restart: weights must be sent again
                "package_version": trl_gym.__version__,
                "has_key": self._has_key,  # without one it takes no weights
                **server_info,
                "weight_version": await self._server_info.weight_version(server),
                "turn_end_token_id": turn_end,
                "weight_transports": self._weight_transports,
                "adapters": self._adapters.describe(),
                "untagged_calls": self._untagged.describe(),
                "counters": {
                    **asdict(self._chat.counters),
                    "rendered_whole": templates.num_whole,
                    "rendered_abbreviated": templates.num_abbreviated,
                },
            },
        )

    async def _change_version(self, server: WrappedServer, _send: Send) -> Reply:
        """Pass the request on, and learn the new version before the client has its answer."""
        path, body = path_of(server.scope), await read_body(server.receive)
        server, before = on_its_own(server), self._server_info.known_version
        reply = await server.ask("POST", path, body)
        await self._server_info.follow_change(server, before)
        if reply.ok and path == _FINISH_PATH:
            await self._adapters.clear(server, new_weights=True)  # they were trained on other weights
        return reply

    async def _pause(self, server: WrappedServer, send: Send) -> None:
        """Let the application answer, and take note of when nothing is sampled any more."""

        async def watched(message: Message) -> None:
            if message.get("status") == 200:
                self._server_info.history.paused()
            await send(message)

        await self.app(server.scope, server.receive, watched)

    async def _resume(self, server: WrappedServer, send: Send) -> None:
        self._server_info.history.resuming()
        await self.app(server.scope, server.receive, send)

    async def _load_adapter(self, server: WrappedServer, _send: Send) -> Reply:
        return await self._adapters.load(server, await _required_object(server))

    async def _clear_adapters(self, server: WrappedServer, _send: Send) -> Reply:
        return await self._adapters.clear(server)

    async def _records(self, server: WrappedServer, _send: Send) -> Reply:
        names, book = _names(await _required_object(server)), self._chat.book
        records = {name: [_without_tokens(record) for record in calls] for name, calls in book.records(names).items()}
        running = book.num_running(names)
        return Reply.from_json(200, {"records": records, "running": running, "instance": self._instance})

    async def _take(self, server: WrappedServer, _send: Send) -> Reply:
        names = _names(await _required_object(server))
        taken = Taken(self._instance, self._chat.book.take(names))
        self._replicas.release(names)
        await self._adapters.release(server, names)
        return Reply(200, msgspec.msgpack.encode(taken), b"application/msgpack")

    async def _cancel(self, server: WrappedServer, _send: Send) -> Reply:
        request = await _required_object(server)
        names = _names(request)
        aborted = self._chat.book.cancel(names)
        self._replicas.release(names)
        await self._adapters.release(server, names)
        return Reply.from_json(200, {"aborted": aborted})

    async def _pin_sampling(self, server: WrappedServer, _send: Send) -> Reply:
        request = await _required_object(server)
        self._chat.sampling = checked_sampling(request.get("sampling"), "sampling")
        return Reply.from_json(200, {"sampling": self._chat.sampling})


async def _refuse(scope: Scope, send: Send, error: RefusedError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await Reply.error(error.status, str(error)).send(send)


async def _required_object(server: WrappedServer) -> dict[str, Any]:
    """Read a JSON object. Raises `InvalidTurnError` for anything else, NaN and infinities in it included."""
    check_content_type(server.scope)
    try:
        parsed = strict_json(await read_body(server.receive))
    except ValueError as error:
        raise InvalidTurnError(f"the body must be a JSON object ({error})") from None
    if not isinstance(parsed, dict):
        raise InvalidTurnError("the body must be a JSON object")
    return parsed


def _names(request: dict[str, Any]) -> list[str]:
    names = request.get("rollouts")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidTurnError("`rollouts` must be a list of rollout ids")
    return names


def _without_tokens(record: CallRecord) -> dict[str, Any]:
    bare = msgspec.structs.replace(record, tokens=None)  # else they would all be written as base64
    return {name: value for name, value in msgspec.to_builtins(bare).items() if name != "tokens"}


def _is_tagged(body: bytes) -> bool:
    may_be = b'"trl_gym"' in body or b"\\u" in body  # an escape may hide it from us, and from no parser
    return may_be and "trl_gym" in (json_object(body) or {})


def _affinity(turn: Turn) -> str | None:
    """Return what the calls of one rollout have in common: its id, else a hash of its first prompt."""
    if turn.rollout is not None or turn.seen is None:
        return turn.rollout
    return hashlib.blake2b(array("q", turn.seen[: turn.num_first_prompt]).tobytes(), digest_size=16).hexdigest()


def _beginning(turn: Turn) -> bytes:
    """Return a digest of what a rollout begins with: the rollouts of one task begin alike."""
    return hashlib.blake2b(msgspec.json.encode(turn.messages) + turn.options_key, digest_size=16).digest()
