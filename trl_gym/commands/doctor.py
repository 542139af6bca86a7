"""`trl-gym doctor`: examine everything that a run needs, before the run."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trl_gym.recipes import find

if TYPE_CHECKING:
    from trl_gym.doctor.outcome import Entry

DESCRIPTION = (
    "Examine everything that a training run needs, and list all that is missing or wrong, each with its remedy: "
    "versions, devices, options, NeMo Gym, data, model, policy server, weight sync, one rollout for each environment. "
    "Takes the options of `trl-gym train`, from a YAML and from the command line. Exit status 0: ready, all that the "
    "run needs was checked and nothing failed; 1: something failed; 3: nothing failed, and something that the run "
    "needs was not checked (always so with --quick)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the doctor's own flags; every other one is a training option and is left to TRL's parser."""
    parser.add_argument(
        "--config", type=find, metavar="YAML", help="options file of the run; options given here win over it"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object instead of lines")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="start no server: no weight sync, no rollouts; such a run is never called ready",
    )
    parser.add_argument(
        "--accelerate-config", type=find, metavar="YAML", help="file for `accelerate launch --config_file`"
    )


def run(options: argparse.Namespace) -> int:
    """Return the exit status: 0 ready, 1 something failed, 3 nothing failed and not everything was checked."""
    from rich.console import Console

    from trl_gym.doctor import outcome

    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    entries: list[outcome.Entry] = []
    with _quiet():
        for entry in _examine(options, console.is_terminal and not options.json):
            entries.append(entry)
            if not options.json:
                outcome.show(entry, console)
    if options.json:
        sys.stdout.write(json.dumps(outcome.as_json(entries), indent=1, ensure_ascii=False) + "\n")
    else:
        outcome.show_summary(entries, console)
    return outcome.verdict(entries)


def _examine(options: argparse.Namespace, tells: bool) -> Iterator[Entry]:
    """Run all checks, or say why they cannot be run."""
    from trl_gym.doctor import outcome

    try:
        from trl_gym.doctor import checks
        from trl_gym.doctor.context import Context
        from trl_gym.train import early_fork_server
    except (ImportError, RuntimeError) as error:
        yield from outcome.not_importable(error)
        return
    entries: list[Entry] = []
    argv = [*options.run_options, *(("--config", options.config) if options.config else ())]
    accelerate_config = Path(options.accelerate_config) if options.accelerate_config else None
    early = None if options.quick else early_fork_server(argv, os.environ)
    with (
        early or contextlib.nullcontext() as forks,
        Context(argv=argv, quick=options.quick, accelerate_config=accelerate_config, fork_server=forks) as context,
    ):
        for entry in checks.run_checks(checks.CHECKS, context, partial(_tell, to_terminal=tells)):
            entries.append(entry)
            yield entry
    if outcome.verdict(entries) is not outcome.Verdict.FAILED:
        context.forget()


def _tell(name: str, *, to_terminal: bool) -> None:
    """Show what is being examined, on a line that the finding overwrites."""
    if to_terminal:
        sys.stdout.write(f"\r\x1b[2K{name} …\r")
        sys.stdout.flush()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from talking between the findings; what matters of it is found by checks."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    ours = wanted.keys() - os.environ.keys()
    os.environ.update({name: wanted[name] for name in ours})
    silent = logging.NullHandler()  # without any handler, Python writes warnings to stderr
    logging.root.addHandler(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in ours:  # transformers shows no progress to later runs of this process otherwise
            os.environ.pop(name, None)
        logging.root.removeHandler(silent)
