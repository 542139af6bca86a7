"""Token-exact multi-turn sampling on a stock OpenAI server, as ASGI middleware.

A stock server renders the chat again on every turn. The new prompt then tokenizes the old answers afresh, and training
would see tokens that were never sampled. This middleware makes every prompt start with the tokens already seen, and
hands the tokens of each answer back:

    POST /v1/chat/completions      Gym's model server, once per turn
      │  newest message with `generation_token_ids`?  ── no ──► the prompt is what the server renders
      │ yes: seen = prompt_token_ids + generation_token_ids
      │  POST /tokenize (twice, in process): where do the new messages start?
      │  prompt = seen + the template's tokens from there on                            `splice.splice`
      ▼
    POST /v1/chat/completions (in process), prompt ids forced, token limit clamped
      ▼
    the answer, plus the bundle on `choices[0].message`                                 `bundle.attach`

A request may carry `trl_gym = {"rollout": …, "sampling": {…}, "completion_budget": …}`: it is a turn of that rollout,
sampled exactly with the given parameters. Without it (and without token ids in its messages) a request gets the stock
answer plus the bundle.

Only the server's HTTP surface is used, so nothing here depends on vLLM's internals. The state is a few cached facts
about the server and four counters.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import trl_gym
from trl_gym.policy_server import bundle, splice
from trl_gym.policy_server.asgi import (
    App,
    ClientGoneError,
    Receive,
    Reply,
    Scope,
    Send,
    ask,
    header,
    path_of,
    read_body,
    replay,
)
from trl_gym.policy_server.turn import InvalidTurnError, Turn, without_token_ids

ENV_NONCE = "TRL_GYM_NONCE"
ENV_API_KEYS = "TRL_GYM_API_KEY"  # one per line
ENV_PROMPT_FIELD = "TRL_GYM_PROMPT_FIELD"  # "1" if the server takes `prompt_token_ids` as a field of the request

INFO_PATH = "/trl_gym/info"
CHAT_PATH = "/v1/chat/completions"
_VERSION_PATHS = ("/finish_weight_update", "/update_weight_version")
_RETRIED_FOREVER = (429, 502, 503, 504, 520)  # by Gym, every half second; a 500 three times
_MAX_CACHED_TEMPLATES = 64

# What decides how a chat is rendered, by its name in /tokenize.
_RENDER_KEYS = ("model", "tools", "chat_template", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs")


@dataclass(slots=True)
class Counters:
    """Since the server's start.

    Attributes:
        requests: Chat completions that were not streamed.
        spliced: Prompts that were forced.
        served_as_rendered: Prompts that should have been forced and could not.
        overflows: Requests refused because no room was left.
    """

    requests: int = 0
    spliced: int = 0
    served_as_rendered: int = 0
    overflows: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy will see.

    Attributes:
        num_tokens: Its length.
        forced: The exact ids, or `None` to let the server render.
        drift: Why it may not start with the tokens already seen.
    """

    num_tokens: int
    forced: list[int] | None = None
    drift: str | None = None


class _AnsweredError(Exception):
    """The request ends here with this reply (an error of the server's or ours)."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body.decode(errors="replace"))
        self.reply = reply


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
        """From `TRL_GYM_NONCE`, `TRL_GYM_API_KEY` and `TRL_GYM_PROMPT_FIELD`: vLLM builds middleware itself."""
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
        self.counters = Counters()
        settings = settings or Settings.from_env()
        self._nonce = settings.nonce
        self._api_keys = [key.encode() for key in settings.api_keys]
        self._has_prompt_field = settings.has_prompt_field
        self._closings: dict[str, list[int]] = {}
        self._facts: dict[str, Any] | None = None
        self._weight_version: str | None = None
        self._version_changes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        path = path_of(scope)
        if not self._may_enter(scope, path):
            return await _refuse(scope, send)
        handler = self._handlers().get((scope.get("method", ""), path))
        if handler is None:
            return await self.app(scope, receive, send)
        try:
            reply = await handler(scope, receive, send)
        except _AnsweredError as answered:
            reply = answered.reply
        except ClientGoneError:
            return None
        if reply is None:
            return None  # the handler has let the application answer directly
        if reply.status in _RETRIED_FOREVER:
            reply = Reply(500, reply.body, reply.content_type)
        await reply.send(send)
        return None

    def _handlers(self) -> dict[tuple[str, str], Any]:
        return {
            ("GET", INFO_PATH): self._info,
            ("POST", CHAT_PATH): self._chat,
            **{("POST", path): self._change_version for path in _VERSION_PATHS},
        }

    def _may_enter(self, scope: Scope, path: str) -> bool:
        if not self._api_keys or path == "/health":
            return True
        scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
        # Every key is compared, in constant time: the answer's timing says nothing about any of them.
        matches = [hmac.compare_digest(key, known) for known in self._api_keys]
        return scheme.lower() == b"bearer" and any(matches)

    # -- /trl_gym/info ------------------------------------------------------------------------------------------------

    async def _info(self, scope: Scope, receive: Receive, _send: Send) -> Reply:
        facts = await self._server_facts(scope, receive)
        try:
            closing = await self._closing(scope, receive, {"model": facts["model_names"][0]})
        except _AnsweredError:
            closing = []  # no chat template: chat requests will say so in vLLM's words
        return Reply.from_json(
            200,
            {
                "nonce": self._nonce,
                "package_version": trl_gym.__version__,
                **facts,
                "weight_version": await self._current_version(scope, receive),
                "turn_end_token_id": closing[0] if closing else None,
                "counters": asdict(self.counters),
            },
        )

    async def _server_facts(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        if self._facts is None:
            models, version = await asyncio.gather(
                self._ask_json(scope, receive, "GET", "/v1/models"),
                self._ask_json(scope, receive, "GET", "/version"),
            )
            self._facts = {
                "vllm_version": version["version"],
                "max_model_len": models["data"][0]["max_model_len"],
                "model_names": [model["id"] for model in models["data"]],
            }
        return self._facts

    # -- weight version -----------------------------------------------------------------------------------------------

    async def _change_version(self, scope: Scope, receive: Receive, _send: Send) -> Reply:
        """Pass through, and forget the cached version before anybody can hear that the new one is there."""
        body = await read_body(receive)
        reply = await ask(self.app, scope, receive, "POST", path_of(scope), body)
        self._weight_version = None
        self._version_changes += 1
        return reply

    async def _current_version(self, scope: Scope, receive: Receive) -> str:
        if self._weight_version is not None:
            return self._weight_version
        changes = self._version_changes
        version = str((await self._ask_json(scope, receive, "GET", "/weight_info"))["weight_version"])
        if changes == self._version_changes:  # else it may be the old one: an update ended while we asked
            self._weight_version = version
        return version

    # -- chat completions ---------------------------------------------------------------------------------------------

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> Reply | None:
        body = await read_body(receive)
        request = _parse_object(body)
        if request is None or not _is_chat(request) or (request.get("stream") and "trl_gym" not in request):
            await self.app(scope, replay(body, receive), send)  # vLLM's own answer, or its own complaint
            return None
        self.counters.requests += 1
        try:
            turn = Turn.from_request(request)
        except InvalidTurnError as error:
            return Reply.error(400, str(error))
        prompt = await self._prompt(scope, receive, turn)
        if prompt is not None:
            await self._clamp(scope, receive, turn, prompt)
        return await self._sample(scope, receive, turn, prompt)

    async def _prompt(self, scope: Scope, receive: Receive, turn: Turn) -> Prompt | None:
        """The prompt of this turn; `None` for a request that is none of ours, which the stock server bounds."""
        options = _render_options(turn.body)
        if turn.seen is None:
            if not turn.is_tagged:
                return None
            return Prompt(len(await self._render(scope, receive, options, turn.messages, **turn.ending)))
        full, before, closing = await asyncio.gather(
            self._render(scope, receive, options, turn.messages, **turn.ending),
            self._render(scope, receive, options, turn.messages[: turn.newest + 1], add_generation_prompt=False),
            self._closing(scope, receive, options),
        )
        try:
            if turn.has_media:
                raise splice.NoBoundaryError("a prompt of token ids cannot carry images, audio or video")
            forced = (
                splice.continue_turn(turn.seen, closing)
                if turn.continues_newest
                else splice.splice(turn.seen, before, full, closing)
            )
        except splice.NoBoundaryError as error:
            self.counters.served_as_rendered += 1
            starts_with_seen = full[: len(turn.seen)] == turn.seen
            return Prompt(len(full), drift=None if starts_with_seen else str(error))
        self.counters.spliced += 1
        return Prompt(len(forced), forced=forced)

    async def _clamp(self, scope: Scope, receive: Receive, turn: Turn, prompt: Prompt) -> None:
        max_model_len = (await self._server_facts(scope, receive))["max_model_len"]
        room = splice.room(
            prompt.num_tokens,
            max_model_len=max_model_len,
            completion_budget=turn.completion_budget,
            num_first_prompt=turn.num_first_prompt,
        )
        if room <= 0:
            self.counters.overflows += 1
            budget = f" and the rollout's budget of {turn.completion_budget}" if turn.completion_budget else ""
            # Gym ends a rollout gracefully when it reads "context length" in a 400.
            message = (
                f"This model's maximum context length is {max_model_len} tokens{budget}; the prompt of "
                f"{prompt.num_tokens} tokens leaves no room for a completion."
            )
            raise _AnsweredError(Reply.error(400, message))
        turn.limit_tokens(room)

    async def _sample(self, scope: Scope, receive: Receive, turn: Turn, prompt: Prompt | None) -> Reply:
        forced = prompt.forced if prompt else None
        request = turn.sampling_request(forced, self._has_prompt_field)
        reply = await ask(self.app, scope, receive, "POST", CHAT_PATH, request)
        if not reply.ok:
            return reply
        answer = reply.json()
        try:
            bundle.attach(answer, forced_prompt=forced)
        except bundle.BundleError as error:
            if turn.is_ours:
                return Reply.error(500, str(error))
            answer["trl_gym"] = {"no_bundle": str(error)}
        bundle.strip_unasked(answer, turn.asked)
        answer["weight_version"] = await self._current_version(scope, receive)
        if prompt and prompt.drift:
            answer["trl_gym"] = {"drift": prompt.drift}
        return Reply.from_json(200, answer)

    # -- the server's own routes, in process --------------------------------------------------------------------------

    async def _closing(self, scope: Scope, receive: Receive, options: dict[str, Any]) -> list[int]:
        """What the template writes after an assistant turn; see `splice.find_closing`."""
        options = {key: value for key, value in options.items() if key != "tools"}
        key = json.dumps(options, sort_keys=True)
        if key not in self._closings:
            # Digits are tokens of their own in every tokenizer that we know, and these two share no ending.
            chats = [[{"role": "user", "content": "0"}, {"role": "assistant", "content": digit}] for digit in "01"]
            ending = {"add_generation_prompt": False}
            renders = [await self._render(scope, receive, options, chat, **ending) for chat in chats]
            if len(self._closings) >= _MAX_CACHED_TEMPLATES:
                self._closings.clear()
            self._closings[key] = splice.find_closing(*renders)
        return self._closings[key]

    async def _render(
        self, scope: Scope, receive: Receive, options: dict[str, Any], messages: list[Any], **ending: bool
    ) -> list[int]:
        payload = {**options, "messages": without_token_ids(messages), **ending}
        return (await self._ask_json(scope, receive, "POST", "/tokenize", payload))["tokens"]

    async def _ask_json(
        self, scope: Scope, receive: Receive, method: str, path: str, payload: dict[str, Any] | bytes = b""
    ) -> Any:
        reply = await ask(self.app, scope, receive, method, path, payload)
        if not reply.ok:
            raise _AnsweredError(reply)
        return reply.json()


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": "Unauthorized"})
        return
    await Reply.error(401, "this server demands its API key as a bearer token on every route but /health").send(send)


def _parse_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in `body`, or `None` if it is anything else."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _is_chat(request: dict[str, Any]) -> bool:
    messages = request.get("messages")
    return isinstance(messages, list) and bool(messages) and all(isinstance(message, dict) for message in messages)


def _render_options(body: dict[str, Any]) -> dict[str, Any]:
    """The part of a chat request that decides its render, as /tokenize wants it."""
    options = {key: body[key] for key in _RENDER_KEYS if body.get(key) is not None}
    # These two are fields of a chat request and template arguments everywhere else.
    extra = {key: body[key] for key in ("documents", "reasoning_effort") if body.get(key) is not None}
    if "reasoning_effort" in extra:
        extra["enable_thinking"] = extra["reasoning_effort"] != "none"
    if extra:
        options["chat_template_kwargs"] = {**extra, **options.get("chat_template_kwargs", {})}
    return options
