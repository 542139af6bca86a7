"""CUDA as far as vLLM's `ipc` engines see it, made of the host's memory: both of them run on a CPU, in two processes.

"The device" is the host, and a buffer that is shared is a file that both processes map, in the place of a CUDA IPC
handle. Everything else is vLLM's and ours: packing, chunks, handles that travel pickled, unpacking, reloading.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

_AFTER_SIZE = (0, 0, 0, 0, 0)  # what `reduce_tensor` returns has the device's index in the seventh place


class _OnHost(TorchFunctionMode):
    """Whoever asks for CUDA gets the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_host, args), **{name: _host(value) for name, value in (kwargs or {}).items()})


def _host(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


@contextmanager
def cuda_of_the_host() -> Iterator[None]:
    """Let vLLM's code and ours take the host for a GPU: PyTorch's functions in this thread, what is patched in all."""
    with tempfile.TemporaryDirectory(prefix="cuda-stand-in-") as folder, ExitStack() as stack:
        for name, stand_in in _stand_ins(Path(folder)).items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(_OnHost())
        yield


def _stand_ins(folder: Path) -> dict[str, Any]:
    names = itertools.count()

    def export(tensor: torch.Tensor) -> tuple[None, tuple[Any, ...]]:
        """Share a buffer from now on: it becomes a file's memory."""
        path = str(folder / f"buffer-{next(names)}")
        tensor.set_(_mapped(path, tensor.numel()))
        return None, (path, tensor.numel(), *_AFTER_SIZE)

    def nothing(*_: Any) -> None: ...

    return {
        "vllm.distributed.weight_transfer.packed_tensor.reduce_tensor": export,
        "torch.multiprocessing.reductions.rebuild_cuda_tensor": lambda path, size, *_: _mapped(path, size),
        "torch.cuda.current_stream": lambda: SimpleNamespace(synchronize=nothing),
        "torch.cuda.get_device_properties": lambda _: SimpleNamespace(uuid="the-host"),
        "torch.accelerator.current_device_index": lambda: 0,
        **dict.fromkeys(("torch.accelerator.synchronize", "torch.cuda.synchronize"), nothing),
        **dict.fromkeys(("torch.cuda.ipc_collect", "torch.cuda.set_device"), nothing),
    }


def _mapped(path: str, size: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
