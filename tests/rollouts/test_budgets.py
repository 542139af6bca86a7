"""Budgets from options, and pauses between attempts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import ConfigError, FailureKind
from trl_gym.rollout_options import RolloutOptions
from trl_gym.rollouts.admission import BACKOFF_S, MAX_BACKOFF_S, Budget, backoff_s, budgets_from_options

INFRASTRUCTURE, DEADLINE = FailureKind.INFRASTRUCTURE, FailureKind.DEADLINE


def test_an_agent_overrules_what_it_names_and_keeps_the_rest() -> None:
    options = RolloutOptions(
        deadline=600,
        max_inflight=256,
        retries={"infrastructure": 2, "deadline": 1},
        launch_rate=10.0,
        environments={"slow": {"deadline": 30, "max_inflight": 8}, "flaky": {"retries": {"infrastructure": 5}}},
    )
    budgets = budgets_from_options(options)
    assert (budgets.max_inflight, budgets.launch_rate) == (256, 10.0)
    default = Budget(deadline_s=600, retries={INFRASTRUCTURE: 2, DEADLINE: 1})
    assert budgets.budget_for("any") == default
    assert budgets.budget_for("slow") == Budget(deadline_s=30.0, max_inflight=8, retries=default.retries)
    assert budgets.budget_for("flaky").retries == {INFRASTRUCTURE: 5, DEADLINE: 1}


def test_a_number_of_retries_stands_for_infrastructure() -> None:
    budgets = budgets_from_options(RolloutOptions(environments={"a": {"retries": 3}}))
    assert budgets.budget_for("a").retries == {INFRASTRUCTURE: 3}


def test_each_kind_has_attempts_of_its_own() -> None:
    budget = Budget(deadline_s=1, retries={INFRASTRUCTURE: 2, DEADLINE: 1})
    assert budget.retried_kinds({}) == {INFRASTRUCTURE, DEADLINE}
    assert budget.retried_kinds({INFRASTRUCTURE: 1, DEADLINE: 1}) == {INFRASTRUCTURE}
    assert budget.retried_kinds({INFRASTRUCTURE: 2, DEADLINE: 1}) == frozenset()


def test_unknown_agents_are_named_with_the_closest() -> None:
    environments = {"calculater": {"deadline": 3}, "math": {"deadline": 3}}
    budgets = budgets_from_options(RolloutOptions(environments=environments))
    budgets.check_agents(["calculater", "math"])
    with pytest.raises(
        ConfigError, match=r"'calculater'.*Did you mean 'calculator'\? Use one of its agents: calculator, math"
    ):
        budgets.check_agents(["math", "calculator"])


@given(st.integers(1, 10_000), st.integers())
def test_pauses_double_are_spread_and_end_somewhere(num_failed: int, seed: int) -> None:
    pause = backoff_s(num_failed, random.Random(seed))
    longest = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (num_failed - 1)) if num_failed < 100 else MAX_BACKOFF_S
    assert longest / 2 <= pause <= longest
