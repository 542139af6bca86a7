"""A PEFT model seen as its base model with the adapters added in, without changing either.

`merge_adapter` and `unmerge_adapter` add and subtract in place: in bfloat16 the base drifts a little with every sync,
sharded weights cannot be added to, and an interruption in between leaves the adapter merged. So the sum of plain LoRA
layers is computed beside the model, `base + scaling * B @ A`, in the order and precision of PEFT's own `merge`. Other
kinds of layers are merged by PEFT, one at a time, and put back from a copy before anything else happens.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_gym.errors import ConfigError
from trl_gym.weight_sync.sharding import Slot, bare, clean, find_slots

_BASE_ALONE = operator.itemgetter(0)


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter of the base model, and the tensors that it is made of."""

    name: str  # name in the base model
    slots: tuple[Slot, ...]  # tensors that must be gathered for it: the base's parameter, then adapters' matrices
    combine: Callable[[Sequence[torch.Tensor]], torch.Tensor]  # makes the parameter out of these
    trained: bool  # whether it changes in training, by itself or by an adapter

    @property
    def base(self) -> Slot:
        return self.slots[0]


def base_parts(model: nn.Module, *, will_be_sharded: bool = False) -> list[Part]:
    """List parameters and persistent buffers of the base model (of the model itself, where there is no adapter).

    Args:
        model: Wrapped or not; under FSDP1 the wrapped one.
        will_be_sharded: Refuse what could not be merged when the model is sharded, although it is not yet.

    Raises:
        ConfigError: The adapters cannot be merged, in general or under this wrapping.
    """
    slots = find_slots(model, buffers=True)
    adapters = _Adapters(model)
    if not adapters.any:
        return [Part(slot.name, (slot,), _BASE_ALONE, slot.trained) for slot in slots]
    adapters.check_mergeable(will_be_sharded or any(slot.is_sharded for slot in slots))
    by_name = {slot.name: slot for slot in slots}
    sums = adapters.sums(by_name)
    parts = []
    for slot in slots:
        name = adapters.base_name(slot.name)
        if name is None:
            _check_untied(slot, adapters)
        elif slot.name in sums:
            parts.append(Part(name, (slot, *sums[slot.name][0]), sums[slot.name][1], trained=True))
        else:
            parts.append(Part(name, (slot,), _BASE_ALONE, slot.trained))
    return parts


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model below wrappers and adapters."""
    inner = bare(model)
    return bare(inner.get_base_model()) if is_peft(inner) else inner


def adapter_parts(model: nn.Module) -> tuple[Any, list[tuple[str, Slot]]]:
    """Find the active LoRA adapter. Returns its config (`peft.LoraConfig`), and its parameters with their names in an
    adapter's checkpoint. Raises `ConfigError`: there is no adapter, it is not LoRA, or several are active."""
    inner = bare(model)
    if not is_peft(inner):
        raise ConfigError(
            "`gym_weight_transport` is 'adapter' and the model has no adapter.",
            "Pass `peft_config`, or use another transport.",
        )
    active = inner.active_adapters
    if len(active) != 1:
        raise ConfigError(
            f"`gym_weight_transport` is 'adapter' and {len(active)} adapters are active ({', '.join(active)}); the "
            "server samples with one.",
            "Activate one, or use another transport, which merges them.",
        )
    config = inner.peft_config[active[0]]
    if str(config.peft_type.value) != "LORA":
        raise ConfigError(
            f"`gym_weight_transport` is 'adapter' and the adapter is {config.peft_type.value}; vLLM serves LoRA only.",
            "Use another transport, which merges it.",
        )
    adapters = _Adapters(model)
    named = ((adapters.adapter_name(slot.name, active[0]), slot) for slot in find_slots(model))
    return config, [(name, slot) for name, slot in named if name is not None]


class _Adapters:
    """PEFT's layers in a model, and the modules that it trains as a whole, by their paths."""

    def __init__(self, model: nn.Module) -> None:
        self._model = bare(model)
        self.any = is_peft(self._model)
        self._prefix = "base_model.model." if self.any else ""
        self.layers: dict[str, Any] = {}
        self._copies: dict[str, Any] = {}
        if not self.any:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
        from peft.utils.other import AuxiliaryTrainingWrapper

        for path, module in self._model.named_modules():
            if isinstance(module, BaseTunerLayer):
                self.layers[clean(path)] = module
            elif isinstance(module, ModulesToSaveWrapper):
                self._copies[clean(path)] = module
            elif isinstance(module, AuxiliaryTrainingWrapper):
                raise ConfigError(
                    f"{clean(path)} is wrapped in PEFT's {type(module).__name__} (`trainable_token_indices`), which "
                    "cannot be merged for weight sync.",
                    "Train the module as a whole with `modules_to_save`.",
                )

    def check_mergeable(self, sharded: bool) -> None:
        from peft.tuners.tuners_utils import BaseTuner

        kinds = ", ".join(sorted({str(config.peft_type.value) for config in self._model.peft_config.values()}))
        if not isinstance(self._model.base_model, BaseTuner):
            raise ConfigError(
                f"The adapter ({kinds}) is not a change of weights, so it can neither be merged nor served.",
                "Use LoRA.",
            )
        odd = [path for path, layer in self.layers.items() if not _is_plain_lora(layer)]
        if sharded and odd:
            raise ConfigError(
                f"{len(odd)} adapter layers ({type(self.layers[odd[0]]).__name__} at {odd[0]} …, {kinds}) can be "
                "merged only by PEFT and in place, which is impossible while parameters are sharded (FSDP, ZeRO-3).",
                "Use DDP or ZeRO-2, or plain LoRA (no `use_dora`, no `target_parameters`).",
            )

    def base_name(self, name: str) -> str | None:
        """Return the name in the base model; None for what the adapters brought, and for what they replaced.

        `"base_model.model.lm_head.base_layer.weight"` → `"lm_head.weight"`.
        """
        path, kept = name.split("."), []
        index = 0
        while index < len(path):
            here, part = ".".join(path[:index]), path[index]
            if here in self.layers and part != "base_layer":
                return None
            if here in self._copies:
                copy = self._copies[here]
                active = next((name for name in copy.active_adapters if name in copy.modules_to_save), None)
                if part == "modules_to_save" and path[index + 1] == active:
                    index += 2
                    continue
                if part != "original_module" or active is not None:
                    return None
            elif here not in self.layers:
                kept.append(part)
            index += 1
        return ".".join(kept).removeprefix(self._prefix)

    def adapter_name(self, name: str, adapter: str) -> str | None:
        """Return the name in the checkpoint of one adapter; None for what is not part of it.

        `"base_model.model.lm_head.lora_A.default.weight"` → `"base_model.model.lm_head.lora_A.weight"`.
        """
        path = name.split(".")
        for index in range(len(path)):
            here, part = ".".join(path[:index]), path[index]
            if here in self._copies:
                own = part == "modules_to_save" and path[index + 1] == adapter
                return ".".join([*path[:index], *path[index + 2 :]]) if own else None
            if here in self.layers and part != "base_layer":
                if path[index + 1] != adapter:
                    return None
                # PEFT's checkpoints know DoRA's magnitude as a parameter, which it was once.
                rest = [] if part == "lora_magnitude_vector" else path[index + 2 :]
                return ".".join([*path[: index + 1], *rest])
        return None

    def sums(self, slots: dict[str, Slot]) -> dict[str, tuple[tuple[Slot, ...], Callable[..., torch.Tensor]]]:
        """Map base parameters that adapters change to the tensors to gather beside them, and how they are added."""
        found: dict[str, tuple[tuple[Slot, ...], Callable[..., torch.Tensor]]] = {}
        odd: dict[str, list[Any]] = {}
        for path, layer in self.layers.items():
            active = [name for name in layer.active_adapters if name not in layer.merged_adapters]
            if not _is_plain_lora(layer):  # of nested ones (`target_parameters`) each changes one of the parameters
                for name in (name for name in slots if name.startswith(f"{path}.base_layer.")):
                    odd.setdefault(name, []).append(layer)
            elif adding := [name for name in active if name in layer.scaling]:
                self._add_lora(found, slots, path, layer, adding)
        for name, layers in odd.items():
            found[name] = ((), functools.partial(_merged_by_peft, tuple(layers), name.rpartition(".base_layer.")[2]))
        return found

    def _add_lora(self, found: Any, slots: dict[str, Slot], path: str, layer: Any, adapters: list[str]) -> None:
        from peft.tuners import lora

        weight = f"{path}.base_layer.weight"
        if weight not in slots or slots[weight].aliases:
            raise ConfigError(
                f"The adapter targets {path.removeprefix(self._prefix)}, whose weight is tied to another module's. "
                "Merged, it would change both, which is not what is trained.",
                "Leave it out of `target_modules`, or use a model with `tie_word_embeddings` false.",
            )
        is_embedding = isinstance(layer, lora.Embedding)
        a, b = "lora_A.{}.weight", "lora_B.{}.weight"
        if is_embedding:
            a, b = "lora_embedding_A.{}", "lora_embedding_B.{}"
        matrices = [slots[f"{path}.{form.format(name)}"] for name in adapters for form in (a, b)]
        scalings = tuple(layer.scaling[name] for name in adapters)
        transposed = is_embedding or layer.fan_in_fan_out
        found[weight] = (tuple(matrices), functools.partial(_lora_weight, scalings, transposed, is_embedding))
        biased = [name for name in adapters if layer.lora_bias.get(name)]
        if biased:
            biases = tuple(slots[f"{path}.lora_B.{name}.bias"] for name in biased)
            scalings = tuple(layer.scaling[name] for name in biased)
            found[f"{path}.base_layer.bias"] = (biases, functools.partial(_lora_bias, scalings))


def _lora_weight(
    scalings: tuple[float, ...], transposed: bool, cast_first: bool, tensors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Compute `base + Σ scaling * B @ A` (Hu et al. 2021), rounded after each adapter as PEFT's `merge` does.

    Args:
        scalings: One factor per adapter.
        transposed: The base's weight is `[in, out]`: embeddings, `fan_in_fan_out`.
        cast_first: Round the product to the base's precision before it is added: embeddings.
        tensors: Base `[out, in]`, then A `[r, in]` and B `[out, r]` of each adapter.
    """
    weight = tensors[0]
    for scaling, a, b in zip(scalings, tensors[1::2], tensors[2::2], strict=True):
        # As PEFT: half precision is slow on CPUs, and rounded once.
        wide = b.device.type == "cpu" and b.dtype in (torch.float16, torch.bfloat16)
        product = b.float() @ a.float() if wide else b @ a
        delta = (product.T if transposed else product) * scaling
        if wide:
            delta = delta.to(b.dtype)
        if cast_first:
            delta = delta.to(weight.dtype)
        weight = (weight + delta).to(weight.dtype)
    return weight


def _lora_bias(scalings: tuple[float, ...], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    bias = tensors[0]
    for scaling, addition in zip(scalings, tensors[1:], strict=True):
        bias = (bias + addition * scaling).to(bias.dtype)
    return bias


def _merged_by_peft(layers: Sequence[Any], attribute: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute one parameter of a base layer with PEFT's own `merge`; all is as before, bit for bit, when this returns.

    Args:
        layers: PEFT's layers around that base layer.
        attribute: Name of the parameter in the base layer.
        tensors: Ignored: these layers are never sharded.
    """
    base = layers[0].get_base_layer()
    parameters = dict(base.named_parameters())
    copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before = [list(layer.merged_adapters) for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        return base.get_parameter(attribute).detach().clone()
    finally:
        for layer, merged in zip(layers, before, strict=True):
            if list(layer.merged_adapters) != merged:
                layer.unmerge()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(copies[name])


def _is_plain_lora(layer: Any) -> bool:
    """Check that merging the layer is nothing but adding B @ A (no DoRA and the like, no quantized base)."""
    from peft.tuners import lora

    plain = type(layer) in (lora.Linear, lora.Embedding)
    return plain and not any(name in layer.lora_variant for name in layer.active_adapters)


def _check_untied(dropped: Slot, adapters: _Adapters) -> None:
    """Refuse a parameter that an adapter replaces and that is in use elsewhere."""
    kept = [name for alias in dropped.aliases if (name := adapters.base_name(alias)) is not None]
    if kept:
        raise ConfigError(
            f"`modules_to_save` replaces {dropped.name}, which is tied to {kept[0]}: trained, the two differ, and the "
            "policy server has one weight for both.",
            "Leave it out, set `ensure_weight_tying=True` in the adapter's config, or use a model with "
            "`tie_word_embeddings` false.",
        )


def is_peft(model: Any) -> bool:
    """Check whether a model has PEFT's wrapper around it; a name has not."""
    from transformers.utils import is_peft_available

    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)
