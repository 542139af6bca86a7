"""An engine of ours ends when its parent was killed, whatever it is doing; another vLLM's engine is left alone."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_for
from tests.test_processes import alive
from trl_gym.policy_server.command import ENV_SCRATCH
from trl_gym.policy_server.engine.plugin import ENV_OWN_SERVER, end_with_parent
from trl_gym.policy_server.middleware.app import Settings

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
    assert psutil.wait_procs([orphan], timeout=60)[1] == []


# An event loop that serves, and then forks an engine as vLLM does: within the loop, through `multiprocessing`.
FORKING = """
import multiprocessing, os, signal, socket, sys, time, uvloop
from trl_gym.policy_server.engine.plugin import leave_the_server
def engine():
    fds = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name != str(os.getpid())
           and os.path.exists(f"/proc/self/fd/{name}")]
    try:
        print(os.getpid(), listening in fds, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        time.sleep(600)
async def serve():
    process = multiprocessing.get_context("fork").Process(target=engine)
    process.start()
    print(os.getpid(), listening, flush=True)
    while True:
        import asyncio
        await asyncio.sleep(600)
with socket.create_server(("127.0.0.1", 0)) as sock:
    listening = os.readlink(f"/proc/self/fd/{sock.fileno()}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.register_at_fork(after_in_child=lambda: leave_the_server(sock))
    uvloop.run(serve())
"""


def test_a_forked_engine_has_nothing_of_the_server_and_ends_with_it() -> None:
    env = {**os.environ, ENV_OWN_SERVER: "1"}
    with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert server.stdout is not None
            lines = sorted((server.stdout.readline().split() for _ in range(2)), key=len)
            [[_, listening], [pid, *facts]] = lines
            assert listening.startswith("socket:") and facts == ["False", "True"]
            os.kill(int(pid), signal.SIGINT)
            assert server.stdout.readline() == "interrupted\n"
            assert server.poll() is None, "the signal was the engine's alone"
        finally:
            server.kill()
    wait_for(lambda: not alive(int(pid)))


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
        "import json, sys, tempfile; from trl_gym.policy_server.engine import plugin\n"
        "print(json.dumps([name for name in ['torch', 'vllm', 'transformers'] if name in sys.modules]))\n"
        "try: plugin.register()\nfinally: print(tempfile.gettempdir())"
    )
    env = {**os.environ, ENV_OWN_SERVER: is_own, "PYTHONPATH": os.pathsep.join([str(vllm), *sys.path])}
    env |= {ENV_SCRATCH: str(vllm)}
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
    loaded, temporary = foreign.stdout.splitlines()
    assert json.loads(loaded) == [], "loading the plugin imports nothing heavy"
    own = registered(tmp_path, "1")
    assert own.returncode != 0 and "Error" in own.stderr
    assert temporary != str(tmp_path) == own.stdout.splitlines()[1]


def test_the_engine_is_forked_only_where_that_is_safe_and_the_same() -> None:
    from trl_gym.policy_server.engine.entry import EngineStart, why_not_forked

    one = EngineStart(asked=None, system="linux", device="cuda", executor="uni")
    for fine in (one, replace(one, device="cpu")):
        assert why_not_forked(fine) == ""
    for changed, words in {
        "asked=spawn": (replace(one, asked="spawn"), "VLLM_WORKER_MULTIPROC_METHOD=spawn"),
        "asked=fork": (replace(one, asked="fork"), "VLLM_WORKER_MULTIPROC_METHOD=fork"),
        "macOS": (replace(one, system="darwin"), "darwin"),
        "another device": (replace(one, device="xpu"), "xpu"),
        "tensor parallel": (replace(one, executor="mp"), "'mp'"),
        "ray": (replace(one, executor="ray"), "'ray'"),
        "data parallel": (replace(one, num_engines=2), "2 engines"),
        "NUMA": (replace(one, needs_spawn="--numa-bind"), "--numa-bind"),
        "CUDA in use": (replace(one, device_in_use=True), "device is in use"),
        "threads": (replace(one, num_threads=3), "3 threads"),
        "preload": (replace(one, not_preloaded=("/lib/libtcmalloc.so",)), "libtcmalloc"),
    }.values():
        assert words in why_not_forked(changed)


def test_a_server_that_we_start_marks_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils import network_utils

    from trl_gym.policy_server.engine import entry

    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != ENV_OWN_SERVER})
    monkeypatch.setenv(ENV_SCRATCH, "/scratch")
    monkeypatch.setattr(tempfile, "tempdir", None)
    entry._configure_environment(entry.parse_args(["some/model"]))
    assert os.environ[ENV_OWN_SERVER] == "1"
    assert network_utils.get_open_zmq_ipc_path().startswith("ipc:///scratch/")
    assert network_utils.get_file_store_init_method().startswith("file:///scratch/")
    assert Settings.from_env().weight_transports == ("file",)
    nccl = ["--weight-transfer-config", '{"backend": "nccl"}', "--enable-lora"]
    entry._configure_environment(entry.parse_args(["some/model", *nccl]))
    assert Settings.from_env().weight_transports == ("nccl", "adapter")


def test_the_log_level_is_the_one_that_is_set_when_the_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM was imported before, by the fork server, where TRL had not set it yet."""
    from trl_gym.policy_server.engine import entry

    told, handler = logging.getLogger("vllm"), logging.StreamHandler()
    told.addHandler(handler)  # whether vLLM has made one depends on its version
    had = [(one, one.level) for one in (told, *told.handlers)]
    try:
        for level in ("ERROR", "debug"):
            monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
            entry._log_as_told()
            assert {one.level for one, _ in had} == {getattr(logging, level.upper())}
    finally:
        for one, level in had:
            one.setLevel(level)
        told.removeHandler(handler)
