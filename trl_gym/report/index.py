"""Rows of a journal → which of them count, what is shown, numbers per step and environment. Pure.

A journal holds more than what was trained on: attempts that were tried again, rollouts that were ended early, alone or
with their batch, and, after a resume, steps that were sampled twice. All of it is shown, and counted once.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_gym.report.rows import Row
from trl_gym.rollouts.evaluation import attempt_metrics
from trl_gym.rollouts.journal import Attempt, LineState, line_states
from trl_gym.rollouts.metrics import mean, percentile

_MODES = ("train", "eval", "rollout")
_TRIED_AGAIN = ("train", "eval")  # modes in which a try by other weights of the same version replaces the earlier one
_PREVIEW = 160  # characters of a task in a list
_MIN_SHARED = 12  # characters that the tasks of an environment must begin with alike before they are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Counted rollouts of one step, of one environment or of all."""

    mode: str
    dataset: str
    step: int
    agent: str | None  # the environment; None for all of them
    rollouts: int  # number of counted rollouts
    failures: dict[str, int] = field(default_factory=dict)  # number of failed ones by kind
    # reward, reward_std: Mean and sample standard deviation over those that did not fail; None without any (or, for
    # the deviation, with one).
    reward: float | None = None
    reward_std: float | None = None
    success: float | None = None  # mean over those that did not fail
    # drifted, truncated: Number of rollouts; None where none has tokens, or an answer, to tell.
    drifted: int | None = None
    truncated: int | None = None
    # turns, sampled_tokens: Means over those that did not fail.
    turns: float | None = None
    sampled_tokens: float | None = None
    # seconds_p50, seconds_p95: Percentiles over those that did not fail.
    seconds_p50: float | None = None
    seconds_p95: float | None = None
    # `evaluation.attempt_metrics` outside of training, where tasks have several attempts.
    attempts: dict[str, float] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)  # number of lines that are not counted, by state
    versions: list[str] = field(default_factory=list)  # weight versions, each once


@dataclass(frozen=True, slots=True)
class Cause:
    """Failures with the same words."""

    # kind, where, agent, text: The fields that they share.
    kind: str
    where: str
    agent: str
    text: str
    count: int  # number of lines, attempts that were tried again included
    counted: int  # number of counted rollouts
    example: str  # rollout id of the first


def states(rows: Sequence[Row]) -> list[LineState]:
    """Decide which rows count, `[N]`.

    In training and evaluation, what was sampled later by other weights of the same version supersedes what was there;
    then the rule of `journal.line_states` holds. Where no batch is recorded, two rewards for one rollout are two
    rollouts in training (the same task twice in a step) and one that was repeated elsewhere.

    Args:
        rows: `[N]`, in the order of the journal.
    """
    newest = _newest_samplers(rows)
    found = [LineState.SUPERSEDED] * len(rows)
    current = [index for index, row in enumerate(rows) if _is_of_newest(row, newest)]
    attempts = [
        Attempt((row.mode == "train" and row.batch is None, row.slot), row.failure, row.is_retried)
        for row in (rows[i] for i in current)
    ]
    own = line_states(attempts, lambda rollout: None if rollout[0] else 1)
    for index, state in zip(current, own, strict=True):
        found[index] = state
    return found


def ordered(rows: Sequence[Row]) -> list[int]:
    """Return the indices of the rows in the order in which they are shown: by mode, step, batch, group and member."""

    def place(index: int) -> tuple[Any, ...]:
        row = rows[index]
        mode = _MODES.index(row.mode) if row.mode in _MODES else len(_MODES)
        batch = -1 if row.batch is None else row.batch
        return mode, row.mode, row.dataset, row.step, batch, row.group, row.group_key, row.member, row.attempt, index

    return sorted(range(len(rows)), key=place)


def sample(rows: Sequence[Row], order: Sequence[int], limit: int | None) -> list[int]:
    """Choose at most so many rows: whole groups, the same ones every time.

    Groups are taken by a hash of their key, so every step and environment is there in proportion. A group that
    does not fit any more is left out; if not even one fits, the first members of one are taken.

    Args:
        rows: `[N]`.
        order: The value of `ordered`.
        limit: Number of rows; None for all.

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


def step_stats(rows: Sequence[Row], found: Sequence[LineState]) -> list[StepStats]:
    """Compute the numbers of every step: over all environments, and for each where there are several.

    Args:
        rows: `[N]`.
        found: `[N]`, the value of `states`.
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


def causes(rows: Sequence[Row], found: Sequence[LineState]) -> list[Cause]:
    """Group failures by their words, the most frequent first. A rollout that was ended early has not failed."""
    grouped: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row.failure is not None and found[index] is not LineState.CANCELLED:
            grouped[row.failure, row.where or "", row.agent, row.cause or ""].append(index)
    listed = [
        Cause(*key, len(own), sum(found[i] is LineState.COUNTED for i in own), rows[own[0]].rollout_id)
        for key, own in grouped.items()
    ]
    return sorted(listed, key=lambda cause: -cause.count)


def advantages(rows: Sequence[Row], found: Sequence[LineState]) -> list[float | None]:
    """Compute advantages from rewards, for a run that has not recorded those that it trained with, `[N]`.

    They are `(reward - mean) / (sd + 1e-4)` over the counted members of a group, as `GRPOTrainer` computes them by
    default from one reward function. None outside of training, and for what has no reward or does not count.
    """
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row.mode == "train" and row.reward is not None and found[index] is LineState.COUNTED:
            groups[row.group_key].append(index)
    result: list[float | None] = [None] * len(rows)
    for own in groups.values():
        rewards = [rows[index].reward or 0.0 for index in own]
        center, spread = statistics.fmean(rewards), statistics.stdev(rewards) if len(own) > 1 else 0.0
        for index, reward in zip(own, rewards, strict=True):
            result[index] = (reward - center) / (spread + 1e-4)
    return result


def previews(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """Return what lists show of the tasks, by environment and text: without the beginning that the tasks of an
    environment have in common, up to a word, where it is long."""
    texts: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        texts[row.agent].add(row.text)
    return {
        (agent, text): f"…{rest}"[:_PREVIEW] if start and (rest := text[start:]) else text[:_PREVIEW]
        for agent, own in texts.items()
        for start in [_shared_beginning(own)]
        for text in own
    }


def _shared_beginning(texts: Collection[str]) -> int:
    """Return how many characters the texts begin with alike, up to the end of a word; 0 where that is not much."""
    first, last = min(texts), max(texts)  # what these two share, all share
    end = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    while end and not first[end - 1].isspace():
        end -= 1
    return end if len(texts) > 1 and end >= _MIN_SHARED else 0


def _newest_samplers(rows: Sequence[Row]) -> dict[tuple[str, str, int], tuple[str, str]]:
    newest: dict[tuple[str, str, int], tuple[float, tuple[str, str]]] = {}
    for row in rows:
        key = (row.mode, row.dataset, row.begun)
        if key not in newest or row.time >= newest[key][0]:
            newest[key] = (row.time, row.sampler)
    return {key: sampler for key, (_, sampler) in newest.items()}


def _is_of_newest(row: Row, newest: dict[tuple[str, str, int], tuple[str, str]]) -> bool:
    return row.mode not in _TRIED_AGAIN or newest[row.mode, row.dataset, row.begun] == row.sampler


def _attempts(rows: Sequence[Row], good: Sequence[Row]) -> dict[str, float]:
    num_asked = 1 + max(row.member for row in rows)
    if num_asked == 1:
        return {}
    tasks: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in good:
        # In a training, a task that a dataset has twice is two; `trl-gym eval` may find its rows in another order.
        place = row.group if row.sampler[0] else None
        if row.success is not None:
            tasks[row.agent, place, row.task].append(row.success)
    return attempt_metrics(tasks.values(), num_asked)


def _stats(key: tuple[Any, ...], rows: Sequence[Row], found: Sequence[LineState]) -> StepStats:
    mode, dataset, step, agent = key
    counted = [row for row, state in zip(rows, found, strict=True) if state is LineState.COUNTED]
    good = [row for row in counted if row.failure is None]
    rewards = [row.reward for row in good if row.reward is not None]
    seconds = [row.seconds for row in good if row.seconds is not None]
    return StepStats(
        mode=mode,
        dataset=dataset,
        step=step,
        agent=agent,
        rollouts=len(counted),
        failures=dict(Counter(row.failure for row in counted if row.failure is not None)),
        reward=mean(rewards),
        reward_std=statistics.stdev(rewards) if len(rewards) > 1 else None,
        success=mean(row.success for row in good),
        drifted=sum(row.drift is not None for row in counted) if any(row.rows for row in counted) else None,
        truncated=sum(row.is_truncated for row in counted) if any(row.finish for row in counted) else None,
        turns=mean(row.turns for row in good),
        sampled_tokens=mean(row.sampled_tokens for row in good),
        seconds_p50=percentile(seconds, 50),
        seconds_p95=percentile(seconds, 95),
        attempts=_attempts(rows, good) if mode != "train" else {},
        others=dict(Counter(str(state) for state in found if state is not LineState.COUNTED)),
        versions=list(dict.fromkeys(row.version for row in counted)),
    )
