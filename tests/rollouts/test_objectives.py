"""Reward components as columns of TRL's, on prepared rollouts; TRL's own trainer says what comes of columns."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.gradient import (
    NUM_MEMBERS,
    Case,
    PreparedTrainer,
    lean,
    make_reference,
    make_trainer,
    save_model,
    tasks,
    trajectory_of,
)
from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError
from trl_gym.gym.client import MAX_REWARD
from trl_gym.rollouts.objectives import Columns, Objectives, component_problem, fill_table
from trl_gym.rollouts.rollout import RolloutFacts

FAILED = {(0, 1), (1, 0), (2, 3)}
WEIGHTS = {"gym": 0.5, "correct": 2.0, "format": 0.25, "short": 1.0}


def components(task: int, member: int) -> dict[str, Any] | None:
    """Task 0 has two, which make its reward; of task 1 one member lacks one, and another has nothing to say of one;
    task 2 has none."""
    reward = trajectory_of(task, member)[1]
    if task == 2:
        return [None, {}][member % 2]
    if task == 0:
        return {"correct": reward / 4, "format": 3 * reward / 4}
    found = {"short": float(member), "correct": reward, "format": float(member % 2)}
    return {1: found | {"short": None}, 3: {"correct": 0.75}}.get(member, found)


CASE = Case(name="components", failed=FAILED, components=components, options={"gym_reward_components": True})


def options(**changes: Any) -> Case:
    return dataclasses.replace(CASE, options=CASE.options | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = save_model(tmp_path_factory.mktemp("model"))
    with lean():
        yield folder


def column(name: str) -> Callable[..., list[float | None]]:
    """The same numbers as a reward function of TRL's, which returns None where it does not apply."""

    def function(place: list[tuple[int, int]], **_: Any) -> list[float | None]:
        return [
            None
            if (task, member) in FAILED
            else (components(task, member) or {"gym": trajectory_of(task, member)[1]}).get(name)
            for task, member in place
        ]

    function.__name__ = name
    return function


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [("sum_then_normalize", "group"), ("sum_then_normalize", "batch"), ("normalize_then_sum", "group")],
)
def test_advantages_are_those_of_trl_given_the_same_functions_bit_for_bit(
    model: Path, tmp_path: Path, aggregation: str, scale: str
) -> None:
    case = options(multi_objective_aggregation=aggregation, scale_rewards=scale, reward_weights=WEIGHTS)
    trainer = make_trainer(model, case, tmp_path / "gym")
    trainer.train()
    reference = make_reference(
        model,
        dataclasses.replace(case, failed=()),
        tmp_path / "trl",
        *map(column, WEIGHTS),
        reward_weights=list(WEIGHTS.values()),
    )
    reference.train()
    assert list(trainer._logs["advantages"]) == list(reference._logs["advantages"])
    assert len(set(trainer._logs["advantages"])) > 6
    [ours, theirs] = (one.state.log_history[0] for one in (trainer, reference))
    names = {name for name in theirs if name.startswith("reward")}
    assert {f"rewards/{name}/std" for name in WEIGHTS} < names
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    alone = [reward for reward in trainer._logs["rewards"]["gym"] if not math.isnan(reward)]
    assert alone == pytest.approx([trajectory_of(2, member)[1] for member in range(3)])
    assert list(trainer._logs["rewards"]) == list(WEIGHTS)


def test_reward_functions_come_beside_components_and_what_is_odd_is_told_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def brief(completions: list[Any], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    case = options(reward_weights=WEIGHTS | {"brief": 0.0}, max_steps=2, num_iterations=1)
    trainer = make_trainer(model, dataclasses.replace(case, num_tasks=3), tmp_path, reward_funcs=brief)
    trainer.train()
    assert trainer.reward_func_names == [*WEIGHTS, "brief"] and trainer.state.log_history[0]["rewards/brief/mean"] == 1
    [lacking] = [one for one in caplog.messages if "lack components" in one]
    assert lacking.startswith("8 of 9 rollouts of arithmetic lack components that others have (task 0: `short`)")
    [odd] = [one for one in caplog.messages if "do not add up" in one]
    assert "The components of arithmetic do not add up to its reward (task 1: " in odd
    logged = trainer.state.log_history[0]
    assert logged["gym/arithmetic/reward_components_gap"] > 0.1
    assert trainer.args.reward_weights == case.options["reward_weights"]


def test_evaluation_sets_with_other_components_have_one_table(model: Path, tmp_path: Path) -> None:
    """Three batches, each of which has other columns."""
    case = options(num_generations_eval=2, per_device_eval_batch_size=2, log_completions=True)
    trainer: PreparedTrainer = make_trainer(model, case, tmp_path)
    found = trainer.evaluate(tasks([2, 0, 1]))
    assert found["eval_rewards/correct/mean"] > 0 and found["eval_rewards/gym/mean"] > 0
    assert trainer.evaluate(tasks([2]))["eval_rewards/gym/mean"] == pytest.approx(
        sum(trajectory_of(2, member)[1] for member in range(2)) / 2
    )


def test_what_cannot_be_trained_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names 'correct', and not 'gym', 'format', 'short'.*0 leaves one out"):
        make_trainer(model, options(reward_weights={"correct": 1.0}), tmp_path).train()
    with pytest.raises(ConfigError, match="The component 'format' of `reward_components` has the name of a reward fu"):
        make_trainer(model, CASE, tmp_path, reward_funcs=column("format")).train()
    named = Case(name="named", failed=(), components=lambda *_: {"gym": 1.0}, options=CASE.options)
    with pytest.raises(ConfigError, match="The component 'gym' of `reward_components` has the name of the column of"):
        make_trainer(model, named, tmp_path).train()

    class Own(PreparedTrainer):
        def compute_rewards(self, rollouts: Any) -> list[float | None]:
            return [1.0 for _ in rollouts]

    args = GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True, gym_reward_components=True)
    with pytest.raises(ConfigError, match=r"`compute_rewards` is overridden as .*Own.compute_rewards"):
        Own(CASE, model=str(model), args=args, train_dataset=tasks(range(8)))


def test_weights_by_name_without_components(model: Path, tmp_path: Path) -> None:
    case = Case(name="named", failed=(), options={"reward_weights": {"brief": 0.25, "gym": 2.0}})
    trainer = make_trainer(model, case, tmp_path, reward_funcs=column("brief"))
    assert trainer.reward_weights.tolist() == [2.0, 0.25] and trainer.args.reward_weights == {"brief": 0.25, "gym": 2}
    with pytest.raises(ConfigError, match="`reward_weights` names 'brief', 'gym', and not 'other'"):
        make_trainer(model, case, tmp_path, reward_funcs=column("other"))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["1", "0.5"], [1.0, 0.5]), ([1, 0.5], [1.0, 0.5]), (['{"a": 1}'], {"a": 1.0}), ('{"a": 2}', {"a": 2.0}),
        ({"a": 3}, {"a": 3.0}), (None, None), (["x"], ConfigError), ({"a": None}, ConfigError), (2, ConfigError),
        (["{1"], ConfigError), ({"a": math.inf}, ConfigError),
    ],
)  # fmt: skip
def test_weights_are_numbers_or_named(tmp_path: Path, given: Any, read: Any) -> None:
    def config(**changes: Any) -> GymGRPOConfig:
        return GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True, reward_weights=given, **changes)

    if read is ConfigError:
        with pytest.raises(ConfigError, match="`reward_weights` is"):
            config()
        return
    assert config().reward_weights == read
    if isinstance(read, list):
        with pytest.raises(ConfigError, match="components have names, no order"):
            config(gym_reward_components=True)


# -- without a trainer ------------------------------------------------------------------------------------------------


def objectives(**changes: Any) -> Objectives:
    args: Any = type("Args", (), {"gym_reward_components": True, "reward_weights": None} | changes)
    return Objectives(args=args, given=Columns([None], ["gym"], [None], torch.ones(1)))


def fact(task: int, found: dict[str, float], **changes: Any) -> RolloutFacts:
    given: dict[str, Any] = {
        "agent": "a", "group": "g", "task": task, "is_valid": True, "trained_reward": 1.0, "reward": 1.0,
        "success": 1.0, "failure": None, "drift": None, "has_tokens": True, "attempts": 1, "seconds": 1.0,
    }  # fmt: skip
    return RolloutFacts(**given | {"components": found} | changes)


def test_columns_are_those_of_the_batch_and_its_trained_rollouts() -> None:
    batch = [fact(0, {"b": 1.0}), fact(1, {"a": 1.0}), fact(2, {"c": 1.0}, is_valid=False)]
    columns = objectives()
    assert columns.columns(batch).names == ["a", "b"]
    assert columns.columns([fact(0, {}), *batch]).names == ["gym", "a", "b"]
    assert columns.columns(batch).names == objectives().columns(batch).names  # as after a resume
    assert columns.columns([]).names == ["gym"]


@pytest.mark.parametrize(
    ("first", "second", "summed", "normalized"),
    [
        ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, 0.0, 1.0),  # equal sums of other parts
        ({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.5}, 0.0, 0.0),
        ({"a": 1.0}, {"a": 1.0, "b": 0.5}, 0.5, 0.0),  # TRL normalizes a column of one to nothing
        ({"a": 1.0, "c": 3.0}, {"a": 1.0, "c": 5.0}, 0.0, 0.0),  # c weighs nothing
    ],
)
def test_a_group_is_flat_in_what_trl_compares(
    first: dict[str, float], second: dict[str, float], summed: float, normalized: float
) -> None:
    pairs: list[Any] = [
        (type("R", (), {"answer": {"reward_components": own}}), 0.0) for own in (first, second)
    ]  # fmt: skip
    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    for aggregation, expected in (("sum_then_normalize", summed), ("normalize_then_sum", normalized)):
        own = objectives(reward_weights=weights, multi_objective_aggregation=aggregation)
        assert own.apart(pairs) == expected


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, None), ({}, None), ({"x": 1, "y": None, "z": True}, None), ([1.0], "a mapping from names to numbers"),
        ({"x": math.nan}, "`reward_components['x']` is 'nan'"), ({"x": "1"}, "['x']"), ({"x": -1e16}, "-1e+16"),
        ({"x": math.inf}, "inf"), ({"x": MAX_REWARD}, None),
    ],
)  # fmt: skip
def test_a_component_that_is_no_number_is_named(found: Any, words: str | None) -> None:
    problem = component_problem({"reward": 1.0, "reward_components": found})
    assert problem is None if words is None else words in (problem or "")


@given(st.lists(st.sets(st.sampled_from("abc"), min_size=1), min_size=1, max_size=6), st.integers(4, 12))
def test_columns_of_a_table_are_of_one_length(batches: list[set[str]], newest: int) -> None:
    table: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=newest))
    logged: deque[int] = deque(maxlen=newest)
    for number, names in enumerate(batches):
        fill_table(table, sorted(names), num_logged=len(logged), num_rollouts=NUM_MEMBERS)
        logged.extend([number] * NUM_MEMBERS)
        for name in names:
            table[name].extend([float(number)] * NUM_MEMBERS)
        assert {len(values) for values in table.values()} == {len(logged)}
        for name, values in table.items():
            shown = [batch if name in batches[batch] else None for batch in logged]
            assert [None if math.isnan(value) else value for value in values] == shown
