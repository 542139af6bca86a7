"""Options of the run, and of the processes that it is launched in."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from trl_gym.config import GymGRPOConfig
from trl_gym.doctor.checks import Finding, failed, ok, split_remedy, warning
from trl_gym.doctor.context import Subject
from trl_gym.errors import ConfigError

# --------------------------------------------------------------------------------------------------------------------
# Options as `recipes/grpo.py` reads them, with TRL's parser, but with every mistake and not only the first.

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


_ADVICE = "`accelerate config`, or take one of recipes/accelerate/ with `accelerate launch --config_file`."


def options_file(subject: Subject) -> Iterator[Finding]:
    """Options can be read; those that cannot are left out for the checks that follow."""

    parsed = parse(subject.argv)
    subject.script, subject.args, subject.model_options = parsed.script, parsed.args, parsed.model
    subject.problems = parsed.args.problems
    # A failure here would keep everything else from being checked; `options` tells of them.
    subject.unread = parsed.findings
    yield ok("read" if "--config" in subject.argv else "no options file: what is not given has its default")


def options(subject: Subject) -> Iterator[Finding]:
    """Values of options: known, of their type, in their range, not against each other."""

    yield from subject.unread
    yield from problem_findings(subject.problems)
    yield from _sources(subject)
    if not subject.unread and not subject.problems:
        yield ok("no contradictions")


def _sources(subject: Subject) -> Iterator[Finding]:
    args = subject.args
    if subject.starts_gym and not args.gym_config_paths:
        yield failed(
            "there is no NeMo Gym: `gym_config_paths` and `gym_head_url` are not set",
            "Set `gym_config_paths` to the configs of an environment, or `gym_head_url` to a running Gym.",
        )
    if subject.serves and args.vllm_mode == "server" and not args.vllm_server_base_url:
        yield failed(
            "`vllm_mode` is 'server' and `vllm_server_base_url` is not set",
            "Start a server with `trl-gym serve MODEL` and set the option to its URL.",
        )
    weights, files = subject.script.train_weights, subject.script.train_files
    expected = len(files) + (subject.script.data_script is not None)
    if weights is not None and (len(weights) != expected or not all(weight > 0 for weight in weights)):
        yield failed(
            f"`train_weights` is {weights} and there are {expected} training files",
            "Give one positive number for each file, or leave `train_weights` out.",
        )


def processes(subject: Subject) -> Iterator[Finding]:
    """accelerate's configuration: how many processes, and how the model is sharded."""
    import torch

    path = subject.accelerate_config or _default_config()
    if path is None:
        num_gpus = torch.cuda.device_count()
        if num_gpus > 1:
            yield warning(f"there is no configuration of accelerate, and there are {num_gpus} GPUs", _ADVICE)
        else:
            yield ok("no configuration of accelerate: one process")
        return
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        yield failed(f"{path} cannot be read ({error})", _ADVICE)
        return
    if not isinstance(config, dict):
        yield failed(f"{path} holds no mapping", _ADVICE)
        return
    findings = list(_process_problems(subject, path, config))
    yield from findings
    if not findings:
        kind = str(config.get("distributed_type", "NO")).removeprefix("DistributedType.")
        yield ok(f"{path}: {config.get('num_processes', 1)} process(es), {kind}")


def _process_problems(subject: Subject, path: Path, config: dict[str, object]) -> Iterator[Finding]:
    import torch

    args = subject.args
    processes = int(str(config.get("num_processes") or 1))
    machines = int(str(config.get("num_machines") or 1))
    kind = str(config.get("distributed_type", "NO")).upper()
    on_cpu = bool(config.get("use_cpu")) or args.use_cpu
    num_gpus = torch.cuda.device_count()
    here = -(-processes // machines)
    if not on_cpu and here > max(num_gpus, 1):
        yield failed(
            f"{path}: {processes} processes on {machines} machine(s) need {here} GPUs here, there are {num_gpus}",
            f"Set `num_processes` to {max(num_gpus, 1) * machines}, or `--use_cpu true` to train on the CPU.",
        )
    if processes > 1 and bool(config.get("use_cpu")) != bool(args.use_cpu) and num_gpus == 0:
        yield failed(
            f"{path}: `use_cpu` is {config.get('use_cpu')} and that of the training options {args.use_cpu}",
            "Set both to true: otherwise each process trains by itself.",
        )
    if on_cpu and ("FSDP" in kind or "DEEPSPEED" in kind):
        yield failed(f"{path}: {kind} needs GPUs", "Use recipes/accelerate/cpu_two_processes.yaml.")
    batch = args.per_device_train_batch_size * processes * (args.steps_per_generation or 1)
    if processes > 1 and args.num_generations and batch % args.num_generations:
        yield failed(
            f"{processes} processes make generation batches of {batch} rollouts, which groups of "
            f"`num_generations` {args.num_generations} do not divide",
            "Set `per_device_train_batch_size` or `steps_per_generation` so that they do.",
        )
    if (served := args.gym_server_devices) and not on_cpu and num_gpus:
        unknown = [one for one in served.split(",") if one.strip().isdigit() and int(one) >= num_gpus]
        if unknown:
            yield failed(
                f"`gym_server_devices` is {served!r} and there are GPUs 0 to {num_gpus - 1}",
                "Set `gym_server_devices` to some of them.",
            )


def _default_config() -> Path | None:
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    return path if path.is_file() else None
