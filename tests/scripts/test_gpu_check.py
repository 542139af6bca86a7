"""`scripts/gpu_check.py` without a GPU: its parts as far as a CPU goes, and what it does with parts that fail or hang.

The parts with a vLLM server run by hand: `python scripts/gpu_check.py --dry-run --parts sync,sleep,keep,quickstart`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import fork_ranks
from tests.conftest import load, wait_for
from trl_gym.gym.discovery import is_alive

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
FACTS = {"gpu": "NVIDIA of the tests", "torch": "1.0"}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load("gpu_check", SCRIPT)


# -- the parts --------------------------------------------------------------------------------------------------------


def _run_part(name: str, folder: str, hidden: str = "") -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    if hidden:
        sys.modules[hidden] = None  # type: ignore[assignment]
    from gpu_parts import run_part

    run_part(name, dry=True, folder=Path(folder))


def result(name: str, folder: Path, hidden: str = "") -> dict[str, Any]:
    done = fork_ranks.run(_run_part, name, str(folder), hidden)
    assert (folder / "result.json").exists(), done.stdout + done.stderr
    found = json.loads((folder / "result.json").read_text())
    assert found["result"] != "failed", f"{found['reason']}\n{done.stdout}\n{done.stderr}"
    return found


@pytest.mark.parametrize(
    "name",
    [
        "fsdp2",
        "offload",
        "plan",
        "ipc",
        "fsdp2_loop",
        pytest.param("transformers", marks=[pytest.mark.e2e, pytest.mark.no_policy]),
    ],
)
def test_a_part_passes_as_far_as_it_goes_and_says_where_it_stops(name: str, tmp_path: Path) -> None:
    found = result(name, tmp_path)
    assert found["result"] == "passed"
    assert found["measured"] and found["stops"]


def test_a_part_with_a_server_says_what_it_lacks(tmp_path: Path) -> None:
    found = result("sync", tmp_path, hidden="vllm")
    assert (found["result"], found["reason"]) == ("not run", "not installed: vllm")


def _require(folder: str) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import gpu_parts
    import torch

    gpu_parts._FREE_WAIT_S = 1.0  # type: ignore[attr-defined]
    part, told = gpu_parts.gpu_check.PARTS[2], []  # `offload`, which needs nothing
    for answers in ([(1e9, 8e9), (8e9, 8e9)], [(1e9, 8e9)] * 9):  # what the part before has held comes back, or not
        run, left = gpu_parts.Run(False, Path(folder)), iter(answers)
        torch.cuda.mem_get_info = lambda left=left: next(left)  # type: ignore[misc]
        gpu_parts.require(part, run)
        told.append(run.measured)
    (Path(folder) / "told.json").write_text(json.dumps(told))


def test_memory_that_the_part_before_keeps_is_waited_for_and_told(tmp_path: Path) -> None:
    done = fork_ranks.run(_require, str(tmp_path))
    assert (tmp_path / "told.json").exists(), done.stdout + done.stderr
    assert json.loads((tmp_path / "told.json").read_text()) == [{}, {"free_at_start_gb": 1.0}]


# -- one after another ------------------------------------------------------------------------------------------------

STAND_IN = """
import json, os, signal, sys, time
name, folder = sys.argv[sys.argv.index("--run-part") + 1], sys.argv[sys.argv.index("--folder") + 1]
told = {"result": "passed", "reason": "", "measured": %r if name == "facts" else {"of": name}, "stops": []}
if name == "hangs":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (child := os.fork()) == 0:
        time.sleep(1000)
    open(folder + "/child", "w").write(str(child))
    print("I hang", flush=True)
    time.sleep(1000)
if name == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
open(folder + "/result.json", "w").write(json.dumps(told))
"""


def stand_in(check: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, facts: dict[str, str]) -> Any:
    script = folder / "stand_in.py"
    script.write_text(STAND_IN % facts)
    monkeypatch.setattr(check, "__file__", str(script))
    monkeypatch.setattr(check, "_STOP_S", 0.1)
    return check.Options(False, folder, None, 600.0)


def parts(check: ModuleType, *names: str, expected_s: int = 1) -> list[Any]:
    limits_s = {name: 4 if name == "hangs" else 120 for name in names}
    return [check.Part(name, "none", f"that it {name}", expected_s, limit_s=limits_s[name]) for name in names]


def test_a_part_that_hangs_or_dies_does_not_stop_the_next(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = stand_in(check, monkeypatch, tmp_path, FACTS)
    record = check.check(parts(check, "hangs", "dies", "works"), options)
    hung, died, worked = record["parts"]
    assert (hung["result"], hung["reason"]) == ("failed", "it was killed after 4 s")
    assert "I hang" in hung["output"]
    child = int((tmp_path / "hangs" / "child").read_text())
    wait_for(lambda: not is_alive(child), "what the part has started ends with it")
    assert (died["result"], died["reason"]) == ("failed", "its process ended with -11")
    assert (worked["result"], worked["measured"]) == ("passed", {"of": "works"})
    text = check.table(record)
    assert "1 passed, 2 failed, 0 not run" in text and "gpu NVIDIA of the tests" in text


def test_without_a_gpu_or_time_nothing_runs_and_the_reason_is_told(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = stand_in(check, monkeypatch, tmp_path, {"torch": "1.0"})
    [one] = check.check(parts(check, "works"), options)["parts"]
    assert one["result"] == "not run" and "there is no CUDA device" in one["reason"]
    options = stand_in(check, monkeypatch, tmp_path, FACTS)
    [one] = check.check(parts(check, "works", expected_s=2000), options)["parts"]
    assert one["result"] == "not run" and "are left, and it takes about 2000" in one["reason"]


def test_all_of_it_fits_into_ten_minutes_and_parts_are_chosen_by_name(check: ModuleType) -> None:
    assert sum(part.expected_s for part in check.PARTS) <= check.BUDGET_S == 600
    assert [part.name for part in check.choose("ipc, transformers")] == ["transformers", "ipc"]
    assert check.choose(None) == list(check.PARTS)
    with pytest.raises(ValueError, match="no part 'nccl'"):
        check.choose("nccl")


# -- packages from a folder -------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o755 if path.endswith("/tool") else 0o644) << 16
            archive.writestr(entry, text)


def test_wheels_are_unpacked_for_both_interpreters_and_what_gym_only_imports_is_stood_in_for(
    check: ModuleType, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    files = {"a_module.py": "X = 1", "a_package/bin/tool": "", "a-1.0.data/purelib/b_module.py": ""}
    wheel(wheels, "a", {**files, "a-1.0.data/scripts/a": ""})
    wheel(wheels / "gym", "nemo_gym", {"nemo_gym/__init__.py": "X = 2"})
    wheel(wheels / "gym", "ray", {"ray/__init__.py": "X = 3"})
    trainer, python = check.install(wheels, tmp_path, None)
    site = tmp_path / "site"
    assert {path.name for path in site.iterdir()} == {"a_module.py", "b_module.py", "a_package"}
    assert os.access(site / "a_package" / "bin" / "tool", os.X_OK)

    def told(interpreter: str, code: str) -> list[str]:
        return subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    code = "import nemo_gym, ray, wandb, wandb.util; from wandb import Run; print(nemo_gym.X, ray.X, Run.__name__)"
    assert told(python, code) == ["2", "3", "Run"]
    # Each has its own packages before those of this Python, and not the other's.
    assert told(trainer, "import a_module, numpy; print(a_module.__file__)") == [str(site / "a_module.py")]
    found = "import importlib.util as u; print(*(u.find_spec(name) is None for name in ('a_module', 'nemo_gym')))"
    assert (told(trainer, found), told(python, found)) == (["False", "True"], ["True", "False"])
    nothing = tmp_path / "empty"
    assert check.install(nothing, nothing, "python-of-mine") == (sys.executable, "python-of-mine")


# -- what docs/ tells -------------------------------------------------------------------------------------------------


def test_docs_tell_of_runs_on_a_gpu_alone(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "RECORD", tmp_path / "record.json")
    said, rows = check.tested()
    assert "No run on a GPU is recorded" in said
    assert {row[2] for row in rows} == {"**not run**"} and len(rows) == len(check.PARTS)
    record = {"dry": False, "date": "2030-01-01", "commit": "abc", "seconds": 500.0, "facts": FACTS, "parts": []}
    record["parts"] = [
        {
            "name": "ipc",
            "result": "passed",
            "reason": "",
            "seconds": 9.0,
            "measured": {"gb_per_s": 900.0},
            "stops": [],
        },
        {"name": "sleep", "result": "failed", "reason": "no | room", "seconds": 9.0, "measured": {}, "stops": []},
    ]
    (tmp_path / "record.json").write_text(json.dumps(record))
    said, rows = check.tested()
    assert said == "On one NVIDIA of the tests on 2030-01-01, commit abc, 500 s: torch 1.0."
    told = {row[0]: row[2:] for row in rows}
    assert told["`ipc`"] == ("passed", "gb_per_s 900.0")
    assert told["`sleep`"] == ("failed: no \\| room", "")
    assert told["`sync`"] == ("**not run**", "")
    dry = tmp_path / "dry.json"
    dry.write_text(json.dumps({**record, "dry": True}))
    assert check.write_docs(dry) == 1
    assert "without a GPU" in capsys.readouterr().err
