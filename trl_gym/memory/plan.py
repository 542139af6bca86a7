"""How much of a GPU the policy server may take, from the sizes of model, batch and context.

Three moments of a step are told apart, because not everything exists at the same time:

    rollouts   trainer: weights, optimizer state (unless offloaded)     server: everything
    sync       the same, transfer buffers, one gathered parameter       server: weights; KV cache unless it sleeps
    update     trainer: everything                                      server: nothing but its graphs, if it sleeps

vLLM's `gpu_memory_utilization` u is a fraction of the device's *total* memory (`request_memory` in
`vllm/v1/worker/utils.py`): u · total holds weights, the peak of activations and CUDA graphs, and what is left of it is
the KV cache. The CUDA context is made before vLLM takes its first snapshot and is not part of u. So

    KV bytes(u)  = u · total − weights − activations − graphs
    u proposed   = (weights + activations + graphs + min(wanted KV, room)) / total
    room         = smallest of (total − reserve − everything else) over the moments at which the KV cache exists

Numbers that depend on kernels and libraries are estimates (activations) or assumptions (contexts, graphs); they are
marked so in the table. What really happened is measured: `trl_gym.memory.offload.measured_peak`.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trl_gym.config import GymGRPOConfig


# --------------------------------------------------------------------------------------------------------------------
# What the memory planner is told: sizes of model, training, serving and device. Plain numbers, no torch.

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


# --------------------------------------------------------------------------------------------------------------------
# A memory plan as a table that people read.

_MOMENTS = ("rollouts", "sync", "update")


def render(plan: MemoryPlan) -> str:
    """One line per item and moment, in GiB; then the result, TRL's default beside it, and the warnings."""
    fraction = plan.given_utilization if plan.utilization is None else plan.utilization
    kv_tokens = plan.given_tokens if plan.utilization is None else plan.kv_tokens
    header = f"{'memory of one GPU, GiB':<30}" + "".join(f"{moment:>10}" for moment in _MOMENTS)
    lines = [header]
    for item in plan.items:
        if item.num_bytes:
            cells = "".join(_cell(item.num_bytes if moment in item.moments else 0) for moment in _MOMENTS)
            lines.append(f"{item.owner:<8} {item.name:<21}{cells}   {item.formula}")
    kv = kv_tokens * plan.kv_bytes_per_token
    listed = {moment: sum(i.num_bytes for i in plan.items if moment in i.moments) for moment in _MOMENTS}
    cells = "".join(_cell(plan.peaks[moment] - listed[moment]) for moment in _MOMENTS)
    lines.append(f"{'server':<8} {'KV cache':<21}{cells}   {kv_tokens} tokens × {plan.kv_bytes_per_token} B")
    lines.append(f"{'sum':<30}" + "".join(_cell(plan.peaks[moment]) for moment in _MOMENTS))
    lines.append(f"{'of':<30}" + _cell(plan.device.total_bytes) * len(_MOMENTS))
    server = sum(i.num_bytes for i in plan.items if i.owner == "server" and "rollouts" in i.moments) + kv
    if plan.utilization is None:
        lines.append(f"No fraction fits; the KV cache above is that of the given {fraction:g}.")
    else:
        lines.append(
            f"vllm_gpu_memory_utilization = {server / GIB:.1f} / {plan.device.total_bytes / GIB:.1f} = {fraction:.3f}"
            f": {kv_tokens} tokens, {plan.sequences} sequences of {plan.sequence} "
            f"(wanted: {plan.wanted_tokens // plan.sequence})."
        )
    lines.append(
        f"Given: {plan.given_utilization:g}, {plan.given_tokens} tokens. "
        f"TRL's default 0.3: {plan.default_tokens} tokens, {plan.default_tokens // plan.sequence} sequences."
    )
    return "\n".join([*lines, *(f"Warning: {warning}" for warning in plan.warnings)])


def _cell(num_bytes: int) -> str:
    return f"{num_bytes / GIB:>10.2f}" if num_bytes else f"{'·':>10}"


ROLLOUTS, SYNC, UPDATE = "rollouts", "sync", "update"
MOMENTS = (ROLLOUTS, SYNC, UPDATE)
_ALL = frozenset(MOMENTS)

TRL_DEFAULT_UTILIZATION = 0.3
MAX_UTILIZATION = 0.95
_RESERVE = 0.05  # of the device, for what allocators cannot use; an assumption
_CONTEXT_BYTES = 600 * MIB  # CUDA context, cuBLAS and NCCL of one process; an assumption
_GRAPH_BYTES = 1 * GIB  # vLLM's CUDA graphs; an assumption
# TRL 1.16 computes log-probabilities in tiles of so many tokens times so many words (`trl/kernels/chunked_logprob.py`,
# `_CHUNKED_LOGPROB_CHUNK_SIZE`), so the logits never exist as a whole.
_TILE_TOKENS, _TILE_WORDS = 4096, 32768


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the table.

    Attributes:
        owner: `"trainer"`, `"server"` or `"device"`.
        name: What it is.
        num_bytes: On one GPU.
        moments: When it exists.
        formula: The arithmetic with its numbers.
    """

    owner: str
    name: str
    num_bytes: int
    moments: frozenset[str]
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What fits, and what to hand to the server.

    Attributes:
        items: Everything but the KV cache.
        device: The GPU.
        utilization: Proposed `vllm_gpu_memory_utilization`; None when nothing useful is left for the server.
        kv_bytes_per_token: On one GPU.
        kv_tokens: Tokens of KV cache with the proposal.
        sequences: How many of `sequence` tokens these hold.
        wanted_tokens: For all sequences that are served at the same time.
        context: Tokens of one sequence that vLLM demands room for.
        sequence: Tokens that one is reckoned with.
        given_utilization: What the configuration says.
        given_tokens: Tokens of KV cache with that.
        default_tokens: Tokens of KV cache with TRL's default fraction.
        peaks: Moment → bytes in use with the proposal (with the given fraction when there is no proposal).
        warnings: What would go wrong, each with the options that change it.
    """

    items: tuple[Item, ...]
    device: DeviceMemory
    utilization: float | None
    kv_bytes_per_token: int
    kv_tokens: int
    sequences: int
    wanted_tokens: int
    context: int
    sequence: int
    given_utilization: float
    given_tokens: int
    default_tokens: int
    peaks: dict[str, int]
    warnings: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """The arithmetic as a table in GiB, the result, and the warnings."""

        return render(self)


def kv_bytes_per_token(model: ModelShape, serving: ServingShape) -> int:
    """Keys and values of one token on one GPU: 2 · layers · heads · head_dim · bytes. Heads are split over the
    tensor-parallel ranks, and repeated when there are more ranks than heads."""
    heads = math.ceil(model.num_kv_heads / serving.tensor_parallel)
    return 2 * model.num_layers * heads * model.head_dim * serving.kv_bytes


def plan(model: ModelShape, training: TrainingShape, serving: ServingShape, device: DeviceMemory) -> MemoryPlan:
    """Add everything up. Pure."""
    server = _server_items(model, serving)
    items = [*_device_items(serving, device), *server]
    if serving.shares_device:
        items += [*_trainer_items(model, training), *_sync_items(model, training, serving)]
    per_token = kv_bytes_per_token(model, serving)
    fixed = sum(item.num_bytes for item in server)
    kv_moments = (ROLLOUTS,) if serving.sleep else MOMENTS
    room = min(device.total_bytes - _sum(items, moment) for moment in kv_moments)
    wanted = max(serving.context, serving.concurrency * serving.sequence)
    utilization = _fraction(fixed + wanted * per_token, fixed + room, device.total_bytes)

    def tokens(fraction: float) -> int:
        return max(0, int(fraction * device.total_bytes) - fixed) // per_token

    kv_tokens = tokens(utilization)
    fits = kv_tokens >= serving.context
    shown = utilization if fits else serving.utilization
    kv = tokens(shown) * per_token
    peaks = {moment: _sum(items, moment) + (kv if moment in kv_moments else 0) for moment in MOMENTS}
    result = MemoryPlan(
        items=tuple(items),
        device=device,
        utilization=utilization if fits else None,
        kv_bytes_per_token=per_token,
        kv_tokens=kv_tokens if fits else 0,
        sequences=kv_tokens // serving.sequence if fits else 0,
        wanted_tokens=wanted,
        context=serving.context,
        sequence=serving.sequence,
        given_utilization=serving.utilization,
        given_tokens=tokens(serving.utilization),
        default_tokens=tokens(TRL_DEFAULT_UTILIZATION),
        peaks=peaks,
    )
    return _with_warnings(result, training, serving, kv_moments)


# -- the items --------------------------------------------------------------------------------------------------------


def _device_items(serving: ServingShape, device: DeviceMemory) -> list[Item]:
    processes = 2 if serving.shares_device else 1
    return [
        Item("device", "other programs", device.used_bytes, _ALL, "measured"),
        Item("device", "CUDA contexts", processes * _CONTEXT_BYTES, _ALL,
             f"{processes} × {_CONTEXT_BYTES // MIB} MiB assumed"),
        Item("device", "reserve", int(_RESERVE * device.total_bytes), _ALL, f"{_RESERVE:.0%} of the device"),
    ]  # fmt: skip


def _server_items(model: ModelShape, serving: ServingShape) -> list[Item]:
    tp = serving.tensor_parallel
    awake = frozenset((ROLLOUTS, SYNC)) if serving.sleep else _ALL
    tokens, sequences = serving.max_num_batched_tokens, min(serving.max_num_seqs, serving.max_num_batched_tokens)
    # One layer's tensors for a batch of the largest size, and logits in float32, twice again while sampling.
    layer = tokens * (4 * model.hidden_size + 3 * model.intermediate_size // tp) * 2
    logits = 3 * 4 * sequences * model.vocab_size
    graphs = _GRAPH_BYTES if serving.cuda_graphs else 0
    return [
        Item("server", "weights", int(model.num_params * serving.weight_bytes) // tp, awake,
             f"{_count(model.num_params)} × {serving.weight_bytes:g} B" + (f" / {tp} GPUs" if tp > 1 else "")),
        Item("server", "activations", layer + logits, awake,
             f"{tokens} tokens, {sequences} sequences × {model.vocab_size} logits, estimated"),
        Item("server", "CUDA graphs", graphs, _ALL, "assumed" if graphs else "enforce-eager"),
    ]  # fmt: skip


def _trainer_items(model: ModelShape, training: TrainingShape) -> list[Item]:
    update = frozenset((UPDATE,))
    world, stage = training.world_size, training.stage
    of_weights, of_grads, of_optimizer = (world if stage >= least else 1 for least in (3, 2, 1))
    total, trainable = model.num_params, training.trainable_params
    at_rest = update if training.offload_optimizer else _ALL
    items = [
        Item("trainer", "weights", int(total * training.weight_bytes) // of_weights, _ALL,
             _per(total, training.weight_bytes, of_weights)),
        Item("trainer", "gradients", trainable * training.grad_bytes // of_grads,
             _ALL if training.grads_kept else update, _per(trainable, training.grad_bytes, of_grads)),
        Item("trainer", "optimizer state", int(trainable * training.optimizer_bytes) // of_optimizer, at_rest,
             _per(trainable, training.optimizer_bytes, of_optimizer)),
        Item("trainer", "activations", activation_bytes(model, training), update,
             f"{training.sequences} × {training.sequence_length} tokens × {model.num_layers} layers, estimated"),
        Item("trainer", "log-probabilities", logprob_bytes(model, training), update,
             f"tiles of {_TILE_TOKENS} × {_TILE_WORDS}; logits never exist as a whole"),
    ]  # fmt: skip
    if training.reference:
        items.append(
            Item("trainer", "reference model", int(total * training.weight_bytes) // of_weights, _ALL,
                 _per(total, training.weight_bytes, of_weights))
        )  # fmt: skip
    if stage == 0 and world > 1:
        items.append(
            Item("trainer", "DDP buckets", trainable * training.grad_bytes, _ALL,
                 _per(trainable, training.grad_bytes, 1) + ", kept between steps")
        )  # fmt: skip
    if stage < 3 and training.weight_bytes > training.compute_bytes:
        # torch keeps casts of trained weights; those of frozen ones live as long as their layer's activations.
        kept = trainable == total or not training.checkpointing
        copied = total if kept else model.layer_params + model.head_params
        items.append(
            Item("trainer", "autocast copies", copied * training.compute_bytes, update,
                 _per(copied, training.compute_bytes, 1))
        )  # fmt: skip
    if stage == 3 and world > 1:
        # The layer that computes, the next one that is prefetched, embedding and head.
        gathered = 2 * model.layer_params + 2 * model.head_params
        items.append(
            Item("trainer", "gathered layers", gathered * training.compute_bytes, update,
                 _per(gathered, training.compute_bytes, 1))
        )  # fmt: skip
    return items


def _sync_items(model: ModelShape, training: TrainingShape, serving: ServingShape) -> list[Item]:
    moment = frozenset((SYNC,))
    # The biggest parameter is gathered and cast; vLLM builds each layer anew before it copies it over the old one.
    gathered = int(model.head_params * training.weight_bytes) if training.stage == 3 else 0
    rebuilt = int((model.layer_params + model.head_params) * serving.weight_bytes) // serving.tensor_parallel
    items = [Item("server", "layer being reloaded", rebuilt, moment, "one layer and the head")]
    if gathered:
        items.append(Item("trainer", "gathered parameter", gathered, moment, "the head, the biggest one"))
    if serving.transfer_bytes:
        items.append(Item("trainer", "transfer buffers", serving.transfer_bytes, moment, "gym_weight_buffer_mb"))
    return items


def activation_bytes(model: ModelShape, training: TrainingShape) -> int:
    """What the backward pass needs of one forward pass, with attention that keeps no scores (SDPA, flash).

    Counted for a decoder layer with gated MLP after Korthikanti et al. 2022 (arXiv:2205.05198, section 4), without
    dropout: per token two norms (input and normalized value in float32), the inputs of the projections, q, k and v
    before and after rotation, the attention's result, and gate, up, their activation and product. With checkpointing
    only each layer's input is kept, and one layer at a time is computed again, with gradients of the same size.
    """
    tokens = training.sequences * training.sequence_length
    attention = 2 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + model.num_heads * model.head_dim
    layer = 16 * model.hidden_size + training.compute_bytes * (
        3 * model.hidden_size + attention + 4 * model.intermediate_size
    )
    if not training.checkpointing:
        return tokens * layer * model.num_layers
    stream = model.hidden_size * max(training.compute_bytes, 4 if training.weight_bytes >= 4 else 2)
    return tokens * (stream * model.num_layers + 2 * layer)


def logprob_bytes(model: ModelShape, training: TrainingShape) -> int:
    """TRL's tiled log-probabilities: one tile, the hidden states' gradient in float32, and, when the head is trained,
    the head's gradient in float32 (`ChunkedLogProbFunction.backward`)."""
    tokens = training.sequences * training.sequence_length
    tile = min(tokens, _TILE_TOKENS) * min(_TILE_WORDS, model.vocab_size) * training.compute_bytes
    trains_head = training.trainable_params >= model.num_params
    return tile + tokens * model.hidden_size * 4 + (model.head_params * 4 if trains_head else 0)


# -- what would go wrong ----------------------------------------------------------------------------------------------


def _with_warnings(
    result: MemoryPlan, training: TrainingShape, serving: ServingShape, kv_moments: tuple[str, ...]
) -> MemoryPlan:
    import dataclasses

    total = result.device.total_bytes
    remedies = _remedies(training, serving)
    warnings = []
    if result.utilization is None:
        worst = min(kv_moments, key=lambda moment: total - _sum(result.items, moment))
        missing = _sum(result.items, worst) + result.context * result.kv_bytes_per_token - total
        warnings.append(
            f"There is no room for the KV cache of one sequence of {result.context} tokens: "
            f"{max(0, missing) / GIB:.1f} GiB are missing during {worst}. {remedies[worst]}"
        )
    else:
        if result.kv_tokens < result.wanted_tokens:
            warnings.append(
                f"The KV cache holds {result.sequences} sequences of {result.sequence} tokens and training asks for "
                f"{result.wanted_tokens // result.sequence} at a time: the others wait. {remedies[ROLLOUTS]}"
            )
        warnings += [
            f"{result.peaks[moment] / GIB:.1f} GiB are needed during {moment} and the device has {total / GIB:.1f}. "
            f"{remedies[moment]}"
            for moment in MOMENTS
            if moment not in kv_moments and result.peaks[moment] > total
        ]
    return dataclasses.replace(result, warnings=(*warnings, *_given_warnings(result, kv_moments)))


def _given_warnings(result: MemoryPlan, kv_moments: tuple[str, ...]) -> list[str]:
    """What would go wrong with the fraction that is given."""
    given, total = result.given_utilization, result.device.total_bytes
    advice = (
        f"Set it to {result.utilization:.3f}, or `gym_gpu_memory` to 'auto'."
        if result.utilization is not None
        else "The proposal above shows what is missing."
    )
    if result.given_tokens < result.context:
        return [
            f"`vllm_gpu_memory_utilization` {given:g} leaves {result.given_tokens} tokens of KV cache, fewer than one "
            f"sequence of {result.context}: vLLM will refuse to start. {advice}"
        ]
    kv = result.given_tokens * result.kv_bytes_per_token
    over = {moment: _sum(result.items, moment) + kv - total for moment in kv_moments}
    worst = max(over, key=lambda moment: over[moment])
    if over[worst] <= 0:
        return []
    return [
        f"`vllm_gpu_memory_utilization` {given:g} is {over[worst] / GIB:.1f} GiB more than fits during {worst}: the "
        f"trainer will run out of memory. {advice}"
    ]


def _remedies(training: TrainingShape, serving: ServingShape) -> dict[str, str]:
    rollouts, update = [], []
    if not serving.sleep and serving.shares_device:
        update.append("`vllm_enable_sleep_mode=True`")
        rollouts.append("`vllm_enable_sleep_mode=True`")
    if not training.offload_optimizer:
        rollouts.append("`gym_offload_optimizer=True`")
    rollouts += ["a smaller `vllm_max_model_length`", "fewer rollouts at a time (`gym_max_inflight`)"]
    if not training.checkpointing:
        update.append("`gradient_checkpointing=True`")
    if training.sequences > 1:
        update.append("a smaller `per_device_train_batch_size`")
    update.append("a smaller `max_completion_length`")
    if training.optimizer_bytes > 2:
        update.append("`optim='adamw_bnb_8bit'`")
    if training.stage < 3:
        update.append("FSDP2 or ZeRO-3 over several GPUs")
    other = ["more `vllm_tensor_parallel_size`", "`gym_server_devices` apart from training's"]
    rollouts += other if serving.shares_device else other[:1]
    return {
        ROLLOUTS: f"What helps: {', '.join(rollouts)}.",
        SYNC: f"What helps: a smaller `gym_weight_buffer_mb`, {', '.join(rollouts)}.",
        UPDATE: f"What helps: {', '.join(update)}.",
    }


def _fraction(wanted_bytes: int, most_bytes: int, total_bytes: int) -> float:
    """In thousandths of the device: what is wanted, rounded up, and at most what there is, rounded down."""
    wanted = math.ceil(wanted_bytes / total_bytes * 1000)
    most = min(math.floor(most_bytes / total_bytes * 1000), int(MAX_UTILIZATION * 1000))
    return min(wanted, most) / 1000


def _sum(items: Iterable[Item], moment: str) -> int:
    return sum(item.num_bytes for item in items if moment in item.moments)


def _per(count: int, num_bytes: float, parts: int) -> str:
    return f"{_count(count)} × {num_bytes:g} B" + (f" / {parts} processes" if parts > 1 else "")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e8 else f"{number / 1e6:.1f} M"


# --------------------------------------------------------------------------------------------------------------------
# The planner's input from a trainer's configuration: what TRL, accelerate and vLLM will do with it.

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
