"""Whole runs with rollouts ahead of training, in every order in which rollouts may end, killed and resumed anywhere:
no task is lost or trained twice, nothing is staler than allowed, and nobody waits forever.

Queue and batches are real. Rollouts end when someone waits, or in between, as the draw says: in one thread.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rollouts.test_queue import World, finish, result_of
from tests.test_batches import example, plan
from trl_gym.batches import Batches
from trl_gym.resume import QueueState
from trl_gym.rollouts.attempts import RolloutResult
from trl_gym.rollouts.queue import EndedGroup, RolloutQueue, TaskGroup
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import BatchInfo, Collected

NUM_MEMBERS = 2
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Schedule:
    """What is trained when: `generate_every` micro-steps are a batch, `accumulation` of them an optimizer step."""

    per_batch: int
    generate_every: int
    accumulation: int
    in_epoch: int  # batches
    max_staleness: int
    num_ahead: int
    in_order: bool
    drops: bool

    @property
    def most_ahead(self) -> int:
        return self.max_staleness * self.accumulation // self.generate_every

    def steps(self) -> list[tuple[int, int]]:
        """Of each batch the step that trains it first, and its epoch; an epoch's last step may be short."""
        found, step = [], 1
        for epoch in range(2):
            found += [
                (step + number * self.generate_every // self.accumulation, epoch) for number in range(self.in_epoch)
            ]
            step += -(-self.in_epoch * self.generate_every // self.accumulation)
        return found


class Submission:
    def __init__(self, requests: Sequence[RolloutRequest], finish: Any) -> None:
        self.future: Future[Any] = Future()
        self.left, self._finish = dict(enumerate(requests)), finish
        self.interrupted: set[int] = set()

    def interrupt(self, places: Sequence[int], why: str) -> None:
        self.interrupted.update(places)

    def cancel(self) -> None:
        self.left = {}
        self.future.cancel()

    def end(self, place: int) -> None:
        self._finish(result_of(self.left.pop(place), "cancelled" if place in self.interrupted else "ok"))
        if not self.left:
            self.future.set_result([])


class Run(threading.Condition):
    """A process that trains; whoever waits for a change makes one."""

    def __init__(self, schedule: Schedule, draw: random.Random, journal: dict[tuple[int, Place], Rollout]) -> None:
        super().__init__()
        self._draw, self._journal, self._slow = draw, journal, draw.random()
        self._submissions: list[Submission] = []
        self.world = World(
            SimpleNamespace(submit=self._submit),
            recall=self._recall,
            finisher=lambda policy: lambda result: self._recorded(result, policy),
        )
        self.queue = RolloutQueue(
            self.world.sampler,
            max_staleness=schedule.max_staleness,
            in_order=schedule.in_order or not schedule.max_staleness,
            drops=schedule.drops,
        )
        self.queue._changed = self
        self.batches = Batches(
            SimpleNamespace(process_index=0, num_processes=1),  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            num_ahead=min(schedule.num_ahead, schedule.most_ahead),
            most_ahead=schedule.most_ahead,
            options={"gym_max_staleness": schedule.max_staleness},
            choose=lambda example, group: example,
            plan=plan,
            reward=lambda rollouts: [one.reward for one in rollouts],
            gather=lambda items: items,
        )

    @property
    def in_flight(self) -> list[TaskGroup]:
        return self.queue.in_flight

    def collect(self, groups: Sequence[TaskGroup], number: int, info: BatchInfo) -> Collected:
        steps = {"step": info.step, "later_steps": info.later_steps, "per_batch": info.per_batch}
        return Collected(groups=self.queue.collect(groups, number, **steps))

    def wait(self, timeout: float | None = None) -> bool:
        assert self.end_one(), "waits forever"
        return True

    def end_one(self) -> bool:
        running = [(one, place) for one in self._submissions for place in one.left]
        quick = [
            (one, place) for one, place in running if place in one.interrupted or not self._is_slow(one.left[place])
        ]
        if running:
            one, place = self._draw.choice(quick or running)
            one.end(place)
        return bool(running)

    def _is_slow(self, request: RolloutRequest) -> bool:
        return hash((self._slow, _place(request))) % 4 == 0

    def _submit(self, requests: Sequence[RolloutRequest], finish: Any, progress: Any = None) -> Submission:
        self._submissions.append(Submission(requests, finish))
        return self._submissions[-1]

    def _recorded(self, result: RolloutResult, policy: Policy) -> Rollout:
        rollout = finish(result)
        if rollout.failure is None:
            self._journal[policy.version, _place(result.request)] = rollout
        return rollout

    def _recall(self, requests: Sequence[RolloutRequest], policy: Policy) -> Mapping[int, Rollout]:
        found = {index: self._journal.get((policy.version, _place(one))) for index, one in enumerate(requests)}
        return {index: rollout for index, rollout in found.items() if rollout is not None}


def _place(request: RolloutRequest) -> Place:
    return request.batch, request.group, request.member


def train(run: Run, schedule: Schedule, number: int) -> list[EndedGroup]:
    steps = schedule.steps()

    def examples(batch: int) -> list[dict[str, Any]]:
        return [example(batch * schedule.per_batch + task) for task in range(schedule.per_batch) for _ in "ab"]

    def ahead(batch: int) -> tuple[list[dict[str, Any]], int] | None:
        is_known = batch < len(steps) and steps[batch][1] == steps[number][1]
        return (examples(batch), steps[batch][0]) if is_known else None

    run.world.version = steps[number][0] - 1
    info = BatchInfo(run="run", step=steps[number][0], mode="train")
    batch = run.batches.train(examples(number), NUM_MEMBERS, number=number, info=info, ahead=ahead)
    return [group.ended for group in batch.groups]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    accumulation, max_staleness = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([0, 1, 2, 2, 3, 4]))
    most = max_staleness * accumulation if max_staleness else 4
    return Schedule(
        per_batch=draw(st.integers(1, 3)),
        generate_every=draw(st.integers(1, min(most, 4))),
        accumulation=accumulation,
        in_epoch=draw(st.integers(3, 6)),
        max_staleness=max_staleness,
        num_ahead=draw(st.integers(1, 4)),
        in_order=draw(st.sampled_from([False, False, False, True])),
        drops=draw(st.booleans()),
    )


@settings(max_examples=60)
@given(schedules(), st.sets(st.integers(1, 11), max_size=5), st.integers(0, 4), st.integers(0, 10**6))
def test_every_task_is_trained_once_and_in_time(
    schedule: Schedule, kills: set[int], later_staleness: int, seed: int
) -> None:
    """A kill goes back to the checkpoint before; the run that follows may be allowed another staleness."""
    draw, journal = random.Random(seed), dict[tuple[int, Place], Rollout]()
    run, trained, saved = Run(schedule, draw, journal), [list[EndedGroup]()], [QueueState()]
    number, num_batches = 0, len(schedule.steps())
    while number < num_batches:
        if number in kills:
            kills = kills - {number}
            run.queue.abandon()
            number = max(number - draw.randrange(2), 0)
            can_be = later_staleness * schedule.accumulation >= schedule.generate_every
            allowed = later_staleness if can_be and number else schedule.max_staleness
            schedule = Schedule(**{**schedule.__dict__, "max_staleness": allowed})
            run = Run(schedule, draw, journal)
            run.batches.restore(saved[number])
            trained, saved = trained[: number + 1], saved[: number + 1]
        ended = train(run, schedule, number)
        assert len(ended) == schedule.per_batch
        for group in ended:
            places = {(one.request.batch, one.request.group) for one in group.rollouts}
            assert places == {(group.task.batch, group.task.index)}
            assert schedule.steps()[number][0] - 1 - group.born <= schedule.max_staleness
        for _ in range(draw.randrange(8)):  # while it trains
            run.end_one()
        trained.append(ended)
        saved.append(run.batches.state())
        number += 1
    tasks = sorted((group.task.batch, group.task.index) for own in trained for group in own)
    assert tasks == [(batch, index) for batch in range(num_batches) for index in range(schedule.per_batch)]
    assert not run.in_flight
