"""Several processes, one outcome: what fails on one rank is raised on all of them, so that none waits for ever.

A rank that raises between two collectives leaves the others waiting in the next one until the launcher or a timeout
ends them. Around work that only one rank does, or that can fail on one rank alone, the ranks therefore tell each other
how it went.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trl_gym.errors import (
    ConfigError,
    GymServerError,
    PolicyServerError,
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
