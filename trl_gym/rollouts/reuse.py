"""Rollouts that need not be sampled again: after a run was interrupted, and after the policy server was lost.

`Recall` finds in the journal what an interrupted run has finished:

    interrupted run    step 6 ── trained ── checkpoint ── step 7: 20 of 64 rollouts in the journal ── killed
    resumed run                  weights of the checkpoint ── step 7: those 20 are recalled, 44 are collected

A recorded rollout stands in for a request only if nothing can tell the two apart: same run, same step, same task,
group and member, same request (row, agent, sampling, budget, template arguments), sampled by the same weights. Weights
are compared by fingerprint, not by the number of their version: what was trained after the checkpoint is trained
again, and only where that gives the same weights, bit for bit, do rollouts of later steps count as well. A rollout
that failed is not recalled but tried again. Evaluation is not recalled either.

`RecoveringCollector` keeps what had ended when the policy server was lost, and runs only the lost rollouts again:

    collect ── the server dies ── recover: all ranks agree, server restarted, weights pushed ── collect the lost ones

A rollout that failed by itself has ended. One that failed for infrastructure reasons, that was cancelled, or whose
model calls the server could no longer report, may be lost because of the server. So may one that continued with other
weights, because the server was back before anyone noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_gym.errors import FailureKind
from trl_gym.rollouts.attempts import Progress, RolloutResult
from trl_gym.rollouts.collector import RolloutCollector
from trl_gym.rollouts.journal import Attempt, Line, journal_files, read_line, read_lines, step_of
from trl_gym.rollouts.ledger import weight_versions
from trl_gym.rollouts.request import RolloutRequest, next_attempt, request_hash, task_hash
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
        self._policy: Policy | None = None
        self._found: dict[_Key, list[Line]] = {}

    def take_all(self, requests: Sequence[RolloutRequest], policy: Policy) -> dict[int, Rollout]:
        """Return the recorded rollouts for a batch of requests, by index. Each is given out once.

        Raises:
            ConfigError: A line of the journal cannot be read.
        """
        if policy.step > self._last_step:  # the interrupted run did not get there
            return {}
        if policy != self._policy:
            self._policy = policy
            self._found, num_others = _usable(read_lines(self._folder, mode="train", step=policy.step), policy)
            if num_others:
                logger.warning(
                    "%d recorded rollouts of step %d were sampled by other weights than the current ones and are not "
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
    collector: RecoveringCollector,
    requests: Sequence[RolloutRequest],
    recalled: Mapping[int, Rollout],
    finish: Callable[[RolloutResult], Rollout],
    progress: Progress | None = None,
) -> list[Rollout]:
    """Collect what was not recalled.

    Args:
        collector: Collects.
        requests: `[B]`.
        recalled: Rollouts that need not be collected, by index of the request.
        finish, progress: See `RolloutCollector.submit`; of those that are collected.

    Returns:
        `[B]`, in the order of the requests.
    """
    missing = [index for index in range(len(requests)) if index not in recalled]
    # Also when nothing is missing on this rank: the collector may have something to agree on with other ranks.
    collected = collector.collect([requests[index] for index in missing], finish, progress)
    found = {**recalled, **dict(zip(missing, collected, strict=True))}
    return [found[index] for index in range(len(requests))]


def _usable(lines: Iterable[Line], policy: Policy) -> tuple[dict[_Key, list[Line]], int]:
    """Return the lines that a policy has sampled, without their contents, and the number that other weights have."""
    found: dict[_Key, list[Line]] = {}
    num_outdated = 0
    for line in lines:
        record = line.record
        if record.get("run") != policy.run or not Attempt.of(record).has_reward:
            continue
        if record.get("weights") != policy.weights or record.get("weight_versions") != [str(policy.step)]:
            num_outdated += 1
            continue
        key = tuple(record.get(name) for name in ("task_hash", "request_hash", "group", "member"))
        found.setdefault(key, []).append(Line(line.path, line.offset, line.length, {}))
    return found, num_outdated


# -- a batch that outlives its policy server --------------------------------------------------------------------------

_LOSABLE = frozenset({FailureKind.INFRASTRUCTURE, FailureKind.CANCELLED})

Recover = Callable[[Exception | None, Sequence[RolloutRequest]], bool]
"""The error that ended the collection on this rank (None without one) and its lost rollouts → whether to collect these
again. May raise instead. Called on every rank, once per collection."""


class RecoveringCollector:
    """Collects, and continues after the loss of the policy server, as long as `recover` gets it back.

    Args:
        collector: Collects.
        recover: See `Recover`.
        version: Returns the weight version that is to be sampled with.
        before: Called before each collection; ranks agree on an error of it as on one of the collection.
        after: Called after each collection that came to its end; ranks agree on an error of it too.
        cancel: Tells a server that came back which rollouts nobody waits for: NeMo Gym may still be running them.
    """

    def __init__(
        self,
        collector: RolloutCollector[Rollout],
        recover: Recover,
        *,
        version: Callable[[], str],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
        cancel: Callable[[list[str]], Any] = lambda rollout_ids: None,
    ) -> None:
        self._collector, self._recover = collector, recover
        self._version, self._before, self._after, self._cancel = version, before, after, cancel

    def collect(
        self,
        requests: Sequence[RolloutRequest],
        finish: Callable[[RolloutResult], Rollout],
        progress: Progress | None = None,
    ) -> list[Rollout]:
        """Return one rollout per request, in their order. `finish` has recorded the attempts that were lost, too.
        Without requests this only takes part in what all ranks agree on."""
        batch = _Batch(requests, self._version())
        while True:
            error = self._attempt(batch, finish, progress)
            if not self._recover(error, batch.lost()):
                return [batch.kept[index] for index in range(len(requests))]
            batch.give_up_lost()

    def close(self) -> None:
        self._collector.close()

    def _attempt(
        self, batch: _Batch, finish: Callable[[RolloutResult], Rollout], progress: Progress | None
    ) -> Exception | None:
        """Collect what is missing. An error is returned, not raised: the other ranks have to hear of it first."""
        place = batch.places()

        def keep(result: RolloutResult) -> Rollout:
            rollout = finish(result)
            index = place[_request_key(result.request)]
            batch.newest[index] = result.request
            is_last = not result.was_lost and _kind(rollout) not in result.retried_kinds
            if is_last and not batch.may_be_lost(rollout):
                batch.kept[index] = rollout
            return rollout

        try:
            self._before()
            if batch.given_up:
                self._cancel(batch.given_up)
            if place:
                todo = [batch.newest[index] for index in place.values()]
                batch.kept |= zip(place.values(), self._collector.collect(todo, keep, progress), strict=True)
            self._after()
        except Exception as error:
            return error
        return None


class _Batch:
    """Keeps track of the rollouts of one batch, by place among the requests.

    Args:
        requests: The batch.
        version: Version of the weights that are to sample it.

    Attributes:
        kept: Rollouts that have ended.
        newest: The newest attempt of each.
        given_up: Ids of lost attempts, which Gym may still be running.
    """

    def __init__(self, requests: Sequence[RolloutRequest], version: str) -> None:
        self._version = version
        self.kept: dict[int, Rollout] = {}
        self.newest = list(requests)
        self.given_up: list[str] = []

    def places(self) -> dict[tuple[int, int], int]:
        """Return the places of missing rollouts, by group and member."""
        return {_request_key(request): index for index, request in enumerate(self.newest) if index not in self.kept}

    def lost(self) -> list[RolloutRequest]:
        """Return what runs again if the server was lost: also what ended badly on this rank meanwhile."""
        return [
            request
            for index, request in enumerate(self.newest)
            if index not in self.kept or self.may_be_lost(self.kept[index])
        ]

    def may_be_lost(self, rollout: Rollout) -> bool:
        """Tell whether the loss of the server may be why it ended as it did."""
        return _kind(rollout) in _LOSABLE or not {self._version}.issuperset(weight_versions(rollout.records or []))

    def give_up_lost(self) -> None:
        lost = {request.rollout_id for request in self.lost()}
        self.given_up = sorted(lost)
        for index, request in enumerate(self.newest):
            if request.rollout_id in lost:
                self.kept.pop(index, None)
                self.newest[index] = next_attempt(request)


def _kind(rollout: Rollout) -> FailureKind | None:
    return None if rollout.failure is None else rollout.failure.kind


def _request_key(request: RolloutRequest) -> tuple[int, int]:
    return request.group, request.member
