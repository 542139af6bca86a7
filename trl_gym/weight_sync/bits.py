"""The sum of a tensor's bits: a number by which two holders of a tensor can tell whether they hold the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the elements' bits, read as integers.

    Exact in any order, so it does not depend on how the elements are arranged, and adds up over the parts of a packed
    or sharded tensor. Minus zero counts as zero, as in a product.

    Args:
        tensor: Floating point, any shape.
    """
    import torch

    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    value = (tensor.detach() + 0).contiguous() if tensor.element_size() > 1 else tensor.detach().contiguous()
    return int(value.view(sizes[value.element_size()]).sum(dtype=torch.int64))
