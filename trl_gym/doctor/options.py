"""Options of the run, and of the processes that it is launched in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from trl_gym.doctor.checks import Finding, failed, ok, warning
from trl_gym.doctor.context import Subject

_ADVICE = "`accelerate config`, or take one of recipes/accelerate/ with `accelerate launch --config_file`."


def options_file(subject: Subject) -> Iterator[Finding]:
    """Options can be read; those that cannot are left out for the checks that follow."""
    from trl_gym.doctor.parsing import parse

    parsed = parse(subject.argv)
    subject.script, subject.args, subject.model_options = parsed.script, parsed.args, parsed.model
    subject.problems = parsed.args.problems
    # A failure here would keep everything else from being checked; `options` tells of them.
    subject.unread = parsed.findings
    yield ok("read" if "--config" in subject.argv else "no options file: what is not given has its default")


def options(subject: Subject) -> Iterator[Finding]:
    """Values of options: known, of their type, in their range, not against each other."""
    from trl_gym.doctor.parsing import problem_findings

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
