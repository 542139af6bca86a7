"""Processes, states and addresses of the two kinds of servers: the policy server and NeMo Gym.

`ChildProcess` is a process that is always cleaned up and that can explain its death.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from trl_gym.supervisor import KILL_S, POLL_S, REAP_S, descendants, is_stopped, let_go_on, remove

logger = logging.getLogger(__name__)

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_GRACE_S = 5.0  # from SIGINT to SIGKILL; "Ctrl-C ends all within 10 s" leaves room for both servers
_END_S = POLL_S + KILL_S + REAP_S + 5.0  # what a supervisor may take besides, and something for a busy machine


class ServerState(StrEnum):
    """State of a policy server or of a NeMo Gym."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


# Children whose owner forgot them are stopped at interpreter exit. Weak, so that it keeps none alive. A trainer that
# is killed with SIGKILL does not get here; the supervisor's pipe covers that.
_running: weakref.WeakSet[ChildProcess] = weakref.WeakSet()


def bind_socket(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Bind a TCP socket and listen: from here on no other process can take the port, and early callers queue.

    Listening is part of it: with `SO_REUSEADDR`, which a restart on the same port needs, Linux lets a second process
    bind a port that is bound but not listening.

    Args:
        host: Address to bind.
        port: Port, or 0 to let the operating system choose a free one.

    Raises:
        OSError: The port is taken, or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        # Accepted sockets inherit it. asyncio sets it only on sockets made with an explicit protocol number; without
        # it the body of each answer waits 40 ms for the client to acknowledge the headers.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    return sock


def reachable(host: str) -> str:
    """Return the host in a URL at which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class Supervisor(Protocol):
    """The processes between us and a server, see `trl_gym.supervisor`, by the upper one. `subprocess.Popen` is one."""

    @property
    def pid(self) -> int | None: ...  # None until it exists
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is started: a supervisor and the server below it."""

    command: Sequence[str]  # of the server
    env: Mapping[str, str]  # the whole environment
    log_fd: int  # where output goes
    death_fd: int  # read end of the pipe that the supervisor watches
    grace_s: float  # from SIGINT to SIGKILL
    pass_fds: Sequence[int]  # for the server
    adopts: bool = True  # as for `supervisor.supervise`
    scratch: str = ""  # likewise; made by who starts them


Start = Callable[[Launch], Supervisor]
"""Starts both. Raises `OSError` if they cannot be started."""


def execute(launch: Launch) -> Supervisor:
    """Run the command, below a supervisor that is a program too. A `Start`."""
    told = [str(launch.death_fd), str(launch.grace_s), str(int(launch.adopts)), launch.scratch]
    if launch.scratch:
        os.makedirs(launch.scratch, 0o700, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SUPERVISOR), *told, *map(str, launch.pass_fds), "--", *launch.command],
        stdin=subprocess.DEVNULL,
        stdout=launch.log_fd,
        stderr=subprocess.STDOUT,
        env=launch.env,
        pass_fds=[launch.death_fd, *launch.pass_fds],
        # A session of its own: Ctrl-C in the terminal reaches us, and we stop the children in order.
        start_new_session=True,
    )


class ChildProcess:
    """One server process in a session of its own, with its output in a log file.

    Args:
        name: Its name in messages, e.g. `"policy server"`.
        command: Program and arguments.
        log_path: File that receives stdout and stderr (truncated at start; parent folders are made).
        env: Variables added to (or, when `None`, removed from) our own environment.
        pass_fds: File descriptors that the process inherits, e.g. a socket that was bound for it.
        start: Starts it: as a program, or from a process that has imported what it needs (`ForkServer.fork`).
        adopts: Whether all that it starts ends with it, as for `supervisor.supervise`.
        scratch: Folder of its own, made for it (mode 0700) if there is none, and removed when it has ended, whoever
            ends it or us.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | os.PathLike[str]],
        *,
        log_path: Path,
        env: Mapping[str, str | None] | None = None,
        pass_fds: Sequence[int] = (),
        start: Start = execute,
        adopts: bool = True,
        scratch: Path | None = None,
    ) -> None:
        self.name = name
        self.scratch = scratch
        self._adopts = adopts
        self.log_path = Path(log_path)
        self._started_at = time.monotonic()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        death_read, death_write = os.pipe()
        try:
            with open(self.log_path, "wb") as log:
                launch = Launch(
                    command=[os.fspath(part) for part in command],
                    env={key: value for key, value in {**os.environ, **(env or {})}.items() if value is not None},
                    log_fd=log.fileno(),
                    death_fd=death_read,
                    grace_s=_GRACE_S,
                    pass_fds=pass_fds,
                    adopts=adopts,
                    scratch=str(scratch or ""),
                )
                self._supervisor = start(launch)
        except BaseException:
            os.close(death_write)
            remove(str(scratch or ""))
            raise
        finally:
            os.close(death_read)
        _running.add(self)
        self._death_pipe = os.fdopen(death_write, "wb", buffering=0)  # a file closes its descriptor once
        # A server without references ends too: a notebook cell with `policy = PolicyServer(…)` may be run again. At
        # interpreter exit finalizers do nothing any more when `_stop_forgotten_children` runs.
        weakref.finalize(self, self._death_pipe.close).atexit = False

    @property
    def pid(self) -> int | None:
        """Pid of the guard, above supervisor and server. None while a fork server has not forked it yet."""
        return self._supervisor.pid

    def poll(self) -> int | None:
        """Return the exit code, or `None` while it runs. A supervisor that someone has stopped is continued: it would
        neither notice the end of the server, nor end it."""
        code = self._supervisor.poll()
        if code is None and (pid := self.pid) is not None:
            _continue_stopped(pid, f"supervisor of the {self.name}")
        return code

    def continue_all(self) -> None:
        """Continue the supervisor and the process below it, if someone has stopped them."""
        if self.poll() is None and (pid := self.pid) is not None:
            for server in filter(_leads_a_session, descendants(pid)[:1]):
                _continue_stopped(server, self.name)

    def stopped(self) -> list[str]:
        """Return those processes of the server that someone has stopped: `"policy server (pid 7)"` itself, and those
        below it by the names that they have given themselves, e.g. `"VLLM::EngineCor (pid 8)"`."""
        family = [] if (pid := self.pid) is None else descendants(pid)
        server = next(filter(_leads_a_session, family), None)  # a supervisor does not
        names = {one: self.name if one == server else _name_of(one) for one in family if is_stopped(one)}
        return [f"{name} (pid {one})" for one, name in names.items()]

    def log_tail(self) -> str:
        """Return the last lines of the log, for error messages."""
        with contextlib.suppress(OSError), open(self.log_path, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 64 * 1024))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-15:])
        return ""

    def describe_end(self) -> str:
        """Return e.g. `"ended within 12 s of its start (exit code 1)"`; the time is that of this call."""
        code = self.poll()
        how = f"exit code {code}"
        if code is not None and code - 128 in {number.value for number in signal.Signals}:
            how = f"signal {signal.Signals(code - 128).name}"
        return f"ended within {time.monotonic() - self._started_at:.3g} s of its start ({how})"

    def describe_death(self) -> str:
        """Return what `describe_end` says, the last log lines and the log path."""
        return (
            f"{self.name} {self.describe_end()}. Last lines of its log:\n\n"
            f"{textwrap.indent(self.log_tail(), '    ')}\n\nThe whole log: {self.log_path}"
        )

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the process to end; `None` when it still runs after `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._supervisor.wait(timeout=timeout_s)
        return None

    def stop(self) -> None:
        """Send SIGINT, and SIGKILL to all that is left a few seconds later. Idempotent; safe in `atexit`."""
        self._death_pipe.close()
        # One that does not exist yet finds the pipe closed and starts nothing.
        if (pid := self._supervisor.pid) is not None:
            self._continue()
            if self.wait(_GRACE_S + _END_S) is None:  # it hangs, and what is below it may be stopped
                if self._adopts:
                    _kill_below(pid)
                self._supervisor.kill()
                self._supervisor.wait()
        remove(str(self.scratch or ""))  # where both were killed that do it
        _running.discard(self)

    def _continue(self) -> None:
        """Let the supervisor go on, if someone has stopped it."""
        if self._supervisor.poll() is None:
            let_go_on(self.pid)


def _continue_stopped(pid: int, name: str) -> None:
    if is_stopped(pid):
        logger.warning("The %s, process %d, was stopped by someone. It is continued.", name, pid)
        let_go_on(pid)


def _kill_below(pid: int) -> None:
    """SIGKILL what is below a supervisor that does not do so, which still adopts what loses its parent."""
    deadline = time.monotonic() + KILL_S
    while (family := descendants(pid)) and time.monotonic() < deadline:
        for one in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.05)


def _leads_a_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _name_of(pid: int) -> str:
    """Return the name that a process has given itself, at most 15 characters of it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "a process"


def wait_until(deadline: float) -> bool:
    """Sleep a little; return False once `time.monotonic()` has passed `deadline`. For readiness loops."""
    if time.monotonic() >= deadline:
        return False
    time.sleep(0.1)
    return True


def stop_all(children: Sequence[ChildProcess]) -> None:
    """Stop several processes, side by side. Idempotent."""
    for child in children:
        child._death_pipe.close()  # all of them first, so that their grace periods overlap
        child._continue()
    for child in children:
        child.stop()


@atexit.register
def _stop_forgotten_children() -> None:
    stop_all(list(_running))
