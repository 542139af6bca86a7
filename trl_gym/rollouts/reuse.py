"""Rollouts that an interrupted run has finished already: found in its journal, not collected again.

    interrupted run    step 6 ── trained ── checkpoint ── step 7: 20 of 64 rollouts in the journal ── killed
    resumed run                  weights of the checkpoint ── step 7: those 20 are recalled, 44 are collected

A recorded rollout stands in for a request only if nothing can tell the two apart: same run, same step, same task,
group and member, same request (row, agent, sampling, budget, template arguments), sampled by the same weights. Weights
are compared by fingerprint, not by the number of their version: what was trained after the checkpoint is trained
again, and only where that gives the same weights, bit for bit, do rollouts of later steps count as well.

A rollout that failed is not recalled but tried again. Evaluation is not recalled either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trl_gym.rollouts.identity import request_hash, task_hash
from trl_gym.rollouts.journal import Line, journal_files, read_line, read_lines, step_of
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout, from_record


class Collector(Protocol):
    """Many requests → many rollouts: live, recalled or replayed."""

    def collect(
        self, requests: Sequence[RolloutRequest], finish: Callable[[Any], Rollout], progress: Any = None
    ) -> list[Rollout]:
        """One rollout per request, in their order."""

    def close(self) -> None:
        """Give up what still runs. Idempotent."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What samples a generation batch.

    Attributes:
        run: The training run; a resumed one continues that of its checkpoint.
        step: Optimizer steps that went into the weights.
        weights: Their fingerprint.
    """

    run: str
    step: int
    weights: str

    def tags(self) -> dict[str, str]:
        """What is added to the journal's lines."""
        return {"run": self.run, "weights": self.weights}


_Key = tuple[str, str, int, int]

logger = logging.getLogger(__name__)


class Recall:
    """Finds the rollouts of an interrupted run.

    Args:
        folder: The run's journal. The files of all ranks are read: the interrupted run may have had another number
            of them.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._last_step = max((step_of(path) for path in journal_files(folder, mode="train")), default=-1)
        self._policy: Policy | None = None
        self._found: dict[_Key, list[Line]] = {}

    def take_all(self, requests: Sequence[RolloutRequest], policy: Policy) -> dict[int, Rollout]:
        """The recorded rollouts for a batch of requests, by index. None is given out twice.

        Raises:
            ValueError: A line of the journal is not JSON.
        """
        if policy.step > self._last_step:  # the interrupted run did not get there
            return {}
        if policy != self._policy:
            self._policy = policy
            self._found, num_others = _usable(read_lines(self._folder, mode="train", step=policy.step), policy)
            if num_others:
                logger.warning(
                    "%d recorded rollouts of step %d were sampled by other weights than those of now, and are not "
                    "used: training again from the checkpoint has not given the same bits",
                    num_others,
                    policy.step,
                )
        taken = {index: rollout for index, request in enumerate(requests) if (rollout := self._take(request))}
        if taken:
            logger.info("step %d: %d of %d rollouts are in the journal", policy.step, len(taken), len(requests))
        return taken

    def _take(self, request: RolloutRequest) -> Rollout | None:
        lines = self._found.get(_key(request))
        if not lines:
            return None
        line = lines.pop()
        return from_record(read_line(line.path, line.offset, line.length), request)


def _key(request: RolloutRequest) -> _Key:
    return task_hash(request.row), request_hash(request.row), request.group, request.member


def collect_missing(
    collector: Collector,
    requests: Sequence[RolloutRequest],
    policy: Policy,
    recall: Recall | None,
    finish: Callable[[Any], Rollout],
    progress: Any = None,
) -> list[Rollout]:
    """Recall what was finished before, and collect the rest.

    Args:
        collector: Collects.
        requests: `[B]`.
        policy: What samples them.
        recall: Finds what an interrupted run has finished; None for a run that was not resumed.
        finish: See `Collector.collect`; called for those that are collected.
        progress: Counts those that are collected.

    Returns:
        `[B]`, in the order of the requests.
    """
    recalled = recall.take_all(requests, policy) if recall is not None else {}
    missing = [index for index in range(len(requests)) if index not in recalled]
    # Also when nothing is missing on this rank: the collector may have something to agree on with other ranks.
    collected = collector.collect([requests[index] for index in missing], finish, progress)
    recalled |= dict(zip(missing, collected, strict=True))
    return [recalled[index] for index in range(len(requests))]


def _usable(lines: Iterable[Line], policy: Policy) -> tuple[dict[_Key, list[Line]], int]:
    """The lines that a policy has sampled, without their contents, and how many of its run and step others have."""
    found: dict[_Key, list[Line]] = {}
    num_outdated = 0
    for line in lines:
        record = line.record
        if record.get("run") != policy.run or record["failure"] is not None:
            continue
        if record.get("weights") != policy.weights or record["weight_versions"] != [str(policy.step)]:
            num_outdated += 1
            continue
        key = (record["task_hash"], record["request_hash"], record["group"], record["member"])
        found.setdefault(key, []).append(Line(line.path, line.offset, line.length, {}))
    return found, num_outdated
