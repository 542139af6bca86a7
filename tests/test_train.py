"""The training script as far as it needs no server: its command, what it says about mistakes, its summary."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerState

from tests.conftest import RECIPES, load, wait_for
from trl_gym import made_with
from trl_gym.cli import main
from trl_gym.config import GymGRPOConfig
from trl_gym.errors import ConfigError
from trl_gym.train import (
    ScriptArguments,
    after_interrupt,
    checkpoint_to_start_from,
    early_fork_server,
    make_data,
    model_to_train,
    newest_checkpoint,
    set_small_learning_rate,
    summarize,
    told_options,
    was_evaluated,
)

MINIMAL = ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_model_it_says_what_to_do(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *MINIMAL]) == 1
    shown = capfd.readouterr().err
    assert "`model_name_or_path` is not set. Set it to a model folder" in shown and "`trl-gym quickstart`" in shown
    assert "Traceback" not in shown


def test_the_small_policy_is_trained_where_no_model_is_named(here: Path) -> None:
    shipped = ScriptArguments(small_policy_dir="recipes/small_policy")
    assert model_to_train(None, shipped) == str(RECIPES / "small_policy")
    assert model_to_train("Qwen/Qwen3-0.6B", shipped) == "Qwen/Qwen3-0.6B"
    with pytest.raises(
        ConfigError, match=r"`small_policy_dir` is runs/none, which has no config.json. Set it to recipes"
    ):
        model_to_train(None, ScriptArguments(small_policy_dir="runs/none"))


@pytest.mark.parametrize(
    ("named", "argv", "expected"),
    [
        (None, ["--seed", "1"], 0.5),
        (None, ["--learning_rate", "1e-6"], 1e-6),  # given, although it is the default
        (None, ["--config", "rate.yaml"], 1e-6),
        ("Qwen/Qwen3-0.6B", ["--seed", "1"], 1e-6),
    ],
)
def test_the_small_policy_has_its_own_learning_rate_unless_one_is_given(
    here: Path, named: str | None, argv: list[str], expected: float
) -> None:
    (here / "rate.yaml").write_text("learning_rate: 1.0e-6\n")
    script = ScriptArguments(small_policy_dir="recipes/small_policy", small_policy_learning_rate=0.5)
    args = GymGRPOConfig(output_dir="out", use_cpu=True, report_to=[])
    set_small_learning_rate(model_to_train(named, script), script, args, told_options(argv))
    assert args.learning_rate == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gym-deadline", "0"], "`gym_deadline` is 0.0. Set it to a number of seconds above 0."),
        (["--gym-deadlines", "5"], "trl-gym doctor"),
        (["--config", "nofile"], "`--config` is 'nofile', and there is no such file: it was looked for in {here} and"),
        (["--config=recipes/nofile.yaml"], "`--config` is 'recipes/nofile.yaml', and there is no such file"),
        (["--config", "options.yaml"], "`gym_max_inflight` is None. Set it to a whole number."),
    ],
)
def test_mistakes_in_options_are_one_message(
    here: Path, capfd: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    (here / "options.yaml").write_text("gym_max_inflight: null\n")
    assert main(["train", *MINIMAL, *options]) == 1
    shown = capfd.readouterr().err
    assert expected.format(here=here) in shown and "ConfigError" in shown and "Traceback" not in shown


def with_fork_server(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes if a fork server is among them. Before it is executed it looks like its parent."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if any("policy_server.engine.forking" in word for one in processes for word in one.cmdline()):
            return processes
    return []


def test_the_module_and_the_recipe_are_the_same_script(tmp_path: Path) -> None:
    """It begins with a fork server, and ends it when the options turn out to be wrong."""
    assert load("recipe_grpo", RECIPES / "grpo.py").main.__module__ == "trl_gym.train"
    command = [sys.executable, str(RECIPES / "grpo.py"), *MINIMAL, "--gym_deadline", "0"]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as run:
        started = wait_for(lambda: with_fork_server(psutil.Process(run.pid).children(recursive=True)), "a fork server")
        told = run.stderr.read()
    assert run.returncode == 1 and "`gym_deadline` is 0.0." in told and "Traceback" not in told
    wait_for(lambda: not any(map(runs, started)), lambda: f"still there: {started}")


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("argv", "environment", "starts"),
    [
        (["--output_dir", "out"], {}, True),
        (["--output_dir", "out"], {"RANK": "0", "OMPI_COMM_WORLD_RANK": "3"}, True),
        (["--output_dir", "out"], {"RANK": "1"}, False),
        (["--output_dir", "out"], {"PMI_RANK": "2"}, False),
        (["--vllm_mode", "server"], {}, False),
        (["--vllm_mode=server"], {}, False),
        (["--gym_replay", "rollouts"], {}, False),
        (["--gym_engine", "sglang"], {}, False),
        (["--gym_engine=vllm"], {}, True),
        (["--config", "elsewhere.yaml"], {}, False),
        (["--config", "elsewhere.yaml", "--vllm_mode", "colocate"], {}, True),
        (["--vllm_mode", "colocate", "--config=elsewhere.yaml"], {}, True),
        (["--config", "missing.yaml"], {}, False),
        (["--config", "broken.yaml"], {}, False),
        (["--config", "list.yaml"], {}, True),
        (["--config"], {}, False),
        (["--config", "elsewhere.yaml", "--help"], {}, False),
        ([], {}, False),
    ],
)
def test_a_fork_server_is_started_early_where_a_policy_server_will_be(
    here: Path, argv: list[str], environment: dict[str, str], starts: bool
) -> None:
    (here / "elsewhere.yaml").write_text("vllm_mode: server\n")
    (here / "broken.yaml").write_text("vllm_mode: [server\n")
    (here / "list.yaml").write_text("- 1\n")
    assert (early_fork_server(argv, environment) is not None) == starts


def test_options_are_told_as_the_parser_takes_them(here: Path) -> None:
    (here / "run.yaml").write_text("gym_server_devices: 0\nlearning_rate: 1.0e-5\nvllm_mode: colocate\n")
    told = told_options(
        ["--config", "run.yaml", "--learning_rate=1e-6", "--seed", "1", "--seed", "2", "--gym-replay", "x", "--resume"]
    )
    assert told == {
        "config": "run.yaml",
        "gym_server_devices": 0,
        "learning_rate": "1e-6",
        "vllm_mode": "colocate",
        "seed": "2",
        "gym_replay": "x",
        "resume": "",
    }


def test_the_help_says_how_several_processes_are_launched(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "accelerate launch" in capsys.readouterr().out


def test_a_data_script_that_fails_is_quoted(tmp_path: Path) -> None:
    script = tmp_path / "data.py"
    script.write_text("raise SystemExit('no such disk')")
    with pytest.raises(ConfigError, match="ended with exit code 1:\\nno such disk"):
        make_data(str(script), str(tmp_path))


def test_a_run_is_summed_up_from_what_is_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rollouts").mkdir()
    line = {"step": 0, "failure": None, "env_mask": [1, 0, 1], "prompt_ids": [1, 2], "completion_ids": [3, 4, 5]}
    (tmp_path / "rollouts" / "step-0.rank-0.jsonl").write_text(json.dumps(line) + "\n")
    retried = {
        "step": 1,
        "failure": {"kind": "deadline"},
        "retried": True,
        "env_mask": [],
        "prompt_ids": [],
        "completion_ids": [],
    }
    (tmp_path / "rollouts" / "step-1.rank-0.jsonl").write_text(json.dumps(retried) + "\n")
    rows = [
        {"step": 0, "eval_reward": 0.2, "eval_success": 0.1, "eval_seconds/rollouts": 1.0},
        {
            "step": 1,
            "reward": 0.5,
            "seconds/rollouts": 2.0,
            "weight_sync/seconds/pause": 99.0,
            "eval_reward": 0.6,
            "eval_success": 0.4,
        },
    ]
    torn = '{"step": 2, "rew'  # by a full disk
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    left = tmp_path / "rollouts" / "step-1.rank-0.part-1.jsonl"  # by an earlier run into the same folder
    left.write_bytes((tmp_path / "rollouts" / "step-1.rank-0.jsonl").read_bytes().replace(b"true", b"false"))
    summarize(tmp_path, {"servers and model": 3.0}, [left])
    shown = capsys.readouterr().out
    for expected in ("0.100 → 0.400", "1 (0 failed)", "5 (2 sampled by the policy)", "6.0", "checkpoint-10"):
        assert expected in shown, shown
    assert shown.rstrip().endswith(f"trl-gym view {tmp_path}")  # what to do next
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text("")  # of fewer steps than `logging_steps`
    summarize(tmp_path, {}, [left])
    shown = capsys.readouterr().out
    assert "optimizer steps" not in shown and "5 (2 sampled by the policy)" in shown


def test_an_interrupted_run_says_how_it_goes_on(here: Path) -> None:
    def told(**environment: str) -> str:
        return after_interrupt({"output_dir": "out"}, environment)

    assert told() == after_interrupt({}, {}) == "Nothing was rolled out yet: the same command starts again."
    (here / "out/rollouts").mkdir(parents=True)
    (here / "out/rollouts/step-0.rank-0.jsonl").touch()
    assert "No whole checkpoint was written yet (`save_steps`): the same command starts with the first step." in told()
    assert told().endswith("trl-gym view out")
    torn = here / "out/checkpoint-3"
    torn.mkdir()
    assert "No whole checkpoint" in told()
    whole = here / "out/checkpoint-2"
    whole.mkdir()
    save_file({}, whole / "model.safetensors")
    (whole / "trainer_state.json").write_text('{"global_step": 2}')
    assert "The same command with `--resume` continues from out/checkpoint-2." in told()
    assert "with `ARGS=--resume` continues" in told(MAKELEVEL="1")


def test_a_run_that_cannot_be_resumed_is_refused_before_servers_are_started(tmp_path: Path) -> None:
    data = Dataset.from_dict({"gym_row": ["{}"]})
    folder = tmp_path / "checkpoint-2"

    def start(seed: int, **script: Any) -> str | None:
        args = GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True, seed=seed, **script)
        return checkpoint_to_start_from(ScriptArguments(resume=not script), args, PartialState(), data)

    assert start(1) is None
    made_with.write(folder, made_with.facts(GymGRPOConfig(output_dir="x", use_cpu=True, seed=1), data, 1))
    assert start(1) is None, "interrupted"
    save_file({}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trl_gym_state.rank-0.pt"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    assert start(1) == start(1, resume_from_checkpoint=str(folder)) == str(folder)
    with pytest.raises(ConfigError, match="`seed` was 1 and is 2"):
        start(2)
    (folder / "optimizer.pt").write_bytes(b"")
    assert start(1) is None
    with pytest.raises(ConfigError, match=r"is not whole: optimizer\.pt is empty"):
        start(1, resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("rows", "is_evaluated"),
    [
        ([], False),
        ([{"step": 3, "reward": 0.5}], False),
        ([{"step": 2, "eval_runtime": 1.0}], False),
        ([{"step": 3, "eval_runtime": 1.0}], True),
        ([{"step": 3, "eval_hard_runtime": 1.0}], True),
    ],
)
def test_the_last_weights_are_evaluated_once(rows: list[dict[str, float]], is_evaluated: bool) -> None:
    assert was_evaluated(TrainerState(global_step=3, log_history=rows)) is is_evaluated
