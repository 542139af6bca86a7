"""Sums of the bits of parameters: which weights a model holds, and which a server holds otherwise than they were sent.

The bits of every parameter are added up as integers (`engine.worker.bit_sum`). That is exact in any order, so it does
not depend on how parameters are sharded, and takes one pass at the speed of memory.

    fingerprint   a few digits that tell whether two models hold the same weights, bit for bit; no protection against
                  someone who wants two models to look the same
    explain       the parameters that a server holds otherwise than they were sent, after a probe has failed

vLLM packs some parameters into one (q, k and v into `qkv_proj`) and splits most over its tensor-parallel ranks; the
sums add up over both. The server's side is `policy_server/engine/worker.py`; a server without it, or with quantized
weights, cannot tell, and that is said. Of several data-parallel replicas the first one answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trl_gym.errors import PolicyServerError, Problem
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.policy_server.engine.worker import bit_sum, value_sum
from trl_gym.weight_sync.sharding import find_slots, local_part

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.policy_server.client import PolicyClient

METHOD = "trl_gym_weight_sums"
_MAX_NAMED = 8


def fingerprint(model: torch.nn.Module, accelerator: Accelerator) -> str:
    """Return 16 hexadecimal digits of a model's parameters and their names, adapters included.

    Only the sums are gathered. Every rank calls it in step.

    Args:
        model: The trainer's model. Under FSDP1 it must be the wrapped one; else it may be wrapped or not.
    """
    slots = find_slots(model)
    is_sharded = any(slot.is_sharded for slot in slots)
    parts = [local_part(slot) if is_sharded else slot.tensor for slot in slots]
    nothing = torch.zeros((), dtype=torch.int64)
    totals = torch.stack([(nothing if part is None else bit_sum(part)).to(accelerator.device) for part in parts])
    if is_sharded:
        totals = accelerator.reduce(totals, "sum")
    names = (f"{slot.name} {slot.dtype} {slot.shape}" for slot in slots)
    text = "\n".join(f"{name} {total}" for name, total in zip(names, totals.tolist(), strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """The answers of the server's workers, put together."""

    sums: dict[str, int]  # name → sum of bits. `"a in b"` is a copy of `a` that layer `b` computes with.
    # Module → the modules packed into it, e.g. `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.
    packed: dict[str, list[str]] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()  # names of parameters that cannot be read


def sent_sums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Add up a stream of weights, in the dtype in which they are sent. A collective, as iterating the stream is."""
    return {name: value_sum(tensor) for name, tensor in weights}


def held_sums(client: PolicyClient, dtype: torch.dtype) -> HeldWeights | None:
    """Ask the server for its sums.

    Args:
        client: Client of a server that is awake; it need not be paused, if nothing updates its weights meanwhile.
        dtype: Precision in which weights are sent.

    Returns:
        None when the server cannot tell: it runs without our worker extension, or without development routes.

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
    """Put the answers of a server's workers together: shards are added, and what every worker holds counts once.

    Args:
        workers: Answers of `WeightSums.trl_gym_weight_sums`, one per worker.
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
        # Different values: split by a layer that does not say so. If copies have diverged, the sum is wrong too, as it
        # should be.
        of_each = [worker["whole"].get(name, 0) for worker in workers]
        sums[name] = values.pop() if len(values) == 1 else sum(of_each)
    unseen = {name for worker in workers for name in worker["unseen"]}
    return HeldWeights(sums, packed, frozenset(unseen))


def explain_mismatch(sent: Mapping[str, int], held: HeldWeights) -> list[str]:
    """List the parameters that differ, and those about which nothing can be said. Pure.

    Args:
        sent: Checkpoint name → sum of bits.
        held: The server's sums.

    Returns:
        Sentences, the most telling first; none only if nothing was sent or held.
    """
    expected, unsent = {}, []
    for name in held.sums:
        parts = _parts(name.partition(" in ")[0], held.packed)
        if missing := [part for part in parts if part not in sent]:
            unsent += missing
        else:
            expected[name] = sum(sent[part] for part in parts)
    differing = [name for name, value in expected.items() if held.sums[name] != value]
    covered = {part for name in expected for part in _parts(name.partition(" in ")[0], held.packed)}
    untold = sorted(set(sent) - covered)
    lines = []
    if copies := [name for name in differing if " in " in name and name.partition(" in ")[0] not in differing]:
        lines.append(f"Arrived, but a layer computes with an old copy of it: {_named(copies)}.")
    if plain := [name for name in differing if name not in copies]:
        lines.append(f"Not what was sent ({len(plain)} of {len(expected)}): {_named(plain)}.")
    if unsent and not untold:
        lines.append(f"Held by the server and never sent: {_named(sorted(set(unsent)))}.")
    if expected and not differing:
        lines.append(
            f"All {len(expected)} parameters that can be compared are bit for bit what was sent: the two sides "
            "compute differently (precision, kernels), or the difference is in what cannot be seen."
        )
    if untold:
        why = "keeps them in a form that cannot be read" if held.unseen else "names them otherwise"
        lines.append(f"Unknown for {len(untold)} of {len(sent)} parameters (the server {why}): {_named(untold)}.")
    return lines


def explain(client: PolicyClient, sent: Mapping[str, int], dtype: torch.dtype) -> list[Problem]:
    """List what can be found out about a mismatch, for the end of an error. For rank 0.

    A server that fails in this is no reason to lose the mismatch itself: its answer is one of the problems.
    """
    try:
        held = held_sums(client, dtype)
    except PolicyServerError as error:
        return [Problem(f"The parameters that differ could not be found out: {error.problem}", error.remedy)]
    if held is None:
        remedy = "Start it with `--worker-extension-cls trl_gym.policy_server.engine.worker.WeightSums`."
        return [Problem("The server cannot say which parameters differ.", remedy)]
    return [Problem(line) for line in explain_mismatch(sent, held)]


def _parts(name: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the checkpoint names of what the server holds as one: `….qkv_proj.weight` → `….q_proj.weight`, …"""
    path = name.split(".")
    for place, module in enumerate(path):
        if module in packed:
            return [".".join([*path[:place], part, *path[place + 1 :]]) for part in packed[module]]
    return [name]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
