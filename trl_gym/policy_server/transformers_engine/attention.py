"""Attend, in transformers' continuous batching, to the keys of one's own request only, in the trainer's precision.

transformers packs the queries of all requests into one row, and its cache returns the keys of all of them in another.
Its own `paged|sdpa` lets every query attend to every key under a mask, whose size (tokens of a batch × tokens of the
cache) and cost grow with the square of the number of requests. Here requests that decode are one padded batch, and a
prompt is computed by itself.

It is also where precisions meet. Under autocast the weights are in float32 and what is computed from them in bfloat16,
or in both: a rotary embedding in float32 makes queries and keys float32 beside values in bfloat16. The cache has the
precision of the weights and refuses any other. So keys and values are widened when they are stored, which loses
nothing, and what is attended to has the precision that the trainer's own forward pass has at this place.

Releases of transformers differ in who stores keys and values: until 5.23 the attention, from 5.24 on the model's code.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "trl_gym"


def attend(model: PreTrainedModel) -> None:
    """Let a model compute attention over a paged cache, until it is set to another one.

    By flash attention, if it was loaded with that and its weights have a precision for it; else by `paged_attention`.
    """
    before = model.config._attn_implementation
    has_prefixes = "paged|sdpa" in AttentionInterface()  # until 5.18: a paged attention has a name of its own
    if "flash" in before and model.dtype in (torch.bfloat16, torch.float16):
        if has_prefixes:
            model.set_attn_implementation(f"paged|{before.removeprefix('paged|')}")
        return
    # transformers 5.19 and later compute a mask, of the size of a batch times the cache, unless the name has `flash`
    # in it, and would then load a kernel of that name if it were not set on the configuration itself.
    name = f"paged|{NAME}" if has_prefixes else f"{NAME}_flash"
    AttentionInterface.register(name, paged_attention)
    model.config._attn_implementation = name


def widen(cache: Any) -> None:
    """Let a paged cache take keys and values of any precision that its own one holds, until it is gone."""
    if "update" in vars(cache):
        return
    store, own = type(cache).update, weakref.proxy(cache)  # no circle: its memory is free when a session ends

    def update(key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return store(own, key_states.to(own.dtype), value_states.to(own.dtype), *args, **kwargs)

    cache.update = update


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer, as transformers calls it.

    Args:
        query: `[1, H, Q, D]`, the queries of all requests one after another.
        key: `[1, K, Q, D]` of the same tokens, for K key heads; with those of earlier tokens where there is no cache.
        value: `[1, K, Q, V]` of the same tokens as the keys.
        attention_mask: None: transformers makes a mask for its own implementations alone.
        scaling: Factor of the scores; `D ** -0.5` when not given.
        options: `read_index`, `write_index`, `cu_seq_lens_q`, `cu_seq_lens_k` of the batch; the layer's
            `sliding_window`, in tokens; `cache`, the paged one, where it is not the model's own code that stores keys
            and values and gets them back with those of earlier tokens.

    Returns:
        `[1, Q, H, V]`, and None for the weights.

    Raises:
        ValueError: It is called by a forward pass that is not the engine's, or the layer caps its scores or has sinks.
    """
    if "cu_seq_lens_k" not in options:
        raise ValueError(
            f"`{NAME}` is the attention of the engine that samples; park it before any other forward pass"
        )
    if unknown := [name for name in ("softcap", "s_aux") if options.get(name) is not None]:
        raise ValueError(f"`{NAME}` does not compute attention with `{unknown[0]}`")
    keys, values = _stored(module, key, value, options)
    window = options.get("sliding_window", getattr(module, "sliding_window", None))  # Mistral's layers have none
    lengths_k = options["cu_seq_lens_k"]
    if isinstance(lengths_k, dict):  # of a model with both kinds of layers
        lengths_k = lengths_k["sliding_attention" if window else "full_attention"]
    num_queries, num_keys = options["cu_seq_lens_q"].diff().tolist(), lengths_k.diff().tolist()
    queries = query[0].transpose(0, 1).split(num_queries)  # [q, H, D] each
    pairs = list(zip(keys.to(query.dtype).split(num_keys), values.to(query.dtype).split(num_keys), strict=True))
    single = [index for index, number in enumerate(num_queries) if number == 1]
    outputs: list[torch.Tensor] = [query.new_empty(0)] * len(queries)
    if single:
        decoded = _decode(
            torch.stack([queries[index] for index in single]), [pairs[index] for index in single], scaling
        )
        if len(single) == len(queries):
            return decoded.unsqueeze(0), None
        for index, output in zip(single, decoded.split(1), strict=True):
            outputs[index] = output
    for index, one in enumerate(queries):
        if len(one) > 1:
            outputs[index] = _prefill(one, *pairs[index], scaling, window)
    return torch.cat(outputs).unsqueeze(0), None


def _stored(
    module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[k, K, D]` and `[k, K, V]`, for one request after another: its earlier tokens and the new ones.

    `cu_seq_lens_k` of the options becomes that of the layer where the cache says so.
    """
    cache = options.get("cache")
    if cache is not None and not _takes_options(cache.__class__):
        stored = {"read_index": options["read_index"], "write_index": options["write_index"]}
        keys, values = cache.update(key, value, module.layer_idx, **stored)
        return keys, values
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx, kwargs=options)
    elif isinstance(options["cu_seq_lens_k"], dict):  # the cache replaces it when it stores
        raise ValueError(f"the code of {type(module).__name__} does not store keys and values in a paged cache")
    return key[0].transpose(0, 1), value[0].transpose(0, 1)


@functools.cache
def _takes_options(kind: Any) -> bool:
    return "kwargs" in inspect.signature(kind.update).parameters


def _decode(
    queries: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], scaling: float | None
) -> torch.Tensor:
    """Attend with one query per request, `[B, 1, H, D]`, to all of its keys. Return `[B, H, V]`."""
    keys = torch.nn.utils.rnn.pad_sequence([key for key, _ in pairs], batch_first=True).transpose(1, 2)
    values = torch.nn.utils.rnn.pad_sequence([value for _, value in pairs], batch_first=True).transpose(1, 2)
    batch, key_heads, longest, _ = keys.shape
    # The heads that share a key head are taken for as many queries of it: nothing is repeated.
    grouped = queries.reshape(batch, key_heads, -1, queries.shape[-1])
    lengths = [len(key) for key, _ in pairs]
    mask = None
    if min(lengths) < longest:
        places = torch.arange(longest, device=queries.device)
        mask = (places < torch.tensor(lengths, device=queries.device)[:, None])[:, None, None]
    attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return attended.reshape(batch, queries.shape[2], -1)


def _prefill(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attend with the newest tokens of one request, `[q, H, D]`, to its keys, `[k, K, D]`. Return `[q, H, V]`."""
    num_queries, num_keys = len(queries), len(keys)
    mask = None
    if num_keys > num_queries or (window and num_keys > window):
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device)
        mask = ones.tril(num_keys - num_queries)
        if window:
            mask &= ones.triu(num_keys - num_queries - window + 1)
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in (queries, keys, values))
    shared = query.shape[1] != key.shape[1]
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
    )
    return attended[0].transpose(0, 1)
