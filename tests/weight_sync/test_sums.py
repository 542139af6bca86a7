"""Which parameters differ: sums that add up over packing and sharding, and honest answers where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.policy_server.engine.worker import WeightSums, sums_of, value_sum
from trl_gym.weight_sync.sums import HeldWeights, combine, explain, explain_mismatch, held_sums, sent_sums

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
SENT = {"embed.weight": 10, "l.q_proj.weight": 1, "l.k_proj.weight": 2, "l.v_proj.weight": 4, "norm.weight": 7}
HELD = {"embed.weight": 10, "embed.weight in lm_head": 10, "l.qkv_proj.weight": 7, "norm.weight": 7}


@given(st.lists(st.floats(width=16, allow_nan=False), min_size=2, max_size=50), st.data())
@settings(max_examples=30)
def test_sums_add_up_over_parts_in_any_order(values: list[float], data: Any) -> None:
    whole = torch.tensor(values, dtype=torch.bfloat16)
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))
    cut = data.draw(st.integers(1, len(values) - 1))
    parts = whole[order].split([cut, len(values) - cut])
    assert value_sum(parts[0]) + value_sum(parts[1]) == value_sum(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_is_noticed_and_the_sign_of_zero_is_not(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4).t()
    other = tensor.clone()
    other[0, 0] = torch.nextafter(other[0, 0], torch.tensor(2.0, dtype=dtype))
    assert value_sum(tensor) != value_sum(other)
    assert value_sum(torch.tensor([-0.0], dtype=dtype)) == 0


def test_equal_weights_point_to_the_computation() -> None:
    (line,) = explain_mismatch(SENT, HeldWeights(HELD, PACKED))
    assert "All 4 parameters that can be compared are bit for bit what was sent" in line


def test_what_differs_is_named() -> None:
    (line,) = explain_mismatch(SENT, HeldWeights(HELD | {"l.qkv_proj.weight": 8, "norm.weight": 0}, PACKED))
    assert line == "Not what was sent (2 of 4): l.qkv_proj.weight, norm.weight."


def test_a_stale_copy_is_told_from_a_parameter_that_did_not_arrive() -> None:
    (stale,) = explain_mismatch(SENT, HeldWeights(HELD | {"embed.weight in lm_head": 3}, PACKED))
    assert stale == "Arrived, but a layer computes with an old copy of it: embed.weight in lm_head."
    lines = explain_mismatch(SENT, HeldWeights(HELD | {"embed.weight": 3, "embed.weight in lm_head": 3}, PACKED))
    assert lines == ["Not what was sent (2 of 4): embed.weight, embed.weight in lm_head."]


def test_what_cannot_be_seen_is_said() -> None:
    held = {name: value for name, value in HELD.items() if name != "l.qkv_proj.weight"}
    equal, unseen = explain_mismatch(SENT, HeldWeights(held, PACKED, frozenset(["l.qkv_proj.weight"])))
    assert equal.startswith("All 3 parameters")
    assert unseen.startswith("Unknown for 3 of 5 parameters (the server keeps them in a form")
    assert "l.q_proj.weight" in unseen
    (other_names,) = explain_mismatch(SENT, HeldWeights({"model.embed": 1}, PACKED))
    assert "for 5 of 5 parameters (the server names them otherwise)" in other_names


def test_what_was_never_sent_is_named() -> None:
    lines = explain_mismatch(SENT, HeldWeights(HELD | {"lm_head.weight": 5}, PACKED))
    assert "Held by the server and never sent: lm_head.weight." in lines


def test_many_names_are_cut() -> None:
    sent = {f"p{i}": i for i in range(20)}
    (line,) = explain_mismatch(sent, HeldWeights(dict.fromkeys(sent, -1)))
    assert line.startswith("Not what was sent (20 of 20): p0, ") and line.endswith(" and 12 more.")


@pytest.mark.parametrize("name", list(HELD))
@given(change=st.integers(-100, 100).filter(bool))
@settings(max_examples=10)
def test_every_difference_is_found_where_it_is(name: str, change: int) -> None:
    lines = explain_mismatch(SENT, HeldWeights(HELD | {name: HELD[name] + change}, PACKED))
    assert name in lines[0] and "bit for bit" not in lines[0]


# -- what the server says ---------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A layer as vLLM's: a shard of a weight, and how many ranks share it."""

    def __init__(self, weight: torch.Tensor, *, tp_size: int, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.tp_size = tp_size
        if bias is not None:
            self.bias = torch.nn.Parameter(bias)
            self.input_is_parallel = True


def packed_away(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """As on a CPU: the parameter is empty, the layer multiplies with something else."""
    layer = Linear(torch.empty(0, dtype=weight.dtype), tp_size=1, bias=bias)
    layer.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, weight, bias)
    layer.input_size = weight.shape[1]
    return layer


def test_shards_of_several_workers_add_up_to_what_was_sent() -> None:
    torch.manual_seed(0)
    q, down, norm, bias = torch.randn(8, 4), torch.randn(4, 8), torch.randn(4), torch.randn(4)
    sent = {
        "q.weight": value_sum(q),
        "down.weight": value_sum(down),
        "down.bias": value_sum(bias),
        "norm.weight": value_sum(norm),
    }

    def worker(rank: int) -> dict[str, Any]:
        model = torch.nn.ModuleDict(
            {
                "q": Linear(q.chunk(2)[rank].clone(), tp_size=2),
                "down": Linear(down.chunk(2, dim=1)[rank].clone(), tp_size=2, bias=bias.clone()),
                "norm": torch.nn.LayerNorm(4, bias=False),
            }
        )
        model["norm"].weight.data.copy_(norm)
        return sums_of(model, torch.float32) | {"packed": {}}

    held = combine([worker(0), worker(1)])
    assert held.sums == sent and held.unseen == frozenset()
    broken = worker(1)
    broken["whole"]["norm.weight"] += 1  # the copies of a whole parameter have diverged
    (line,) = explain_mismatch(sent, HeldWeights(combine([worker(0), broken]).sums))
    assert line == "Not what was sent (1 of 4): norm.weight."


def test_repeated_heads_count_once() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 4), torch.randn(2, 4), torch.randn(2, 4)  # four ranks, two query heads each, one of k, v
    sent = {"q_proj.weight": value_sum(q), "k_proj.weight": value_sum(k), "v_proj.weight": value_sum(v)}
    workers = []
    for rank in range(4):
        layer = Linear(torch.cat([q.chunk(4)[rank], k, v]), tp_size=4)
        layer.num_kv_head_replicas, layer.tp_rank, layer.num_heads, layer.head_size = 4, rank, 1, 2
        workers.append(sums_of(torch.nn.ModuleDict({"qkv_proj": layer}), torch.float32) | {"packed": PACKED})
    assert "bit for bit" in explain_mismatch(sent, HeldWeights(combine(workers).sums, PACKED))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_a_cpu_has_packed_away_is_read_from_what_the_layer_computes(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 300).to(dtype)
    found = sums_of(torch.nn.ModuleDict({"up": packed_away(weight)}), dtype)
    assert found["whole"] == {"up.weight": value_sum(weight)}


def test_a_copy_of_a_tied_head_is_reported_beside_the_parameter() -> None:
    weight = torch.randn(16, 8)
    embed, head = Linear(weight, tp_size=1), Linear(weight, tp_size=1)
    head.weight = embed.weight
    old = weight.clone() + 1
    head.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, old, bias)
    found = sums_of(torch.nn.ModuleDict({"embed": embed, "lm_head": head}), torch.float32)
    assert found["whole"] == {"embed.weight": value_sum(weight), "embed.weight in lm_head": value_sum(old)}


def test_quantized_and_wrapped_parameters() -> None:
    layer = Linear(torch.zeros(4, 4), tp_size=1)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model = torch.nn.ModuleDict(
        {"up": layer, "wrapped": torch.nn.ModuleDict({"base_layer": torch.nn.Linear(2, 2, bias=False)})}
    )
    found = sums_of(model, torch.float32)
    assert found["unseen"] == ["up.weight"]
    assert list(found["whole"]) == ["wrapped.weight"]  # vLLM wraps layers of models with adapters


class Worker(WeightSums):
    def __init__(self, model: torch.nn.Module) -> None:
        self.model_runner = type("Runner", (), {"get_model": lambda _: model})()


class Client:
    """Answers as the route does, or with an error."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def collective_rpc(self, method: str, args: list[str]) -> list[Any]:
        if isinstance(self._answer, Exception):
            raise self._answer
        return [getattr(self._answer, method)(*args)]


def test_from_the_stream_to_the_sentence() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    sent = sent_sums((name, parameter.detach().bfloat16()) for name, parameter in model.named_parameters())
    client = Client(Worker(model))
    assert "All 2 parameters" in explain(client, sent, torch.bfloat16)[0].text
    with torch.no_grad():
        model[0].bias.add_(1)
    assert explain(client, sent, torch.bfloat16)[0].text == "Not what was sent (1 of 2): 0.bias."


def test_a_server_that_cannot_tell() -> None:
    without = Client(PolicyResponseError("Method 'trl_gym_weight_sums' is not implemented.", 500))
    assert held_sums(without, torch.float32) is None
    assert held_sums(Client(PolicyResponseError("Not Found", 404)), torch.float32) is None
    assert "--worker-extension-cls" in explain(without, SENT, torch.float32)[0].remedy
    broken = Client(PolicyResponseError("out of memory", 500))
    with pytest.raises(PolicyServerError, match="out of memory"):
        held_sums(broken, torch.float32)
    assert "could not be found out: out of memory" in explain(broken, SENT, torch.float32)[0].text
