"""Transport `adapter`: only the LoRA adapter is sent, as a new version beside those that rollouts in flight hold.

    <folder>/trl-gym-adapters-<pid>-<random>/policy@12/adapter_config.json, adapter_model.safetensors

The bytes and the time do not depend on the base's size, no weight in service is touched, and nothing is rounded: a
merge into a bfloat16 base is. `plan.py` checks whether vLLM can serve the adapter.

vLLM may read the folder of a loaded adapter again, at any time, and its engine dies if the folder does not exist. So
one is deleted when the server has not listed it for two syncs (a call that was aborted may be in the engine a little
longer than its adapter is listed), or has been cleared, or this process ends.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import ConfigError, WeightSyncError
from trl_gym.given import home_path
from trl_gym.policy_server.adapter_files import CONFIG_FILE, TENSOR_FILE
from trl_gym.storage import writing
from trl_gym.weight_sync.source import AdapterSource

if TYPE_CHECKING:
    import torch

    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.weight_sync.protocol import WeightStream

_SHARED_MEMORY = Path("/dev/shm")
_POLICY_NAME = "policy"  # version 12 is served as `policy@12`
_OWN_WEIGHTS = "default"  # version of a vLLM server that has the weights that it loaded when it started


class AdapterTransport:
    """Versioned LoRA adapters through a folder that trainer and server see.

    Args:
        folder: Folder to write them to; `/dev/shm` by default.
        max_adapters: Versions that the server may keep at the same time.

    Raises:
        ConfigError: The folder does not exist.
    """

    name = "adapter"
    replaces = False

    def __init__(self, folder: str | Path | None = None, *, max_adapters: int = 2) -> None:
        base = Path(home_path(folder)) if folder is not None else _SHARED_MEMORY
        if not base.is_dir():
            raise ConfigError(
                f"The folder {base}, to hand adapters over in, does not exist.",
                "Set `gym_weight_dir` to one that the trainer can write and the policy server can read.",
            )
        # Unguessable, so that two runs on one machine cannot mix up their adapters.
        self._folder = base.absolute() / f"trl-gym-adapters-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._max_adapters = max_adapters
        self._written: Path | None = None  # by a `send` that has not succeeded yet
        self._needed: set[Path] = set()  # folders that the server listed last
        self._unlisted: set[Path] = set()  # folders that it has not listed since the last sync
        weakref.finalize(self, _remove, self._folder, os.getpid())  # with this process at the latest

    def connect(self, client: PolicyClient) -> None:
        if client.is_paused():
            raise WeightSyncError(
                f"The policy server at {client.root_url} is paused: a trainer was probably killed during a weight "
                "sync, and an adapter cannot make up for weights that are half replaced.",
                "Restart the server.",
            )
        client.clear_adapters()
        held = client.weight_version()
        if held != _OWN_WEIGHTS:
            raise WeightSyncError(
                f"The policy server at {client.root_url} holds weights of version {held!r}, which another run sent to "
                "it, and the adapter is trained on those of the checkpoint.",
                "Restart the server, or use `gym_weight_transport: file`.",
            )
        self._delete(set(self._folder.iterdir()) if self._folder.is_dir() else set())
        self._needed, self._unlisted = set(), set()

    def disconnect(self) -> None:
        """Keep the folders until the next `connect`: a server that only could not be reached may still need them."""

    def send(self, weights: WeightStream, client: PolicyClient | None, version: str) -> int:
        if client is None:
            for _ in weights:
                pass
            return 0
        assert isinstance(weights, AdapterSource)  # `WeightSync` makes one for this transport
        # Small: all of it is copied before anything is written, and a full disk leaves no rank in a collective.
        tensors = {name: tensor.detach().to(device="cpu", copy=True).contiguous() for name, tensor in weights}
        name = f"{_POLICY_NAME}@{version}"
        self._written = self._write(name, weights.config, tensors)
        num_bytes = sum(file.stat().st_size for file in self._written.iterdir())
        needed = client.load_adapter(
            name, str(self._written), version, max_adapters=self._max_adapters, wait_s=client.timeout_s
        )
        self._keep({Path(path) for path in needed})
        self._written = None
        return num_bytes

    def release(self) -> None:
        """Delete a folder that was written and not loaded; one that is in service stays."""
        if self._written is not None:
            self._delete({self._written})
            self._written = None

    def _write(self, name: str, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
        """Write one folder, which exists only when it is complete. Raises `WeightSyncError`."""
        from safetensors.torch import save_file

        unique = uuid.uuid4().hex[:8]  # a version that is sent again must not overwrite what may be read again
        path, partial = self._folder / f"{name}-{unique}", self._folder / f".{name}-{unique}.partial"
        safe, also = "The policy server keeps the weights that it has.", "for which `gym_weight_dir` can be set"
        try:
            with writing("The adapter", self._folder, safe=safe, kind=WeightSyncError, also=also):
                partial.mkdir(parents=True)
                save_file(tensors, partial / TENSOR_FILE, metadata={"format": "pt"})
                (partial / CONFIG_FILE).write_text(json.dumps(config, indent=1))
                os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return path

    def _keep(self, needed: set[Path]) -> None:
        """Delete what the server does not need any more."""
        self._delete(self._unlisted - needed)
        self._unlisted = self._needed - needed
        self._needed = needed

    @staticmethod
    def _delete(folders: set[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not when a forked child ends
        shutil.rmtree(folder, ignore_errors=True)
