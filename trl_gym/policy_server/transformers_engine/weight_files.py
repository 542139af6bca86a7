"""Weights that arrive as safetensors files, as `weight_sync/transports/file.py` writes them, in a transformers model.

    POST /init_weight_transfer_engine {"init_info": {"probe": "/proc/4711/fd/9", "secret": "…"}}
    POST /update_weights {"update_info": {"path": "…", "partial": false}}     once or several times, one file each
    POST /finish_weight_update {"weight_version": "12"}

Names are those of the model's checkpoint. An update has every parameter of the model, or says that it is `partial`:
then those that it does not name keep their weights. A file that is missing or unreadable, a name that the model does
not have and another shape are found before any weight is touched; what is missing is found in `finish`, when weights
have changed: a complete update can follow, and nothing else.

vLLM's workers read the same files with vLLM's own loaders (`engine/file_engine.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from trl_gym.errors import WeightSyncError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_NAMED = 10


def check_probe(probe: str, secret: str) -> None:
    """Prove that this process sees what the trainer writes.

    Args:
        probe: Path of a file; an empty one proves nothing.
        secret: Text that the file begins with.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is another file.
    """
    if not probe:
        return
    with Path(probe).open("rb") as file:
        if file.read(len(secret.encode())) != secret.encode():
            raise ValueError(f"{probe} is another file here")


class ModelFiles:
    """Loads files into the model of this process, one tensor at a time. A `WeightLoader` of the application."""

    backend = "file"

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._received: set[str] = set()
        self._partial = False
        self._mixed = False  # whether an update ended halfway, so that only a complete one can fix it

    def init(self, init_info: Mapping[str, Any]) -> None:
        """Read the probe. Raises `WeightSyncError` if it is not what the trainer wrote."""
        try:
            check_probe(str(init_info.get("probe", "")), str(init_info.get("secret", "")))
        except (OSError, ValueError) as error:
            raise WeightSyncError(
                f"The policy server cannot read what the trainer wrote: {error}.",
                "Set `gym_weight_dir` to a folder that both see under the same path.",
            ) from error

    def update(self, model: PreTrainedModel, update_info: Mapping[str, Any]) -> None:
        """Load one file. Raises `WeightSyncError`: it cannot be read or has other weights than the model, which was
        not changed."""
        path, partial = str(update_info.get("path", "")), bool(update_info.get("partial"))
        if partial and self._mixed:
            raise WeightSyncError(
                "The last update ended halfway: only a complete one can follow, this one is partial."
            )
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                weights = self._fitting(model, file, partial)
                self._model, self._mixed = model, True
                self._partial |= partial
                with torch.no_grad():
                    for name, tensor in weights.items():
                        tensor.copy_(file.get_tensor(name))
                        self._received.add(name)
        except (OSError, SafetensorError) as error:
            raise WeightSyncError(f"The policy server cannot read the weights in {path!r}: {error}.") from error

    def finish(self) -> None:
        """End an update. Raises `WeightSyncError`: weights that had to come were in none of the files, or there was
        none."""
        received, partial, model = self._received, self._partial, self._model
        self._received, self._partial, self._model = set(), False, None
        if model is None:
            raise WeightSyncError("No weights have come that an update could be finished with.", "Send them first.")
        if not partial:
            own = model.state_dict(keep_vars=True)
            told = {own[name].data_ptr() for name in received}
            if missing := sorted(name for name, tensor in own.items() if tensor.data_ptr() not in told):
                raise WeightSyncError(
                    f"The update lacks {len(missing)} weights of the model: {', '.join(missing[:_MAX_NAMED])}.",
                    "Serve the model that is trained.",
                )
        self._mixed = False

    def _fitting(self, model: PreTrainedModel, file: Any, partial: bool) -> dict[str, torch.Tensor]:
        """Return the model's own tensors for the names of a file."""
        own, names = model.state_dict(keep_vars=True), list(file.keys())
        problems = [f"{name}, which the model does not have" for name in names if name not in own]
        for name in (name for name in names if name in own):
            if (shape := tuple(file.get_slice(name).get_shape())) != tuple(own[name].shape):
                problems.append(f"{name} as {shape}, which is {tuple(own[name].shape)} in the model")
        if problems or not names:
            raise WeightSyncError(
                f"The file of weights has {'; '.join(problems[:_MAX_NAMED]) or 'no tensors'}.",
                "Serve the model that is trained; one whose checkpoint has other names than transformers gives its "
                "weights (experts, mostly) needs vLLM, or `gym_engine` 'transformers' in the trainer's own process.",
            )
        return {name: own[name] for name in names}
