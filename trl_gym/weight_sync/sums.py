"""Which weights a server holds other than they were sent: an explanation for a probe that has failed.

Both sides add up the bits of every parameter (`bits.bit_sum`). vLLM packs some parameters into one (q, k and v into
`qkv_proj`) and splits most over its tensor-parallel ranks; the sums add up over both. The server's side is
`policy_server/engine/worker.py`; a server without it, or with quantized weights, cannot tell, and that is said.
Where a model is served by several data-parallel replicas, the first one answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.policy_server.engine.worker import bit_sum
from trl_gym.weight_sync.sharding import find_slots, local_part

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.policy_server.client import PolicyClient


# --------------------------------------------------------------------------------------------------------------------
# A few digits that tell whether two models hold the same weights, bit for bit.
#
# The bits of every parameter are added up as integers. That is exact in any order, so it does not depend on how the
# parameters are sharded, and takes one pass at the speed of memory. It is no protection against somebody who wants two
# models to look the same.


def fingerprint(model: torch.nn.Module, accelerator: Accelerator) -> str:
    """16 hexadecimal digits of a model's parameters and their names, adapters included.

    Nothing is gathered but the sums. Every rank calls it in step.

    Args:
        model: The trainer's. Under FSDP1 it must be the wrapped one; else it may be wrapped or not.
        accelerator: The trainer's.
    """
    slots = find_slots(model)
    if any(slot.is_sharded for slot in slots):
        totals = torch.stack([_sum(local_part(slot)).to(accelerator.device) for slot in slots])
        totals = accelerator.reduce(totals, "sum")
    else:
        totals = torch.stack([_sum(slot.tensor.detach()).to(accelerator.device) for slot in slots])
    names = (f"{slot.name} {slot.dtype} {slot.shape}" for slot in slots)
    text = "\n".join(f"{name} {total}" for name, total in zip(names, totals.tolist(), strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sum(tensor: torch.Tensor | None) -> torch.Tensor:
    """The sum of the tensor's bits as integers (of a bfloat16 as int16, and so on), modulo 2^64; 0 for None."""
    if tensor is None or tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64)
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()]).sum(dtype=torch.int64)


METHOD = "trl_gym_weight_sums"
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """What the server's workers answer, put together.

    Attributes:
        sums: Name → sum of bits. `"a in b"` is a copy of `a` that layer `b` computes with.
        packed: Module → the modules packed into it, e.g. `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.
        unseen: Names of parameters that cannot be read.
    """

    sums: dict[str, int]
    packed: dict[str, list[str]] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()


def sent_sums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Sums of a stream of weights, in the dtype in which they are sent. A collective, as iterating the stream is."""
    return {name: bit_sum(tensor) for name, tensor in weights}


def held_sums(client: PolicyClient, dtype: torch.dtype) -> HeldWeights | None:
    """Ask the server.

    Args:
        client: Of a server that is awake; it need not be paused, if nothing updates its weights meanwhile.
        dtype: In which weights are sent.

    Returns:
        None when it has no way to tell: it runs without our worker extension, or without development routes.

    Raises:
        PolicyServerError: It does not answer.
    """
    try:
        results = client.collective_rpc(METHOD, [str(dtype).removeprefix("torch.")])
    except PolicyResponseError as error:
        if error.status == 404 or "is not implemented" in str(error):
            return None
        raise
    return combine(results)


def combine(workers: Sequence[Mapping[str, Any]]) -> HeldWeights:
    """Answers of a server's workers as those of one: shards are added, and what every worker holds counts once.

    Args:
        workers: As returned by `WeightSums.trl_gym_weight_sums`, one per worker.
    """
    sums: dict[str, int] = {}
    packed: dict[str, list[str]] = {}
    for worker in workers:
        packed |= worker["packed"]
        for name, value in worker["sharded"].items():
            sums[name] = sums.get(name, 0) + value
    whole: dict[str, set[int]] = {}
    for worker in workers:
        for name, value in worker["whole"].items():
            whole.setdefault(name, set()).add(value)
    for name, values in whole.items():
        # Not the same everywhere: split by a layer that does not say so. If the copies have diverged, the sum is wrong
        # too, as it should be.
        of_each = [worker["whole"].get(name, 0) for worker in workers]
        sums[name] = values.pop() if len(values) == 1 else sum(of_each)
    unseen = {name for worker in workers for name in worker["unseen"]}
    return HeldWeights(sums, packed, frozenset(unseen))


def explain_mismatch(
    sent: Mapping[str, int],
    held: Mapping[str, int],
    packed: Mapping[str, Sequence[str]],
    unseen: Iterable[str] = (),
) -> list[str]:
    """Which parameters differ, and about which nothing can be said. Pure.

    Args:
        sent: Checkpoint name → sum of bits.
        held: The server's name → sum of bits; see `HeldWeights`.
        packed: See `HeldWeights`.
        unseen: See `HeldWeights`.

    Returns:
        Sentences, the most telling first; none only if nothing was sent or held.
    """
    expected, unsent = {}, []
    for name in held:
        parts = _parts(name.partition(" in ")[0], packed)
        if missing := [part for part in parts if part not in sent]:
            unsent += missing
        else:
            expected[name] = sum(sent[part] for part in parts)
    differing = [name for name, value in expected.items() if held[name] != value]
    covered = {part for name in expected for part in _parts(name.partition(" in ")[0], packed)}
    untold = sorted(set(sent) - covered)
    lines = []
    if copies := [name for name in differing if " in " in name and name.partition(" in ")[0] not in differing]:
        lines.append(f"arrived, but a layer computes with an old copy of it: {_named(copies)}")
    if plain := [name for name in differing if name not in copies]:
        lines.append(f"not what was sent ({len(plain)} of {len(expected)}): {_named(plain)}")
    if unsent and not untold:
        lines.append(f"held by the server and never sent: {_named(sorted(set(unsent)))}")
    if expected and not differing:
        lines.append(
            f"all {len(expected)} parameters that can be compared are bit for bit what was sent: the two sides "
            "compute differently (precision, kernels), or the difference is in what cannot be seen"
        )
    if untold:
        why = (
            "the server keeps them in a form that cannot be read" if set(unseen) else "the server names them otherwise"
        )
        lines.append(f"cannot be told for {len(untold)} of {len(sent)} parameters ({why}): {_named(untold)}")
    return lines


def explain(client: PolicyClient, sent: Mapping[str, int], dtype: torch.dtype) -> str:
    """What can be found out about a mismatch, as text for the end of an error message. For rank 0.

    A server that fails in this is no reason to lose the mismatch itself: what it says is part of the text.
    """
    try:
        held = held_sums(client, dtype)
    except PolicyServerError as error:
        return f"Which parameters differ could not be found out: {error}"
    if held is None:
        return (
            "Which parameters differ cannot be told: the server was started without "
            "`--worker-extension-cls trl_gym.policy_server.engine.worker.WeightSums`."
        )
    lines = explain_mismatch(sent, held.sums, held.packed, held.unseen)
    return "Parameters:\n" + "\n".join(f"  - {line}" for line in lines)


def _parts(name: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Checkpoint names of what the server holds as one: `….qkv_proj.weight` → `….q_proj.weight`, …"""
    path = name.split(".")
    for place, module in enumerate(path):
        if module in packed:
            return [".".join([*path[:place], part, *path[place + 1 :]]) for part in packed[module]]
    return [name]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
