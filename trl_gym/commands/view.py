"""`trl-gym view`: a run as one HTML file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import ConfigError

if TYPE_CHECKING:
    from trl_gym.report.page import WrittenPage
    from trl_gym.report.source import RecordedRun

DESCRIPTION = (
    "Write one HTML file that shows a run from its journal: rewards per environment, steps, groups side by side, "
    "every rollout as conversation and token by token, times, failures. It needs no network and no server, and can be "
    "sent to others; what the rollouts say is in it. Works while the run goes on. With other runs behind the first, "
    "it also shows their curves and numbers beside that one's."
)
_DEFAULT_MAX = 10_000
_LARGE = 150 * 10**6  # bytes
_MAX_OTHERS = 4  # as many as there are colours
_WATCH_S = 10.0
_SHARE_WRITING = 0.1  # of the time of `--watch`: writing takes a core that the run may need


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `trl-gym view`."""
    parser.add_argument("folder", metavar="RUN", help="output folder of a training, or of `trl-gym rollout`")
    parser.add_argument(
        "others",
        metavar="OTHER",
        nargs="*",
        help=f"up to {_MAX_OTHERS} further runs, whose curves and last and best numbers stand beside those of RUN",
    )
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: RUN/view.html)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="write the file again while the run goes on, until Ctrl-C; an open page reads it again by itself, at the "
        "same address. Waits for the first rollout",
    )
    parser.add_argument(
        "--max-rollouts",
        type=int,
        default=_DEFAULT_MAX,
        metavar="N",
        help="keep so many rollouts, whole groups, the same ones every time; 0 for all (default: %(default)s). "
        "Curves, steps and failures are of all rollouts",
    )
    parser.add_argument("--no-tokens", action="store_true", help="leave token ids out: a page of about a third")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, or a model folder with one (default: the newest checkpoint's, else the one that the run "
        "saved when it began)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page; return exit status 0. Raises `ConfigError`: the run has nothing to show, or the page cannot be
    written."""
    if options.max_rollouts < 0:
        raise ConfigError(f"`--max-rollouts` is {options.max_rollouts}.", "Give a number of rollouts, or 0 for all.")
    if len(options.others) > _MAX_OTHERS:
        raise ConfigError(
            f"{len(options.others)} runs are named behind the first, and {_MAX_OTHERS} can be told apart.",
            "Leave some out.",
        )
    if options.watch:
        return watch(options, time.sleep)
    found, page = _write(options)
    if found.tokenizer is None and not options.no_tokens:
        _note("no tokenizer in the run's folder: tokens are shown as ids; name one with --tokenizer")
    if page.size > _LARGE:
        _note("a page of this size opens slowly: --no-tokens or a lower --max-rollouts make it smaller")
    _open(options, page)
    return 0


def watch(
    options: argparse.Namespace, pause: Callable[[float], None], clock: Callable[[], float] = time.monotonic
) -> int:
    """Write the page whenever the run has gone on, until Ctrl-C; return 0, or 130 where there was nothing to write.

    Args:
        pause: Waits so many seconds; raises KeyboardInterrupt at Ctrl-C.
        clock: Returns seconds; only differences count.

    Raises:
        ConfigError: As `run`; but lines of a journal that cannot be read, since they are damaged or being written, are
            told once and left out.
    """
    from trl_gym.report.page import NothingRecordedError, end_reload
    from trl_gym.report.source import changes

    folders = [options.folder, *options.others]
    seen: list[tuple[Any, ...] | None] = []
    seconds, page = _WATCH_S, None
    note_once = functools.cache(_note)
    try:
        while True:
            now = [changes(folder) for folder in folders]
            if None in now and not seen:
                _note(f"waiting for the first rollout in {folders[now.index(None)]}")
            elif None not in now and now != seen:
                started = clock()
                try:
                    _, written = _write(options, reload_s=seconds, on_damaged=note_once)
                except NothingRecordedError as error:  # its first line is being written
                    note_once(error.problem)
                else:
                    if page is None:
                        _note("the page reads its file again by itself; Ctrl-C ends that")
                        _open(options, written)
                    page = written
                seconds = max(_WATCH_S, (clock() - started) / _SHARE_WRITING)
            seen = now
            pause(seconds)
    except KeyboardInterrupt:
        if page is None:
            return 130
        _write(options, on_damaged=note_once)
        return 0
    finally:
        if page is not None:
            with contextlib.suppress(OSError):  # then the error that ends it says what cannot be written
                end_reload(page.path)


def _write(
    options: argparse.Namespace, reload_s: float = 0.0, on_damaged: Callable[[str], None] | None = None
) -> tuple[RecordedRun, WrittenPage]:
    from trl_gym.report.page import PageOptions, write_page
    from trl_gym.report.source import open_run

    found = open_run(options.folder, options.tokenizer)
    others = [open_run(other) for other in options.others]
    names = [found.name, *(other.name for other in others)]
    if len(set(names)) < len(names):
        others = [dataclasses.replace(other, name=str(other.folder)) for other in others]
    target = Path(options.output) if options.output else found.folder / "view.html"
    wanted = PageOptions(
        max_rollouts=options.max_rollouts or None,
        with_tokens=not options.no_tokens,
        reload_s=reload_s,
        on_damaged=on_damaged,
    )
    try:
        page = write_page(found, target, wanted, others)
    except OSError as error:
        raise ConfigError(
            f"{str(target)!r} cannot be written: {error.strerror or error}.", "Choose another file with `--output`."
        ) from error
    shown = f"{page.shown} rollouts" if page.shown == page.recorded else f"{page.shown} of {page.recorded} rollouts"
    sys.stdout.write(f"{page.path}: {shown}, {page.size / 1e6:.1f} MB\n")
    sys.stdout.flush()
    return found, page


def _open(options: argparse.Namespace, page: WrittenPage) -> None:
    if options.open and not webbrowser.open(page.path.resolve().as_uri()):
        _note("no browser could be opened")


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")
