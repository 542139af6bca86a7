"""Which groups a generation batch is made of, and how those that teach nothing are replaced, on a scripted source."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rollouts.recorded import request, rollout
from tests.test_ranks import on_ranks
from trl_gym.batches import Batches, GenerationBatch, Refill, RewardedGroup, group_parts, step_of_batch
from trl_gym.errors import ConfigError, FailureKind, RolloutError, RolloutFailure
from trl_gym.resume import QueueState
from trl_gym.rollouts.queue import EndedGroup, TaskGroup
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import BatchInfo, Collected

NUM_MEMBERS = 4
SPREAD, EQUAL, TOO_FEW = "spread", "equal", "too few"
Outcome = Callable[[int], str]
"""What a task's group is like."""


def example(task: int) -> dict[str, Any]:
    row = {"responses_create_params": {"input": f"{task} + 1?"}, "expected": task + 1}
    return {"task_index": task, "gym_row": json.dumps(row)}


def plan(example: dict[str, Any], *, step: int, batch: int, group: int, members: Sequence[int]) -> TaskGroup:
    place = {"step": step, "batch": batch}
    requests = [
        dataclasses.replace(
            request(example["task_index"], member, group, rollout_id=f"b{batch}-g{group}-m{member}"), **place
        )
        for member in members
    ]
    return TaskGroup(batch=batch, index=group, example=example, requests=tuple(requests), num_wanted=len(members))


def rolled_out(asked: RolloutRequest, outcome: Outcome) -> Rollout:
    kind = outcome(asked.task_index)
    if kind == TOO_FEW and asked.member > 0:
        failure = RolloutFailure(kind=FailureKind.DEADLINE, text="late", where="a /run")
        return rollout(asked, failure=failure.of(**asked.identity, seconds=1.0))
    # As float32 a mean of three times 0.1 is another number than 0.1.
    return rollout(asked, reward=0.1 if kind == EQUAL else float(asked.member))


class Source:
    """Rollouts that are there when they are asked for, in the order in which `order` puts what is in flight."""

    def __init__(
        self, outcome: Outcome, order: Callable[[list[TaskGroup]], list[TaskGroup]] = lambda groups: groups
    ) -> None:
        self.outcome, self._order = outcome, order
        self.in_flight: list[TaskGroup] = []
        self.asked: list[tuple[list[int], int, BatchInfo]] = []  # tasks, groups to return, batch

    def collect(self, groups: Sequence[TaskGroup], number: int, batch: BatchInfo) -> Collected:
        self.asked.append(([group.example["task_index"] for group in groups], number, batch))
        self.in_flight = self._order([*self.in_flight, *groups])
        taken, self.in_flight = self.in_flight[:number], self.in_flight[number:]
        ended = [
            EndedGroup(
                task=task, rollouts=[rolled_out(one, self.outcome) for one in task.requests], born=batch.step - 1
            )
            for task in taken
        ]
        return Collected(groups=ended, metrics={"engine/running": [float(len(self.asked))]})


def batches(
    source: Source, num_tasks: int = 100, num_rounds: int = 3, *, rank: int = 0, num_ranks: int = 1, **changes: Any
) -> Batches:
    data = [example(task) for task in range(num_tasks)]
    options: dict[str, Any] = {
        "choose": lambda example, group: example,
        "plan": plan,
        "reward": lambda rollouts: [one.reward for one in rollouts],
        "options": {"gym_max_staleness": 2, "num_generations": 2},
        "refill": Refill(dataset=data, num_rounds=num_rounds, min_group_size=2, seed=1) if num_rounds else None,
    }
    process: Any = SimpleNamespace(process_index=rank, num_processes=num_ranks)
    return Batches(process, source, **options | changes)  # type: ignore[arg-type]


def train(
    made: Batches, tasks: Sequence[int], number: int = 0, ahead: Callable[[int], Sequence[int] | None] | None = None
) -> GenerationBatch:
    def examples(tasks: Sequence[int]) -> list[dict[str, Any]]:
        return [example(task) for task in tasks for _ in range(NUM_MEMBERS)]

    def coming(other: int) -> tuple[list[dict[str, Any]], int] | None:
        found = None if ahead is None else ahead(other)
        return None if found is None else (examples(found), other + 1)

    info = BatchInfo(run="r", step=number + 1, mode="train")
    return made.train(examples(tasks), NUM_MEMBERS, number=number, info=info, ahead=coming)


def tasks_of(groups: Sequence[RewardedGroup]) -> list[int]:
    return [group.ended.task.example["task_index"] for group in groups]


def teaching(*tasks: int) -> Outcome:
    return lambda task: SPREAD if task in tasks else EQUAL


# -- rounds -----------------------------------------------------------------------------------------------------------


def test_groups_are_replaced_in_their_places_until_all_teach() -> None:
    """Tasks that are not of the first batch teach in one case out of three."""
    source = Source(lambda task: SPREAD if task == 1 or (task > 3 and task % 3 == 0) else (EQUAL, TOO_FEW)[task % 2])
    batch = train(batches(source, num_rounds=20), [0, 1, 2, 3])
    assert tasks_of(batch.groups)[1] == 1 and all(group.teaches(2) for group in batch.groups)
    assert [sorted(tasks) for tasks, _, _ in source.asked[:1]] == [[0, 1, 2, 3]]
    # Each round asks for as many as are lacking, and no task twice.
    rounds = [tasks for tasks, _, _ in source.asked[1:]]
    lacking = 3
    for tasks in rounds:
        assert len(tasks) == lacking
        lacking -= sum(source.outcome(task) == SPREAD for task in tasks)
    assert lacking == 0 and len(rounds) > 2
    drawn = [task for tasks in rounds for task in tasks]
    assert len(set(drawn)) == len(drawn) and not {0, 1, 2, 3} & set(drawn)
    assert sorted(tasks_of(batch.replaced) + tasks_of(batch.groups)) == sorted([0, 1, 2, 3, *drawn])
    assert [example["task_index"] for example in batch.examples[::NUM_MEMBERS]] == tasks_of(batch.groups)
    # Groups of further tasks have indices of their own, and are of this batch.
    indices = [group.ended.task.index for group in (*batch.groups, *batch.replaced)]
    assert sorted(indices) == list(range(4 + len(drawn)))
    assert {group.ended.task.batch for group in batch.groups} == {0}


def test_what_a_batch_was_before_is_logged() -> None:
    source = Source(lambda task: {0: SPREAD, 1: EQUAL, 2: TOO_FEW}.get(task, SPREAD if task % 2 else EQUAL))
    batch = train(batches(source, num_rounds=1), [0, 1, 2])
    further = source.asked[1][0]
    assert batch.metrics == {
        "engine/running": [2.0],  # of both rounds, the source says
        "refill/reward_before": [0.0, 1.0, 2.0, 3.0, *[0.1] * 4, 0.0],
        "refill/zero_variance_before": [0.0, 1.0, 0.0],
        "refill/too_small_before": [0.0, 0.0, 1.0],
        "refill/left_fraction": [0.0, *(float(task % 2 == 0) for task in further)],
        "refill/groups_replaced": [2.0],
        "refill/rounds": [1.0],
    }
    assert [reward for _, reward in batch.replaced_rollouts] == [*[0.1] * 4, 0.0, None, None, None]


def test_a_batch_that_teaches_is_left_alone_and_rounds_are_announced() -> None:
    source = Source(teaching(0, 1))
    batch = train(batches(source), [0, 1])
    assert not batch.replaced and len(source.asked) == 1
    assert batch.metrics["refill/rounds"] == batch.metrics["refill/groups_replaced"] == [0.0]
    source = Source(teaching())
    train(batches(source, num_rounds=2), [0, 1])
    assert [(info.is_first, info.is_last) for *_, info in source.asked] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    source = Source(teaching())
    batch = train(batches(source, num_rounds=0), [0, 1])
    assert [(info.is_first, info.is_last) for *_, info in source.asked] == [(True, True)]
    assert not any(name.startswith("refill/") for name in batch.metrics)


def test_what_never_teaches_is_trained_as_it_is() -> None:
    for outcome in (EQUAL, TOO_FEW):
        source = Source(lambda task, outcome=outcome: outcome)  # type: ignore[misc]
        batch = train(batches(source, num_rounds=3), [0, 1])
        assert (len(batch.groups), len(batch.replaced), len(source.asked)) == (2, 6, 4)
        assert batch.metrics["refill/left_fraction"] == [1.0, 1.0]
        assert batch.metrics["refill/groups_replaced"] == [6.0]


def test_a_small_dataset_is_rolled_out_again_and_never_twice_in_a_round() -> None:
    source = Source(teaching())
    batch = train(batches(source, num_tasks=3, num_rounds=3), [0, 1])
    first, *others = (tasks for tasks, _, _ in source.asked[1:])
    assert first[0] == 2 and first[1] in (0, 1)  # what the batch does not have comes first
    assert all(len(set(tasks)) == 2 for tasks in others)
    source = Source(teaching())
    batch = train(batches(source, num_tasks=1, num_rounds=2), [0, 0])
    assert [tasks for tasks, _, _ in source.asked] == [[0, 0], [0], [0]]
    assert (len(batch.groups), len(batch.replaced), batch.metrics["refill/groups_replaced"]) == (2, 2, [2.0])


def test_a_task_is_known_by_what_it_asks() -> None:
    """Row numbers say nothing where datasets are mixed, filtered or concatenated."""
    data = [{**example(task % 5), "task_index": task} for task in range(50)]
    source = Source(lambda task: EQUAL)
    made = batches(source, refill=Refill(dataset=data, num_rounds=2, min_group_size=2, seed=3))
    train(made, [0, 1])
    asked = [{task % 5 for task in tasks} for tasks, _, _ in source.asked]
    assert asked[1] | asked[2] >= {2, 3, 4} and len(asked[1]) == 2 and not asked[1] & {0, 1}


@pytest.mark.parametrize("rewards", [[0.1] * 6, [0.3, 0.1 + 0.2], [1e15, 1e15]])
def test_equal_rewards_are_equal_whatever_their_mean_is_rounded_to(rewards: list[float]) -> None:
    requests = [request(0, member) for member in range(len(rewards))]
    ended = EndedGroup(
        task=plan(example(0), step=1, batch=0, group=0, members=range(len(rewards))),
        rollouts=[rollout(one) for one in requests],
        born=0,
    )
    group = RewardedGroup(ended=ended, rewards=list(rewards))
    assert group.is_flat and not group.teaches(2)
    assert RewardedGroup(ended=ended, rewards=[*rewards[:-1], rewards[-1] + 1]).teaches(2)
    # A reward of a rollout without a token teaches nothing.
    untrained = [dataclasses.replace(ended.rollouts[-1], trajectories=[])]
    ended = dataclasses.replace(ended, rollouts=[*ended.rollouts[:-1], *untrained])
    assert not RewardedGroup(ended=ended, rewards=[*rewards[:-1], rewards[-1] + 1]).teaches(2)


def test_groups_of_equal_rewards_stay_where_what_they_are_made_of_differs() -> None:
    source = Source(lambda task: EQUAL)
    batch = train(batches(source, apart=lambda rewarded: 0.0 if rewarded[0][0].request.task_index else 1.0), [0, 1])
    assert tasks_of(batch.groups)[0] == 0 and batch.groups[0].teaches(2) and not batch.groups[1].teaches(2)
    assert [len(tasks) for tasks, _, _ in source.asked] == [2, 1, 1, 1]


def test_further_tasks_are_those_of_the_seed_and_the_batch_and_chosen_again() -> None:
    def drawn(number: int, seed: int = 1) -> list[int]:
        source = Source(teaching())
        data = [example(task) for task in range(100)]
        made = batches(source, refill=Refill(dataset=data, num_rounds=2, min_group_size=2, seed=seed))
        train(made, [0, 1], number)
        return [task for tasks, _, _ in source.asked[1:] for task in tasks]

    assert drawn(5) == drawn(5) != drawn(6)
    assert drawn(5) != drawn(5, seed=2)
    source, asked = Source(teaching()), list[tuple[int, int]]()

    def choose(given: dict[str, Any], group: int) -> dict[str, Any]:
        asked.append((given["task_index"], group))
        return example(given["task_index"] + 100)

    batch = train(batches(source, num_rounds=1, choose=choose), [0, 1])
    assert [group for _, group in asked] == [0, 1, 2, 3]
    assert tasks_of(batch.groups) == [task + 100 for task, _ in asked[2:]]


def test_evaluations_are_not_refilled() -> None:
    source = Source(teaching())
    info = BatchInfo(run="r", step=0, mode="eval")
    batch = batches(source).evaluate([example(task) for task in (0, 0, 1, 1)], 2, number=1, info=info)
    assert (tasks_of(batch.groups), batch.replaced, len(source.asked)) == ([0, 1], [], 1)


# -- ranks ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(3, 40), st.floats(0, 1), st.integers(0, 99)
)
def test_ranks_make_as_many_rounds_and_take_no_task_twice(
    num_ranks: int, per_rank: int, num_rounds: int, num_further: int, chance: float, seed: int
) -> None:
    num_tasks = num_ranks * per_rank + num_further
    draw = random.Random(seed)
    outcomes = [SPREAD if draw.random() < chance else draw.choice([EQUAL, TOO_FEW]) for _ in range(num_tasks)]
    sources = [Source(lambda task: outcomes[task]) for _ in range(num_ranks)]

    def play(rank: int, gather: Any) -> GenerationBatch:
        options = {"num_tasks": num_tasks, "num_rounds": num_rounds, "rank": rank, "num_ranks": num_ranks}
        return train(batches(sources[rank], **options, gather=gather), range(rank * per_rank, (rank + 1) * per_rank))

    made: list[GenerationBatch] = on_ranks(num_ranks, play)
    for batch in made:
        assert isinstance(batch, GenerationBatch), batch
    assert len({len(source.asked) for source in sources}) == 1
    assert all(len(batch.groups) == per_rank for batch in made)
    groups = [group for batch in made for group in (*batch.groups, *batch.replaced)]
    indices = [group.ended.task.index for group in groups]
    assert len(set(indices)) == len(indices)
    asked = collections.Counter(task for source in sources for tasks, _, _ in source.asked for task in tasks)
    if sum(asked.values()) <= num_tasks:
        assert set(asked.values()) == {1}
    if num_rounds:
        told = {(*batch.metrics["refill/groups_replaced"], *batch.metrics["refill/rounds"]) for batch in made}
        assert told == {(float(sum(len(batch.replaced) for batch in made)), float(len(sources[0].asked) - 1))}
        # Nothing is left while there were rounds.
        if len(sources[0].asked) <= num_rounds:
            assert all(group.teaches(2) for batch in made for group in batch.groups)
    for batch in made:
        for group in batch.replaced:
            assert not group.teaches(2)


def test_a_rank_that_lacks_nothing_takes_part() -> None:
    sources = [Source(teaching(*range(2, 100))) for _ in range(2)]
    made = on_ranks(
        2,
        lambda rank, gather: train(
            batches(sources[rank], rank=rank, num_ranks=2, gather=gather), [2 * rank, 2 * rank + 1]
        ),
    )
    assert [number for _, number, _ in sources[0].asked] == [2, 2]
    assert [(tasks, number) for tasks, number, _ in sources[1].asked] == [([2, 3], 2), ([], 0)]
    assert tasks_of(made[1].groups) == [2, 3]
    assert [group.ended.task.index for group in made[0].groups] == [4, 5]


def test_what_fails_on_one_rank_in_a_round_ends_all() -> None:
    sources = [Source(teaching()) for _ in range(2)]

    def reward(rollouts: Sequence[Rollout]) -> list[float | None]:
        if any(one.request.group >= 4 for one in rollouts):
            raise RolloutError("no reward")
        return [one.reward for one in rollouts]

    made = on_ranks(
        2,
        lambda rank, gather: train(
            batches(sources[rank], rank=rank, num_ranks=2, gather=gather, **({"reward": reward} if rank else {})),
            [2 * rank, 2 * rank + 1],
        ),
    )
    assert [str(error) for error in made] == ["rank 1: no reward", "no reward"]


# -- overlap ----------------------------------------------------------------------------------------------------------


def test_with_overlap_as_many_stay_in_flight_and_every_planned_task_is_taken_once() -> None:
    """Ten batches of three tasks, one of which is ahead; whatever is in flight ends in any order, and some teach."""
    draw = random.Random(0)
    source = Source(lambda task: SPREAD if task % 3 else EQUAL, order=lambda groups: draw.sample(groups, len(groups)))
    made = batches(source, num_tasks=1000, num_rounds=2, num_ahead=1, most_ahead=1)
    planned = [range(3 * number, 3 * number + 3) for number in range(10)]
    trained: list[GenerationBatch] = []
    for number in range(10):
        later = min(1, 9 - number)
        trained.append(train(made, planned[number], number, lambda other: planned[other] if other < 10 else None))
        assert len(source.in_flight) == 3 * later
        state = made.state()
        assert [saved["example"]["task_index"] for saved in state.groups] == [
            group.example["task_index"] for group in source.in_flight
        ]
        assert len(trained[-1].groups) == 3
    for tasks, number, info in source.asked:
        assert number == 3 or len(tasks) == number
        assert info.per_batch == 3 and len(info.later_steps) == (info.step < 10)
    taken = [task for batch in trained for task in tasks_of([*batch.groups, *batch.replaced])]
    asked = [task for tasks, _, _ in source.asked for task in tasks]
    assert sorted(taken) == sorted(asked)
    assert {task for tasks in planned for task in tasks} <= set(taken) and len(taken) > 30
    # Groups of further tasks are taken in later batches, too.
    assert any(
        group.ended.task.index >= 3 and group.ended.task.batch < k for k, b in enumerate(trained) for group in b.groups
    )
    places = [(group.ended.task.batch, group.ended.task.index) for b in trained for group in (*b.groups, *b.replaced)]
    assert len(set(places)) == len(places)


def test_groups_that_replace_others_are_not_late_at_first() -> None:
    """Two batches may be ahead, and one is, as long as no group is waited for longer than that."""

    def num_ahead(order: Callable[[list[TaskGroup]], list[TaskGroup]]) -> list[int]:
        source = Source(lambda task: EQUAL if task < 10 else SPREAD, order=order)
        made = batches(source, num_rounds=1, num_ahead=1, most_ahead=2)
        for number in range(3):
            train(made, [2 * number, 2 * number + 1], number, lambda other: [2 * other, 2 * other + 1])
        first = [tasks for tasks, _, info in source.asked if info.is_first]
        return [len(tasks) // 2 for tasks in first]  # the batch itself, and those ahead

    assert num_ahead(lambda groups: groups) == [2, 1, 1]
    # The two groups that replace those of the first batch end last: in the third batch they are late.
    assert num_ahead(lambda groups: sorted(groups, key=lambda group: group.batch == 0 and group.index > 1)) == [
        2,
        1,
        2,
    ]


def test_what_is_in_flight_is_not_drawn_again() -> None:
    """All tasks but one are of this batch or of the next one."""
    source = Source(teaching())
    made = batches(source, num_tasks=5, num_rounds=1, num_ahead=1, most_ahead=1)
    train(made, [0, 1], 0, lambda other: [2, 3] if other == 1 else None)
    assert source.asked[1][0][0] == 4


def test_a_resumed_run_rolls_the_further_groups_in_flight_out_again() -> None:
    source = Source(teaching(), order=lambda groups: groups)
    made = batches(source, num_rounds=1, num_ahead=1, most_ahead=1)
    train(made, [0, 1], 0, lambda other: [2, 3] if other == 1 else None)
    further = source.asked[1][0]
    assert [group.example["task_index"] for group in source.in_flight] == further  # tasks 2 and 3 took their turn
    resumed = batches(again := Source(teaching()), num_rounds=0, num_ahead=1, most_ahead=1)
    resumed.restore(made.state())
    batch = train(resumed, [2, 3], 1)
    assert again.asked[0][0] == further == tasks_of(batch.groups)
    assert [(group.ended.task.batch, group.ended.task.index) for group in batch.groups] == [(0, 2), (0, 3)]


def in_flight_of_another(**options: int) -> QueueState:
    saved = {"example": example(2), "batch": 1, "group": 0, "members": [0, 1], "begun": ("run", 6, "w6")}
    return QueueState(num_planned=2, groups=[saved], options={"gym_max_staleness": 2, "num_generations": 2} | options)


def test_groups_in_flight_fit_no_other_batches_and_those_that_may_become_too_old_begin_anew() -> None:
    source = Source(teaching())
    made = batches(source, num_rounds=0)
    with pytest.raises(ConfigError, match="`num_generations` is 2 and was 4"):
        made.restore(in_flight_of_another(num_generations=4))
    for before, begun in ((1, Policy("run", 6, "w6")), (2, Policy("run", 6, "w6")), (3, None)):
        made.restore(in_flight_of_another(gym_max_staleness=before))
        assert made._planned_again(made._restored[0], 9).begun == begun


def test_groups_in_flight_keep_the_step_that_they_are_sampled_for() -> None:
    """Journal lines of before and after the resume then have the same one; earlier versions saved none."""
    made, saved = batches(Source(teaching()), num_rounds=0), in_flight_of_another().groups[0]
    for changes, step in (({"step": 7}, 7), ({}, 9)):
        assert {request.step for request in made._planned_again(saved | changes, 9).requests} == {step}


def test_a_run_without_groups_in_flight_goes_on_with_other_batches() -> None:
    """Batches are numbered by their length: those that are planned next may have had their numbers before."""
    source = Source(teaching())
    made = batches(source, num_rounds=0)
    made.restore(QueueState(num_planned=10, options={"gym_max_staleness": 0, "steps_per_generation": 2}))
    assert tasks_of(train(made, [0, 1], 5).groups) == [0, 1]


# -- numbers of steps -------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
def test_a_batch_has_the_number_of_the_step_that_trains_it_first(
    steps_per_generation: int, num_iterations: int, accumulation: int, in_epoch: int
) -> None:
    """As transformers walks: micro-step by micro-step, and an epoch's last optimizer step may have fewer of them."""
    generate_every = steps_per_generation * num_iterations
    number_of: list[int] = []  # by micro-step: the number of the optimizer step that it is of
    for _ in range(3):
        num_steps = number_of[-1] if number_of else 0
        number_of += [num_steps + 1 + place // accumulation for place in range(in_epoch * generate_every)]
    for present in range(1, number_of[-1] + 1):
        first = number_of.index(present)
        epoch = first // (in_epoch * generate_every)
        for batch in range(-(-first // generate_every), (epoch + 1) * in_epoch):
            found = step_of_batch(
                batch,
                generate_every=generate_every,
                accumulation=accumulation,
                num_steps=present - 1,
                num_micro_steps=first,
            )
            assert found == number_of[batch * generate_every]


# -- group_parts ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_groups_are_divided_over_ranks(num_members: int, num_groups: int, num_ranks: int) -> None:
    num_examples = num_members * num_groups  # of each rank a part that may end within a group
    share, rest = divmod(num_examples, num_ranks)
    if rest:
        share, num_examples = num_examples, num_examples * num_ranks
    found = collections.defaultdict[int, list[int]](list)
    for rank in range(num_ranks):
        parts = group_parts(share, num_members, rank=rank)
        place = 0
        for group, first, members in parts:
            assert first == place  # parts follow each other without a gap
            place += len(members)
            found[group] += members
        assert place == share
        assert len(parts) == len({group for group, _, _ in parts})
    # In the order of ranks every group has each member once.
    assert dict(found) == {group: list(range(num_members)) for group in range(num_examples // num_members)}
