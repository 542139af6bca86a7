"""Import vLLM, then fork a supervised server per request: the process behind `trl_gym.policy_server.fork_server`.

    python -m trl_gym.policy_server.engine.forking CONTROL_FD [MODULE …]

A fork has what was imported, and everything else that the process has by then, so it must have little. There is one
thread: a lock that another one holds would stay locked in the child. No device is in use: CUDA does not survive a
fork. What was read from the environment while importing must be what the server would read. Where one of these does
not hold, the server is executed, in the same supervised place, and its log says why.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from trl_gym import supervisor
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT
from trl_gym.policy_server.fork_server import NUM_BYTES
from trl_gym.threads import num_that_run

# Variables that vLLM, torch, the libraries below them or Python read while they are imported, or may.
_READ_BY_IMPORTS = (
    *("VLLM_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "ONEAPI_", "ZE_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "PROMETHEUS_", "RAY_", "PYTHON", "LD_", "XDG_", "TMP"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "HOME", "NO_COLOR", "FORCE_COLOR"),
)
# Those that are read when a server starts, whatever was imported; `entry.py` sees to the number of threads and to the
# level, which TRL sets in its process when it is imported there.
_READ_LATER = frozenset(
    {
        *("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_LOGGING_LEVEL"),
        "OMP_NUM_THREADS",
    }
)

_MAX_FDS = 64


@dataclass(frozen=True)
class Imported:
    """What a server that is forked inherits."""

    before: Mapping[str, str]  # the environment in which modules were imported
    after: Mapping[str, str]  # and what they made of it
    problem: str = ""  # why none can be forked

    def environment(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """Return what `wanted` is after the same imports."""
        changed = {name: value for name, value in self.after.items() if self.before.get(name) != value}
        return {**wanted, **{name: value for name, value in changed.items() if name not in wanted}}


def why_not_forked(command: Sequence[str], wanted: Mapping[str, str], imported: Imported) -> str:
    """Return why a server must be executed instead of forked; empty if a fork is the same.

    Args:
        wanted: Environment of the server.
        imported: What it would inherit.
    """
    if imported.problem:
        return imported.problem
    if list(command[:2]) != [sys.executable, "-m"] or len(command) < 3:
        return f"{command[0]} is not the Python of the fork server, or runs no module"
    there = {**DEFAULT_ENVIRONMENT, **wanted}
    names = sorted(
        name
        for name in imported.before.keys() | there.keys()
        if name.startswith(_READ_BY_IMPORTS) and name not in _READ_LATER
        if there.get(name) not in (imported.before.get(name), imported.after.get(name))  # torch sets some itself
    )
    return f"the environment differs in {', '.join(names)}, which may be read while importing" if names else ""


def import_all(names: Sequence[str]) -> Imported:
    """Import modules (default: vLLM's), and find out whether a fork is safe afterwards."""
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = dict(os.environ)
    gc.disable()  # modules leave hardly any garbage, and looking for it takes an eighth of the time
    try:
        for name in names:
            importlib.import_module(name)
        if not names:
            _import_vllm()
    except (Exception, SystemExit) as error:
        return Imported(before, before, f"importing failed: {error!r}")
    finally:
        gc.enable()
    gc.collect()
    gc.freeze()  # what is collected nowhere is copied nowhere, and never walked through again
    return Imported(before, dict(os.environ), _unsafe())


def _import_vllm() -> None:
    """Import what a server and its engine import until they sample."""
    from vllm.platforms import current_platform

    import trl_gym.policy_server.engine.entry
    import trl_gym.policy_server.engine.file_engine
    import trl_gym.policy_server.engine.worker
    import trl_gym.policy_server.middleware.app  # noqa: F401

    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker
    elif current_platform.is_cuda():
        import vllm.v1.worker.gpu_worker  # noqa: F401


def _unsafe() -> str:
    """Return what makes any fork unsafe; empty if nothing does."""
    try:
        if (count := num_that_run()) > 1:
            return f"importing started {count - 1} threads"
    except OSError as error:
        return f"a fork fails: {error}"
    torch = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_initialized() or torch.xpu.is_initialized()):
        return "importing initialized a device"
    return ""


def serve(control: socket.socket, imported: Imported) -> int:
    """Fork a supervisor per request until the owner closes the socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets supervisors that have ended
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return 0
        with socket.socket(fileno=fds[0]) as request:
            try:
                pid = os.fork()
            except OSError as error:  # too many processes, or too little memory, for this one
                with contextlib.suppress(OSError):
                    request.sendall((-(error.errno or 1)).to_bytes(NUM_BYTES, "big", signed=True))
                continue
            if pid == 0:
                control.close()
                supervise(request, imported)


def supervise(request: socket.socket, imported: Imported) -> NoReturn:
    """Be the supervisor of one server; tell the pid and, in the end, the server's exit status."""
    os.setsid()
    _set_title("trl-gym: supervisor of a forked server")
    _, (body, log, death, *passed), _, _ = socket.recv_fds(request, 1, _MAX_FDS)
    with open(body, "rb") as file:
        file.seek(0)  # where it was written
        told = json.load(file)
    if select.select([death], [], [], 0.0)[0]:
        os._exit(0)  # the owner gave up before this process had imported anything
    for stream in (1, 2):
        os.dup2(log, stream)
    for fd in (log, request.fileno(), death):
        os.set_inheritable(fd, False)
    numbers = dict(zip(map(str, told["pass_fds"]), map(str, passed), strict=True))
    command = with_numbers(told["command"], numbers)
    request.sendall(os.getpid().to_bytes(NUM_BYTES, "big"))

    def tell(status: int) -> None:
        with contextlib.suppress(OSError):  # nobody waits any more
            request.sendall(status.to_bytes(NUM_BYTES, "big"))

    scratch = told["scratch"]
    guarded_by = supervisor.guard(passed, tell, scratch=scratch)
    supervisor_pid = os.getpid()
    reason = why_not_forked(command, told["environment"], imported)

    def start() -> supervisor.Child:
        child: supervisor.Child
        if scratch:  # the owner has not made it: it may have gone since it asked
            os.mkdir(scratch, 0o700)
        if reason:
            sys.stderr.write(f"trl-gym: this server imports vLLM itself: {reason}\n")
            sys.stderr.flush()
            child = _executed(command, told, passed)
        elif (pid := os.fork()) != 0:
            child = Forked(pid)
        else:
            for fd in (log, death):
                os.close(fd)
            request.close()
            become(command[2:], imported.environment(told["environment"]), told["folder"])
        for fd in passed:
            os.close(fd)  # a port is free again when its server has ended
        return child

    try:
        status = supervisor.supervise(
            death, told["grace_s"], start, owner=told["owner"], guarded_by=guarded_by, scratch=scratch
        )
    except OSError as error:
        if os.getpid() != supervisor_pid:
            raise  # it is the server's own
        sys.stderr.write(f"error: this server cannot be started: {error}\n")
        sys.stderr.flush()
        status = 1
    os._exit(status)  # handlers of what was imported are the servers'


def with_numbers(command: Sequence[str], numbers: Mapping[str, str]) -> list[str]:
    """Return the command with the numbers that its descriptors have in this process."""
    pairs = zip(["", *command], command, strict=False)
    return [numbers[part] if before == "--listen-fd" else part for before, part in pairs]


def _executed(command: list[str], told: Mapping[str, Any], pass_fds: Sequence[int]) -> supervisor.Child:
    return subprocess.Popen(
        command,
        env=told["environment"],
        cwd=told["folder"],
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=supervisor.prepare_child,
    )


def become(arguments: Sequence[str], environment: Mapping[str, str], folder: str) -> NoReturn:
    """Be `python -m MODULE …`, in a process that has just been forked."""
    os.setsid()
    supervisor.prepare_child()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    if not sys.flags.safe_path:
        sys.path[0] = folder
    os.environ.clear()
    os.environ.update(environment)
    module, *rest = arguments
    sys.argv = [module, *rest]
    _set_title(f"{sys.executable} -m {' '.join(arguments)}")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def _set_title(title: str) -> None:
    """Set what `ps` shows, where vLLM's `setproctitle` is installed; it sets that of its engines with it."""
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(title)


class Forked:
    """A process that was forked here. A `trl_gym.supervisor.Child`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.01)
        return status


def main(argv: Sequence[str]) -> int:
    """Serve until the owner has gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is to be cleaned up, whatever is being imported
    _set_title("trl-gym: fork server")  # before the environment is changed: titles are written where it lay
    control_fd, *names = argv
    os.set_inheritable(int(control_fd), False)
    return serve(socket.socket(fileno=int(control_fd)), import_all(names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
