"""What a policy server knows about the model calls of a rollout: one record per call, and who has been cancelled.

Kept by the middleware in memory, read through `POST /trl_gym/rollouts/records`. Gym hands the messages of an answer on
and drops everything else, so this is how versions, cache hits and seconds reach the trainer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NotRequired, TypedDict

from trl_gym.policy_server.middleware.turn import Turn

# --------------------------------------------------------------------------------------------------------------------
# Has the agent sent the history that it had sent before? Digests of messages, kept per answer.
#
# Token ids say what the policy saw, the messages say what the agent means it to see. An agent that compacts or edits
# its
# history still sends the newest answer with its ids, and putting them back would silently undo the edit. So every
# answer
# leaves a digest of the messages in front of it, found again by the tokens that the answer made.

_MAX_ANSWERS = 65_536  # about 200 bytes each


@dataclass(frozen=True, slots=True)
class Digest:
    """What a model call was asked with.

    Attributes:
        messages: All of them.
        before_answer: Without assistant messages at the end: agents merge what they get into the last one.
        tools: Tools and template options.
    """

    messages: bytes
    before_answer: bytes
    tools: bytes


class Histories:
    """The newest answers of a server, whoever asked."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, Digest] = OrderedDict()

    @staticmethod
    def key(seen: Sequence[int]) -> bytes:
        """What an answer is known by: a hash of its prompt plus what was sampled."""
        return hashlib.blake2b(array("q", seen).tobytes(), digest_size=16).digest()

    def remember(self, seen: Sequence[int], digest: Digest) -> bytes:
        """An answer was given: `seen` is its prompt plus what was sampled. Returns its key."""
        key = self.key(seen)
        self._digests[key] = digest
        if len(self._digests) > _MAX_ANSWERS:
            self._digests.popitem(last=False)
        return key

    def difference(self, seen: Sequence[int], before: Digest) -> str | None:
        """What the agent has changed of what it had sent before the answer with these tokens.

        Args:
            seen: The newest answer's prompt plus what was sampled.
            before: Of the messages in front of that answer, as they are sent now.

        Returns:
            One sentence, or None if nothing was changed, or if the answer is not known here (another server gave it).
        """
        then = self._digests.get(self.key(seen))
        if then is None:
            return None
        if then.tools != before.tools:
            return "the agent changed the tools or the template options after this turn"
        if before.messages not in (then.messages, then.before_answer):
            return "the agent changed messages in front of this turn"
        return None


def digest(messages: Sequence[dict[str, Any]], sampled: Sequence[bytes | None], options: bytes) -> Digest:
    """Digest of messages as an agent means them.

    Args:
        messages: Without token ids.
        sampled: Per message, its sampled ids as JSON if it has any: these count then, and not the text.
        options: Hash of tools and template options.
    """
    end = len(messages)
    while end and messages[end - 1].get("role") == "assistant":
        end -= 1
    state, before = hashlib.blake2b(digest_size=16), b""
    for index, (message, ids) in enumerate(zip(messages, sampled, strict=True)):
        if index == end:
            before = state.digest()
        parts = ["ids", ids.decode()] if ids is not None else list(_meaning(message))
        state.update(json.dumps(parts).encode())
    whole = state.digest()
    return Digest(whole, before if end < len(messages) else whole, options)


def digest_of(turn: Turn, end: int) -> Digest:
    """Of a request's first `end` messages, and of all that else decides their render."""
    return digest(turn.messages[:end], turn.sampled[:end], turn.options_key)


def _meaning(message: dict[str, Any]) -> Iterable[Any]:
    """Role, text, calls: not thinking, which agents drop, nor the form in which they write it."""
    yield message.get("role")
    content = message.get("content")
    if isinstance(content, list):
        texts: list[Any] = [
            part.get("text") if isinstance(part, dict) and "text" in part else part for part in content
        ]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else texts
    yield content or ""
    yield message.get("tool_call_id")
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {} if isinstance(call, dict) else {}
        yield [function.get("name"), function.get("arguments")]


# --------------------------------------------------------------------------------------------------------------------
# Turns in which the policy said nothing, and which agents drop.
#
# A policy may sample nothing but its turn end. NeMo Gym does not send such a message back, so the next prompt would
# lack
# tokens that were sampled. The answer is known here, and is put back where it was given.

_NOTHING: dict[str, Any] = {"role": "assistant", "content": ""}


@dataclass(frozen=True, slots=True)
class EmptyTurn:
    """An answer without text or calls.

    Attributes:
        seen: Its prompt plus what was sampled.
        place: Index of the answer: how many messages were in front of it, earlier empty ones put back.
    """

    seen: list[int]
    place: int


def is_empty(message: dict[str, Any]) -> bool:
    """Whether there is nothing in a message that an agent would keep."""
    return not any(message.get(key) for key in ("content", "tool_calls", "reasoning", "reasoning_content"))


def restore(turn: Turn, empty: Sequence[EmptyTurn], histories: Histories) -> None:
    """Put empty turns back into a request that has dropped them.

    Args:
        turn: Changed in place.
        empty: Those of its rollout, oldest first.
        histories: Tells whether the messages in front of each are still those that it answered.
    """
    for answer in empty:
        if answer.place > len(turn.messages):
            return  # another conversation of the same rollout, or a shorter history
        if histories.difference(answer.seen, digest_of(turn, answer.place)) is not None:
            return
        _put_back(turn, answer)


def _put_back(turn: Turn, answer: EmptyTurn) -> None:
    place = answer.place
    is_there = place < len(turn.messages) and turn.messages[place].get("role") == "assistant"
    if is_there and (turn.sampled[place] is not None or not is_empty(turn.messages[place])):
        return
    if not is_there:
        turn.messages.insert(place, dict(_NOTHING))
        turn.sampled.insert(place, None)
        if turn.newest is not None and turn.newest >= place:
            turn.newest += 1
    turn.sampled[place] = b"[]"  # counts as sampled in a digest: its ids do, and they are none that anybody sends
    if turn.newest is None or turn.newest < place:
        turn.newest, turn.seen = place, list(answer.seen)


_MAX_ROLLOUTS = 16_384
_MAX_CANCELLED = 65_536


class DriftCause(StrEnum):
    """Why a prompt does not start with the tokens already seen."""

    RETOKENIZED = "retokenized"
    """The same text in other tokens: nobody put the sampled ids back."""

    RETEMPLATED = "retemplated"
    """The chat template writes a sampled turn differently from how it was sampled (tool call markup, thinking)."""

    HISTORY_REWRITTEN = "history_rewritten"
    """The agent sent other earlier messages, or other tools, than it had sent before."""

    MESSAGE_WITHOUT_IDS = "message_without_ids"
    """The agent sent no token ids with a turn that was sampled."""

    NO_BOUNDARY = "no_boundary"
    """The template does not show where the sampled turn ends; see the text."""


class CallDrift(TypedDict):
    """Why a call was not answered on the exact prompt."""

    cause: DriftCause
    text: str


class CallRecord(TypedDict):
    """One model call of a rollout, as JSON.

    Seconds are null where the server does not measure them (`--enable-per-request-metrics`), tokens from the prefix
    cache where it does not report them (`--enable-prompt-tokens-details`).
    """

    status: int  # HTTP status of the answer
    prompt: Literal["rendered", "exact"]  # by the chat template, or the tokens seen plus what is new
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    finish_reason: str | None
    weight_version: str | None
    seconds: float  # in the middleware, all included
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    drift: CallDrift | None
    error: NotRequired[str]  # the server's words, when the status is not 200


@dataclass(slots=True)
class RolloutCalls:
    """The calls of one rollout.

    Attributes:
        records: Those that were answered, in that order.
        num_first_prompt: Tokens of its first prompt; None before its first answer.
        newest_answer: Key of its newest answer (`Histories.key`).
        empty_turns: Answers without text or calls, oldest first.
        aborts: One event per call that runs; setting it hangs up on the engine.
    """

    records: list[CallRecord] = field(default_factory=list)
    num_first_prompt: int | None = None
    newest_answer: bytes | None = None
    empty_turns: list[EmptyTurn] = field(default_factory=list)
    aborts: list[asyncio.Event] = field(default_factory=list)

    @property
    def has_sampled(self) -> bool:
        return any(record["completion_tokens"] for record in self.records)


class RolloutBook:
    """Who calls, what came of it, and who has been cancelled. Bounded; the oldest rollouts are forgotten first."""

    def __init__(self) -> None:
        self._rollouts: OrderedDict[str, RolloutCalls] = OrderedDict()
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def calls(self, rollout: str) -> RolloutCalls:
        """The calls of a rollout, new or known."""
        calls = self._rollouts.setdefault(rollout, RolloutCalls())
        self._rollouts.move_to_end(rollout)
        if len(self._rollouts) > _MAX_ROLLOUTS:
            self._rollouts.popitem(last=False)
        return calls

    def is_cancelled(self, rollout: str) -> bool:
        return rollout in self._cancelled

    @contextmanager
    def running(self, rollout: str) -> Iterator[asyncio.Event]:
        """While a call of this rollout runs: an event that `cancel` sets."""
        calls, abort = self.calls(rollout), asyncio.Event()
        calls.aborts.append(abort)
        try:
            yield abort
        finally:
            calls.aborts.remove(abort)

    def cancel(self, rollouts: Sequence[str]) -> int:
        """Refuse all later calls of these rollouts and abort those that run. Returns how many ran."""
        aborts = [abort for name in rollouts if name in self._rollouts for abort in self._rollouts[name].aborts]
        for name in rollouts:
            self._cancelled[name] = None
            self._cancelled.move_to_end(name)
        while len(self._cancelled) > _MAX_CANCELLED:
            self._cancelled.popitem(last=False)
        for abort in aborts:
            abort.set()
        return len(aborts)

    def records(self, rollouts: Sequence[str], *, forget: bool) -> dict[str, list[CallRecord]]:
        """Their records; empty for a rollout that has made no call here."""
        records = {name: self._rollouts[name].records if name in self._rollouts else [] for name in rollouts}
        if forget:
            for name in rollouts:
                if name in self._rollouts and not self._rollouts[name].aborts:
                    del self._rollouts[name]
        return records

    def num_running(self, rollouts: Sequence[str]) -> dict[str, int]:
        """How many calls of each rollout are being answered."""
        return {name: len(self._rollouts[name].aborts) if name in self._rollouts else 0 for name in rollouts}


def record_of(
    answer: dict[str, Any] | None,
    *,
    status: int,
    exact: bool,
    seconds: float,
    weight_version: str | None,
    drift: CallDrift | None,
    error: str | None = None,
) -> CallRecord:
    """The record of a call.

    Args:
        answer: The chat completion; None if there is none.
        status: HTTP status that the client got.
        exact: Whether the prompt was forced.
        seconds: From reading the request to having the answer.
        weight_version: That the server held when it answered, where it tells.
        drift: Why the prompt is not exact, if it should have been.
        error: Text of an answer that is an error.
    """
    answer = answer or {}
    usage, metrics = answer.get("usage") or {}, answer.get("metrics") or {}
    record = CallRecord(
        status=status,
        prompt="exact" if exact else "rendered",
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        finish_reason=(answer.get("choices") or [{}])[0].get("finish_reason"),
        weight_version=weight_version,
        seconds=round(seconds, 6),
        queue_s=_seconds(metrics.get("queue_time_ms")),
        prefill_s=_seconds(metrics.get("time_to_first_token_ms")),
        decode_s=_seconds(metrics.get("generation_time_ms")),
        drift=drift,
    )
    if error is not None:
        record["error"] = error
    return record


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds / 1000, 6)
