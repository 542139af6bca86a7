"""`trl-gym`: instant help, and that help needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trl_gym
from trl_gym.cli import main

HEAVY = ("torch", "vllm", "transformers", "trl", "requests")


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["serve", "some/model", "--help"]])
def test_help_needs_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from trl_gym.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit as end: assert end.code in (0, None), end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: trl-gym" in done.stdout


@pytest.mark.parametrize("module", ["server", "client", "middleware.app", "middleware.splice", "engine.plugin"])
def test_modules_of_the_trainers_side_need_neither_vllm_nor_torch(module: str) -> None:
    code = f"import sys, trl_gym.policy_server.{module}; assert not {{'vllm', 'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"trl-gym {trl_gym.__version__}\n"


def test_an_error_of_ours_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path), "--log-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "trl-gym: error: The policy server cannot be started" in captured.err
    assert "config.json" in captured.err and "Traceback" not in captured.err


def test_a_vllm_flag_before_the_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--max-model-len", "512", "some/model"])
    assert "--max-model-len" in capsys.readouterr().err
