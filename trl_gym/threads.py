"""How many threads each process of a run computes with on a CPU, and whose choice that is.

`choose_threads` has the rule. It is asked in three places: the trainer sets torch's threads, the policy server and
NeMo Gym get theirs in the environment (`server_environment`, `gym_environment`).

OMP_NUM_THREADS counts where the user has set it. `accelerate launch` and `torchrun` set it too, to 1 if it is not set,
and every child inherits that: a model of 100 million parameters leaves all cores but one idle then. By the variable
alone the two cannot be told apart; by the launcher they can, for it is our parent and the kernel keeps the environment
and the command that it was started with.

Threads that wait for each other must sleep (OMP_WAIT_POLICY=PASSIVE). By default they spin, and the processes of a run
share their cores: with one core taken by another process, an update on two threads cost 1.8 times the CPU time of one
on a single thread, and with sleeping threads 1.1 times (`benchmarks/threads.py` beside a busy loop). OpenMP reads the
variable when torch is imported, so the main script sets it (`wait_without_spinning`); a script of your own can do the
same.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

NUM_THREADS = "OMP_NUM_THREADS"
WAIT_POLICY = "OMP_WAIT_POLICY"
SMALL_BYTES = 16_000_000  # of weights
_LAUNCHED_BY = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by each of the launchers, always
_OPTIONS = ("--num_cpu_threads_per_process", "--num-cpu-threads-per-process")  # of `accelerate launch`


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads of the processes of one machine."""

    trainer: int  # of each rank
    policy_server: int | None  # of its engine, all replicas together; None where vLLM decides
    gym: int  # of every process of NeMo Gym
    wanted: int | None = None  # what the user has asked for

    def __str__(self) -> str:
        if self.wanted is not None:
            return f"{self.wanted} in every process ({NUM_THREADS})"
        server = "as vLLM decides" if self.policy_server is None else self.policy_server
        return f"trainer {self.trainer}, policy server {server}, NeMo Gym {self.gym}"


def num_that_run() -> int:
    """Return how many threads this process has, which decides whether a fork of it is safe.

    OpenBLAS ends its idle threads before a fork and starts them when it needs them, so one is forked before they are
    counted. Where there is no /proc, threads of Python count alone.
    """
    if not os.path.isdir("/proc/self/task"):
        return threading.active_count()
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/task"))


def choose_threads(
    cores: int, ranks: int, wanted: int | None = None, *, on_gpu: bool = False, weight_bytes: int | None = None
) -> Threads:
    """Share the cores of a machine. Pure.

    Trainer and engine take turns, so each gets all cores: the ranks of the trainer divide them, and so do the replicas
    of a data-parallel engine. torch splits no operation that is too small for it; vLLM's kernels split all, so a model
    below `SMALL_BYTES` is served with one thread (the small policy costs half the CPU time with it). Gym waits for
    the engine most of the time, and the libraries of its environments get one thread per process. An engine on a GPU
    computes nothing on the CPU: vLLM decides.

    Args:
        cores: Cores that this process may run on.
        wanted: OMP_NUM_THREADS, if the user has set it: it counts for all processes.
        on_gpu: Whether the engine is on a GPU.
        weight_bytes: Size of the model's weights; None if it is not known.
    """
    if wanted is not None:
        return Threads(wanted, wanted, wanted, wanted)
    is_small = weight_bytes is not None and weight_bytes < SMALL_BYTES
    server = None if on_gpu else 1 if is_small else cores
    return Threads(trainer=max(1, cores // max(1, ranks)), policy_server=server, gym=1)


def wanted_threads(
    environment: Mapping[str, str], launcher: Mapping[str, str] | None, command: Sequence[str] = ()
) -> int | None:
    """Return the user's own OMP_NUM_THREADS; None where there is none, or a launcher's. Pure.

    Args:
        launcher: The environment that its parent was started with; None where that cannot be read. A 1 is taken for
            a launcher's then, a larger number for the user's.
        command: The parent's command.
    """
    number = number_in(environment)
    if number is None:
        return None
    if not any(name in environment for name in _LAUNCHED_BY):
        return number
    if launcher is None:
        return number if number > 1 else None
    asked = NUM_THREADS in launcher or any(word.partition("=")[0] in _OPTIONS for word in command)
    return number if asked else None


def number_in(environment: Mapping[str, str]) -> int | None:
    """Return the number in OMP_NUM_THREADS, the first one of a list; None where there is none."""
    text = environment.get(NUM_THREADS, "").partition(",")[0].strip()
    return int(text) or None if text.isascii() and text.isdecimal() else None


def threads_here(model: object, *, on_gpu: bool = False) -> Threads:
    """Return the threads of the processes that this one belongs to, by its environment.

    Args:
        model: Model folder, or anything else whose size is not known.
        on_gpu: Whether the engine is on a GPU.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(given) if given.isdecimal() else 1
    return choose_threads(num_cores(), ranks, _wanted_here(), on_gpu=on_gpu, weight_bytes=_weight_bytes(model))


def num_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(model: object, *, on_gpu: bool) -> Threads:
    """Give this process, a rank of the trainer, its threads; one whose script has set torch's keeps those."""
    import torch

    threads = threads_here(model, on_gpu=on_gpu)
    if threads.wanted is None and torch.get_num_threads() == number_in(os.environ):
        torch.set_num_threads(threads.trainer)
    logger.info("threads: %s; this process computes with %d", threads, torch.get_num_threads())
    return threads


def server_environment() -> dict[str, str | None]:
    """Return what the policy server must not inherit: a launcher's OMP_NUM_THREADS."""
    return {NUM_THREADS: None} if _wanted_here() is None else {}


def gym_environment() -> dict[str, str]:
    """Return the variables of NeMo Gym's processes."""
    return {NUM_THREADS: "1"} if _wanted_here() is None else {}


def wait_without_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads of OpenMP sleep while they wait, unless the user has said otherwise. Before torch is imported."""
    environment.setdefault(WAIT_POLICY, "PASSIVE")


def _weight_bytes(model: object) -> int | None:
    folder = Path(model) if isinstance(model, str | Path) else None
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder is not None else []
    return sum(sizes) or None


def _wanted_here() -> int | None:
    parent = Path(f"/proc/{os.getppid()}")
    try:
        started_with = (parent / "environ").read_bytes().decode(errors="replace").split("\0")
        command = (parent / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # another system, or another user's process
        return wanted_threads(os.environ, None)
    return wanted_threads(os.environ, dict(one.partition("=")[::2] for one in started_with if one), command)
