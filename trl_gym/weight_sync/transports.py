"""Ways for weights to reach the policy server. One class each, behind one Protocol, chosen from the placement.

| transport | where it works                        | how                                                      |
|-----------|---------------------------------------|----------------------------------------------------------|
| `file`    | one host, or a disk that both can see | safetensors file, memory-mapped by the server's workers  |
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trl_gym.errors import ConfigError, WeightSyncError
from trl_gym.policy_server.client import PolicyClient

if TYPE_CHECKING:
    import torch

_SHARED_MEMORY = Path("/dev/shm")


class WeightTransport(Protocol):
    """Moves one set of weights between `start_weight_update` and `finish_weight_update`.

    Called by `WeightSync` only. `connect` comes once, before the first transfer; `send` once per sync, on every rank
    in step; `release` after each sync, however it ended.
    """

    name: str

    def connect(self, client: PolicyClient) -> None:
        """Prepare the server's side. Rank 0."""

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], client: PolicyClient | None) -> int:
        """Exhaust the stream and hand it to the server.

        Args:
            weights: See `weight_sync.source.named_weights`.
            client: The server's control plane on rank 0, None on other ranks, which only take part in collectives.

        Returns:
            Bytes handed over (0 on other ranks).
        """

    def release(self) -> None:
        """Give back what `send` took; the server has loaded the weights or never will. Idempotent."""


class FileTransport:
    """safetensors in shared memory or on a shared disk. Works everywhere, also without a GPU.

    Args:
        folder: Where the file is written: `/dev/shm` by default, so the bytes never touch a disk.
        dtype: Precision that the server computes in; weights are cast before they are written.
    """

    name = "file"

    def __init__(self, folder: str | Path | None = None, dtype: torch.dtype | None = None) -> None:
        base = Path(folder) if folder is not None else _SHARED_MEMORY
        if not base.is_dir():
            raise ConfigError(
                f"There is no folder {base} to hand weights over in; set `gym_weight_dir` to one that the trainer can "
                "write and the policy server can read."
            )
        # Unguessable, so that two runs on one machine cannot mix up their weights.
        self._path = base / f"trl-gym-{os.getpid()}-{uuid.uuid4().hex[:12]}.safetensors"
        self._dtype = dtype

    def connect(self, client: PolicyClient) -> None:
        client.init_weight_transfer({})

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], client: PolicyClient | None) -> int:
        from safetensors.torch import save_file

        if client is None:
            for _ in weights:
                pass
            return 0
        # Copies are needed where the stream takes something back at its end; `to` copies only when the dtype differs.
        tensors = {name: self._owned(tensor) for name, tensor in weights}
        partial = self._path.with_suffix(".partial")
        try:
            save_file(tensors, partial)
            os.replace(partial, self._path)
        except OSError as error:
            raise WeightSyncError(
                f"Weights could not be written to {self._path.parent} ({error}). Free some space there, or set "
                "`gym_weight_dir` to a bigger folder."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        size = self._path.stat().st_size
        client.update_weights({"path": str(self._path)})
        return size

    def release(self) -> None:
        self._path.unlink(missing_ok=True)

    def _owned(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        return tensor.to(device="cpu", dtype=self._dtype, copy=True, memory_format=torch.contiguous_format)


def choose_transport(accepted: Iterable[str], folder: str | None, dtype: torch.dtype | None) -> WeightTransport:
    """The best transport that a policy server accepts.

    Raises:
        ConfigError: The server accepts none that we have.
    """
    accepted = tuple(accepted)
    if "file" in accepted:
        return FileTransport(folder, dtype)
    raise ConfigError(f"The policy server accepts weights by {accepted or 'nothing'}; trl-gym has: file.")
