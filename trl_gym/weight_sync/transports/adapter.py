"""Transport `adapter`: only the LoRA adapter is sent, as a new version beside those that rollouts in flight hold.

    <folder>/trl-gym-adapters-<pid>-<random>/policy@12/adapter_config.json, adapter_model.safetensors

The bytes and the time do not depend on the base's size, no weight in service is touched, and nothing is rounded: a
merge into a bfloat16 base is. Whether vLLM can serve an adapter is said by `adapter_checks.py`.

vLLM may read the folder of a loaded adapter again, at any time, and its engine dies if it is not there. So a folder is
deleted when the server has not listed it for two syncs (a call that was aborted may be in the engine a little longer
than its adapter is listed), or has been cleared, or this process ends.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import ConfigError, WeightSyncError
from trl_gym.policy_server.adapter_files import CONFIG_FILE, TENSOR_FILE
from trl_gym.weight_sync.protocol import WeightMeta
from trl_gym.weight_sync.transports.plan import adapter_problem, merged_problem, plan_adapter

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig
    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.policy_server.server import PolicyBackend

_logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_OWN_WEIGHTS = "default"  # the version of a vLLM server whose weights are those that it loaded when it started


def wanted_transport(args: GymGRPOConfig, model: torch.nn.Module) -> str:
    """`gym_weight_transport`, where `"auto"` is `"adapter"` for an adapter on a quantized base: nothing else can send
    that. Everywhere else `"auto"` sends whole weights, because rollouts are faster without an adapter."""
    if args.gym_weight_transport == "auto" and merged_problem(model) is not None and plan_adapter(model) is not None:
        return "adapter"
    return args.gym_weight_transport


def adapter_options(args: GymGRPOConfig, model: torch.nn.Module, server: PolicyBackend) -> dict[str, Any]:
    """What `choose.TransportOptions` must know about adapters.

    Args:
        args: The trainer's configuration.
        model: The trainer's, unwrapped.
        server: Ready.

    Returns:
        `adapter`, `adapter_problem` and `merged_problem`, see there.

    Raises:
        ConfigError: There is no folder to hand adapters over in.
    """
    merged = merged_problem(model)
    if merged is None and "adapter" in server.weight_transports:  # wrapped layers do not take whole weights (0.31)
        merged = "the policy server was started with --enable-lora, where whole weights cannot be replaced"
    if args.gym_weight_transport != "adapter" and (args.gym_weight_transport != "auto" or merged is None):
        if (plan := plan_adapter(model)) is not None:
            other = f"it cannot be sent alone: {plan.problem}" if plan.problem else "'adapter' would send it alone"
            _logger.info(
                "`gym_weight_transport` is %r: whole weights are sent, with the adapter merged into them; %s",
                args.gym_weight_transport,
                other,
            )
        return {"merged_problem": merged}
    problem = adapter_problem(model) or adapter_problem(model, server.client.server_config())
    if problem is not None:
        return {"adapter_problem": problem, "merged_problem": merged}
    transport = AdapterTransport(args.gym_weight_dir, max_adapters=args.gym_max_adapters)
    return {"adapter": transport, "merged_problem": merged}


class AdapterSource:
    """The tensors of the active LoRA adapter as a `WeightStream`, named as in PEFT's checkpoints, and its config.

    Args:
        model: As for `WeightSource`; the base may be quantized.
        accelerator: The trainer's.

    Raises:
        ConfigError: It has no adapter, it is not LoRA, or several are active.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator | None = None) -> None:
        from trl_gym.weight_sync.source import adapter_state

        self._model, self._accelerator = model, accelerator
        self.config: dict[str, Any] = adapter_state(model, accelerator)[0]

    def metadata(self) -> list[WeightMeta]:
        """Gathers, unlike that of whole weights: adapters are small."""
        return [WeightMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        from trl_gym.weight_sync.source import adapter_state

        return adapter_state(self._model, self._accelerator)[1]


class AdapterTransport:
    """Versioned LoRA adapters through a folder that trainer and server see.

    Args:
        folder: Where they are written: `/dev/shm` by default.
        max_adapters: Versions that the server may keep at the same time.
        name: Of the policy; version 12 is called `<name>@12`.
    """

    name = "adapter"
    replaces = False
    sends_part = False

    def __init__(self, folder: str | Path | None = None, *, max_adapters: int = 2, name: str = "policy") -> None:
        base = Path(folder) if folder is not None else _SHARED_MEMORY
        if not base.is_dir():
            raise ConfigError(
                f"There is no folder {base} to hand adapters over in; set `gym_weight_dir` to one that the trainer "
                "can write and the policy server can read."
            )
        # Unguessable, so that two runs on one machine cannot mix up their adapters.
        self._folder = base.absolute() / f"trl-gym-adapters-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._max_adapters = max_adapters
        self._policy_name = name
        self._written: Path | None = None  # by a `send` that has not succeeded
        self._needed: set[Path] = set()  # by the server, as it said last
        self._unlisted: set[Path] = set()  # since the last sync
        weakref.finalize(self, _remove, self._folder, os.getpid())  # with this process at the latest

    def connect(self, client: PolicyClient) -> None:
        if client.is_paused():
            raise WeightSyncError(
                f"The policy server at {client.root_url} is paused, as a trainer leaves it that is killed while it "
                "sends weights: an adapter cannot make up for weights that are half replaced. Restart the server."
            )
        client.clear_adapters()
        held = client.weight_version()
        if held != _OWN_WEIGHTS:
            raise WeightSyncError(
                f"The policy server at {client.root_url} holds weights of version {held!r}, which somebody sent to "
                "it, and the adapter is trained on those of the checkpoint. Restart the server, or use "
                "`gym_weight_transport: file`."
            )
        self._delete(set(self._folder.iterdir()) if self._folder.is_dir() else set())
        self._needed, self._unlisted = set(), set()

    def disconnect(self) -> None:
        """Folders stay until the next `connect`: a server that only could not be reached may still need them."""

    def send(self, weights: AdapterSource, client: PolicyClient | None, version: str) -> int:
        if client is None:
            for _ in weights:
                pass
            return 0
        # Small: all of it is copied before anything is written, and a full disk leaves no rank in a collective.
        tensors = {name: tensor.detach().to(device="cpu", copy=True).contiguous() for name, tensor in weights}
        name = f"{self._policy_name}@{version}"
        self._written = self._write(name, weights.config, tensors)
        num_bytes = sum(file.stat().st_size for file in self._written.iterdir())
        needed = client.load_adapter(
            name, str(self._written), version, max_adapters=self._max_adapters, wait_s=client.timeout_s
        )
        self._keep({Path(path) for path in needed})
        self._written = None
        return num_bytes

    def release(self) -> None:
        """A folder that was written and not loaded is deleted; one that is in service stays."""
        if self._written is not None:
            self._delete({self._written})
            self._written = None

    def _write(self, name: str, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
        """One folder, complete or not there. Raises `WeightSyncError`."""
        from safetensors.torch import save_file

        unique = uuid.uuid4().hex[:8]  # a version that is sent again must not overwrite what may be read again
        path, partial = self._folder / f"{name}-{unique}", self._folder / f".{name}-{unique}.partial"
        try:
            partial.mkdir(parents=True)
            save_file(tensors, partial / TENSOR_FILE, metadata={"format": "pt"})
            (partial / CONFIG_FILE).write_text(json.dumps(config, indent=1))
            os.replace(partial, path)
        except OSError as error:
            raise WeightSyncError(
                f"The adapter could not be written to {self._folder} ({error}). Free some space there, or set "
                "`gym_weight_dir` to a bigger folder."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return path

    def _keep(self, needed: set[Path]) -> None:
        """Delete what the server needs no more."""
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
