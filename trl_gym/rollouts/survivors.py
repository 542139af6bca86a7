"""A batch of rollouts that outlives its policy server: what had ended is kept, only what was lost is run again.

    collect ── the server dies ── recover: all ranks agree, server restarted, weights pushed ── collect the lost ones

A rollout that failed by itself has ended. One that failed for infrastructure reasons, was cancelled, or whose model
calls the server could not tell of any more, may have been the server's victim and is lost; and so is one that went on
with other weights, because the server was back before anybody noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trl_gym.errors import FailureKind
from trl_gym.rollouts.call_records import weight_versions
from trl_gym.rollouts.collection import RolloutResult
from trl_gym.rollouts.request import RolloutRequest, next_attempt
from trl_gym.rollouts.reuse import Collector
from trl_gym.rollouts.rollout import Rollout

_VICTIMS = frozenset({FailureKind.INFRASTRUCTURE, FailureKind.CANCELLED})

Recover = Callable[[Exception | None, Sequence[RolloutRequest]], bool]
"""What ended the collection on this rank (None: nothing) and its lost rollouts → whether to collect these again. May
raise instead. Called on every rank, once per collection."""


class SurvivingCollector:
    """A `Collector` that goes on after the loss of the policy server, as long as `recover` gets it back.

    Args:
        collector: Collects.
        recover: See `Recover`.
        version: The weight version that is to be sampled with.
        before: Called before each collection; what it raises is agreed on like everything else.
        after: Likewise, after one that came to its end.
        cancel: Tells a server that came back which rollouts nobody waits for: NeMo Gym may still be running them.
    """

    def __init__(
        self,
        collector: Collector,
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
        self, requests: Sequence[RolloutRequest], finish: Callable[[Any], Rollout], progress: Any = None
    ) -> list[Rollout]:
        """See `Collector.collect`. Attempts that were lost have been recorded by `finish`; the values returned are of
        those that ended. Without requests it only takes part in what all ranks agree on."""
        batch = _Batch(requests, self._version())
        while True:
            error = self._attempt(batch, finish, progress)
            if not self._recover(error, batch.lost()):
                return [batch.kept[index] for index in range(len(requests))]
            batch.give_up_lost()

    def close(self) -> None:
        self._collector.close()

    def _attempt(self, batch: _Batch, finish: Callable[[Any], Rollout], progress: Any) -> Exception | None:
        """Collect what is missing. What went wrong is returned: the other ranks have to hear of it first."""
        place = batch.places()

        def keep(result: RolloutResult) -> Rollout:
            rollout = finish(result)
            index = place[_key(result.request)]
            batch.newest[index] = result.request
            is_last = not result.was_lost and _kind(rollout) not in result.retried_kinds
            if is_last and not batch.is_victim(rollout):
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
    """Where the rollouts of one batch are, by place among the requests.

    Args:
        requests: All of it.
        version: Of the weights that are to sample it.

    Attributes:
        kept: Those that have ended.
        newest: The newest attempt of each.
        given_up: Ids of attempts that were lost, and that somebody may still be running.
    """

    def __init__(self, requests: Sequence[RolloutRequest], version: str) -> None:
        self._version = version
        self.kept: dict[int, Rollout] = {}
        self.newest = list(requests)
        self.given_up: list[str] = []

    def places(self) -> dict[tuple[int, int], int]:
        """What is missing, by group and member."""
        return {_key(request): index for index, request in enumerate(self.newest) if index not in self.kept}

    def lost(self) -> list[RolloutRequest]:
        """What would have to run again, if the server was lost: also what ended badly on this rank meanwhile."""
        return [
            request
            for index, request in enumerate(self.newest)
            if index not in self.kept or self.is_victim(self.kept[index])
        ]

    def is_victim(self, rollout: Rollout) -> bool:
        """Whether it may have ended as it did because of the server."""
        return _kind(rollout) in _VICTIMS or not {self._version}.issuperset(weight_versions(rollout.records or []))

    def give_up_lost(self) -> None:
        lost = {request.rollout_id for request in self.lost()}
        self.given_up = sorted(lost)
        for index, request in enumerate(self.newest):
            if request.rollout_id in lost:
                self.kept.pop(index, None)
                self.newest[index] = next_attempt(request)


def _kind(rollout: Rollout) -> FailureKind | None:
    return None if rollout.failure is None else rollout.failure.kind


def _key(request: RolloutRequest) -> tuple[int, int]:
    return request.group, request.member
