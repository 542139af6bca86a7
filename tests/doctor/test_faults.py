"""Many faults at the same time, as a user may have them: the doctor names every one, with what to do about it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.commands.plain_endpoint import KEY, plain_endpoint
from tests.policy_server.tiny_model import build_random_policy
from trl_gym.cli import main
from trl_gym.doctor.checks import CHECKS, Check, run_checks
from trl_gym.doctor.context import Context, Status
from trl_gym.doctor.outcome import Entry, Verdict, verdict

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


def options(folder: Path, policy: Path | str, **changes: Any) -> str:
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
    accelerate = Path(config).with_name("accelerate.yaml")
    launched = accelerate if accelerate.exists() else None
    with Context(argv=["--config", config], quick=True, accelerate_config=launched) as context:
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
    not_checked = {entry.name for entry in entries if entry.because == ("--quick",)}
    assert not_checked == {entry.name for entry in entries if entry.status is Status.SKIPPED}
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
    sglang = {"gym_engine": "sglang", "gym_vllm_args": None, "train_files": tooled}
    assert found(policy, **sglang).text.startswith("`hermes` (guessed from `<tool_call>`")
    unknown = found(silent, **sglang, gym_sglang_args={"tool-call-parser": "mine"})
    assert unknown.status is Status.SKIPPED and "the server's own configuration" in unknown.text


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("trl_gym.compat.importlib.metadata.version", version)


@pytest.mark.usefixtures("no_vllm")
def test_without_vllm_nothing_asks_for_it(tmp_path: Path, policy: Path) -> None:
    tooled = [write(tmp_path / "tools.jsonl", row(tools=[{"type": "function", "name": "f"}]), row())]
    entries = examine(options(tmp_path, policy, gym_vllm_args=None, train_files=tooled), CHECKS)
    assert failures(entries) == {}
    told = {entry.name: entry for entry in entries}
    assert "since vLLM is not installed" in told["engine"].text and "transformers 5." in told["engine"].text
    assert told["tool parser"].text.startswith("`qwen3` (guessed from `<tool_call>`")
    assert "Qwen3ForCausalLM" in told["served model"].text
    assert not told.keys() & {"vllm flags", "shared memory"}  # of a server and of a copy that there is not
    assert not [entry for entry in entries if "vLLM" in entry.text and entry.name != "engine"]


@pytest.mark.usefixtures("no_vllm")
def test_what_the_engine_in_the_trainers_process_lacks_is_found(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    capped = tmp_path / "capped"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=32).save_pretrained(capped)
    (capped / "model.safetensors").touch()  # nothing reads weights here
    names = ("options file", "options", "engine", "model", "served model")
    checks = [check for check in CHECKS if check.name in names]

    def found(model: Path, **changes: Any) -> dict[str, str]:
        return failures(examine(options(tmp_path, model, gym_vllm_args=None, **changes), checks))

    assert "capped attention scores" in found(capped)["served model"]
    named = found(capped, gym_engine="transformers", vllm_tensor_parallel_size=2)
    assert "`vllm_tensor_parallel_size` is 2" in named["options"] and named.keys() == {"options"}
    assert "(vLLM is not installed)" in found(capped, vllm_tensor_parallel_size=2)["engine"]
    (tmp_path / "accelerate.yaml").write_text("distributed_type: FSDP\nnum_processes: 2\n")
    assert "FSDP is set" in found(capped, gym_engine="transformers")["engine"]
    (tmp_path / "accelerate.yaml").unlink()
    nowhere = found(capped, gym_engine="sglang", gym_sglang_python="/no/such/python")
    assert "/no/such/python, which does not exist" in nowhere["engine"] and "served model" not in nowhere


# -- faults, planted several at a time --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One kind of fault, and what must be said of it: by which check, what, and what to do."""

    check: str
    what: str
    remedy: str
    status: Status = Status.FAILED


@dataclass(frozen=True)
class Place:
    """Where a group of faults is planted."""

    folder: Path
    policy: Path  # a model folder that is well
    stack: contextlib.ExitStack
    patch: pytest.MonkeyPatch

    def options(self, **changes: Any) -> str:
        return options(self.folder, changes.pop("policy", self.policy), **changes)

    def write(self, name: str, *lines: str) -> str:
        return write(self.folder / name, *lines)


def many(place: Place) -> str:
    real = importlib.metadata.version
    place.patch.setattr(
        "trl_gym.compat.importlib.metadata.version", lambda name: "5.9" if name == "transformers" else real(name)
    )
    built = {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cu130"}
    place.patch.setattr("trl_gym.compat._built_version", built.get)
    find = importlib.util.find_spec
    place.patch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    broken = place.folder / "policy"
    shutil.copytree(place.policy, broken)
    # Writes what comes last in front: nobody can tell where the turn ends.
    (broken / "chat_template.jinja").write_text(
        "{% for message in messages | reverse %}{{ message.role + ': ' + (message.content or '') + ' ' }}{% endfor %}"
    )
    object_in_text = json.loads(row())
    object_in_text["responses_create_params"]["metadata"] = {"extra_body": {"min_tokens": 1}}
    rows = (row(), "{broken", row(text="word " * 600), json.dumps(object_in_text), "[]")
    return place.options(
        policy=broken,
        output_dir=place.write("file", "not a folder") + "/run",
        gym_config_paths=[str(CALCULATOR), "calculatr.yaml"],
        gym_drift="error",
        gym_overrides={"head_server": {"port": place.stack.enter_context(busy_port())}},
        gym_vllm_args={"tool-call-parser": "hermes", "no-such-flag": 3},
        gym_pause_mode="abort",
        gym_eval_sampling={"temprature": 0.5},
        train_files=[place.write("bad.jsonl", *rows)],
        train_weights=[1.0, 2.0],
        report_to="no_such_tracker",
        gym_deadlin=3,
        max_steps="many",
        vllm_mode="colocate",
        vllm_server_base_url="http://127.0.0.1:1/v1",
    )


MANY = (
    Fault("versions", "transformers 5.9 is installed", "pip install 'transformers>="),
    Fault("versions", "torchvision 0.28.0+cu130 is installed beside torch 2.13.0+cpu", "pip uninstall -y torchvision"),
    Fault("reward plot", "no reward.png", "pip install 'trl-gym[plot]'", Status.WARNING),
    Fault("ports", "on 127.0.0.1 (`gym_overrides` head_server.port) cannot be used", "`ss -ltnp"),
    Fault("gym configs", "calculatr.yaml does not exist", "Correct the path"),
    Fault("dataset rows", "bad.jsonl, line 2: not JSON", "Write one JSON object per line"),
    Fault("dataset rows", "bad.jsonl, line 4: Expected `str`, got `object`", "Write one JSON object per line"),
    Fault("dataset rows", "bad.jsonl, line 5: a JSON list, not an object", "Write one JSON object per line"),
    Fault("context", "1 of 2 rows fail at once", "Set `vllm_max_model_length` to"),
    Fault("chat template", "cannot be continued exactly", "docs/token_fidelity.md"),
    Fault("vllm flags", "--no-such-flag", "vllm serve --help=all"),
    Fault("folders", "file is not a folder", "choose another folder"),
    Fault("reporting", "no_such_tracker, which is not installed", "pip install no_such_tracker"),
    Fault("options", "`max_steps`: invalid int value: 'many'", "Set `max_steps` to a value of its type"),
    Fault("options", "`gym_deadlin` is not an option", "Did you mean `gym_deadline`?"),
    Fault("options", "names a running server and `vllm_mode` is 'colocate'", "Set `vllm_mode` to 'server'"),
    Fault("options", "`gym_eval_sampling` has the unknown key 'temprature'", "Choose among temperature"),
    Fault("options", "`gym_pause_mode` is 'abort'", "Choose one of wait, keep"),
    Fault("options", "`train_weights` is [1.0, 2.0] and there are 1", "Give one positive number for each file"),
)


def bare(place: Place) -> str:
    model = place.folder / "bare"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place.policy / name, model)
    return place.options(
        policy=model,
        gym_python=str(place.folder / "nowhere" / "python"),
        train_files=[str(place.folder / "missing.jsonl")],
        max_completion_length=600,
    )


BARE = (
    Fault("gym interpreter", "nowhere/python, which does not exist", "trl-gym setup-gym"),
    Fault("tokenizer", "bare has no tokenizer", "save_pretrained"),
    Fault("dataset rows", "missing.jsonl: cannot be read", "Check the path"),
    Fault("options", "`max_completion_length` (600) leaves no room", "Lower the first, or raise the second"),
)


def crowded(place: Place) -> str:
    place.patch.setattr("trl_gym.doctor.options.resource.getrlimit", lambda _kind: (50, 100))
    place.patch.setattr("trl_gym.doctor.static.shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    spread = {"distributed_type": "FSDP", "num_processes": 8, "use_cpu": False}
    place.write("accelerate.yaml", yaml.safe_dump(spread))
    place.patch.setenv("VLLM_RPC_BASE_PATH", "/tmp/" + "x" * 100)
    silent = place.folder / "silent"
    shutil.copytree(place.policy, silent)
    (silent / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    rows = [row(tools=[{"type": "function", "name": "f"}]), *[row("calculator_simple_agnt")] * 2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return place.options(
        policy=silent,
        gym_vllm_args=None,
        train_files=[place.write("a.jsonl", *rows)],
        gym_environments={"gone": {"deadline": 3}},
        gym_processes=2,
        gym_overrides={"calculator.resources_servers.calculator.port": port},
    )


CROWDED = (
    Fault(
        "gym configs",
        "`calculator` has the fixed port",
        "Leave `gym_processes`",
    ),
    Fault("open files", "may open 100 files (the soft limit is 50, and is raised), and 64 rollouts", "`ulimit -Hn`"),
    Fault("sockets", "VLLM_RPC_BASE_PATH is '/tmp/xxx", "Set VLLM_RPC_BASE_PATH to a folder whose name has at most"),
    Fault("dataset size", "has 3 tasks and a generation batch 8", "Use at least 8 tasks, or lower"),
    Fault("tool parser", "have tools", "`gym_vllm_args`"),
    Fault("processes", "FSDP needs GPUs", "cpu_two_processes.yaml"),
    Fault(
        "agents", "a.jsonl, line 2 and 1 more: the row is for agent calculator_simple_agnt", f"Did you mean {AGENT}?"
    ),
    Fault("agents", "`gym_environments` names the unknown agent gone", f"There is {AGENT}"),
    Fault("shared memory", "/dev/shm has 0.0 GB free", "set `gym_weight_dir`"),
    Fault("space", "has 0.0 GB free", "set `save_only_model` or `save_total_limit`"),
)


def remote(place: Place) -> str:
    place.patch.setenv("VLLM_API_KEY", KEY)
    place.patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    stranger, locked = (place.stack.enter_context(one) for one in (plain_endpoint(), guarded()))
    urls = f"{stranger.base_url},http://127.0.0.1:{locked}/v1,http://127.0.0.1:1/v1"
    return place.options(
        policy="nobody/no-such-model", vllm_mode="server", vllm_server_base_url=urls, gym_vllm_args=None
    )


REMOTE = (
    Fault("remote server", "without trl-gym's middleware", "trl-gym gateway --upstream"),
    Fault("remote server", "demands another API key", "export VLLM_API_KEY=KEY"),
    Fault("remote server", "cannot be reached", "trl-gym serve nobody/no-such-model"),
    Fault("model", "nobody/no-such-model", "`hf download"),
)


def unreadable(place: Place) -> str:
    return place.write("run.yaml", "a: [1")


UNREADABLE = (Fault("options file", "line 2, column 1: no YAML", "Check the file"),)
GROUPS: dict[Callable[[Place], str], tuple[Fault, ...]] = {
    many: MANY, bare: BARE, crowded: CROWDED, remote: REMOTE, unreadable: UNREADABLE
}  # fmt: skip


@pytest.mark.parametrize("plant", GROUPS, ids=lambda plant: f"{plant.__name__}-{len(GROUPS[plant])}")
def test_every_planted_fault_is_found_with_its_remedy(
    plant: Callable[[Place], str], tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        config = plant(Place(tmp_path, policy, stack, monkeypatch))
        entries = examine(config, CHECKS if plant is many else FAST)
    missed = [fault for fault in GROUPS[plant] if not any(tells(entry, fault) for entry in entries)]
    assert missed == [], [entry for entry in entries if entry.name in {fault.check for fault in missed}]
    assert verdict(entries) is Verdict.FAILED
    unexpected = {entry.name for entry in entries if entry.status is Status.FAILED} - {
        fault.check for fault in GROUPS[plant]
    }
    assert unexpected == set()  # what is well is not blamed
    assert all(entry.remedy for entry in entries if entry.status is Status.FAILED)


def tells(entry: Entry, fault: Fault) -> bool:
    return (
        (entry.name, entry.status) == (fault.check, fault.status)
        and fault.what in entry.text
        and fault.remedy in entry.remedy
    )


def test_there_are_more_than_25_kinds_of_faults() -> None:
    kinds = {(fault.check, fault.what) for faults in GROUPS.values() for fault in faults}
    assert len(kinds) == sum(map(len, GROUPS.values())) == 38


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
    assert (answer["ok"], answer["verdict"]) == (False, "failed")
    assert all(list(check) == ["name", "status", "text", "remedy", "seconds"] for check in answer["checks"])
    assert {check["status"] for check in answer["checks"]} >= {"ok", "failed", "not checked"}
    assert os.environ.pop("DOCTOR_TEST") == "1" and "DOCTOR_TEST" not in before
    # The command line wins over the file.
    assert main([*command, "--num_generations", "2"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("not known to be ready: nothing failed")
    assert "gym servers, token continuation, weight sync, rollouts" in " ".join(lines[-2:])
    assert all(len(line) < 100 for line in lines if "/" not in line)


def test_checks_that_cannot_be_imported_are_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl_gym.doctor.checks", None)
    monkeypatch.delattr("trl_gym.doctor.checks")
    assert main(["doctor", "--quick"]) == 1
    assert "not checked: all other checks" in capsys.readouterr().out
