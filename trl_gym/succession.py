"""One trainer per output folder: a notebook cell that is run again replaces the trainer that it made before.

Without this, `trainer = GymGRPOTrainer(…)` run a second time starts a second policy server while the first, still
named by `trainer`, holds the device. Two trainers that write to one folder are never meant.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)


class Replaceable(Protocol):
    """A trainer."""

    def close(self) -> None:
        """Stop what it started. Idempotent."""


# By resolved output folder. Weak: it keeps no trainer alive.
_newest: weakref.WeakValueDictionary[str, Replaceable] = weakref.WeakValueDictionary()


def succeed(output_dir: str | Path, trainer: Replaceable) -> None:
    """Close the trainer of this process that was made for the same folder before, and remember this one.

    Args:
        output_dir: The trainer's.
        trainer: The new one, before it starts anything.
    """
    key = str(Path(output_dir).resolve())
    previous = _newest.get(key)
    if previous is not None and previous is not trainer:
        logger.info("a new trainer for %s: the one before is closed", key)
        previous.close()
    _newest[key] = trainer
