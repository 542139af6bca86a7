"""What a person is told about rollouts that go on: how far a batch is, which one is slowest, what a stalled one waits
for. Pure: states in, sentences out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from trl_gym.rollouts.call_records import CallState

_MAX_LISTED = 16  # outstanding rollouts; more are grouped


class Phase(StrEnum):
    """Where a rollout is that has not ended."""

    WAITING = "waiting"  # for a place
    RUNNING = "running"  # sent to its agent
    PAUSED = "paused"  # before another attempt
    SETTLING = "settling"  # ended; records and journal


@dataclass(frozen=True, slots=True)
class Outstanding:
    """One rollout that has not ended.

    Attributes:
        agent: Name of its agent.
        rollout_id: Of the current attempt.
        attempt: 0 for the first try.
        phase: Where it is.
        since: When that phase began, on the clock of whoever asks; seconds.
    """

    agent: str
    rollout_id: str
    attempt: int
    phase: Phase
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionStatus:
    """How far a collection is.

    Attributes:
        num_done: Rollouts that have ended, failed ones included.
        num_failed: Those without a reward.
        num_running: Sent to their agents and not answered.
        num_retried: Attempts that failed and were, or will be, followed by another.
        num_total: Rollouts asked for.
        slowest: Agent and seconds of the rollout that has been running longest; None when none runs.
    """

    num_done: int
    num_failed: int
    num_running: int
    num_retried: int
    num_total: int
    slowest: tuple[str, float] | None = None

    def __str__(self) -> str:
        parts = [f"{self.num_done}/{self.num_total}"]
        counts = (("failed", self.num_failed), ("retried", self.num_retried), ("running", self.num_running))
        parts += [f"{number} {name}" for name, number in counts if number]
        if self.slowest is not None:
            parts.append(f"slowest {self.slowest[0]} {self.slowest[1]:.0f} s")
        return ", ".join(parts)


def waits_for(one: Outstanding, call: CallState | None) -> str:
    """What an outstanding rollout waits for, in a few words.

    Args:
        one: The rollout.
        call: What the policy server says of its model calls; None when it says nothing.
    """
    if one.phase is Phase.WAITING:
        return "not dispatched (cap)"
    if one.phase is Phase.PAUSED:
        return "pause before another attempt"
    if one.phase is Phase.SETTLING:
        return "records of its model calls (policy server)"
    if call is None or call.num_running is None:
        return f"{one.agent} (what it does is not known: the policy server does not say)"
    if call.num_running:
        return "model call (policy server)"
    if call.num_answered:
        return f"tool or verifier of {one.agent}"
    return f"tool or verifier of {one.agent} (no model call yet)"


def describe_stall(
    outstanding: Sequence[Outstanding], calls: Mapping[str, CallState], *, now: float, silent_s: float
) -> str:
    """A warning that lists every outstanding rollout, grouped by agent and cause when there are many.

    Args:
        outstanding: All that have not ended, longest first.
        calls: By rollout id, as far as the policy server has answered.
        now: On the clock of `Outstanding.since`.
        silent_s: Seconds since a rollout has ended.
    """
    waits = [(one, waits_for(one, calls.get(one.rollout_id)), now - one.since) for one in outstanding]
    lines = [
        f"  {one.rollout_id} ({one.agent}, {seconds:.0f} s, attempt {one.attempt}): {what}"
        for one, what, seconds in waits
    ]
    if len(lines) > _MAX_LISTED:
        groups: defaultdict[tuple[str, str], list[tuple[Outstanding, float]]] = defaultdict(list)
        for one, what, seconds in waits:
            groups[one.agent, what].append((one, seconds))
        lines = [_group_line(agent, what, members) for (agent, what), members in groups.items()]
    head = f"No rollout has ended for {silent_s:.0f} s; {len(outstanding)} are outstanding:"
    return "\n".join([head, *lines])


def _group_line(agent: str, what: str, members: Sequence[tuple[Outstanding, float]]) -> str:
    oldest, seconds = max(members, key=lambda member: member[1])
    attempts = sorted({one.attempt for one, _ in members})
    tried = f"attempt {attempts[0]}" if len(attempts) == 1 else f"attempts {attempts[0]} to {attempts[-1]}"
    return f"  {len(members)} of {agent}, {tried}: {what}; longest {oldest.rollout_id}, {seconds:.0f} s"


class Tally:
    """The counts of one collection, and who is outstanding.

    Args:
        num_total: Rollouts asked for.

    Attributes:
        outstanding: By the rollout's place among the requests.
        running: Those of them that are with their agents, longest first.
    """

    def __init__(self, num_total: int) -> None:
        self.num_total = num_total
        self.num_done = self.num_failed = self.num_retried = 0
        self.outstanding: dict[int, Outstanding] = {}
        self.running: dict[int, Outstanding] = {}

    def enter(self, index: int, one: Outstanding) -> None:
        """A rollout begins a phase."""
        self.outstanding[index] = one
        self.running.pop(index, None)
        if one.phase is Phase.RUNNING:
            self.running[index] = one

    def leave(self, index: int) -> None:
        """An attempt has ended; whether another follows, its end decides."""
        self.outstanding.pop(index, None)
        self.running.pop(index, None)

    def status(self, now: float) -> CollectionStatus:
        oldest = next(iter(self.running.values()), None)
        return CollectionStatus(
            num_done=self.num_done,
            num_failed=self.num_failed,
            num_running=len(self.running),
            num_retried=self.num_retried,
            num_total=self.num_total,
            slowest=None if oldest is None else (oldest.agent, now - oldest.since),
        )
