"""Answer one chat completion: find its prompt, limit its tokens, sample, attach the bundle, record the call.

newest message that was sampled?  ── none ──► the prompt is what the server renders
  │ by handle, token ids, or what it says: seen = prompt + sampled ids              `ledger.RolloutCalls.recognize`
  │ has the agent changed the messages in front of it?                              `ledger.Digest`
  │ what does the template write after it?                                          `templates.Templates`
  ▼
prompt = seen + that, minus what the policy has sampled of it                       `splice.splice`
POST /v1/chat/completions (in process), prompt ids forced, token limit clamped
  ▼
the ledger; the answer, with a handle, or the bundle, on `choices[0].message`       `openai.attach`, `openai.slim`
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import msgspec

from trl_gym.policy_server.middleware import completions, openai, splice
from trl_gym.policy_server.middleware.adapters import Adapter, AdapterControl
from trl_gym.policy_server.middleware.http import (
    AbortedError,
    AnsweredError,
    Reply,
    ServerInfo,
    WrappedServer,
    expecting_vllm,
)
from trl_gym.policy_server.middleware.ledger import (
    CallDrift,
    CallTokens,
    DriftCause,
    Histories,
    RolloutBook,
    RolloutCalls,
    digest_of,
    record_of,
)
from trl_gym.policy_server.middleware.sampling import shortened
from trl_gym.policy_server.middleware.templates import Chat, RenderRefusedError, Templates
from trl_gym.policy_server.middleware.turn import Turn
from trl_gym.policy_server.middleware.versions import Sampled

_OVERFLOW = "maximum context length"  # Gym ends a rollout gracefully when it reads "context length" in a 400
_IS_FULL = "max_tokens must be at least 1"  # what vLLM says of a prompt as long as the context, if it limits itself
_NO_MEDIA = "a prompt of token ids cannot carry images, audio or video"


class _Text(TypedDict):
    prompt: str


@dataclass(slots=True)
class Counters:
    """Counts since the server's start."""

    requests: int = 0  # chat completions that were not passed through
    spliced: int = 0  # prompts that were forced
    served_as_rendered: int = 0  # prompts that should have been forced and could not
    overflows: int = 0  # requests refused because no room was left
    cancelled: int = 0  # requests refused or aborted because their rollout has ended or was cancelled


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one call."""

    forced: list[int] | None = None  # the exact ids, or None to let the server render
    num_tokens: int | None = None  # its length; None while only the server knows it
    drift: CallDrift | None = None  # the cause why it may not start with the tokens already seen


@dataclass(frozen=True, slots=True)
class Served:
    """The end of one call."""

    reply: Reply
    answer: dict[str, Any] | None = None  # the chat completion in it; None if it is an error
    tokens: CallTokens | None = None  # for the ledger; None for an error, and without a tag
    last_version: str | None = None  # weight version of its last token
    prompt: Prompt = field(default_factory=Prompt)  # the prompt, as far as it was found


class ChatTurns:
    """Answer chat completions.

    Args:
        adapters: Chooses the adapter that answers a call.
        has_prompt_field: Whether the server takes `prompt_token_ids` as a field of a chat request.

    Attributes:
        counters: Counts of requests by outcome.
        book: The calls of each rollout.
        templates: The chat templates seen so far.
        sampling: Parameters pinned for rollouts whose calls pin none.
    """

    def __init__(self, server_info: ServerInfo, adapters: AdapterControl, *, has_prompt_field: bool) -> None:
        self.counters = Counters()
        self.book = RolloutBook()
        self.templates = Templates()
        self.sampling: dict[str, Any] = {}
        self._server_info = server_info
        self._adapters = adapters
        self._histories = Histories()
        self._has_prompt_field = has_prompt_field

    async def answer(self, server: WrappedServer, turn: Turn) -> Reply:
        """Answer one chat completion; every error is a reply. Raises `ClientGoneError`."""
        self.counters.requests += 1
        if turn.rollout is None:
            return (await self._serve_routed(server, turn)).reply
        if (refusal := self.refusal(turn.rollout)) is not None:
            return refusal
        if turn.sampling is None:
            turn.pin(self.sampling)
        turn.known = self.book.calls(turn.rollout)
        if turn.prompt is None:
            turn.known.recognize(turn)
        with self.book.running(turn.rollout) as abort:
            try:
                return await self._serve_recorded(server, turn, abort)
            except AbortedError:
                return self._cancelled(turn.rollout)

    def refusal(self, rollout: str | None) -> Reply | None:
        """Return the answer to a call of a rollout that has ended, be it a turn or not; None if it has not."""
        return self._cancelled(rollout) if rollout is not None and self.book.has_ended(rollout) else None

    async def _serve_recorded(self, server: WrappedServer, turn: Turn, abort: asyncio.Event) -> Reply:
        started = time.monotonic()
        served = await self._serve_routed(server, turn, abort)
        record = record_of(
            served.reply,
            served.answer,
            exact=served.prompt.forced is not None,
            seconds=time.monotonic() - started,
            last_version=served.last_version,
            drift=served.prompt.drift,
            tokens=served.tokens,
            caller=turn.caller,
            own_sampling=shortened(turn.own_sampling),
        )
        self.book.append(self._calls(turn), turn, record)
        return served.reply

    async def _serve_routed(self, server: WrappedServer, turn: Turn, abort: asyncio.Event | None = None) -> Served:
        """Serve the turn with the adapter that its rollout began with."""
        policy_names = await self._adapters.policy_names(server)
        if abort is not None and abort.is_set():
            raise AbortedError  # it would hold an adapter that its rollout, which has ended, has let go
        with self._adapters.routed(turn.body.get("model"), turn.rollout, policy_names) as adapter:
            turn.served_model = None if adapter is None else adapter.served
            return await self._serve(server, turn, adapter, abort)

    async def _serve(
        self, server: WrappedServer, turn: Turn, adapter: Adapter | None, abort: asyncio.Event | None
    ) -> Served:
        prompt = Prompt()
        try:
            _refuse_own_sampling(turn)
            if turn.is_ours:  # a stock server counts the characters of all others itself
                await self._check_size(server, turn.num_chars)
            prompt = await self._prompt(server, turn)
            if turn.is_ours:
                await self._limit(server, turn, prompt)
            reply = await self._ask(server, turn, prompt, abort)
            if turn.is_ours and turn.body.get("tools") and not reply.ok and openai.is_unreadable(reply):
                prompt, reply = await self._ask_for_text(server, turn, prompt, abort)
            if reply.status < 400 and not reply.ok:
                raise AnsweredError(Reply.error(500, f"POST {turn.path}: {_neither(reply)}"))
            if not reply.ok:
                return Served(reply, prompt=prompt)
            answer, tokens = await self._complete(server, turn, prompt, adapter, reply)
            first, last = await self._adapters.versions_of(adapter, server, _sampled(turn, answer))
        except AnsweredError as answered:
            return Served(answered.reply, prompt=prompt)
        if first is None:  # a server without versions of its own may still name one
            first = last = answer.get("weight_version")
        if first is not None:
            answer["weight_version"] = str(first)
        return Served(_written(reply, turn, answer), answer, tokens, last, prompt)

    async def _check_size(self, server: WrappedServer, num_chars: int) -> None:
        try:
            await self._server_info.check_size(server, num_chars)
        except AnsweredError as answered:
            self.counters.overflows += answered.reply.status == 400
            raise

    async def _prompt(self, server: WrappedServer, turn: Turn) -> Prompt:
        if turn.prompt is not None:
            return await self._text_prompt(server, turn, turn.prompt)
        if turn.is_tagged and turn.has_media:
            raise AnsweredError(
                Reply.error(
                    400,
                    "A message of this rollout holds more than text (images, audio, video or files), which cannot be "
                    "trained on. Take it out of the task, or out of what tools return; other calls may send it.",
                )
            )
        if turn.seen is None or turn.newest is None:
            if turn.rollout is None or not self._calls(turn).has_lost(turn):
                return Prompt()  # a first turn, or not a rollout's: the server renders and limits it
            text = "the agent sent no sampled message in a form that is recognized, although this rollout has sampled"
            return await self._as_rendered(server, turn, CallDrift(cause=DriftCause.MESSAGE_WITHOUT_IDS, text=text))
        if turn.has_media:
            return await self._as_rendered(server, turn, CallDrift(cause=DriftCause.NO_BOUNDARY, text=_NO_MEDIA))
        changed = self._histories.difference(turn) if turn.rollout is None else self._calls(turn).difference(turn)
        if changed is not None:
            return await self._as_rendered(server, turn, CallDrift(cause=DriftCause.HISTORY_REWRITTEN, text=changed))
        source = await self._server_info.chat_template(server)
        chat = Chat(turn.messages, turn.newest, turn.render_options, turn.ending, source)
        try:
            forced = await self.templates.next_prompt(server.tokenize, chat, turn.seen)
        except (splice.NoBoundaryError, RenderRefusedError) as error:
            drift = CallDrift(cause=DriftCause.NO_BOUNDARY, text=str(error))
            return await self._as_rendered(server, turn, drift)
        self.counters.spliced += 1
        return Prompt(forced, len(forced), self._skipped_turn(turn, turn.newest))

    async def _text_prompt(self, server: WrappedServer, turn: Turn, prompt: str | list[int]) -> Prompt:
        """Find the prompt of a completion; see `completions.py`."""
        calls = self._calls(turn)
        if not isinstance(prompt, str):
            calls.go_on(turn, calls.parent(prompt))
            return Prompt(prompt, len(prompt))
        found = calls.texts.continued(prompt)
        if found is None:
            return Prompt()
        if found.call is None:
            text = "the prompt begins with that of an earlier call, and does not go on with what was sampled there"
            return await self._as_rendered(server, turn, CallDrift(cause=DriftCause.MESSAGE_WITHOUT_IDS, text=text))
        calls.go_on(turn, found.call)
        seen = turn.seen or []
        rest = {**turn.render_options, "prompt": found.rest, "add_special_tokens": False}
        try:
            tail = (await server.tokenize(rest))["tokens"] if found.rest else []
        except RenderRefusedError as error:
            raise AnsweredError(Reply.error(400, str(error))) from error
        stopped = calls.records[found.call].finish_reason == "stop"
        forced = await self._closed(server, turn, tail) or completions.joined(seen, tail, stopped=stopped)
        self.counters.spliced += 1
        return Prompt(forced, len(forced))

    async def _closed(self, server: WrappedServer, turn: Turn, tail: list[int]) -> list[int] | None:
        """Return the exact prompt where `tail` begins with a turn's end as the chat template writes it; else None."""
        try:
            closing = await self.templates.closing(server.tokenize, turn.render_options)
            if closing.end is None or tail[: closing.end + 1] != closing.ids[: closing.end + 1]:
                return None
            return splice.splice(turn.seen or [], tail, closing, self.templates.stop_ids)
        except (splice.NoBoundaryError, RenderRefusedError):
            return None  # a model without a chat template, for which completions are

    async def _as_rendered(self, server: WrappedServer, turn: Turn, drift: CallDrift) -> Prompt:
        """Let the server render, and report why, unless its render starts with the tokens seen anyway."""
        try:
            tokens = (await server.tokenize(turn.tokenize_request))["tokens"]
        except RenderRefusedError as error:
            raise AnsweredError(Reply.error(400, str(error))) from error
        if turn.seen is not None and tokens[: len(turn.seen)] == turn.seen:
            return Prompt(num_tokens=len(tokens))
        self.counters.served_as_rendered += 1
        return Prompt(num_tokens=len(tokens), drift=drift)

    def _skipped_turn(self, turn: Turn, newest: int) -> CallDrift | None:
        """Report a turn that was sampled after `newest` and is not recognized: the template wrote it."""
        if turn.rollout is None or all(m.get("role") != "assistant" for m in turn.messages[newest + 1 :]):
            return None
        if turn.call is None or turn.call == self._calls(turn).newest:
            return None
        return CallDrift(
            cause=DriftCause.MESSAGE_WITHOUT_IDS,
            text=f"the agent sent a turn that was sampled after message {newest} in a form that is not recognized",
        )

    def _calls(self, turn: Turn) -> RolloutCalls:
        assert turn.known is not None, "only rollouts have calls"
        return turn.known

    async def _limit(self, server: WrappedServer, turn: Turn, prompt: Prompt) -> None:
        """Limit the tokens to the room that is left. Raises `AnsweredError` if there is none."""
        max_model_len = await self._server_info.max_model_len(server)
        if prompt.num_tokens is None:
            if turn.asks_for_limit or turn.completion_budget is not None:  # else the server stops at its own limit
                turn.limit_tokens(min(max_model_len - 1, turn.completion_budget or max_model_len))
            return
        first = turn.num_first_prompt
        if first is None and turn.rollout is not None:
            first = self._calls(turn).num_first_prompt
        room = splice.room(
            prompt.num_tokens,
            max_model_len=max_model_len,
            completion_budget=turn.completion_budget,
            num_first_prompt=first,
        )
        if room <= 0:
            self.counters.overflows += 1
            budget = f" and the conversation's budget of {turn.completion_budget}" if turn.completion_budget else ""
            message = (
                f"This model's {_OVERFLOW} is {max_model_len} tokens{budget}; the prompt of "
                f"{prompt.num_tokens} tokens leaves no room for a completion."
            )
            raise AnsweredError(Reply.error(400, message))
        turn.limit_tokens(room)

    async def _ask(self, server: WrappedServer, turn: Turn, prompt: Prompt, abort: asyncio.Event | None) -> Reply:
        reply = await self._send(server, turn, prompt, abort)
        unbounded = turn.is_tagged and prompt.num_tokens is None
        if unbounded and reply.status == 400 and any(said in reply.error_text() for said in (_OVERFLOW, _IS_FULL)):
            # Only the server renders a first prompt; its tokens are counted only if the limit was too high.
            tokens = await server.tokenize(turn.tokenize_request)
            await self._limit(server, turn, Prompt(num_tokens=len(tokens["tokens"])))
            reply = await self._send(server, turn, prompt, abort)
        return reply

    async def _ask_for_text(
        self, server: WrappedServer, turn: Turn, prompt: Prompt, abort: asyncio.Event | None
    ) -> tuple[Prompt, Reply]:
        """Sample again, of the same prompt, and read no calls: what a server has sampled and cannot send is lost."""
        if prompt.forced is None:  # a server may leave the tools out of a prompt without calls
            body = {**turn.render_options, "messages": turn.messages, **turn.ending}
            tokens = (await server.tokenize(body))["tokens"]
            prompt = replace(prompt, forced=tokens, num_tokens=len(tokens))
        turn.body["tool_choice"] = "none"
        return prompt, await self._send(server, turn, prompt, abort)

    async def _send(self, server: WrappedServer, turn: Turn, prompt: Prompt, abort: asyncio.Event | None) -> Reply:
        request = turn.sampling_request(prompt.forced, self._has_prompt_field)
        clock = self._server_info.history.clock
        turn.sent = clock()
        if abort is None:
            reply = await server.ask("POST", turn.path, request)
        else:
            reply = await server.ask_until(abort, "POST", turn.path, request)
        turn.answered = clock()
        return reply

    async def _complete(
        self, server: WrappedServer, turn: Turn, prompt: Prompt, adapter: Adapter | None, reply: Reply
    ) -> tuple[dict[str, Any], CallTokens | None]:
        """Add bundle or handle and drift to the answer, and return its tokens for the ledger. Raises `AnsweredError`:
        the bundle of a rollout's turn is not exact, or the answer is no chat completion."""
        with expecting_vllm(f"POST {turn.path}"):
            answer = (openai.read_completion if turn.prompt is None else completions.as_chat)(reply.body)
        tokens = None
        try:
            if turn.is_ours and len(answer["choices"]) != 1:
                raise openai.BundleError(f"the server returned {len(answer['choices'])} answers for one")
            openai.attach(answer, forced_prompt=prompt.forced)
            max_model_len = await self._server_info.max_model_len(server)
            if turn.is_ours and openai.has_odd_call(answer["choices"][0]["message"]):
                await self._turn_into_text(server, turn, answer, max_model_len)
            tokens = self._remember(turn, answer, max_model_len)
        except openai.BundleError as error:
            if turn.is_ours:
                raise AnsweredError(Reply.error(500, str(error))) from error
            answer["trl_gym"] = {"no_bundle": str(error)}
        openai.strip_unasked(answer, turn.asked)
        if tokens is not None:
            openai.slim(answer, tokens.handle, with_logprobs=not turn.asks_for_ids)
        if turn.is_ours and turn.hides_thinking:
            answer["choices"][0]["message"] |= dict.fromkeys(
                {"reasoning", "reasoning_content"} & answer["choices"][0]["message"].keys()
            )
        if adapter is not None:
            answer["model"] = turn.body.get("model") or (await self._server_info.all(server))["model_names"][0]
        if prompt.drift is not None:
            answer["trl_gym"] = {"drift": msgspec.to_builtins(prompt.drift)}
        return answer, tokens

    async def _turn_into_text(
        self, server: WrappedServer, turn: Turn, answer: dict[str, Any], max_model_len: int
    ) -> None:
        """Give an answer whose calls cannot be read as the text that was sampled."""
        choice = answer["choices"][0]
        ids, is_whole = choice["message"]["generation_token_ids"], _stopped_by_itself(turn, answer, max_model_len)
        reply = await server.ask("POST", "/detokenize", {"tokens": ids[:-1] if is_whole else ids})
        text = (
            reply.checked_json("POST /detokenize", _Text)["prompt"] if reply.ok else choice["message"].get("content")
        )
        choice["message"] |= {"content": text or "", "tool_calls": []}
        for thought in ("reasoning", "reasoning_content"):  # which the text has
            choice["message"].pop(thought, None)
        if choice.get("finish_reason") == "tool_calls":
            choice["finish_reason"] = "stop" if is_whole else "length"

    def _remember(self, turn: Turn, answer: dict[str, Any], max_model_len: int) -> CallTokens | None:
        """Keep what the next turn needs to know about this one. Returns the tokens of a rollout's turn."""
        if len(answer["choices"]) != 1:
            return None
        message = answer["choices"][0]["message"]
        prompt, ids = answer["prompt_token_ids"], message["generation_token_ids"]
        if _stopped_by_itself(turn, answer, max_model_len):
            self.templates.stop_ids.add(ids[-1])
        if turn.rollout is not None:
            turn.said = message["content"] if turn.prompt is not None else ""
            return self._calls(turn).tokens_of(turn, message, prompt)
        self._histories.remember(prompt + ids, digest_of(turn, len(turn.messages)))
        return None

    def _cancelled(self, rollout: str) -> Reply:
        self.counters.cancelled += 1
        text = f"The rollout {rollout} has ended or was cancelled; its {_OVERFLOW} counts as reached."
        return Reply.error(400, text)


def _refuse_own_sampling(turn: Turn) -> None:
    if turn.own_sampling and turn.agent_sampling == "refuse":
        raise AnsweredError(
            Reply.error(
                400,
                f"This turn of a rollout asks for sampling of its own ({', '.join(shortened(turn.own_sampling))}), "
                "and `gym_agent_sampling` is 'refuse'. Take it out of the agent or the row's `metadata.extra_body`, "
                "or set the option to 'strip' or 'allow'.",
            )
        )


def _written(reply: Reply, turn: Turn, answer: dict[str, Any]) -> Reply:
    """Return the reply to the client, with the headers of the server's."""
    streamed = turn.is_ours and turn.is_streamed
    usage = bool((turn.body.get("stream_options") or {}).get("include_usage"))
    form: Any = openai
    if turn.prompt is not None:
        wants_logprobs = turn.body.get("logprobs") is not None and not turn.asks_for_ids
        answer, form = completions.as_text(answer, with_logprobs=wants_logprobs), completions
    body = form.events(answer, include_usage=usage) if streamed else msgspec.json.encode(answer)
    return replace(reply, body=body, content_type=openai.CONTENT_TYPE if streamed else b"application/json")


def _neither(reply: Reply) -> str:
    return f"the server answered HTTP {reply.status}, which is neither an answer nor an error"


def _sampled(turn: Turn, answer: dict[str, Any]) -> Sampled:
    return Sampled.of(turn.sent, turn.answered, answer.get("metrics"), answer.pop("weight_versions", None))


def _stopped_by_itself(turn: Turn, answer: dict[str, Any], max_model_len: int) -> bool:
    """Tell whether the last token is one at which this model stops.

    A stop that the request asked for says nothing about the model. An answer with tool calls says "tool_calls" even
    when it was cut off at its limit.
    """
    choice = answer["choices"][0]
    stop_reason, num_tokens = choice.get("stop_reason"), len(choice["message"]["generation_token_ids"])
    if turn.body.get("stop_token_ids") or turn.body.get("stop") or isinstance(stop_reason, str) or not num_tokens:
        return False
    if choice.get("finish_reason") == "stop" or isinstance(stop_reason, int):
        return True
    limit = turn.body.get("max_completion_tokens") or turn.body.get("max_tokens") or max_model_len
    room = max_model_len - len(answer["prompt_token_ids"])
    return choice.get("finish_reason") == "tool_calls" and num_tokens < min(limit, room)
