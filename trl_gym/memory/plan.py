"""Estimate how much of a GPU the policy server may take, from the sizes of model, batch and context.

Three moments of a step are told apart, because not everything exists at the same time:

    rollouts   trainer: weights, optimizer state (unless offloaded)     server: everything
    sync       the same, transfer buffers, one gathered parameter       server: weights; KV cache unless it sleeps
    update     trainer: everything                                      server: nothing but its graphs, if it sleeps

vLLM's `gpu_memory_utilization` u is a fraction of the device's *total* memory (`request_memory` in
`vllm/v1/worker/utils.py`): u · total holds weights, the peak of activations and CUDA graphs, and what is left of it is
the KV cache. The CUDA context is made before vLLM takes its first snapshot and is not part of u. So

    KV bytes(u)   = u · total − weights − activations − graphs
    u suggested   = (weights + activations + graphs + min(wanted KV, room)) / total
    room          = smallest of (total − reserve − everything else) over the moments at which the KV cache exists

The engine in the trainer's own process (`gym_engine` 'transformers') has the trainer's weights and CUDA context. Its
KV cache exists during rollouts only, and takes half of what is free then at most.

Numbers that depend on kernels and libraries are estimates (activations) or assumptions (contexts, graphs); the table
marks them. `trl_gym.memory.offload.measured_peak` measures what really happens. `try_estimate` never raises: what
cannot be estimated (an architecture without attention heads, a model that transformers cannot build) stops no run.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trl_gym import compat
from trl_gym.engines import started_engine
from trl_gym.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trl_gym.config import GymGRPOConfig

GIB, MIB = 1 << 30, 1 << 20
ROLLOUTS, SYNC, UPDATE = MOMENTS = ("rollouts", "sync", "update")
_ALL = frozenset(MOMENTS)

_MAX_UTILIZATION = 0.95
_RESERVE = 0.05  # of the device, for what allocators cannot use; an assumption
_CONTEXT_BYTES = 600 * MIB  # CUDA context, cuBLAS and NCCL of one process; an assumption
_GRAPH_BYTES = 1 * GIB  # vLLM's CUDA graphs; an assumption
# TRL 1.16 computes log-probabilities in tiles of so many tokens times so many words (`trl/kernels/chunked_logprob.py`,
# `_CHUNKED_LOGPROB_CHUNK_SIZE`), so the logits never exist as a whole.
_TILE_TOKENS, _TILE_WORDS = 4096, 32768
_ASSUMED_PROMPT = 1024  # tokens, where `vllm_max_model_length` does not bound the whole
_NF4_BYTES = 0.5625  # four bits, and one float32 per block of 64 (QLoRA, arXiv:2305.14314, section 3)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder of the usual kind."""

    num_params: int  # tied ones once, experts included
    num_layers: int
    hidden_size: int
    intermediate_size: int  # width of the MLP, of all experts that one token passes
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any, num_params: int) -> ModelShape:
        """Read a transformers config (of a multimodal model, its text part). Raises `ValueError`: it is not that of a
        decoder with attention heads."""
        text = config.get_text_config()
        names = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")
        if missing := [name for name in names if not isinstance(getattr(text, name, None), int)]:
            raise ValueError(f"{type(text).__name__} has no number for {', '.join(missing)}")
        heads = text.num_attention_heads
        width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
        return cls(
            num_params=num_params,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=(width or 4 * text.hidden_size) * (getattr(text, "num_experts_per_tok", None) or 1),
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
    """Sizes of one training process. Bytes are per parameter, and per trainable one for gradients and optimizer."""

    trainable_params: int  # of the whole model
    weight_bytes: float = 4
    grad_bytes: int = 4
    optimizer_bytes: float = 8  # moments, and master weights where they are kept apart
    compute_bytes: int = 2  # per element of activations: 2 under autocast to bfloat16
    world_size: int = 1
    stage: int = 0  # processes share: 0 nothing (DDP), 1 optimizer state, 2 and gradients, 3 and weights (FSDP)
    sequences: int = 1  # rows in one forward and backward pass (`per_device_train_batch_size`)
    sequence_length: int = 1024  # tokens of prompt and completion at most
    checkpointing: bool = True  # activations are recomputed in the backward pass
    reference: bool = False  # a second, frozen copy of the weights is kept (`beta` ≠ 0, no adapter)
    grads_kept: bool = False  # gradients are alive during rollouts, which come between micro batches
    offload_optimizer: bool = False  # the optimizer's state is on the host during rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingShape:
    """Sizes of the policy server on one GPU."""

    context: int  # tokens of one sequence at most; vLLM does not start with room for fewer
    concurrency: int  # sequences that one replica answers at the same time
    rollout_tokens: int | None = None  # tokens that one of them will have at most; None: the whole context
    weight_bytes: float = 2
    kv_bytes: int = 2  # per element of the KV cache
    tensor_parallel: int = 1  # GPUs of one replica
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    cuda_graphs: bool = True
    sleep: bool = False  # the server sleeps while weights are updated
    transfer_bytes: int = 0  # buffers of a weight sync on the device
    utilization: float | None = 0.3  # the fraction that is given; None takes the suggestion
    shares_device: bool = True  # with the trainer
    is_elsewhere: bool = False  # on devices that are not planned: only the trainer is
    in_process: bool = False  # no server: the trainer's process samples with the weights that it trains

    @property
    def takes_share(self) -> bool:
        """Whether there is a server that takes a given share of the device."""
        return not (self.is_elsewhere or self.in_process)

    @property
    def sequence(self) -> int:
        """Tokens to count per sequence."""
        return min(self.context, self.rollout_tokens or self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Memory of one GPU, in bytes: all of it, and what other programs use before anything of ours is on it."""

    total_bytes: int
    used_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the table."""

    owner: str  # "trainer", "server" or "device"
    name: str  # e.g. "optimizer state"
    num_bytes: int  # on one GPU
    moments: frozenset[str]  # at which it exists
    formula: str  # the arithmetic with its numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The estimate, and the fraction to hand to the server."""

    items: tuple[Item, ...]  # everything but the KV cache
    device: DeviceMemory
    serving: ServingShape
    utilization: float | None  # suggested `vllm_gpu_memory_utilization`; None: nothing useful is left for the server
    kv_bytes_per_token: int
    kv_tokens: int  # tokens of KV cache with the suggestion; 0 without one
    given_tokens: int  # the same with the given fraction, or with the suggestion where none is given
    wanted_tokens: int  # of all sequences that are served at the same time
    peaks: Mapping[str, int]  # moment → bytes in use with the suggestion, or else with the given fraction
    problems: tuple[Problem, ...] = ()  # reasons why the run would fail, each with the options that change it

    @property
    def sequences(self) -> int:
        """Sequences that the KV cache of the suggestion holds."""
        return self.kv_tokens // self.serving.sequence

    def describe(self) -> str:
        """Write the arithmetic as a table in GiB, then the suggestion, then what would go wrong."""
        total, kv_tokens = self.device.total_bytes, self.kv_tokens or self.given_tokens
        lines = [f"{'memory of one GPU, GiB':<30}" + "".join(f"{moment:>10}" for moment in MOMENTS)]
        for item in self.items:
            if item.num_bytes:
                cells = "".join(_cell(item.num_bytes if moment in item.moments else 0) for moment in MOMENTS)
                lines.append(f"{item.owner:<8} {item.name:<21}{cells}   {item.formula}")
        if self.serving.takes_share:
            cells = "".join(_cell(self.peaks[moment] - _sum(self.items, moment)) for moment in MOMENTS)
            lines.append(f"{'server':<8} {'KV cache':<21}{cells}   {kv_tokens} tokens × {self.kv_bytes_per_token} B")
        lines.append(f"{'sum':<30}" + "".join(_cell(self.peaks[moment]) for moment in MOMENTS))
        lines.append(f"{'of':<30}" + _cell(total) * len(MOMENTS))
        sequence, given = self.serving.sequence, self.serving.utilization
        if self.utilization is not None:
            server = _sum((item for item in self.items if item.owner == "server"), ROLLOUTS)
            lines.append(
                f"vllm_gpu_memory_utilization = {(server + kv_tokens * self.kv_bytes_per_token) / GIB:.1f} / "
                f"{total / GIB:.1f} = {self.utilization:.3f}: {kv_tokens} tokens, {self.sequences} sequences of "
                f"{sequence} (wanted: {self.wanted_tokens // sequence})."
            )
        elif given is not None and self.serving.takes_share:
            lines.append(f"No fraction fits; the KV cache above is that of the given {given:g}.")
        if given is not None and self.serving.takes_share:
            lines.append(f"Given: {given:g}, {self.given_tokens} tokens.")
        return "\n".join([*lines, *(f"Warning: {problem}" for problem in self.problems)])


def kv_bytes_per_token(model: ModelShape, serving: ServingShape) -> int:
    """Compute the bytes of keys and values of one token on one GPU: 2 · layers · heads · head_dim · bytes. Heads are
    split over the tensor-parallel ranks, and repeated when there are more ranks than heads."""
    heads = math.ceil(model.num_kv_heads / serving.tensor_parallel)
    return 2 * model.num_layers * heads * model.head_dim * serving.kv_bytes


def plan(model: ModelShape, training: TrainingShape, serving: ServingShape, device: DeviceMemory) -> MemoryPlan:
    """Add everything up. Pure."""
    if serving.in_process:
        return _in_process(model, training, serving, device)
    server = _server_items(model, serving)
    items = [*_device_items(serving, device), *server]
    if serving.shares_device:
        items += [*_trainer_items(model, training), *_sync_items(model, serving)]
    per_token = kv_bytes_per_token(model, serving)
    if serving.is_elsewhere:
        return _without_server(items, training, serving, device)
    fixed = sum(item.num_bytes for item in server)
    kv_moments = (ROLLOUTS,) if serving.sleep else MOMENTS
    room = min(device.total_bytes - _sum(items, moment) for moment in kv_moments)
    wanted = max(serving.context, serving.concurrency * serving.sequence)
    # In thousandths of the device: what is wanted, rounded up, and at most what there is, rounded down.
    least = math.ceil((fixed + wanted * per_token) / device.total_bytes * 1000)
    most = min(math.floor((fixed + room) / device.total_bytes * 1000), int(_MAX_UTILIZATION * 1000))
    suggested = min(least, most) / 1000

    def tokens(fraction: float) -> int:
        return max(0, int(fraction * device.total_bytes) - fixed) // per_token

    kv_tokens = tokens(suggested) if tokens(suggested) >= serving.context else 0
    given_tokens = kv_tokens if serving.utilization is None else tokens(serving.utilization)
    kv = (kv_tokens or given_tokens) * per_token
    result = MemoryPlan(
        items=tuple(items),
        device=device,
        serving=serving,
        utilization=suggested if kv_tokens else None,
        kv_bytes_per_token=per_token,
        kv_tokens=kv_tokens,
        given_tokens=given_tokens,
        wanted_tokens=wanted,
        peaks={moment: _sum(items, moment) + (kv if moment in kv_moments else 0) for moment in MOMENTS},
    )
    return replace(result, problems=tuple(_problems(result, _remedies(training, serving), kv_moments)))


def _in_process(model: ModelShape, training: TrainingShape, serving: ServingShape, device: DeviceMemory) -> MemoryPlan:
    """Return the plan of a GPU whose trainer samples with the weights that it trains."""
    from trl_gym.policy_server.transformers_engine.session import (
        BLOCK_SIZE,
        MAX_BATCH_TOKENS,
        EngineOptions,
        cache_blocks,
    )

    per_token, rollouts = kv_bytes_per_token(model, serving), frozenset((ROLLOUTS,))
    # One layer's tensors for the largest batch, and its logits in float32.
    batch = MAX_BATCH_TOKENS * (2 * (4 * model.hidden_size + 3 * model.intermediate_size) + 4 * model.vocab_size)
    batches = f"{MAX_BATCH_TOKENS} tokens, their layers and logits, estimated"
    items = [*_device_items(serving, device), *_trainer_items(model, training)]
    free = max(0, device.total_bytes - _sum(items, ROLLOUTS))  # when the cache is made
    items.append(Item("engine", "activations", batch, rollouts, batches))
    options = EngineOptions(serving.context, serving.concurrency)
    blocks, needed = cache_blocks(per_token, serving.kv_bytes, options, free)
    kv_tokens = blocks * BLOCK_SIZE
    items.append(Item("engine", "KV cache", kv_tokens * per_token, rollouts, f"{kv_tokens} tokens × {per_token} B"))
    alone = _without_server(items, training, serving, device)
    problems = alone.problems
    if needed > free:
        text = f"There is no room for keys and values of one sequence of {serving.context} tokens during rollouts: "
        room = f"{needed / GIB:.1f} GiB must be free, and {free / GIB:.1f} are."
        problems = (Problem(text + room, _remedies(training, serving)[ROLLOUTS]), *problems)
    return replace(
        alone,
        kv_bytes_per_token=per_token,
        kv_tokens=kv_tokens,
        given_tokens=kv_tokens,
        wanted_tokens=serving.concurrency * serving.sequence,
        problems=problems,
    )


def _without_server(
    items: Sequence[Item], training: TrainingShape, serving: ServingShape, device: DeviceMemory
) -> MemoryPlan:
    """Return the plan of a GPU on which no server has a share."""
    alone = tuple(item for item in items if item.owner != "server")
    peaks = {moment: _sum(alone, moment) for moment in MOMENTS}
    worst = max(MOMENTS, key=lambda moment: peaks[moment])
    fits, remedy = peaks[worst] <= device.total_bytes, _remedies(training, serving)[UPDATE]
    return MemoryPlan(
        items=alone, device=device, serving=serving, utilization=None, kv_bytes_per_token=0, kv_tokens=0,
        given_tokens=0, wanted_tokens=0, peaks=peaks,
        problems=() if fits else (Problem(_too_much(peaks, worst, device), remedy),),
    )  # fmt: skip


def _too_much(needed: Mapping[str, int], moment: str, device: DeviceMemory) -> str:
    has = device.total_bytes / GIB
    return f"{needed[moment] / GIB:.1f} GiB are needed during {moment} and the device has {has:.1f}."


def _device_items(serving: ServingShape, device: DeviceMemory) -> list[Item]:
    processes = 2 if serving.shares_device and serving.takes_share else 1
    reserve = int(_RESERVE * device.total_bytes)
    contexts = f"{processes} × {_CONTEXT_BYTES // MIB} MiB assumed"
    return [
        Item("device", "other programs", device.used_bytes, _ALL, "measured"),
        Item("device", "CUDA contexts", processes * _CONTEXT_BYTES, _ALL, contexts),
        Item("device", "reserve", reserve, _ALL, f"{_RESERVE:.0%} of the device"),
    ]


def _server_items(model: ModelShape, serving: ServingShape) -> list[Item]:
    """List what the given fraction holds beside the KV cache."""
    tp, width = serving.tensor_parallel, serving.weight_bytes
    awake = frozenset((ROLLOUTS, SYNC)) if serving.sleep else _ALL
    tokens, sequences = serving.max_num_batched_tokens, min(serving.max_num_seqs, serving.max_num_batched_tokens)
    # One layer's tensors for a batch of the largest size, and logits in float32, twice again while sampling.
    layer = tokens * (4 * model.hidden_size + 3 * model.intermediate_size // tp) * 2
    logits = 3 * 4 * sequences * model.vocab_size
    weights = f"{_count(model.num_params)} × {width:g} B" + (f" / {tp} GPUs" if tp > 1 else "")
    activations = f"{tokens} tokens, {sequences} sequences × {model.vocab_size} logits, estimated"
    return [
        Item("server", "weights", int(model.num_params * width) // tp, awake, weights),
        Item("server", "activations", layer + logits, awake, activations),
        Item("server", "CUDA graphs", _GRAPH_BYTES if serving.cuda_graphs else 0, _ALL, "assumed"),
    ]


def _trainer_items(model: ModelShape, training: TrainingShape) -> list[Item]:
    update, world, stage = frozenset((UPDATE,)), training.world_size, training.stage
    total, trainable, compute = model.num_params, training.trainable_params, training.compute_bytes

    def item(name: str, count: int, width: float, moments: frozenset[str], split_from: int = 4) -> Item:
        parts = world if stage >= split_from else 1
        formula = f"{_count(count)} × {width:g} B" + (f" / {parts} processes" if parts > 1 else "")
        return Item("trainer", name, int(count * width) // parts, moments, formula)

    tokens = f"{training.sequences} × {training.sequence_length} tokens × {model.num_layers} layers, estimated"
    tiles = f"tiles of {_TILE_TOKENS} × {_TILE_WORDS}; logits never exist as a whole"
    moments = update if training.offload_optimizer else _ALL
    items = [
        item("weights", total, training.weight_bytes, _ALL, 3),
        item("gradients", trainable, training.grad_bytes, _ALL if training.grads_kept else update, 2),
        item("optimizer state", trainable, training.optimizer_bytes, moments, 1),
        Item("trainer", "activations", activation_bytes(model, training), update, tokens),
        Item("trainer", "log-probabilities", logprob_bytes(model, training), update, tiles),
    ]
    if training.reference:
        items.append(item("reference model", total, training.weight_bytes, _ALL, 3))
    if stage == 0 and world > 1:  # kept between steps
        items.append(item("DDP buckets", trainable, training.grad_bytes, _ALL))
    if stage < 3 and training.weight_bytes > compute:
        # torch keeps casts of trained weights; those of frozen ones live as long as their layer's activations.
        kept = trainable == total or not training.checkpointing
        copied = total if kept else model.layer_params + model.head_params
        items.append(item("autocast copies", copied, compute, update))
    if stage == 3 and world > 1:
        # The layer that computes, the next one that is prefetched, embedding and head.
        items.append(item("gathered layers", 2 * model.layer_params + 2 * model.head_params, compute, update))
    if stage == 3:  # one at a time, to be sent: the head is the biggest
        items.append(item("gathered parameter", model.head_params, training.weight_bytes, frozenset((SYNC,))))
    return items


def _sync_items(model: ModelShape, serving: ServingShape) -> list[Item]:
    # vLLM builds each layer again before it copies it over the old one.
    rebuilt = int((model.layer_params + model.head_params) * serving.weight_bytes) // serving.tensor_parallel
    # Two buffers, or one and the server's copy of it; each holds the biggest tensor.
    head, buffers = 2 * int(model.head_params * serving.weight_bytes), serving.transfer_bytes
    what = "gym_weight_buffer_mb" if buffers >= head else "as big as the head: more than gym_weight_buffer_mb"
    return [
        Item("server", "layer being reloaded", rebuilt, frozenset((SYNC,)), "one layer and the head"),
        Item("trainer", "transfer buffers", max(buffers, head) if buffers else 0, frozenset((SYNC,)), what),
    ]


def activation_bytes(model: ModelShape, training: TrainingShape) -> int:
    """Estimate what the backward pass needs of one forward pass, with attention that keeps no scores (SDPA, flash).

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
    """Estimate TRL's tiled log-probabilities: one tile, the hidden states' gradient in float32, and, when the head is
    trained, the head's gradient in float32 (`ChunkedLogProbFunction.backward`)."""
    tokens = training.sequences * training.sequence_length
    tile = min(tokens, _TILE_TOKENS) * min(_TILE_WORDS, model.vocab_size) * training.compute_bytes
    trains_head = training.trainable_params >= model.num_params
    return tile + tokens * model.hidden_size * 4 + (model.head_params * 4 if trains_head else 0)


def _problems(result: MemoryPlan, remedies: Mapping[str, str], kv_moments: tuple[str, ...]) -> Iterator[Problem]:
    given, total, context = result.serving.utilization, result.device.total_bytes, result.serving.context
    needed = {moment: _sum(result.items, moment) for moment in MOMENTS}
    worst = max(kv_moments, key=lambda moment: needed[moment])
    per_token, remedy = result.kv_bytes_per_token, ""
    if result.utilization is None:
        missing = max(0, needed[worst] + context * per_token - total) / GIB
        text = f"There is no room for the KV cache of one sequence of {context} tokens: {missing:.1f} GiB are missing"
        yield Problem(f"{text} during {worst}.", remedies[worst])
    else:
        remedy = f"Set it to {result.utilization:.3f}, or `gym_gpu_memory` to 'auto'."
        for moment in (moment for moment in MOMENTS if moment not in kv_moments and needed[moment] > total):
            yield Problem(_too_much(needed, moment, result.device), remedies[moment])
    if given is None:
        return
    over = (needed[worst] + result.given_tokens * per_token - total) / GIB
    if result.given_tokens < context:
        text = f"`vllm_gpu_memory_utilization` {given:g} leaves {result.given_tokens} tokens of KV cache, fewer than"
        yield Problem(f"{text} one sequence of {context}: vLLM will refuse to start.", remedy)
    elif over > 0:
        text = f"`vllm_gpu_memory_utilization` {given:g} is {over:.1f} GiB more than fits during {worst}: the trainer"
        yield Problem(f"{text} will run out of memory.", remedy)


def _remedies(training: TrainingShape, serving: ServingShape) -> dict[str, str]:
    """Name the options that free memory at each moment, as far as they are not set."""
    shared = serving.shares_device and serving.takes_share
    sleep = "`vllm_enable_sleep_mode=True`" if shared and not serving.sleep else ""
    rollouts = (
        sleep,
        "`gym_offload_optimizer=True`" if serving.takes_share and not training.offload_optimizer else "",
        "a smaller `vllm_max_model_length`, fewer rollouts at a time (`gym_max_inflight`)",
        "" if serving.in_process else "more `vllm_tensor_parallel_size`",
        "`gym_server_devices` apart from training's" if shared else "",
    )
    update = (
        sleep,
        "" if training.checkpointing else "`gradient_checkpointing=True`",
        "a smaller `per_device_train_batch_size`" if training.sequences > 1 else "",
        "a smaller `max_completion_length`",
        "`optim='adamw_bnb_8bit'`" if training.optimizer_bytes > 2 else "",
        "FSDP2 or ZeRO-3 over several GPUs" if training.stage < 3 and not serving.in_process else "",
    )
    options = {ROLLOUTS: rollouts, SYNC: ("a smaller `gym_weight_buffer_mb`", *rollouts), UPDATE: update}
    return {moment: f"Try {', '.join(filter(None, names))}." for moment, names in options.items()}


def _sum(items: Iterable[Item], moment: str) -> int:
    return sum(item.num_bytes for item in items if moment in item.moments)


def _cell(num_bytes: int) -> str:
    return f"{num_bytes / GIB:>10.2f}" if num_bytes else f"{'·':>10}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e8 else f"{number / 1e6:.1f} M"


def this_device() -> DeviceMemory | None:
    """Measure the GPU of this process; None without CUDA. Call it before anything of the run is on the device."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved()
    return DeviceMemory(total_bytes=total, used_bytes=max(0, total - free - ours))


def try_estimate(
    args: GymGRPOConfig, model: str | PreTrainedModel, num_processes: int, device: DeviceMemory, **options: Any
) -> MemoryPlan | Problem:
    """Call `estimate`, and return the reason where it fails: a run does not depend on an estimate."""
    try:
        return estimate(args, model, num_processes, device, **options)
    except Exception as error:  # of transformers and PEFT, for architectures and configs of every kind; returned
        return Problem(
            f"The GPU memory of this run could not be estimated ({type(error).__name__}: {error}).",
            "Choose `vllm_gpu_memory_utilization` yourself.",
        )


def estimate(
    args: GymGRPOConfig,
    model: str | PreTrainedModel,
    num_processes: int,
    device: DeviceMemory,
    *,
    peft_config: Any = None,
    quantization_config: Any = None,
    environment: Mapping[str, str] = os.environ,
) -> MemoryPlan:
    """Plan for a server that the trainer starts itself, or, with `vllm_mode` 'server', for training alone.

    Args:
        model: As given to the trainer. Its parameters are counted on torch's `meta` device; nothing is loaded.
        peft_config: The adapter that the trainer will add.
        quantization_config: Configuration with which the trainer will quantize the model.
        environment: Variables by which `accelerate launch` says how the model is sharded.

    Raises:
        Exception: The model cannot be built, or is not a decoder of the usual kind.
    """
    from transformers import AutoConfig

    trusts = args.trust_remote_code
    config = AutoConfig.from_pretrained(model, trust_remote_code=trusts) if isinstance(model, str) else model.config
    num_params, trainable = count_params(config, model, peft_config, trust_remote_code=trusts)
    shape = ModelShape.from_config(config, num_params)
    context = args.vllm_max_model_length or getattr(config.get_text_config(), "max_position_embeddings", None)
    length = args.vllm_max_model_length or (args.max_completion_length or 0) + _ASSUMED_PROMPT
    is_adapter = trainable < num_params
    factor = args.gym_max_rows_factor if args.has_further_rows else 1.0
    training = TrainingShape(
        trainable_params=trainable,
        compute_bytes=_BYTES[args.serving_dtype],
        world_size=num_processes,
        sequences=math.ceil(args.per_device_train_batch_size * factor),
        sequence_length=length,
        checkpointing=bool(args.gradient_checkpointing),
        reference=bool(args.beta) and not is_adapter,
        grads_kept=args.gradient_accumulation_steps > args.steps_per_generation * args.num_iterations,
        offload_optimizer=args.gym_offload_optimizer,
        **_sharding(args, environment, _stored_bytes(args, model, config, shape, quantization_config), is_adapter),
    )
    if args.vllm_mode == "colocate" and started_engine(args) == "transformers":
        serving = ServingShape(
            context=context or length,
            rollout_tokens=length,
            concurrency=args.rollouts_in_flight(1),  # of this process
            kv_bytes=max(1, int(training.weight_bytes)),
            utilization=None,
            in_process=True,
        )
    else:
        serving = _serving(args, device, context or length, length, num_processes)
    return plan(shape, training, serving, device)


def count_params(
    config: Any, model: str | PreTrainedModel, peft_config: Any = None, *, trust_remote_code: bool = False
) -> tuple[int, int]:
    """Count all parameters and those that are trained (tied ones once), without a byte of memory for them."""
    if not isinstance(model, str) and hasattr(model, "peft_config"):
        base = sum(p.numel() for p in model.get_base_model().parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return base - sum(p.numel() for n, p in model.named_parameters() if model.prefix in n), trained
    kind = None if isinstance(model, str) else type(model)
    empty = compat.empty_model(config, kind, trust_remote_code=trust_remote_code)
    total = sum(parameter.numel() for parameter in empty.parameters())
    if peft_config is None:
        return total, total
    from peft import get_peft_model

    adapted = get_peft_model(empty, copy.deepcopy(peft_config), autocast_adapter_dtype=False)
    return total, sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _stored_bytes(
    args: GymGRPOConfig, model: str | PreTrainedModel, config: Any, shape: ModelShape, asked: Any
) -> float:
    """Return the bytes per parameter in the trainer, on average: linear layers of a quantized base are smaller."""
    options = args.model_init_kwargs or {}
    if isinstance(model, str):
        # TRL's own default is float32 (`create_model_from_path`); "auto" is what the checkpoint says.
        dtype = options.get("dtype", "float32")
        dtype = getattr(config, "dtype", None) if dtype == "auto" else dtype
    else:
        dtype = model.dtype
    full = _BYTES.get(str(dtype).removeprefix("torch."), 4)
    quantization = asked or options.get("quantization_config") or getattr(config, "quantization_config", None)
    if isinstance(quantization, Mapping):
        four, eight = (quantization.get(f"load_in_{bits}bit") for bits in (4, 8))
    else:
        four, eight = (getattr(quantization, f"load_in_{bits}bit", False) for bits in (4, 8))
    if not four and not eight:
        return full
    small = _NF4_BYTES if four else 1.0
    kept = shape.head_params * (1 if getattr(config, "tie_word_embeddings", True) else 2)
    return (kept * full + (shape.num_params - kept) * small) / shape.num_params


def _sharding(args: GymGRPOConfig, environment: Mapping[str, str], stored: float, is_adapter: bool) -> dict[str, Any]:
    """Return the stage, and what weights, gradients and optimizer take per parameter (fields of a `TrainingShape`), of
    weights that are loaded with `stored` bytes each; PEFT keeps an adapter in float32."""
    mixed = args.bf16 or args.fp16
    trained = 4 if is_adapter else max(2, int(stored))
    stage = 0
    if args.deepspeed or environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        zero = args.deepspeed.get("zero_optimization", {}) if isinstance(args.deepspeed, Mapping) else {}
        stated = zero.get("stage", 2)  # accelerate's default
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", stated if isinstance(stated, int) else 2))
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


def optimizer_bytes(optim: str, stored: int) -> float:
    """Return the device memory of the state per trained parameter, by the name that transformers gives the optimizer.

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
    rollouts = args.rollouts_in_flight(num_processes)
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
        utilization=None if args.gym_gpu_memory == "auto" else args.vllm_gpu_memory_utilization,
        shares_device=args.gym_server_devices is None,
        is_elsewhere=args.vllm_mode == "server",
    )
