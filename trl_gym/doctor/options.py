"""Options of the run, read with TRL's parser but with every mistake and not only the first; and its processes."""

from __future__ import annotations

import difflib
import os
import re
import resource
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from trl_gym.config import GymGRPOConfig, launched_processes
from trl_gym.doctor.context import Context, Finding, failed, ok, warning
from trl_gym.errors import ConfigError, Problem
from trl_gym.run.servers import workers_problem
from trl_gym.supervisor import OPEN_FILES
from trl_gym.train import ScriptArguments

_KINDS = (ScriptArguments, GymGRPOConfig, ModelConfig)
_ARGUMENT = re.compile(r"argument (?:-\w, )?--(\w+)")
_MAX_MISTAKES = 50
# Of a process of NeMo Gym, the one with most: counted in /proc with a hundred rollouts that wait for the policy, when
# its servers call each other in process, and when they do so over sockets.
_FILES_PER_ROLLOUT = (2, 8)
_OTHER_FILES = 128
_ADVICE = "`accelerate config`, or take one of recipes/accelerate/ with `accelerate launch --config_file`."


def options_file(context: Context) -> Iterator[Finding]:
    """Read the options; those that cannot be read are left out for the checks that follow."""
    # What is wrong with an option would keep everything else from being checked; `options` tells of it.
    values, context.problems = parse(context.argv)
    context.script = ScriptArguments(**_own(ScriptArguments, values))
    context.model_options = ModelConfig(**_own(ModelConfig, values))
    kind = _examined(context)
    context.args = kind.__new__(kind)  # kept although its `__init__` raises
    try:
        context.args.__init__(**_own(GymGRPOConfig, values))  # type: ignore[misc]
    except ConfigError as error:
        context.problems += error.problems
    except Exception as error:  # of TRL's and transformers' own checks, which need devices and packages
        context.problems.append(Problem(f"{type(error).__name__}: {error}"))
    yield ok("read" if "--config" in context.argv else "no options file: what is not given has its default")


def _examined(context: Context) -> type[GymGRPOConfig]:
    """Return the class of a run's options that has the processes of its launch, and not this one."""
    try:
        num_processes = launch(context).processes
    except ConfigError:  # the check of processes reads the same file, and fails
        num_processes = 1

    class ExaminedConfig(GymGRPOConfig):
        @property
        def world_size(self) -> int:
            return num_processes

    return ExaminedConfig


def parse(argv: Sequence[str]) -> tuple[Namespace, list[Problem]]:
    """Read options.

    Args:
        argv: Options of the script; `--config FILE` names a YAML whose `env` is set, as TRL does.

    Returns:
        The options of `_KINDS`, and those that are unknown or of a wrong type, which have their defaults.

    Raises:
        ConfigError: The file cannot be read, or nothing can be made of the options.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = _read_file(words)
    for name, value in (given.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    problems: list[Problem] = []
    for _ in range(_MAX_MISTAKES):
        parser = _Parser(_KINDS, add_help=False, allow_abbrev=False)
        unknown = parser.set_defaults_with_config(**given)[::2]
        try:
            values, rest = parser.parse_known_args(words)
        except _ArgumentError as error:
            problems.append(_left_out(str(error), words, given))
            continue
        unknown += [word for word in rest if word.startswith("--")]
        return values, [*problems, *map(_unknown, unknown)]
    raise _unreadable(f"more than {_MAX_MISTAKES} of them are of a wrong type")


class _ArgumentError(Exception):
    pass


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise _ArgumentError(message)


def _own(kind: type, values: Namespace) -> dict[str, Any]:
    names = [one.name for one in fields(kind) if one.init]
    return {name: getattr(values, name) for name in names if hasattr(values, name)}


def _read_file(words: list[str]) -> dict[str, Any]:
    """Read the file of `--config FILE`, which is taken out of the words."""
    if "--config" not in words:
        return {}
    index = words.index("--config")
    if index + 1 == len(words):
        raise _unreadable("`--config` names no file")
    path = Path(words[index + 1])
    del words[index : index + 2]
    content = read_yaml(path)
    if not isinstance(content.get("env") or {}, dict):
        raise _unreadable(f"`env` of {path} is not a mapping")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises `ConfigError`: it does not, or cannot be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark is not None else str(path)
        raise _unreadable(f"{where}: no YAML ({error.problem})") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise _unreadable(f"{path} holds no mapping from options to values")
    return content


def _unreadable(reason: str) -> ConfigError:
    reason = " ".join(reason.split())
    return ConfigError(f"The options cannot be read: {reason}.", "Check the file and the command line.")


def _left_out(message: str, words: list[str], given: dict[str, Any]) -> Problem:
    """Take out what the parser complains of, so that its next complaint can be heard. Raises `ConfigError`: the
    complaint is not about a single option."""
    found = _ARGUMENT.search(message)
    name = found[1] if found is not None else ""
    if f"--{name}" in words:
        start = words.index(f"--{name}")
        end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[start:end]
    elif name in given:
        del given[name]
    else:
        raise _unreadable(message)
    reason = message.partition(": ")[2] or message
    return Problem(f"`{name}`: {reason}.", f"Set `{name}` to a value of its type, or leave it out.")


def _unknown(word: str) -> Problem:
    name = word.lstrip("-")
    closest = difflib.get_close_matches(name, [one.name for kind in _KINDS for one in fields(kind)], n=1)
    remedy = f"Did you mean `{closest[0]}`?" if closest else "Remove it, or check it in a script of your own."
    return Problem(f"`{name}` is not an option of `trl-gym train`.", remedy)


def options(context: Context) -> Iterator[Finding]:
    """Check the options: known, of their type, in their range, not against each other."""
    problems = [*context.problems, *_source_problems(context)]
    for problem in problems:
        yield failed(problem.text, problem.remedy or "Change it in the options file or on the command line.")
    if not problems:
        yield ok("no contradictions")


def _source_problems(context: Context) -> Iterator[Problem]:
    args = context.args
    if context.starts_gym and not args.gym_config_paths:
        yield Problem(
            "There is no NeMo Gym: `gym_config_paths` and `gym_head_url` are not set.",
            "Set `gym_config_paths` to the configs of an environment, or `gym_head_url` to a running Gym.",
        )
    if context.serves and args.vllm_mode == "server" and not args.vllm_server_base_url:
        yield Problem(
            "`vllm_mode` is 'server' and `vllm_server_base_url` is not set.",
            "Start a server with `trl-gym serve MODEL` and set the option to its URL.",
        )
    weights = context.script.train_weights
    expected = len(context.script.train_files) + (context.script.data_script is not None)
    if weights is not None and (len(weights) != expected or not all(weight > 0 for weight in weights)):
        yield Problem(
            f"`train_weights` is {weights} and there are {expected} training files.",
            "Give one positive number for each file, or leave `train_weights` out.",
        )


# -- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launch:
    """What `accelerate launch` makes of its configuration."""

    processes: int = 1  # training processes, on all machines
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that say how the model is sharded

    @property
    def sharding(self) -> str:
        """How the model is sharded, in words."""
        if self.environment.get("ACCELERATE_USE_FSDP") == "true":
            return "sharded by FSDP"
        if self.environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return f"sharded by ZeRO-{self.environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
        return "the whole model on each" if self.processes > 1 else "one process"


def read_launch(path: Path) -> Launch:
    """Read a configuration of accelerate. Raises `ConfigError`: it is none."""
    try:
        config = read_yaml(path)
        kind = str(config.get("distributed_type", "NO")).upper()
        num_processes = int(config.get("num_processes") or 1)
        fsdp, deepspeed = (dict(config.get(name) or {}) for name in ("fsdp_config", "deepspeed_config"))
    except (TypeError, ValueError) as error:  # also a `ConfigError`
        raise ConfigError(
            f"{path} is not a configuration of accelerate ({error}).", "Name a file that `accelerate config` wrote."
        ) from error
    if "FSDP" in kind:
        reshards = str(fsdp.get("fsdp_reshard_after_forward", True)).lower()
        return Launch(num_processes, {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": reshards})
    if "DEEPSPEED" in kind:
        stage = str(deepspeed.get("zero_stage", 2))
        return Launch(num_processes, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})
    return Launch(num_processes)


def launch_file(context: Context) -> Path | None:
    """Return the configuration that `accelerate launch` would read; None where there is none."""
    from accelerate.commands.config.config_args import default_config_file

    default = Path(default_config_file)
    return context.accelerate_config or (default if default.is_file() else None)


def launch(context: Context) -> Launch:
    """Say how the run is launched: as this process was, else as accelerate's configuration says."""
    if (launched := launched_processes(os.environ)) is not None:
        return Launch(launched, os.environ)
    path = launch_file(context)
    return Launch() if path is None else read_launch(path)


def processes(context: Context) -> Iterator[Finding]:
    """Check accelerate's configuration: how many processes, and how the model is sharded."""
    import torch

    path, num_gpus = launch_file(context), torch.cuda.device_count()
    if path is None:
        if num_gpus > 1:
            yield warning(f"there is no configuration of accelerate, and there are {num_gpus} GPUs", _ADVICE)
        else:
            yield ok("no configuration of accelerate: one process")
        return
    config = read_yaml(path)
    problems = list(_process_problems(context, config, num_gpus))
    for problem in problems:
        yield failed(f"{path}: {problem.text}", problem.remedy)
    if not problems:
        kind = str(config.get("distributed_type", "NO")).removeprefix("DistributedType.")
        yield ok(f"{path}: {config.get('num_processes', 1)} process(es), {kind}")


def open_files(context: Context) -> Iterator[Finding]:
    """Compare the limits of open files with what the rollouts in flight need.

    Every process of a run raises its soft limit to the hard one (`supervisor.raise_open_files`), which counts.
    """
    in_flight = context.args.rollouts_in_flight(launch(context).processes)
    hosts = (context.args.gym_processes or 1) if context.starts_gym else 1
    needed, most = (_OTHER_FILES + per_rollout * -(-in_flight // hosts) for per_rollout in _FILES_PER_ROLLOUT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    raised = f" (the soft limit is {soft}, and is raised)" if 0 <= soft < allowed else ""
    if allowed >= most:
        yield ok(f"{allowed} per process{raised}; {in_flight} rollouts in flight need {needed} to {most}")
        return
    yield (failed if allowed < needed else warning)(
        f"a process may open {allowed} files{raised}, and {in_flight} rollouts in flight need {needed} to {most}",
        f"Raise the hard limit (`ulimit -Hn`, `--ulimit nofile` of a container, `LimitNOFILE` of a service) to "
        f"{OPEN_FILES}, or lower `gym_max_inflight`.",
    )


def _process_problems(context: Context, config: dict[str, Any], num_gpus: int) -> Iterator[Problem]:
    args = context.args
    num_processes, machines = (int(config.get(name) or 1) for name in ("num_processes", "num_machines"))
    kind = str(config.get("distributed_type", "NO")).upper()
    on_cpu = bool(config.get("use_cpu")) or args.use_cpu
    here = -(-num_processes // machines)
    if not on_cpu and here > max(num_gpus, 1):
        yield Problem(
            f"{num_processes} processes on {machines} machine(s) need {here} GPUs here, there are {num_gpus}.",
            f"Run this where training will run; or set `num_processes` to {max(num_gpus, 1) * machines}, or `use_cpu` "
            "to true, to train here.",
        )
    if num_processes > 1 and bool(config.get("use_cpu")) != bool(args.use_cpu) and num_gpus == 0:
        yield Problem(
            f"`use_cpu` is {config.get('use_cpu')} and that of the training options {args.use_cpu}.",
            "Set both to true: otherwise each process trains by itself.",
        )
    if on_cpu and ("FSDP" in kind or "DEEPSPEED" in kind):
        yield Problem(f"{kind} needs GPUs.", "Use recipes/accelerate/cpu_two_processes.yaml.")
    shares = (
        context.engine in ("vllm", "sglang")
        and args.gym_server_devices is None
        and isinstance(args.gym_vllm_args, dict | None)
    )
    if shares and not on_cpu and num_gpus and (problem := workers_problem(args, here, num_gpus)) is not None:
        yield problem
    served = [one.strip() for one in (args.gym_server_devices or "").split(",")]
    if not on_cpu and num_gpus and any(one.isdigit() and int(one) >= num_gpus for one in served):
        yield Problem(
            f"`gym_server_devices` is {args.gym_server_devices!r} and there are GPUs 0 to {num_gpus - 1}.",
            "Set `gym_server_devices` to some of them.",
        )
