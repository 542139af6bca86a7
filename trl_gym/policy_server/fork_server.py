"""Start policy servers by forking a process that has imported vLLM, which takes longer than all else in a start.

    with ForkServer() as forks:  # returns at once, and imports while the caller does
        server = PolicyServer(model, fork_server=forks).start()

    owner ──pipe──► supervisor ──► fork server ──fork──► supervisor ──fork──► policy server ──fork──► engine
      └──────────────socket──────────────┘                   ▲
      └───────────────────────────pipe───────────────────────┘

A forked server is what `python -m trl_gym.policy_server …` would be: it has the environment, folder, files, log,
session and supervisor of one that was executed, and its own exit status. `trl_gym.policy_server.engine.forking` is the
other side of the socket; where a fork would differ it executes the command, and says why in the server's log.

It and the servers that it forked end with their owner, however that ends. Servers do not end with the fork server:
it may be stopped, or killed for its memory, while they run. It has no name in the file system: its owner alone can
reach it.

Forks are made on Linux only. Elsewhere, and without vLLM, no process is started, and every server is executed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from trl_gym.processes import ChildProcess, Launch, Supervisor, execute

logger = logging.getLogger(__name__)

_PROCESS = "trl_gym.policy_server.engine.forking"
_NOTICED_S = 5.0
_WAKE_EVERY_S = 1.0
NUM_BYTES = 8  # of a pid, and of an exit status
_KILLED = 128 + signal.SIGKILL  # as supervisors say it


class ForkServer:
    """A process that has imported vLLM and forks policy servers, and whatever else `python -m` runs, on request.

    Args:
        env: Variables added to (or, when None, removed from) our environment, for what is read while importing, e.g.
            `{"CUDA_VISIBLE_DEVICES": "1"}`. A server whose environment differs in such a variable is not forked.
        preload: Modules to import; default: what an engine on this machine imports.
        log_path: File for what it writes while importing; default: none, since servers have logs of their own.
    """

    def __init__(
        self,
        *,
        env: Mapping[str, str | None] | None = None,
        preload: Sequence[str] = (),
        log_path: str | os.PathLike[str] = os.devnull,
    ) -> None:
        self._env = dict(env or {})
        self._preload = list(preload)
        self._log_path = Path(log_path)
        self._process: ChildProcess | None = None
        self._control: socket.socket | None = None
        self._sending = threading.Lock()

    def start(self) -> ForkServer:
        """Start the process; return at once, while it imports. Requests are taken before it is done."""
        if self._process is not None:
            return self
        if sys.platform != "linux" or (not self._preload and importlib.util.find_spec("vllm") is None):
            logger.info("There is no fork server: it needs Linux and vLLM. Every policy server imports vLLM itself.")
            return self
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = ChildProcess(
                "fork server",
                [sys.executable, "-m", _PROCESS, str(theirs.fileno()), *self._preload],
                log_path=self._log_path,
                env=self._env,
                pass_fds=[theirs.fileno()],
                adopts=False,
            )
        self._control = ours
        return self

    def stop(self) -> None:
        """End the process. Servers that it forked run on, and those that still wait for it fail. Idempotent."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.stop()
            self._process = None

    def __enter__(self) -> ForkServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Pid of its supervisor; None when it does not run."""
        return None if self._process is None else self._process.pid

    def fork(self, launch: Launch) -> Supervisor:
        """Start a supervisor and a server below it; return at once. A `trl_gym.processes.Start`.

        Where the process does not run the command is executed, with a warning if it was started.

        Args:
            launch: Its command is `[python, "-m", MODULE, …]`. Descriptors in it follow `--listen-fd`.

        Raises:
            OSError: It could not be executed either.
        """
        if self._process is None or self._control is None:
            return execute(launch)
        request, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        told = {
            "command": list(launch.command),
            "environment": dict(launch.env),
            "folder": os.getcwd(),
            "owner": os.getpid(),
            "grace_s": launch.grace_s,
            "pass_fds": list(launch.pass_fds),
            "scratch": launch.scratch,
        }
        try:
            # A file, since nobody receives while the fork server imports: a socket might not hold all of it.
            with theirs, open(os.memfd_create("request"), "w") as body:
                json.dump(told, body)
                body.flush()
                fds = [body.fileno(), launch.log_fd, launch.death_fd, *launch.pass_fds]
                socket.send_fds(request, [b"\0"], fds)
                with self._sending:
                    socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
        except ConnectionError:
            request.close()
            self._process.wait(_NOTICED_S)  # its supervisor is about to say how it ended
            logger.warning("The fork server %s: the policy server imports vLLM itself.", self._process.describe_end())
            return execute(launch)
        return Forked(request, open(os.dup(launch.log_fd), "ab", buffering=0), self._process.continue_all)


class Forked:
    """A supervisor that a fork server forked, or will fork. A `trl_gym.processes.Supervisor`, for any thread.

    Args:
        request: Says its pid, or a negative `errno`, and later its exit status; closed without it if the supervisor is
            killed, and without either if the fork server ended before.
        log: The server's, for saying why there is none.
        wake: Continues the fork server, if someone has stopped it: the request would wait for it in vain.
    """

    def __init__(self, request: socket.socket, log: BinaryIO | io.RawIOBase, wake: Callable[[], None]) -> None:
        self._request = request
        self._log = log
        self._wake, self._woken_at = wake, time.monotonic()
        self._said = b""
        self._reading = threading.Lock()
        self._pid: int | None = None
        self._status: int | None = None

    @property
    def pid(self) -> int | None:
        """Its pid; None while the fork server still imports."""
        self.poll()
        return self._pid

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs, is awaited, or another thread asks."""
        if self._status is None and self._reading.acquire(blocking=False):  # as `subprocess.Popen` does
            try:
                if self._status is None:
                    self._read()
            finally:
                self._reading.release()
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("the supervisor of a forked server", timeout or 0.0)
            time.sleep(0.01)
        return status

    def kill(self) -> None:
        """Kill it, if it exists; its server dies with it."""
        if self.poll() is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _read(self) -> None:
        """Take what has come; never wait."""
        ended = True
        try:
            while part := self._request.recv(2 * NUM_BYTES, socket.MSG_DONTWAIT):
                self._said += part
        except BlockingIOError:
            ended = False
        except ConnectionError:
            pass
        parts = [self._said[start : start + NUM_BYTES] for start in range(0, len(self._said), NUM_BYTES)]
        numbers = [int.from_bytes(part, "big", signed=True) for part in parts if len(part) == NUM_BYTES]
        if numbers and numbers[0] > 0:
            self._pid = numbers[0]
            self._log.close()
        elif not ended and time.monotonic() - self._woken_at > _WAKE_EVERY_S:
            self._wake()
            self._woken_at = time.monotonic()
        if len(numbers) < 2 and not ended:
            return
        if self._pid is None:
            with contextlib.suppress(OSError):  # the status counts, also on a full disk
                why = f"could not fork it: {os.strerror(-numbers[0])}" if numbers else "ended before it had forked it"
                self._log.write(f"error: the fork server {why}\n".encode())
            self._log.close()
        self._request.close()
        self._status = (numbers[1] if len(numbers) > 1 else _KILLED) if self._pid is not None else 1
