"""Odd tokens over many turns: real vLLM, real NeMo Gym, three environments, temperature 1.5.

The same rollouts from a stock server, which must drift (else the test shows nothing), and through the gateway in front
of it, which must not. `benchmarks/token_fidelity.py` does the same with `trl-gym serve`, and prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import token_fidelity
from tests.e2e import stock_vllm
from tests.e2e.training import MAX_MEAN_GAP, ROOT
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT
from trl_gym.policy_server.fork_server import ForkServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def options() -> argparse.Namespace:
    python = str(ROOT / ".gym-venv" / "bin" / "python")
    return argparse.Namespace(rollouts=120, temperature=1.5, gym_python=python)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fidelity")


@pytest.fixture(scope="module")
def stock(alone: None, forks: ForkServer, small_policy: Path, folder: Path) -> Iterator[str]:
    flags = ["--max-model-len", str(token_fidelity.MAX_MODEL_LEN), "--disable-uvicorn-access-log"]
    flags += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"  # NeMo Gym keeps connections open
    variables = {name: DEFAULT_ENVIRONMENT[name]}
    process, url = stock_vllm.start(forks, small_policy, folder / "stock.log", *flags, **variables)
    try:
        token_fidelity.wait(process, f"{url}/v1")
        yield f"{url}/v1"
    finally:
        process.stop()


def test_a_stock_server_drifts(stock: str, small_policy: Path, folder: Path, options: argparse.Namespace) -> None:
    outcome = token_fidelity.collect(stock, small_policy, folder, options, has_ledger=False)
    assert outcome.failures == []
    assert outcome.num_multi_turn >= 50 and len(outcome.agents) == 3
    assert outcome.num_drifting > outcome.num_multi_turn // 10
    assert max(outcome.gaps) > 1.0


def test_the_gateway_in_front_of_it_does_not(
    stock: str, small_policy: Path, folder: Path, options: argparse.Namespace
) -> None:
    with token_fidelity.gateway(stock, folder) as url:
        outcome = token_fidelity.collect(url, small_policy, folder, options)
    assert outcome.failures == []
    assert outcome.num_multi_turn >= 50 and len(outcome.agents) == 3
    assert outcome.num_odd > outcome.num_multi_turn // 10, "the tokens are canonical: this test shows nothing"
    assert outcome.num_drifting == 0, outcome.causes
    assert sum(outcome.gaps) / len(outcome.gaps) < MAX_MEAN_GAP
