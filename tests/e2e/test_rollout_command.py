"""`trl-gym rollout` and `trl-gym eval` with the real servers: Ctrl-C in the middle, the same command again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.commands.plain_endpoint import KEY, MODEL, plain_endpoint
from tests.conftest import wait_for
from tests.e2e.servers import Pair
from tests.e2e.training import CALCULATOR
from trl_gym import PolicyServer
from trl_gym.cli import main
from trl_gym.rollouts.journal import read_journal
from trl_gym.rollouts.source import JournalSource

pytestmark = [pytest.mark.e2e, pytest.mark.shares("small")]

NUM_ROWS, NUM_GENERATIONS = 12, 4
CONFIG = str(CALCULATOR / "calculator.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, calculator_data: Any) -> tuple[Path, Path]:
    return calculator_data.generate(tmp_path_factory.mktemp("data"), num_train=NUM_ROWS, num_validation=3, seed=0)


OWN_GYM = ("--gym_config_paths", CONFIG)


def arguments(
    command: str, policy: PolicyServer, output_dir: Path, *datasets: object, gym: tuple[str, str] = OWN_GYM
) -> list[str]:
    return [
        command,
        *("--dataset", *map(str, datasets)),
        *gym,
        *("--base_url", policy.base_url, "--model", policy.model_name),
        *("--output_dir", str(output_dir), "--num_generations", str(NUM_GENERATIONS)),
        *("--max_tokens", "64", "--deadline", "60"),
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(read_journal(folder / "rollouts"))


def test_ctrl_c_loses_nothing_and_the_same_command_goes_on(
    policy: PolicyServer, data: tuple[Path, Path], tmp_path: Path
) -> None:
    command = arguments("rollout", policy, tmp_path, data[0])
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_gym.cli", *command, "--max_inflight", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: process.poll() is not None or (tmp_path / "rollouts").is_dir())
    wait_for(lambda: process.poll() is not None or sum(r["failure"] is None for r in lines(tmp_path)) >= 5)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=400)
    interrupted = [r for r in lines(tmp_path) if r["failure"] is None]
    assert process.returncode == 130, errors
    assert 5 <= len(interrupted) < NUM_ROWS * NUM_GENERATIONS
    assert f"interrupted: {len(interrupted)} of 48 rollouts are in" in errors
    assert "same command again" in errors
    assert out == "" and not (tmp_path / "summary.json").exists()

    again = subprocess.run(
        [sys.executable, "-m", "trl_gym.cli", *command], capture_output=True, text=True, timeout=400
    )
    assert again.returncode == 0, again.stderr
    assert f"{len(interrupted)} of 48 rollouts are in {tmp_path / 'rollouts'} already" in again.stderr
    assert "rollouts 48" not in again.stderr  # progress counts what is run
    good = [r for r in lines(tmp_path) if r["failure"] is None]
    assert Counter((r["task_index"], r["member"]) for r in good) == Counter(
        (task, member) for task in range(NUM_ROWS) for member in range(NUM_GENERATIONS)
    )
    assert {r["rollout_id"] for r in interrupted} <= {r["rollout_id"] for r in good}
    summary = json.loads((tmp_path / "summary.json").read_text())
    own = summary["environments"]["calculator_simple_agent"]
    assert (summary["planned"], summary["found"]) == (48, len(interrupted))
    assert (own["rollouts"], own["failed"]) == (48, {})
    rewards = [r["reward"] for r in good]
    assert own["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert own["seconds_p95"] >= own["seconds_p50"] > 0
    assert "calculator_simple_agent: rollouts 48, failed 0, reward " in again.stdout

    # What was collected can be trained on: every group is whole and has its tokens.
    assert all(r["mode"] == "rollout" and r["completion_ids"] and sum(r["env_mask"]) > 0 for r in good)
    JournalSource(tmp_path / "rollouts")


def test_evaluation_of_named_sets(
    pair: Pair, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = ("--gym_head_url", pair.gym.head_url)
    command = arguments("eval", pair.policy, tmp_path, f"seen={data[0]}", data[1], gym=running)
    assert main([*command, "--limit", "3"]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert list(result["sets"]) == ["seen", "validation"]
    for name, numbers in result["sets"].items():
        own = [r for r in lines(tmp_path) if r["dataset"] == name]
        assert len(own) == numbers["rollouts"] == 3 * NUM_GENERATIONS
        assert all(r["mode"] == "eval" for r in own)
        assert numbers["pass@1"] == pytest.approx(numbers["mean@4"])
        assert numbers["pass@1"] <= numbers["pass@2"] <= numbers["pass@4"]
    shown = capsys.readouterr().out
    assert "seen: rollouts 12, failed 0" in shown and "pass@4" in shown
    # Again: everything is there, and nothing is started.
    assert main([*command, "--limit", "3"]) == 0
    assert "24 of 24 rollouts are in" in capsys.readouterr().err
    assert len(lines(tmp_path)) == 24


def test_a_foreign_endpoint_gives_text_without_tokens(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with plain_endpoint() as server:
        status = main(
            [
                "rollout",
                *("--dataset", str(data[1]), "--gym_config_paths", CONFIG, "--output_dir", str(tmp_path)),
                *("--base_url", server.base_url, "--model", MODEL, "--api_key", KEY),
            ]
        )
        assert len(server.requests) == 3
    assert status == 0
    shown = capsys.readouterr()
    assert shown.err.count("without token ids") == 1
    assert "rollouts 3, failed 0, reward 0.000" in shown.out and "turns 1.0" in shown.out
    recorded = lines(tmp_path)
    assert [(r["reward"], r["completion_ids"]) for r in recorded] == [(0.0, [])] * 3
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "rollouts").iterdir())
    assert "My key is [redacted]" in json.dumps(recorded[0]["response"])
