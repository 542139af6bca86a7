"""Check that a folder is a LoRA adapter that vLLM serves as it was trained, before vLLM sees it.

vLLM takes `adapter_config.json` at its word and ignores what it does not know: magnitudes of DoRA, trained biases,
ranks and scales of single modules. And it reads a file that it cannot load inside the engine. So everything is checked
here, from the config and the header of the tensor file; no tensor is read.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 2**20
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit

# Fields that make a LoRA more than two matrices per linear layer with one scale for all, with any value but None,
# False and an empty one.
_UNSERVABLE = {
    "use_dora": "DoRA's magnitudes have no place in vLLM's adapters",
    "modules_to_save": "modules that are trained whole are not part of an adapter",
    "lora_bias": "biases of an adapter are not served",
    "target_parameters": "adapters on parameters (fused experts) are not served",
    "trainable_token_indices": "trained token embeddings are not part of an adapter",
    "rank_pattern": "vLLM scales every module by one factor",
    "alpha_pattern": "vLLM scales every module by one factor",
    "layer_replication": "the server has no replicated layers",
    "megatron_config": "Megatron's layers are not served",
    "use_qalora": "QA-LoRA pools its inputs",
    "alora_invocation_tokens": "activated LoRA depends on the prompt",
    "arrow_config": "routed adapters are not served",
    "velora_config": "VeLoRA is not served",
    "kasa_config": "KaSA has a diagonal between its matrices",
    "monteclora_config": "MonteCLoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served as such",
}
# PEFT's ways to initialize that leave the base's weights as they are in the checkpoint.
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
_HEADS_AND_EMBEDDINGS = ("lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "wpe", "score", "classifier")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_TENSOR_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class InvalidAdapterError(ValueError):
    """The folder cannot be served; the text says why."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on disk."""

    rank: int  # `r` of its config
    modules: tuple[str, ...]  # names of the adapted modules, e.g. `"model.layers.0.mlp.up_proj"`
    num_bytes: int  # size of the tensor file


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """List reasons why vLLM would not compute with an adapter what its trainer does; empty if it would.

    Args:
        config: The fields of `adapter_config.json`, or of `LoraConfig.to_dict()`.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        return [f"peft_type is {kind!r}; vLLM serves LoRA only"]
    problems = [f"{name} is {config[name]!r}: {why}" for name, why in _UNSERVABLE.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: trained biases are not part of an adapter")
    if config.get("init_lora_weights", True) not in _INITS_THAT_KEEP_THE_BASE:
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']!r}: it changes the base's weights, and the server has "
            "those of the checkpoint"
        )
    return problems


def module_problems(modules: tuple[str, ...]) -> list[str]:
    """List reasons why vLLM would not apply an adapter to some modules as PEFT does. Heads and embeddings: with an
    adapter on the head, vLLM 0.31 leaves its part out of prompt log-probabilities, or dies of them."""
    names = sorted({name.rsplit(".", 1)[-1] for name in modules}.intersection(_HEADS_AND_EMBEDDINGS))
    return [f"{name} has an adapter: vLLM serves those of linear layers in the blocks only" for name in names]


def read_adapter(folder: str) -> AdapterFiles:
    """Check a folder. Raises `InvalidAdapterError`: it is not an absolute path of a folder with both files, or they
    are not those of an adapter that vLLM can serve."""
    path = Path(folder)
    if not path.is_absolute():
        raise InvalidAdapterError(f"{folder!r} must be an absolute path")  # vLLM would look for it on the model hub
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is longer than file systems take
        raise InvalidAdapterError(f"the path of the adapter cannot be read: {error.strerror}") from error
    if not is_folder:
        raise InvalidAdapterError(
            f"{folder} does not exist on the policy server; set `gym_weight_dir` to a folder that both it and the "
            "trainer see"
        )
    config = _read_config(path / CONFIG_FILE)
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InvalidAdapterError(f"{CONFIG_FILE}: r must be a positive integer, not {rank!r}")
    modules, num_bytes = _read_tensors(path / TENSOR_FILE, rank)
    problems = config_problems(config) + module_problems(modules)
    if problems:
        raise InvalidAdapterError(f"{CONFIG_FILE}: {'; '.join(problems)}")
    return AdapterFiles(rank, modules, num_bytes)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        _check_file(path, at_most=_MAX_CONFIG_BYTES)
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapterError(f"{path.name} is not a JSON object")
    if not isinstance(config.get("lora_alpha"), int | float) or not config.get("target_modules"):
        raise InvalidAdapterError(f"{path.name} lacks lora_alpha or target_modules")
    return config


def _read_tensors(path: Path, rank: int) -> tuple[tuple[str, ...], int]:
    """Return module names and size of the file, from the header alone: 8 bytes of length, JSON, data."""
    try:
        num_bytes = _check_file(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
                raise InvalidAdapterError(f"{path.name} is not a safetensors file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        if isinstance(error, InvalidAdapterError):
            raise
        raise InvalidAdapterError(f"{path.name} cannot be read: {error}") from error
    if 8 + length + end != num_bytes:
        raise InvalidAdapterError(f"{path.name} has {num_bytes} bytes and its header says {8 + length + end}")
    return _modules_of(shapes, rank), num_bytes


def _modules_of(shapes: Mapping[str, tuple[str, tuple[int, ...]]], rank: int) -> tuple[str, ...]:
    sides: dict[str, set[str]] = {}
    for name, (dtype, shape) in shapes.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise InvalidAdapterError(f"{TENSOR_FILE}: {name} is not a matrix of a LoRA")
        if dtype not in _FLOATS or len(shape) != 2 or shape["AB".index(match["side"])] != rank:
            raise InvalidAdapterError(f"{TENSOR_FILE}: {name} is {dtype}{list(shape)}; its rank must be {rank}")
        sides.setdefault(match["module"], set()).add(match["side"])
    if not sides:
        raise InvalidAdapterError(f"{TENSOR_FILE} is empty")
    if halves := sorted(module for module, found in sides.items() if len(found) == 1):
        raise InvalidAdapterError(f"{TENSOR_FILE}: only one matrix of {', '.join(halves[:5])}")
    return tuple(sorted(sides))


def _check_file(path: Path, *, at_most: int | None = None) -> int:
    """Return the size of a regular file: a pipe or a device would never end. Raises `OSError`, `ValueError`."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("it is not a file")
    if at_most is not None and info.st_size > at_most:
        raise ValueError(f"it has {info.st_size} bytes")
    return info.st_size
