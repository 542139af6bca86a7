"""The trainer's weights as a stream of (name, tensor): which are sent, under which names, in which shape and dtype.

Names and shapes are those of the model's checkpoint, by which vLLM loads it. The dtype is `WeightSource(dtype=)`: a
run takes `GymGRPOConfig.serving_dtype` (`run/weights.py`); integers keep their own. Every rank must walk
a stream to its end: putting a sharded parameter together is a collective.

transformers 5 may hold a model in another form than its checkpoint: the experts of a mixture as one fused parameter, a
vision model under another prefix. It keeps the recipe by which it loaded a model, and `save_pretrained` reverses it;
`CheckpointForm` does the same, one parameter at a time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trl_gym.errors import ConfigError
from trl_gym.weight_sync.merging import Part, adapter_parts, base_model, base_parts
from trl_gym.weight_sync.protocol import WeightMeta
from trl_gym.weight_sync.sharding import gather, unit_by_unit

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    """The form in which a model's parameters are written into its checkpoint.

    Args:
        model: The model without wrappers and adapters.
        shapes: Shape of the whole parameter by its name in the model.

    Raises:
        ConfigError: The checkpoint's form needs several parameters at the same time.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        stand_ins = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        whole = self._revert(stand_ins)
        self.is_own = all(whole.get(name) is stand_in for name, stand_in in stand_ins.items())
        """True when names and values are those of the checkpoint already."""
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
                f"the model's ({', '.join(differing[:4])} …), and weight sync sends one at a time.",
                "Train a LoRA adapter and set `gym_weight_transport` to 'adapter'.",
            )

    parts: dict[str, dict[str, tuple[int, ...]]]
    """Shape of each part in the checkpoint, by the parameter's name in the model."""

    def convert(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a whole parameter as it is in the checkpoint: itself, or its parts."""
        return {name: tensor} if self.is_own else self._revert({name: tensor})

    def _revert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion

        if not isinstance(self._model, PreTrainedModel):
            return tensors
        return revert_weight_conversion(self._model, tensors)


def with_siblings(chosen: Collection[str], names: Collection[str]) -> set[str]:
    """Add the parameters that vLLM keeps in the same modules as the chosen ones.

    vLLM rebuilds a module's memory as soon as one of its parameters arrives: what does not come is garbage.

    Args:
        chosen: Names in the checkpoint, e.g. `{"model.layers.0.self_attn.q_proj.weight"}`.

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


class WeightSource:
    """The weights of one sync as a `WeightStream`.

    Parameters and persistent buffers as `save_pretrained` would write them, tied ones once, adapters added into their
    base. The model is not changed, also if the stream is abandoned.

    Args:
        model: The trainer's model. Under FSDP1 it must be the wrapped one; else it may be wrapped or not.
        accelerator: The trainer's; names the device on which shards that are offloaded to the host are gathered.
        dtype: Precision in which floating-point weights are sent; their own by default.
        only_trainable: Send only what training changes, and what vLLM keeps in the same module as that.

    Raises:
        ConfigError: These weights cannot be streamed; see `check_supported`.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator | None = None,
        *,
        dtype: torch.dtype | None = None,
        only_trainable: bool = False,
    ) -> None:
        self._dtype = dtype
        self._device = None if accelerator is None else accelerator.device
        base = base_model(model)
        _refuse_quantized(base)
        parts = base_parts(model)
        self._form = CheckpointForm(base, {part.name: part.base.shape for part in parts})
        chosen = _trained(parts, self._form) if only_trainable else parts
        self._parts = unit_by_unit(chosen, lambda part: part.base)

    def metadata(self) -> list[WeightMeta]:
        return [
            WeightMeta(name, self._sent(part.base.dtype), shape)
            for part in self._parts
            for name, shape in self._form.parts[part.name].items()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        gathered = gather([part.slots for part in self._parts], self._device)
        for part, tensors in zip(self._parts, gathered, strict=True):
            with torch.no_grad():
                converted = self._form.convert(part.name, part.combine(tensors))
            for name, tensor in converted.items():
                yield name, tensor.detach().to(self._sent(tensor.dtype))

    def _sent(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype


class AdapterSource:
    """The tensors of the active LoRA adapter as a `WeightStream`, named as in PEFT's checkpoints, and its config.

    Args:
        model: The model of a `WeightSource`; the base may be quantized.

    Raises:
        ConfigError: There is no adapter, it is not LoRA, or several are active.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator | None = None) -> None:
        config, named = adapter_parts(model)
        self.config: dict[str, Any] = {key: _jsonable(value) for key, value in config.to_dict().items()}
        """Content of `adapter_config.json`, as PEFT writes it."""
        self.config["inference_mode"] = True
        self._named = unit_by_unit(named, lambda item: item[1])
        self._device = None if accelerator is None else accelerator.device

    def metadata(self) -> list[WeightMeta]:
        return [WeightMeta(name, slot.dtype, slot.shape) for name, slot in self._named]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        gathered = gather([[slot] for _, slot in self._named], self._device)
        for (name, _), [tensor] in zip(self._named, gathered, strict=True):
            yield name, tensor


def check_supported(model: nn.Module, accelerator: Accelerator, *, sends_adapter: bool = False) -> None:
    """Refuse models whose weights cannot be sent, before anything is sampled. Local: nothing is gathered.

    Args:
        model: The trainer's model, wrapped.
        sends_adapter: Whether only its adapter is sent.

    Raises:
        ConfigError: Several processes that do not know of each other, quantized weights, an adapter that cannot be
            merged, parameters on an NVMe disk.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started and each trains by itself (accelerate's state: "
            f"{accelerator.distributed_type.value}, {accelerator.num_processes} process).",
            "Set `use_cpu` in the training arguments if there is no GPU; DeepSpeed and FSDP of accelerate need GPUs.",
        )
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3 and deepspeed.offload_param_device == "nvme":
        raise ConfigError(
            "`offload_param_device` is 'nvme', from where weight sync cannot take parameters.", "Use 'cpu' or 'none'."
        )
    if sends_adapter:
        AdapterSource(model)
        return
    base = base_model(model)
    _refuse_quantized(base)
    # The model is sharded only when training starts.
    shards = (deepspeed is not None and deepspeed.zero_stage == 3) or hasattr(accelerator.state, "fsdp_plugin")
    parts = base_parts(model, will_be_sharded=shards)
    CheckpointForm(base, {part.name: part.base.shape for part in parts})


def quantization_of(base: nn.Module) -> str | None:
    """Return the kind of quantization of a loaded model without adapters, e.g. `"bitsandbytes"`; None for none."""
    method = quantization_method(getattr(getattr(base, "config", None), "quantization_config", None))
    if method is None and (
        getattr(base, "is_quantized", False) or any(not one.dtype.is_floating_point for one in base.parameters())
    ):
        return "unknown"
    return method


def quantization_method(config: Any) -> str | None:
    """Return the kind of quantization that a `quantization_config` (an object, a dictionary or None) names."""
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def _refuse_quantized(base: nn.Module) -> None:
    if (kind := quantization_of(base)) is not None:
        raise ConfigError(
            f"The model's weights are quantized ({kind}), and merging an adapter into them would round it away.",
            "Set `gym_weight_transport` to 'adapter'.",
        )


def _trained(parts: list[Part], form: CheckpointForm) -> list[Part]:
    """Choose the parts that training changes, and those that vLLM keeps in the same modules."""
    chosen = [name for part in parts if part.trained for name in form.parts[part.name]]
    needed = with_siblings(chosen, [name for names in form.parts.values() for name in names])
    return [part for part in parts if needed.intersection(form.parts[part.name])]


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
