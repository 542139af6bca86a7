"""What is served and what is refused, from the files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.policy_server.adapter_folder import MODULES, write_adapter
from tests.policy_server.tiny_model import build_model, build_tokenizer
from trl_gym.policy_server.adapter_files import InvalidAdapterError, config_problems, read_adapter


def refusal(folder: Path | str) -> str:
    with pytest.raises(InvalidAdapterError) as error:
        read_adapter(str(folder))
    return str(error.value)


def test_what_peft_writes_is_served(tmp_path: Path) -> None:
    model = get_peft_model(build_model(build_tokenizer(), tie=True, seed=0), LoraConfig(r=2, use_rslora=True))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(str(tmp_path))
    assert (adapter.rank, len(adapter.modules)) == (2, 4)
    assert adapter.modules[0] == "model.layers.0.self_attn.q_proj"
    assert adapter.num_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "File name too long" in refusal("/" + "a" * 5000)
    assert "must be an absolute path" in refusal("some/hub-id")
    assert "does not exist on the policy server" in refusal(tmp_path / "missing")
    assert "adapter_config.json cannot be read" in refusal(tmp_path)
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "a" / "adapter_model.safetensors")  # reading it would never end
    assert "it is not a file" in refusal(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 4}', '{"r": 4, "lora_alpha": 8, "target_modules": []}'])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (write_adapter(tmp_path / "a") / "adapter_config.json").write_text(text)
    assert refusal(tmp_path / "a").startswith("adapter_config.json")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save is \['norm'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": 8}, r"lora_A.weight is F32\[4, 8\]; its rank must be 8"),
    ],
)
def test_an_adapter_that_is_more_than_vllm_serves(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    write_adapter(tmp_path / "a", **config)
    with pytest.raises(InvalidAdapterError, match=text):
        read_adapter(str(tmp_path / "a"))


def test_what_a_plain_lora_config_says_is_no_problem() -> None:
    assert config_problems(LoraConfig(r=4, target_modules=["q_proj"]).to_dict()) == []


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "is empty"),
        ({f"base_model.model.{MODULES[0]}.lora_A.weight": torch.ones(4, 8)}, "only one matrix of model.layers.0"),
        ({f"base_model.model.{MODULES[0]}.weight": torch.ones(4, 8)}, "is not a matrix of a LoRA"),
        ({f"base_model.model.{MODULES[0]}.lora_A.weight": torch.ones(4)}, r"is F32\[4\]; its rank"),
        ({f"base_model.model.{MODULES[0]}.lora_A.weight": torch.ones(4, 8, dtype=torch.int8)}, "is I8"),
    ],
)
def test_tensors_that_are_no_adapter(tmp_path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    write_adapter(tmp_path / "a", tensors=tensors)
    with pytest.raises(InvalidAdapterError, match=text):
        read_adapter(str(tmp_path / "a"))


def test_a_head_is_refused(tmp_path: Path) -> None:
    sides = {"lm_head.lora_A.weight": torch.ones(4, 8), "lm_head.lora_B.weight": torch.ones(8, 4)}
    assert "lm_head has an adapter" in refusal(write_adapter(tmp_path / "a", tensors=sides))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a safetensors file"),
        ((2**60).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "cannot be read"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "cannot be read"),
    ],
)
def test_a_tensor_file_that_is_none(tmp_path: Path, content: bytes, text: str) -> None:
    (write_adapter(tmp_path / "a") / "adapter_model.safetensors").write_bytes(content)
    assert text in refusal(tmp_path / "a")


def test_a_tensor_file_that_was_cut_off(tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "its header says" in refusal(tmp_path / "a")


def test_every_reason_is_given(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", use_dora=True, bias="all")
    text = refusal(tmp_path / "a")
    assert "use_dora" in text and "bias" in text
