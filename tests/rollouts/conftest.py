"""Fixtures of the tests of rollouts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.rollouts.fake_agent import Agent
from trl_gym.gym.servers import AgentInfo


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
