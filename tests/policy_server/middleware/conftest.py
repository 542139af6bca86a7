"""The middleware around a fake server; a file that needs another one has fixtures of these names."""

from __future__ import annotations

import pytest

from tests.policy_server.fake_vllm import FakeVllm
from tests.policy_server.middleware.test_app import Http


@pytest.fixture
def app() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def http(app: FakeVllm) -> Http:
    return Http(app)
