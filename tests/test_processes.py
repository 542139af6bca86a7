"""Nothing that we start may outlive us, however we end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import server_below, wait_for
from trl_gym import processes, supervisor
from trl_gym.processes import ChildProcess, bind_socket

GRACE_S = 0.5  # instead of 5 s, for children that ignore SIGINT

# A server that ignores SIGINT and has a child in another session: the worst citizen we can think of.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), grandchild.pid, flush=True)
time.sleep(600)
"""

POLITE = """
import signal, sys, time
try:
    print("up", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("bye", flush=True)
    sys.exit(7)
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is slow to interrupt a child; those that ignore it are given less."""
    monkeypatch.setattr(processes, "_GRACE_S", 60.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def log_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_stop_lets_a_polite_child_finish(tmp_path: Path) -> None:
    child = ChildProcess("polite", [sys.executable, "-c", POLITE], log_path=tmp_path / "log")
    wait_for(lambda: "up" in log_of(tmp_path / "log"))
    assert child.poll() is None
    child.stop()
    child.stop()  # idempotent
    assert child.poll() == 7
    assert "bye" in child.log_tail()


def test_death_is_explained_with_code_log_and_path(tmp_path: Path) -> None:
    child = ChildProcess(
        "demo server", [sys.executable, "-c", "import sys; sys.exit('no such model')"], log_path=tmp_path / "log"
    )
    assert child.wait(60.0) == 1
    message = child.describe_death()
    assert re.match(r"demo server ended within [0-9.e+]+ s of its start \(exit code 1\)", message)
    assert "no such model" in message
    assert str(tmp_path / "log") in message
    child.stop()


def test_death_by_signal_is_named(tmp_path: Path) -> None:
    child = ChildProcess(
        "demo",
        [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"],
        log_path=tmp_path / "l",
    )
    wait_for(lambda: child.poll() is not None)
    assert "SIGKILL" in child.describe_death()
    child.stop()


OWNER = """
import sys, time
from pathlib import Path
from trl_gym import processes
processes._GRACE_S = float(sys.argv[1])
log = Path(sys.argv[3])
server = [sys.executable, "-c", sys.argv[2]]
child = processes.ChildProcess("server", server, log_path=log, scratch=log.with_name("scratch"))
while "\\n" not in log.read_text(): time.sleep(0.01)
exec(sys.argv[4])
"""


def own(tmp_path: Path, server: str, then: str = "time.sleep(600)", imports: str = "") -> subprocess.Popen[bytes]:
    """Start a script that owns a server and does not stop it."""
    words = [str(GRACE_S if server is STUBBORN else 60.0), server, str(tmp_path / "log"), then]
    return subprocess.Popen([sys.executable, "-c", imports + OWNER, *words])


@pytest.mark.parametrize(
    ("whom", "how"),
    [
        ("owner", signal.SIGTERM),
        *((whom, signal.SIGKILL) for whom in ("owner", "guard", "supervisor", "owner guard", "owner supervisor")),
    ],
)
def test_nothing_survives_those_who_look_after_it(tmp_path: Path, whom: str, how: signal.Signals) -> None:
    owner = psutil.Process(own(tmp_path, STUBBORN).pid)
    pids = [int(p) for p in wait_for(lambda: log_of(tmp_path / "log")).split()]
    [guard] = owner.children()
    [supervisor] = guard.children()
    assert len(pids) == 2 and all(map(alive, pids))
    scratch = tmp_path / "scratch"
    assert scratch.stat().st_mode & 0o777 == 0o700
    socket.socket(socket.AF_UNIX).bind(str(scratch / "s"))
    for name in whom.split():
        {"owner": owner, "guard": guard, "supervisor": supervisor}[name].send_signal(how)
    wait_for(lambda: not any(map(alive, pids)))
    owner.kill()
    wait_for(lambda: not any(map(alive, [owner.pid, guard.pid, supervisor.pid])))
    assert not scratch.exists()


SHARING = """
import time
from multiprocessing import shared_memory
print(shared_memory.SharedMemory(create=True, size=16)._name, flush=True)
time.sleep(600)
"""


def test_shared_memory_of_a_server_that_was_killed_is_given_back(tmp_path: Path) -> None:
    """Python's resource tracker does so, if it is let."""
    child = ChildProcess("server", [sys.executable, "-c", SHARING], log_path=tmp_path / "log")
    name = wait_for(lambda: log_of(tmp_path / "log")).strip()
    server = server_below(child)
    wait_for(lambda: [one for one in server.children() if supervisor.is_tracker(one.pid)])
    server.kill()
    assert child.wait(60.0) == 128 + signal.SIGKILL
    assert name.startswith("/psm_") and not Path(f"/dev/shm{name}").exists()
    child.stop()


def test_a_supervisor_that_was_stopped_goes_on(tmp_path: Path) -> None:
    child = ChildProcess("polite", [sys.executable, "-c", POLITE], log_path=tmp_path / "log")
    wait_for(lambda: "up" in log_of(tmp_path / "log"))
    psutil.Process(child.pid).children()[0].suspend()
    child.stop()
    assert child.poll() == 7


def test_a_killed_supervisor_is_told_of(tmp_path: Path) -> None:
    child = ChildProcess("polite", [sys.executable, "-c", POLITE], log_path=tmp_path / "log")
    wait_for(lambda: "up" in log_of(tmp_path / "log"))
    psutil.Process(child.pid).children()[0].kill()
    wait_for(lambda: child.poll() is not None)
    assert "SIGKILL" in child.describe_end()


FINALIZER = "import weakref\nclass A: pass\nfirst = A()\nweakref.finalize(first, print)\n"
SERVER_CLASS = "from trl_gym import PolicyServer\n"
CTRL_C = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    ("imports", "then"), [("", "sys.exit(3)"), (FINALIZER, ""), (SERVER_CLASS, ""), (SERVER_CLASS, CTRL_C)]
)
def test_a_child_of_a_script_that_forgets_it_is_told_to_end(tmp_path: Path, imports: str, then: str) -> None:
    """Whatever runs at exit, in whatever order: finalizers do nothing any more when children are stopped."""
    own(tmp_path, POLITE, then, imports).wait(400)
    assert (tmp_path / "log").read_text() == "up\nbye\n"


def test_a_supervisor_gets_all_the_time_that_it_may_need(tmp_path: Path) -> None:
    """A stand-in hangs; a real one would need devices that are slow to let go."""
    waited: list[float | None] = []

    class Hanging:
        pid, returncode = 2**22 + 1, None  # of no process

        def poll(self) -> int | None:
            return self.returncode

        def wait(self, timeout: float | None = None) -> int:
            waited.append(timeout)
            if timeout is not None:
                raise subprocess.TimeoutExpired("hanging", timeout)
            return -signal.SIGKILL

        def kill(self) -> None:
            waited.append(0.0)

    ChildProcess("hanging", ["none"], log_path=tmp_path / "log", start=lambda *_, **__: Hanging()).stop()
    [first, *others] = waited
    assert first is not None and first > processes._GRACE_S + supervisor.KILL_S + supervisor.REAP_S
    assert others == [0.0, None], "killed, then awaited"


def test_a_supervisor_that_is_stopped_is_continued_and_what_is_below_it_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", GRACE_S)
    child = ChildProcess("polite", [sys.executable, "-c", POLITE], log_path=tmp_path / "log")
    wait_for(lambda: "up" in log_of(tmp_path / "log"))
    assert child.pid is not None and child.stopped() == []
    server = server_below(child).pid
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(lambda: supervisor.is_stopped(child.pid))
    assert child.poll() is None
    wait_for(lambda: not supervisor.is_stopped(child.pid))
    assert f"The supervisor of the polite, process {child.pid}, was stopped by someone" in caplog.text
    os.kill(server, signal.SIGSTOP)
    wait_for(lambda: child.stopped() != [])
    assert child.stopped() == [f"polite (pid {server})"]
    os.kill(child.pid, signal.SIGSTOP)
    child.stop()
    assert child.poll() == 128 + signal.SIGKILL, "SIGINT does not end what is stopped"
    assert not alive(server)


def test_what_is_stopped_below_a_supervisor_that_hangs_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped again and again; its server ignores SIGINT, and has stopped a child in another session."""
    monkeypatch.setattr(processes, "_GRACE_S", GRACE_S)
    monkeypatch.setattr(processes, "_END_S", 0.0)
    monkeypatch.setattr(ChildProcess, "_continue", lambda self: None)
    child = ChildProcess("stubborn", [sys.executable, "-c", STUBBORN], log_path=tmp_path / "log")
    wait_for(lambda: len(log_of(tmp_path / "log").split()) == 2)
    family = [int(pid) for pid in log_of(tmp_path / "log").split()]
    for pid in (family[1], child.pid):
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    child.stop()
    wait_for(lambda: not any(map(alive, family)))
    assert child.poll() is not None


def test_environment_can_be_added_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_GYM_TEST_GONE", "1")
    child = ChildProcess(
        "env",
        [
            sys.executable,
            "-c",
            "import os; print(os.environ.get('TRL_GYM_TEST_NEW'), os.environ.get('TRL_GYM_TEST_GONE'))",
        ],
        log_path=tmp_path / "log",
        env={"TRL_GYM_TEST_NEW": "yes", "TRL_GYM_TEST_GONE": None},
    )
    assert child.wait(60.0) == 0
    assert child.log_tail() == "yes None"
    child.stop()


def test_a_bound_port_is_taken_and_travels_to_the_child(tmp_path: Path) -> None:
    sock = bind_socket()
    port = sock.getsockname()[1]
    with pytest.raises(OSError):
        bind_socket(port=port)
    serve = f"import socket; s = socket.socket(fileno={sock.fileno()}); s.listen(); s.accept()[0].sendall(b'hello')"
    child = ChildProcess(
        "listener", [sys.executable, "-c", serve], log_path=tmp_path / "log", pass_fds=[sock.fileno()]
    )
    sock.close()

    def talk() -> bytes:
        import socket

        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                return connection.recv(16)
        except ConnectionRefusedError:
            return b""

    assert wait_for(talk) == b"hello"
    assert child.wait(60.0) == 0
    child.stop()


def test_a_child_that_nobody_refers_to_any_more_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`server = Server()` twice: the first one must not run on unseen."""
    monkeypatch.setattr(processes, "_GRACE_S", GRACE_S)
    child: ChildProcess | None = ChildProcess("stubborn", [sys.executable, "-c", STUBBORN], log_path=tmp_path / "log")
    pids = [int(pid) for pid in wait_for(lambda: log_of(tmp_path / "log")).split()]
    assert all(map(alive, pids))
    child = None
    wait_for(lambda: not any(map(alive, pids)))
    assert child is None


def test_stopping_closes_nobody_elses_descriptor(tmp_path: Path) -> None:
    """The number of our end of the pipe is another file's after the first `stop`."""
    child = ChildProcess("polite", [sys.executable, "-c", POLITE], log_path=tmp_path / "log")
    child.stop()
    with open(tmp_path / "other", "w") as first, open(tmp_path / "another", "w") as second:
        child.stop()
        del child
        for file in (first, second):
            file.write("still open")
            file.flush()


def test_children_may_open_as_many_files_as_the_hard_limit_allows(tmp_path: Path) -> None:
    report = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    owner = (
        "import resource, sys\nfrom pathlib import Path\nfrom trl_gym.processes import ChildProcess\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))\n"
        f"ChildProcess('child', [sys.executable, '-c', {report!r}], log_path=Path(sys.argv[1])).wait(300)\n"
    )
    subprocess.run([sys.executable, "-c", owner, str(tmp_path / "log")], check=True, timeout=400)
    assert (tmp_path / "log").read_text() == "512 512\n"
