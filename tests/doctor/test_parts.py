"""Parts of the doctor that need no run: leftovers, folders, options, templates, rollouts."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import RECIPES
from tests.policy_server.tiny_model import build_tokenizer
from trl_gym.doctor.checks import Check, run_checks
from trl_gym.doctor.context import Context, Status
from trl_gym.doctor.inputs import classify, dataset_size
from trl_gym.doctor.live import EXAMINED, judge, leave, shown_flags
from trl_gym.doctor.options import Launch, launch, open_files, options_file, read_launch
from trl_gym.doctor.outcome import Verdict, verdict
from trl_gym.doctor.static import SUPPORTED_PYTHON, Process, gpu, left_files, orphans, processes, why_not_writable
from trl_gym.errors import ConfigError, FailureKind, RolloutFailure
from trl_gym.policy_server.client import PolicyClient
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout


def table(*rows: tuple[int, int, str]) -> dict[int, Process]:
    return {pid: Process(pid, parent, command) for pid, parent, command in rows}


SERVER = "python -m trl_gym.policy_server model --listen-fd 3"
SUPERVISOR = f"python -I -S /x/trl_gym/supervisor.py 4 5.0 1 -- {SERVER}"


def test_a_server_whose_supervisor_is_gone_is_an_orphan() -> None:
    running = table(
        (10, 1, "python train.py"),
        (11, 10, SUPERVISOR),
        (12, 11, SERVER),
        (13, 12, "VLLM::EngineCore"),
        (20, 1, SERVER),
        (21, 20, "VLLM::EngineCore"),
        (30, 1, "VLLM::DPCoordinator"),
        (31, 9, "python /x/trl_gym/gym/host.py settings.json"),
        (32, 1, "trl-gym: supervisor of a forked server"),
        (33, 32, SERVER),
        (34, 1, "python -m trl_gym.policy_server.engine.forking 5"),
        (35, 34, SERVER),
        (40, 1, "vllm serve someone/elses"),
        (41, 40, "VLLM::EngineCore"),
    )
    assert [process.pid for process in orphans(running)] == [20, 30, 31]


def test_our_own_process_is_in_the_table() -> None:
    assert processes()[os.getpid()].parent == os.getppid()


def test_files_that_nobody_uses_are_left(tmp_path: Path) -> None:
    adapters = tmp_path / f"trl-gym-adapters-{os.getpid()}-abc"
    dead = tmp_path / "trl-gym-adapters-999999999-abc"
    for folder in (adapters, dead):
        folder.mkdir()
    unused, used = tmp_path / "trl-gym-a.safetensors", tmp_path / "trl-gym-b.partial"
    unused.write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"x")
    with used.open("wb"):
        assert left_files(tmp_path, processes()) == [unused, dead]
    assert left_files(tmp_path / "nowhere", processes()) == []


def test_folders_that_can_be_written_or_made(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path) is None
    assert why_not_writable(tmp_path / "a" / "b") is None
    (tmp_path / "file").write_text("")
    assert "is not a folder" in (why_not_writable(tmp_path / "file" / "b") or "")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert why_not_writable(Path("/proc/nothing")) is not None  # a file system that takes no files


def test_supported_python_is_that_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == SUPPORTED_PYTHON


def test_templates_are_told_apart() -> None:
    tokenizer = build_tokenizer()
    assert set(classify(tokenizer, {}).values()) == {None}
    plain = "{% for m in messages %}{{ m.role + ': ' + (m.content or '') + '\n' }}{% endfor %}"
    tokenizer.chat_template = plain.replace("m.content or ''", "(m.content or '') | upper")
    assert all(classify(tokenizer, {}).values())  # nothing of a turn can be found again
    tokenizer.chat_template = plain.replace("in messages", "in messages | reverse")
    assert "behind" in (classify(tokenizer, {})["a question after an answer"] or "")
    tokenizer.chat_template = "{{ raise_exception('no tools here') if tools }}" + plain + "{% if false %}{% endif %}"
    outcomes = classify(tokenizer, {})
    assert "no tools here" in (outcomes["a result after a tool call"] or "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("num_processes: 4\n", Launch(4)),
        ("distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {fsdp_reshard_after_forward: false}\n",
         Launch(8, {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"})),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n",
         Launch(1, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})),
        ("num_processes: many\n", None), ("fsdp_config: 3\ndistributed_type: FSDP\n", None),
        ("[1]\n", None), ("a: [\n", None),
    ],
)  # fmt: skip
def test_what_accelerate_would_launch(tmp_path: Path, content: str, expected: Launch | None) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(content)
    if expected is None:
        with pytest.raises(ConfigError, match=r"accelerate.yaml is not a configuration of accelerate"):
            read_launch(path)
    else:
        assert read_launch(path) == expected


def test_a_process_of_a_launched_run_counts_as_it_was_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accelerate.yaml").write_text("num_processes: 8\n")
    context = Context(argv=[], accelerate_config=tmp_path / "accelerate.yaml")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch(context).processes == 8
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")  # of mpirun
    assert launch(context).processes == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch(context).processes == 2


def test_batches_are_those_of_the_processes_that_will_be_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    launched, data = tmp_path / "accelerate.yaml", tmp_path / "train.jsonl"
    launched.write_text("num_processes: 8\n")
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none", "--train_files", str(data)]
    with Context(argv=argv, quick=True, accelerate_config=launched) as context:
        [*options_file(context)]
        context.train_rows = [{"doctor_file": str(data)}] * 32
        [size], [files] = dataset_size(context), open_files(context)
    assert context.problems == []
    assert size.text == "32 tasks; a generation batch has 8 × 8 rollouts (8 per device × 1 × 8 processes)"
    assert "; 64 rollouts in flight" in files.text


def test_keys_of_the_servers_flags_are_not_shown() -> None:
    flags = {
        "tool-call-parser": "none",
        "reasoning-parser": "none",
        "hf-token": "SECRET2",
    }
    shown = shown_flags("nowhere", {**flags, "max-num-batched-tokens": 512, "ssl-keyfile-password": "SECRET5"})
    assert "SECRET" not in shown
    assert "--hf-token [redacted]" in shown and "--max-num-batched-tokens 512" in shown


@pytest.mark.parametrize(
    ("has_gpu", "use_cpu", "num_params", "is_checked"),
    [(False, False, 4_000_000_000, False), (True, False, 4_000_000_000, True), (False, True, 4_000_000_000, True),
     (False, False, 400_000, True)],
)  # fmt: skip
def test_a_large_model_without_a_gpu_is_not_known_to_be_ready(
    has_gpu: bool, use_cpu: bool, num_params: int, is_checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    context = Context(argv=[])
    context.model, context.num_params = "large", num_params
    context.args = SimpleNamespace(use_cpu=use_cpu)  # type: ignore[assignment]
    found = list(run_checks([Check("gpu", gpu)], context))
    assert verdict(found) is (Verdict.READY if is_checked else Verdict.UNKNOWN)
    assert [entry.status for entry in found] == ([] if is_checked else [Status.SKIPPED])
    assert all("trl-gym plan" in entry.remedy for entry in found)


def rollout(**changes: object) -> Rollout:
    request = RolloutRequest(rollout_id="r-a0", task_index=0, group=0, member=0, attempt=0, agent="adder", row={})
    given = {"request": request, "answer": {"reward": 1.0}, "failure": None, "trajectories": [], "seconds": 1.0}
    return Rollout(**{**given, **changes})  # type: ignore[arg-type]


def test_a_reward_that_is_not_returned_is_the_environments_fault() -> None:
    text = "a finite number is needed as reward, but there is no `reward`"
    failure = RolloutFailure(kind=FailureKind.ENVIRONMENT, text=text, where="adder /run")
    finding = judge(rollout(answer=None, failure=failure))
    assert finding.status is Status.FAILED
    assert f"adder: environment: {text} (adder /run)" in finding.text
    assert "verifier must return a finite `reward`" in finding.remedy


def test_a_rollout_without_tokens_has_nothing_to_train() -> None:
    finding = judge(rollout())
    assert finding.status is Status.FAILED and "nothing to train on" in finding.text and finding.remedy


@contextlib.contextmanager
def running_server(version: str) -> Iterator[tuple[PolicyClient, list[str]]]:
    """A server that runs on and holds a version; with the paths that were posted to."""
    held, posted = {"weight_version": version}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(held if self.path == "/weight_info" else {})

        def do_POST(self) -> None:
            body: Any = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            posted.append(self.path)
            if self.path == "/update_weight_version":
                held["weight_version"] = body["new_version"]
            self.answer({})

        def answer(self, body: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield PolicyClient(f"http://127.0.0.1:{server.server_port}"), posted
        finally:
            server.shutdown()
            thread.join()


def test_weights_of_the_doctor_are_not_taken_for_those_of_a_run() -> None:
    with running_server("0") as (client, _):  # as the sync of step 0 leaves it
        leave(client, "file", "default")
        assert client.weight_version() == EXAMINED
    with running_server("default") as (client, posted):  # the sync failed before it gave them a version
        leave(client, "file", "default")
        assert (client.weight_version(), posted) == ("default", [])


def test_an_adapter_of_the_doctor_is_unloaded() -> None:
    with running_server("0") as (client, posted):
        leave(client, "adapter", "default")
        assert posted == ["/trl_gym/adapters/clear"]
