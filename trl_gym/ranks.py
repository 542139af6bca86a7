"""Several processes, one outcome: what fails on one rank is raised on all of them, so that none waits for ever.

A rank that raises between two collectives leaves the others waiting in the next one until the launcher or a timeout
ends them. Around work that only one rank does, or that can fail on one rank alone, the ranks therefore tell each other
how it went.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from trl_gym.errors import (
    ConfigError,
    GymServerError,
    PolicyServerError,
    RankLostError,
    RolloutError,
    ServerError,
    TrlGymError,
    WeightMismatchError,
    WeightSyncError,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

Gather = Callable[[list[Any]], list[Any]]
"""From a list on every rank to the list of all, by rank (accelerate's `gather_object`)."""

# Narrowest first: the class under which another rank raises it.
_KINDS: tuple[type[TrlGymError], ...] = (
    PolicyServerError,
    GymServerError,
    ServerError,
    WeightMismatchError,
    WeightSyncError,
    RolloutError,
    ConfigError,
    TrlGymError,
)


def agree(error: Exception | None, rank: int, gather: Gather) -> None:
    """Tell every rank how it went on this one. Every rank calls it in step.

    Args:
        error: What went wrong here; None when nothing did.
        rank: This rank.
        gather: Collective.

    Raises:
        Exception: `error` itself where there is one; elsewhere the first failing rank's, as the same kind of
            `TrlGymError`, with the rank in its message.
    """
    outcomes = gather([None if error is None else (rank, _kind(error), str(error) or repr(error))])
    if error is not None:
        raise error
    failed = [outcome for outcome in outcomes if outcome is not None]
    if failed:
        place, kind, text = failed[0]
        raise _KINDS[kind](f"rank {place}: {text}")


def on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do something on rank 0; every rank learns how it went, and goes on when it is done.

    Args:
        accelerator: The trainer's.
        work: Called on rank 0 only. Every rank calls `on_main` in step.

    Raises:
        Exception: See `agree`.
    """
    from accelerate.utils import gather_object

    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as caught:  # raised below, once the other ranks know
            error = caught
    agree(error, accelerator.process_index, gather_object)


def _kind(error: Exception) -> int:
    return next((place for place, kind in enumerate(_KINDS) if isinstance(error, kind)), len(_KINDS) - 1)


# --------------------------------------------------------------------------------------------------------------------
# When one of several training processes ends, the others say so before they end too.
#
# Two things can happen to them first. The launcher (`accelerate launch`, `torchrun`) notices within a tenth of a
# second
# and sends SIGTERM, which by itself ends a process without a word. Or a collective breaks, with a message about
# sockets.

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
    """While open, the loss of another rank is explained on this one. Does nothing for a single process.

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
    sigterm = _Sigterm(lambda: f"Rank {rank} of {num_ranks} was told to end (SIGTERM) {where()}. {_REASON}")
    try:
        yield
    except Exception as error:
        told = error
        if is_loss(error):
            told = RankLostError(
                f"Rank {rank} of {num_ranks} lost the connection to another rank {where()}: that process has ended, "
                f"or did not answer for `ddp_timeout` seconds. {_REASON}"
            )
        # When another rank has ended first, the launcher's SIGTERM comes before this one's traceback is out.
        words = f"Rank {rank} of {num_ranks} ends with {type(told).__name__}: {told}"
        sigterm.message = lambda: words
        if told is error:
            raise
        raise told from error
    except BaseException:
        sigterm.restore()
        raise
    else:
        sigterm.restore()


_REASON = (
    "When another rank failed, its error is above, and the launcher names it under 'Root Cause'. Finished rollouts "
    "are in the journal; go on with `resume_from_checkpoint`."
)


def is_loss(error: BaseException) -> bool:
    """Whether an error of torch says that another rank is gone or silent. Ours have their own words."""
    if isinstance(error, TrlGymError) or not isinstance(error, RuntimeError | OSError):
        return False
    return type(error).__name__ in _LOSSES or any(sign in str(error) for sign in _SIGNS)


class _Sigterm:
    """Says `message` on SIGTERM before that does what it does.

    A handler that somebody else has set (a cluster's, that of a notebook) is left alone.
    """

    def __init__(self, message: Callable[[], str]) -> None:
        self.message = message
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._speak)

    def restore(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._speak:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _speak(self, _signum: int, _frame: FrameType | None) -> None:
        # Not `print`: it may be the very thing that was interrupted, and a buffer cannot be entered twice.
        os.write(2, f"\n{self.message()}\n".encode())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
