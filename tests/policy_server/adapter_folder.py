"""Writes adapter folders as PEFT does, and as it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")


def write_adapter(
    folder: Path, *, rank: int = 4, tensors: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """An adapter of two modules, 8 wide, that vLLM can serve, unless a test changes it."""
    folder.mkdir(parents=True)
    if tensors is None:
        tensors = {}
        for module in MODULES:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, 8)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(8, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder
