"""Which rows count, and what the loss is multiplied with for the others; `tests/test_gradient.py` asks TRL's loss."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import ConfigError, RolloutError
from trl_gym.rollouts.batch import LOSS_TYPES, SharedBatch, checked_rewards, mark, weighted
from trl_gym.rollouts.rollout import RolloutFacts

MEAN_OVER_ROWS = ("grpo", "sapo", "luspo", "dr_grpo")


def batch(num_rows: int) -> dict[str, torch.Tensor]:
    return {
        "completion_ids": torch.zeros(num_rows, 2, dtype=torch.long),
        "advantages": torch.arange(1.0, num_rows + 1),
        "num_items_in_batch": torch.tensor(7),
    }


def test_nan_is_no_reward() -> None:
    assert checked_rewards([1, None, math.nan, 0.5], 4) == [1.0, None, None, 0.5]


def test_wrong_rewards_are_named() -> None:
    with pytest.raises(RolloutError, match="returned 2 rewards for 3 rollouts"):
        checked_rewards([1.0, 2.0], 3)
    with pytest.raises(RolloutError, match="returned inf for rollout 1"):
        checked_rewards([1.0, math.inf], 2)


def shared(groups: list[str], tasks: list[int], valid: list[bool]) -> SharedBatch:
    unused: dict[str, Any] = dict.fromkeys(("trained_reward", "reward", "success", "failure", "drift"))
    numbers: dict[str, Any] = {"has_tokens": True, "attempts": 1, "seconds": 0.0}
    facts = [
        RolloutFacts(agent="a", group=group, task=task, is_valid=is_valid, **unused, **numbers)
        for group, task, is_valid in zip(groups, tasks, valid, strict=True)
    ]
    return SharedBatch(facts=facts, own=slice(None), causes=Counter())


def test_groups_are_told_by_name_not_by_place() -> None:
    groups = ["b", "a", "b", "a", "c", "c"]
    kept = shared(groups, [0] * 6, [True, True, True, False, False, False]).without_small_groups(2)
    assert kept.own_valid == [True, False, True, False, False, False]
    assert shared(groups, [0] * 6, [True] * 6).without_small_groups(2).own_valid == [True] * 6


def test_a_group_of_several_tasks_is_refused() -> None:
    shared(["b-g0", "b-g0", "b-g1", "b-g1"], [0] * 4, [True] * 4).without_small_groups(2)  # one task, two groups
    with pytest.raises(RolloutError, match=r"Group b-g1 has rollouts of the tasks \('a', 1\) and \('a', 2\)"):
        shared(["b-g0", "b-g1", "b-g1"], [0, 1, 2], [True] * 3).without_small_groups(2)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_is_touched_when_nothing_failed(loss_type: str) -> None:
    """To the bit: any number of rows and micro-batches."""
    for num_rows, num_micro_batches in ((3, 7), (6, 1), (5, 3)):
        marked = mark(
            batch(num_rows),
            [True] * num_rows,
            num_valid=num_rows * num_micro_batches,
            num_micro_batches=num_micro_batches,
        )
        rows, weight = weighted(marked, loss_type)
        assert weight == 1.0
        assert rows.keys() == batch(num_rows).keys()
        assert torch.equal(rows["advantages"], batch(num_rows)["advantages"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights(loss_type: str) -> None:
    """Two micro-batches of four rows: of this one three count, of the other one two."""
    marked = mark(batch(4), [True, False, True, True], num_valid=5, num_micro_batches=2)
    rows, weight = weighted(marked, loss_type)
    expected = 8 / 5 if loss_type in MEAN_OVER_ROWS else 3 * 2 / 5 if loss_type == "bnpo" else 1.0
    assert weight == pytest.approx(expected)
    torch.testing.assert_close(rows["advantages"], batch(4)["advantages"] * expected)
    assert torch.equal(marked["advantages"], batch(4)["advantages"])  # it may be used for several iterations


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_micro_batch_without_any_takes_part(loss_type: str) -> None:
    """Its weight must not be 0: with `beta` at 0 it would leave out a reduction that the other ranks wait in."""
    assert weighted(mark(batch(2), [False, False], num_valid=3, num_micro_batches=2), loss_type)[1] > 0


def test_an_unknown_loss_is_refused_rather_than_wrong() -> None:
    with pytest.raises(ConfigError, match=r"`loss_type` is 'new'.*grpo"):
        weighted(mark(batch(2), [True, True], num_valid=2, num_micro_batches=1), "new")


def test_a_batch_that_is_not_marked_is_left_alone() -> None:
    assert weighted(batch(2), "grpo")[1] == 1.0


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from(LOSS_TYPES))
def test_weights_make_a_mean_over_what_counts(micro_batches: list[list[bool]], loss_type: str) -> None:
    """Each row's own loss is 1: then the loss over all micro-batches is 1, however the failures are spread."""
    total = sum(map(sum, micro_batches))
    if not total:
        return
    losses = []
    for valid in micro_batches:
        marked = mark(batch(3), valid, num_valid=total, num_micro_batches=len(micro_batches))
        _, weight = weighted(marked, loss_type)
        num_valid = sum(valid)
        if loss_type in MEAN_OVER_ROWS:
            losses.append(weight * num_valid / 3)
        elif loss_type == "bnpo":
            losses.append(weight * (num_valid > 0))
        else:
            losses.append(weight * num_valid * len(micro_batches) / total)
    assert sum(losses) / len(micro_batches) == pytest.approx(1.0)
