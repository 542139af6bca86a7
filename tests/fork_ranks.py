"""Processes of their own for tests, forked from one that has imported the trainer: importing takes longest.

`run` calls a function in one, and `run_ranks` a module's `main` in several that share a gloo group. These end as
`torchrun` does: with 1 once a rank has failed, and the others are killed. For ranks that must not have imported the
trainer before, there is a command:

    python -m tests.fork_ranks NUM_RANKS MODULE [ARGUMENT …]        # each rank calls the module's `main(*arguments)`
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trl_gym.processes import Launch, Supervisor, bind_socket


def free_port() -> int:
    """Return a port that stays free until it is bound: it is none that the operating system gives to others."""
    for port in random.sample(range(20_001, 32_768), 20):
        with contextlib.suppress(OSError), bind_socket(port=port):
            return port
    raise OSError("none of 20 ports is free")


def forked(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a function in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    # In this order: `tests/test_package.py` looks at what each of the first two loads, and others have imported all.
    context.set_forkserver_preload(["trl_gym.config", "trl_gym.trainer", "pytest", "hypothesis"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def forked_into(files: list[Path], function: Callable[..., None], *args: Any) -> BaseProcess:
    """Do the same; what it prints to stdout and to stderr is in the two files."""
    return forked(_into, files, function, args)


# What IPython and `trl-gym train` set for themselves. No server is forked by a process that has imported without it.
OF_A_SHELL = ("FORCE_COLOR", "TOKENIZERS_PARALLELISM")


def use_forks(control: socket.socket) -> None:
    """Let the policy servers of this process be forked by the fork server of another one, which hears `control`."""
    from trl_gym.policy_server import fork_server, server

    forks: Any = fork_server.ForkServer()
    forks._process, forks._control = SimpleNamespace(continue_all=lambda: None), control  # the other one's own

    def fork(launch: Launch) -> Supervisor:
        env = {name: value for name, value in launch.env.items() if name not in OF_A_SHELL}
        return forks.fork(replace(launch, env=env))

    server.execute = fork_server.execute = fork  # type: ignore[attr-defined]
    fork_server.ForkServer.start = lambda self: self  # type: ignore[method-assign]


def run(function: Callable[..., None], *args: Any, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Call a function in a process of its own, and return what it printed. One that hangs is killed."""
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / name for name in ("stdout", "stderr")]
        process = forked_into(printed, function, *args)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = (path.read_text() if path.exists() else "" for path in printed)
    return subprocess.CompletedProcess([function.__name__], process.exitcode or 0, out, err)


def _into(files: list[Path], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    gc.freeze()
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    function(*args)


def run_ranks(num_ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Let ranks call the `main` of a module, each with one thread."""
    return run(_ranks, num_ranks, module, list(arguments))


def _ranks(num_ranks: int, module: str, arguments: list[str]) -> None:
    import torch

    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    sys.exit(main(num_ranks, module, arguments))


def run_rank(rank: int, num_ranks: int, port: int, module: str, arguments: list[str]) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    try:
        importlib.import_module(module).main(*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(num_ranks: int, module: str, arguments: list[str]) -> int:
    gc.disable()
    importlib.import_module(module)
    gc.freeze()  # no rank looks through what was imported, and so copies it
    gc.enable()
    port = free_port()
    running = set()
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            code = run_rank(rank, num_ranks, port, module, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        running.add(pid)
    failed = False
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status != 0 and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))  # without a last look through all of it
