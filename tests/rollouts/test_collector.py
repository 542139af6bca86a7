"""The collector against a real local HTTP server that plays a Gym agent."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from trl_gym.errors import FailureKind, PolicyServerError, ServerError
from trl_gym.gym.servers import AgentInfo
from trl_gym.rollouts.collector import RolloutCollector, RolloutResult
from trl_gym.rollouts.requests import RolloutRequest


class Agent:
    """`/run` does what the row says: `{"do": "answer" | "sleep" | "raise" | "drop", …}`."""

    def __init__(self) -> None:
        self.running = self.most_at_once = self.started = self.cancelled = 0

    async def run(self, request: web.Request) -> web.StreamResponse:
        row = await request.json()
        self.started += 1
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            await asyncio.sleep(row.get("seconds", 0))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if row.get("do") == "drop":
            request.transport.close()
        if row.get("do") == "raise":
            return web.json_response("the verifier raised", status=500)
        return web.json_response({"reward": row["value"], "response": {"output": []}})


@pytest.fixture
async def agent() -> AsyncIterator[tuple[Agent, Callable[[str], AgentInfo]]]:
    behaviour = Agent()
    app = web.Application()
    app.router.add_post("/run", behaviour.run)
    server = TestServer(app)
    await server.start_server()  # aiohttp cancels the handler of a client that went away
    info = AgentInfo(name="a", url=str(server.make_url("")).rstrip("/"), resources_server=None, kind="simple_agent")
    yield behaviour, lambda name: info
    await server.close()


def requests(*rows: dict[str, Any]) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            rollout_id=f"r{index}",
            task_index=index,
            group=0,
            member=index,
            attempt=0,
            agent="a",
            row={"responses_create_params": {"input": "x"}, "value": float(index)} | row,
        )
        for index, row in enumerate(rows)
    ]


async def collect(lookup: Callable[[str], AgentInfo], rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Run the synchronous collector in a thread, as the trainer's thread would."""
    finish = options.pop("finish", lambda result: result)
    progress = options.pop("progress", None)
    collector = RolloutCollector(lookup, **({"deadline_s": 5.0, "max_inflight": 64} | options))
    try:
        return await asyncio.to_thread(collector.collect, requests(*rows), finish, progress)
    finally:
        await asyncio.to_thread(collector.close)


async def test_results_come_in_the_order_of_the_requests(agent: Any) -> None:
    _, lookup = agent
    seen: list[tuple[int, int, int]] = []
    rows = [{"seconds": 0.2 - 0.05 * index} for index in range(4)]
    results = await collect(lookup, rows, progress=lambda *counts: seen.append(counts))
    assert [result.answer["reward"] for result in results] == [0.0, 1.0, 2.0, 3.0]
    assert all(result.failure is None and result.seconds > 0 for result in results)
    assert seen == [(1, 0, 4), (2, 0, 4), (3, 0, 4), (4, 0, 4)]


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
        raise ServerError("policy server ended (exit code 9)")

    started = time.monotonic()
    with pytest.raises(ServerError, match="exit code 9"):
        await collect(lookup, [{"seconds": 30}] * 3, check=check, deadline_s=60.0)
    assert time.monotonic() - started < 20
    for _ in range(100):
        if behaviour.cancelled == 3:
            break
        await asyncio.sleep(0.05)
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
    await collect(lookup, [{}] * 3, finish=lambda result: threads.add(threading.current_thread().name))
    assert threads == {"trl-gym-collector"}


async def test_a_collector_can_be_used_again_and_after_close(agent: Any) -> None:
    _, lookup = agent
    collector = RolloutCollector(lookup, deadline_s=5.0, max_inflight=4)
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


class Ledger:
    """Plays the policy server's part; keeps what it was asked."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.cancelled: list[list[str]] = []
        self.broken: PolicyServerError | None = None

    async def take(self, session: Any, rollout_id: str) -> list[Any]:
        self._refuse()
        self.taken.append(rollout_id)
        return [{"status": 200, "of": rollout_id}]

    async def cancel(self, session: Any, rollout_ids: Any, *, timeout_s: float = 60.0) -> None:
        assert not session.closed
        await asyncio.sleep(0.05)
        self._refuse()
        self.cancelled.append(list(rollout_ids))

    def _refuse(self) -> None:
        if self.broken is not None:
            raise self.broken


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

    def finish(result: RolloutResult) -> None:
        if result.request.rollout_id == "r1":
            raise OSError("no space left on device")

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
    collector = RolloutCollector(lookup, deadline_s=60.0, max_inflight=4, ledger=ledger)
    future = collector.submit(requests({"seconds": 30}, {"seconds": 30}), lambda result: result)
    for _ in range(200):
        if behaviour.running == 2:
            break
        await asyncio.sleep(0.02)
    future.cancel()
    await asyncio.to_thread(collector.close)
    assert ledger.cancelled == [["r0", "r1"]]


async def test_closing_gives_up_what_still_runs(agent: Any) -> None:
    behaviour, lookup = agent
    ledger = Ledger()
    collector = RolloutCollector(lookup, deadline_s=60.0, max_inflight=4, ledger=ledger)
    future = collector.submit(requests({"seconds": 30}), lambda result: result)
    for _ in range(200):
        if behaviour.running:
            break
        await asyncio.sleep(0.02)
    await asyncio.to_thread(collector.close)
    assert future.cancelled()
    assert ledger.cancelled == [["r0"]]


async def test_a_policy_server_that_cannot_be_told_does_not_hide_the_cause(agent: Any, caplog: Any) -> None:
    _, lookup = agent
    ledger = Ledger()

    def check() -> None:
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
