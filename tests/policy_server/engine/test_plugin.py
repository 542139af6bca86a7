"""An engine of ours ends when its parent was killed, whatever it is doing; another vLLM's engine is left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from trl_gym.policy_server.engine.plugin import ENV_OWN_SERVER, end_with_parent

# Starts a child that calls it twice and then sleeps, and prints the child's pid and number of threads that look.
PARENT = """
import multiprocessing, time
from tests.policy_server.engine.test_plugin import child
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=child)
    process.start()
    time.sleep(600)
"""


def child() -> None:
    end_with_parent()
    end_with_parent()
    watching = [thread for thread in threading.enumerate() if thread.name == "trl-gym-parent"]
    sys.stdout.write(f"{os.getpid()} {len(watching)}\n")
    sys.stdout.flush()
    time.sleep(600)


def orphaned(method: str, is_own: str) -> tuple[psutil.Process, int]:
    """A child whose parent was killed, and how many of its threads looked at the parent."""
    command = [sys.executable, "-c", PARENT.format(method=method)]
    env = {**os.environ, ENV_OWN_SERVER: is_own}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        try:
            assert parent.stdout is not None
            pid, num_threads = map(int, parent.stdout.readline().split())
            return psutil.Process(pid), num_threads
        finally:
            parent.kill()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_engine_of_ours_ends_with_its_parent(method: str) -> None:
    orphan, num_threads = orphaned(method, "1")
    assert num_threads == 1
    assert psutil.wait_procs([orphan], timeout=20)[1] == []


def test_an_engine_of_another_vllm_is_left_alone() -> None:
    orphan, num_threads = orphaned("spawn", "")
    try:
        assert num_threads == 0 and orphan.is_running()
    finally:
        orphan.kill()


def test_a_process_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_OWN_SERVER, "1")
    assert multiprocessing.parent_process() is None
    before = threading.active_count()
    end_with_parent()
    assert threading.active_count() == before


def registered(vllm: Path, is_own: str) -> subprocess.CompletedProcess[str]:
    """Call `register` in a Python whose vLLM is the package in this folder; prints what was loaded."""
    code = (
        "import json, sys; from trl_gym.policy_server.engine import plugin; heavy = ['torch', 'vllm', 'transformers'];"
        "print(json.dumps([name for name in heavy if name in sys.modules])); plugin.register()"
    )
    env = {**os.environ, ENV_OWN_SERVER: is_own, "PYTHONPATH": os.pathsep.join([str(vllm), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("factory", [None, "class WeightTransferEngineFactory: ..."], ids=["missing", "changed"])
def test_a_vllm_of_another_version_starts_without_our_engine(tmp_path: Path, factory: str | None) -> None:
    package = tmp_path / "vllm" / "distributed" / "weight_transfer"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    if factory is not None:
        (package / "factory.py").write_text(factory)
    foreign = registered(tmp_path, "")
    assert foreign.returncode == 0, foreign.stderr
    assert json.loads(foreign.stdout) == [], "loading the plugin imports nothing heavy"
    own = registered(tmp_path, "1")
    assert own.returncode != 0 and "Error" in own.stderr


def test_a_server_that_we_start_marks_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_gym.policy_server.engine import entry

    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != ENV_OWN_SERVER})
    entry._configure_environment(entry.parse_args(["some/model"]))
    assert os.environ[ENV_OWN_SERVER] == "1"
