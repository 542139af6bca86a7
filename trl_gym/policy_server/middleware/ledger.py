"""Keep what the server knows about the model calls of rollouts: records, cancelled rollouts, histories, empty turns.

Gym passes on the messages of an answer and drops the rest. Versions, cache hits and seconds reach the trainer through
the records (`POST /trl_gym/rollouts/records`).

Token ids say what the policy saw, messages say what the agent means it to see. An agent that compacts or edits its
history still sends the newest answer with its ids, and putting them back would silently undo the edit. `Histories`
therefore keeps a digest of the messages in front of every answer, under the tokens that the answer made.

A policy may sample nothing but its turn end. Gym does not send such a message back, so the next prompt would lack
sampled tokens: `restore` puts these empty turns back.
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

from trl_gym.policy_server.middleware.http import Reply
from trl_gym.policy_server.middleware.turn import Turn

_MAX_ANSWERS = 65_536  # about 200 bytes each
_MAX_ROLLOUTS = 16_384
_MAX_CANCELLED = 65_536
_NOTHING: dict[str, Any] = {"role": "assistant", "content": ""}


class DriftCause(StrEnum):
    """Cause of a prompt that does not start with the tokens already seen."""

    RETOKENIZED = "retokenized"
    """The same text in other tokens: the sampled ids were not put back."""

    RETEMPLATED = "retemplated"
    """The chat template writes a sampled turn differently from how it was sampled (tool call markup, thinking)."""

    HISTORY_REWRITTEN = "history_rewritten"
    """The agent sent other earlier messages, or other tools, than it had sent before."""

    MESSAGE_WITHOUT_IDS = "message_without_ids"
    """The agent sent no token ids with a turn that was sampled."""

    NO_BOUNDARY = "no_boundary"
    """The template does not show where the sampled turn ends; see the text."""


class CallDrift(TypedDict):
    """The cause why a call was not answered on the exact prompt."""

    cause: DriftCause
    text: str


class CallRecord(TypedDict):
    """One model call of a rollout, as JSON.

    Seconds are null if the server does not measure them (`--enable-per-request-metrics`), tokens from the prefix cache
    if it does not report them (`--enable-prompt-tokens-details`).
    """

    status: int  # HTTP status of the answer
    prompt: Literal["rendered", "exact"]  # by the chat template, or as the tokens seen plus what is new
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    finish_reason: str | None
    weight_version: str | None
    seconds: float  # in the middleware, in total
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    drift: CallDrift | None
    error: NotRequired[str]  # the server's words, when the status is not 200


@dataclass(frozen=True, slots=True)
class EmptyTurn:
    """An answer without text or calls."""

    seen: list[int]  # its prompt plus the sampled tokens
    place: int  # its index among the messages, with earlier empty turns in place


@dataclass(slots=True)
class RolloutCalls:
    """The calls of one rollout."""

    records: list[CallRecord] = field(default_factory=list)  # records of answered calls, in the order of their answers
    num_first_prompt: int | None = None  # tokens of the first prompt; None before the first answer
    newest_answer: bytes | None = None  # key of the newest answer (`Histories.key`)
    empty_turns: list[EmptyTurn] = field(default_factory=list)  # answers without text or calls, oldest first
    # One event per running call; setting it hangs up on the engine.
    aborts: list[asyncio.Event] = field(default_factory=list)

    @property
    def has_sampled(self) -> bool:
        return any(record["completion_tokens"] for record in self.records)


class RolloutBook:
    """Calls by rollout, and cancelled rollouts. Bounded: the oldest rollouts are dropped first."""

    def __init__(self) -> None:
        self._rollouts: OrderedDict[str, RolloutCalls] = OrderedDict()
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def calls(self, rollout: str) -> RolloutCalls:
        """Return the calls of a rollout, known or new."""
        calls = self._rollouts.setdefault(rollout, RolloutCalls())
        self._rollouts.move_to_end(rollout)
        if len(self._rollouts) > _MAX_ROLLOUTS:
            self._rollouts.popitem(last=False)
        return calls

    def is_cancelled(self, rollout: str) -> bool:
        return rollout in self._cancelled

    @contextmanager
    def running(self, rollout: str) -> Iterator[asyncio.Event]:
        """Register a running call of this rollout; yields an event that `cancel` sets."""
        calls, abort = self.calls(rollout), asyncio.Event()
        calls.aborts.append(abort)
        try:
            yield abort
        finally:
            calls.aborts.remove(abort)

    def cancel(self, rollouts: Sequence[str]) -> int:
        """Refuse all later calls of these rollouts and abort running ones. Returns how many were running."""
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
        """Return the records of each rollout; empty for one that has made no call here."""
        records = {name: self._rollouts[name].records if name in self._rollouts else [] for name in rollouts}
        if forget:
            for name in rollouts:
                if name in self._rollouts and not self._rollouts[name].aborts:
                    del self._rollouts[name]
        return records

    def num_running(self, rollouts: Sequence[str]) -> dict[str, int]:
        """Return how many calls of each rollout are being answered."""
        return {name: len(self._rollouts[name].aborts) if name in self._rollouts else 0 for name in rollouts}


def record_of(
    reply: Reply, answer: dict[str, Any] | None, *, exact: bool, seconds: float, drift: CallDrift | None
) -> CallRecord:
    """Make the record of a call: its reply, the chat completion in it (None after an error), whether the prompt was
    forced, the seconds that it took, and the cause why the prompt is not exact, if it should have been."""
    answer = answer or {}
    usage, metrics = answer.get("usage") or {}, answer.get("metrics") or {}
    record = CallRecord(
        status=reply.status,
        prompt="exact" if exact else "rendered",
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        finish_reason=(answer.get("choices") or [{}])[0].get("finish_reason"),
        weight_version=answer.get("weight_version"),
        seconds=round(seconds, 6),
        queue_s=_seconds(metrics.get("queue_time_ms")),
        prefill_s=_seconds(metrics.get("time_to_first_token_ms")),
        decode_s=_seconds(metrics.get("generation_time_ms")),
        drift=drift,
    )
    if not reply.ok:
        record["error"] = reply.error_text()
    return record


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds / 1000, 6)


@dataclass(frozen=True, slots=True)
class Digest:
    """Hashes of the request of a model call."""

    messages: bytes  # hash of all messages
    before_answer: bytes  # hash without assistant messages at the end: agents merge what they get into the last one
    tools: bytes  # hash of tools and template options


class Histories:
    """Digests of the newest answers of a server, to any client."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, Digest] = OrderedDict()

    @staticmethod
    def key(seen: Sequence[int]) -> bytes:
        """Return the key of an answer: a hash of its prompt plus the sampled tokens."""
        return hashlib.blake2b(array("q", seen).tobytes(), digest_size=16).digest()

    def remember(self, seen: Sequence[int], digest: Digest) -> bytes:
        """Keep the digest of an answer's request; `seen` is prompt plus sampled tokens. Returns the answer's key."""
        key = self.key(seen)
        self._digests[key] = digest
        if len(self._digests) > _MAX_ANSWERS:
            self._digests.popitem(last=False)
        return key

    def difference(self, seen: Sequence[int], before: Digest) -> str | None:
        """Tell what the agent has changed in the request that led to the answer with these tokens.

        Args:
            seen: The newest answer's prompt plus the sampled tokens.
            before: Digest of the messages in front of that answer, as the agent sends them now.

        Returns:
            One sentence, or None if nothing changed or the answer is unknown (another server gave it).
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
    """Return the digest of messages as an agent means them.

    Args:
        messages: Messages without token ids.
        sampled: Sampled ids of each message as JSON, or None; if given they count instead of the text.
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
    """Return the digest of a request's first `end` messages and of its render options."""
    return digest(turn.messages[:end], turn.sampled[:end], turn.options_key)


def _meaning(message: dict[str, Any]) -> Iterable[Any]:
    """Yield role, text and calls, but not thinking, which agents drop, nor the form of the message."""
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


def is_empty(message: dict[str, Any]) -> bool:
    """Tell whether a message holds nothing that an agent would keep."""
    return not any(message.get(key) for key in ("content", "tool_calls", "reasoning", "reasoning_content"))


def restore(turn: Turn, empty: Sequence[EmptyTurn], histories: Histories) -> None:
    """Put empty turns back into a request that has dropped them.

    Args:
        turn: The request; changed in place.
        empty: The empty turns of its rollout, oldest first.
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
    turn.sampled[place] = b"[]"  # counts as sampled in a digest; no client sends these ids
    if turn.newest is None or turn.newest < place:
        turn.newest, turn.seen = place, list(answer.seen)
