"""`trl-gym plan`: the GPU memory of a run, estimated for this machine or for another one; needs no GPU."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.compat import check_versions
from trl_gym.engines import describe_choice, started_engine
from trl_gym.errors import ConfigError, Problem
from trl_gym.recipes import find

if TYPE_CHECKING:
    from trl import ModelConfig

    from trl_gym.config import GymGRPOConfig
    from trl_gym.doctor.options import Launch
    from trl_gym.memory.plan import DeviceMemory, MemoryPlan

DESCRIPTION = (
    "Estimate the memory of one GPU at each moment of a step: prints the arithmetic as a table, the "
    "`vllm_gpu_memory_utilization` that fits best where a policy server shares GPUs with training, and what does not "
    "fit. With `gym_engine: transformers` there is one copy of the weights, and keys and values during rollouts. For "
    "this machine or another one: needs no GPU, and of the model only its config.json; starts and writes nothing. "
    "Takes all training options, from a YAML and from the command line. Exit status 0 when the run fits as it is "
    "configured, else 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `trl-gym plan`; every other one is a training option and is left to TRL's parser."""
    parser.add_argument(
        "--config", type=find, metavar="YAML", help="options of the run; options given here win over it"
    )
    parser.add_argument(
        "--gpus",
        type=_positive(int),
        metavar="N",
        help="GPUs, each with one training process (default: as many as --accelerate-config has processes, else 1)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=_positive(float),
        metavar="GIB",
        help="memory of one GPU in GiB, of which one sold with 80 GB has 79 (default: that of this machine's)",
    )
    parser.add_argument(
        "--accelerate-config",
        type=find,
        metavar="YAML",
        help="file for `accelerate launch --config_file`: how the model is sharded (default: whole on every GPU)",
    )


_SHARDED = "recipes/accelerate/fsdp2.yaml"


def _positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    def number(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    number.__name__ = "positive number"  # in argparse's message
    return number


def run(options: argparse.Namespace) -> int:
    """Print the plan; return 0 when the run fits, else 1. Raises `ConfigError`: options are wrong, or the memory of
    this model cannot be estimated."""
    check_versions()  # packages that do not fit together cannot be imported
    from trl_gym.doctor.options import Launch, read_launch
    from trl_gym.hub import load_config
    from trl_gym.run.servers import num_workers, workers_problem
    from trl_gym.train import load_as_told

    device = _device(options.gpu_memory)
    launch = Launch() if options.accelerate_config is None else read_launch(Path(options.accelerate_config))
    launch = replace(launch, processes=options.gpus or launch.processes)
    argv = [*(("--config", options.config) if options.config else ()), *options.run_options]
    args, model = _parse(argv, launch.processes)
    load_as_told(model, args)
    named = str(model.model_name_or_path)
    try:
        load_config(named, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    except ConfigError as error:
        raise ConfigError(error.problem, f"{error.remedy} The plan needs no more of it than config.json.") from error
    if args.vllm_mode == "colocate" and (said := describe_choice(args)) is not None:
        sys.stdout.write(f"default: {said}; `--gym_engine vllm` plans a run with it\n")
    plans = _plans(args, model, launch, device)
    for title, plan in plans.items():
        sys.stdout.write(f"{title}\n{plan.describe()}\n")
    shares = args.vllm_mode != "server" and args.gym_server_devices is None and not _samples_itself(args)
    problem = workers_problem(args, launch.processes, launch.processes) if shares else None
    if problem is not None:
        sys.stdout.write(f"Warning: {problem}\n")
    fits = not any(plan.problems for plan in plans.values()) and not (shares and num_workers(args) > launch.processes)
    may_shard = launch.processes > 1 and not _samples_itself(args)
    if not fits and may_shard and options.accelerate_config is None:
        sys.stdout.write(f"--accelerate-config plans a model that is sharded, e.g. with {_SHARDED}.\n")
    return 0 if fits else 1


def _plans(args: GymGRPOConfig, model: ModelConfig, launch: Launch, device: DeviceMemory) -> dict[str, MemoryPlan]:
    """Return the plan of each kind of GPU, by what is said about it."""
    from trl import get_peft_config

    from trl_gym.memory.plan import GIB, try_estimate

    count = f"{launch.processes} GPU{'s' if launch.processes > 1 else ''} of {device.total_bytes / GIB:.1f} GiB"
    trained = f"{model.model_name_or_path}, trained on {count} ({launch.sharding})"
    if _samples_itself(args):
        sides = {f"{trained}, which samples in the same processes (transformers)": args}
    elif args.vllm_mode == "server":
        sides = {f"{trained}; its policy server runs elsewhere": args}
    elif args.gym_server_devices is None:
        sides = {f"{trained}, which the policy server shares": args}
    else:  # `server` is the mode without ours on these devices
        apart = copy.copy(args)
        apart.vllm_mode, apart.gym_server_devices = "server", None
        sides = {trained: apart, f"its policy server, on GPUs {args.gym_server_devices}": args}
    plans = {}
    for title, side in sides.items():
        plan = try_estimate(
            side,
            str(model.model_name_or_path),
            launch.processes,
            device,
            peft_config=get_peft_config(model),
            environment=launch.environment,
        )
        if isinstance(plan, Problem):
            raise ConfigError(plan.text, plan.remedy)
        plans[title] = plan
    return plans


def _samples_itself(args: GymGRPOConfig) -> bool:
    return args.vllm_mode == "colocate" and started_engine(args) == "transformers"


def _device(gib: float | None) -> DeviceMemory:
    from trl_gym.memory.plan import GIB, DeviceMemory, this_device

    device = this_device() if gib is None else DeviceMemory(total_bytes=int(gib * GIB))
    if device is None:
        raise ConfigError("This machine has no GPU.", "Name the memory of one GPU in GiB with --gpu-memory.")
    return device


def _parse(argv: Sequence[str], gpus: int) -> tuple[GymGRPOConfig, ModelConfig]:
    """Parse training options as a machine with so many GPUs would."""
    from trl_gym.config import GymGRPOConfig
    from trl_gym.train import model_to_train, parse_options

    @dataclass
    class PlannedConfig(GymGRPOConfig):
        """Options of a run elsewhere: checks of this machine's devices are left out."""

        use_cpu: bool = True
        bf16: bool = True  # TRL's default where there is a GPU

        def __post_init__(self) -> None:
            self.bf16 = self.bf16 and not self.fp16
            super().__post_init__()

        @property
        def world_size(self) -> int:
            return gpus

    script, args, model = parse_options(argv, PlannedConfig)
    model.model_name_or_path = model_to_train(model.model_name_or_path, script)
    return args, model
