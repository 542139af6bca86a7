"""What the memory planner is told: sizes of model, training, serving and device. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of the usual kind.

    Attributes:
        num_params: All parameters; tied ones once, experts included.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP (of all experts that one token passes).
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values.
        head_dim: Width of one head.
        vocab_size: Rows of embedding and head.
    """

    num_params: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any, num_params: int) -> ModelShape:
        """From a transformers config (of a multimodal model, its text part)."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        width = getattr(text, "moe_intermediate_size", None) or getattr(
            text, "intermediate_size", 4 * text.hidden_size
        )
        return cls(
            num_params=num_params,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=width * (getattr(text, "num_experts_per_tok", None) or 1),
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab_size=text.vocab_size,
        )

    @property
    def head_params(self) -> int:
        """Parameters of the head (and of the embedding)."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer; with tied embeddings slightly too few."""
        return max(0, self.num_params - 2 * self.head_params) // self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShape:
    """What one training process holds and computes.

    Attributes:
        trainable_params: Parameters with gradients, of the whole model.
        weight_bytes: Per parameter, as stored.
        grad_bytes: Per trainable parameter.
        optimizer_bytes: Per trainable parameter: moments, and master weights where they are kept apart.
        compute_bytes: Per element of activations (2 under autocast to bfloat16).
        world_size: Training processes.
        stage: What is split between them: 0 nothing (DDP), 1 optimizer state, 2 and gradients, 3 and weights (FSDP).
        sequences: Completions in one forward and backward pass (`per_device_train_batch_size`).
        sequence_length: Tokens of prompt and completion at most.
        checkpointing: Whether activations are recomputed in the backward pass.
        reference: Whether a second, frozen copy of the weights is kept (`beta` ≠ 0, no adapter).
        grads_kept: Whether rollouts happen between the micro batches of one optimizer step, with gradients alive.
        offload_optimizer: Whether the optimizer state is on the host during rollouts (`gym_offload_optimizer`).
    """

    trainable_params: int
    weight_bytes: float = 4
    grad_bytes: int = 4
    optimizer_bytes: float = 8
    compute_bytes: int = 2
    world_size: int = 1
    stage: int = 0
    sequences: int = 1
    sequence_length: int = 1024
    checkpointing: bool = True
    reference: bool = False
    grads_kept: bool = False
    offload_optimizer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingShape:
    """What the policy server holds on one GPU.

    Attributes:
        context: Tokens of one sequence at most (`vllm_max_model_length`); vLLM does not start with room for fewer.
        concurrency: Sequences that one replica answers at the same time, as many as training will ask for.
        rollout_tokens: Tokens that one of them will have at most; None: the whole context.
        weight_bytes: Per parameter.
        kv_bytes: Per element of the KV cache.
        tensor_parallel: GPUs of one replica.
        max_num_seqs: vLLM's bound on running sequences.
        max_num_batched_tokens: vLLM's bound on tokens of one forward pass.
        cuda_graphs: Whether they are captured (no `enforce-eager`).
        sleep: Whether the server sleeps while weights are updated (`vllm_enable_sleep_mode`).
        transfer_bytes: Buffers of a weight sync on the device (0 for `file` and `adapter`).
        utilization: The fraction that is given (`vllm_gpu_memory_utilization`).
        shares_device: Whether the trainer is on the same GPU.
    """

    context: int
    concurrency: int
    rollout_tokens: int | None = None
    weight_bytes: float = 2
    kv_bytes: int = 2
    tensor_parallel: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    cuda_graphs: bool = True
    sleep: bool = False
    transfer_bytes: int = 0
    utilization: float = 0.3
    shares_device: bool = True

    @property
    def sequence(self) -> int:
        """Tokens to reckon with per sequence."""
        return min(self.context, self.rollout_tokens or self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """One GPU.

    Attributes:
        total_bytes: As the driver reports it; vLLM's fraction is of this number.
        used_bytes: By other programs, before anything of ours is on it.
    """

    total_bytes: int
    used_bytes: int = 0
