"""The collector against a real local HTTP server that plays a Gym agent."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from trl_gym.errors import FailureKind, ServerError
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
