"""Rows of a journal → which of them count, what is shown, numbers per step and environment. Pure.

A journal holds more than what was trained on: attempts that were tried again, rollouts of a batch that was given up,
and, after a resume, steps that were sampled twice. All of it is shown, and counted once:

    counted      the last word about a rollout
    retried      an attempt that failed and was followed by another
    cancelled    given up with its batch
    superseded   of a step that was sampled again by other weights, or a failure that a later run made good
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from trl_gym.report.rows import Row

_MODES = ("train", "eval", "rollout")
_TRIED_AGAIN = ("train", "eval")  # modes in which a step that is sampled again replaces the earlier try


class State(StrEnum):
    """What a line of the journal is in the story of its run."""

    COUNTED = "counted"
    RETRIED = "retried"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Counted rollouts of one step, of one environment or of all.

    Attributes:
        mode, dataset, step: Which step.
        agent: The environment; None for all of them.
        rollouts: How many are counted.
        failures: Of these, by kind.
        reward, reward_std: Mean and sample standard deviation over those that did not fail; None without any (or, for
            the deviation, with one).
        success: Mean.
        drifted, truncated: How many.
        turns, sampled_tokens: Means over those that did not fail.
        seconds_p50, seconds_p95: Of those that did not fail.
        others: Lines that are not counted, by state.
        versions: Weight versions, each once.
    """

    mode: str
    dataset: str
    step: int
    agent: str | None
    rollouts: int
    failures: dict[str, int] = field(default_factory=dict)
    reward: float | None = None
    reward_std: float | None = None
    success: float | None = None
    drifted: int = 0
    truncated: int = 0
    turns: float | None = None
    sampled_tokens: float | None = None
    seconds_p50: float | None = None
    seconds_p95: float | None = None
    others: dict[str, int] = field(default_factory=dict)
    versions: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cause:
    """Failures with the same words.

    Attributes:
        kind, where, agent, text: What they share.
        count: Of all lines, also of attempts that were tried again.
        counted: Of counted rollouts.
        example: Rollout id of the first.
    """

    kind: str
    where: str
    agent: str
    text: str
    count: int
    counted: int
    example: str


def states(rows: Sequence[Row]) -> list[State]:
    """What each row is, `[N]`.

    Args:
        rows: `[N]`, in the order of the journal.
    """
    newest = _newest_samplers(rows)
    found = [_own_state(row, newest) for row in rows]
    kept: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(rows):
        if found[index] is not State.COUNTED:
            continue
        before = kept.get(row.slot)
        if before is None:
            kept[row.slot] = index
        elif row.reward is None and rows[before].reward is not None:
            found[index] = State.SUPERSEDED
        elif rows[before].reward is None or row.mode != "train":
            found[before] = State.SUPERSEDED
            kept[row.slot] = index
        # Two rewards in training: the same task twice in a step, since what has a reward is never collected again.
    return found


def ordered(rows: Sequence[Row]) -> list[int]:
    """Indices of the rows in the order in which they are shown: by mode, step and group; members side by side."""

    def place(index: int) -> tuple[Any, ...]:
        row = rows[index]
        mode = _MODES.index(row.mode) if row.mode in _MODES else len(_MODES)
        return mode, row.mode, row.dataset, row.step, row.group, row.group_key, row.member, row.attempt, index

    return sorted(range(len(rows)), key=place)


def sample(rows: Sequence[Row], order: Sequence[int], limit: int | None) -> list[int]:
    """At most so many rows, whole groups, the same ones every time.

    Groups are taken by a hash of what names them, so every step and environment is there in proportion. A group that
    does not fit any more is left out; if not even one fits, the first members of one are taken.

    Args:
        rows: `[N]`.
        order: From `ordered`.
        limit: None for all.

    Returns:
        Indices, in `order`.
    """
    if limit is None or len(order) <= limit:
        return list(order)
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index in order:
        groups[rows[index].group_key].append(index)
    by_hash = sorted(groups, key=lambda key: hashlib.sha256(repr(key).encode()).digest())
    chosen: set[int] = set()
    for key in by_hash:
        if len(chosen) + len(groups[key]) <= limit:
            chosen.update(groups[key])
    if not chosen:
        chosen.update(groups[by_hash[0]][:limit])
    return [index for index in order if index in chosen]


def step_stats(rows: Sequence[Row], found: Sequence[State]) -> list[StepStats]:
    """The numbers of every step: over all environments, and for each where there are several.

    Args:
        rows: `[N]`.
        found: `[N]`, from `states`.
    """
    agents = {row.agent for row in rows}
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index in ordered(rows):
        row = rows[index]
        groups[row.mode, row.dataset, row.step, None].append(index)
        if len(agents) > 1:
            groups[row.mode, row.dataset, row.step, row.agent].append(index)
    return [
        _stats(key, [rows[index] for index in own], [found[index] for index in own]) for key, own in groups.items()
    ]


def causes(rows: Sequence[Row], found: Sequence[State]) -> list[Cause]:
    """Failures by their words, the most frequent first."""
    grouped: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row.failure is not None:
            grouped[row.failure, row.where or "", row.agent, row.cause or ""].append(index)
    listed = [
        Cause(*key, len(own), sum(found[i] is State.COUNTED for i in own), rows[own[0]].rollout_id)
        for key, own in grouped.items()
    ]
    return sorted(listed, key=lambda cause: -cause.count)


def _newest_samplers(rows: Sequence[Row]) -> dict[tuple[str, str, int], tuple[str, str]]:
    newest: dict[tuple[str, str, int], tuple[float, tuple[str, str]]] = {}
    for row in rows:
        key = (row.mode, row.dataset, row.step)
        if key not in newest or row.time >= newest[key][0]:
            newest[key] = (row.time, row.sampler)
    return {key: sampler for key, (_, sampler) in newest.items()}


def _own_state(row: Row, newest: dict[tuple[str, str, int], tuple[str, str]]) -> State:
    if row.mode in _TRIED_AGAIN and newest[row.mode, row.dataset, row.step] != row.sampler:
        return State.SUPERSEDED
    if row.is_cancelled:
        return State.CANCELLED
    return State.RETRIED if row.is_retried else State.COUNTED


def _stats(key: tuple[Any, ...], rows: Sequence[Row], found: Sequence[State]) -> StepStats:
    mode, dataset, step, agent = key
    counted = [row for row, state in zip(rows, found, strict=True) if state is State.COUNTED]
    good = [row for row in counted if row.failure is None]
    rewards = [row.reward for row in good if row.reward is not None]
    p50, p95 = _percentiles([row.seconds for row in good if row.seconds is not None])
    return StepStats(
        mode=mode,
        dataset=dataset,
        step=step,
        agent=agent,
        rollouts=len(counted),
        failures=dict(Counter(row.failure for row in counted if row.failure is not None)),
        reward=_mean(rewards),
        reward_std=statistics.stdev(rewards) if len(rewards) > 1 else None,
        success=_mean(row.success for row in good),
        drifted=sum(row.drift is not None for row in counted),
        truncated=sum(row.is_truncated for row in counted),
        turns=_mean(row.turns for row in good),
        sampled_tokens=_mean(row.sampled_tokens for row in good),
        seconds_p50=p50,
        seconds_p95=p95,
        others=dict(Counter(str(state) for state in found if state is not State.COUNTED)),
        versions=list(dict.fromkeys(row.version for row in counted)),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """50 % and 95 %, by linear interpolation between closest ranks, as NumPy's default."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]
