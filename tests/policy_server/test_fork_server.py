"""A server that a fork server forks is what the same command would be, ends when it must, and is executed where a fork
would differ. Small modules stand for vLLM and the server."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import server_below, wait_for
from tests.test_processes import alive
from trl_gym import processes
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT
from trl_gym.policy_server.engine.forking import Imported, why_not_forked
from trl_gym.policy_server.fork_server import NUM_BYTES, Forked, ForkServer
from trl_gym.policy_server.server import cause_of_death
from trl_gym.processes import ChildProcess, bind_socket

# What is imported: each process that imports it has another token. It waits for a file or starts a thread if told to.
PRELOADED = """
import errno, itertools, os, threading, time
TOKEN = os.urandom(8).hex()
while (gate := os.environ.get("TEST_GATE")) and not os.path.exists(gate):
    time.sleep(0.01)
if os.environ.get("TEST_THREAD"):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
if os.environ.get("TEST_FORK"):  # the first one is made to count threads
    fork, calls = os.fork, itertools.count()
    def fork_or_fail():
        if next(calls) == 1:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        return fork()
    os.fork = fork_or_fail
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
        print("interrupted", flush=True)
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
    (folder / "leaves.py").write_text("raise SystemExit('this is why')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("REMOVED", "1")
        patch.setattr(processes, "_GRACE_S", 60.0)  # a busy machine is slow to interrupt a server
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
        with pytest.MonkeyPatch.context() as patch:
            if "hang" in arguments:
                patch.setattr(processes, "_GRACE_S", 0.5)
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
    scratch = tmp_path / "scratch"
    child = run(shared, "one", "sleep", env={"ADDED": "yes", "REMOVED": None}, scratch=scratch)
    says = said(child)
    names = ("name", "argv", "folder", "ADDED", "REMOVED", "SET_BY_IMPORT", "main")
    assert [says[name] for name in names] == [
        *("__main__", ["one", "sleep"], str(tmp_path), "yes", None, "1", "served")
    ]
    assert says["leads"]
    assert server_below(child).pid == says["pid"] and child.poll() is None
    assert scratch.stat().st_mode & 0o777 == 0o700
    child.stop()
    child.stop()
    assert not scratch.exists()
    assert child.poll() == 7, "SIGINT arrived, as at a new process"
    other = run(shared, "two", "sleep")
    assert said(other)["token"] == says["token"], "nothing was imported again"
    assert said(other)["REMOVED"] == "1" and said(other)["ADDED"] is None


def test_a_listening_socket_travels_to_it(shared: ForkServer, run: Run) -> None:
    with bind_socket() as listening:
        child = run(shared, "--listen-fd", str(listening.fileno()), "listen", pass_fds=[listening.fileno()])
        address = listening.getsockname()
    with socket.create_connection(address, timeout=60) as connection:
        assert connection.recv(16) == b"hello"
    assert child.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):  # nobody else holds it
        socket.create_connection(address, timeout=60)


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
    assert child.wait(60) == status
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
        (["preloaded", "leaves"], {}, "importing failed: SystemExit('this is why')"),
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
        large: dict[str, str | None] = {f"LARGE_{n}": 100_000 * "x" for n in range(10)}  # than a socket's buffer
        scratch = tmp_path / "scratch"
        given_up, awaited = run(forks, "sleep", env=large, scratch=scratch), run(forks, "sleep", env=large)
        assert awaited.pid is None and awaited.poll() is None and awaited.wait(0.01) is None
        given_up.stop()
        gate.touch()
        assert said(awaited)["argv"] == ["sleep"]
        assert given_up.log_path.read_text() == "" and not scratch.exists()


def pids_of(child: ChildProcess) -> list[int]:
    """Server and grandchild, which is in a session of its own."""
    return wait_for(lambda: numbers if len(numbers := numbers_in(child.log_path)) == 2 else [])


def numbers_in(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().splitlines() if line.isdigit()] if log.exists() else []


def gone(pids: list[int]) -> bool:
    return not any(map(alive, pids))


def test_stopping_one_ends_its_whole_family_and_no_other(shared: ForkServer, run: Run) -> None:
    hanging, other = run(shared, "hang"), run(shared, "sleep")
    pids = pids_of(hanging)
    hanging.stop()
    wait_for(lambda: gone(pids))
    assert hanging.poll() == 128 + signal.SIGKILL
    wait_for(lambda: not set(pids) & {child.pid for child in psutil.Process(shared.pid).children(recursive=True)})
    assert said(other) and other.poll() is None


def process_of(forks: ForkServer) -> psutil.Process:
    return wait_for(psutil.Process(forks.pid).children)[0]


def test_a_server_outlives_its_fork_server_and_the_next_one_is_executed(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    forks = ForkServer(preload=["preloaded"]).start()
    child, hanging = run(forks, "sleep"), run(forks, "hang")
    pids, says = pids_of(hanging), said(child)
    process_of(forks).kill()
    assert forks._process is not None and forks._process.wait(60) == 128 + signal.SIGKILL
    with caplog.at_level(logging.WARNING):
        next_one = run(forks, "sleep")
    assert "The fork server ended within" in caplog.text and "SIGKILL" in caplog.text
    assert said(next_one)["argv"] == ["sleep"] and said(next_one)["token"] != says["token"]
    forks.stop()
    assert [one.poll() for one in (child, hanging, next_one)] == [None, None, None]
    child.stop()
    assert child.poll() == 7 and "interrupted" in child.log_tail()
    hanging.stop()
    wait_for(lambda: gone(pids))
    assert hanging.poll() == 128 + signal.SIGKILL


def test_a_fork_server_that_ends_before_it_forks_is_named_as_the_cause(run: Run, tmp_path: Path) -> None:
    with ForkServer(preload=["preloaded"], env={"TEST_GATE": str(tmp_path / "never")}) as forks:
        child = run(forks, "sleep")
        process_of(forks).kill()
        assert child.wait(60) == 1 and child.pid is None
    cause = cause_of_death(child.log_path)
    assert "the fork server ended before it had forked it" in child.describe_death()
    assert "the fork server ended" in cause.text and "imports vLLM itself" in cause.remedy


def test_a_fork_server_that_was_stopped_is_continued(
    shared: ForkServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """A server would wait for it in vain, as long as it may take to start."""
    other, process = run(shared, "sleep"), process_of(shared)
    assert said(other)
    process.suspend()
    server_below(other).suspend()
    child = run(shared, "sleep")
    with caplog.at_level(logging.WARNING):
        wait_for(lambda: child.poll() is None and child.pid)
    assert f"The fork server, process {process.pid}, was stopped by someone. It is continued." in caplog.text
    assert said(child)["argv"] == ["sleep"] and len(other.stopped()) == 1, "it alone"


def test_a_fork_that_fails_costs_one_server(run: Run) -> None:
    with ForkServer(preload=["preloaded"], env={"TEST_FORK": "1"}) as forks:
        failed, other = run(forks, "sleep"), run(forks, "sleep")
        assert failed.wait(60) == 1 and said(other)["argv"] == ["sleep"]
        reason = f"the fork server could not fork it: {os.strerror(errno.EAGAIN)}"
        assert reason in failed.log_tail() and "ulimit" in cause_of_death(failed.log_path).remedy


def test_a_command_that_cannot_be_executed_is_named_in_its_log(shared: ForkServer, tmp_path: Path) -> None:
    child = ChildProcess("server", ["/no/such/program"], log_path=tmp_path / "log", start=shared.fork)
    assert child.wait(60) == 1
    assert "error: this server cannot be started: [Errno 2]" in child.log_tail()
    child.stop()


def test_many_threads_learn_of_the_same_end(tmp_path: Path) -> None:
    """As when calls of many rollouts fail at once, and each asks whether the server lives."""
    for _ in range(20):
        request, theirs = socket.socketpair()
        with open(tmp_path / "log", "wb", buffering=0) as log, ThreadPoolExecutor(16) as pool:
            supervisor = Forked(request, log, wake=lambda: None)
            ends = [pool.submit(supervisor.wait, 60.0) for _ in range(16)]
            with theirs:
                for byte in os.getpid().to_bytes(NUM_BYTES, "big") + (3).to_bytes(NUM_BYTES, "big"):
                    theirs.sendall(bytes([byte]))
            assert [end.result() for end in ends] == 16 * [3] and supervisor.pid == os.getpid()


def test_folders_that_the_environment_names_stay_importable(run: Run, tmp_path: Path) -> None:
    """`-m` puts no folder of its own first then."""
    with ForkServer(preload=["preloaded"], env={"PYTHONSAFEPATH": "1"}) as forks:
        child = run(forks, "print(*sys.path, sep=chr(10))", env={"PYTHONSAFEPATH": "1"})
        assert child.wait(60) == 0, child.log_tail()
        assert os.environ["PYTHONPATH"].split(os.pathsep)[0] in child.log_path.read_text().splitlines()


def test_the_level_that_trl_sets_when_it_is_imported_is_no_difference(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    with ForkServer(preload=["preloaded"]) as forks:
        before = said(run(forks, "sleep"))
        assert said(run(forks, "sleep", env={"VLLM_LOGGING_LEVEL": "ERROR"}))["token"] == before["token"]


@pytest.mark.parametrize(
    ("how", "what"), [("SIGKILL", "hang"), ("SIGTERM", "hang"), ("SIGKILL", "sleep"), ("SIGKILL", "")]
)
def test_nothing_survives_the_owner(tmp_path: Path, how: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it hangs, ends as it should when it is told to, or waits while vLLM is imported."""
    log = tmp_path / "log"
    if not what:
        monkeypatch.setenv("TEST_GATE", str(tmp_path / "never"))
    code = (
        "import sys, time; from trl_gym import processes; from trl_gym.policy_server.fork_server import ForkServer\n"
        f"processes._GRACE_S = {60.0 if what == 'sleep' else 0.5}\n"
        "forks = ForkServer(preload=['preloaded']).start()\n"
        f"child = processes.ChildProcess('s', [sys.executable, '-m', 'served', {what!r}], log_path={str(log)!r},\n"
        "    start=forks.fork)\n"
        "time.sleep(600)\n"
    )
    num_expected = {"hang": 6, "sleep": 5, "": 2}[what]  # two supervisors, a guard, fork server, server, its child

    def family() -> list[int]:
        return [process.pid for process in psutil.Process(owner.pid).children(recursive=True)]

    owner = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: len(family()) == num_expected and (not what or (log.exists() and "{" in log.read_text())))
    pids = [*family(), *numbers_in(log)]
    owner.send_signal(signal.Signals[how])
    owner.wait()
    wait_for(lambda: gone(pids))
    assert ("interrupted" in log.read_text()) == (what == "sleep")


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
