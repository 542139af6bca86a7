"""Start policy servers by forking a process that has imported vLLM, which takes longer than all else in a start.

    with ForkServer() as forks:  # returns at once, and imports while the caller does
        server = PolicyServer(model, fork_server=forks).start()

    owner ──pipe──► supervisor ──► fork server ──fork──► supervisor ──fork──► policy server ──fork──► engine
      └──────────────socket──────────────┘                   ▲
      └───────────────────────────pipe───────────────────────┘

A forked server is what `python -m trl_gym.policy_server …` would be: it has the environment, folder, files, log,
session and supervisor of one that was executed, and its own exit status. `trl_gym.policy_server.engine.forking` is the
other side of the socket; where a fork would differ it executes the command, and says why in the server's log.

Whoever makes a fork server stops it, after the servers that were forked from it: it takes them with it. It ends with
its owner, however that ends. It has no name in the file system: its owner alone can reach it.

Forks are made on Linux only. Elsewhere, and without vLLM, no process is started, and every server is executed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_gym.processes import ChildProcess, Supervisor, execute

logger = logging.getLogger(__name__)

_PROCESS = "trl_gym.policy_server.engine.forking"
_NOTICED_S = 5.0
NUM_BYTES = 8  # of a length, a pid, and an exit status
_KILLED = 128 + signal.SIGKILL  # as supervisors say it


class ForkServer:
    """A process that has imported vLLM and forks policy servers, and whatever else `python -m` runs, on request.

    Args:
        env: Variables added to (or, when None, removed from) our environment, for what is read while importing, e.g.
            `{"CUDA_VISIBLE_DEVICES": "1"}`. A server whose environment differs in such a variable is not forked.
        preload: Modules to import; default: what an engine on this machine imports.
    """

    def __init__(self, *, env: Mapping[str, str | None] | None = None, preload: Sequence[str] = ()) -> None:
        self._env = dict(env or {})
        self._preload = list(preload)
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
                log_path=Path(os.devnull),  # what matters is in the logs of the servers
                env=self._env,
                pass_fds=[theirs.fileno()],
            )
        self._control = ours
        return self

    def stop(self) -> None:
        """End the process, and the servers that it forked. Idempotent."""
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

    def fork(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_fd: int,
        death_fd: int,
        grace_s: float,
        pass_fds: Sequence[int],
    ) -> Supervisor:
        """Start a supervisor and a server below it; return at once. A `trl_gym.processes.Start`.

        Where the process does not run the command is executed, with a warning if it was started.

        Args:
            command: `[python, "-m", MODULE, …]`. Descriptors in it follow `--listen-fd`.

        Raises:
            OSError: It could not be executed either.
        """
        options: dict[str, Any] = {"log_fd": log_fd, "death_fd": death_fd, "grace_s": grace_s, "pass_fds": pass_fds}
        if self._process is None or self._control is None:
            return execute(command, env=env, **options)
        request, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        told = {"command": list(command), "environment": dict(env), "folder": os.getcwd()}
        body = json.dumps({**told, "grace_s": grace_s, "pass_fds": list(pass_fds)}).encode()
        try:
            with theirs, self._sending:
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
            socket.send_fds(request, [len(body).to_bytes(NUM_BYTES, "big")], [log_fd, death_fd, *pass_fds])
            request.sendall(body)
        except ConnectionError:
            request.close()
            self._process.wait(_NOTICED_S)  # its supervisor is about to say how it ended
            logger.warning("The fork server %s: the policy server imports vLLM itself.", self._process.describe_end())
            return execute(command, env=env, **options)
        return Forked(request)


class Forked:
    """A supervisor that a fork server forked, or will fork. A `trl_gym.processes.Supervisor`.

    Args:
        request: Says its pid, and later its exit status; closed without it if the supervisor is killed.
    """

    def __init__(self, request: socket.socket) -> None:
        self._request = request
        self._pid: int | None = None
        self._status: int | None = None

    @property
    def pid(self) -> int | None:
        """Its pid; None while the fork server still imports."""
        self.poll()
        return self._pid

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs or is awaited."""
        while self._status is None and self._has_said_more(0.0):
            self._receive()
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._status is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._has_said_more(left):
                raise subprocess.TimeoutExpired("the supervisor of a forked server", timeout or 0.0)
            self._receive()
        return self._status

    def kill(self) -> None:
        """Kill it, if it exists; its server dies with it."""
        if self.poll() is None and self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)

    def _has_said_more(self, timeout_s: float | None) -> bool:
        poller = select.poll()
        poller.register(self._request, select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else 1000.0 * timeout_s))

    def _receive(self) -> None:
        try:
            number = int.from_bytes(received(self._request, NUM_BYTES), "big")
        except (EOFError, ConnectionError):  # it was killed, or the fork server was
            self._status = _KILLED
        else:
            if self._pid is None:
                self._pid = number
                return
            self._status = number
        self._request.close()


def received(connection: socket.socket, num_bytes: int) -> bytes:
    """Receive exactly so many bytes.

    Raises:
        EOFError: The other side closed the connection before.
    """
    data = b""
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise EOFError("the other side has ended")
        data += part
    return data
