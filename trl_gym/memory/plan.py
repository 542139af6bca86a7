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

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from trl_gym.memory.shapes import GIB, MIB, DeviceMemory, ModelShape, ServingShape, TrainingShape

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
        from trl_gym.memory.table import render

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
