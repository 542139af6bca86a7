from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rollouts.test_metrics import fact
from trl_gym.errors import RolloutError
from trl_gym.rollouts.batch import SharedBatch
from trl_gym.rollouts.evaluation import (
    EvaluationProgress,
    attempt_metrics,
    evaluation_metrics,
    ks,
    pass_at_k,
    preserved_rng,
    set_name,
    table_beside,
)
from trl_gym.rollouts.rollout import RolloutFacts


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_success(attempts: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(attempts)))
    draws = list(itertools.combinations(attempts, k))
    assert pass_at_k(len(attempts), sum(attempts), k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_exact_for_large_numbers() -> None:
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)
    assert pass_at_k(10_000, 10_000, 128) == 1.0


@pytest.mark.parametrize("numbers", [(3, 1, 4), (3, 4, 1), (3, 1, 0), (0, 0, 1), (3, -1, 1)])
def test_too_few_attempts_are_no_estimate(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(*numbers)


def test_which_k() -> None:
    assert [ks(n) for n in (1, 2, 3, 6, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_failed_attempts_are_no_attempts() -> None:
    """Of the second task one attempt of two is left: it says something of pass@1 and nothing of pass@2."""
    metrics = attempt_metrics([[1.0, 0.0], [1.0], []], 2)
    assert metrics == {
        "pass@1": 0.75,
        "pass@1/tasks": 2.0,
        "pass@2": 1.0,
        "pass@2/tasks": 1.0,
        "mean@2": 0.75,
    }
    assert attempt_metrics([[]], 2) == {}


def test_partial_success_is_in_the_mean_and_no_pass() -> None:
    assert attempt_metrics([[0.5]], 1) == {"pass@1": 0.0, "pass@1/tasks": 1.0, "mean@1": 0.5}


def test_environments_are_told_apart() -> None:
    facts = [fact(agent=agent, group=f"{agent}-1", success=success) for agent, success in (("x", 1.0), ("y", 0.0))]
    metrics = evaluation_metrics([*facts, fact(agent="y", group="y-2", success=None)], 1)
    assert (metrics["pass@1"], metrics["gym/x/pass@1"], metrics["gym/y/pass@1"]) == (0.5, 1.0, 0.0)
    assert metrics["gym/y/mean@1"] == 0.0


def test_names_of_sets() -> None:
    assert [set_name(prefix) for prefix in ("eval", "eval_hard_sums", "test")] == ["", "hard_sums", "test"]


def _batch(facts: list[RolloutFacts]) -> SharedBatch:
    return SharedBatch(facts=facts, own=slice(0, len(facts)), causes=Counter())


def test_rows_that_only_fill_the_last_batch_up_do_not_count() -> None:
    run = EvaluationProgress("", 5)
    sizes = [len(run.counted(_batch([fact()] * 4))) for _ in range(3)]
    assert sizes == [4, 1, 0]
    assert len(EvaluationProgress("", None).counted(_batch([fact()] * 4))) == 4


def test_an_evaluation_that_mostly_failed_is_none() -> None:
    run = EvaluationProgress("hard", 4, causes=Counter({"deadline (x): late": 3}))
    run.counted(_batch([fact(), *[fact(is_valid=False)] * 3]))
    run.check(0.25)
    with pytest.raises(RolloutError, match=r"(?s)Only 1 of the 4 rollouts of the evaluation of 'hard'.*3 × deadline"):
        run.check(0.5)
    EvaluationProgress("", 0).check(0.5)  # an empty set


def test_random_states_are_as_they_were() -> None:
    def draw() -> list[Any]:
        return [random.random(), numpy.random.rand(), torch.rand(()).item()]

    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    expected = draw() + draw()
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    first = draw()
    with pytest.raises(KeyError), preserved_rng():
        draw()
        raise KeyError  # also then
    assert first + draw() == expected


def test_tables_of_evaluation_lie_beside_those_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "completions"
    folder.mkdir()
    table = folder / "completions_00003.parquet"
    table.write_text("training")
    for name in ("", "hard"):
        with table_beside(tmp_path, 3, name):
            table.write_text(f"evaluation {name}")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "completions_00003.parquet": "training",
        "eval_00003.parquet": "evaluation ",
        "eval_hard_00003.parquet": "evaluation hard",
    }
