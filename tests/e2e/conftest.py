"""Fixtures of the end-to-end tests: one policy server at a time, shared where a test does not end or configure it.

A test that takes `pair`, `served` or `untied_pair` attaches to a server that is started once; its mark `shares` names
it, and those of one name run one after another. A test that starts a server of its own takes `alone`, which ends what
ran before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from tests.e2e.servers import (
    API_KEY,
    SHARED,
    OneAtATime,
    Pair,
    Served,
    calculator_pair,
    command_served,
    push_file,
    untied,
)
from tests.policy_server.tiny_model import build_random_policy
from trl_gym import GymServers, PolicyServer
from trl_gym.policy_server import fork_server, server
from trl_gym.policy_server.command import KEY_VARIABLE
from trl_gym.policy_server.fork_server import ForkServer

RUNS = Path(__file__).resolve().parents[2] / "runs"
ORIGINAL = "original"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that share a server together, in the order of `SHARED`; the others that start servers come after them,
    those that start none before."""

    def place(item: pytest.Item) -> int:
        mark = item.get_closest_marker("shares")
        if mark is not None:
            return SHARED.index(mark.args[0])
        return len(SHARED) if item.get_closest_marker("e2e") else -1

    items.sort(key=place)


@pytest.fixture(scope="session")
def small_policy(tiny_policy: ModuleType) -> Path:
    """The quickstart's policy, in the place where the quickstart keeps it; built once per checkout."""
    return tiny_policy.build_tiny_policy(RUNS / "small_policy", seed=0)


@pytest.fixture(scope="session")
def untied_policy(small_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untied(small_policy, tmp_path_factory.mktemp("policy") / "untied")


@pytest.fixture(scope="session")
def random_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_policy(tmp_path_factory.mktemp("policy") / "random")


@pytest.fixture(scope="module", autouse=True)
def policy_key() -> Iterator[None]:
    """Give servers, and clients in other processes, one key; the environment is where both look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, API_KEY)
        yield


@pytest.fixture(scope="session")
def running() -> Iterator[OneAtATime]:
    kept = OneAtATime()
    yield kept
    kept.end()


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def warm(forks: ForkServer) -> Iterator[None]:
    """Let every `PolicyServer`, also those that trainers make, fork its servers while tests of this module run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForkServer, "start", lambda self: self)  # a trainer's own, which would import vLLM once more
        for module in (fork_server, server):
            patch.setattr(module, "execute", forks.fork)
        yield


@pytest.fixture(scope="module")
def alone(running: OneAtATime) -> None:
    """End the shared server: a test of this module starts one."""
    running.end()


@pytest.fixture(scope="module")
def pair(warm: None, running: OneAtATime, small_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A server of the small policy with its own weights, whatever was pushed before, and a calculator."""
    start = partial(calculator_pair, small_policy, tmp_path_factory.mktemp("small"), **{"max-num-seqs": 128})
    found = running.get("small", start)
    push_file(found.policy.client, small_policy / "model.safetensors", ORIGINAL)
    return found


@pytest.fixture(scope="module")
def policy(pair: Pair) -> PolicyServer:
    return pair.policy


@pytest.fixture(scope="module")
def gym(pair: Pair) -> GymServers:
    return pair.gym


@pytest.fixture(scope="module")
def served(
    forks: ForkServer, running: OneAtATime, random_policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Served:
    """`trl-gym serve` of a random policy with its own weights, whatever was pushed before."""
    found = running.get("random", partial(command_served, forks, random_policy, tmp_path_factory.mktemp("random")))
    push_file(found.client, random_policy / "model.safetensors", ORIGINAL)
    return found


@pytest.fixture(scope="module")
def untied_pair(
    warm: None, running: OneAtATime, untied_policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """A server of the small policy with an output layer of its own, and a calculator."""
    found = running.get("untied", partial(calculator_pair, untied_policy, tmp_path_factory.mktemp("untied")))
    push_file(found.policy.client, untied_policy / "model.safetensors", ORIGINAL)
    return found
