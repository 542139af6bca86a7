"""Transport `file`: weights in shared memory or on a shared disk, memory-mapped by the server's workers.

    server on this host      a nameless file in shared memory, which the server opens as /proc/<our pid>/fd/<n>
    `gym_weight_dir` is set  a named file in that folder, which the server may see over a network

The nameless file stays, and stays mapped, from one sync to the next: writing to memory that the kernel has to find,
clear and map first takes several times as long (`benchmarks/weight_sync.py`). So one copy of what was sent last is
held in shared memory. It cannot be left behind: it goes with this process, however that ends. A named file is removed
after each sync.

The file is in the safetensors format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of
the header as a little-endian integer, the header (JSON, padded with spaces), the data without gaps. The sizes are
known before the stream begins, so the file is allocated first, and each tensor is written to its place as it comes:
every byte once, no copy of the model in between. The bytes go to a `Sink`: a memory map, which is as fast as `memcpy`
once its pages exist (10 GB/s against 5 of `pwrite`, measured in shared memory), or a file, for disks and networks,
where a failing write is an error and touching a map would end the process.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import torch

from trl_gym.errors import ConfigError, PolicyServerError, Problem, WeightSyncError
from trl_gym.given import home_path
from trl_gym.storage import refusal

if TYPE_CHECKING:
    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.weight_sync.protocol import WeightMeta, WeightStream

_SHARED_MEMORY = Path("/dev/shm")
_REPORT = "Report it with the model: its parameters change names, or this is an error in trl-gym."
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
    """The places of everything in the file."""

    header: bytes  # first bytes of the file, length included
    # Name → the parameter and its offset in bytes from the start of the file.
    places: dict[str, tuple[WeightMeta, int]]
    num_bytes: int  # size of the file


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
            raise WeightSyncError(f"The model's weights name {one.name} twice.", _REPORT)
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
            dtype: Precision in which it is written.

        Raises:
            OSError: E.g. no space left.
        """


class MapSink:
    """Shared memory that is mapped, and stays mapped from one file to the next of the same size.

    Args:
        fd: A file in shared memory; resized to `num_bytes`.

    Raises:
        OSError: E.g. no space left: all of it is taken here, so that no page is missing when it is written to.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
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

    Raises:
        OSError: E.g. no space left.
    """

    piece_bytes = 4 * 2**20

    def __init__(self, fd: int, num_bytes: int) -> None:
        allocate(fd, num_bytes)
        self._fd = fd

    def put(self, offset: int, data: torch.Tensor, dtype: torch.dtype) -> None:
        for piece in data.split(max(1, self.piece_bytes // dtype.itemsize)):
            on_host = piece.to(device="cpu", dtype=dtype).contiguous()
            left = memoryview(on_host.view(torch.uint8).numpy())
            while left:
                written = os.pwrite(self._fd, left, offset)
                left, offset = left[written:], offset + written


def allocate(fd: int, num_bytes: int) -> None:
    """Resize a file, with space for every byte. Raises `OSError` when there is not enough."""
    os.ftruncate(fd, num_bytes)
    if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk is found while writing
        os.posix_fallocate(fd, 0, num_bytes)


def put_text(sink: Sink, text: bytes) -> None:
    """Write bytes at the start."""
    sink.put(0, torch.frombuffer(bytearray(text), dtype=torch.uint8), torch.uint8)


def write(sink: Sink, plan: Layout, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill a file with exactly the weights that were planned.

    Args:
        sink: Destination, as big as the plan.
        plan: Result of `layout`.
        weights: Names and full tensors, on any device, each in the shape of the plan; cast to its dtype.

    Raises:
        OSError: E.g. no space left; the file's content is undefined.
        WeightSyncError: The stream has other parameters than the plan.
    """
    put_text(sink, plan.header)
    missing = set(plan.places)
    for name, tensor in weights:
        if name not in missing:
            raise WeightSyncError(f"The weights have {name}, which was not announced, or comes twice.", _REPORT)
        missing.remove(name)
        one, offset = plan.places[name]
        if tuple(tensor.shape) != one.shape:
            raise WeightSyncError(f"{name} was announced as {one.shape} and is {tuple(tensor.shape)}.", _REPORT)
        sink.put(offset, tensor.detach().reshape(-1), one.dtype)
    if missing:
        names = ", ".join(sorted(missing)[:10])
        raise WeightSyncError(f"{len(missing)} announced weights did not come: {names}.", _REPORT)


def _dtype_name(one: WeightMeta) -> str:
    name = str(one.dtype).removeprefix("torch.")
    if name not in _DTYPE_NAMES:
        raise WeightSyncError(
            f"{one.name} is {name}, which a safetensors file cannot hold.", "Train in another dtype, or use `nccl`."
        )
    return _DTYPE_NAMES[name]


class _Place(Protocol):
    """A place for a file while it is written, at which the server finds it.

    Attributes:
        folder: Folder to name in messages; its file system is the one that fills up.
    """

    folder: Path

    def sink(self, num_bytes: int) -> Sink:
        """Open something of that size to write to. Raises `OSError`."""

    def publish(self, version: str) -> Path:
        """Return the written file's path, from the server's point of view. Raises `OSError`."""

    def tidy(self) -> None:
        """Clean up after a sync, also after one that failed. Idempotent."""

    def close(self) -> None:
        """Give everything back. Idempotent; the place can be opened again."""


class FileTransport:
    """safetensors in shared memory or on a shared disk. Works everywhere, also without a GPU.

    Args:
        folder: Folder to write files to; shared memory when not given, so that the bytes never touch a disk.

    Raises:
        ConfigError: The folder does not exist, or there is no shared memory.
    """

    name = "file"
    replaces = True

    def __init__(self, folder: str | Path | None = None) -> None:
        self._place: _Place = _SharedMemoryFile() if folder is None else _FolderFile(Path(home_path(folder)))
        self._num_complete = 0  # parameters in a complete update of the server that we are connected to

    def connect(self, client: PolicyClient) -> None:
        """Prove that the server reads what this process writes. Raises `WeightSyncError`: it cannot: another host,
        container or user."""
        secret = secrets.token_hex(16)
        try:
            put_text(self._place.sink(len(secret)), secret.encode())
            path = self._place.publish("probe")
            client.init_weight_transfer({"probe": str(path), "secret": secret})
        except OSError as error:
            raise self._not_written(error, len(secret)) from error
        except PolicyServerError as error:
            raise WeightSyncError(
                f"The policy server at {client.root_url} cannot read what the trainer wrote to {self._place.folder} "
                f"({error}).",
                "Set `gym_weight_dir` to a folder that both see under this path and may read, e.g. on a disk that "
                "both hosts mount.",
            ) from error
        finally:
            self._place.close()
        self._num_complete = 0

    def disconnect(self) -> None:
        # The next file is another one: the server that is gone may still be reading this one.
        self._place.close()
        self._num_complete = 0

    def send(self, weights: WeightStream, client: PolicyClient | None, version: str) -> int:
        if client is None:
            _exhaust(iter(weights))
            return 0
        parameters = weights.metadata()
        stream = iter(weights)
        try:
            plan = layout(parameters)
            path = self._write(plan, stream, version)
        except Exception:
            _exhaust(stream)  # other ranks walk it to its end
            client.abandon_weight_update()  # it was told nothing: the weights that it holds are whole
            raise
        # A stream with fewer parameters than the first one has those that are trained.
        partial = len(parameters) < self._num_complete
        try:
            client.update_weights({"path": str(path), "partial": partial})
        except PolicyServerError:
            self._place.close()  # it may still be reading: the next file is another one
            raise
        self._num_complete = max(self._num_complete, len(parameters))
        return plan.num_bytes

    def release(self) -> None:
        self._place.tidy()

    def _write(self, plan: Layout, stream: Iterable[tuple[str, object]], version: str) -> Path:
        try:
            write(self._place.sink(plan.num_bytes), plan, stream)
            return self._place.publish(version)
        except OSError as error:
            failure = self._not_written(error, plan.num_bytes)  # before the space is given back
            self._place.close()
            raise failure from error

    def _not_written(self, error: OSError, num_bytes: int) -> WeightSyncError:
        found = refusal(error, self._place.folder) or Problem(str(error), "Make room there")
        return WeightSyncError(
            f"Weights could not be written to {self._place.folder}: {found.text}. {num_bytes / 1e6:,.1f} MB are "
            "needed. The policy server keeps the weights that it has.",
            f"{found.remedy}: set `gym_weight_dir` to one that is bigger and that the policy server sees too.",
        )


class _SharedMemoryFile:
    """One nameless file, used again and again. It exists as long as a process has it open."""

    def __init__(self) -> None:
        self.folder = _SHARED_MEMORY
        self._file: IO[bytes] | None = None
        self._sink: MapSink | None = None
        if not (self.folder.is_dir() and hasattr(os, "O_TMPFILE")):
            raise ConfigError(
                f"There is no shared memory at {self.folder} to hand weights over in.",
                "Set `gym_weight_dir` to a folder that the trainer can write and the policy server can read.",
            )

    def sink(self, num_bytes: int) -> Sink:
        if self._file is None:
            fd = os.open(self.folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
            self._file = os.fdopen(fd, "r+b", buffering=0)
        if self._sink is None or self._sink.num_bytes != num_bytes:
            self._sink = None  # unmapped before the file shrinks
            self._sink = MapSink(self._file.fileno(), num_bytes)
        return self._sink

    def publish(self, version: str) -> Path:
        assert self._file is not None
        return Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")

    def tidy(self) -> None:
        """Keep the file for the next sync: see the module's docstring."""

    def close(self) -> None:
        self._sink = None
        if self._file is not None:
            self._file.close()
            self._file = None


class _FolderFile:
    """A new file for each sync, so that no cache of a network file system holds an older one of the same name."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"The folder {folder}, to hand weights over in, does not exist.",
                "Set `gym_weight_dir` to one that the trainer can write and the policy server can read.",
            )
        self.folder = folder.absolute()
        # Unguessable, so that two runs with one folder cannot mix up their weights.
        self._prefix = f"trl-gym-{uuid.uuid4().hex[:12]}"
        self._file: IO[bytes] | None = None
        self._published: Path | None = None

    @property
    def _partial(self) -> Path:
        return self.folder / f"{self._prefix}.partial"

    def sink(self, num_bytes: int) -> Sink:
        self.tidy()
        fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._file = os.fdopen(fd, "r+b", buffering=0)
        return FileSink(fd, num_bytes)

    def publish(self, version: str) -> Path:
        # For other hosts it must be on the disk before it has its name, and closed before one of them opens it, which
        # is when an NFS client asks for the newest state.
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._published = self.folder / f"{self._prefix}-{version}-{uuid.uuid4().hex[:8]}.safetensors"
        os.replace(self._partial, self._published)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self._published

    def tidy(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._partial.unlink(missing_ok=True)
        if self._published is not None:
            self._published.unlink(missing_ok=True)
            self._published = None

    close = tidy


def _exhaust(stream: Iterable[object]) -> None:
    """Take part in the collectives that are left."""
    for _ in stream:
        pass
