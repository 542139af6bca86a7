"""The engine's attention is that of each request by itself, whatever else is in the batch."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from trl_gym.policy_server.transformers_engine.attention import paged_attention, widen


class Cache:
    """Returns the keys of earlier tokens in front of the new ones, per request, as in transformers until 5.18."""

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]], num_new: list[int]) -> None:
        self.past, self.num_new, self.dtype = past, num_new, torch.float32
        self.stored: list[torch.dtype] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, read_index: Any, write_index: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.stored += [key_states.dtype, value_states.dtype]
        new = zip(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), strict=True)
        keys, values = [], []
        for key, value in self.past:
            own = [next(new) for _ in range(self.num_new[len(keys)])]
            keys.append(torch.cat([key, torch.stack([k for k, _ in own])]))
            values.append(torch.cat([value, torch.stack([v for _, v in own])]))
        return torch.cat(keys), torch.cat(values)


class NewerCache(Cache):
    """As transformers' cache does from 5.19 on: in the form of what is stored, and with the layer's own lengths."""

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"]["full_attention"]
        stored = super().update(key_states, value_states, layer_idx, None, None)
        return stored[0].transpose(0, 1)[None], stored[1].transpose(0, 1)[None]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """`[q, H, D]`, `[k, K, D]` → `[q, H, D]`, one head and one token at a time."""
    out = torch.zeros(*query.shape[:2], value.shape[-1])
    for token in range(len(query)):
        last = len(key) - len(query) + token
        seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // key.shape[1])
            weights = torch.softmax(key[seen, shared] @ query[token, head] * 0.5, dim=0)
            out[token, head] = weights @ value[seen, shared]
    return out


requests = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=5)  # past, new


@settings(max_examples=60)
@given(
    requests,
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["until 5.18", "until 5.23", "from 5.24 on"]),
    st.integers(0, 99),
)
def test_each_token_attends_to_the_earlier_ones_of_its_request(
    lengths: list[tuple[int, int]], heads: tuple[int, int], window: int | None, release: str, seed: int
) -> None:
    if window is not None:
        lengths = [(min(past, window - 1), new) for past, new in lengths]  # all that the cache keeps
    torch.manual_seed(seed)
    num_queries = sum(new for _, new in lengths)
    query = torch.randn(1, heads[0], num_queries, 4)
    key, value = torch.randn(2, 1, heads[1], num_queries, 4)
    past = [(torch.randn(n, heads[1], 4), torch.randn(n, heads[1], 4)) for n, _ in lengths]
    cache = (Cache if release == "until 5.18" else NewerCache)(past, [new for _, new in lengths])
    ends_q = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    ends_k = torch.tensor([0, *(past + new for past, new in lengths)]).cumsum(0)
    options: dict[str, Any] = {
        "cu_seq_lens_q": ends_q,
        "read_index": None,
        "write_index": None,
        "cu_seq_lens_k": {"full_attention": ends_k, "sliding_attention": ends_k},
    }
    given_keys, given_values = key, value
    if release == "from 5.24 on":  # the model's code has stored them
        given_keys, given_values = cache.update(key, value, 0, kwargs=options)  # type: ignore[call-arg]
    else:
        options["cache"] = cache
    module: Any = SimpleNamespace(layer_idx=0, sliding_window=window)
    output, weights = paged_attention(module, query, given_keys, given_values, None, scaling=0.5, **options)
    assert output.shape == (1, num_queries, heads[0], 4) and weights is None
    for index, (start, end) in enumerate(itertools.pairwise(ends_q.tolist())):
        new = slice(start, end)
        keys = torch.cat([past[index][0], key[0, :, new].transpose(0, 1)])
        values = torch.cat([past[index][1], value[0, :, new].transpose(0, 1)])
        expected = reference(query[0, :, new].transpose(0, 1), keys, values, window)
        torch.testing.assert_close(output[0, new], expected, atol=1e-5, rtol=1e-5)


def test_keys_have_the_precision_of_the_cache_and_the_answer_that_of_the_query() -> None:
    cache = Cache([(torch.randn(3, 1, 4), torch.randn(3, 1, 4))], [1])
    states = torch.randn(3, 1, 1, 1, 4, dtype=torch.bfloat16)
    ends = torch.tensor([0, 4])
    widen(cache)
    widen(cache)  # before each forward pass
    options = {"read_index": None, "write_index": None, "cu_seq_lens_q": torch.tensor([0, 1]), "cu_seq_lens_k": ends}
    output, _ = paged_attention(SimpleNamespace(layer_idx=0), *states, None, cache=cache, **options)  # type: ignore[arg-type]
    assert cache.stored == [torch.float32, torch.float32] and output.dtype == torch.bfloat16


def test_other_forward_passes_are_told_why_they_fail() -> None:
    with pytest.raises(ValueError, match="park it before any other forward pass"):
        paged_attention(SimpleNamespace(layer_idx=0), *torch.randn(3, 1, 1, 1, 4), None)  # type: ignore[arg-type]


def test_a_model_whose_code_stores_nothing_is_named() -> None:
    options: dict[str, Any] = {"cu_seq_lens_q": torch.tensor([0, 1]), "cu_seq_lens_k": {"full_attention": None}}
    with pytest.raises(ValueError, match="the code of SimpleNamespace does not store keys and values"):
        paged_attention(SimpleNamespace(layer_idx=0), *torch.randn(3, 1, 1, 1, 4), None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_it_does_not_compute_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: 50.0, "cu_seq_lens_k": None}
    with pytest.raises(ValueError, match=f"does not compute attention with `{name}`"):
        paged_attention(SimpleNamespace(layer_idx=0), *torch.randn(3, 1, 1, 1, 4), None, **options)  # type: ignore[arg-type]
