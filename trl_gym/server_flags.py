"""Flags of `vllm serve` for the policy server that a trainer starts: what TRL's options say, what the placement and
the adapter demand, and what `gym_vllm_args` says, which comes last."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from trl_gym.errors import ConfigError
from trl_gym.memory.estimate import from_trainer, this_device
from trl_gym.weight_sync.transports import planned_backend
from trl_gym.weight_sync.transports.adapter_checks import managed_flags

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trl_gym.config import GymGRPOConfig

logger = logging.getLogger(__name__)


def server_flags(
    args: GymGRPOConfig,
    model: str | PreTrainedModel,
    peft_config: Any = None,
    quantization_config: Any = None,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Everything that the server is started with. On GPUs it prints how their memory will be used.

    Args:
        args: The trainer's configuration.
        model: As given to the trainer.
        peft_config: Of the adapter that the trainer will put on it.
        quantization_config: With which the trainer will load it.
        num_processes: Of training.

    Raises:
        ConfigError: Weights cannot reach such a server, or its memory cannot be had.
    """
    flags: dict[str, Any] = {
        "dtype": args.serving_dtype,
        "weight-transfer-config": json.dumps({"backend": weight_backend(args)}),
        **managed_flags(args, model, peft_config, quantization_config),
    }
    if args.vllm_max_model_length is not None:
        flags["max-model-len"] = args.vllm_max_model_length
    if args.trust_remote_code:
        flags["trust-remote-code"] = True
    if torch.cuda.is_available():
        flags |= _gpu_flags(args, model, peft_config, num_processes)
    else:
        flags["enforce-eager"] = True  # compiling for a CPU takes longer than it saves
    return flags | _own_flags(args)


def weight_backend(args: GymGRPOConfig) -> str:
    """The backend of vLLM's weight transfer. Raises `ConfigError` for a transport that cannot work."""
    on_cuda = torch.cuda.is_available() and not args.use_cpu
    return planned_backend(args.gym_weight_transport, on_cuda=on_cuda, shares_devices=args.gym_server_devices is None)


def _own_flags(args: GymGRPOConfig) -> dict[str, Any]:
    return {flag.lstrip("-").replace("_", "-"): value for flag, value in (args.gym_vllm_args or {}).items()}


def _gpu_flags(
    args: GymGRPOConfig, model: str | PreTrainedModel, peft_config: Any, num_processes: int
) -> dict[str, Any]:
    flags = {
        "tensor-parallel-size": args.vllm_tensor_parallel_size,
        "gpu-memory-utilization": args.vllm_gpu_memory_utilization,
    }
    if args.gym_server_devices is not None:
        return flags  # those GPUs are the server's alone
    _warn_of_idle_gpus(args)
    if args.vllm_enable_sleep_mode:
        flags["enable-sleep-mode"] = True
    device = this_device()
    assert device is not None  # there is CUDA
    plan = from_trainer(args, model, num_processes, device, peft_config=peft_config)
    Console().print(plan.describe(), markup=False, highlight=False, soft_wrap=True)
    if args.gym_gpu_memory == "auto":
        if plan.utilization is None:
            raise ConfigError(
                "`gym_gpu_memory` is 'auto', and nothing useful is left for the policy server:\n"
                + "\n".join(f"  - {warning}" for warning in plan.warnings)
            )
        flags["gpu-memory-utilization"] = plan.utilization
    return flags


def _warn_of_idle_gpus(args: GymGRPOConfig) -> None:
    served = args.vllm_tensor_parallel_size * int(_own_flags(args).get("data-parallel-size", 1))
    training = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if served < training:
        logger.warning(
            "training uses %d GPUs of this host and the policy server %d of them; set `gym_vllm_args` "
            '{"data-parallel-size": %d} to sample on all of them',
            training,
            served,
            training // args.vllm_tensor_parallel_size,
        )
