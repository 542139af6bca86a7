"""Attempts, environments that hang or are down, and what is said meanwhile; against a local agent over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from tests.conftest import until
from tests.rollouts.fake_agent import Ledger, collect, make, requests
from trl_gym.errors import (
    FailureKind,
    GymServerError,
    GymServerLostError,
    PolicyServerError,
    PolicyServerLostError,
    RolloutFailure,
)
from trl_gym.gym.discovery import servers_gone
from trl_gym.gym.servers import AgentInfo, ServerInstance
from trl_gym.processes import bind_socket
from trl_gym.rollouts.attempts import CollectionStatus, Outstanding, Phase, Tally, describe_stall, waits_for
from trl_gym.rollouts.collector import RolloutResult
from trl_gym.rollouts.ledger import CallState

# -- attempts ---------------------------------------------------------------------------------------------------------


async def test_only_the_missing_rollout_is_run_again_under_a_new_id(agent: Any) -> None:
    behaviour, lookup = agent
    ledger = Ledger()
    ended: list[RolloutResult] = []

    def finish(result: RolloutResult) -> RolloutResult:
        ended.append(result)
        return result

    seen: list[CollectionStatus] = []
    rows = [{}, {"do": "drop", "times": 2}, {}]
    options = {"retries": {"infrastructure": 2}, "ledger": ledger, "finish": finish, "progress": seen.append}
    results = await collect(lookup, rows, **options)
    assert [result.failure for result in results] == [None] * 3
    assert [result.request.rollout_id for result in results] == ["r0", "r1-a2", "r2"]
    assert results[1].request.row["_ng_rollout_id"] == "r1-a2" and results[1].request.attempt == 2
    assert behaviour.started == 5
    assert ledger.cancelled == [["r1"], ["r1-a1"]]
    failed = [result for result in ended if result.failure is not None]
    assert [(result.failure.attempt, result.failure.rollout_id) for result in failed] == [(0, "r1"), (1, "r1-a1")]
    assert all(FailureKind.INFRASTRUCTURE in result.retried_kinds for result in failed)
    last = seen[-1]
    assert (last.num_done, last.num_failed, last.num_retried) == (3, 0, 2)


async def test_attempts_end_and_kinds_have_budgets_of_their_own(agent: Any) -> None:
    behaviour, lookup = agent
    options = {"retries": {"infrastructure": 1, "environment": 0}, "environments": {"other": {"retries": 5}}}
    results = await collect(lookup, [{"do": "drop"}, {"do": "raise"}], **options)
    assert [(r.failure.kind, r.failure.attempt) for r in results] == [
        (FailureKind.INFRASTRUCTURE, 1),
        (FailureKind.ENVIRONMENT, 0),
    ]
    assert all(result.failure.kind not in result.retried_kinds for result in results)
    assert behaviour.started == 3


@dataclasses.dataclass
class Value:
    failure: RolloutFailure | None


async def test_what_only_finish_sees_is_retried_too(agent: Any) -> None:
    """A rollout without a token to train on is a failure that Gym's answer does not show."""
    _, lookup = agent
    failure = RolloutFailure(kind=FailureKind.POLICY, text="no token", where="a")
    values = await collect(
        lookup,
        [{}, {}],
        finish=lambda result: Value(None if result.request.rollout_id in ("r0", "r1-a1") else failure),
        retries={"policy": 1},
    )
    assert values == [Value(None), Value(None)]


async def test_a_failure_names_agent_task_rollout_attempt_and_seconds(agent: Any) -> None:
    _, lookup = agent
    [result] = await collect(lookup, [{"seconds": 30}], deadline_s=0.3)
    written = result.failure.as_json()
    assert {key: written[key] for key in ("kind", "agent", "task_index", "rollout_id", "attempt", "where")} == {
        "kind": "deadline",
        "agent": "a",
        "task_index": 0,
        "rollout_id": "r0",
        "attempt": 0,
        "where": "a /run",
    }
    assert written["seconds"] >= 0.3


# -- environments -----------------------------------------------------------------------------------------------------


async def test_an_agent_has_the_deadline_and_the_cap_of_its_own(agent: Any) -> None:
    behaviour, lookup = agent
    environments = {"a": {"deadline": 1.0, "max_inflight": 2}}
    results = await collect(lookup, [{"seconds": 30}] * 4, environments=environments, deadline_s=60.0)
    assert {result.failure.text for result in results} == {"no answer within 1 s"}
    assert behaviour.most_at_once == 2


async def test_an_environment_that_hangs_does_not_hold_the_others_up(agent: Any) -> None:
    """Both compete for three places; those of the one that hangs come first."""
    _, lookup = agent
    ends: list[str] = []

    def finish(result: RolloutResult) -> RolloutResult:
        ends.append(result.request.agent)
        return result

    rows = [{"seconds": 30, "agent": "hangs"}] * 10 + [{"agent": "works"}] * 10
    collector = make(lookup, max_inflight=3, deadline_s=60.0)
    future = collector.submit(requests(*rows), finish).future
    await until(lambda: ends.count("works") == 10)
    assert ends == ["works"] * 10
    future.cancel()
    await asyncio.to_thread(collector.close)


async def test_an_environment_that_is_down_ends_the_collection_and_is_named(agent: Any) -> None:
    _, lookup = agent
    with pytest.raises(
        GymServerError,
        match=r"The environment `bad` is down: server `bad_tools`: gone\. 2 of its[\s\S]*LOG[\s\S]*'skip'",
    ):
        await collect(
            lookup,
            [{"agent": "bad", "seconds": 30}] * 2 + [{"agent": "good", "seconds": 30}],
            agents_down=lambda refused: {"bad": "server `bad_tools`: gone", "unused": "server `x`: gone"},
            gym_log=lambda: "LOG",
        )


async def test_an_environment_that_is_down_is_left_out_and_tried_again_with_the_next_batch(agent: Any) -> None:
    behaviour, lookup = agent
    down: dict[str, str] = {}

    def agents_down(refused: Counter[str]) -> dict[str, str]:
        return dict(down) if behaviour.running == 3 or down.get("now") else {}

    down["bad"] = "server `bad_tools`: gone"
    rows = [{"agent": "bad", "seconds": 30}] * 4 + [{"agent": "good", "seconds": 1.0}] * 4
    options = {"retries": {"infrastructure": 3}, "max_inflight": 3, "deadline_s": 60.0}
    collector = make(lookup, agents_down=agents_down, on_environment_down="skip", **options)
    results = await asyncio.to_thread(collector.collect, requests(*rows), lambda result: result)
    failed = [result for result in results if result.failure is not None]
    assert {result.request.agent for result in failed} == {"bad"} and len(failed) == 4
    for result in failed:
        assert result.failure.kind is FailureKind.INFRASTRUCTURE and result.request.attempt == 0
        assert result.failure.text == "the environment `bad` is down: server `bad_tools`: gone"
    down.clear()
    again = await asyncio.to_thread(collector.collect, requests({"agent": "bad"}), lambda result: result)
    assert again[0].failure is None
    await asyncio.to_thread(collector.close)


async def test_a_dead_environment_is_noticed_before_its_rollouts_use_up_their_attempts(unused_tcp_port: int) -> None:
    """Refused connections fail in milliseconds: without a closer look they would all fail before anybody knew why."""
    info = AgentInfo("a", f"http://127.0.0.1:{unused_tcp_port}", None, "simple_agent")
    instance = ServerInstance("a", "responses_api_agents", "simple_agent", info.url, None)
    ended: list[RolloutResult] = []

    def agents_down(refused: Counter[str]) -> dict[str, str]:
        return servers_gone([instance], refused, knows_processes=False)

    with pytest.raises(GymServerError, match=r"`a` is down: .*refuses connections"):
        await collect(lambda name: info, [{}] * 3, agents_down=agents_down, finish=ended.append)
    assert {result.failure.kind for result in ended} <= {FailureKind.CANCELLED}


async def test_a_policy_server_that_refuses_connections_ends_the_collection(agent: Any) -> None:
    """One that we did not start: there is no process to look at."""
    _, lookup = agent
    ledger = Ledger()
    ledger.answers = False
    with pytest.raises(PolicyServerError, match="refuses connections"):
        await collect(lookup, [{"seconds": 30}], ledger=ledger, deadline_s=60.0)


async def test_what_has_ended_is_recorded_even_when_the_policy_server_is_gone(agent: Any) -> None:
    _, lookup = agent
    ledger = Ledger()
    ledger.broken = PolicyServerError("connection refused")
    ended: list[RolloutResult] = []

    def finish(result: RolloutResult) -> RolloutResult:
        ended.append(result)
        return result

    with pytest.raises(PolicyServerError, match="connection refused"):
        await collect(lookup, [{}, {"seconds": 20}], ledger=ledger, finish=finish)
    assert ended[0].answer["reward"] == 0.0 and ended[0].failure is None
    assert [result.failure.kind for result in ended[1:]] == [FailureKind.CANCELLED]


async def test_a_policy_server_that_is_back_before_it_is_missed_is_another_one(agent: Any) -> None:
    """What runs would go on with the weights that it was started with."""
    _, lookup = agent
    ledger = Ledger()
    names = iter(["", "first", "", "first", "second", "second"])

    async def ping(session: Any) -> str | None:
        return next(names)

    ledger.ping = ping  # type: ignore[method-assign]
    with pytest.raises(PolicyServerLostError, match="was restarted"):
        await collect(lookup, [{"seconds": 30}], ledger=ledger, deadline_s=60.0)
    assert next(names) == "second"


@pytest.mark.parametrize("kind", [PolicyServerError, PolicyServerLostError])
async def test_only_a_loss_makes_an_answer_a_lost_one(agent: Any, kind: type[PolicyServerError]) -> None:
    _, lookup = agent
    ledger = Ledger()
    ledger.broken = kind("no records")
    ended: list[RolloutResult] = []

    def finish(result: RolloutResult) -> RolloutResult:
        ended.append(result)
        return result

    with pytest.raises(kind, match="no records"):
        await collect(lookup, [{}], ledger=ledger, finish=finish)
    assert [result.was_lost for result in ended] == [kind is PolicyServerLostError]


async def test_what_waits_for_its_records_when_the_server_is_lost_is_lost(agent: Any) -> None:
    _, lookup = agent
    ended: list[RolloutResult] = []

    class Silent(Ledger):
        async def take(self, session: Any, rollout_id: str) -> list[Any]:
            self.answers = False
            await asyncio.sleep(30)
            return []

    def finish(result: RolloutResult) -> RolloutResult:
        ended.append(result)
        return result

    with pytest.raises(PolicyServerLostError, match="refuses connections"):
        await collect(lookup, [{}], ledger=Silent(), finish=finish)
    [result] = ended
    assert result.answer is not None and result.was_lost


async def test_a_gym_that_hangs_ends_the_collection(agent: Any) -> None:
    """It accepts connections and answers nothing, as a process that was stopped does; the rollout would wait long."""
    _, lookup = agent

    class Hangs:
        hang_timeout_s = 0.2

        def __init__(self, url: str) -> None:
            self.pulse_urls = [url]

        def note_hung(self, urls: Sequence[str]) -> None:
            if urls:
                raise GymServerLostError(f"{urls} hang")

    with bind_socket() as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(GymServerLostError, match=url):
            await collect(lookup, [{"seconds": 60}], gym=Hangs(url), deadline_s=60.0)
    gym = Hangs("http://127.0.0.1:9")  # others notice that nobody is there
    assert [result.failure for result in await collect(lookup, [{"seconds": 0.5}], gym=gym)] == [None]


async def test_a_stall_lists_who_waits_for_what(agent: Any, caplog: Any) -> None:
    _, lookup = agent
    ledger = Ledger()
    ledger.calls = {"r0": CallState(2, 0), "r1": CallState(0, 1)}
    collector = make(lookup, max_inflight=2, ledger=ledger, stall_timeout_s=0.5, deadline_s=60.0)
    with caplog.at_level(logging.WARNING):
        future = collector.submit(requests(*[{"seconds": 30}] * 3), lambda result: result).future
        await until(lambda: "No rollout has ended" in caplog.text)
        future.cancel()
        await asyncio.to_thread(collector.close)
    assert "3 are outstanding" in caplog.text
    assert re.search(r"r0 \(a, \d+ s, attempt 0\): tool or verifier of a\n", caplog.text)
    assert "attempt 0): model call (policy server)" in caplog.text
    assert re.search(r"r2 .*not dispatched \(cap\)", caplog.text)


# -- what a person is told --------------------------------------------------------------------------------------------


def one(phase: Phase = Phase.RUNNING, agent: str = "calc", name: str = "r1", attempt: int = 0, since: float = 0.0):
    return Outstanding(agent, name, attempt, phase, since)


def test_every_wait_has_a_name() -> None:
    assert waits_for(one(Phase.WAITING), None) == "not dispatched (cap)"
    assert waits_for(one(Phase.PAUSED), None) == "pause before another attempt"
    assert waits_for(one(Phase.RECORDING), None) == "records of its model calls (policy server)"
    assert waits_for(one(), CallState(1, 1)) == "model call (policy server)"
    assert waits_for(one(), CallState(1, 0)) == "tool or verifier of calc"
    assert waits_for(one(), CallState(0, 0)) == "tool or verifier of calc (no model call yet)"
    assert "not known" in waits_for(one(), None)


def test_few_are_listed_one_by_one() -> None:
    outstanding = [one(since=2.0), one(Phase.WAITING, name="r2", attempt=1, since=5.0)]
    text = describe_stall(outstanding, {"r1": CallState(2, 0)}, now=65.0, silent_s=60.0)
    assert text.splitlines() == [
        "No rollout has ended for 60 s; 2 are outstanding:",
        "  r1 (calc, 63 s, attempt 0): tool or verifier of calc",
        "  r2 (calc, 60 s, attempt 1): not dispatched (cap)",
    ]


def test_many_are_grouped_and_none_is_left_out() -> None:
    outstanding = [one(name=f"r{index}", attempt=index % 2, since=float(index)) for index in range(30)]
    outstanding += [one(Phase.WAITING, agent="math", name=f"w{index}") for index in range(10)]
    calls = {f"r{index}": CallState(1, 1) for index in range(30)}
    lines = describe_stall(outstanding, calls, now=100.0, silent_s=60.0).splitlines()
    assert lines == [
        "No rollout has ended for 60 s; 40 are outstanding:",
        "  30 of calc, attempts 0 to 1: model call (policy server); longest r0, 100 s",
        "  10 of math, attempt 0: not dispatched (cap); longest w0, 100 s",
    ]


def test_the_tally_knows_who_has_been_running_longest() -> None:
    tally = Tally(3)
    tally.enter(0, one(Phase.WAITING))
    tally.enter(1, one(agent="slow", since=1.0))
    tally.enter(0, one(since=4.0))
    assert tally.status(10.0).slowest == ("slow", 9.0) and tally.status(10.0).num_running == 2
    tally.enter(1, one(Phase.RECORDING, agent="slow"))
    assert tally.status(10.0).slowest == ("calc", 6.0) and len(tally.outstanding) == 2
    tally.leave(0)
    tally.leave(1)
    assert tally.status(10.0).slowest is None and not tally.outstanding
