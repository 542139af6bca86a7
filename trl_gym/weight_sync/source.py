"""The trainer's weights as a stream of (name, tensor), under the names by which vLLM loads the model.

Every rank must walk the stream to its end: materializing a sharded parameter is a collective. Covered here: plain
models, DDP, FSDP2 (torch's `fully_shard`), and PEFT adapters merged into their base. FSDP1 and ZeRO-3 are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trl_gym.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def check_supported(accelerator: Accelerator) -> None:
    """Refuse wrappings whose parameters cannot be streamed yet, before anything is sampled.

    Raises:
        ConfigError: FSDP1 or ZeRO-3.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ConfigError("DeepSpeed ZeRO-3 is not supported by weight sync yet; use ZeRO-2, DDP or FSDP2.")
    fsdp = accelerator.state.fsdp_plugin if hasattr(accelerator.state, "fsdp_plugin") else None
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
        raise ConfigError("FSDP1 is not supported by weight sync yet; set `fsdp_version: 2` in the accelerate config.")


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the weights of an unwrapped model.

    Yields:
        Name and full, detached tensor of every parameter; tied parameters once, under their first name. A tensor may
        be overwritten once the stream is exhausted (a merged adapter is taken out again): copy it, or finish with it,
        before that.
    """
    if _is_peft(model):
        yield from _merged_weights(model)
    else:
        for name, parameter in model.named_parameters():
            yield name, _full(parameter)


def _merged_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's weights with the adapter added in; the adapter is out again when this ends, however it ends."""
    model.merge_adapter()
    try:
        for name, parameter in model.get_base_model().named_parameters():
            if model.prefix in name:  # the adapter's own matrices
                continue
            if "original_module" in name:  # `modules_to_save` keeps the untrained module beside the trained one
                continue
            yield _base_name(name), _full(parameter)
    finally:
        model.unmerge_adapter()


def _base_name(name: str) -> str:
    return name.replace(".base_layer", "").replace("modules_to_save.default.", "")


def _full(parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor: an FSDP2 `DTensor` is gathered over the ranks, anything else is passed on."""
    tensor = parameter.detach()
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def _is_peft(model: torch.nn.Module) -> bool:
    from transformers.utils import is_peft_available

    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)
