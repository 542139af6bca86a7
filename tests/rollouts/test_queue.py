"""Which groups are taken and when; which rollouts are kept when the policy server dies, and which run again."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import wait_for
from tests.rollouts.recorded import request, rollout
from trl_gym.errors import FailureKind, GymServerError, PolicyServerLostError, RolloutFailure
from trl_gym.policy_server.middleware.ledger import CallRecord
from trl_gym.rollouts.attempts import RolloutResult
from trl_gym.rollouts.queue import Candidate, EndedGroup, RolloutQueue, Sampler, TaskGroup, choose
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.rollout import Rollout

LOSS = PolicyServerLostError("policy server ended")
VERSION = 7


# -- which groups are taken -------------------------------------------------------------------------------------------


def test_those_that_stand_by_another_order_than_their_age_are_no_choice() -> None:
    with pytest.raises(AssertionError, match="by age"):
        choose([Candidate(1, True), Candidate(0, True)], 1, num_later=1, per_batch=1)


@st.composite
def queues(draw: st.DrawFn) -> tuple[int, int, list[Candidate]]:
    """As many groups as this batch and the later ones have room for, in an order of their own making that is sound."""
    per_batch, num_later = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    laters = sorted(
        min(batch + draw(st.integers(0, num_later)), num_later)
        for batch in range(num_later + 1)
        for _ in range(per_batch)
    )
    return per_batch, num_later, [Candidate(later, draw(st.booleans())) for later in laters]


@given(queues())
def test_a_choice_leaves_nothing_without_a_place_and_is_the_oldest(drawn: tuple[int, int, list[Candidate]]) -> None:
    per_batch, num_later, candidates = drawn
    taken, due = choose(candidates, per_batch, num_later=num_later, per_batch=per_batch)
    whole = [index for index, one in enumerate(candidates) if one.is_whole]
    if taken is None:
        assert due or len(whole) < per_batch
        assert all(not candidates[index].is_whole and candidates[index].later < num_later for index in due)
        return
    assert taken == whole[:per_batch] and not due
    left = [one for index, one in enumerate(candidates) if index not in taken]
    for batch in range(num_later):
        assert sum(one.later <= batch for one in left) <= batch * per_batch


@given(queues())
def test_waiting_for_what_is_due_and_for_enough_is_all_it_takes(drawn: tuple[int, int, list[Candidate]]) -> None:
    """Whoever ends what is waited for gets a choice."""
    per_batch, num_later, candidates = drawn
    for _ in candidates:
        taken, due = choose(candidates, per_batch, num_later=num_later, per_batch=per_batch)
        if taken is not None:
            return
        ending = due or [next(index for index, one in enumerate(candidates) if not one.is_whole)]
        candidates = [
            dataclasses.replace(one, is_whole=True) if index in ending else one for index, one in enumerate(candidates)
        ]
    assert choose(candidates, per_batch, num_later=num_later, per_batch=per_batch)[0] is not None


def test_a_due_group_is_waited_for_though_younger_ones_have_ended() -> None:
    whole, running = [Candidate(later, True) for later in (0, 1, 1)], Candidate(0, False)
    assert choose([running, *whole], 2, num_later=1, per_batch=2) == (None, [0])
    assert choose([Candidate(1, False), *whole[1:], Candidate(1, True)], 2, num_later=1, per_batch=2) == ([1, 2], [])


# -- the queue on a scripted collector --------------------------------------------------------------------------------


class Scripted:
    """A collector whose rollouts end when a test says so."""

    def __init__(self, told: Callable[[Scripted], None] | None = None) -> None:
        self.asked: list[list[str]] = []
        self.submissions: list[ScriptedSubmission] = []
        self._told = told

    def submit(self, requests: Sequence[RolloutRequest], finish: Any, progress: Any = None) -> ScriptedSubmission:
        self.asked.append([one.rollout_id for one in requests])
        submission = ScriptedSubmission(list(requests), finish)
        self.submissions.append(submission)
        if self._told is not None:
            threading.Thread(target=self._told, args=(self,)).start()
        return submission


class ScriptedSubmission:
    def __init__(self, requests: list[RolloutRequest], finish: Any) -> None:
        self.future: Future[Any] = Future()
        self._requests, self._finish = dict(enumerate(requests)), finish
        self.interrupted: list[Any] = []

    def end(self, place: int, outcome: str = "ok") -> None:
        self._finish(result_of(self._requests[place], outcome))
        if outcome not in ("unsettled", "retried"):
            self._requests.pop(place)
        if not self._requests and not self.future.done():
            self.future.set_result([])

    def end_all(self, outcomes: Sequence[str] = ()) -> None:
        for place in list(self._requests):
            self.end(place, outcomes[place] if place < len(outcomes) else "ok")

    def fail(self, error: Exception) -> None:
        self.future.set_exception(error)

    def interrupt(self, places: Sequence[int], why: str) -> None:
        names = [self._requests[place].rollout_id for place in places if place in self._requests]
        self.interrupted += names
        threading.Thread(target=lambda: [self.end(p, "cancelled") for p in places if p in self._requests]).start()

    def cancel(self) -> None:
        self._requests = {}
        self.future.cancel()


def result_of(one: RolloutRequest, outcome: str) -> RolloutResult:
    if outcome == "unsettled":
        return RolloutResult(request=one, answer={}, failure=None, seconds=1.0, was_lost=True)
    if outcome in ("ok", "stale"):
        version = str(VERSION) if outcome == "ok" else "default"
        records = [CallRecord(status=200, prompt="exact", seconds=0.1, weight_version=version)]
        return RolloutResult(request=one, answer={}, failure=None, seconds=1.0, records=records)
    kind = FailureKind(outcome)
    failure = RolloutFailure(kind=kind, text="x", where="a /run").of(**one.identity, seconds=1.0)
    return RolloutResult(request=one, answer=None, failure=failure, seconds=1.0, records=[])


def finish(result: RolloutResult) -> Rollout:
    made = dataclasses.replace(rollout(result.request, reward=1.0), records=result.records)
    return made if result.failure is None else dataclasses.replace(made, failure=result.failure)


def agree(error: Exception | None) -> PolicyServerLostError | None:
    if error is not None and not isinstance(error, PolicyServerLostError):
        raise error
    return error


class World:
    """The servers and the other ranks, as the queue sees them."""

    def __init__(self, collector: Any, **changes: Any) -> None:
        self.version = VERSION
        self.cancelled: list[list[str]] = []
        self.recovered: list[int] = []
        options: dict[str, Any] = {
            "collector": collector,
            "agree": agree,
            "recover": lambda loss, number: self.recovered.append(number),
            "policy": lambda: Policy("run", self.version, f"w{self.version}"),
            "finisher": lambda policy: finish,
            "cancel": self.cancelled.append,
        }
        self.sampler = Sampler(**options | changes)


def group(index: int, batch: int = 0, size: int = 4, wanted: int | None = None) -> TaskGroup:
    requests = [
        dataclasses.replace(
            request(index, member, rollout_id=f"b{batch}g{index}m{member}-a0"), batch=batch, group=index
        )
        for member in range(size)
    ]
    return TaskGroup(batch=batch, index=index, example={}, requests=tuple(requests), num_wanted=wanted or size)


def names(groups: Sequence[EndedGroup]) -> list[tuple[int, int]]:
    return [(one.task.batch, one.task.index) for one in groups]


def ids(groups: Sequence[EndedGroup]) -> list[str]:
    return [one.request.rollout_id for ended in groups for one in ended.rollouts]


# -- lost servers -----------------------------------------------------------------------------------------------------

ENDED = ("ok", "deadline", "environment", "policy")
LOST = ("infrastructure", "unsettled", "stale", "cancelled")


@given(st.lists(st.lists(st.sampled_from([*ENDED, *LOST]), min_size=8, max_size=8), min_size=1, max_size=4))
def test_what_ended_is_kept_and_what_was_lost_runs_again(rounds: list[list[str]]) -> None:
    """Every launch but the last one ends with the loss of the server, as soon as each rollout has had its outcome."""

    def play(collector: Scripted) -> None:
        number = len(collector.submissions) - 1
        submission = collector.submissions[number]
        if number < len(rounds):
            # The last one never ends: otherwise a whole group might be taken before the loss is known.
            submission.end_all([*rounds[number][: len(collector.asked[number]) - 1], "unsettled"])
            submission.fail(LOSS)
        else:
            submission.end_all()

    collector = Scripted(play)
    world = World(collector)
    ended = RolloutQueue(world.sampler).collect([group(0), group(1)], 2, step=VERSION + 1)
    missing = [one.rollout_id for task in (group(0), group(1)) for one in task.requests]
    for attempt, outcomes in enumerate(rounds):
        assert collector.asked[attempt] == missing
        how = [*outcomes[: len(missing) - 1], "unsettled"]
        lost = [name for name, outcome in zip(missing, how, strict=True) if outcome in LOST]
        assert world.cancelled[attempt] == lost
        assert set(missing) - set(lost) <= set(ids(ended))
        missing = [f"{name.rpartition('-a')[0]}-a{attempt + 1}" for name in lost]
    assert set(missing) <= set(ids(ended)) and len(ids(ended)) == 8
    asked = [name for names in collector.asked for name in names]
    assert len(set(asked)) == len(asked), "every attempt has an id of its own"


def test_without_a_loss_failures_are_results() -> None:
    collector = Scripted(lambda it: it.submissions[0].end_all(["infrastructure", "ok", "deadline"]))
    [ended] = RolloutQueue(World(collector).sampler).collect([group(0, size=3)], 1, step=VERSION + 1)
    kinds = [None if one.failure is None else str(one.failure.kind) for one in ended.rollouts]
    assert kinds == ["infrastructure", None, "deadline"]
    assert len(collector.asked) == 1


def test_a_loss_that_another_rank_reports() -> None:
    """This rank had everything; what failed for infrastructure reasons may have been the server's fault."""
    answers = [LOSS, None]
    collector = Scripted(
        lambda it: it.submissions[-1].end_all(["ok", "infrastructure", "environment"] if len(it.asked) == 1 else [])
    )
    world = World(collector, agree=lambda error: answers.pop(0))
    ended = RolloutQueue(world.sampler).collect([group(0, size=3)], 1, step=VERSION + 1)
    assert collector.asked[1] == ["b0g0m1-a1"] and world.recovered == [1]
    assert ids(ended) == ["b0g0m0-a0", "b0g0m1-a1", "b0g0m2-a0"]


def test_a_rank_that_takes_nothing_takes_part() -> None:
    heard: list[Any] = []

    def once(error: Exception | None) -> PolicyServerLostError | None:
        heard.append(error)
        return LOSS if len(heard) == 1 else None

    collector = Scripted()
    assert RolloutQueue(World(collector, agree=once).sampler).collect([], 0, step=VERSION + 1) == []
    assert heard == [None, None] and collector.asked == []


def test_retries_within_a_collection_are_counted_on() -> None:
    def play(collector: Scripted) -> None:
        submission = collector.submissions[-1]
        if len(collector.submissions) == 1:
            first = submission._requests[0]
            failed = dataclasses.replace(
                result_of(first, "environment"), retried_kinds=frozenset({FailureKind.ENVIRONMENT})
            )
            submission._finish(failed)
            again = dataclasses.replace(first, rollout_id="b0g0m0-a1", attempt=1)
            submission._finish(result_of(again, "unsettled"))
            submission.fail(LOSS)
        else:
            submission.end_all()

    [ended] = RolloutQueue(World(Scripted(play)).sampler).collect([group(0, size=1)], 1, step=VERSION + 1)
    assert (ended.rollouts[0].request.rollout_id, ended.rollouts[0].request.attempt) == ("b0g0m0-a2", 2)


def test_a_server_that_was_back_before_it_was_missed() -> None:
    """Everything ended; some of it was sampled by what the server was started with."""
    checks: list[PolicyServerLostError | None] = [LOSS, None]

    def after() -> None:
        if (loss := checks.pop(0)) is not None:
            raise loss

    def play(collector: Scripted) -> None:
        collector.submissions[-1].end_all(["ok", "stale", "ok", "stale"] if len(collector.asked) == 1 else [])

    collector = Scripted(play)
    ended = RolloutQueue(World(collector, after=after).sampler).collect([group(0)], 1, step=VERSION + 1)
    assert collector.asked[1] == ["b0g0m1-a1", "b0g0m3-a1"] and checks == []
    assert ids(ended) == ["b0g0m0-a0", "b0g0m1-a1", "b0g0m2-a0", "b0g0m3-a1"]


@pytest.mark.parametrize("where", ["before", "after", "cancel"])
def test_what_goes_wrong_around_it_is_told_too(where: str) -> None:
    def broken(*_: Any) -> None:
        raise GymServerError(f"in {where}")

    heard: list[Exception | None] = []

    def hear(error: Exception | None) -> PolicyServerLostError | None:
        heard.append(error)
        return agree(error)

    def play(collector: Scripted) -> None:
        submission = collector.submissions[-1]
        submission.fail(LOSS) if where == "cancel" else submission.end_all()

    queue = RolloutQueue(World(Scripted(play), agree=hear, **{where: broken}).sampler)
    with pytest.raises(GymServerError, match=f"in {where}"):
        queue.collect([group(0, size=1)], 1, step=VERSION + 1)
    assert isinstance(heard[-1], GymServerError)
    assert len(queue) == 0 and queue.in_flight == []


# -- more than one batch in flight ------------------------------------------------------------------------------------


def overlapped(world: World, max_staleness: int = 2, **options: Any) -> RolloutQueue:
    return RolloutQueue(world.sampler, max_staleness=max_staleness, in_order=False, **options)


def collecting(queue: RolloutQueue, *args: Any, **kwargs: Any) -> Future[list[EndedGroup]]:
    future: Future[list[EndedGroup]] = Future()

    def run() -> None:
        try:
            future.set_result(queue.collect(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def pair(batch: int) -> list[TaskGroup]:
    return [group(index, batch=batch, size=2) for index in range(2)]


def test_those_that_end_first_are_taken_until_the_oldest_are_due() -> None:
    collector = Scripted()
    world = World(collector)
    queue = overlapped(world, max_staleness=3)

    def step(groups: list[TaskGroup], ending: Callable[[], None]) -> list[tuple[int, int]]:
        number = len(collector.submissions)
        step = world.version + 1
        later = [step + 1, step + 2, step + 3]
        future = collecting(queue, groups, 2, step=step, later_steps=later, per_batch=2)
        wait_for(lambda: len(collector.submissions) > number)
        ending()
        world.version += 1
        return names(future.result(60))

    def younger() -> None:
        for place in (4, 5, 6, 7):
            collector.submissions[0].end(place)

    assert step([*pair(0), *pair(1)], younger) == [(1, 0), (1, 1)]
    assert step([*pair(2)], lambda: collector.submissions[1].end_all()) == [(2, 0), (2, 1)]
    assert step([*pair(3)], lambda: collector.submissions[2].end_all()) == [(3, 0), (3, 1)]

    def all_of_them() -> None:
        collector.submissions[3].end_all()
        collector.submissions[0].end_all()  # due: three steps old

    assert step([*pair(4)], all_of_them) == [(0, 0), (0, 1)]
    assert [(task.batch, task.index) for task in queue.in_flight] == [(4, 0), (4, 1)]


def test_groups_that_would_become_too_stale_are_cut_short_by_option() -> None:
    collector = Scripted()
    world = World(collector)
    queue = overlapped(world, max_staleness=1, drops=True)
    first = collecting(queue, [group(0, size=2), group(0, batch=1, size=2)], 1, step=8, later_steps=(9,), per_batch=1)
    wait_for(lambda: collector.submissions)
    collector.submissions[0].end(2)
    collector.submissions[0].end(3)
    assert names(first.result(60)) == [(1, 0)]
    collector.submissions[0].end(0)
    world.version = 8
    second = collecting(queue, [group(0, batch=2, size=2)], 1, step=9, later_steps=(10,), per_batch=1)
    wait_for(lambda: len(collector.submissions) == 2)
    collector.submissions[1].end(0)
    assert not collector.submissions[0].interrupted, "nothing else could be trained yet"
    collector.submissions[1].end(1)
    [ended] = second.result(60)
    assert collector.submissions[0].interrupted == ["b0g0m1-a0"]
    assert [one.failure and one.failure.kind for one in ended.rollouts] == [None, FailureKind.CANCELLED]
    assert ended.born == 7


def test_of_more_members_the_first_with_a_reward_make_the_group() -> None:
    collector = Scripted()
    queue = overlapped(World(collector), max_staleness=0)
    future = collecting(queue, [group(0, size=5, wanted=3)], 1, step=8)
    wait_for(lambda: collector.submissions)
    for place, outcome in ((4, "ok"), (0, "environment"), (2, "ok"), (1, "ok")):
        collector.submissions[0].end(place, outcome)
    [ended] = future.result(60)
    assert collector.submissions[0].interrupted == ["b0g0m3-a0"]
    assert [one.request.member for one in ended.rollouts] == [1, 2, 4]
    assert [one.request.member for one in ended.surplus] == [0, 3]


def test_what_a_group_has_no_use_for_does_not_run_again_after_a_loss() -> None:
    """It was cancelled, and had not ended when the server was lost; the other group waits for one of two."""
    collector = Scripted()
    world = World(collector)
    queue = overlapped(world, max_staleness=0)
    future = collecting(queue, [group(0, size=3, wanted=2), group(1, size=3, wanted=2)], 2, step=8)
    wait_for(lambda: collector.submissions)
    submission = collector.submissions[0]
    submission.interrupt = lambda places, why: submission.interrupted.extend(places)  # type: ignore[method-assign]
    for place in (0, 2, 3):
        submission.end(place)
    assert submission.interrupted == [1]
    submission.fail(LOSS)
    wait_for(lambda: len(collector.asked) == 2)
    assert world.recovered == [2] and world.cancelled == [["b0g0m1-a0", "b0g1m1-a0", "b0g1m2-a0"]]
    assert collector.asked[1] == ["b0g1m1-a1", "b0g1m2-a1"]
    collector.submissions[1].end(1)
    ended = future.result(60)
    assert ids(ended) == ["b0g0m0-a0", "b0g0m2-a0", "b0g1m0-a0", "b0g1m2-a1"]
    assert [[one.request.member for one in group.surplus] for group in ended] == [[], [1]]


def test_a_lost_reward_is_made_up_for_though_others_were_cancelled() -> None:
    checks: list[PolicyServerLostError | None] = [LOSS, None]

    def after() -> None:
        if (loss := checks.pop(0)) is not None:
            raise loss

    def play(collector: Scripted) -> None:
        for place, outcome in enumerate(["ok", "stale"] if len(collector.asked) == 1 else ["ok"]):
            collector.submissions[-1].end(place, outcome)

    collector = Scripted(play)
    world = World(collector, after=after)
    [ended] = RolloutQueue(world.sampler).collect([group(0, size=3, wanted=2)], 1, step=VERSION + 1)
    assert collector.asked[1] == ["b0g0m1-a1"]
    assert ids([ended]) == ["b0g0m0-a0", "b0g0m1-a1"] and [one.request.member for one in ended.surplus] == [2]


@pytest.mark.parametrize("num_done", [1, 2])
def test_a_resumed_run_cancels_nobody_again(num_done: int) -> None:
    """The journal has the rewards of an over-sampled group, all of them or some; cancelled members are not in it."""
    asked = group(0, size=4, wanted=2).requests
    done = {place: rollout(asked[place], reward=0.5) for place in (1, 3)[:num_done]}
    collector = Scripted(lambda it: it.submissions[-1].end(0))
    world = World(collector, recall=lambda requests, policy: done)
    [ended] = RolloutQueue(world.sampler).collect([group(0, size=4, wanted=2)], 1, step=VERSION + 1)
    assert collector.asked == ([] if num_done == 2 else [["b0g0m0-a0", "b0g0m2-a0", "b0g0m3-a0"]])
    assert [one.request.member for one in ended.rollouts] == ([1, 3] if num_done == 2 else [0, 1])


def test_what_was_dropped_stays_dropped_after_a_loss() -> None:
    """It is asked for once more and cancelled before anything is sampled: its group is still due."""
    collector = Scripted()
    world = World(collector)
    queue = overlapped(world, max_staleness=1, drops=True)
    first = collecting(queue, [group(0, size=2), group(0, batch=1, size=2)], 1, step=8, later_steps=(9,), per_batch=1)
    wait_for(lambda: collector.submissions)
    submission = collector.submissions[0]
    submission.interrupt = lambda places, why: submission.interrupted.extend(places)  # type: ignore[method-assign]
    for place in (0, 2, 3):
        submission.end(place)
    assert names(first.result(60)) == [(1, 0)]
    world.version = 8
    second = collecting(queue, [group(0, batch=2, size=2)], 1, step=9, later_steps=(10,), per_batch=1)
    wait_for(lambda: len(collector.submissions) == 2)
    collector.submissions[1].end_all()
    wait_for(lambda: submission.interrupted)
    submission.fail(LOSS)
    wait_for(lambda: len(collector.submissions) == 3)
    assert collector.asked[2] == ["b0g0m1-a1", "b2g0m0-a1", "b2g0m1-a1"]
    for place in (1, 2):
        collector.submissions[2].end(place)
    [ended] = second.result(60)
    assert [one.failure and one.failure.kind for one in ended.rollouts] == [None, FailureKind.CANCELLED]
    assert [name for names in collector.asked for name in names].count("b0g0m0-a0") == 1


def test_a_loss_in_the_background_is_told_when_groups_are_collected_and_costs_only_what_was_lost() -> None:
    collector = Scripted()
    world = World(collector)
    queue = overlapped(world, max_staleness=1)
    first = collecting(queue, [group(0, size=2), group(0, batch=1, size=2)], 1, step=8, later_steps=(9,), per_batch=1)
    wait_for(lambda: collector.submissions)
    for place in (0, 1, 2):
        collector.submissions[0].end(place)
    assert names(first.result(60)) == [(0, 0)]
    collector.submissions[0].fail(LOSS)
    second = collecting(queue, [group(0, batch=2, size=2)], 1, step=9, later_steps=(10,), per_batch=1)
    wait_for(lambda: world.recovered)
    assert world.recovered == [3]
    wait_for(lambda: len(collector.asked) == 3)
    assert collector.asked[2] == ["b1g0m1-a1", "b2g0m0-a1", "b2g0m1-a1"]
    collector.submissions[2].end_all()
    assert ids(second.result(60)) == ["b1g0m0-a0", "b1g0m1-a1"]


def test_what_a_resumed_run_recalls_keeps_its_age_and_the_rest_begins_anew() -> None:
    """With fewer batches ahead than the run that was interrupted, what has no room waits."""
    collector = Scripted(lambda it: it.submissions[-1].end_all())
    before = Policy("run", 6, "w6")
    done = {("b0g0m0-a0", 6): rollout(group(0, size=2).requests[0], reward=0.5)}

    def recall(requests: Sequence[RolloutRequest], policy: Policy) -> dict[int, Rollout]:
        found = ((index, done.get((one.rollout_id, policy.version))) for index, one in enumerate(requests))
        return {index: one for index, one in found if one is not None}

    queue = overlapped(World(collector, recall=recall), max_staleness=1)
    groups = [dataclasses.replace(group(0, batch=batch, size=2), begun=before) for batch in range(3)]
    [ended] = queue.collect(groups, 1, step=8, later_steps=(9,), per_batch=1)
    assert collector.asked == [["b0g0m1-a0", "b1g0m0-a0", "b1g0m1-a0"]]
    assert (ended.born, [one.reward for one in ended.rollouts]) == (6, [0.5, 1.0])
    assert [task.begun for task in queue.in_flight] == [Policy("run", 7, "w7"), before]


def test_after_a_resume_the_older_of_two_groups_may_stand_behind_the_younger() -> None:
    """Nothing was finished of the first, which begins again: the second one is due before it."""
    collector = Scripted(lambda it: it.submissions[-1].end_all())
    done = rollout(group(0, batch=1, size=2).requests[0])

    def recall(requests: Sequence[RolloutRequest], policy: Policy) -> dict[int, Rollout]:
        return {0: done} if requests[0].batch == 1 and policy.version == 6 else {}

    queue = overlapped(World(collector, recall=recall), max_staleness=1)
    groups = [dataclasses.replace(group(0, batch=batch, size=2), begun=Policy("run", 6, "w6")) for batch in range(2)]
    assert names(queue.collect(groups, 1, step=8, later_steps=(9,), per_batch=1)) == [(1, 0)]


def test_what_was_run_again_with_later_weights_is_recalled_too() -> None:
    collector = Scripted(lambda it: it.submissions[-1].end_all())
    requests = group(0, size=3).requests
    done = {6: {0: rollout(requests[0])}, VERSION: {1: rollout(requests[1])}}
    queue = overlapped(World(collector, recall=lambda asked, policy: done.get(policy.version, {})), max_staleness=1)
    [ended] = queue.collect([dataclasses.replace(group(0, size=3), begun=Policy("run", 6, "w6"))], 1, step=8)
    assert collector.asked == [["b0g0m2-a0"]] and ended.born == 6


def test_a_launch_that_does_not_end_in_time_keeps_nothing_and_ends_nobody(caplog: pytest.LogCaptureFixture) -> None:
    collector = Scripted()
    queue = overlapped(World(collector), max_staleness=1)
    future = collecting(queue, [group(0), group(0, batch=1)], 1, step=8, later_steps=(9,), per_batch=1)
    wait_for(lambda: collector.submissions)
    for place in range(4):
        collector.submissions[0].end(place)
    future.result(60)

    def hang() -> None:
        raise TimeoutError

    collector.submissions[0].cancel = hang  # type: ignore[method-assign]
    [late] = queue._entries
    with caplog.at_level(logging.WARNING):
        queue.abandon()
    collector.submissions[0].end(4)
    assert "have not ended in time" in caplog.text and len(queue) == 0 and late.kept == {}


def test_what_is_abandoned_is_forgotten() -> None:
    collector = Scripted()
    queue = overlapped(World(collector), max_staleness=1)
    future = collecting(queue, [group(0), group(0, batch=1)], 1, step=8, later_steps=(9,), per_batch=1)
    wait_for(lambda: collector.submissions)
    for place in range(4):
        collector.submissions[0].end(place)
    future.result(60)
    queue.abandon()
    assert len(queue) == 0 and collector.submissions[0].future.cancelled()


@pytest.mark.parametrize("error", [LOSS, GymServerError("Gym is gone")])
def test_what_is_recorded_as_cancelled_while_a_collection_ends_is_no_result(error: Exception) -> None:
    """A collection that ends records what ran before its error is there: such a group is not whole."""
    heard: list[Exception | None] = []

    def hear(error: Exception | None) -> PolicyServerLostError | None:
        heard.append(error)
        return agree(error)

    def play(collector: Scripted) -> None:
        if len(collector.submissions) > 1:
            collector.submissions[-1].end_all()
            return
        submission = collector.submissions[0]
        submission.end(0)
        for place in (1, 2, 3):
            submission._finish(result_of(submission._requests[place], "cancelled"))
        threading.Timer(0.2, submission.fail, [error]).start()  # the policy server is being told meanwhile

    collector = Scripted(play)
    queue = RolloutQueue(World(collector, agree=hear).sampler)
    if isinstance(error, GymServerError):
        with pytest.raises(GymServerError, match="Gym is gone"):
            queue.collect([group(0)], 1, step=VERSION + 1)
    else:
        assert ids(queue.collect([group(0)], 1, step=VERSION + 1)) == [
            "b0g0m0-a0",
            *(f"b0g0m{m}-a1" for m in (1, 2, 3)),
        ]
    assert heard[0] is error


def test_an_error_is_told_before_what_has_ended_is_taken() -> None:
    """What was lost then runs again during the update, and not after it."""
    collector = Scripted()
    world = World(collector)
    queue = overlapped(world, max_staleness=1)
    future = collecting(queue, [group(0, size=2), group(0, batch=1, size=2)], 1, step=8, later_steps=(9,), per_batch=1)
    wait_for(lambda: collector.submissions)
    with queue._changed:  # the trainer looks when both have happened
        collector.submissions[0].end(0)
        collector.submissions[0].end(1)
        collector.submissions[0].fail(LOSS)
    assert ids(future.result(60)) == ["b0g0m0-a0", "b0g0m1-a0"]
    assert world.recovered == [2] and collector.asked[1] == ["b1g0m0-a1", "b1g0m1-a1"]


def test_a_loss_that_somebody_else_has_noticed_costs_no_further_recovery() -> None:
    """A weight sync has found the server dead, and it is back."""
    collector = Scripted()
    world = World(collector)
    queue = overlapped(world, max_staleness=1)
    first = collecting(queue, [group(0, size=2), group(0, batch=1, size=2)], 1, step=8, later_steps=(9,), per_batch=1)
    wait_for(lambda: collector.submissions)
    for place in (0, 1, 2):
        collector.submissions[0].end(place)
    assert names(first.result(60)) == [(0, 0)]
    assert queue.give_up_lost() == 1 and queue.give_up_lost() == 0
    assert collector.submissions[0].future.cancelled()
    second = collecting(queue, [group(0, batch=2, size=2)], 1, step=9, later_steps=(10,), per_batch=1)
    wait_for(lambda: len(collector.asked) == 2)
    assert collector.asked[1] == ["b1g0m1-a1", "b2g0m0-a0", "b2g0m1-a0"]
    assert world.cancelled == [["b1g0m1-a0"]] and world.recovered == []
    collector.submissions[1].end_all()
    assert ids(second.result(60)) == ["b1g0m0-a0", "b1g0m1-a1"]
