"""Writes a stream of weights as a safetensors file: every byte once, no copy of the model in between.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header as a
little-endian integer, the header (JSON, padded with spaces), the data without gaps. The sizes are known before the
stream begins, so the file is allocated first, and a tensor is written to its place as it comes.

Where the bytes go is a `Sink`: a memory map, which is as fast as `memcpy` once its pages are there (10 GB/s against 5
of `pwrite`, measured in shared memory), or a file, for disks and networks: there a failing write is an error, where
touching a map ends the process.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trl_gym.errors import WeightSyncError

if TYPE_CHECKING:
    import torch

    from trl_gym.weight_sync.protocol import WeightMeta

_ALIGNMENT = 8

_DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in the file.

    Attributes:
        header: First bytes of the file, length included.
        places: Name → the parameter and its offset in bytes from the start of the file.
        num_bytes: Size of the file.
    """

    header: bytes
    places: dict[str, tuple[WeightMeta, int]]
    num_bytes: int


def layout(parameters: Sequence[WeightMeta]) -> Layout:
    """Plan a file.

    Wider types come first, in the order given otherwise: without gaps, that is what keeps every tensor aligned.

    Raises:
        WeightSyncError: A parameter's dtype cannot be in such a file, or a name comes twice.
    """
    header: dict[str, object] = {}
    places: dict[str, tuple[WeightMeta, int]] = {}
    end = 0
    for one in sorted(parameters, key=lambda one: -one.dtype.itemsize):
        if one.name in places:
            raise WeightSyncError(f"The model's weights name {one.name} twice.")
        header[one.name] = {
            "dtype": _dtype_name(one),
            "shape": list(one.shape),
            "data_offsets": [end, end + one.num_bytes],
        }
        places[one.name] = (one, end)
        end += one.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = len(text) + 8
    places = {name: (one, start + offset) for name, (one, offset) in places.items()}
    return Layout(len(text).to_bytes(8, "little") + text, places, start + end)


class Sink(Protocol):
    """Takes the bytes of a file."""

    def put(self, offset: int, data: torch.Tensor, dtype: torch.dtype) -> None:
        """Write a tensor without gaps.

        Args:
            offset: In bytes, a multiple of the dtype's size.
            data: One dimension, on any device.
            dtype: In which it is written.

        Raises:
            OSError: E.g. no space left.
        """


class MapSink:
    """Shared memory that is mapped, and stays it from one file to the next of the same size.

    Args:
        fd: A file in shared memory; resized to `num_bytes`.
        num_bytes: Size of the file.

    Raises:
        OSError: E.g. no space left: all of it is taken here, so that no page is missing when it is written to.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        import torch

        allocate(fd, num_bytes)
        self.num_bytes = num_bytes
        self._bytes = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)  # unmapped with the tensor

    def put(self, offset: int, data: torch.Tensor, dtype: torch.dtype) -> None:
        if data.numel():
            end = offset + data.numel() * dtype.itemsize
            self._bytes[offset:end].view(dtype).copy_(data)


class FileSink:
    """A file on any file system, written piece by piece: what is cast, or comes from a GPU, stays in the cache.

    Args:
        fd: An open file; resized to `num_bytes`.
        num_bytes: Size of the file.

    Raises:
        OSError: E.g. no space left.
    """

    piece_bytes = 4 * 2**20

    def __init__(self, fd: int, num_bytes: int) -> None:
        allocate(fd, num_bytes)
        self._fd = fd

    def put(self, offset: int, data: torch.Tensor, dtype: torch.dtype) -> None:
        import torch

        for piece in data.split(max(1, self.piece_bytes // dtype.itemsize)):
            on_host = piece.to(device="cpu", dtype=dtype).contiguous()
            left = memoryview(on_host.view(torch.uint8).numpy())
            while left:
                written = os.pwrite(self._fd, left, offset)
                left, offset = left[written:], offset + written


def allocate(fd: int, num_bytes: int) -> None:
    """Make a file that big, with space for every byte. Raises `OSError` when there is not enough."""
    os.ftruncate(fd, num_bytes)
    if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk is found while writing
        os.posix_fallocate(fd, 0, num_bytes)


def put_text(sink: Sink, text: bytes) -> None:
    """Write bytes at the start."""
    import torch

    sink.put(0, torch.frombuffer(bytearray(text), dtype=torch.uint8), torch.uint8)


def write(sink: Sink, plan: Layout, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill a file with exactly the weights that were planned.

    Args:
        sink: As big as the plan.
        plan: From `layout`.
        weights: Name and full tensor, on any device, each in the shape of the plan; cast to its dtype.

    Raises:
        OSError: E.g. no space left; the file's content is undefined.
        WeightSyncError: The stream has other parameters than the plan.
    """
    put_text(sink, plan.header)
    missing = set(plan.places)
    for name, tensor in weights:
        if name not in missing:
            raise WeightSyncError(f"The weights have {name}, which was not announced, or comes twice.")
        missing.remove(name)
        one, offset = plan.places[name]
        if tuple(tensor.shape) != one.shape:
            raise WeightSyncError(f"{name} was announced as {one.shape} and is {tuple(tensor.shape)}.")
        sink.put(offset, tensor.detach().reshape(-1), one.dtype)
    if missing:
        raise WeightSyncError(f"{len(missing)} announced weights did not come: {', '.join(sorted(missing)[:10])}.")


def _dtype_name(one: WeightMeta) -> str:
    name = str(one.dtype).removeprefix("torch.")
    if name not in _DTYPE_NAMES:
        raise WeightSyncError(f"{one.name} is {name}, which a safetensors file cannot hold.")
    return _DTYPE_NAMES[name]
