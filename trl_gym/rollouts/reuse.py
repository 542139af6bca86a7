"""Rollouts that need not be sampled again after a run was interrupted.

`Recall` finds in the journal what the interrupted run has finished:

    interrupted run    step 6 ── trained ── checkpoint ── step 7: 20 of 64 rollouts in the journal ── killed
    resumed run                  weights of the checkpoint ── step 7: those 20 are recalled, 44 are collected

A recorded rollout stands in for a request only if nothing can tell the two apart: same run, same batch, same task,
group and member, same request (row, agent, sampling, budget, template arguments), begun with the same weights and not
continued with any that the resumed run has not had. Weights are compared by fingerprint, not by the number of their
version alone: what was trained after the checkpoint is trained again, and only where that gives the same weights, bit
for bit, do rollouts of later steps count as well. A rollout that failed is not recalled but tried again. Evaluation is
not recalled either.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_gym.rollouts.journal import Attempt, Line, lines_of, read_line, training_files
from trl_gym.rollouts.request import RolloutRequest, request_hash, task_hash
from trl_gym.rollouts.rollout import Rollout, from_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy that samples a generation batch."""

    run: str  # id of the training run; a resumed run continues that of its checkpoint
    version: int  # of the weights: the optimizer steps that went into them
    weights: str  # fingerprint of the weights

    def tags(self) -> dict[str, Any]:
        """Return the fields that are added to the journal's lines."""
        return {"run": self.run, "version": self.version, "weights": self.weights}

    def staleness(self, step: int) -> int:
        """Return how many optimizer steps are made between these weights and a step, which is counted from 1."""
        return step - 1 - self.version


_Key = tuple[Any, ...]


class Recall:
    """Finds the rollouts of an interrupted run.

    Args:
        folder: The run's journal. The files of all ranks are read: the interrupted run may have had more or fewer.
    """

    def __init__(self, folder: str | Path) -> None:
        self._files = training_files(folder)  # what is written from now on is this run's own, and in other files
        self._newest: dict[Policy, int] = {}
        self._found: dict[tuple[Policy, int], dict[_Key, list[Line]]] = {}  # by step; what is not given out yet

    def take_all(self, requests: Sequence[RolloutRequest], policy: Policy, *, newest: int) -> dict[int, Rollout]:
        """Return the recorded rollouts for some requests, by index. Each is given out once.

        Args:
            policy: The policy that they began with.
            newest: Newest version of the weights that may have continued them.

        Raises:
            ConfigError: A line of the journal cannot be read.
        """
        taken = {
            index: line for index, request in enumerate(requests) if (line := self._take(request, policy, newest))
        }
        if taken:
            logger.info("step %d: %d of %d rollouts are in the journal", requests[0].step, len(taken), len(requests))
        return {
            index: from_record(read_line(line.path, line.offset, line.length), requests[index])
            for index, line in taken.items()
        }

    def _take(self, request: RolloutRequest, policy: Policy, newest: int) -> Line | None:
        # Earlier versions recorded the step after that of the weights, whatever batch a rollout was for. And no batch:
        # then all batches of one step's weights were told apart by their tasks.
        steps = [step for step in {request.step, policy.version + 1} if step in self._files]
        if not steps:  # the interrupted run did not get there
            return None
        task, whole, batch, *place = _key(request)
        for step in steps:
            found = self._usable(step, policy, newest)
            if lines := found.get((task, whole, batch, *place)) or found.get((task, whole, None, *place)):
                return lines.pop()
        return None

    def _usable(self, step: int, policy: Policy, newest: int) -> dict[_Key, list[Line]]:
        """Return the lines of a step that a policy has begun, without their contents."""
        if (found := self._found.get((policy, step))) is not None:
            return found
        found = self._found[policy, step] = {}
        ours = {str(version) for version in range(policy.version, self._newest.setdefault(policy, newest) + 1)}
        num_others = 0
        for line in (line for path in self._files[step] for line in lines_of(path)):
            record = line.record
            if (record.get("run"), record.get("version")) != (policy.run, policy.version):
                continue
            if not Attempt.of(record).has_reward:
                continue
            if record.get("weights") != policy.weights or not ours.issuperset(record.get("weight_versions") or ["?"]):
                num_others += 1
                continue
            key = tuple(record.get(name) for name in ("task_hash", "request_hash", "batch", "group", "member"))
            found.setdefault(key, []).append(Line(line.path, line.offset, line.length, {}))
        if num_others:
            logger.warning(
                "%d recorded rollouts of step %d were sampled by other weights than the current ones and are not "
                "used: training again from the checkpoint has not given the same bits",
                num_others,
                step,
            )
        return found


def _key(request: RolloutRequest) -> _Key:
    return task_hash(request.row), request_hash(request.row), request.batch, request.group, request.member
