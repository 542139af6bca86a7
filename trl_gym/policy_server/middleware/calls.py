"""What a policy server knows about the model calls of a rollout: one record per call, and who has been cancelled.

Kept by the middleware in memory, read through `POST /trl_gym/rollouts/records`. Gym hands the messages of an answer on
and drops everything else, so this is how versions, cache hits and seconds reach the trainer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

if TYPE_CHECKING:  # this module is also read by the trainer, which needs nothing of a server's
    from trl_gym.policy_server.empty_turns import EmptyTurn

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
