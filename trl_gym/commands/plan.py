"""`trl-gym plan`: the GPU memory of a run, estimated for this machine or for another one; needs no GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import ConfigError, Problem
from trl_gym.recipes import find

if TYPE_CHECKING:
    from trl import ModelConfig

    from trl_gym.config import GymGRPOConfig
    from trl_gym.memory.plan import DeviceMemory

DESCRIPTION = (
    "Estimate the memory of one GPU at each moment of a step, for a run whose policy server shares GPUs with "
    "training: prints the arithmetic as a table, the `vllm_gpu_memory_utilization` that fits best, and what does not "
    "fit. Needs no GPU, and of the model only its config.json. Takes all training options, from a YAML and from the "
    "command line. Exit status 0 when the run fits as it is configured, else 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `trl-gym plan`; every other one is a training option and is left to TRL's parser."""
    parser.add_argument(
        "--config", type=find, metavar="YAML", help="options of the run; options given here win over it"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="training processes, one per GPU (default: 1)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of one GPU in GiB (default: that of this machine's)"
    )
    parser.add_argument(
        "--accelerate-config",
        type=find,
        metavar="YAML",
        help="file for `accelerate launch --config_file`: how the model is sharded, and the number of processes",
    )


def run(options: argparse.Namespace) -> int:
    """Print the plan; return 0 when the run fits, else 1.

    Raises:
        ConfigError: Options are wrong, or the memory of this model cannot be estimated.
    """
    from trl import get_peft_config

    from trl_gym.memory.plan import try_estimate
    from trl_gym.train import load_as_told

    environment, processes = _sharding(options.accelerate_config)
    gpus = options.gpus or processes
    args, model = _parse([*(("--config", options.config) if options.config else ()), *options.run_options], gpus)
    load_as_told(model, args)
    plan = try_estimate(
        args,
        str(model.model_name_or_path),
        gpus,
        _device(options.gpu_memory),
        peft_config=get_peft_config(model),
        environment=environment,
    )
    if isinstance(plan, Problem):
        raise ConfigError(plan.text, plan.remedy)
    sys.stdout.write(f"{plan.describe()}\n")
    return 1 if plan.problems else 0


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
    if args.vllm_mode == "server":
        raise ConfigError(
            "`vllm_mode` is 'server': the policy server shares no GPU with training.",
            "Plan with `vllm_mode: colocate`.",
        )
    return args, model


def _sharding(path: str | None) -> tuple[dict[str, str], int]:
    """Return the variables that `accelerate launch` would set, and the number of processes, of one of its files."""
    if path is None:
        return {}, 1
    import yaml

    try:
        config: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        processes, kind = int(config.get("num_processes") or 1), str(config.get("distributed_type", "NO")).upper()
        fsdp, deepspeed = config.get("fsdp_config") or {}, config.get("deepspeed_config") or {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} is not a configuration of accelerate ({error}).", "Name a file that `accelerate config` wrote."
        ) from error
    if "FSDP" in kind:
        reshards = str(fsdp.get("fsdp_reshard_after_forward", True)).lower()
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": reshards}, processes
    if "DEEPSPEED" in kind:
        stage = str(deepspeed.get("zero_stage", 2))
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}, processes
    return {}, processes
