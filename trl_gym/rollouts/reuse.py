"""Rollouts that need not be sampled again after a run was interrupted.

`Recall` finds in the journal what the interrupted run has finished:

    interrupted run    step 6 ── trained ── checkpoint ── step 7: 20 of 64 rollouts in the journal ── killed
    resumed run                  weights of the checkpoint ── step 7: those 20 are recalled, 44 are collected

A recorded rollout stands in for a request only if nothing can tell the two apart: same run, same step, same task,
group and member, same request (row, agent, sampling, budget, template arguments), begun with the same weights and not
continued with any that the resumed run has not had. Weights are compared by fingerprint, not by the number of their
version: what was trained after the checkpoint is trained again, and only where that gives the same weights, bit for
bit, do rollouts of later steps count as well. A rollout that failed is not recalled but tried again. Evaluation is not
recalled either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_gym.rollouts.journal import Attempt, Line, journal_files, read_line, read_lines, step_of
from trl_gym.rollouts.request import RolloutRequest, request_hash, task_hash
from trl_gym.rollouts.rollout import Rollout, from_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy that samples a generation batch."""

    run: str  # id of the training run; a resumed run continues that of its checkpoint
    step: int  # optimizer steps that went into the weights
    weights: str  # fingerprint of the weights

    def tags(self) -> dict[str, str]:
        """Return the fields that are added to the journal's lines."""
        return {"run": self.run, "weights": self.weights}


_Key = tuple[Any, ...]


class Recall:
    """Finds the rollouts of an interrupted run.

    Args:
        folder: The run's journal. The files of all ranks are read: the interrupted run may have had more or fewer.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._last_step = max((step_of(path) for path in journal_files(folder, mode="train")), default=-1)
        self._found: dict[Policy, dict[_Key, list[Line]]] = {}  # what is not given out yet

    def take_all(self, requests: Sequence[RolloutRequest], policy: Policy, *, newest: int) -> dict[int, Rollout]:
        """Return the recorded rollouts for some requests, by index. Each is given out once.

        Args:
            requests: What is asked for.
            policy: The policy that they began with.
            newest: Optimizer step of the newest weights that may have continued them.

        Raises:
            ConfigError: A line of the journal cannot be read.
        """
        if policy.step > self._last_step:  # the interrupted run did not get there
            return {}
        if policy not in self._found:
            lines = read_lines(self._folder, mode="train", step=policy.step)
            self._found[policy], num_others = _usable(lines, policy, newest)
            if num_others:
                logger.warning(
                    "%d recorded rollouts of step %d were sampled by other weights than the current ones and are not "
                    "used: training again from the checkpoint has not given the same bits",
                    num_others,
                    policy.step,
                )
        found = self._found[policy]
        taken = {index: rollout for index, request in enumerate(requests) if (rollout := _take(found, request))}
        if taken:
            logger.info("step %d: %d of %d rollouts are in the journal", policy.step, len(taken), len(requests))
        return taken


def _take(found: dict[_Key, list[Line]], request: RolloutRequest) -> Rollout | None:
    task, whole, batch, *place = _key(request)
    # Earlier versions recorded no batch: then all batches of one step's weights were told apart by their tasks.
    lines = found.get((task, whole, batch, *place)) or found.get((task, whole, None, *place))
    if not lines:
        return None
    line = lines.pop()
    return from_record(read_line(line.path, line.offset, line.length), request)


def _key(request: RolloutRequest) -> _Key:
    return task_hash(request.row), request_hash(request.row), request.batch, request.group, request.member


def _usable(lines: Iterable[Line], policy: Policy, newest: int) -> tuple[dict[_Key, list[Line]], int]:
    """Return the lines that a policy has begun, without their contents, and the number that other weights have."""
    found: dict[_Key, list[Line]] = {}
    ours = {str(step) for step in range(policy.step, newest + 1)}
    num_outdated = 0
    for line in lines:
        record = line.record
        if record.get("run") != policy.run or not Attempt.of(record).has_reward:
            continue
        if record.get("weights") != policy.weights or not ours.issuperset(record.get("weight_versions") or ["?"]):
            num_outdated += 1
            continue
        key = tuple(record.get(name) for name in ("task_hash", "request_hash", "batch", "group", "member"))
        found.setdefault(key, []).append(Line(line.path, line.offset, line.length, {}))
    return found, num_outdated
