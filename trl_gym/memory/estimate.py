"""The planner's input from a trainer's configuration: what TRL, accelerate and vLLM will do with it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_gym.memory.plan import MemoryPlan, plan
from trl_gym.memory.shapes import GIB, DeviceMemory, ModelShape, ServingShape, TrainingShape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trl_gym.config import GymGRPOConfig

_ASSUMED_PROMPT = 1024  # tokens, where `vllm_max_model_length` does not bound the whole
_NF4_BYTES = 0.5625  # four bits, and one float32 per block of 64 (QLoRA, arXiv:2305.14314, section 3)
_INT8_BYTES = 1.0
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def this_device() -> DeviceMemory | None:
    """The GPU of this process; None without CUDA. Call it before anything of the run is on the device."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved()
    return DeviceMemory(total_bytes=total, used_bytes=max(0, total - free - ours))


def from_trainer(
    args: GymGRPOConfig,
    model: str | PreTrainedModel,
    num_processes: int,
    device: DeviceMemory,
    *,
    peft_config: Any = None,
    environment: Mapping[str, str] = os.environ,
) -> MemoryPlan:
    """Plan for a server that the trainer starts itself.

    Args:
        args: The trainer's configuration.
        model: As given to the trainer. Its parameters are counted on torch's `meta` device; nothing is loaded.
        num_processes: Of training.
        device: The GPU; see `this_device`.
        peft_config: The adapter that the trainer will add.
        environment: Where `accelerate launch` says how the model is sharded.
    """
    config = _config(args, model)
    num_params, trainable = count_params(config, model, peft_config)
    shape = ModelShape.from_config(config, num_params)
    context = args.vllm_max_model_length or getattr(config.get_text_config(), "max_position_embeddings", None)
    length = args.vllm_max_model_length or (args.max_completion_length or 0) + _ASSUMED_PROMPT
    stored = _stored_bytes(args, model, config, shape)
    is_adapter = trainable < num_params
    training = TrainingShape(
        trainable_params=trainable,
        compute_bytes=_BYTES[args.serving_dtype],
        world_size=num_processes,
        sequences=args.per_device_train_batch_size,
        sequence_length=length,
        checkpointing=bool(args.gradient_checkpointing),
        reference=bool(args.beta) and not is_adapter,
        grads_kept=args.gradient_accumulation_steps > args.steps_per_generation * args.num_iterations,
        offload_optimizer=args.gym_offload_optimizer,
        **_sharding(args, environment, stored, is_adapter),
    )
    return plan(shape, training, _serving(args, device, context or length, length, num_processes), device)


def count_params(config: Any, model: str | PreTrainedModel, peft_config: Any = None) -> tuple[int, int]:
    """All parameters and those that are trained (tied ones once), without a byte of memory for them."""
    import torch

    if not isinstance(model, str) and hasattr(model, "peft_config"):
        base = sum(p.numel() for p in model.get_base_model().parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return base - sum(p.numel() for n, p in model.named_parameters() if model.prefix in n), trained
    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # the same parameters, in another form
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(plain)
    total = sum(parameter.numel() for parameter in empty.parameters())
    if peft_config is None:
        return total, total
    from peft import get_peft_model

    adapted = get_peft_model(empty, copy.deepcopy(peft_config), autocast_adapter_dtype=False)
    return total, sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _config(args: GymGRPOConfig, model: str | PreTrainedModel) -> Any:
    if not isinstance(model, str):
        return model.config
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)


def _stored_bytes(args: GymGRPOConfig, model: str | PreTrainedModel, config: Any, shape: ModelShape) -> float:
    """Bytes per parameter in the trainer, on average: linear layers of a quantized base are smaller."""
    options = args.model_init_kwargs or {}
    if isinstance(model, str):
        # TRL's own default is float32 (`create_model_from_path`); "auto" is what the checkpoint says.
        dtype = options.get("dtype", "float32")
        dtype = getattr(config, "dtype", None) if dtype == "auto" else dtype
    else:
        dtype = model.dtype
    full = _BYTES.get(_name(dtype), 4)
    quantization = options.get("quantization_config") or getattr(config, "quantization_config", None)
    small = _quantized_bytes(quantization)
    if small is None:
        return full
    kept = shape.head_params * (1 if config.get_text_config().tie_word_embeddings else 2)
    return (kept * full + (shape.num_params - kept) * small) / shape.num_params


def _quantized_bytes(quantization: Any) -> float | None:
    def wants(name: str) -> bool:
        return bool(
            quantization.get(name) if isinstance(quantization, Mapping) else getattr(quantization, name, False)
        )

    if quantization is None:
        return None
    return _NF4_BYTES if wants("load_in_4bit") else _INT8_BYTES if wants("load_in_8bit") else None


def _sharding(args: GymGRPOConfig, environment: Mapping[str, str], stored: float, is_adapter: bool) -> dict[str, Any]:
    """Stage, and what weights, gradients and optimizer take per parameter (of a `TrainingShape`).

    Args:
        args: The trainer's configuration.
        environment: See `from_trainer`.
        stored: Bytes per parameter as the model is loaded.
        is_adapter: Whether what is trained is an adapter, which PEFT keeps in float32.
    """
    mixed = args.bf16 or args.fp16
    trained = 4 if is_adapter else max(2, int(stored))
    stage = 0
    if args.deepspeed or environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", _stage_in(args.deepspeed)))
        if mixed:  # 16 bit weights and gradients; master weights and both moments in float32 (ZeRO, arXiv:1910.02054)
            master = 4 + optimizer_bytes(args.optim, 4)
            return {"stage": stage, "weight_bytes": min(2, stored), "grad_bytes": 2, "optimizer_bytes": master}
    if args.fsdp or environment.get("ACCELERATE_USE_FSDP") == "true":
        stays = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true") in ("false", "shard_grad_op")
        stage = 2 if stays else 3
        if mixed:  # accelerate puts what is trained into float32 (`fsdp2_prepare_model`)
            trained = 4
            stored = stored if is_adapter else 4
    moments = optimizer_bytes(args.optim, trained)
    return {"stage": stage, "weight_bytes": stored, "grad_bytes": trained, "optimizer_bytes": moments}


def _stage_in(deepspeed: Any) -> int:
    zero = deepspeed.get("zero_optimization", {}) if isinstance(deepspeed, Mapping) else {}
    stage = zero.get("stage", 2)  # accelerate's default
    return stage if isinstance(stage, int) else 2


def optimizer_bytes(optim: str, stored: int) -> float:
    """Device memory of the state per trained parameter, by the name that transformers gives the optimizer.

    torch's AdamW keeps two moments in the parameter's own dtype, bitsandbytes' in 32 or 8 bits.
    """
    name = str(getattr(optim, "value", optim))
    if name.startswith("paged_") or "lomo" in name or name in ("sgd", "adafactor"):
        return 0.0  # on the host, none, or a few rows and columns
    moments = 1 if name.startswith(("lion", "rmsprop", "adagrad")) else 3 if name.startswith("ademamix") else 2
    width = 0.5 if "4bit" in name else 1.0 if "8bit" in name else 4.0 if "32bit" in name else float(stored)
    return moments * width


def _serving(args: GymGRPOConfig, device: DeviceMemory, context: int, length: int, num_processes: int) -> ServingShape:
    flags = {name.lstrip("-").replace("_", "-"): value for name, value in (args.gym_vllm_args or {}).items()}
    # vLLM's defaults for its OpenAI server (`EngineArgs.get_batch_defaults`); A100s get the small ones whatever size.
    total = device.total_bytes
    tokens, sequences = (16384, 1024) if total >= 160 * GIB else (8192, 1024) if total >= 70 * GIB else (2048, 256)
    sequences = int(flags.get("max-num-seqs", sequences))
    replicas = int(flags.get("data-parallel-size", 1))
    rollouts = num_processes * min(args.gym_max_inflight, args.per_device_train_batch_size * args.steps_per_generation)
    packed = args.gym_weight_transport in ("auto", "ipc", "nccl")
    return ServingShape(
        context=context,
        rollout_tokens=length,
        concurrency=max(1, min(-(-rollouts // replicas), sequences)),
        weight_bytes=_NF4_BYTES if flags.get("quantization") == "bitsandbytes" else _BYTES[args.serving_dtype],
        kv_bytes=1 if str(flags.get("kv-cache-dtype", "")).startswith("fp8") else 2,
        tensor_parallel=args.vllm_tensor_parallel_size,
        max_num_seqs=sequences,
        max_num_batched_tokens=int(flags.get("max-num-batched-tokens", tokens)),
        cuda_graphs=not flags.get("enforce-eager", False),
        sleep=args.vllm_enable_sleep_mode,
        transfer_bytes=2 * args.gym_weight_buffer_mb * 1_000_000 if packed else 0,
        utilization=args.vllm_gpu_memory_utilization,
        shares_device=args.gym_server_devices is None,
    )


def _name(dtype: torch.dtype | str | None) -> str:
    return str(dtype).removeprefix("torch.")
