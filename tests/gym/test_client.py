"""A rollout that fails is a value with a cause; bodies of real Gym servers (0.4.0 and 0.7.0), and hostile ones."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.gym.client import MAX_TEXT_CHARS, GymAnswer, new_session, read_error, run_rollout, unwrap
from trl_gym.gym.discovery import AgentInfo

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[Handler], Awaitable[AgentInfo]]

ROW = {"responses_create_params": {"input": []}}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with new_session(4) as session:
        yield session


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start an agent whose `/run` is the given function."""
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> AgentInfo:
        app = web.Application()
        app.router.add_post("/run", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)  # cancels handlers that never answer
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return AgentInfo("agent", f"http://127.0.0.1:{runner.addresses[0][1]}", "env", "simple_agent")

    yield start
    for runner in runners:
        await runner.cleanup()


def answering(body: bytes, status: int = 200) -> Handler:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(body=body, status=status)

    return handler


async def test_a_proxy_of_the_environment_is_not_used(
    session: aiohttp.ClientSession, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    agent = await serve(answering(b'{"reward": 1, "response": {"output": []}}'))
    assert isinstance(await run_rollout(session, agent, ROW, deadline_s=60), GymAnswer)


async def test_an_answer_with_a_finite_reward(session: aiohttp.ClientSession, serve: Serve) -> None:
    received: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        received.append(await request.json())
        return web.json_response({"reward": 1, "response": {"output": []}, "mask_sample": False})

    row = {"responses_create_params": {"input": [], "metadata": None, "temperature": 1.0}, "x": None}
    answer = await run_rollout(session, await serve(handler), row, deadline_s=60)
    assert isinstance(answer, GymAnswer) and answer.result["reward"] == 1 and 0 < answer.seconds < 60
    assert received == [{"responses_create_params": {"input": [], "temperature": 1.0}, "x": None}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"garbage \xff", "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "there is no `reward`"),
        (b'{"reward": NaN}', "`reward` is nan"),
        (b'{"reward": Infinity}', "`reward` is inf"),
        (b'{"reward": "1"}', "`reward` is '1'"),
        (b'{"reward": null}', "`reward` is None"),
        (b'{"reward": true}', "`reward` is True"),
        (b'{"reward": 1, "mask_sample": true, "failure_kind": "judge", "failure_reason": "off"}', "judge: off"),
        (b'{"reward": 1, "failure_kind": "judge_failed"}', "masked this sample: judge_failed"),
        (b'{"reward": 1, "instance_config": {"mask_sample": true}}', "masked this sample"),
        (b'{"episode_id": {}, "task_id": {}, "failure": {"failure_reason": "slow", "stage": "seed"}}', "seed: slow"),
        (b'{"episode_id": {}, "task_id": {}}', "neither `result` nor `failure`"),
    ],
)  # fmt: skip
async def test_answers_without_a_usable_reward(
    session: aiohttp.ClientSession, serve: Serve, body: bytes, words: str
) -> None:
    failure = await run_rollout(session, await serve(answering(body)), ROW, deadline_s=60)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.ENVIRONMENT
    assert words in failure.text and failure.where == "agent /run"


async def test_a_valid_measurement_may_name_a_failure_kind(session: aiohttp.ClientSession, serve: Serve) -> None:
    body = b'{"reward": 0.5, "mask_sample": false, "failure_kind": "judge_unparseable", "response": {"output": []}}'
    assert isinstance(await run_rollout(session, await serve(answering(body)), ROW, deadline_s=60), GymAnswer)


async def test_envelope_of_an_environment_server(session: aiohttp.ClientSession, serve: Serve) -> None:
    result = {"reward": 0.25, "response": {"output": []}}
    body = json.dumps({"episode_id": {"rollout_id": "r"}, "task_id": {}, "result": result}).encode()
    answer = await run_rollout(session, await serve(answering(body)), ROW, deadline_s=60)
    assert isinstance(answer, GymAnswer) and answer.result == result


async def test_transport_failures_inside_of_gym_are_infrastructure(
    session: aiohttp.ClientSession, serve: Serve
) -> None:
    failure = {"failure_kind": "transport_unreachable", "failure_reason": "model server"}
    body = json.dumps({"episode_id": {}, "failure": failure}).encode()
    result = await run_rollout(session, await serve(answering(body)), ROW, deadline_s=60)
    assert isinstance(result, RolloutFailure) and result.kind is FailureKind.INFRASTRUCTURE


@pytest.mark.parametrize(("status", "body", "kind"), [
    (500, b'"KeyError(\'answer\')"', FailureKind.ENVIRONMENT),
    (500, b"Internal Server Error", FailureKind.INFRASTRUCTURE),
    (503, b"busy", FailureKind.INFRASTRUCTURE),
    (422, b'{"detail": "row"}', FailureKind.ENVIRONMENT),
])  # fmt: skip
async def test_http_errors(
    session: aiohttp.ClientSession, serve: Serve, status: int, body: bytes, kind: FailureKind
) -> None:
    failure = await run_rollout(session, await serve(answering(body, status)), ROW, deadline_s=60)
    assert isinstance(failure, RolloutFailure) and failure.kind is kind


async def never(_request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def test_deadline(session: aiohttp.ClientSession, serve: Serve) -> None:
    failure = await run_rollout(session, await serve(never), ROW, deadline_s=0.1)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.DEADLINE
    assert failure.text == "no answer within 0.1 s"


async def test_connection_reset_in_the_middle(session: aiohttp.ClientSession, serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"reward"')
        assert request.transport is not None
        request.transport.abort()
        return response

    failure = await run_rollout(session, await serve(handler), ROW, deadline_s=60)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.INFRASTRUCTURE


async def test_connection_refused(session: aiohttp.ClientSession, unused_tcp_port: int) -> None:
    agent = AgentInfo("agent", f"http://127.0.0.1:{unused_tcp_port}", None, "simple_agent")
    failure = await run_rollout(session, agent, ROW, deadline_s=60)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.INFRASTRUCTURE
    assert "ClientConnectorError" in failure.text and agent.url in failure.text


async def test_cancellation_passes_through(session: aiohttp.ClientSession, serve: Serve) -> None:
    asked = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        asked.set()
        return await never(request)

    task = asyncio.create_task(run_rollout(session, await serve(handler), ROW, deadline_s=60))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cookies_are_not_kept(session: aiohttp.ClientSession, serve: Serve) -> None:
    seen: list[str | None] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Cookie"))
        response = web.json_response({"reward": 0.0})
        response.set_cookie("SimpleAgent___agent", "session")
        return response

    agent = await serve(handler)
    for _ in range(2):
        await run_rollout(session, agent, ROW, deadline_s=60)
    assert seen == [None, None]


CAPTURED = json.loads(Path(__file__).with_name("captured_errors.json").read_text())


@pytest.mark.parametrize("case", CAPTURED, ids=lambda case: f"{case['gym']}-{case['name']}")
def test_captured_answers(case: dict[str, str]) -> None:
    kind, text = read_error(case["body"].encode(), int(case["status"]))
    assert (str(kind), text) == (case["kind"], case["text"])


def wrap(message: str, *servers: str) -> bytes:
    """What Gym makes of an error that `servers` (outermost first) hand on."""
    body = json.dumps(message).encode()
    for server in reversed(servers):
        body = json.dumps(f"Hit an exception in {server} calling an inner server: {body!r}").encode()
    return body


@given(
    st.text().filter(lambda text: not text.startswith("Hit an exception")),
    st.lists(st.from_regex(r"[A-Z][A-Za-z]{0,9}___[a-z_]{1,9}", fullmatch=True), max_size=4),
)
def test_any_message_survives_any_number_of_hops(message: str, servers: list[str]) -> None:
    names = [server.partition("___")[2] for server in servers]
    each_once = [name for i, name in enumerate(names) if name not in names[i - 1 : i]]
    assert unwrap(wrap(message, *servers)) == (each_once, message.strip())


@given(st.binary())
def test_no_body_is_too_strange(body: bytes) -> None:
    kind, text = read_error(body, 500)
    assert kind in FailureKind and text


@pytest.mark.parametrize(
    "message",
    [
        'ClientConnectorError("Cannot connect to host 127.0.0.1:1 ssl:default [Connect call failed")',
        "ServerDisconnectedError('Server disconnected')",
        "ConnectionResetError(104, 'Connection reset by peer')",
        "An unknown error occurred",
        "Request was cancelled",
        "",
    ],
)
def test_inner_connection_errors_are_infrastructure(message: str) -> None:
    assert read_error(wrap(message, "SimpleAgent___agent", "VLLMModel___policy_model"), 500)[0] == "infrastructure"


def test_cut_off_text_is_shown_raw() -> None:
    body = json.dumps("Hit an exception in A___b calling an inner server: b'\"KeyErr").encode()
    assert unwrap(body) == (["b"], "b'\"KeyErr")


def test_long_messages_are_shortened() -> None:
    text = read_error(wrap("x" * 10_000, "A___b"), 500)[1]
    assert len(text) < MAX_TEXT_CHARS + 100 and "10000 characters" in text


DEEP = "[" * 100_000
HOSTILE = {
    "operators": "-" * 100_000 + "1",
    "a sum": "1" + "+1" * 50_000,
    "attributes": "a" + ".a" * 50_000,
    "parentheses": "(" * 100_000,
    "negations": "not " * 100_000 + "1",
    "an f-string": 'f"{' * 200,
    "not what repr writes": r"b'\\q'",
    "a literal that goes on": "b'a' + b'b'",
    "no end": "b'" + "x" * 100_000,
    "underscores": "Hit an exception in " + "a___" * 100_000,
    "connections": "Connection" * 100_000,
    "a literal of 3 MB": repr(b"x" * 3_000_000),
    "escapes of 3 MB": repr(bytes(750_000)),
    "a literal of 20 MB": repr(b"x" * 20_000_000),
    "an object nested deep": repr(f'{{"detail": {DEEP}}}'.encode()),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_of_an_environment_is_read_in_bounded_time(text: str) -> None:
    body = json.dumps(f"Hit an exception in S___m calling an inner server: {text}").encode()
    began = time.thread_time()
    kind, read = read_error(body, 500)
    assert kind in FailureKind and 0 < len(read) < MAX_TEXT_CHARS + 200
    assert time.thread_time() - began < 10  # a hundredth of that on an idle machine


# An agent and rollouts at it, in one process: none is answered before all have arrived.
SIDE_BY_SIDE = """
import asyncio, resource, sys
from aiohttp import web
from trl_gym.gym.client import GymAnswer, new_session, run_rollout
from trl_gym.gym.discovery import AgentInfo

async def main(number):
    barrier, seen = asyncio.Barrier(number), []

    async def run(_request):
        await barrier.wait()
        seen.append(agent.in_flight.number)
        return web.json_response({"reward": 1.0, "response": {"output": []}})

    (app := web.Application()).router.add_post("/run", run)
    await (runner := web.AppRunner(app)).setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    agent = AgentInfo("agent", f"http://127.0.0.1:{runner.addresses[0][1]}", None, "simple_agent")
    async with new_session(number) as session:
        row = {"responses_create_params": {"input": []}}
        started = [asyncio.ensure_future(run_rollout(session, agent, row, deadline_s=60)) for _ in range(number)]
        for ended in asyncio.as_completed(started):
            if not isinstance(outcome := await ended, GymAnswer):
                break
        print(outcome if outcome.__class__ is not GymAnswer else f"{max(seen)} at a time", flush=True)
        for one in started:
            one.cancel()
        await asyncio.gather(*started, return_exceptions=True)
        print(agent.in_flight.number, flush=True)
        await runner.cleanup()

resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
asyncio.run(main(100))
"""


@pytest.mark.parametrize(
    ("hard_limit", "words"), [(1024, "100 at a time"), (64, "The limit of open files is 64 here")]
)
def test_more_rollouts_than_the_soft_limit_of_open_files(hard_limit: int, words: str) -> None:
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(hard_limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    outcome, left = done.stdout.splitlines()
    assert words in outcome and left == "0", done.stderr


async def test_a_gym_that_may_open_too_few_files_is_named_as_well(
    session: aiohttp.ClientSession, serve: Serve
) -> None:
    agent = await serve(answering(b'"Cannot connect to host 127.0.0.1:1 [Too many open files]"', status=500))
    failure = await run_rollout(session, agent, ROW, deadline_s=30)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.INFRASTRUCTURE
    assert "[Too many open files]. The limit of open files is" in failure.text and "`ulimit -Hn`" in failure.text
