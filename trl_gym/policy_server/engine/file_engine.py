"""Weight transfer engine `file`: weights arrive as a safetensors file that the server can open.

    POST /init_weight_transfer_engine {"init_info": {"probe": "/proc/4711/fd/9", "secret": "…"}}     or {}
    POST /start_weight_update
    POST /update_weights {"update_info": {"path": "…"}}     once or several times, one file each
    POST /finish_weight_update {"weight_version": "12"}

Imported only inside vLLM's workers. Tensor names are those of the model's checkpoint (Hugging Face names), as for
vLLM's own engines. An update has every parameter of the model, or says that it is `partial`: then layers that it does
not name keep their weights, and those that it names must be whole.

A file that is missing or unreadable is found before any weight is touched. Unknown names are found while loading, and
missing ones in `finish_weight_update`, when weights have already changed. vLLM answers each of these with HTTP 500.
Where its worker runs in the engine process (one CPU, 0.31) the server lives on with a mixture of weights and takes a
complete update; elsewhere treat it as dead.

The bytes are read once, from the mapped file into a layer's new tensor. Then vLLM's layerwise reload continues: on a
GPU it copies the tensor into the one that CUDA graphs refer to, on a CPU most layers are repacked for their kernels
and the tensor is dropped. Both are needed there, and there is no public way around the tensor in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from trl_gym.policy_server.transformers_engine.weight_files import check_probe


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """A file that proves that the worker sees what the trainer writes; an empty one proves nothing."""

    probe: str = ""  # path of the file
    secret: str = ""  # text that it begins with


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One file of weights."""

    path: str  # safetensors file, e.g. `"/proc/4711/fd/9"`
    partial: bool = False  # whether the update leaves parameters out on purpose


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Reads memory-mapped files, one tensor at a time, through the model's own weight loaders."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._expected: set[str] = set()
        self._loaded: set[str] = set()
        self._received: set[str] = set()
        self._partial = False
        self._mixed = False  # whether an update ended halfway, so that only a complete one can fix it

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Read the probe. Raises `OSError`: it cannot be opened; `ValueError`: it is another file."""
        check_probe(init_info.probe, init_info.secret)

    def start_weight_update(self) -> None:
        # Names before the reload: it takes the parameters off their modules.
        self._expected = {name for name, _ in self.model.named_parameters()}  # tied weights appear once
        self._loaded = set()
        self._received = set()
        self._partial = False

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Load one file. Raises `OSError` or `safetensors.SafetensorError`: the file cannot be read; nothing was
        changed; `ValueError` or `KeyError`: the model does not have one of its names."""
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if not names:
                raise ValueError(f"{update_info.path} contains no tensors")
            if update_info.partial and self._mixed:
                raise ValueError("the last update ended halfway: only a complete one can follow, this one is partial")
            if not self._received:
                initialize_layerwise_reload(self.model)
            self._received |= set(names)
            self._partial |= update_info.partial
            try:
                loaded = self.model.load_weights(_tensors(file, names))
                if loaded is None:
                    raise ValueError(f"{type(self.model).__name__}.load_weights does not say what it loaded")
            except Exception:
                self._end_halfway()
                raise
        self._loaded |= set(loaded)

    def finish_weight_update(self) -> None:
        """Put the new weights into service. Raises `ValueError`: parameters that had to come were in none of the
        files."""
        required = _whole_modules(self._expected, self._loaded) if self._partial else self._expected
        missing = sorted(required - self._loaded)
        missing += missing_parts(self._received, getattr(self.model, "packed_modules_mapping", None) or {})
        if missing:
            self._end_halfway()
            raise ValueError(f"the update lacks {len(missing)} parameters of the model: {', '.join(missing[:10])}")
        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_heads()
        self._mixed = False

    def _end_halfway(self) -> None:
        """Give every module parameters again, so that the next update does not continue where this one ended."""
        if self._received:
            finalize_layerwise_reload(self.model, self.model_config)
            self._mixed = True
            self._received = set()

    def _refresh_tied_heads(self) -> None:
        """Rebuild what layers derived from weights that they share.

        On CPU a layer keeps a prepacked copy of its weight. Layerwise reload rebuilds it for the module that owns a
        parameter, not for a second module tied to it: logits came from the old head and nothing failed.
        """
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Do nothing: nothing is held open."""


def missing_parts(received: Collection[str], packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """List checkpoint names that are missing from modules which vLLM packs into one.

    vLLM counts `qkv_proj` as loaded when only `q_proj` came, and computes with whatever memory held for the rest.

    Args:
        received: Checkpoint names, e.g. `{"model.layers.0.self_attn.q_proj.weight"}`.
        packed_modules: Module → its parts, e.g. `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.

    Returns:
        Sorted names, e.g. `["model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"]`.
    """
    missing = set()
    for parts in packed_modules.values():
        for name in received:
            path = name.split(".")
            for place in (i for i, module in enumerate(path) if module in parts):
                siblings = {".".join([*path[:place], part, *path[place + 1 :]]) for part in parts}
                missing |= siblings.difference(received)
    return sorted(missing)


def _whole_modules(expected: Collection[str], loaded: Collection[str]) -> set[str]:
    """List parameters of the modules of which something was loaded: a module is rebuilt from what came alone."""
    touched = {name.rpartition(".")[0] for name in loaded}
    return {name for name in expected if name.rpartition(".")[0] in touched}


def _tensors(file: Any, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        yield name, file.get_tensor(name)
