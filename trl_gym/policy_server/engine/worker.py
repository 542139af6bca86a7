"""Runs in the server's workers: says which weights they hold, as one number per parameter.

Flag of the server: `--worker-extension-cls trl_gym.policy_server.engine.worker.WeightSums`. vLLM makes the class a
base of its worker, and `POST /collective_rpc {"method": "trl_gym_weight_sums", "args": ["bfloat16"]}` calls the method
in every worker and answers with `{"results": [one per worker]}`. Nothing of vLLM is imported; what is relied upon are
the worker's `model_runner.get_model()` and attributes of its layers (`tp_size`, `cpu_linear`), run with 0.31.

Asked only to explain a mismatch that the probe has found (`trl_gym.weight_sync.sums`, which adds up the trainer's side
with the same functions).
"""

from __future__ import annotations

from typing import Any

import numpy
import torch

_IDENTITY_ROWS = 256  # of the identity that is multiplied at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Add up the elements' bits, read as integers (of a bfloat16 as int16, and so on), modulo 2^64.

    Exact in any order, so it does not depend on how the elements are arranged, and adds up over the parts of a packed
    or sharded tensor. On a CPU NumPy adds: it widens a few thousand elements at a time, where torch first makes a copy
    of the tensor in int64, which takes three times the time.

    Returns:
        `[]`, int64, on the tensor's device.
    """
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    if bits.device.type == "cpu":
        return torch.tensor(bits.numpy().sum(dtype=numpy.int64))
    return bits.sum(dtype=torch.int64)


def value_sum(tensor: torch.Tensor) -> int:
    """`bit_sum` of floating-point numbers, in which minus zero counts as zero, as in a product."""
    return int(bit_sum(tensor.detach() + 0 if tensor.element_size() > 1 else tensor))


class WeightSums:
    """A mixin of vLLM's worker with one method, whose name no worker has."""

    model_runner: Any  # the worker's

    def trl_gym_weight_sums(self, dtype: str) -> dict[str, Any]:
        """Add up the bits of this worker's weights.

        Args:
            dtype: Precision in which weights were sent, e.g. `"bfloat16"`; parameters held in another one are cast.

        Returns:
            `sharded`: name → sum, for weights of which every tensor-parallel rank holds a part.
            `whole`: name → sum, for weights that every rank holds.
            `unseen`: names of parameters whose values cannot be read (quantized, or packed away).
            `packed`: the model's `packed_modules_mapping`, e.g. `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.
            A name like `"model.embed_tokens.weight in lm_head"` is a copy that a layer computes with.
        """
        model = self.model_runner.get_model()
        sums = sums_of(model, getattr(torch, dtype))
        packed = getattr(model, "packed_modules_mapping", None) or {}
        return sums | {"packed": {name: list(parts) for name, parts in packed.items()}}


@torch.no_grad()
def sums_of(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Compute `sharded`, `whole` and `unseen` of `WeightSums.trl_gym_weight_sums`."""
    result: dict[str, Any] = {"sharded": {}, "whole": {}, "unseen": []}
    names: dict[int, str] = {}  # a tied parameter goes by its first name
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            name = names.setdefault(id(parameter), _checkpoint_name(f"{prefix}.{local}".lstrip(".")))
            where = "sharded" if _is_sharded(module, local) else "whole"
            computes_with_copy = local == "weight" and callable(getattr(module, "cpu_linear", None))
            if parameter.numel() and name not in result[where] and _is_plain(parameter):
                result[where][name] = value_sum(_own_part(module, parameter).to(dtype))
            elif not parameter.numel() and computes_with_copy:
                result[where][name] = _packed_away_sum(module, parameter, dtype)
            elif name not in result[where]:
                result["unseen"].append(name)
            if parameter.numel() and computes_with_copy and parameter.dim() == 2:
                copy = f"{name} in {_checkpoint_name(prefix)}"
                result[where][copy] = _packed_away_sum(module, parameter, dtype)
    return result


def _checkpoint_name(name: str) -> str:
    return name.replace(".base_layer", "")  # vLLM's LoRA layers wrap those of the model


def _is_plain(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and parameter.element_size() > 1  # fp8 and integers are quantized


def _is_sharded(module: torch.nn.Module, local: str) -> bool:
    if getattr(module, "tp_size", 1) == 1:
        return False
    return not (local == "bias" and hasattr(module, "input_is_parallel"))  # split by input: every rank has the bias


def _own_part(module: torch.nn.Module, parameter: torch.Tensor) -> torch.Tensor:
    """Leave out heads of keys and values that another rank counts: with more ranks than such heads they repeat."""
    replicas = getattr(module, "num_kv_head_replicas", 1)
    if replicas == 1 or module.tp_rank % replicas == 0:
        return parameter
    return parameter[: module.num_heads * module.head_size]  # rows of qkv_proj: q, then k, then v


def _packed_away_sum(module: torch.nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> int:
    """Add up the weight that a CPU layer multiplies with.

    vLLM keeps it in the matrix library's own layout and empties the parameter. Multiplied with the identity it gives
    its transpose, exactly: every sum has one term that is not zero.
    """
    width = weight.shape[1] if weight.numel() else getattr(module, "input_size_per_partition", None)
    if width is None:
        width = module.input_size
    identity = torch.eye(width, dtype=weight.dtype)
    return sum(value_sum(module.cpu_linear(rows, weight, None).to(dtype)) for rows in identity.split(_IDENTITY_ROWS))
