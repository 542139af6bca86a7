"""A few digits that tell whether two models hold the same weights, bit for bit.

The bits of every parameter are added up as integers. That is exact in any order, so it does not depend on how the
parameters are sharded, and takes one pass at the speed of memory. It is no protection against somebody who wants two
models to look the same.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def fingerprint(model: torch.nn.Module, accelerator: Accelerator) -> str:
    """16 hexadecimal digits of an unwrapped model's parameters and their names. Every rank calls it in step."""
    import torch

    names, sums, is_sharded = [], [], False
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if hasattr(tensor, "to_local"):  # FSDP2
            tensor, is_sharded = tensor.to_local(), True
        names.append(f"{name} {parameter.dtype} {tuple(parameter.shape)}")
        sums.append(_bits(tensor).sum(dtype=torch.int64))
    totals = torch.stack([one.to(sums[0].device) for one in sums])
    if is_sharded:
        totals = accelerator.reduce(totals.to(accelerator.device), "sum")
    text = "\n".join(f"{name} {total}" for name, total in zip(names, totals.tolist(), strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers; a bfloat16 as int16, and so on."""
    import torch

    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])
