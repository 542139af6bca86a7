"""What a person sees while rollouts are collected, and what they are told when that ends early."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trl_gym.commands.collect import Collected, InterruptedCollectionError, collect
from trl_gym.commands.options import CollectOptions
from trl_gym.errors import RolloutError, ServerError
from trl_gym.rollouts.collection import Progress as CollectionProgress
from trl_gym.rollouts.watch import CollectionStatus

_NUM_LINES = 10  # of progress, where output is piped


def run_collection(options: CollectOptions, console: Console, errors: Console) -> Collected | None:
    """Collect with progress shown; None when Ctrl-C ended it, upon which the user has been told how to go on.

    Args:
        options: What to do.
        console: For results.
        errors: For progress and notes.
    """
    say = speaker(errors)
    try:
        with shown_progress(errors) as progress:
            return collect(options, say=say, progress=progress)
    except InterruptedCollectionError as stopped:
        say(
            f"interrupted: {stopped.num_done} of {stopped.num_planned} rollouts are in {options.journal_dir}. The "
            "same command again runs the rest."
        )
        return None
    except (ServerError, RolloutError):
        if options.journal_dir.exists():
            say(f"what has ended is in {options.journal_dir}; the same command again runs the rest")
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def speaker(console: Console) -> Callable[[str], None]:
    """Prints sentences as they are."""
    return lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def shown_progress(console: Console) -> Iterator[CollectionProgress]:
    """How far a collection is: a bar in a terminal, else some lines (so in a notebook)."""
    if not console.is_terminal:
        yield _line_progress(speaker(console))
        return
    bar = Progress(
        TextColumn("[bold]rollouts"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=None, status="starting NeMo Gym")
        yield lambda status: bar.update(
            task, completed=status.num_done, total=status.num_total, status=str(status).partition(", ")[2]
        )


def _line_progress(say: Callable[[str], None]) -> CollectionProgress:
    """A line whenever another tenth has ended."""
    shown = 0

    def progress(status: CollectionStatus) -> None:
        nonlocal shown
        tenth = _NUM_LINES * status.num_done // max(status.num_total, 1)
        if tenth > shown:
            shown = tenth
            say(f"rollouts {status}")

    return progress
