"""Records of model calls: asked for over HTTP, matched to the calls of a rollout or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.rollouts.ledger import CallState, RolloutLedger, match_records, weight_versions
from trl_gym.rollouts.trajectory import ModelCall


def record(num_prompt: int | None, num_sampled: int | None, status: int = 200, version: str | None = "1") -> Any:
    return {
        "status": status,
        "prompt_tokens": num_prompt,
        "completion_tokens": num_sampled,
        "weight_version": version,
        "drift": None,
    }


def call(num_prompt: int, num_sampled: int) -> ModelCall:
    return ModelCall([1] * num_prompt, [2] * num_sampled, [0.0] * num_sampled)


sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=5)


@given(sizes, st.lists(st.tuples(st.integers(0, 5), st.sampled_from([(400, None), (500, None), (200, 0)]))))
def test_calls_without_tokens_are_left_out(pairs: list[tuple[int, int]], others: list[Any]) -> None:
    answered = [record(*pair) for pair in pairs]
    records = list(answered)
    for place, (status, num_sampled) in others:
        records.insert(place, record(3, num_sampled, status))
    assert match_records([call(*pair) for pair in pairs], records) == answered


@given(sizes, sizes)
def test_what_does_not_agree_is_not_matched(calls: list[tuple[int, int]], records: list[tuple[int, int]]) -> None:
    matched = match_records([call(*pair) for pair in calls], [record(*pair) for pair in records])
    assert (matched is not None) == (calls == records)


def test_unknown_counts_are_not_matched() -> None:
    assert match_records([call(3, 1)], [record(None, None)]) is None


def test_versions_are_those_that_answered_in_order_of_use() -> None:
    records = [
        record(1, 1, version="9"),
        record(1, None, 400, "3"),
        record(1, 1, version="10"),
        record(1, 1, version="9"),
    ]
    assert weight_versions(records) == ["9", "10"]
    assert weight_versions([record(1, 1, version=None)]) == []


class Server:
    """Keeps records as the policy server does."""

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {}
        self.extra: dict[str, Any] = {}
        self.asked: list[tuple[str, Any, str | None]] = []
        self.status, self.delay_s, self.num_dropped = 200, 0.0, 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((request.path, body, request.headers.get("Authorization")))
        await asyncio.sleep(self.delay_s)
        if self.num_dropped:
            self.num_dropped -= 1
            request.transport.abort()
        if self.status != 200:
            return web.json_response({"detail": "Not Found"}, status=self.status)
        if request.path.endswith("/cancel"):
            return web.json_response({"aborted": 1})
        take = self.records.pop if body["forget"] else self.records.get
        records = {name: take(name, []) for name in body["rollouts"]}
        return web.json_response({"records": records, **self.extra})


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    behaviour = Server()
    app = web.Application()
    app.router.add_post("/trl_gym/rollouts/{what}", behaviour.handle)
    async with TestServer(app) as running:
        yield behaviour, str(running.make_url("")).rstrip("/")


async def test_records_are_taken_and_rollouts_cancelled(server: Any) -> None:
    behaviour, url = server
    behaviour.records["r1"] = [record(1, 1)]
    ledger = RolloutLedger(url, "secret")
    async with aiohttp.ClientSession() as session:
        assert await ledger.take(session, "r1") == [record(1, 1)]
        assert await ledger.take(session, "r1") == []
        await ledger.cancel(session, ["r1", "r2"])
    assert behaviour.asked == [
        ("/trl_gym/rollouts/records", {"rollouts": ["r1"], "forget": True}, "Bearer secret"),
        ("/trl_gym/rollouts/records", {"rollouts": ["r1"], "forget": True}, "Bearer secret"),
        ("/trl_gym/rollouts/cancel", {"rollouts": ["r1", "r2"]}, "Bearer secret"),
    ]


async def test_a_server_without_these_routes_names_the_remedy(server: Any) -> None:
    behaviour, url = server
    behaviour.status = 404
    async with aiohttp.ClientSession() as session:
        with pytest.raises(PolicyServerError, match=r"rollouts/records: HTTP 404: .*Not Found.*trl-gym serve MODEL"):
            await RolloutLedger(url).take(session, "r1")
        behaviour.status = 401
        with pytest.raises(PolicyServerError, match="HTTP 401") as caught:
            await RolloutLedger(url).take(session, "r1")
        assert "serve" not in str(caught.value) and not isinstance(caught.value, PolicyServerLostError)


async def test_no_answer_is_an_error_that_names_the_url(server: Any) -> None:
    behaviour, url = server
    behaviour.delay_s = 5.0
    async with aiohttp.ClientSession() as session:
        with pytest.raises(PolicyServerLostError, match=r"rollouts/cancel: no answer within 0\.05 s"):
            await RolloutLedger(url).cancel(session, ["r1"], timeout_s=0.05)
        with pytest.raises(PolicyServerLostError, match=r"127\.0\.0\.1:9/trl_gym/rollouts/records: Client"):
            await RolloutLedger("http://127.0.0.1:9").take(session, "r1")


async def test_peeking_forgets_nothing_and_says_what_runs(server: Any) -> None:
    behaviour, url = server
    behaviour.records["r1"] = [record(1, 1), record(2, 1)]
    async with aiohttp.ClientSession() as session:
        ledger = RolloutLedger(url)
        assert await ledger.peek(session, ["r1"]) == {"r1": CallState(2, None)}
        behaviour.extra = {"running": {"r1": 0, "r2": 1}}
        assert await ledger.peek(session, ["r1", "r2"]) == {"r1": CallState(2, 0), "r2": CallState(0, 1)}


@pytest.mark.parametrize(("num_dropped", "survives"), [(2, True), (3, False)])
async def test_a_connection_that_breaks_now_and_then_is_survived(
    server: Any, num_dropped: int, survives: bool
) -> None:
    behaviour, url = server
    behaviour.records["r1"], behaviour.num_dropped = [record(1, 1)], num_dropped
    async with aiohttp.ClientSession() as session:
        if survives:
            await RolloutLedger(url).cancel(session, ["r1"])
        else:
            with pytest.raises(PolicyServerError, match="ServerDisconnectedError"):
                await RolloutLedger(url).cancel(session, ["r1"])
    assert len(behaviour.asked) == 3


async def test_a_server_that_is_slow_or_complains_is_there(server: Any) -> None:
    behaviour, url = server
    async with aiohttp.ClientSession() as session:
        ledger = RolloutLedger(url)
        assert await ledger.ping(session) == ""
        behaviour.extra = {"instance": "first"}
        assert await ledger.ping(session) == "first"
        behaviour.status = 500
        assert await ledger.ping(session) == ""
        behaviour.delay_s = 5.0
        assert await ledger.ping(session, timeout_s=0.05) == ""
        assert await RolloutLedger("http://127.0.0.1:9").ping(session) is None
