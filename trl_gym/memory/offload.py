"""Move the optimizer's state to the host while rollouts run (`gym_offload_optimizer`), and measure what was used.

The tensors stay the same objects: their bytes go to a host buffer, which is kept and used again, and their storage is
emptied. So references to them (FSDP2's DTensors, fused kernels) are valid again when the bytes are back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from trl_gym.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

_SMALLEST = 4096  # bytes; step counters and the like stay where they are


class OptimizerOffload:
    """Moves one optimizer's state, and gradients that are alive, out of a device's memory and back.

    Args:
        optimizer: The trainer's, wrapped by accelerate or not. Before a step, and before it is saved, the state comes
            back by itself.
        device: State on this device is moved.

    Raises:
        ConfigError: The optimizer keeps its state elsewhere or in a form that cannot be moved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = _torch_optimizer(optimizer)
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self._optimizer.register_step_pre_hook(lambda *_: self.restore())
        self._optimizer.register_state_dict_pre_hook(lambda *_: self.restore())

    def offload(self) -> int:
        """Free the device's memory, unless it is free already. Returns how many bytes were freed now. Raises
        `ConfigError`: a state tensor is of a kind that cannot be moved."""
        if self._away:
            return 0
        storages = list(self._storages())
        _synchronize(self._device)
        for place, storage in enumerate(storages):
            buffer = self._buffer(place, storage.nbytes())
            buffer.copy_(_bytes_of(storage), non_blocking=True)
            self._away.append((storage, buffer))
        _synchronize(self._device)
        for storage, _ in self._away:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return sum(buffer.numel() for _, buffer in self._away)

    def restore(self) -> None:
        """Put everything back where it was, unless it is there."""
        for storage, buffer in self._away:
            storage.resize_(buffer.numel())
            _bytes_of(storage).copy_(buffer, non_blocking=True)
        _synchronize(self._device)
        self._away = []

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Yield what is on the device, each storage once: gradients may be views of one buffer."""
        seen = set()
        for tensor in self._tensors():
            local = _local(tensor)
            storage = local.untyped_storage()
            is_here = local.device.type == self._device.type and self._device.index in (None, local.device.index)
            if is_here and storage.nbytes() >= _SMALLEST and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _tensors(self) -> Iterator[torch.Tensor]:
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        for group in self._optimizer.param_groups:
            yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)

    def _buffer(self, place: int, num_bytes: int) -> torch.Tensor:
        """Return host memory for the storage at `place`: that of the last time, when it has the size."""
        if place == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[place].numel() != num_bytes:
            pinned = self._device.type == "cuda"  # copied twice as fast, and beside other work
            self._buffers[place] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._buffers[place]


def check_offload(accelerator: Accelerator, optim: str) -> None:
    """Refuse `gym_offload_optimizer` where it cannot work, before anything is loaded.

    Args:
        accelerator: Its state says whether DeepSpeed runs.
        optim: The option of that name.

    Raises:
        ConfigError: It cannot; names what to use instead.
    """
    if accelerator.state.deepspeed_plugin is not None:
        raise ConfigError(
            "`gym_offload_optimizer` does not work with DeepSpeed, which keeps the optimizer's state itself.",
            "Leave it out, and set `offload_optimizer: {device: cpu}` in `zero_optimization` of the DeepSpeed config.",
        )
    if optim.startswith("paged_"):
        raise ConfigError(
            f"`gym_offload_optimizer` does not work with `optim` {optim!r}, which moves its state to the host by "
            "itself.",
            "Leave one of the two out.",
        )


def measured_peak() -> dict[str, float]:
    """Measure what this process needed at most since it started, and what all use on its device, in GB (10⁹).

    Call it after the first optimizer step and log the result, which is empty without CUDA.
    """
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "memory/trainer_peak_gb": torch.cuda.max_memory_reserved() / 1e9,
        "memory/device_used_gb": (total - free) / 1e9,
    }


def release_cached() -> None:
    """Give memory that torch keeps for later back to the GPU, from which the server can take it."""
    import gc

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer without accelerate's wrapper; refuse one whose state cannot be moved."""
    from accelerate.optimizer import AcceleratedOptimizer

    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("deepspeed"):
        raise ConfigError(
            f"`gym_offload_optimizer` works with optimizers of torch, and {type(optimizer).__name__} is none.",
            "Leave it out.",
        )
    if getattr(optimizer, "is_paged", False):
        raise ConfigError(
            f"`gym_offload_optimizer`: {type(optimizer).__name__} moves its state to the host by itself.",
            "Leave it out.",
        )
    return optimizer


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of an FSDP2 DTensor that is here; any other tensor itself."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if is_traceable_wrapper_subclass(local):
        raise ConfigError(
            f"`gym_offload_optimizer` cannot move optimizer state of type {type(local).__name__}.",
            "Leave it out, or use `optim='adamw_torch'` or `'adamw_bnb_8bit'`.",
        )
    return local


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
