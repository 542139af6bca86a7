"""Who may start: never more than the caps and rates allow, nobody forgotten, nobody starved."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gym.errors import ConfigError, FailureKind
from trl_gym.rollout_options import RolloutOptions
from trl_gym.rollouts.admission import Admission, Budget, Budgets, budgets_from_options
from trl_gym.rollouts.attempts import BACKOFF_S, MAX_BACKOFF_S, backoff_s


def budgets(max_inflight: int, **options: Any) -> Budgets:
    return budgets_from_options(RolloutOptions(deadline=1.0, max_inflight=max_inflight, **options))


class Runs:
    """Uses places and counts."""

    def __init__(self, limits: Budgets) -> None:
        self.admission = Admission(limits)
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.order: list[str] = []

    async def run(self, agent: str, num_turns: int = 1) -> None:
        async with self.admission.place(agent):
            self.order.append(agent)
            self.now[agent] += 1
            self.most[agent] = max(self.most[agent], self.now[agent])
            self.most[""] = max(self.most[""], self.now.total())
            for _ in range(num_turns):
                await asyncio.sleep(0)
            self.now[agent] -= 1


agents = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), st.booleans()), max_size=30)


@settings(deadline=None)
@given(agents, st.integers(1, 5), st.integers(1, 3))
def test_the_caps_hold_and_everybody_comes_in(who: list[tuple[str, int, bool]], cap: int, own: int) -> None:
    async def go() -> Runs:
        runs = Runs(budgets(cap, environments={"a": {"max_inflight": own}}))
        tasks = [asyncio.create_task(runs.run(agent, turns)) for agent, turns, _ in who]
        await asyncio.sleep(0)
        for task, (_, _, is_cancelled) in zip(tasks, who, strict=True):
            if is_cancelled:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(5):  # every place is free again, also those of the cancelled
            await asyncio.gather(*(runs.run("b") for _ in range(cap)))
        return runs

    runs = asyncio.run(go())
    assert runs.most[""] <= cap and runs.most["a"] <= own
    assert len(runs.order) >= cap + sum(not is_cancelled for *_, is_cancelled in who)


async def test_places_go_to_the_agent_with_the_fewest() -> None:
    runs = Runs(budgets(4))
    await asyncio.gather(*(runs.run("a", 50) for _ in range(10)), *(runs.run("b", 1) for _ in range(10)))
    assert Counter(runs.order[:4]) == {"a": 2, "b": 2}
    assert runs.order.index("b") < 4 and Counter(runs.order[4:12]) == {"b": 8}


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.integers(1, 3))
def test_of_an_agent_the_older_collection_goes_first(who: list[tuple[int, bool]], cap: int) -> None:
    """Also what asks later than the younger one's, as a further attempt does; those of one collection in turn."""
    started: list[tuple[int, int]] = []

    async def go() -> None:
        admission = Admission(budgets(cap))
        may_end = asyncio.Event()

        async def hold() -> None:
            async with admission.place("a"):
                await may_end.wait()

        async def run(since: int, number: int) -> None:
            async with admission.place("a", since):
                started.append((since, number))

        holders = [asyncio.create_task(hold()) for _ in range(cap)]
        await asyncio.sleep(0.001)
        tasks = [asyncio.create_task(run(since, number)) for number, (since, _) in enumerate(who)]
        await asyncio.sleep(0)
        for task, (_, is_cancelled) in zip(tasks, who, strict=True):
            if is_cancelled:
                task.cancel()
        may_end.set()
        await asyncio.gather(*holders, *tasks, return_exceptions=True)

    asyncio.run(go())
    assert started == sorted((since, number) for number, (since, is_cancelled) in enumerate(who) if not is_cancelled)


async def test_a_waiting_rollout_of_a_full_agent_holds_no_place() -> None:
    runs = Runs(budgets(3, environments={"a": {"max_inflight": 1}}))
    await asyncio.gather(*(runs.run("a", 20) for _ in range(5)), *(runs.run("b", 20) for _ in range(4)))
    assert runs.most == {"a": 1, "b": 2, "": 3}


@pytest.mark.parametrize("options", [{"launch_rate": 50.0}, {"environments": {"a": {"launch_rate": 50.0}}}])
async def test_starts_are_spaced(options: dict[str, Any]) -> None:
    loop, starts = asyncio.get_running_loop(), []
    admission = Admission(budgets(100, **options))

    async def run() -> None:
        async with admission.place("a"):
            starts.append(loop.time())

    await asyncio.gather(*(run() for _ in range(8)))
    assert starts[-1] - starts[0] >= 7 / 50 - 0.001


async def test_an_agents_rate_does_not_slow_the_others() -> None:
    runs = Runs(budgets(10, environments={"a": {"launch_rate": 5.0}}))
    await asyncio.gather(*(runs.run("a") for _ in range(3)), *(runs.run("b") for _ in range(5)))
    assert runs.order[1:6] == ["b"] * 5


# -- budgets from options, and pauses between attempts ----------------------------------------------------------------


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
