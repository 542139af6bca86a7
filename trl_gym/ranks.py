"""Make several training processes end alike: what fails on one rank is raised on all of them.

A rank that raises between two collectives leaves the others waiting in the next one until the launcher or a timeout
ends them. Around work that only one rank does (`on_main`), or that can fail on one rank alone (`agreed`, `on_all`),
the ranks therefore tell each other how it went, whatever the type of the error.

When a process ends all the same, the launcher (`accelerate launch`, `torchrun`) sends SIGTERM to the others within a
tenth of a second, or their next collective breaks with a message about sockets; `explained` says what happened. When
the launcher itself is told to end, it may end alone (`accelerate launch` of one process); `end_with_launcher` sees to
that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from trl_gym import errors
from trl_gym.errors import PolicyServerLostError, RankLostError, ServerLoss, TrlGymError
from trl_gym.supervisor import PR_SET_PDEATHSIG, prctl

T = TypeVar("T")
Gather = Callable[[list[Any]], list[Any]]
"""From a list on every rank to the list of all, by rank (accelerate's `gather_object`)."""


class Process(Protocol):
    """One of the training processes: accelerate's `Accelerator` or `PartialState`."""

    @property
    def process_index(self) -> int: ...


def agree(error: Exception | None, rank: int, gather: Gather, value: Any = None) -> list[Any]:
    """Tell every rank how it went on this one. Every rank calls it in step.

    Args:
        error: What went wrong here; None when nothing did.
        rank: This rank.
        gather: Collective.
        value: Told to the other ranks too; can be pickled.

    Returns:
        The ranks' values, by rank.

    Raises:
        Exception: `error` itself where there is one; elsewhere the first failing rank's, as the same kind of
            `TrlGymError` with its problem and remedy, and with the rank in its message.
    """
    outcomes = gather([(None if error is None else _as_told(error, rank), value)])
    if error is not None:
        raise error
    failed = [failure for failure, _ in outcomes if failure is not None]
    if failed:
        raise failed[0]
    return [value for _, value in outcomes]


@contextlib.contextmanager
def agreed(process: Process, gather: Gather | None = None) -> Iterator[None]:
    """Raise on every rank what the body raises on one. Every rank enters it in step; the body takes part in no
    collective that other ranks might not reach. Raises as `agree` does; `gather` is accelerate's unless given, here as
    below.
    """
    error = None
    try:
        yield
    except Exception as caught:  # raised by `agree`, once the other ranks know
        error = caught
    agree(error, process.process_index, gather or _gather)


def on_all(process: Process, work: Callable[[], T], gather: Gather | None = None) -> T:
    """Call `work` on every rank, and return this rank's result once it has succeeded on all. See `agreed`."""
    with agreed(process, gather):
        return work()


def on_main(process: Process, work: Callable[[], T], gather: Gather | None = None) -> T:
    """Call `work` on rank 0, and return what it returns on every rank. Every rank calls it in step.

    Args:
        work: Called on rank 0 only; its result can be pickled.

    Raises:
        Exception: See `agree`.
    """
    rank, result, error = process.process_index, None, None
    if rank == 0:
        try:
            result = work()
        except Exception as caught:  # raised by `agree`, once the other ranks know
            error = caught
    return agree(error, rank, gather or _gather, result)[0]


def agree_on_loss(process: Process, error: Exception | None, gather: Gather | None = None) -> ServerLoss | None:
    """Tell every rank whether this one has lost a server. Every rank calls it in step.

    Args:
        error: What ended this rank's rollouts; None when nothing did.

    Returns:
        The loss from which all ranks recover next: of the policy server, where one has lost that, else of NeMo Gym.
        This rank's own, or another's; None when no rank has lost one.

    Raises:
        Exception: On all ranks, when something else went wrong on one of them; see `agree`.
    """
    loss = error if isinstance(error, ServerLoss) else None
    told = None if loss is None else type(loss)(loss.problem, loss.remedy, loss.problems)
    if isinstance(loss, PolicyServerLostError) and isinstance(told, PolicyServerLostError):
        told.silent_s = loss.silent_s
    others = agree(None if loss is not None else error, process.process_index, gather or _gather, told)
    losses = [one for one in (loss, *others) if one is not None]
    return min(losses, key=lambda one: not isinstance(one, PolicyServerLostError), default=None)


def _as_told(error: Exception, rank: int) -> TrlGymError:
    """Return the error that the other ranks raise: texts only, for `error` may hold what cannot be pickled."""
    if not isinstance(error, TrlGymError):
        return TrlGymError(": ".join(filter(None, [f"rank {rank}", type(error).__name__, str(error)])))
    # Subclasses that are defined elsewhere take other arguments.
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return kind(f"rank {rank}: {error.problem}", error.remedy, error.problems)


def _gather(items: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object(items)


_LOSSES = ("DistBackendError", "DistNetworkError")  # of torch.distributed, by name: nothing here imports torch
# What gloo, NCCL and torch's store say when the other side of a collective is gone, or did not come in time.
_SIGNS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
    "NCCL error",
    "remote process has exited",
    "wait timeout after",
    "Timed out waiting",
    "Broken pipe",
)


@contextlib.contextmanager
def explained(rank: int, num_ranks: int, where: Callable[[], str]) -> Iterator[None]:
    """Explain, while open, the loss of another rank on this one. Does nothing for a single process.

    Args:
        rank: This process.
        num_ranks: How many there are.
        where: What this process is doing, e.g. `"in step 12"`.

    Raises:
        RankLostError: A collective broke because another rank ended or hangs.
    """
    if num_ranks == 1:
        yield
        return
    sigterm = _Sigterm(lambda: f"Rank {rank} of {num_ranks} was told to end (SIGTERM) {where()}. {_REMEDY}")
    try:
        yield
    except Exception as error:
        told = error
        if is_loss(error):
            told = RankLostError(
                f"Rank {rank} of {num_ranks} lost the connection to another rank {where()}: that process has ended, "
                "or did not answer for `ddp_timeout` seconds.",
                _REMEDY,
            )
        # When another rank has ended first, the launcher's SIGTERM comes before this one's traceback is out.
        message = f"Rank {rank} of {num_ranks} ends with {type(told).__name__}: {told}"
        sigterm.message = lambda: message
        if told is error:
            raise
        raise told from error
    except BaseException:
        sigterm.restore()
        raise
    else:
        sigterm.restore()


_REMEDY = (
    "Read the error of the rank that failed first (above; the launcher names it under 'Root Cause'), and continue "
    "with `resume_from_checkpoint`: finished rollouts are in the journal."
)


def is_loss(error: BaseException) -> bool:
    """Return whether an error of torch (a `RuntimeError`) says that another rank is gone or silent. A broken
    connection to a server raises other types, and our own errors say what they mean."""
    if isinstance(error, TrlGymError) or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ in _LOSSES or any(sign in str(error) for sign in _SIGNS)


class _Sigterm:
    """Write `message` on SIGTERM, then let the signal end the process.

    A handler that was set by other code (a cluster's, a notebook's) stays.
    """

    def __init__(self, message: Callable[[], str]) -> None:
        self.message = message
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._tell)

    def restore(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._tell:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _tell(self, _signum: int, _frame: FrameType | None) -> None:
        # Not `print`: it may be the very thing that was interrupted, and a buffer cannot be entered twice.
        os.write(2, f"\n{self.message()}\n".encode())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


# Programs, and modules that `python -m` runs, which start training processes and wait for them.
_LAUNCHERS = frozenset(
    {
        *("accelerate", "accelerate-launch", "torchrun", "deepspeed"),
        *("accelerate.commands.launch", "accelerate.commands.accelerate_cli", "deepspeed.launcher.launch"),
        *("torch.distributed.run", "torch.distributed.launch"),
    }
)
_WORDS = 4  # of a command line, in which the launcher's name stands: `python -u -m torch.distributed.run`


def end_with_launcher() -> None:
    """Get SIGTERM from now on when the launcher of this process ends, in whatever way. Linux only; does nothing for a
    process that no launcher started. Idempotent.

    Ctrl-C reaches both, and the launcher may end first: from then on this process ends by itself, with what it does at
    its end.
    """
    launcher = os.getppid()
    try:
        words = Path(f"/proc/{launcher}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no /proc, or it has just ended: then nobody knows what it was
        return
    if sys.platform == "linux" and is_launcher(words):
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _outlive_launcher)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)


def _outlive_launcher(signum: int, frame: FrameType | None) -> None:
    prctl(PR_SET_PDEATHSIG, 0)
    signal.default_int_handler(signum, frame)


def is_launcher(command: Sequence[str]) -> bool:
    """Return whether a command line is that of a launcher of training processes."""
    return any(word in _LAUNCHERS or os.path.basename(word) in _LAUNCHERS for word in command[:_WORDS])
