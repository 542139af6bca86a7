"""Sample from a model that is trained elsewhere, for a time: from its first request until the model is wanted back.

A session is one `ContinuousBatchingManager` of transformers. It lives between two changes of weights at most, since a
manager remembers keys and values of old prompts and has no way to forget them; its end also frees their memory. While
it lives, the model computes attention over a paged cache and is in eval mode, and no other forward pass works.
Afterwards attention is what it was, and each submodule in train or eval mode, as when the session began.

It computes with the threads that the trainer has: torch splits no operation that is too small for it, and 128 requests
of the quickstart's policy cost the same CPU time with one thread and with two (`OMP_WAIT_POLICY=PASSIVE`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.tensor import DTensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_gym.compat import engine_problem
from trl_gym.errors import ConfigError, UnsupportedVersionError
from trl_gym.policy_server.transformers_engine import attention

logger = logging.getLogger(__name__)

BLOCK_SIZE = 32  # tokens
_BLOCK_OPTION = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # until 5.17
MAX_BATCH_TOKENS = 2048  # of one forward pass
_SPARE_BLOCKS = 4  # transformers allocates some ahead
_SHARE_OF_HOST = 0.25  # of what the operating system says is free: others use it too
_LEFT_BEHIND_S = 1.0  # for a thread that hangs to end after all
_FROZEN_S = 30.0  # nobody has looked for so long, as is done each second: none of this process's threads ran
_NEITHER = 0.5  # a value for which transformers makes a processor that each request then gives its own


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine."""

    max_model_len: int  # tokens of prompt and completion together
    max_concurrency: int = 256  # requests that are sampled at once; others wait for their turn
    # Precision of the trainer's forward pass, `accelerator.mixed_precision`; None where it is that of the weights.
    autocast: torch.dtype | None = None
    kv_share: float = 0.5  # share of a device's free memory that keys and values may take
    hang_timeout_s: float = 300.0  # for a forward pass; a thread that takes longer counts as dead


def sampled_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model in what a trainer holds: without DDP, accelerate's and PEFT's wrappers.

    Adapters stay where they are, active and unmerged.

    Raises:
        ConfigError: It cannot be sampled from in this process.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters()) or any(
        "FullyShardedDataParallel" in type(module).__name__ for module in model.modules()
    ):
        raise ConfigError(
            "`gym_engine` is 'transformers' and the model is sharded (FSDP, DeepSpeed ZeRO-3 or tensor parallel): no "
            "process holds all of its weights.",
            "Train with DDP, or set `gym_engine` to 'vllm'.",
        )
    prompts = [name for name, one in getattr(model, "peft_config", {}).items() if one.is_prompt_learning]
    if prompts:
        raise ConfigError(
            f"`gym_engine` is 'transformers' and the adapter {prompts[0]!r} learns prompts, which are no weights.",
            "Use LoRA, or set `gym_engine` to 'vllm'.",
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel) or not hasattr(base, "init_continuous_batching"):
        raise ConfigError(
            f"`gym_engine` is 'transformers' and the model is a {type(base).__name__}, which transformers cannot "
            "sample from by continuous batching.",
            "Set `gym_engine` to 'vllm'.",
        )
    if (problem := engine_problem()) is not None:
        raise UnsupportedVersionError(problem.text, problem.remedy)
    _check_attention(base)
    return base


def _check_attention(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    problem = f"layers of the kind {sorted(kinds)[0]!r}" if kinds else ""
    if not model.is_backend_compatible():
        problem = "attention of its own"
    elif getattr(config, "kv_lora_rank", None):
        problem = "compressed keys and values"
    elif getattr(config, "multi_query", False):
        problem = "one head of keys and values for all"
    elif getattr(config, "attn_logit_softcapping", None):
        problem = "capped attention scores"
    elif any(hasattr(module, "sinks") for module in model.modules()):
        problem = "attention sinks"
    elif config is not model.config and getattr(model.config, "vision_config", None) is not None:
        problem = "a part for images"
    if problem:
        raise ConfigError(
            f"`gym_engine` is 'transformers' and a {type(model).__name__} has {problem}, which it cannot sample with.",
            "Set `gym_engine` to 'vllm'.",
        )


def check_positions(config: PretrainedConfig, max_model_len: int) -> None:
    """Refuse positions that a model turns otherwise once a longer sequence is computed beside them: keys in the cache
    keep the old turn, and the longest sequence of a trainer's batch is another than the engine's.

    Args:
        config: Of the model.
        max_model_len: Tokens of prompt and completion together.

    Raises:
        ConfigError: Sequences of this length would change them.
    """
    config = config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    for one in [given, *(value for value in given.values() if isinstance(value, dict))]:  # by kind of layer, or one
        kind = str(one.get("rope_type", ""))
        own = getattr(config, "max_position_embeddings", None)
        longest = one.get("original_max_position_embeddings") if kind == "longrope" else own
        if (kind == "longrope" or "dynamic" in kind) and longest is not None and max_model_len > longest:
            raise ConfigError(
                f"`gym_engine` is 'transformers', the context is {max_model_len:,} tokens, and with sequences of more "
                f"than {longest:,} the model turns the positions of all that are computed beside them otherwise "
                f"(`rope_type` {kind!r}): what is sampled would not be what is trained.",
                f"Set `vllm_max_model_length` (of `trl-gym serve`, `--max-model-len`) to at most {longest}.",
            )


def num_blocks(model: PreTrainedModel, options: EngineOptions, free_bytes: int) -> int:
    """Return of how many blocks the cache is: as many as all requests could need, or as memory allows.

    Args:
        model: The model.
        options: Of the engine.
        free_bytes: Memory of its device that is free.

    Raises:
        ConfigError: Not even one request of the greatest length fits.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    fitting, needed = cache_blocks(per_token, model.dtype.itemsize, options, free_bytes)
    if needed > free_bytes:
        raise ConfigError(
            f"`gym_engine` 'transformers' may take {free_bytes / 1e9:.1f} GB of memory, and keys and values of a "
            f"rollout of {options.max_model_len} tokens need {needed / 1e9:.1f} GB.",
            "Lower `vllm_max_model_length`, or free memory for the engine.",
        )
    return fitting


def cache_blocks(per_token: int, width: int, options: EngineOptions, free_bytes: int) -> tuple[int, int]:
    """Return the number of blocks, and how many bytes must be free for one request of the greatest length.

    Args:
        per_token: Bytes of keys and values of one token.
        width: Bytes of one of their elements.
        options: Of the engine.
        free_bytes: Memory of the device that is free.
    """
    # transformers reserves a mask as well, of the precision of the weights, when it checks whether memory suffices.
    block = (per_token + MAX_BATCH_TOKENS * width) * BLOCK_SIZE
    one = math.ceil(options.max_model_len / BLOCK_SIZE) + _SPARE_BLOCKS
    affordable = int(free_bytes * options.kv_share) // block
    return min(affordable, one * options.max_concurrency), math.ceil(one * block / options.kv_share)


def free_memory(device: torch.device) -> int:
    """Return how many bytes of a device may be taken. Of a host's memory that is a part, and what its page cache holds
    counts as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(available_on_host() * _SHARE_OF_HOST)


def available_on_host(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes of the host's memory new allocations can get, within the limit of a container.

    Args:
        cgroup: Folder of this process's control group, version 2.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        [kilobytes] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        available = int(kilobytes) * 1024
    except (OSError, ValueError):  # no Linux: all that the machine has
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        numbers = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such folder, or the limit is "max"
        return available
    return max(0, min(available, limit - used + int(numbers.get("inactive_file", 0))))


def turn_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token ids that end an answer: those of the generation config, as in vLLM, and the tokenizer's."""
    told = getattr(model.generation_config, "eos_token_id", None)
    ids = told if isinstance(told, list) else [told]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put all submodules into eval mode for a while; each gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # not `model.train()`: that also reaches what is kept in eval mode
            module.training = training


@contextmanager
def _old_objects_uncollected() -> Iterator[None]:
    """Leave what there is already out of garbage collections: transformers makes two when a manager stops, each of
    which walks through everything that torch and transformers have imported. The cache does not need them."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def autocast_of(model: PreTrainedModel, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which the trainer's forward pass runs."""
    device = model.device.type
    return torch.autocast(device, dtype=dtype) if dtype is not None else torch.autocast(device, enabled=False)


class Session:
    """Sampling from one state of the weights. It begins when it is made.

    Args:
        model: What `sampled_model` returned.
        options: Of the engine.
        filters: Which of `"top_k"` and `"top_p"` requests may set, beside the temperature.

    Attributes:
        filters: As given.
        stopping: Whether `stop` was called: what has not ended by then is not an error.
        aborting: Whether requests that have not ended by then end with what they have.
    """

    def __init__(self, model: PreTrainedModel, options: EngineOptions, filters: Collection[str] = ()) -> None:
        self.filters = frozenset(filters)
        self.stopping = False
        self.aborting = False
        self._model, self._options = model, options
        self._running: dict[str, _Running] = {}
        self._precision: list[torch.autocast] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._before = model.config._attn_implementation
        self._alive_at = time.monotonic()  # when the thread was last seen at work, or got some
        self._looked_at = self._alive_at  # whether it hangs
        self._is_hung = False
        config = ContinuousBatchingConfig(
            **{_BLOCK_OPTION: BLOCK_SIZE},
            num_blocks=num_blocks(model, options, free_memory(model.device)),
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_requests_per_batch=min(options.max_concurrency, MAX_BATCH_TOKENS),
            max_memory_percent=1.0,
            return_logprobs=True,
            per_request_processors=True,
            # Both gain on a GPU what their setting up costs at every park; a request that is cancelled while two
            # batches are in flight ends the thread of an asynchronous manager.
            use_cuda_graph=False,
            use_async_batching=False,
        )
        self._modes = in_eval_mode(model)
        self._modes.__enter__()
        try:
            attention.attend(model)
            self._hooks += [
                model.register_forward_pre_hook(self._enter_precision, with_kwargs=True),
                model.register_forward_hook(self._leave_precision, always_call=True),
            ]
            if (
                model.device.type == "cuda"
            ):  # the manager's stream does not wait for what changes the weights on others
                torch.cuda.synchronize(model.device)
            self._manager = model.init_continuous_batching(_generation_config(self.filters), config)
            self._manager.start()
        except BaseException:
            self._restore()
            raise

    def submit(
        self, name: str, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Collection[int], **sampling: float
    ) -> asyncio.Future[Any]:
        """Begin to sample. Called from the event loop that waits for it.

        Args:
            name: Of the request.
            prompt_ids: `[T]`.
            max_tokens: At most sampled.
            stop_ids: Tokens of which the first one that is sampled is the last token.
            sampling: `temperature`, `top_k`, `top_p`; the latter two if `filters` has them.

        Returns:
            A future of transformers' `GenerationOutput`, or of None where `stop` came before anything was sampled.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._running:
            self._alive_at = self._looked_at = time.monotonic()
        self._running[name] = _Running(future, loop)

        def answer(output: Any) -> None:
            if output.is_finished():
                self._answer(name, output)

        self._manager.register_result_handler(name, answer)
        added = self._manager.add_request(
            list(prompt_ids),
            request_id=name,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(stop_ids) or -1,
            record_timestamps=True,
            **sampling,
        )
        if added is None:  # the thread has ended: transformers logs it, and tells nobody else
            self._answer(name, None)
        return future

    def cancel(self, name: str) -> None:
        """Abort a request that nobody waits for; its blocks of the cache are free after the forward pass that runs."""
        if self._running.pop(name, None) is not None:
            self._manager.cancel_request(name)

    @property
    def has_died(self) -> bool:
        """Whether the thread that samples has ended by itself, or hangs."""
        if self.stopping:
            return False
        has_ended = not self._manager.is_running() or self._status.local_status != self._status.DONT_STOP
        return has_ended or self._hangs

    @property
    def _hangs(self) -> bool:
        """Whether a forward pass takes too long. Once it is so, it stays so: its requests are given up then."""
        now = time.monotonic()
        if now - self._looked_at > _FROZEN_S:
            self._alive_at = now
        self._looked_at = now
        silent_s = now - self._alive_at
        self._is_hung = self._is_hung or (bool(self._running) and silent_s > self._options.hang_timeout_s)
        return self._is_hung

    @property
    def cause(self) -> str:
        """What the thread that samples has ended of."""
        holder = self._status if hasattr(self._status, "fatal_error") else self._manager  # the manager until 5.16
        error = holder.fatal_error
        if error is None and self._manager.is_running():
            return f"it has ended no forward pass for {self._options.hang_timeout_s:g} s (`gym_server_hang_timeout`)"
        return "it ended without an error" if error is None else f"{type(error).__name__}: {error}"

    @property
    def _status(self) -> Any:
        return self._manager.background_thread_status

    def stop(self) -> None:
        """Stop sampling and give the model back. Called from any thread, once.

        What runs is answered with the tokens that it has. A thread that hangs is left behind, where it reads weights
        at most: if it ever goes on, it ends.
        """
        timeout_s = _LEFT_BEHIND_S if self._hangs else self._options.hang_timeout_s
        self.stopping = True
        try:
            with _old_objects_uncollected():
                self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)
        finally:
            if self._manager.is_running():
                logger.error("the thread that samples hangs in a forward pass; it is left behind")
            else:
                self._manager.destroy()
            self._model.destroy_cached_continuous_batching_manager()
            self._restore()
        for name, running in list(self._running.items()):  # transformers forgets what comes beside the stop
            if not running.loop.is_closed():
                running.loop.call_soon_threadsafe(self._answer, name, None)

    def _answer(self, name: str, output: Any) -> None:
        running = self._running.pop(name, None)
        if running is not None and not running.future.done():
            running.future.set_result(output)

    def _restore(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._model.config._attn_implementation != self._before:
            self._model.set_attn_implementation(self._before)
        self._modes.__exit__(None, None, None)

    def _enter_precision(self, _model: torch.nn.Module, _args: Any, options: dict[str, Any]) -> None:
        self._alive_at = time.monotonic()
        if (cache := options.get("cache")) is not None:  # else it is no forward pass of ours
            attention.widen(cache)
        self._precision.append(autocast_of(self._model, self._options.autocast))
        self._precision[-1].__enter__()

    def _leave_precision(self, *_: Any) -> None:
        self._alive_at = time.monotonic()
        if self._precision:  # else another hook has raised before ours
            self._precision.pop().__exit__(None, None, None)


@dataclass(frozen=True, slots=True)
class _Running:
    """A request that is sampled."""

    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


def _generation_config(filters: Collection[str]) -> GenerationConfig:
    """Return the configuration for which transformers makes the processors of temperature and filters."""
    return GenerationConfig(
        do_sample=True,
        temperature=_NEITHER,
        top_k=1 if "top_k" in filters else None,
        top_p=_NEITHER if "top_p" in filters else None,
        eos_token_id=-1,
        pad_token_id=0,
    )
