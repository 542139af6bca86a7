"""Options as `recipes/grpo.py` reads them, with TRL's parser, but with every mistake and not only the first."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from trl_gym.config import GymGRPOConfig
from trl_gym.doctor.checks import Finding, failed, split_remedy
from trl_gym.errors import ConfigError

_ARGUMENT = re.compile(r"argument (?:-\w, )?--(\w+)")
_MAX_MISTAKES = 50


@dataclass
class ScriptOptions:
    """The options of `recipes/grpo.py` itself; a test compares the two."""

    train_files: list[str] = field(default_factory=list)
    eval_files: list[str] = field(default_factory=list)
    data_script: str | None = None
    train_weights: list[float] | None = None
    agent: str | None = None
    resume: bool = False
    small_policy_dir: str = "runs/small_policy"
    small_policy_learning_rate: float = 1e-3


@dataclass
class InspectedConfig(GymGRPOConfig):
    """`GymGRPOConfig` that keeps what is wrong with it instead of raising."""

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        try:
            super().__post_init__()
        except ConfigError as error:
            self.problems = str(error).split("\n  - ")[1:]
        except Exception as error:  # of TRL's and transformers' own checks, which need devices and packages
            self.problems = [f"{type(error).__name__}: {error}"]


@dataclass(frozen=True, slots=True)
class Parsed:
    """Options, and what could not be read of them.

    Attributes:
        script: Of the script.
        args: Of the trainer.
        model: TRL's.
        findings: Options that are unknown or of a wrong type; they are left out of the others.
    """

    script: ScriptOptions
    args: InspectedConfig
    model: ModelConfig
    findings: list[Finding]


class _ArgumentError(Exception):
    pass


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise _ArgumentError(message)


def parse(argv: Sequence[str]) -> Parsed:
    """Read options.

    Args:
        argv: As for the script; `--config FILE` names a YAML whose `env` is set, as TRL does.

    Raises:
        ConfigError: The file cannot be read, or nothing can be made of the options.
    """
    words = _split_equals(argv)
    given = _read_file(words)
    for name, value in (given.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    findings: list[Finding] = []
    for _ in range(_MAX_MISTAKES):
        parser = _Parser((ScriptOptions, InspectedConfig, ModelConfig), add_help=False, allow_abbrev=False)
        unknown = parser.set_defaults_with_config(**given)[::2]
        try:
            script, args, model, rest = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
        except _ArgumentError as error:
            findings.append(_left_out(str(error), words, given))
            continue
        unknown += [word for word in rest if word.startswith("--")]
        return Parsed(script, args, model, [*findings, *(_unknown(name) for name in unknown)])
    raise _unreadable(f"more than {_MAX_MISTAKES} of them are of a wrong type")


def _split_equals(argv: Sequence[str]) -> list[str]:
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]


def _read_file(words: list[str]) -> dict[str, Any]:
    """Takes `--config FILE` out of the words."""
    if "--config" not in words:
        return {}
    index = words.index("--config")
    if index + 1 == len(words):
        raise _unreadable("`--config` names no file")
    path = Path(words[index + 1])
    del words[index : index + 2]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(f"{path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("env") or {}, dict):
        raise _unreadable(f"{path} holds no mapping from options to values")
    return content


def _left_out(message: str, words: list[str], given: dict[str, Any]) -> Finding:
    """What the parser complains of; it is taken out, so that the next complaint can be heard.

    Raises:
        ConfigError: It is not about a single option.
    """
    found = _ARGUMENT.search(message)
    if found is None:
        raise _unreadable(message)
    name = found[1]
    if f"--{name}" in words:
        start = words.index(f"--{name}")
        end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[start:end]
    elif name in given:
        del given[name]
    else:
        raise _unreadable(message)
    reason = message.partition(": ")[2] or message
    return failed(f"`{name}`: {reason}", f"Set `{name}` to a value of its type, or leave it out.")


def _unreadable(reason: str) -> ConfigError:
    reason = " ".join(reason.split())  # what YAML complains of is several lines, with a picture
    return ConfigError(f"the options cannot be read: {reason}; check --config and the command line")


def _unknown(word: str) -> Finding:
    name = word.lstrip("-")
    known = [one.name for kind in (ScriptOptions, InspectedConfig, ModelConfig) for one in fields(kind)]
    closest = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean `{closest[0]}`? " if closest else ""
    return failed(
        f"`{name}` is no option of recipes/grpo.py", f"{hint}Remove it, or check it in a script of your own."
    )


def problem_findings(problems: Sequence[str]) -> list[Finding]:
    """What is wrong with values of options."""
    return [
        failed(*split_remedy(problem, "Change it in the options file or on the command line.")) for problem in problems
    ]
