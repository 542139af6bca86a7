"""Names and shapes as in a model's checkpoint, which is what vLLM loads.

transformers 5 may hold a model in another form than its checkpoint: the experts of a mixture as one fused parameter, a
vision model under another prefix. It keeps the recipe that it loaded a model by, and reverses it in `save_pretrained`;
here the same reversal is done one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch

from trl_gym.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

# Modules that some model of vLLM 0.31 packs into one (`packed_modules_mapping` of `vllm/model_executor/models`).
_PACKED = (
    ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj", "dense_h_to_4h"),
    ("w1", "w3"),
    ("fc1", "fc3"),
    ("c_fc_0", "c_fc_1"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_PACK_OF = {part: parts[0] for parts in _PACKED for part in parts}
_EXPERTS = "experts"  # all experts of a layer are one module


class CheckpointForm:
    """How a model's parameters are written into its checkpoint.

    Args:
        model: Without wrappers and adapters.
        shapes: Shape of the whole parameter by its name in the model.

    Raises:
        ConfigError: The checkpoint's form needs several parameters at the same time.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        stand_ins = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        whole = self._revert(stand_ins)
        self.is_own = all(whole.get(name) is stand_in for name, stand_in in stand_ins.items())
        """Whether names and values are those of the checkpoint already."""
        if self.is_own:
            self.parts = {name: {name: shape} for name, shape in shapes.items()}
            return
        self.parts = {
            name: {part: tuple(tensor.shape) for part, tensor in self._revert({name: stand_in}).items()}
            for name, stand_in in stand_ins.items()
        }
        expected = {(part, tuple(tensor.shape)) for part, tensor in whole.items()}
        one_by_one = {item for parts in self.parts.values() for item in parts.items()}
        if one_by_one != expected:
            differing = sorted(name for name, _ in one_by_one ^ expected)
            raise ConfigError(
                f"The checkpoint of {type(model).__name__} has parameters that transformers makes out of several of "
                f"the model's ({', '.join(differing[:4])} …), and weight sync sends one at a time. Train a LoRA "
                "adapter and set `gym_weight_transport` to 'adapter'."
            )

    parts: dict[str, dict[str, tuple[int, ...]]]
    """Shape of each part in the checkpoint, by the parameter's name in the model."""

    def convert(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A whole parameter as it is in the checkpoint: itself, or its parts."""
        return {name: tensor} if self.is_own else self._revert({name: tensor})

    def _revert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion

        if not isinstance(self._model, PreTrainedModel):
            return tensors
        return revert_weight_conversion(self._model, tensors)


def with_siblings(chosen: Collection[str], names: Collection[str]) -> set[str]:
    """The chosen parameters, and those that vLLM keeps in the same module.

    vLLM fills a module's memory anew as soon as one of its parameters arrives: what does not come is garbage.

    Args:
        chosen: Names in the checkpoint, e.g. `{"model.layers.0.self_attn.q_proj.weight"}`.
        names: All names in the checkpoint.

    Returns:
        E.g. weights and biases of `q_proj`, `k_proj` and `v_proj`.
    """
    wanted = {_served_module(name) for name in chosen}
    return {name for name in names if _served_module(name) in wanted}


def _served_module(name: str) -> str:
    """`"….self_attn.k_proj.bias"` → `"….self_attn.q_proj"`; `"….mlp.experts.3.up_proj.weight"` → `"….mlp.experts"`."""
    path = name.split(".")[:-1]
    if _EXPERTS in path:
        return ".".join(path[: path.index(_EXPERTS) + 1])
    return ".".join(_PACK_OF.get(part, part) for part in path)
