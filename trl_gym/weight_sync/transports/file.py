"""Transport `file`: weights in shared memory or on a shared disk, memory-mapped by the server's workers.

    server on this host      a nameless file in shared memory, which the server opens as /proc/<our pid>/fd/<n>
    `gym_weight_dir` is set  a named file in that folder, which the server may see over a network

The nameless file stays, and stays mapped, from one sync to the next: writing to memory that the kernel has to find,
clear and map first takes several times as long (`benchmarks/weight_sync.py`). So one copy of what was sent last is
held in shared memory. It cannot be left behind: it goes with this process, however that ends. A named file is removed
after each sync.
"""

from __future__ import annotations

import errno
import os
import secrets
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from trl_gym.errors import ConfigError, PolicyServerError, WeightSyncError
from trl_gym.weight_sync.transports.safetensors_file import FileSink, Layout, MapSink, Sink, layout, put_text, write

if TYPE_CHECKING:
    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.weight_sync.protocol import WeightStream

_SHARED_MEMORY = Path("/dev/shm")


class _Place(Protocol):
    """Where a file is while it is written, and how the server finds it.

    Attributes:
        folder: Named in messages; its file system is the one that fills up.
    """

    folder: Path

    def sink(self, num_bytes: int) -> Sink:
        """Something of that size to write to. Raises `OSError`."""

    def publish(self, version: str) -> Path:
        """The written file's path, from the server's point of view. Raises `OSError`."""

    def tidy(self) -> None:
        """After each sync, and after one that failed. Idempotent."""

    def close(self) -> None:
        """Give everything back. Idempotent; the place can be opened again."""


class FileTransport:
    """safetensors in shared memory or on a shared disk. Works everywhere, also without a GPU.

    Args:
        folder: Where files are written; shared memory when not given, so that the bytes never touch a disk.

    Raises:
        ConfigError: There is no such folder, or no shared memory.
    """

    name = "file"
    replaces = True
    sends_part = True

    def __init__(self, folder: str | Path | None = None) -> None:
        self._place: _Place = _SharedMemoryFile() if folder is None else _FolderFile(Path(folder))
        self._num_complete = 0  # parameters in a complete update of the server that we are connected to

    def connect(self, client: PolicyClient) -> None:
        """Prove that the server reads what we write.

        Raises:
            WeightSyncError: It does not: another host, container or user.
        """
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
                f"({error}). Set `gym_weight_dir` to a folder that both see under this path and may read, e.g. on a "
                "disk that both hosts mount."
            ) from error
        finally:
            self._place.close()
        self._num_complete = 0

    def disconnect(self) -> None:
        # Another file from here on: the server that is gone may still be reading this one.
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
        # A stream that has fewer parameters than the first one is of those that are trained.
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
        state = os.statvfs(self._place.folder)
        return WeightSyncError(
            f"Weights could not be written to {self._place.folder} ({os.strerror(error.errno or errno.EIO)}): "
            f"{num_bytes / 1e6:,.1f} MB are needed, {state.f_bavail * state.f_frsize / 1e6:,.1f} MB are free. Free "
            "some space there, or set `gym_weight_dir` to a bigger folder that the policy server sees too."
        )


class _SharedMemoryFile:
    """One nameless file, used again and again. It exists as long as somebody has it open."""

    def __init__(self) -> None:
        self.folder = _SHARED_MEMORY
        self._file: IO[bytes] | None = None
        self._sink: MapSink | None = None
        if not (self.folder.is_dir() and hasattr(os, "O_TMPFILE")):
            raise ConfigError(
                f"There is no shared memory at {self.folder} to hand weights over in; set `gym_weight_dir` to a "
                "folder that the trainer can write and the policy server can read."
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
        """Nothing: see the module's docstring."""

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
                f"There is no folder {folder} to hand weights over in; set `gym_weight_dir` to one that the trainer "
                "can write and the policy server can read."
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
        # Other hosts: on the disk before it has its name, and closed before anybody opens it, which is when an NFS
        # client asks for the newest state.
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
