"""The collector against a real local HTTP server that plays a Gym agent."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from typing import Any

import pytest

from tests.conftest import until
from tests.rollouts.fake_agent import Ledger, collect, make, requests
from trl_gym.errors import FailureKind, PolicyServerError, ServerError
from trl_gym.gym.servers import AgentInfo
from trl_gym.policy_server.middleware.identity import ROLLOUT_HEADER, rollout_key
from trl_gym.rollout_options import Sampling
from trl_gym.rollouts.attempts import CollectionStatus
from trl_gym.rollouts.collector import RolloutResult
from trl_gym.rollouts.request import PolicyAccess, stamp


async def test_results_come_in_the_order_of_the_requests(agent: Any) -> None:
    _, lookup = agent
    seen: list[CollectionStatus] = []
    rows = [{"seconds": 0.2 - 0.05 * index} for index in range(4)]
    results = await collect(lookup, rows, progress=seen.append)
    assert [result.answer["reward"] for result in results] == [0.0, 1.0, 2.0, 3.0]
    assert all(result.failure is None and result.seconds > 0 for result in results)
    ends = [status for status in seen if status.num_done]
    assert [status.num_done for status in ends] == [1, 2, 3, 4]
    assert [status.num_running for status in ends] == [3, 2, 1, 0]
    assert all((status.num_failed, status.num_total) == (0, 4) for status in seen)
    assert [status.slowest is None for status in ends] == [False, False, False, True]


async def test_one_failure_leaves_its_siblings_alone(agent: Any) -> None:
    _, lookup = agent
    results = await collect(lookup, [{}, {"do": "raise"}, {"do": "drop"}, {"seconds": 30}, {}], deadline_s=1.0)
    kinds = [result.failure.kind if result.failure else None for result in results]
    assert kinds == [None, FailureKind.ENVIRONMENT, FailureKind.INFRASTRUCTURE, FailureKind.DEADLINE, None]
    assert "the verifier raised" in results[1].failure.text


async def test_the_cap_holds(agent: Any) -> None:
    behaviour, lookup = agent
    await collect(lookup, [{"seconds": 0.05}] * 20, max_inflight=3)
    assert behaviour.most_at_once <= 3
    assert behaviour.started == 20


async def test_a_dead_server_ends_the_collection_at_once(agent: Any) -> None:
    """NeMo Gym retries a refused connection for ever: waiting for the deadline would hang the run."""
    behaviour, lookup = agent

    def check() -> None:
        if behaviour.running == 3:
            raise ServerError("policy server ended (exit code 9)")

    ended: list[RolloutResult] = []
    with pytest.raises(ServerError, match="exit code 9"):
        await collect(lookup, [{"seconds": 30}] * 3, check=check, deadline_s=60.0, finish=ended.append)
    assert [(result.failure.kind, result.failure.rollout_id) for result in ended] == [
        (FailureKind.CANCELLED, f"r{index}") for index in range(3)
    ]
    await until(lambda: behaviour.cancelled == 3)
    assert behaviour.cancelled == 3


async def test_an_error_in_finish_reaches_the_caller(agent: Any) -> None:
    _, lookup = agent

    def finish(result: RolloutResult) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        await collect(lookup, [{}, {"seconds": 20}], finish=finish)


async def test_finish_runs_in_the_collectors_thread_as_rollouts_end(agent: Any) -> None:
    _, lookup = agent
    threads: set[str] = set()

    def finish(result: RolloutResult) -> RolloutResult:
        threads.add(threading.current_thread().name)
        return result

    await collect(lookup, [{}] * 3, finish=finish)
    assert threads == {"trl-gym-collector"}


async def test_a_collector_can_be_used_again_and_after_close(agent: Any) -> None:
    _, lookup = agent
    collector = make(lookup, max_inflight=4)
    for _ in range(2):
        for _ in range(2):
            assert len(await asyncio.to_thread(collector.collect, requests({}, {}), lambda result: result)) == 2
        await asyncio.to_thread(collector.close)
    collector.close()


async def test_an_unknown_agent_is_an_error_not_a_failed_rollout(agent: Any) -> None:
    from trl_gym.errors import ConfigError

    def lookup(name: str) -> AgentInfo:
        raise ConfigError(f"there is no agent `{name}`")

    with pytest.raises(ConfigError, match="no agent `a`"):
        await collect(lookup, [{}])


async def test_each_result_brings_the_records_of_its_calls(agent: Any) -> None:
    _, lookup = agent
    ledger = Ledger()
    results = await collect(lookup, [{}, {"do": "raise"}], ledger=ledger)
    assert [result.records for result in results] == [[{"status": 200, "of": name}] for name in ("r0", "r1")]
    assert ledger.cancelled == []
    assert [result.records for result in await collect(lookup, [{}])] == [None]


async def test_a_rollout_that_missed_its_deadline_is_cancelled_at_the_policy_server(agent: Any) -> None:
    """NeMo Gym before 0.7 would go on with it."""
    _, lookup = agent
    ledger = Ledger()
    results = await collect(lookup, [{}, {"seconds": 30}], ledger=ledger, deadline_s=0.5)
    assert results[1].failure.kind is FailureKind.DEADLINE
    assert ledger.cancelled == [["r1"]]
    assert sorted(ledger.taken) == ["r0", "r1"]


async def test_what_runs_when_a_collection_ends_early_is_cancelled_together(agent: Any) -> None:
    _, lookup = agent
    ledger = Ledger()

    def finish(result: RolloutResult) -> RolloutResult:
        if result.request.rollout_id == "r1":
            raise OSError("no space left on device")
        return result

    rows = [{}, {"seconds": 0.3}, *[{"seconds": 20}] * 3]
    with pytest.raises(OSError, match="no space left"):
        await collect(lookup, rows, finish=finish, ledger=ledger, max_inflight=2)
    [cancelled] = ledger.cancelled
    assert "r2" in cancelled
    assert not {"r0", "r1", "r4"} & set(cancelled)  # two have ended, one has never begun


async def test_giving_up_tells_the_policy_server_before_the_session_closes(agent: Any) -> None:
    """As Ctrl-C does: the trainer's thread stops waiting and closes the collector at once."""
    behaviour, lookup = agent
    ledger = Ledger()
    collector = make(lookup, deadline_s=60.0, ledger=ledger)
    future = collector.submit(requests({"seconds": 30}, {"seconds": 30}), lambda result: result).future
    await until(lambda: behaviour.running == 2)
    future.cancel()
    await asyncio.to_thread(collector.close)
    assert ledger.cancelled == [["r0", "r1"]]


async def test_closing_gives_up_what_still_runs(agent: Any) -> None:
    behaviour, lookup = agent
    ledger = Ledger()
    collector = make(lookup, deadline_s=60.0, ledger=ledger)
    future = collector.submit(requests({"seconds": 30}), lambda result: result).future
    await until(lambda: behaviour.running)
    await asyncio.to_thread(collector.close)
    assert future.cancelled()
    assert ledger.cancelled == [["r0"]]


async def test_a_policy_server_that_cannot_be_told_does_not_hide_the_cause(agent: Any, caplog: Any) -> None:
    behaviour, lookup = agent
    ledger = Ledger()

    def check() -> None:
        if not behaviour.running:
            return
        ledger.broken = PolicyServerError("connection refused")
        raise ServerError("policy server ended (exit code 9)")

    with caplog.at_level(logging.WARNING), pytest.raises(ServerError, match="exit code 9"):
        await collect(lookup, [{"seconds": 30}], check=check, ledger=ledger)
    assert "1 rollouts could not be cancelled" in caplog.text and "connection refused" in caplog.text


async def test_records_that_cannot_be_had_end_the_collection(agent: Any) -> None:
    _, lookup = agent
    ledger = Ledger()
    ledger.broken = PolicyServerError("this server keeps no records")
    with pytest.raises(PolicyServerError, match="keeps no records"):
        await collect(lookup, [{}], ledger=ledger)


async def test_nothing_is_left_behind(agent: Any) -> None:
    _, lookup = agent
    collector = make(lookup, deadline_s=0.3, retries={"infrastructure": 1}, ledger=Ledger())
    rows = [{}] * 20 + [{"do": "drop"}] * 5 + [{"seconds": 5}] * 5
    for _ in range(2):
        await asyncio.to_thread(collector.collect, requests(*rows), lambda result: result)
    worker = collector._worker
    left = asyncio.run_coroutine_threadsafe(_tasks(), worker._loop).result()
    assert left == 1, "only the one that counts"
    threads = {thread.name for thread in threading.enumerate()}
    assert "trl-gym-collector" in threads
    await asyncio.to_thread(collector.close)
    assert worker.session.closed and worker._loop.is_closed()
    assert not [thread for thread in threading.enumerate() if thread.name == "trl-gym-collector"]


async def _tasks() -> int:
    return len(asyncio.all_tasks())


async def test_an_agent_gets_the_key_of_its_rollout_and_no_record_has_it(agent: Any) -> None:
    behaviour, lookup = agent
    options: dict[str, Any] = {"task_index": 0, "member": 0, "sampling": Sampling(), "completion_budget": 9}
    row = stamp({"responses_create_params": {"input": "x"}}, rollout_id="r0", **options)
    takes = dataclasses.replace(lookup("a"), run_fields=frozenset({"policy_base_url", "policy_api_key"}))
    access = PolicyAccess(("http://policy:1/v1",), "the-key")
    [result] = await collect(lambda _: takes, [row], access=access)
    assert result.failure is None
    [(headers, received)] = behaviour.received
    key = rollout_key("the-key", result.request.tag)
    assert headers[ROLLOUT_HEADER] == key
    assert (received["policy_base_url"], received["policy_api_key"]) == ("http://policy:1/v1", key)
    assert key not in str(result.request)


async def test_a_failure_quotes_no_key(agent: Any) -> None:
    _, lookup = agent
    key = rollout_key("the-key", {"rollout": "r0"})
    [result] = await collect(lookup, [{"do": "raise", "text": f"POST http://x/trl_gym/rollouts/{key}/v1: HTTP 404"}])
    assert result.failure.text == "POST http://x/trl_gym/rollouts/[redacted]/v1: HTTP 404"
