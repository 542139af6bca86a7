"""`trl-gym doctor` on the quickstart: with the servers, the weight sync and the rollout of a real run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from tests.e2e.training import ROOT
from trl_gym.cli import main
from trl_gym.doctor.checks import CHECKS
from trl_gym.doctor.static import orphans, processes

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("alone", "warm")]


def test_the_quickstart_is_well(
    small_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    # It imports vLLM once more in a process of its own, and is tested without servers.
    monkeypatch.setattr("trl_gym.doctor.checks.CHECKS", [check for check in CHECKS if check.name != "vllm flags"])
    orphans_before = {process.pid for process in orphans(processes())}
    run = ["--config", "recipes/quickstart.yaml", "--gym_engine", "vllm", "--output_dir", str(tmp_path / "run")]
    variables = dict(os.environ)
    status = main(["doctor", "--json", *run, "--small_policy_dir", str(small_policy)])
    answer = json.loads(capsys.readouterr().out)
    told = {check["name"]: check for check in answer["checks"]}
    assert (status, answer["ok"]) == (0, True), [c for c in answer["checks"] if c["status"] == "failed"]
    for name in ("policy server", "gym servers", "token continuation", "weight sync", "rollouts"):
        assert told[name]["status"] == "ok", told[name]
    assert "by file" in told["weight sync"]["text"] and "nats" in told["weight sync"]["text"]
    assert "calculator_simple_agent: reward" in told["rollouts"]["text"]
    # Nothing stays: no server, no folder, no variable, and nobody listens to the log any more.
    assert {name for name in variables.keys() ^ os.environ.keys() if "VERBOSITY" in name} == set()
    assert {process.pid for process in orphans(processes())} <= orphans_before
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "tmp").glob("trl-gym-*"))
    assert not logging.getLogger("trl_gym").handlers
