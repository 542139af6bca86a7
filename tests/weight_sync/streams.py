"""A stream of given tensors, and a server that only looks at what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file

from trl_gym.weight_sync.protocol import WeightMeta


@dataclass
class Stream:
    """Implements `WeightStream`.

    Attributes:
        tensors: What it yields.
        announced: What its metadata says instead.
        num_walked: Tensors taken from it so far.
    """

    tensors: dict[str, torch.Tensor]
    announced: dict[str, torch.Tensor] | None = None
    num_walked: int = 0

    def metadata(self) -> list[WeightMeta]:
        shown = self.tensors if self.announced is None else self.announced
        return [WeightMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in shown.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors.items():
            self.num_walked += 1
            yield name, tensor

    @property
    def is_over(self) -> bool:
        return self.num_walked == len(self.tensors)


@dataclass
class LookingClient:
    """Stands for `PolicyClient`; keeps a copy of every file that it is told of."""

    root_url: str = "http://127.0.0.1:8000"
    updates: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, torch.Tensor]] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    num_abandoned: int = 0

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        with open(init_info["probe"]) as file:
            self.probes.append(file.read())
        assert self.probes[-1] == init_info["secret"]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.updates.append(update_info)
        self.files.append({name: tensor.clone() for name, tensor in load_file(update_info["path"]).items()})

    def abandon_weight_update(self) -> bool:
        self.num_abandoned += 1
        return False


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
