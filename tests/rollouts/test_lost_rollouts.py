"""Which rollouts are kept when the policy server dies, and which run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rollouts.recorded import request, rollout
from trl_gym.errors import FailureKind, GymServerError, PolicyServerLostError, RolloutFailure
from trl_gym.policy_server.middleware.ledger import CallRecord
from trl_gym.rollouts.attempts import RolloutResult
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.reuse import RecoveringCollector
from trl_gym.rollouts.rollout import Rollout

LOSS = PolicyServerLostError("policy server ended")


class Mortal:
    """Ends rollouts one by one, as `outcomes` says for each collection: `"ok"`, a failure's kind, `"unsettled"` (an
    answer, and the server gone before its records), `"running"` (never answered), `"stale"` (answered with other
    weights); then dies if `deaths` says so."""

    def __init__(self, outcomes: Sequence[Sequence[str]], deaths: int) -> None:
        self._outcomes = list(outcomes)
        self._deaths = deaths
        self.asked: list[list[str]] = []
        self.is_closed = False

    def collect(
        self, requests: Sequence[RolloutRequest], finish: Callable[[Any], Rollout], progress: Any = None
    ) -> list[Rollout]:
        self.asked.append([one.rollout_id for one in requests])
        outcomes = self._outcomes.pop(0) if self._outcomes else []
        ended = [
            finish(result_of(one, outcomes[index] if index < len(outcomes) else "ok"))
            for index, one in enumerate(requests)
        ]
        if self._deaths > 0:
            self._deaths -= 1
            raise LOSS
        return ended

    def close(self) -> None:
        self.is_closed = True


def result_of(one: RolloutRequest, outcome: str) -> RolloutResult:
    if outcome == "unsettled":
        return RolloutResult(request=one, answer={}, failure=None, seconds=1.0, was_lost=True)
    if outcome in ("ok", "stale"):
        version = "7" if outcome == "ok" else "default"
        records = [CallRecord(status=200, prompt="exact", seconds=0.1, weight_version=version)]
        return RolloutResult(request=one, answer={}, failure=None, seconds=1.0, records=records)
    kind = FailureKind.CANCELLED if outcome == "running" else FailureKind(outcome)
    failure = RolloutFailure(kind=kind, text="x", where="a /run").of(**one.identity, seconds=1.0)
    return RolloutResult(request=one, answer=None, failure=failure, seconds=1.0, records=[])


def finish(result: RolloutResult) -> Rollout:
    made = dataclasses.replace(rollout(result.request, reward=1.0), records=result.records)
    return made if result.failure is None else dataclasses.replace(made, failure=result.failure)


def recover(error: Exception | None, lost: Sequence[RolloutRequest]) -> bool:
    if error is not None and not isinstance(error, PolicyServerLostError):
        raise error
    return error is not None


def surviving(collector: Any, recover: Any, **options: Any) -> RecoveringCollector:
    return RecoveringCollector(collector, recover, version=lambda: "7", **options)


def batch(number: int) -> list[RolloutRequest]:
    return [request(index // 4, index % 4, rollout_id=f"r{index}-a0") for index in range(number)]


ENDED = ("ok", "deadline", "environment", "policy")
LOST = ("infrastructure", "unsettled", "running", "stale")
outcome = st.sampled_from([*ENDED, *LOST])


@given(st.lists(st.lists(outcome, min_size=8, max_size=8), min_size=1, max_size=4))
def test_what_ended_is_kept_and_what_was_lost_runs_again(rounds: list[list[str]]) -> None:
    mortal = Mortal(rounds, deaths=len(rounds))
    cancelled: list[list[str]] = []
    asked = batch(8)
    results = surviving(mortal, recover, cancel=cancelled.append).collect(asked, finish)
    assert [(r.request.group, r.request.member) for r in results] == [(r.group, r.member) for r in asked]
    missing = [one.rollout_id for one in asked]
    for attempt, outcomes in enumerate(rounds):
        if not missing:
            break
        assert mortal.asked[attempt] == missing
        lost = [name for name, how in zip(missing, outcomes, strict=False) if how in LOST]
        kept = [name for name, how in zip(missing, outcomes, strict=False) if how in ENDED]
        assert set(kept) <= {one.request.rollout_id for one in results}
        if attempt < len(cancelled):
            assert cancelled[attempt] == lost
        missing = [f"{name.rpartition('-a')[0]}-a{attempt + 1}" for name in lost]
    ids = [name for names in mortal.asked for name in names]
    assert len(set(ids)) == len(ids), "every attempt has an id of its own"


def test_without_a_loss_failures_are_results() -> None:
    mortal = Mortal([["infrastructure", "ok", "deadline"]], deaths=0)
    results = surviving(mortal, recover).collect(batch(3), finish)
    kinds = [None if one.failure is None else str(one.failure.kind) for one in results]
    assert kinds == ["infrastructure", None, "deadline"]
    assert len(mortal.asked) == 1


def test_a_loss_that_another_rank_reports() -> None:
    """This rank had everything; what failed for infrastructure reasons may have been the server's fault."""
    answers = [True, False]
    mortal = Mortal([["ok", "infrastructure", "environment"]], deaths=0)
    results = surviving(mortal, lambda error, lost: answers.pop(0)).collect(batch(3), finish)
    assert mortal.asked == [["r0-a0", "r1-a0", "r2-a0"], ["r1-a1"]]
    assert [r.request.rollout_id for r in results] == ["r0-a0", "r1-a1", "r2-a0"]


def test_a_rank_without_rollouts_takes_part() -> None:
    heard: list[Any] = []
    mortal = Mortal([], deaths=0)

    def once(error: Exception | None, lost: Sequence[RolloutRequest]) -> bool:
        heard.append((error, list(lost)))
        return len(heard) == 1

    assert surviving(mortal, once).collect([], finish) == []
    assert heard == [(None, []), (None, [])] and mortal.asked == []


def test_retries_within_a_collection_are_counted_on() -> None:
    class Retrying(Mortal):
        def collect(self, requests: Any, finish: Any, progress: Any = None) -> list[Rollout]:
            if not self.asked:
                again = dataclasses.replace(requests[0], rollout_id="r0-a1", attempt=1)
                failed = dataclasses.replace(
                    result_of(requests[0], "environment"), retried_kinds=frozenset({FailureKind.ENVIRONMENT})
                )
                finish(failed)
                finish(result_of(again, "running"))
                self.asked.append(["r0-a0"])
                raise LOSS
            return super().collect(requests, finish, progress)

    mortal = Retrying([], deaths=0)
    [result] = surviving(mortal, recover).collect(batch(1), finish)
    assert (result.request.rollout_id, result.request.attempt) == ("r0-a2", 2)


def test_a_server_that_was_back_before_it_was_missed() -> None:
    """The collection came to its end; some of it was sampled by what the server was started with."""
    checks: list[PolicyServerLostError | None] = [LOSS, None]

    def after() -> None:
        if (loss := checks.pop(0)) is not None:
            raise loss

    mortal = Mortal([["ok", "stale", "ok", "stale"]], deaths=0)
    results = surviving(mortal, recover, after=after).collect(batch(4), finish)
    assert mortal.asked[1] == ["r1-a1", "r3-a1"] and checks == []
    assert [one.request.rollout_id for one in results] == ["r0-a0", "r1-a1", "r2-a0", "r3-a1"]


@pytest.mark.parametrize("where", ["before", "after", "cancel"])
def test_what_goes_wrong_around_it_is_told_too(where: str) -> None:
    def broken(*_: Any) -> None:
        raise GymServerError(f"in {where}")

    heard: list[Exception | None] = []

    def hear(error: Exception | None, lost: Sequence[RolloutRequest]) -> bool:
        heard.append(error)
        return recover(error, lost)

    mortal = Mortal([["running"]], deaths=1 if where == "cancel" else 0)
    collector = surviving(mortal, hear, **{where: broken})
    with pytest.raises(GymServerError, match=f"in {where}"):
        collector.collect(batch(1), finish)
    assert isinstance(heard[-1], GymServerError)
    collector.close()
    assert mortal.is_closed
