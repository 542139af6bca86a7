"""`trl-gym serve` with a real vLLM and a tiny random model. The last test ends the server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.servers import MAX_MODEL_LEN, START_TIMEOUT_S, Served, serve_argv
from tests.policy_server.tiny_model import build_tokenizer
from trl_gym.cli import main
from trl_gym.processes import bind_socket

pytestmark = [pytest.mark.e2e, pytest.mark.shares("random, ended at the end")]

# -- mistakes, for which nothing is served ----------------------------------------------------------------------------


def failed_serve(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr.partition("Last lines of its log")[0]
    return done.stderr


def test_a_folder_without_tokenizer_is_one_readable_error(random_policy: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(random_policy / "config.json", bare)
    assert "has no tokenizer: none of tokenizer.json" in failed_serve(serve_argv(bare, tmp_path / "logs"))


def test_a_busy_port_is_one_readable_error(random_policy: Path, tmp_path: Path) -> None:
    with bind_socket() as taken:
        port = taken.getsockname()[1]
        error = failed_serve(serve_argv(random_policy, tmp_path / "logs", "--port", str(port)))
    assert f"Port {port} on 127.0.0.1 is in use" in error


def test_an_unknown_flag_is_one_readable_error(
    warm: None, random_policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = serve_argv(random_policy, tmp_path / "logs", "--port", "0", "--no-such-flag", "3")
    assert main(words[words.index("serve") :]) == 1
    printed, error = capfd.readouterr()
    assert printed == "" and "Traceback" not in error.partition("Last lines of its log")[0]
    assert "unrecognized arguments: --no-such-flag 3" in error
    assert "Leave out the flag that this engine does not know" in error
    assert "exit code 2" in error and "policy_server-" in error


# -- `trl-gym serve` --------------------------------------------------------------------------------------------------


def test_what_it_is(served: Served) -> None:
    info = served.client.info()
    assert (info["max_model_len"], info["model_names"]) == (MAX_MODEL_LEN, ["policy"])
    assert info["turn_end_token_id"] == build_tokenizer().eos_token_id
    assert info["nonce"] and info["vllm_version"] and info["package_version"]
    assert served.client.health() and served.client.models()[0]["id"] == "policy"


def test_ctrl_c_ends_it_and_it_said_one_line(served: Served) -> None:
    os.kill(served.process.pid, signal.SIGINT)
    served.process.join(60.0)
    assert served.process.exitcode in (0, 130)
    assert len(served.printed.read_text().splitlines()) == 1
    assert not served.client.health()
