"""A few digits that tell whether two models hold the same weights, bit for bit.

The bits of every parameter are added up as integers. That is exact in any order, so it does not depend on how the
parameters are sharded, and takes one pass at the speed of memory. It is no protection against somebody who wants two
models to look the same.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from trl_gym.weight_sync.sharding import find_slots, local_part

if TYPE_CHECKING:
    from accelerate import Accelerator


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
