"""Many faults at the same time, as a user may have them: the doctor names every one, with what to do about it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands.plain_endpoint import KEY, plain_endpoint
from tests.policy_server.tiny_model import build_random_policy
from trl_gym.cli import main
from trl_gym.doctor.checks import CHECKS, Check, Entry, run_checks
from trl_gym.doctor.context import Context, Status

ROOT = Path(__file__).resolve().parents[2]
CALCULATOR = ROOT / "recipes" / "environments" / "calculator" / "calculator.yaml"
AGENT = "calculator_simple_agent"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_policy(tmp_path_factory.mktemp("policy"))


def row(agent: str | None = AGENT, text: str = "What is 2 + 3?", **parameters: Any) -> str:
    reference = {} if agent is None else {"agent_ref": {"type": "responses_api_agents", "name": agent}}
    parameters["input"] = [{"role": "user", "content": text}]
    return json.dumps({"responses_create_params": parameters, **reference})


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@contextlib.contextmanager
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def options(folder: Path, policy: Path, **changes: Any) -> str:
    """An options file of a run that has nothing wrong with it, but for the changes."""
    given = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(policy),
        "gym_config_paths": [str(CALCULATOR)],
        "train_files": [write(folder / "train.jsonl", row(), row())],
        "max_completion_length": 64,
        "vllm_max_model_length": 512,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gym_vllm_args": {"tool-call-parser": "hermes"},
        "report_to": "none",
        "use_cpu": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**given, **changes}))
    return str(path)


FAST = tuple(check for check in CHECKS if check.name != "vllm flags")  # which imports vLLM in a process of its own


def examine(config: str, checks: Sequence[Check] = FAST) -> list[Entry]:
    with Context(argv=["--config", config], quick=True) as context:
        entries = list(run_checks(checks, context))
        context.forget()
    return entries


def failures(entries: list[Entry]) -> dict[str, str]:
    """By check, what failed and what to do."""
    told: dict[str, str] = {}
    for entry in entries:
        if entry.status is Status.FAILED:
            assert entry.text and entry.remedy, entry
            told[entry.name] = told.get(entry.name, "") + f"{entry.text} → {entry.remedy}\n"
    return told


def test_a_run_that_is_well_has_no_failures(tmp_path: Path, policy: Path) -> None:
    entries = examine(options(tmp_path, policy))
    assert failures(entries) == {}
    passed = {entry.name for entry in entries if entry.status is Status.OK}
    assert {"agents", "chat template", "context", "gym configs", "folders", "space"} <= passed
    not_checked = {entry.name for entry in entries if entry.status is Status.SKIPPED}
    assert not_checked == {"policy server", "gym servers", "token continuation", "weight sync", "rollouts"}
    assert not (tmp_path / "run").exists()  # it is looked at, and nothing is made


def test_tools_need_a_parser_that_is_named_or_guessed(tmp_path: Path, policy: Path) -> None:
    checks = [check for check in CHECKS if check.name in ("options file", "model", "dataset rows", "tool parser")]
    silent = tmp_path / "policy"
    shutil.copytree(policy, silent)
    (silent / "chat_template.jinja").write_text("{{ messages }}")
    tooled = [write(tmp_path / "tools.jsonl", row(), row(tools=[{"type": "function", "name": "f"}]))]

    def found(model: Path, **changes: Any) -> Entry:
        return examine(options(tmp_path, model, **changes), checks)[-1]

    guessed = found(policy, train_files=tooled, gym_vllm_args=None)
    assert guessed.status is Status.OK and guessed.text.startswith("`hermes` (guessed from `<tool_call>`")
    missing = found(silent, train_files=tooled, gym_vllm_args=None)
    assert missing.status is Status.FAILED and f"Rows of `{AGENT}` have tools" in missing.text
    assert "`gym_vllm_args`" in missing.remedy
    assert found(silent, train_files=tooled).text.startswith("`hermes` (named by the options)")
    assert found(silent, gym_vllm_args=None).text.startswith("no row has tools")


def test_faults_of_a_run_are_found_at_once(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen: version, port, config of Gym, row, context, template, flag, folder, tracker; of options: type, name,
    contradiction, key, value, weights of datasets."""
    real = importlib.metadata.version
    monkeypatch.setattr(
        "trl_gym.compat.importlib.metadata.version", lambda name: "9.9" if name == "transformers" else real(name)
    )
    broken = tmp_path / "policy"
    shutil.copytree(policy, broken)
    # Writes what comes last in front: nobody can tell where the turn ends.
    (broken / "chat_template.jinja").write_text(
        "{% for message in messages | reverse %}{{ message.role + ': ' + (message.content or '') + ' ' }}{% endfor %}"
    )
    locked = tmp_path / "file"
    locked.write_text("not a folder")
    with busy_port() as port:
        config = options(
            tmp_path,
            broken,
            output_dir=str(locked / "run"),
            gym_config_paths=[str(CALCULATOR), "calculatr.yaml"],
            gym_drift="error",
            gym_overrides={"head_server": {"port": port}},
            gym_vllm_args={"tool-call-parser": "hermes", "no-such-flag": 3},
            gym_pause_mode="abort",
            gym_eval_sampling={"temprature": 0.5},
            train_files=[write(tmp_path / "bad.jsonl", row(), "{broken", row(text="word " * 600))],
            train_weights=[1.0, 2.0],
            report_to="no_such_tracker",
            gym_deadlin=3,
            max_steps="many",
            vllm_mode="colocate",
            vllm_server_base_url="http://127.0.0.1:1/v1",
        )
        told = failures(examine(config, CHECKS))
    assert "transformers 9.9" in told["versions"] and "pip install 'transformers>=" in told["versions"]
    assert f"port {port} on 127.0.0.1" in told["ports"] and "ss -ltnp" in told["ports"]
    assert "calculatr.yaml does not exist" in told["gym configs"] and "Correct the path" in told["gym configs"]
    assert (
        "bad.jsonl, line 2: not JSON" in told["dataset rows"]
        and "Write one JSON object per line" in told["dataset rows"]
    )
    assert "1 of 2 rows fail at once" in told["context"] and "Set `vllm_max_model_length` to" in told["context"]
    assert "cannot be continued exactly" in told["chat template"] and "docs/token_fidelity.md" in told["chat template"]
    assert "--no-such-flag" in told["vllm flags"] and "vllm serve --help=all" in told["vllm flags"]
    assert f"{locked} is not a folder" in told["folders"] and "choose another folder" in told["folders"]
    assert "no_such_tracker" in told["reporting"] and "pip install no_such_tracker" in told["reporting"]
    for what, remedy in (
        ("`max_steps`: invalid int value: 'many'", "Set `max_steps` to a value of its type"),
        ("`gym_deadlin` is not an option", "Did you mean `gym_deadline`?"),
        ("`vllm_server_base_url` names a running server and `vllm_mode` is 'colocate'", "Set `vllm_mode` to 'server'"),
        ("`gym_eval_sampling` has the unknown key 'temprature'", "Choose among temperature"),
        ("`gym_pause_mode` is 'abort'", "Choose one of wait, keep"),
        ("`train_weights` is [1.0, 2.0] and there are 1", "Give one positive number for each file"),
    ):
        assert what in told["options"] and remedy in told["options"], told["options"]


def test_faults_that_exclude_those_are_found_too(tmp_path: Path, policy: Path) -> None:
    """The interpreter of Gym, the tokenizer, a file of data, an option against another."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(policy / name, bare)
    config = options(
        tmp_path,
        bare,
        gym_python=str(tmp_path / "nowhere" / "python"),
        train_files=[str(tmp_path / "missing.jsonl")],
        max_completion_length=600,
    )
    entries = examine(config)
    told = failures(entries)
    assert (
        "nowhere/python, which does not exist" in told["gym interpreter"]
        and "TRL_GYM_PYTHON" in told["gym interpreter"]
    )
    assert f"{bare} has no tokenizer" in told["tokenizer"] and "save_pretrained" in told["tokenizer"]
    assert "missing.jsonl: cannot be read" in told["dataset rows"] and "Check the path" in told["dataset rows"]
    assert "`max_completion_length` (600) leaves no room" in told["options"]
    skipped = {entry.name: entry.text for entry in entries if entry.status is Status.SKIPPED}
    assert skipped["gym configs"] == "needs gym interpreter" and skipped["chat template"] == "needs tokenizer"


def test_agents_that_no_config_defines_and_limits_of_processes(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_gym.doctor.options.resource.getrlimit", lambda _kind: (100, 100))
    port = {"calculator.resources_servers.calculator.port": 8000}
    rows = write(tmp_path / "other.jsonl", row(), row("calculator_simple_agnt"), row("calculator_simple_agnt"))
    changes = {"gym_environments": {"gone": {"deadline": 3}}, "gym_processes": 2, "gym_overrides": port}
    found = failures(examine(options(tmp_path, policy, train_files=[rows], **changes)))
    assert "cannot run in 2 processes (`gym_processes`): `calculator` has the fixed port 8000" in found["gym configs"]
    assert "a process may open 100 files, and 8 rollouts in flight need 136 to 160" in found["open files"]
    told = found["agents"]
    assert "other.jsonl, line 2 and 1 more: the row is for agent calculator_simple_agnt" in told
    assert f"Did you mean {AGENT}?" in told
    assert "`gym_environments` names the unknown agent gone" in told


def test_a_remote_server_with_another_key_and_one_without_middleware(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with plain_endpoint() as stranger, guarded() as locked:
        urls = f"{stranger.base_url},http://127.0.0.1:{locked}/v1,http://127.0.0.1:1/v1"
        changes = {"vllm_mode": "server", "vllm_server_base_url": urls, "gym_vllm_args": None}
        told = failures(examine(options(tmp_path, policy, **changes)))["remote server"]
    without, other_key, nobody = told.splitlines()
    assert "without trl-gym's middleware" in without and "trl-gym gateway --upstream" in without
    assert "demands another API key" in other_key and "export VLLM_API_KEY=KEY" in other_key
    assert "cannot be reached" in nobody and f"trl-gym serve {policy}" in nobody


@contextlib.contextmanager
def guarded() -> Iterator[int]:
    """A server that refuses every key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_the_command_as_json_and_as_lines(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_gym.doctor.checks.CHECKS", FAST)
    before = dict(os.environ)
    command = ["doctor", "--quick", "--config", options(tmp_path, policy, num_generations=1, env={"DOCTOR_TEST": "1"})]
    assert main([*command, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert all(list(check) == ["name", "status", "text", "remedy", "seconds"] for check in answer["checks"])
    assert {check["status"] for check in answer["checks"]} >= {"ok", "failed", "not checked"}
    assert os.environ.pop("DOCTOR_TEST") == "1" and "DOCTOR_TEST" not in before
    # The command line wins over the file.
    assert main([*command, "--num_generations", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("nothing failed: ")
    assert all(len(line) < 100 for line in lines if "/" not in line)


def test_an_options_file_that_cannot_be_read_hides_nothing_of_the_machine(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "a: [1")
    entries = examine(path)
    assert f"The options cannot be read: {path}: while parsing" in failures(entries)["options file"]
    assert {"python", "versions", "devices"} <= {entry.name for entry in entries if entry.status is Status.OK}
    assert {entry.text for entry in entries if entry.name == "model"} == {"needs options file"}
