"""`trl-gym view`: a run as one HTML file."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

from trl_gym.errors import ConfigError

DESCRIPTION = (
    "Write one HTML file that shows a run from its journal: rewards per environment, steps, groups side by side, "
    "every rollout as conversation and token by token, times, failures. It needs no network and no server, and can be "
    "sent to others; what the rollouts say is in it. Works while the run goes on."
)
_DEFAULT_MAX = 10_000
_LARGE = 150 * 10**6  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `trl-gym view`."""
    parser.add_argument("folder", metavar="RUN", help="output folder of a training, or of `trl-gym rollout`")
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: RUN/view.html)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
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
        help="tokenizer.json, or a model folder with one (default: the newest checkpoint's)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page; return exit status 0.

    Raises:
        ConfigError: The run has nothing to show, or the page cannot be written.
    """
    from trl_gym.report.page import PageOptions, write_page
    from trl_gym.report.source import open_run

    if options.max_rollouts < 0:
        raise ConfigError(f"`--max-rollouts` is {options.max_rollouts}.", "Give a number of rollouts, or 0 for all.")
    found = open_run(options.folder, options.tokenizer)
    target = Path(options.output) if options.output else found.folder / "view.html"
    wanted = PageOptions(max_rollouts=options.max_rollouts or None, with_tokens=not options.no_tokens)
    try:
        page = write_page(found, target, wanted)
    except OSError as error:
        raise ConfigError(
            f"{str(target)!r} cannot be written: {error.strerror or error}.", "Choose another file with `--output`."
        ) from error
    shown = f"{page.shown} rollouts" if page.shown == page.recorded else f"{page.shown} of {page.recorded} rollouts"
    sys.stdout.write(f"{page.path}: {shown}, {page.size / 1e6:.1f} MB\n")
    if found.tokenizer is None and wanted.with_tokens:
        _note("no tokenizer in the run (no checkpoint yet): tokens are shown as ids; name one with --tokenizer")
    if page.size > _LARGE:
        _note("a page of this size opens slowly: --no-tokens or a lower --max-rollouts make it smaller")
    if options.open and not webbrowser.open(page.path.resolve().as_uri()):
        _note("no browser could be opened")
    return 0


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")
