"""Which tasks a curriculum draws: in proportion to weights, alike on all ranks, and on after a checkpoint."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import ConfigError
from trl_gym.rollouts.pools import Pool, PoolWeights, TaskPools
from trl_gym.rollouts.rollout import RolloutFacts

NUM_TASKS = 6
Observed = list[tuple[int, float | None]]  # task and success of each rollout


def data(agents: Sequence[str | None] = ("a",) * NUM_TASKS, tasks: Sequence[int] | None = None) -> Dataset:
    indices = range(len(agents)) if tasks is None else tasks
    return Dataset.from_list(
        [{"task_index": task, "agent": agent} for task, agent in zip(indices, agents, strict=True)]
    )


DATA = data()


def fact(task: int, success: float | None, agent: str = "a") -> RolloutFacts:
    known = {"reward": success, "success": success, "trained_reward": success, "is_valid": success is not None}
    return RolloutFacts(
        agent=agent,
        group=f"train-b0-g{task}",
        task=task,
        failure=None if success is not None else "deadline",
        drift=None,
        has_tokens=True,
        attempts=1,
        seconds=1.0,
        **known,
    )


def shown(batches: Sequence[Observed], **options: Any) -> TaskPools:
    pools = TaskPools(DATA, **options)
    for batch in batches:
        pools.observe([fact(*one) for one in batch])
    return pools


def chosen(pools: TaskPools, num_groups: int, *, seed: int = 0) -> list[int]:
    """The tasks that groups get when it is the turn of tasks that a sampler draws evenly."""
    turns = random.Random(seed)
    rows = list(DATA)
    return [pools.choose(turns.choice(rows), group)["task_index"] for group in range(num_groups)]


rollouts = st.tuples(st.integers(0, NUM_TASKS - 1), st.none() | st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
observed = st.lists(st.lists(rollouts, max_size=12), max_size=8)


@given(observed, st.integers(0, 5))
def test_draws_follow_from_seed_observations_and_arguments_alone(batches: list[Observed], seed: int) -> None:
    """Whatever a rank was asked before, and in whichever order: groups of two ranks may be asked for on both."""
    one, other = shown(batches, seed=seed), shown(batches, seed=seed)
    groups = range(8)
    expected = [one.choose(DATA[group % NUM_TASKS], group) for group in groups]
    assert [other.choose(DATA[group % NUM_TASKS], group) for group in reversed(groups)] == expected[::-1]


@given(observed, observed, st.sampled_from([1.0, 7.5, 100.0]))
def test_a_checkpoint_changes_nothing(before: list[Observed], after: list[Observed], half_life: float) -> None:
    whole = shown(before + after, half_life=half_life)
    state = shown(before, half_life=half_life).state_dict()
    written = io.BytesIO()
    torch.save(state, written)
    written.seek(0)
    for read in (json.loads(json.dumps(state)), torch.load(written, weights_only=True)):
        resumed = TaskPools(DATA, half_life=half_life)
        resumed.load_state_dict(read)
        for batch in after:
            resumed.observe([fact(*one) for one in batch])
        assert resumed.state_dict() == whole.state_dict()
        assert chosen(resumed, 20) == chosen(whole, 20)


@given(observed, st.floats(0.01, 9), st.integers(0, 99))
def test_with_equal_weights_every_task_keeps_its_turn(batches: list[Observed], weight: float, group: int) -> None:
    pools = shown(batches, weights=PoolWeights(unknown=weight, never=weight, between=weight, always=weight))
    assert all(pools.choose(example, group) == example for example in DATA)


@given(observed, st.sampled_from(list(Pool)))
def test_a_pool_of_weight_0_is_not_drawn_from_while_there_is_another(batches: list[Observed], pool: Pool) -> None:
    pools = shown(batches, weights=PoolWeights(**{pool: 0.0}))
    others = {task for task in range(NUM_TASKS) if pools.pool_of(task, "a") != pool}
    assert set(chosen(pools, 30)) <= (others or set(range(NUM_TASKS)))
    assert pools.sizes()[pool] == NUM_TASKS - len(others)


# Tasks 0 and 1 are solved never, 2 and 3 always, 4 sometimes; 5 is not known.
ALL_POOLS = [[(task, float(task >= 2)) for task in range(4) for _ in "abcd"] + [(4, 0.0), (4, 1.0), (5, None)]]


def test_tasks_are_in_the_pool_that_their_rollouts_show() -> None:
    pools = shown(ALL_POOLS)
    assert [pools.pool_of(task, "a") for task in range(NUM_TASKS)] == [
        *(Pool.NEVER, Pool.NEVER, Pool.ALWAYS, Pool.ALWAYS, Pool.BETWEEN, Pool.UNKNOWN)
    ]
    assert pools.sizes() == {"unknown": 1, "never": 2, "between": 1, "always": 2}


@pytest.mark.parametrize(
    "weights",
    [
        PoolWeights(),
        PoolWeights(unknown=0.5, never=0.2, between=2, always=0),
        PoolWeights(unknown=0, never=0, between=0, always=3),
    ],
)
def test_in_the_long_run_tasks_are_drawn_in_proportion_to_their_weights(weights: PoolWeights) -> None:
    num_draws = 20_000
    pools = shown(ALL_POOLS, weights=weights)
    expected = [weights.of(pools.pool_of(task, "a")) for task in range(NUM_TASKS)]
    counts = Counter(chosen(pools, num_draws))
    for task, weight in enumerate(expected):
        share = weight / sum(expected)
        assert abs(counts[task] / num_draws - share) <= 5 * (share * (1 - share) / num_draws) ** 0.5


def test_a_task_does_not_always_give_its_turn_to_the_same_one() -> None:
    pools = shown(ALL_POOLS)
    drawn = set()
    for _ in range(20):
        drawn.add(pools.choose(DATA[2], 0)["task_index"])
        pools.observe([])
    assert len(drawn) > 2


def test_what_was_shown_is_forgotten() -> None:
    """Eight failures are half a rollout after four half-lives; eight more, in between, last as much longer."""
    pools = shown([[(0, 0.0)] * 8], half_life=2)
    known = []
    for batch in range(20):
        known.append(pools.pool_of(0, "a") == Pool.NEVER)
        pools.observe([fact(0, 0.0)] * 8 if batch == 3 else [])
    assert known == [True] * (4 + 8 + 1) + [False] * 7


def test_a_task_that_is_solved_no_more_is_never_solved_when_the_successes_have_faded() -> None:
    pools = shown([[(0, 1.0)] * 8], half_life=1)
    rates = []
    for _ in range(7):
        pools.observe([fact(0, 0.0)] * 8)
        rates.append(pools.pool_of(0, "a"))
    assert rates == [Pool.BETWEEN] * 4 + [Pool.NEVER] * 3  # (8/32)/(8/32 + 8 × 1.9…) is 0.016


def test_an_environment_tells_about_its_tasks_that_were_not_rolled_out() -> None:
    rows = data(["easy", "easy", "hard", "hard", None, None])
    pools = TaskPools(rows)
    pools.observe([fact(0, 1.0, "easy"), fact(2, 0.0, "hard"), fact(4, 1.0, "b"), fact(4, 0.0, "b")])
    expected = [Pool.ALWAYS, Pool.ALWAYS, Pool.NEVER, Pool.NEVER, Pool.BETWEEN, Pool.UNKNOWN]
    assert [pools.pool_of(row["task_index"], row["agent"]) for row in rows] == expected
    pools.observe([fact(0, 0.0, "easy")])  # solved sometimes: that tells nothing about another of its tasks
    assert pools.pool_of(1, "easy") == Pool.UNKNOWN


def test_rows_of_a_mixed_dataset_are_drawn_by_their_place() -> None:
    """There, and in a part of a dataset, a row's place is not its task."""
    pools = TaskPools(data(["a"] * 4, [7, 9, 7, 7]), weights=PoolWeights(always=0))
    pools.observe([fact(9, 1.0), fact(7, 0.5)])
    assert pools.sizes() == {"unknown": 0, "never": 0, "between": 3, "always": 1}
    assert {pools.choose({"task_index": 9, "agent": "a"}, group)["task_index"] for group in range(30)} == {7}


def test_fewer_groups_are_without_variance() -> None:
    """Half of the tasks are hopeless, a quarter is easy, a quarter varies: a policy that does not learn."""
    rate_of = [0.0] * 32 + [1.0] * 16 + [0.5] * 16
    rows = data(["a"] * len(rate_of))
    examples = list(rows)

    def fraction_without_variance(weights: PoolWeights) -> float:
        pools, rng = TaskPools(rows, weights=weights), random.Random(0)
        flat = []
        for _ in range(100):
            facts = []
            for group in range(8):
                task = pools.choose(rng.choice(examples), group)["task_index"]
                own = [float(rng.random() < rate_of[task]) for _ in range(8)]
                flat.append(min(own) == max(own))
                facts += [fact(task, success) for success in own]
            pools.observe(facts)
        return sum(flat[400:]) / len(flat[400:])

    assert fraction_without_variance(PoolWeights(never=1, always=1)) == pytest.approx(0.75, abs=0.06)
    # 32 × 0.25 + 16 × 0.1 of 25.6, and 1 of 128 groups of the others.
    assert fraction_without_variance(PoolWeights()) == pytest.approx(0.38, abs=0.06)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"weights": PoolWeights(never=-1)}, "weights that are negative"),
        ({"weights": PoolWeights(never=float("nan"))}, "weights that are negative or no numbers"),
        ({"half_life": 0}, "`half_life` 0"),
        ({"low": 0.5, "high": 0.5}, r"`low` 0.5 and `high` 0.5"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        TaskPools(DATA, **options)


@pytest.mark.parametrize("state", [{}, [], {"batches": 1, "tasks": [[0, 1, "x", 0]], "environments": []}])
def test_a_state_of_something_else_is_refused(state: Any) -> None:
    with pytest.raises(ConfigError, match="state of `TaskPools` cannot be read"):
        TaskPools(DATA).load_state_dict(state)
