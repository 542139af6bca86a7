"""A rollout that fails is a value with a cause, whatever a server does to us."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.gym.client import GymAnswer, new_session, run_rollout
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
        runner = web.AppRunner(app)
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


async def test_an_answer_with_a_finite_reward(session: aiohttp.ClientSession, serve: Serve) -> None:
    received: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        received.append(await request.json())
        return web.json_response({"reward": 1, "response": {"output": []}, "mask_sample": False})

    row = {"responses_create_params": {"input": [], "metadata": None, "temperature": 1.0}, "x": None}
    answer = await run_rollout(session, await serve(handler), row, deadline_s=5)
    assert isinstance(answer, GymAnswer) and answer.result["reward"] == 1 and 0 < answer.seconds < 5
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
    failure = await run_rollout(session, await serve(answering(body)), ROW, deadline_s=5)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.ENVIRONMENT
    assert words in failure.text and failure.where == "agent /run"


async def test_a_valid_measurement_may_name_a_failure_kind(session: aiohttp.ClientSession, serve: Serve) -> None:
    body = b'{"reward": 0.5, "mask_sample": false, "failure_kind": "judge_unparseable"}'
    assert isinstance(await run_rollout(session, await serve(answering(body)), ROW, deadline_s=5), GymAnswer)


async def test_envelope_of_an_environment_server(session: aiohttp.ClientSession, serve: Serve) -> None:
    body = json.dumps({"episode_id": {"rollout_id": "r"}, "task_id": {}, "result": {"reward": 0.25}}).encode()
    answer = await run_rollout(session, await serve(answering(body)), ROW, deadline_s=5)
    assert isinstance(answer, GymAnswer) and answer.result == {"reward": 0.25}


async def test_transport_failures_inside_of_gym_are_infrastructure(
    session: aiohttp.ClientSession, serve: Serve
) -> None:
    failure = {"failure_kind": "transport_unreachable", "failure_reason": "model server"}
    body = json.dumps({"episode_id": {}, "failure": failure}).encode()
    result = await run_rollout(session, await serve(answering(body)), ROW, deadline_s=5)
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
    failure = await run_rollout(session, await serve(answering(body, status)), ROW, deadline_s=5)
    assert isinstance(failure, RolloutFailure) and failure.kind is kind


async def test_deadline(session: aiohttp.ClientSession, serve: Serve) -> None:
    async def handler(_request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    failure = await run_rollout(session, await serve(handler), ROW, deadline_s=0.1)
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

    failure = await run_rollout(session, await serve(handler), ROW, deadline_s=5)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.INFRASTRUCTURE


async def test_connection_refused(session: aiohttp.ClientSession, unused_tcp_port: int) -> None:
    agent = AgentInfo("agent", f"http://127.0.0.1:{unused_tcp_port}", None, "simple_agent")
    failure = await run_rollout(session, agent, ROW, deadline_s=5)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.INFRASTRUCTURE
    assert "ClientConnectorError" in failure.text and agent.url in failure.text


async def test_cancellation_passes_through(session: aiohttp.ClientSession, serve: Serve) -> None:
    async def handler(_request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    task = asyncio.create_task(run_rollout(session, await serve(handler), ROW, deadline_s=60))
    await asyncio.sleep(0.1)
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
        await run_rollout(session, agent, ROW, deadline_s=5)
    assert seen == [None, None]
