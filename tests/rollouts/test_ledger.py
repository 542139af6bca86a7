"""The trainer's side of the ledger: asked for over HTTP, of one server or several."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.conftest import until
from tests.rollouts.sampled import record
from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.middleware.ledger import CallRecord, Taken, token_ids
from trl_gym.rollouts import ledger as ledger_module
from trl_gym.rollouts.ledger import CallState, EngineWatch, HangWatch, Ledger, weight_versions
from trl_gym.untrusted import read_body


def answered(version: str | None = "1", status: int = 200) -> CallRecord:
    return CallRecord(status=status, prompt="exact", seconds=0.1, weight_version=version)


def test_versions_are_those_that_answered_in_order_of_use() -> None:
    records = [answered("9"), answered("3", 400), answered("10"), answered("9")]
    assert weight_versions(records) == ["9", "10"]
    assert weight_versions([answered(None)]) == []


class Server:
    """Keeps records as the policy server does."""

    def __init__(self) -> None:
        self.records: dict[str, list[CallRecord] | None] = {}
        self.body: bytes | None = None
        self.extra: dict[str, Any] = {}
        self.asked: list[tuple[str, Any, str | None]] = []
        self.status, self.delay_s, self.num_dropped = 200, 0.0, 0
        self.engine_answers = asyncio.Event()

    async def ask_engine(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, None, request.headers.get("Authorization")))
        await self.engine_answers.wait()
        return web.json_response({"is_paused": False}, status=self.status)

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
        if request.path.endswith("/take"):
            taken = Taken("first", {name: self.records.get(name, []) for name in body["rollouts"]})
            return web.Response(body=self.body or msgspec.msgpack.encode(taken))
        known = {name: [{"status": 200}] * len(self.records.get(name) or ()) for name in body["rollouts"]}
        return web.json_response({"records": known, **self.extra})


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    behaviour = Server()
    app = web.Application()
    app.router.add_post("/trl_gym/rollouts/{what}", behaviour.handle)
    app.router.add_get("/is_paused", behaviour.ask_engine)
    async with TestServer(app) as running:
        yield behaviour, str(running.make_url("")).rstrip("/")


async def test_the_part_of_a_server_that_hangs_is_named(server: Any) -> None:
    behaviour, url = server
    ledger = Ledger(url, "secret", hang_timeout_s=0.1)
    async with aiohttp.ClientSession() as session:
        watch = EngineWatch(ledger, session)

        async def lost() -> PolicyServerLostError:
            with pytest.raises(PolicyServerLostError) as caught:
                async with asyncio.timeout(30):
                    while True:
                        watch.look()
                        await asyncio.sleep(0.01)
            return caught.value

        with ledger.busy():  # a weight sync
            watch.look()
            await until(lambda: behaviour.asked == [("/is_paused", None, "Bearer secret")])
            await asyncio.sleep(2 * ledger.hang_timeout_s)
            watch.look()
        loss = await lost()
        assert f"{url} hangs: nothing answers (waited for 0.1 s)" in str(loss) and loss.silent_s == 0.1
        await ledger.ping(session)
        assert "its HTTP process answers, and its engine does not" in str(await lost())
        await until(lambda: len(behaviour.asked) == 2, "one question at a time")
        watch.close()


async def test_time_in_which_this_process_was_frozen_is_no_hang_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(monotonic=lambda: now))
    watch = HangWatch(lambda _: asyncio.sleep(3600), 300.0)
    hangs_at = []
    for now in (*range(5), *range(400, 1000)):  # stopped in the fifth second
        if watch.look(["http://server"]):
            hangs_at.append(now)
    watch.close()
    assert hangs_at[0] == 701


@pytest.mark.parametrize("status", [200, 404])
async def test_an_engine_that_answers_and_a_server_without_the_question_are_well(server: Any, status: int) -> None:
    behaviour, url = server
    behaviour.status = status
    behaviour.engine_answers.set()
    async with aiohttp.ClientSession() as session:
        watch = EngineWatch(Ledger(url), session)
        watch.look()
        question = watch._watch._asked[url][0]
        await until(question.done)
        watch.look()
        assert question.exception() is None and len(behaviour.asked) == 1, "it is asked every few seconds"
        watch = EngineWatch(Ledger("http://127.0.0.1:9"), session)  # noticed by `ping`
        watch.look()
        await until(watch._watch._asked["http://127.0.0.1:9"][0].done)
        watch.look()


async def test_calls_are_taken_and_rollouts_cancelled(server: Any) -> None:
    behaviour, url = server
    behaviour.records["r1"] = [record([], [1, 2], [3])]
    ledger = Ledger(url, "secret")
    async with aiohttp.ClientSession() as session:
        assert await ledger.take(session, "r1") == (behaviour.records["r1"], "first")
        assert await ledger.take(session, "r2") == ([], "first")
        await ledger.cancel(session, ["r1", "r2"])
    assert behaviour.asked == [
        ("/trl_gym/rollouts/take", {"rollouts": ["r1"]}, "Bearer secret"),
        ("/trl_gym/rollouts/take", {"rollouts": ["r2"]}, "Bearer secret"),
        ("/trl_gym/rollouts/cancel", {"rollouts": ["r1", "r2"]}, "Bearer secret"),
    ]


async def test_calls_of_several_servers_keep_their_parents(server: Any) -> None:
    behaviour, url = server
    first = record([], [1, 2], [3])
    behaviour.records["r1"] = [first, record([first], [1, 2, 3, 4], [5])]
    async with aiohttp.ClientSession() as session:
        records, names = await Ledger([url, url.replace("127.0.0.1", "localhost")]).take(session, "r1")
    assert names == "first+first"
    assert [one.tokens and one.tokens.parent for one in records] == [None, 0, None, 2]
    assert [token_ids(records, index) for index in (1, 3)] == [[1, 2, 3, 4, 5]] * 2


async def test_an_odd_answer_is_an_error_of_the_server(server: Any) -> None:
    behaviour, url = server
    async with aiohttp.ClientSession() as session:
        call = record([], [1, 2], [3])
        assert call.tokens is not None
        changes: list[dict[str, Any]] = [{"parent": 0}, {"parent": -1}, {"prompt": b"123"}, {"logprobs": b""}]
        odd = [msgspec.structs.replace(call.tokens, **change) for change in changes]
        calls = [[msgspec.structs.replace(call, tokens=tokens)] for tokens in odd]
        bodies = [Taken("a", {}), {"instance": "a"}, *(Taken("a", {"r1": records}) for records in calls)]
        for body in (b"nonsense", *map(msgspec.msgpack.encode, bodies)):
            behaviour.body = body
            with pytest.raises(PolicyServerError, match=r"rollouts/take: the answer is no ledger"):
                await Ledger(url).take(session, "r1")
        behaviour.body = msgspec.msgpack.encode(Taken("a", {"r1": None}))
        assert await Ledger(url).take(session, "r1") == (None, "a")  # it had no room for these tokens


async def test_rollouts_that_end_together_are_taken_together(server: Any) -> None:
    behaviour, url = server
    names = [f"r{index}" for index in range(70)]
    behaviour.records |= {name: [record([], [1, 2], [index])] for index, name in enumerate(names)}
    async with aiohttp.ClientSession() as session:
        ledger = Ledger(url)
        found = await asyncio.gather(*(ledger.take(session, name) for name in names))
        assert await ledger.take(session, "r0") == (behaviour.records["r0"], "first")  # one alone waits for nobody
    assert found == [(behaviour.records[name], "first") for name in names]
    asked = [body["rollouts"] for _, body, _ in behaviour.asked]
    assert asked == [names[:32], names[32:64], names[64:], ["r0"]]


async def test_an_answer_that_is_too_long_costs_the_rollout_that_makes_it_so(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour, url = server
    names = [f"r{index}" for index in range(9)]
    behaviour.records |= {name: [record([], [1, 2], [3] * 100)] for name in names}
    behaviour.records["r4"] = [record([], [1, 2], [3] * 1000)]
    one = len(msgspec.msgpack.encode(behaviour.records["r0"]))
    monkeypatch.setattr("trl_gym.rollouts.ledger.read_body", functools.partial(read_body, limit=3 * one))
    async with aiohttp.ClientSession() as session:
        ledger = Ledger(url)
        found = await asyncio.gather(*(ledger.take(session, name) for name in names), return_exceptions=True)
    assert "the answer is longer than" in str(found.pop(4))
    assert found == [(behaviour.records[name], "first") for name in names if name != "r4"]


async def test_a_rollout_that_the_server_contradicts_itself_about_fails_alone(server: Any) -> None:
    behaviour, url = server
    good = record([], [1, 2], [3])
    assert good.tokens is not None
    odd = msgspec.structs.replace(good, tokens=msgspec.structs.replace(good.tokens, parent=5))
    records = msgspec.to_builtins({"good": [good], "odd": [odd], "also good": None}, builtin_types=(bytes,))
    behaviour.body = msgspec.msgpack.encode({"instance": "a", "rollouts": {**records, "text": "x"}})
    async with aiohttp.ClientSession() as session:
        ledger = Ledger(url)
        names = ["good", "odd", "text", "missing", "also good"]
        found = await asyncio.gather(*(ledger.take(session, name) for name in names), return_exceptions=True)
    assert (found[0], found[4]) == (([good], "a"), (None, "a"))
    assert all("the answer is no ledger" in str(error) for error in found[1:4])
    assert len(behaviour.asked) == 1


async def test_who_is_cancelled_leaves_the_others_theirs(server: Any) -> None:
    behaviour, url = server
    behaviour.delay_s = 0.1
    async with aiohttp.ClientSession() as session:
        ledger = Ledger(url)
        first, second = (asyncio.create_task(ledger.take(session, name)) for name in ("r1", "r2"))
        while not behaviour.asked:
            await asyncio.sleep(0.001)
        first.cancel()
        third = asyncio.create_task(ledger.take(session, "r3"))
        assert await second == ([], "first") and await third == ([], "first")
        alone = asyncio.create_task(ledger.take(session, "r4"))
        await asyncio.sleep(0)
        alone.cancel()  # nobody waits any more: neither does the request
        late = asyncio.create_task(ledger.take(session, "r5"))
        assert await late == ([], "first")
        assert first.cancelled() or (await asyncio.wait([first, alone]) and first.cancelled() and alone.cancelled())


async def test_a_server_without_these_routes_names_the_remedy(server: Any) -> None:
    behaviour, url = server
    behaviour.status = 404
    async with aiohttp.ClientSession() as session:
        with pytest.raises(PolicyServerError, match=r"rollouts/take: HTTP 404: .*Not Found.*trl-gym serve MODEL"):
            await Ledger(url).take(session, "r1")
        behaviour.status = 401
        with pytest.raises(PolicyServerError, match="HTTP 401") as caught:
            await Ledger(url).take(session, "r1")
        assert "serve" not in str(caught.value) and not isinstance(caught.value, PolicyServerLostError)


async def test_no_answer_is_an_error_that_names_the_url(server: Any) -> None:
    behaviour, url = server
    behaviour.delay_s = 5.0
    async with aiohttp.ClientSession() as session:
        with pytest.raises(PolicyServerLostError, match=r"rollouts/cancel: no answer within 0\.05 s"):
            await Ledger(url).cancel(session, ["r1"], timeout_s=0.05)
        with pytest.raises(PolicyServerLostError, match=r"127\.0\.0\.1:9/trl_gym/rollouts/take: Client"):
            await Ledger("http://127.0.0.1:9").take(session, "r1")


async def test_peeking_forgets_nothing_and_says_what_runs(server: Any) -> None:
    behaviour, url = server
    behaviour.records["r1"] = [answered(), answered()]
    async with aiohttp.ClientSession() as session:
        ledger = Ledger(url)
        assert await ledger.peek(session, ["r1"]) == {"r1": CallState(2, 0)}
        behaviour.extra = {"running": {"r1": 0, "r2": 1}}
        assert await ledger.peek(session, ["r1", "r2"]) == {"r1": CallState(2, 0), "r2": CallState(0, 1)}


@pytest.mark.parametrize(("num_dropped", "survives"), [(2, True), (3, False)])
async def test_a_connection_that_breaks_now_and_then_is_survived(
    server: Any, num_dropped: int, survives: bool
) -> None:
    behaviour, url = server
    behaviour.num_dropped = num_dropped
    async with aiohttp.ClientSession() as session:
        if survives:
            await Ledger(url).cancel(session, ["r1"])
        else:
            with pytest.raises(PolicyServerError, match="ServerDisconnectedError"):
                await Ledger(url).cancel(session, ["r1"])
    assert len(behaviour.asked) == 3


async def test_a_server_that_is_slow_or_complains_is_there(server: Any) -> None:
    behaviour, url = server
    async with aiohttp.ClientSession() as session:
        ledger = Ledger(url)
        assert await ledger.ping(session) == ""
        behaviour.extra = {"instance": "first"}
        assert await ledger.ping(session) == "first"
        behaviour.status = 500
        assert await ledger.ping(session) == ""
        behaviour.delay_s = 5.0
        assert await ledger.ping(session, timeout_s=0.05) == ""
        assert await Ledger("http://127.0.0.1:9").ping(session) is None
