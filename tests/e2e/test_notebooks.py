"""The four notebooks from top to bottom, on the real servers. One policy server, that of the first, for all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import server_below
from tests.notebooks.running import ROOT, STORES, RunningNotebook, workspace
from tests.test_processes import alive
from trl_gym.policy_server.fork_server import ForkServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


# Its policy server is forked by the tests' fork server.
IN_FORKS = """
import socket, sys
sys.path.insert(0, {root!r})
from tests.fork_ranks import use_forks
use_forks(socket.socket(fileno={control}))
del sys.path[0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace(tmp_path_factory.mktemp("notebooks") / "checkout")


@pytest.fixture(scope="module")
def first(alone: None, forks: ForkServer, folder: Path) -> Iterator[RunningNotebook]:
    """`01_first_rollouts`, executed but for the cell that stops the servers."""
    assert forks._control is not None
    control = forks._control.fileno()
    with RunningNotebook("01_first_rollouts", folder).kernel(pass_fds=[control]) as notebook:
        notebook.execute(IN_FORKS.format(root=str(ROOT), control=control))
        notebook.run()
        yield notebook


@pytest.fixture(scope="module")
def policy_url(first: RunningNotebook) -> str:
    return first.evaluate("policy.base_url")


def test_01_shows_rollouts_as_conversations_and_tokens(first: RunningNotebook) -> None:
    assert len(re.findall(r"^What is .*rewards \[(?:[\d.]+(?:, )?){4}\]$", first.text, re.MULTILINE)) == 4
    views = first.outputs("text/html")
    conversation = next(view for view in views if "policy calls" in view)
    assert "tool answers" in conversation and "reward 1" in conversation
    tokens = next(view for view in views if "log p = " in view)
    num_sampled = int(re.search(r"(\d+) sampled \(trained\)", tokens)[1])  # type: ignore[index]
    assert tokens.count("log p = ") == num_sampled > 0
    assert any("<iframe srcdoc=" in view for view in views)
    first.check_stored()


def test_03_rolls_out_an_environment_of_its_own(folder: Path, policy_url: str) -> None:
    with RunningNotebook("03_write_an_environment", folder, {"POLICY_URL": policy_url}).kernel() as notebook:
        notebook.run()
        notebook.run(last=True)
    assert "\nOK" in notebook.text  # the tests of the new environment
    assert re.search(r"guesses +\{'called': 0\.0, 'answer': 0\.0\}", notebook.text)
    assert "outcomes: Counter({'reward': 16})" in notebook.text
    notebook.check_stored()


@pytest.fixture(scope="module")
def trained(folder: Path, policy_url: str) -> Iterator[RunningNotebook]:
    num_steps = 8 if STORES else 2  # what readers see is what the notebook says
    notebook = RunningNotebook("02_train_and_compare", folder, {"POLICY_URL": policy_url, "NUM_STEPS": num_steps})
    with notebook.kernel():
        notebook.run()
        notebook.run(last=True)
        yield notebook


def test_02_trains_and_charts_every_step(trained: RunningNotebook, folder: Path) -> None:
    assert re.search(r"eval_reward +0\.\d+ +→ +0\.\d+", trained.text)
    assert len(trained.outputs("image/png")) == 2  # the live chart, drawn again in place, and the comparison
    lines = [json.loads(line) for line in (folder / "runs/notebooks/train/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "reward" in line]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) == (8 if STORES else 2)
    assert max(line["logprob_gap/mean"] for line in lines if "reward" in line) < 0.02
    last = len(steps)
    assert f"step {last}/{last} ·" in "".join(trained.outputs("text/html"))
    assert "model.safetensors" in trained.text
    trained.check_stored()


def test_04_finds_what_it_broke(trained: RunningNotebook, folder: Path) -> None:
    notebook = RunningNotebook("04_debug_a_run", folder)
    notebook.take_kernel(trained)
    notebook.run()
    num_lines = int(re.search(r"(\d+) rollouts of two turns", notebook.text)[1])  # type: ignore[index]
    assert num_lines >= 16
    quarter = range(num_lines // 4, num_lines // 4 + 2)
    assert int(re.search(r"(\d+) × infrastructure at POST /run", notebook.text)[1]) in quarter  # type: ignore[index]
    assert int(re.search(r"(\d+) of \d+ rollouts with tokens drifted", notebook.text)[1]) in quarter  # type: ignore[index]
    assert int(re.search(r"(\d+) rollouts with a gap above", notebook.text)[1]) in quarter  # type: ignore[index]
    assert len(notebook.outputs("image/png")) == 3
    notebook.check_stored()


def test_99_the_last_cell_stops_everything(first: RunningNotebook, forks: ForkServer) -> None:
    parents = [psutil.Process(int(first.evaluate("os.getpid()"))), server_below(forks._process)]
    assert all(parent.children(recursive=True) for parent in parents)
    first.run(last=True)
    left = [child for parent in parents for child in parent.children(recursive=True)]
    assert [child for child in left if alive(child.pid)] == []
