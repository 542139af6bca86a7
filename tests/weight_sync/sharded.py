"""What each of two ranks of `test_sharded.py` does: wrap a model, and compare its stream with that of the bare model.

python -m tests.fork_ranks 2 tests.weight_sync.sharded FOLDER [WRAPPING …]

Writes `FOLDER/rank-<r>.json`: what was found, by wrapping and case.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from tests.weight_sync.models import mixture, model, with_adapter
from trl_gym.errors import ConfigError, WeightSyncError
from trl_gym.weight_sync.source import AdapterSource, WeightSource
from trl_gym.weight_sync.sums import fingerprint

CASES: dict[str, Callable[[], nn.Module]] = {
    "tied": model,
    "untied, half precision": lambda: model(tied=False, dtype=torch.bfloat16),
    "adapter": lambda: with_adapter(model(), target_modules="all-linear", modules_to_save=["norm"]),
    "experts": mixture,
}


class Abandoned(Exception):
    """Of a consumer that stops in the middle."""


def ddp(policy: nn.Module) -> nn.Module:
    return DistributedDataParallel(policy)


def fsdp2(policy: nn.Module, mesh: Any = None) -> nn.Module:
    for module in policy.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    assert all(type(parameter.data).__name__ == "DTensor" for parameter in policy.parameters())
    return policy


def hybrid(policy: nn.Module) -> nn.Module:
    """FSDP2 whose shards are replicated: here every rank holds the only shard."""
    return fsdp2(policy, init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def fsdp1(policy: nn.Module, use_orig_params: bool = True) -> nn.Module:
    """As accelerate does: decoder layers are units, and so are an adapter's matrices."""

    def is_unit(module: nn.Module) -> bool:
        if type(module).__name__.endswith("DecoderLayer"):
            return True
        weight = module._parameters.get("weight")
        return hasattr(policy, "peft_config") and weight is not None and weight.requires_grad

    policy = FullyShardedDataParallel(
        policy,
        auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=is_unit),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )
    assert sum(isinstance(module, FullyShardedDataParallel) for module in policy.modules()) >= 3
    return policy


def fsdp1_flat(policy: nn.Module) -> nn.Module:
    return fsdp1(policy, use_orig_params=False)


def zero2(policy: nn.Module) -> nn.Module:
    return zero(policy, stage=2)


def zero3(policy: nn.Module) -> nn.Module:
    engine = zero(policy, stage=3)
    assert all(hasattr(parameter, "ds_tensor") for parameter in engine.module.parameters())
    assert any(parameter.numel() == 0 for parameter in engine.module.parameters())
    return engine


def zero(policy: nn.Module, stage: int) -> nn.Module:
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # compile no kernels for this: torch's own gloo does the work
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # Norms are below the threshold: they stay whole on every rank.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": next(policy.parameters()).dtype == torch.bfloat16},
    }
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=policy, model_parameters=trained, config=settings)
    return engine


def compare(
    make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module], accelerator: Accelerator | None = None
) -> dict[str, Any]:
    """One model, bare and wrapped. Every comparison is of bits."""
    accelerator = accelerator or Accelerator(cpu=True)
    bare = make()
    expected = {name: tensor.clone() for name, tensor in WeightSource(bare)}
    digits = fingerprint(bare, accelerator)
    wrapped = wrap(make())
    source = WeightSource(wrapped, accelerator)
    announced = [(meta.name, str(meta.dtype), meta.shape) for meta in source.metadata()]
    came = {name: tensor.clone() for name, tensor in source}
    partial = WeightSource(wrapped, accelerator, only_trainable=True)
    found = {
        "names": sorted(came) == sorted(expected),
        "announced": announced == [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in came.items()],
        "values": all(torch.equal(came[name], expected[name]) for name in expected),
        "partial": all(torch.equal(tensor, expected[name]) for name, tensor in partial),
        "fingerprint": fingerprint(wrapped, accelerator) == digits,
    }
    if hasattr(bare, "peft_config"):
        theirs = dict(AdapterSource(bare))
        ours = {name: tensor.clone() for name, tensor in AdapterSource(wrapped, accelerator)}
        found["adapter"] = ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    found["abandoned"] = abandon(source, came)
    return found


def abandon(source: WeightSource, expected: dict[str, torch.Tensor]) -> bool:
    """A consumer raises in the middle, on all ranks alike; the next stream is as the one before."""
    try:
        for place, _ in enumerate(source):
            if place == 5:
                raise Abandoned
    except Abandoned:
        return all(torch.equal(tensor, expected[name]) for name, tensor in source)
    return False


def after_a_step(
    policy: nn.Module, wrap: Callable[[nn.Module], nn.Module], accelerator: Accelerator | None = None
) -> bool:
    """The optimizer's step is in the stream: whatever a wrapper keeps beside it is not stale."""
    accelerator = accelerator or Accelerator(cpu=True)
    ids = torch.arange(8, device=accelerator.device)[None]
    wrapped = wrap(policy)
    before = {name: tensor.clone() for name, tensor in WeightSource(wrapped)}
    loss = wrapped(input_ids=ids, use_cache=False).logits.float().pow(2).mean()
    if hasattr(wrapped, "backward"):
        wrapped.backward(loss)
        wrapped.step()
    else:
        loss.backward()
        torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
    with torch.no_grad():  # as the probe: FSDP2 leaves some parameters whole
        wrapped(input_ids=ids, use_cache=False)
    after = {name: tensor.clone() for name, tensor in WeightSource(wrapped)}
    whole = model()
    whole.load_state_dict(after, strict=False)
    return not torch.equal(after["model.norm.weight"], before["model.norm.weight"]) and (
        fingerprint(wrapped, accelerator) == fingerprint(whole, accelerator)
    )


def refuses_what_only_peft_can_merge(wrap: Callable[[nn.Module], nn.Module]) -> bool:
    try:
        WeightSource(wrap(with_adapter(model(), use_dora=True)))
    except ConfigError as error:
        return "sharded" in str(error)
    return False


def refuses_what_was_taken_out(wrapped: nn.Module) -> bool:
    """Of FSDP1, as `accelerator.unwrap_model` does: the outermost unit's parameters could not be gathered."""
    try:
        WeightSource(wrapped.module)
    except WeightSyncError as error:
        return "Pass the wrapped model" in str(error)
    return False


WRAPPINGS = {wrap.__name__: wrap for wrap in (ddp, fsdp2, hybrid, fsdp1, fsdp1_flat, zero2, zero3)}


def main(folder: str, *wrappings: str) -> None:
    Accelerator(cpu=True)
    found: dict[str, dict[str, Any]] = {}
    for wrapping in wrappings or WRAPPINGS:
        wrap = WRAPPINGS[wrapping]
        found[wrapping] = {name: compare(make, wrap) for name, make in CASES.items()}
        found[wrapping]["step"] = after_a_step(model(), wrap)
        if wrapping not in ("ddp", "zero2"):
            found[wrapping]["refusal"] = refuses_what_only_peft_can_merge(wrap)
        if wrapping.startswith("fsdp1"):
            found[wrapping]["unwrapped"] = refuses_what_was_taken_out(wrap(model()))
    (Path(folder) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
