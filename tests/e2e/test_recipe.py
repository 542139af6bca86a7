"""The recipe as a user starts it, and as a user, or the machine, ends it."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import load, server_below, wait_for
from tests.e2e.training import CALCULATOR, ROOT
from tests.fork_ranks import forked_into, use_forks
from trl_gym import train
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.responses import output_items
from trl_gym.rollouts.journal import read_journal

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("alone")]

ACCELERATE = Path(sys.executable).with_name("accelerate")
undocumented_metrics = load("docs_names", ROOT / "scripts" / "docs_names.py").undocumented_metrics
README = (ROOT / "README.md").read_text()
RECIPE = ["recipes/grpo.py", "--config", "recipes/quickstart.yaml", "--gym_engine", "vllm"]
LAUNCHER = [ACCELERATE, "launch", "--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCHER += ["--dynamo_backend", "no"]
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0  # the project promises 10 s where the machine is idle


def launch(output_dir: Path, *options: str, by: Sequence[str | Path] = (sys.executable,)) -> subprocess.Popen[str]:
    command = [*by, *RECIPE, "--output_dir", str(output_dir), *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if _is_running(p)]


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two
        return False


def after_a_step(run: BaseProcess, output: Path, metrics: Path, *parents: int) -> list[psutil.Process]:
    """Wait for the first step of a run; return every process below the parents."""

    def has_stepped() -> bool:
        assert run.exitcode is None, output.read_text()
        return metrics.exists() and '"reward"' in metrics.read_text()

    wait_for(has_stepped, "the first step", timeout_s=START_TIMEOUT_S)
    below = [process for parent in parents for process in psutil.Process(parent).children(recursive=True)]
    assert len(below) >= 5  # two supervisors; Gym; vLLM's API server and engine
    return below


def train_in_a_terminal(words: list[str], control: socket.socket) -> None:
    """Be `trl-gym train` in a foreground group of its own. Its policy server is forked by who listens to `control`."""
    os.setsid()
    use_forks(control)
    sys.exit(train.main(words))


def run_script(folder: Path, name: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ |= environment
    runpy.run_path(name, run_name="__main__")


def readme_in(folder: Path, model: Path, data: Path) -> dict[str, str]:
    """Run in a folder the commands that the README shows first; leave the Python after them as `run.py`, with a model
    that a CPU can train and the environment whose tools that one knows. Return what the environment had."""
    shown = re.search(r"```bash\n(trl-gym new-environment .*?)```\s+```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    commands, script = shown.groups()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TRL_GYM_PYTHON": str(ROOT / ".gym-venv" / "bin" / "python"),
    }
    subprocess.run(["bash", "-ec", commands], cwd=folder, env=environment, check=True, capture_output=True)
    others = {
        "Qwen/Qwen3-0.6B": model,
        "my_environment/my_environment.yaml": CALCULATOR / "calculator.yaml",
        "my_environment/data/train.jsonl": data,
    }
    for shown_name, other in others.items():
        assert script.count(f'"{shown_name}"') == 1
        assert shown_name.startswith("Qwen") or (folder / shown_name).is_file()
        script = script.replace(shown_name, str(other))
    (folder / "run.py").write_text(script)
    return environment


def test_the_quickstart_shortened(small_policy: Path, tmp_path: Path) -> None:
    run = launch(tmp_path, "--max_steps", "2", "--eval_steps", "2", "--save_steps", "2")
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 0, output
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) < 40, output  # no log spam
    for expected in (
        "policy server log:",
        "NeMo Gym log:",
        "step 2/2: reward",
        "before → after",
        "checkpoint: ",
        "view ",
    ):
        assert expected in output, output
    [log] = (tmp_path / "logs").glob("policy_server-*.log")
    assert "imports vLLM itself" not in log.read_text()  # forked, from what imported it while the trainer started
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert [row["step"] for row in metrics if "eval_reward" in row] == [0, 2]
    assert all("reward" in row and "seconds/rollouts" in row for row in metrics[1:])
    assert 0.2 < metrics[0]["eval_success"] <= 0.65
    assert undocumented_metrics({name for row in metrics for name in row}, ROOT) == []
    assert len([r for r in read_journal(tmp_path / "rollouts") if r["mode"] == "train"]) == 2 * 128
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint-2")
    assert model.config.vocab_size >= len(tokenizer)


def test_the_readme_runs_as_pasted_and_kill_9_leaves_nothing(
    small_policy: Path, calculator_data: Any, tmp_path: Path
) -> None:
    rows, _ = calculator_data.generate(tmp_path / "data", num_train=64, num_validation=1, seed=0)
    environment, printed = readme_in(tmp_path, small_policy, rows), tmp_path / "printed"
    run = forked_into([printed, printed], run_script, tmp_path, "run.py", environment)
    assert run.pid is not None
    below = after_a_step(run, printed, tmp_path / "out" / "metrics.jsonl", run.pid)
    run.kill()
    wait_for(lambda: not running(below), lambda: f"still running: {running(below)}", timeout_s=END_TIMEOUT_S)
    output = printed.read_text()
    assert "tool calls: read by vLLM's parser `hermes` (guessed from `<tool_call>` in the chat template)" in output
    assert "default: `gradient_accumulation_steps` is 8, for 8 tasks" in output, output
    rollouts = list(read_journal(tmp_path / "out" / "rollouts"))
    assert len(rollouts) >= 64 and all(rollout["failure"] is None for rollout in rollouts)
    called = [item for rollout in rollouts for item in output_items(rollout) if item["type"] == "function_call"]
    assert called, output_items(rollouts[0])


def test_ctrl_c_ends_everything(forks: ForkServer, small_policy: Path, tmp_path: Path) -> None:
    words = [*RECIPE[1:], "--output_dir", str(tmp_path), "--max_steps", "500", "--gradient_accumulation_steps", "1"]
    words += ["--eval_strategy", "no", "--eval_on_start", "false"]
    printed = tmp_path / "printed"
    run = forked_into([printed, printed], train_in_a_terminal, words, forks._control)
    assert run.pid is not None
    parents = run.pid, server_below(forks._process).pid
    below = after_a_step(run, printed, tmp_path / "metrics.jsonl", *parents)
    os.killpg(run.pid, signal.SIGINT)  # a terminal sends it to the whole foreground group
    wait_for(lambda: not running(below), lambda: f"still running: {running(below)}", timeout_s=END_TIMEOUT_S)
    run.join(300)
    output = printed.read_text()
    assert run.exitcode == 130, output
    assert "interrupted" in output and "the same command starts with the first step" in output
    assert len(list(read_journal(tmp_path / "rollouts"))) >= 32  # what was finished is kept


@pytest.mark.no_policy
def test_a_mistake_is_one_readable_error_under_accelerate(random_policy: Path, tmp_path: Path) -> None:
    run = launch(tmp_path, "--model_name_or_path", str(random_policy), "--gym_deadline", "0", by=LAUNCHER)
    output, _ = run.communicate(timeout=600)
    assert run.returncode not in (0, None)
    assert "ConfigError" in output and "gym_deadline" in output and "Traceback" not in output, output


# The script as a user runs it, once for each mistake: importing what it needs takes longest.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, "recipes")
for options in json.loads(sys.argv[1]):
    sys.argv = ["recipes/grpo.py", "--config", "recipes/quickstart.yaml", "--gym_engine", "vllm", *options]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            runpy.run_path("recipes/grpo.py", run_name="__main__")
        except SystemExit as end:
            print(json.dumps([end.code, told.getvalue()]))
"""


@pytest.mark.no_policy
def test_mistakes_of_the_user_are_one_readable_error(random_policy: Path, tmp_path: Path) -> None:
    bare = tmp_path / "model"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(random_policy / name)
    mistakes = [
        (random_policy, "--gym_config_paths no/a.yaml no/b.yaml", ("ConfigError", "no/a.yaml", "no/b.yaml")),
        (bare, "", ("ConfigError", "tokenizer")),
        (random_policy, "--gym_deadline 0 --gym_max_inflight 0", ("ConfigError", "gym_deadline", "gym_max_inflight")),
        # The server process ends while it reads its arguments.
        (random_policy, '--gym_vllm_args {"no-such-flag":1}', ("PolicyServerError", "--no-such-flag")),
    ]
    runs = [
        ["--model_name_or_path", str(model), *options.split(), "--output_dir", str(tmp_path / "out")]
        for model, options, _ in mistakes
    ]
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(told) == len(mistakes), done.stdout
    for (code, text), (_, _, expected) in zip(told, mistakes, strict=True):
        assert code == 1 and all(part in text for part in expected), text
        assert "Traceback" not in text.split("Last lines of its log")[0], text
