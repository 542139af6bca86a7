"""Which rollouts count."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from trl_gym.errors import RolloutError
from trl_gym.rollouts.batch import SharedBatch, checked_rewards
from trl_gym.rollouts.rollout import RolloutFacts


def test_nan_is_no_reward() -> None:
    assert checked_rewards([1, None, math.nan, 0.5], 4) == [1.0, None, None, 0.5]


def test_wrong_rewards_are_named() -> None:
    with pytest.raises(RolloutError, match="returned 2 rewards for 3 rollouts"):
        checked_rewards([1.0, 2.0], 3)
    with pytest.raises(RolloutError, match="returned 'inf' for rollout 1"):
        checked_rewards([1.0, math.inf], 2)
    for odd in ("x", [1], 10**400, 1e16):
        with pytest.raises(RolloutError, match="for rollout 0"):
            checked_rewards([odd], 1)


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
    assert kept.own_dropped == [0, None, 0, None, None, None]
    assert shared(groups, [0] * 6, [True] * 6).without_small_groups(2).own_dropped == [0] * 6


def test_a_group_of_several_tasks_is_refused() -> None:
    shared(["b-g0", "b-g0", "b-g1", "b-g1"], [0] * 4, [True] * 4).without_small_groups(2)  # one task, two groups
    with pytest.raises(RolloutError, match=r"Group b-g1 has rollouts of the tasks \('a', 1\) and \('a', 2\)"):
        shared(["b-g0", "b-g1", "b-g1"], [0, 1, 2], [True] * 3).without_small_groups(2)
