"""A server that a fork server forks is what the same command would be, ends when it must, and is executed where a fork
would differ. Small modules stand for vLLM and the server."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import wait_for
from trl_gym import processes
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT
from trl_gym.policy_server.engine.forking import Imported, why_not_forked
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.processes import ChildProcess, bind_socket

# What is imported: each process that imports it has another token. It waits for a file or starts a thread if told to.
PRELOADED = """
import os, threading, time
TOKEN = os.urandom(8).hex()
while (gate := os.environ.get("TEST_GATE")) and not os.path.exists(gate):
    time.sleep(0.01)
if os.environ.get("TEST_THREAD"):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
os.environ["SET_BY_IMPORT"] = "1"
"""

# The server: says what it is, then does what its last argument says.
SERVED = """
import json, os, preloaded, signal, socket, sys, time
says = {name: os.environ.get(name) for name in ("ADDED", "REMOVED", "SET_BY_IMPORT", "VLLM_ADDED")}
says |= {"token": preloaded.TOKEN, "name": __name__, "argv": sys.argv[1:], "folder": os.getcwd(), "pid": os.getpid()}
says |= {"leads": os.getsid(0) == os.getpid(), "main": sys.modules["__main__"].__spec__.name}
print(json.dumps(says), flush=True)
if sys.argv[-1] == "listen":
    connection, _ = socket.socket(fileno=int(sys.argv[2])).accept()
    connection.sendall(b"hello")
elif sys.argv[-1] == "sleep":
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(7)
elif sys.argv[-1] == "hang":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
    print(os.getpid(), flush=True)
    time.sleep(600)
else:
    exec(sys.argv[-1])
"""


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "preloaded.py").write_text(PRELOADED)
    (folder / "served.py").write_text(SERVED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("REMOVED", "1")
        patch.setattr(processes, "_GRACE_S", 0.5)
        yield


@pytest.fixture(scope="module")
def shared(modules: None) -> Iterator[ForkServer]:
    with ForkServer(preload=["preloaded"]) as forks:
        yield forks


Run = Callable[..., ChildProcess]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    started: list[ChildProcess] = []

    def start(forks: ForkServer, *arguments: str, env: dict[str, str | None] | None = None, **options: Any) -> Any:
        log = tmp_path / f"log{len(started)}"
        command = [sys.executable, "-m", "served", *arguments]
        started.append(ChildProcess("server", command, log_path=log, env=env, start=forks.fork, **options))
        return started[-1]

    yield start
    for child in started:
        child.stop()


def said(child: ChildProcess) -> dict[str, Any]:
    def line() -> str:
        lines = child.log_path.read_text().splitlines()
        return next((line for line in lines if line.startswith("{")), "")

    return json.loads(wait_for(line))


def test_a_forked_server_has_what_an_executed_one_has(
    shared: ForkServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    child = run(shared, "one", "sleep", env={"ADDED": "yes", "REMOVED": None})
    says = said(child)
    names = ("name", "argv", "folder", "ADDED", "REMOVED", "SET_BY_IMPORT", "main")
    assert [says[name] for name in names] == [
        *("__main__", ["one", "sleep"], str(tmp_path), "yes", None, "1", "served")
    ]
    assert says["leads"]
    [server] = psutil.Process(child.pid).children()
    assert server.pid == says["pid"] and child.poll() is None
    child.stop()
    child.stop()
    assert child.poll() == 7, "SIGINT arrived, as at a new process"
    other = run(shared, "two", "sleep")
    assert said(other)["token"] == says["token"], "nothing was imported again"
    assert said(other)["REMOVED"] == "1" and said(other)["ADDED"] is None


def test_a_listening_socket_travels_to_it(shared: ForkServer, run: Run) -> None:
    with bind_socket() as listening:
        child = run(shared, "--listen-fd", str(listening.fileno()), "listen", pass_fds=[listening.fileno()])
        address = listening.getsockname()
    with socket.create_connection(address, timeout=20) as connection:
        assert connection.recv(16) == b"hello"
    assert child.wait(20) == 0
    with pytest.raises(ConnectionRefusedError):  # nobody else holds it
        socket.create_connection(address, timeout=20)


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('error: this is why')", 1, "error: this is why"),
        ("raise ValueError('that is why')", 1, "ValueError: that is why"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV, ""),
        ("import atexit; atexit.register(print, 'cleaned up')", 0, "cleaned up"),
    ],
)
def test_it_ends_as_an_executed_one(shared: ForkServer, run: Run, code: str, status: int, text: str) -> None:
    child = run(shared, code)
    assert child.wait(20) == status
    assert text in child.log_tail()


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"VLLM_ADDED": "1"}, "the environment differs in VLLM_ADDED"),
        ({"HF_HOME": "/elsewhere", "OMP_NUM_THREADS": "7"}, "the environment differs in HF_HOME"),
    ],
)
def test_a_variable_that_is_read_while_importing_is_read_again(
    shared: ForkServer, run: Run, env: dict[str, str | None], reason: str
) -> None:
    first, second = run(shared, "sleep"), run(shared, "sleep", env=env)
    assert said(first)["token"] != said(second)["token"]
    assert said(second)["VLLM_ADDED"] == env.get("VLLM_ADDED") and said(second)["leads"]
    assert f"imports vLLM itself: {reason}" in second.log_path.read_text()
    second.stop()
    assert second.poll() == 7


@pytest.mark.parametrize(
    ("preload", "env", "reason"),
    [
        (["preloaded"], {"TEST_THREAD": "1"}, "importing started 1 threads"),
        (["preloaded", "not_there"], {}, "importing failed: ModuleNotFoundError"),
    ],
)
def test_where_a_fork_is_not_safe_the_command_is_executed(
    run: Run, preload: list[str], env: dict[str, str | None], reason: str
) -> None:
    with ForkServer(preload=preload, env=env) as forks:
        child = run(forks, "sleep")
        assert said(child)["main"] == "served"
        assert reason in child.log_path.read_text()
        child.stop()
        assert child.poll() == 7


def test_a_server_that_is_asked_for_early_waits_and_may_be_given_up(run: Run, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ForkServer(preload=["preloaded"], env={"TEST_GATE": str(gate)}) as forks:
        given_up, awaited = run(forks, "sleep"), run(forks, "sleep")
        assert awaited.pid is None and awaited.poll() is None and awaited.wait(0.01) is None
        given_up.stop()
        gate.touch()
        assert said(awaited)["argv"] == ["sleep"]
        assert given_up.log_path.read_text() == ""


def pids_of(child: ChildProcess) -> list[int]:
    """Server and grandchild, which is in a session of its own."""
    return wait_for(lambda: numbers if len(numbers := numbers_in(child.log_path)) == 2 else [])


def numbers_in(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().splitlines() if line.isdigit()] if log.exists() else []


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_stopping_one_ends_its_whole_family_and_no_other(shared: ForkServer, run: Run) -> None:
    hanging, other = run(shared, "hang"), run(shared, "sleep")
    pids = pids_of(hanging)
    hanging.stop()
    assert gone(pids) and hanging.poll() == 128 + signal.SIGKILL
    wait_for(lambda: not set(pids) & {child.pid for child in psutil.Process(shared.pid).children(recursive=True)})
    assert said(other) and other.poll() is None


def test_a_server_ends_with_its_fork_server_and_the_next_one_is_executed(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    forks = ForkServer(preload=["preloaded"]).start()
    child = run(forks, "hang")
    pids = pids_of(child)
    [process] = psutil.Process(forks.pid).children()
    process.kill()
    assert child.wait(20) == 128 + signal.SIGKILL
    wait_for(lambda: gone(pids))
    with caplog.at_level(logging.WARNING):
        next_one = run(forks, "sleep")
    assert "The fork server ended within" in caplog.text and "SIGKILL" in caplog.text
    assert said(next_one)["argv"] == ["sleep"]
    forks.stop()
    assert next_one.poll() is None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_the_owner(tmp_path: Path, how: signal.Signals) -> None:
    log = tmp_path / "log"
    code = (
        "import sys, time; from trl_gym import processes; from trl_gym.policy_server.fork_server import ForkServer\n"
        "processes._GRACE_S = 0.5\n"
        "forks = ForkServer(preload=['preloaded']).start()\n"
        f"child = processes.ChildProcess('s', [sys.executable, '-m', 'served', 'hang'], log_path={str(log)!r},\n"
        "    start=forks.fork)\n"
        "while child.pid is None: time.sleep(0.01)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: len(numbers_in(log)) == 2)
    family = [process.pid for process in psutil.Process(owner.pid).children(recursive=True)]
    assert len(family) >= 4, "two supervisors, fork server, server"
    owner.send_signal(how)
    owner.wait()
    wait_for(lambda: gone([*family, *numbers_in(log)]))


def test_off_linux_nothing_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with ForkServer(preload=["preloaded"]) as forks:
        assert forks.pid is None and isinstance(run(forks, "sleep")._supervisor, subprocess.Popen)


PYTHON = [sys.executable, "-m", "trl_gym.policy_server"]


def test_what_an_import_set_is_there_afterwards_unless_the_server_is_told_otherwise() -> None:
    imported = Imported(before={"A": "1"}, after={"A": "1", "SET": "1", "TOLD": "1"})
    assert imported.environment({"TOLD": "2", "B": "3"}) == {"TOLD": "2", "B": "3", "SET": "1"}


def test_our_own_defaults_are_no_difference() -> None:
    imported = Imported(before=DEFAULT_ENVIRONMENT, after=DEFAULT_ENVIRONMENT)
    assert why_not_forked(PYTHON, {"VLLM_API_KEY": "k", "TRL_GYM_NONCE": "n"}, imported) == ""
    assert "VLLM_NO_USAGE_STATS" in why_not_forked(PYTHON, {"VLLM_NO_USAGE_STATS": "0"}, imported)
    assert "/bin/sh" in why_not_forked(["/bin/sh", "-m", "x"], {}, imported)
