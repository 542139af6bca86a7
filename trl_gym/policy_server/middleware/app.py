"""Token-exact multi-turn sampling on a stock OpenAI server, as ASGI middleware.

A stock server renders the chat again on every turn. The new prompt then tokenizes the old answers afresh, and training
would see tokens that were never sampled. This middleware makes every prompt start with the tokens already seen, and
hands the tokens of each answer back; `chat.py` says how.

    POST /v1/chat/completions        Gym's model server, once per turn
    GET  /trl_gym/info               who this is, versions, counters
    POST /trl_gym/rollouts/records   the model calls of rollouts: tokens, cache hits, seconds, versions, drift
    POST /trl_gym/rollouts/cancel    nobody waits for these rollouts any more
    POST /trl_gym/sampling           pinned for rollouts whose calls pin nothing
    POST /trl_gym/adapters           a new version of the LoRA adapter that is the policy (`adapter_control.py`)

A request may carry `trl_gym = {"rollout": …, "sampling": {…}, "completion_budget": …}`: it is a turn of that rollout,
sampled exactly with the given parameters. Without it (and without token ids in its messages) a request gets the stock
answer plus the bundle, and a stream is the stock stream.

Only the server's HTTP surface is used, so nothing here depends on vLLM's internals.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from array import array
from dataclasses import asdict, dataclass
from typing import Any

import trl_gym
from trl_gym.policy_server.command import ENV_API_KEYS, ENV_NONCE, ENV_PROMPT_FIELD
from trl_gym.policy_server.middleware.adapters import AdapterControl
from trl_gym.policy_server.middleware.chat import CHAT_PATH, ChatTurns
from trl_gym.policy_server.middleware.http import (
    AnsweredError,
    App,
    ClientGoneError,
    Inner,
    Receive,
    Reply,
    Scope,
    Send,
    ServerFacts,
    header,
    path_of,
    read_body,
    replay,
)
from trl_gym.policy_server.middleware.splice import NoBoundaryError
from trl_gym.policy_server.middleware.templates import RenderRefusedError
from trl_gym.policy_server.middleware.turn import InvalidTurnError, Turn, checked_sampling

AFFINITY = "trl_gym.affinity"  # in the scope of what we ask: calls with the same value should reach the same engine
INFO_PATH = "/trl_gym/info"
_FINISH_PATH = "/finish_weight_update"
_VERSION_PATHS = (_FINISH_PATH, "/update_weight_version")
_OTHER_CHAT_PATHS = ("/v1/responses", "/v1/messages")
_RETRIED_FOREVER = (429, 502, 503, 504, 520)  # by Gym, every half second; a 500 three times


@dataclass(frozen=True, slots=True)
class Settings:
    """How one middleware is set up.

    Attributes:
        nonce: Comes back from `/trl_gym/info`, which proves who answers.
        api_keys: Any of these is demanded as bearer token on every route but `/health`; empty demands none.
        has_prompt_field: Whether the server takes `prompt_token_ids` as a field of a chat request.
    """

    nonce: str | None = None
    api_keys: tuple[str, ...] = ()
    has_prompt_field: bool = False

    @classmethod
    def from_env(cls) -> Settings:
        """Read `TRL_GYM_NONCE`, `TRL_GYM_SERVER_API_KEYS`, `TRL_GYM_PROMPT_FIELD`: vLLM builds middleware itself."""
        return cls(
            nonce=os.environ.get(ENV_NONCE) or None,
            api_keys=tuple(key for key in os.environ.get(ENV_API_KEYS, "").splitlines() if key),
            has_prompt_field=os.environ.get(ENV_PROMPT_FIELD) == "1",
        )


class OnPolicyMiddleware:
    """Pure ASGI.

    The routes handled here never answer 429, 502, 503, 504 or 520, whatever the server says: Gym retries these for
    ever.

    Args:
        app: What is wrapped: vLLM's application, or a gateway to one.
        settings: Taken from the environment when not given.
    """

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self.app = app
        settings = settings or Settings.from_env()
        self._nonce = settings.nonce
        self._instance = secrets.token_hex(8)
        self._api_keys = [key.encode() for key in settings.api_keys]
        self._facts = ServerFacts()
        self._adapters = AdapterControl(self._facts)
        self._chat = ChatTurns(self._facts, self._adapters, has_prompt_field=settings.has_prompt_field)
        self._handlers = {
            ("GET", INFO_PATH): self._info,
            ("POST", CHAT_PATH): self._complete_chat,
            ("POST", "/trl_gym/rollouts/records"): self._records,
            ("POST", "/trl_gym/rollouts/cancel"): self._cancel,
            ("POST", "/trl_gym/sampling"): self._pin_sampling,
            ("POST", "/trl_gym/adapters"): self._load_adapter,
            ("POST", "/trl_gym/adapters/clear"): self._clear_adapters,
            ("POST", "/v1/completions"): self._pass_on,
            **{("POST", path): self._change_version for path in _VERSION_PATHS},
            **{("POST", path): self._refuse_turns for path in _OTHER_CHAT_PATHS},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        path = path_of(scope)
        if not self._may_enter(scope, path):
            return await _refuse(scope, send)
        handler = self._handlers.get((scope.get("method", ""), path))
        if handler is None:
            return await self.app(scope, receive, send)
        try:
            reply = await handler(Inner(self.app, scope, receive), send)
        except AnsweredError as answered:
            reply = answered.reply
        except InvalidTurnError as error:
            reply = Reply.error(400, str(error))
        except ClientGoneError:
            return None
        if reply is None:
            return None  # the handler has let the application answer directly
        if reply.status in _RETRIED_FOREVER:
            reply = Reply(500, reply.body, reply.content_type)
        await reply.send(send)
        return None

    def _may_enter(self, scope: Scope, path: str) -> bool:
        if not self._api_keys or path == "/health":
            return True
        scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
        # Every key is compared, in constant time: the answer's timing says nothing about any of them.
        matches = [hmac.compare_digest(key, known) for known in self._api_keys]
        return scheme.lower() == b"bearer" and any(matches)

    # -- chat ---------------------------------------------------------------------------------------------------------

    async def _complete_chat(self, inner: Inner, send: Send) -> Reply | None:
        body = await read_body(inner.receive)
        turn = Turn.from_json(body)
        if turn is None and _is_tagged(body):
            raise InvalidTurnError("a turn of a rollout must be a JSON object (no NaN) with a list of `messages`")
        if turn is None or (turn.is_streamed and not turn.is_ours):
            await self._forward(inner, body, send)  # vLLM's own answer, or its own complaint
            return None
        if (affinity := _affinity(turn)) is not None:
            inner = Inner(inner.app, {**inner.scope, AFFINITY: affinity}, inner.receive)
        return await self._chat.answer(inner, turn)

    async def _refuse_turns(self, inner: Inner, send: Send) -> Reply | None:
        """Other ways to chat have no place for a token bundle in their schema: stock for everybody but rollouts."""
        body = await read_body(inner.receive)
        if _is_tagged(body):
            raise InvalidTurnError(f"a turn of a rollout must be sent to {CHAT_PATH}: only it answers with token ids")
        await self._forward(inner, body, send)
        return None

    async def _pass_on(self, inner: Inner, send: Send) -> None:
        await self._forward(inner, await read_body(inner.receive), send)

    async def _forward(self, inner: Inner, body: bytes, send: Send) -> None:
        """The server's own answer, by the newest adapter where the policy is one."""
        policy_names = await self._adapters.policy_names(inner)
        with self._adapters.rerouted(inner.scope, body, send, policy_names) as (scope, body, send):
            await self.app(scope, replay(body, inner.receive), send)

    # -- control ------------------------------------------------------------------------------------------------------

    async def _info(self, inner: Inner, _send: Send) -> Reply:
        facts = await self._facts.all(inner)
        try:
            options = {"model": facts["model_names"][0]}
            turn_end = (await self._chat.templates.closing(inner.tokenize, options)).turn_end
        except (RenderRefusedError, NoBoundaryError):
            turn_end = None  # no chat template, or one that closes nothing: chat requests will say what follows
        templates = self._chat.templates
        return Reply.from_json(
            200,
            {
                "nonce": self._nonce,
                "instance": self._instance,  # another one after a restart: weights must be sent again
                "package_version": trl_gym.__version__,
                **facts,
                "weight_version": await self._facts.weight_version(inner),
                "turn_end_token_id": turn_end,
                "adapters": self._adapters.describe(),
                "counters": {
                    **asdict(self._chat.counters),
                    "rendered_whole": templates.num_whole,
                    "rendered_extension": templates.num_extended,
                },
            },
        )

    async def _change_version(self, inner: Inner, _send: Send) -> Reply:
        """Pass through, and forget the cached version before anybody can hear that the new one is there."""
        path = path_of(inner.scope)
        reply = await inner.ask("POST", path, await read_body(inner.receive))
        self._facts.weights_changed()
        if reply.ok and path == _FINISH_PATH:
            await self._adapters.clear(inner, new_weights=True)  # they were trained on others
        return reply

    async def _load_adapter(self, inner: Inner, _send: Send) -> Reply:
        return await self._adapters.load(inner, _parse_object(await read_body(inner.receive)))

    async def _clear_adapters(self, inner: Inner, _send: Send) -> Reply:
        return await self._adapters.clear(inner)

    async def _records(self, inner: Inner, _send: Send) -> Reply:
        request = _parse_object(await read_body(inner.receive))
        names, book = _names(request), self._chat.book
        running = book.num_running(names)
        forget = bool(request.get("forget", True))
        records = book.records(names, forget=forget)
        if forget:
            await self._adapters.release(inner, names)
        return Reply.from_json(200, {"records": records, "running": running, "instance": self._instance})

    async def _cancel(self, inner: Inner, _send: Send) -> Reply:
        request = _parse_object(await read_body(inner.receive))
        names = _names(request)
        aborted = self._chat.book.cancel(names)
        await self._adapters.release(inner, names)
        return Reply.from_json(200, {"aborted": aborted})

    async def _pin_sampling(self, inner: Inner, _send: Send) -> Reply:
        request = _parse_object(await read_body(inner.receive))
        self._chat.sampling = checked_sampling(request.get("sampling"), "sampling")
        return Reply.from_json(200, {"sampling": self._chat.sampling})


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await Reply.error(401, "this server demands its API key as a bearer token on every route but /health").send(send)


def _parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises `InvalidTurnError` if it is anything else."""
    try:
        parsed = json.loads(body)
    except ValueError as error:
        raise InvalidTurnError(f"the body must be a JSON object: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidTurnError("the body must be a JSON object")
    return parsed


def _names(request: dict[str, Any]) -> list[str]:
    names = request.get("rollouts")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidTurnError("`rollouts` must be a list of rollout ids")
    return names


def _is_tagged(body: bytes) -> bool:
    if b'"trl_gym"' not in body:
        return False
    try:
        return "trl_gym" in _parse_object(body)
    except InvalidTurnError:
        return False


def _affinity(turn: Turn) -> str | None:
    """What the calls of one rollout have in common: its id, else its first prompt."""
    if turn.rollout is not None or turn.seen is None:
        return turn.rollout
    return hashlib.blake2b(array("q", turn.seen[: turn.num_first_prompt]).tobytes(), digest_size=16).hexdigest()
