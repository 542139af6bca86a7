"""`trl-gym doctor`: everything that a run needs, examined before the run."""

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

from trl_gym.doctor import inputs, live, options, static
from trl_gym.doctor.checks import Check

# --------------------------------------------------------------------------------------------------------------------
# Every check, in order, with what it needs. A check needs another one only where it cannot be made without it.

_FILE = "options file"

CHECKS = (
    Check("python", static.python),
    Check("versions", static.versions),
    Check(_FILE, options.options_file),
    Check("options", options.options, (_FILE,)),
    Check("vllm", static.vllm_version, (_FILE,)),
    Check("processes", options.processes, (_FILE,)),
    Check("devices", static.devices),
    Check("ports", static.ports, (_FILE,)),
    Check("gym interpreter", live.interpreter, (_FILE,)),
    Check("gym configs", live.configs, (_FILE, "gym interpreter")),
    Check("gym head server", live.head_server, (_FILE,)),
    Check("data script", inputs.data_script, (_FILE,)),
    Check("dataset rows", inputs.rows, (_FILE,)),
    Check("agents", inputs.agents, (_FILE,)),
    Check("model", inputs.model, (_FILE,)),
    Check("tokenizer", inputs.tokenizer, (_FILE, "model")),
    Check("chat template", inputs.chat_template, (_FILE, "tokenizer")),
    Check("context", inputs.context, (_FILE, "tokenizer")),
    Check("memory", static.memory_plan, (_FILE, "model")),
    Check("shared memory", static.shared_memory, (_FILE, "model")),
    Check("vllm flags", live.flags, (_FILE, "model")),
    Check("remote server", live.remote, (_FILE,)),
    Check("folders", static.folders, (_FILE,)),
    Check("space", static.space, (_FILE, "model")),
    Check("reporting", static.reporting, (_FILE,)),
    Check("leftovers", static.leftovers, (_FILE,)),
    Check("policy server", live.policy_server, ("options", "model", "tokenizer", "vllm flags", "remote server")),
    Check("gym servers", live.gym_servers, ("options", "gym configs", "gym head server")),
    Check("token continuation", live.continuation, ("policy server", "gym servers")),
    Check("weight sync", live.weight_sync, ("token continuation",)),
    Check("rollouts", live.rollouts, ("token continuation", "agents")),
)

DESCRIPTION = (
    "Examine everything that a training run needs, and list all that is missing or wrong, each with its remedy: "
    "versions, devices, options, NeMo Gym, data, model, policy server, weight sync, one rollout for each environment. "
    "Takes the options of recipes/grpo.py, from a YAML and from the command line. Exit status 0 when nothing failed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `trl-gym doctor` takes; every other option is the training script's and is left to TRL's parser."""
    parser.add_argument("--config", metavar="YAML", help="options file of the run; options given here win over it")
    parser.add_argument("--json", action="store_true", help="write one JSON object instead of lines")
    parser.add_argument("--quick", action="store_true", help="start no server: no weight sync, no rollouts")
    parser.add_argument("--accelerate-config", metavar="YAML", help="of `accelerate launch --config_file`")


def run(options: argparse.Namespace) -> int:
    """Exit status 0 when nothing failed, else 1."""
    from rich.console import Console

    from trl_gym.doctor.checks import Entry, as_json, passed, run_checks, show, summary
    from trl_gym.doctor.context import Subject

    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    entries: list[Entry] = []
    argv = [*options.run_options, *(("--config", options.config) if options.config else ())]
    accelerate_config = Path(options.accelerate_config) if options.accelerate_config else None
    with _quiet(), Subject(argv=argv, quick=options.quick, accelerate_config=accelerate_config) as subject:
        for entry in run_checks(CHECKS, subject, partial(_tell, to_terminal=console.is_terminal and not options.json)):
            entries.append(entry)
            if not options.json:
                show(entry, console)
    if passed(entries):
        subject.forget()
    if options.json:
        sys.stdout.write(json.dumps(as_json(entries), indent=1, ensure_ascii=False) + "\n")
    else:
        console.print(summary(entries))
    return 0 if passed(entries) else 1


def _tell(name: str, *, to_terminal: bool) -> None:
    """What is being examined, on a line that the finding overwrites."""
    if to_terminal:
        sys.stdout.write(f"\r\x1b[2K{name} …\r")
        sys.stdout.flush()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries do not talk between the findings; what matters of it is found by checks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    silent = logging.NullHandler()  # without any handler, Python writes warnings to stderr
    logging.root.addHandler(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.removeHandler(silent)
