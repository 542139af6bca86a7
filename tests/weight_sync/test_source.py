"""The names and values that leave the trainer are those that vLLM loads."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_gym.weight_sync.source import named_weights


def model(*, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_streams_its_parameters_once(tied: bool) -> None:
    policy = model(tied=tied)
    streamed = dict(named_weights(policy))
    assert set(streamed) == {name for name, _ in policy.named_parameters()}
    assert ("lm_head.weight" in streamed) is not tied
    assert not any(tensor.requires_grad for tensor in streamed.values())


@pytest.mark.parametrize("modules_to_save", [None, ["norm"]])
def test_an_adapter_is_merged_under_the_base_models_names_and_taken_out_again(
    modules_to_save: list[str] | None,
) -> None:
    base = model()
    names = {name for name, _ in base.named_parameters()}
    before = {name: tensor.clone() for name, tensor in named_weights(base)}
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=modules_to_save)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    expected = adapted(torch.arange(8)[None]).logits

    streamed = {name: tensor.clone() for name, tensor in named_weights(adapted)}

    assert set(streamed) == names
    changed = {name.split(".")[-2] for name in names if not torch.equal(streamed[name], before[name])}
    assert changed == {"q_proj", "up_proj"}
    merged = model()
    merged.load_state_dict(streamed, strict=False)
    torch.testing.assert_close(merged(torch.arange(8)[None]).logits, expected, atol=1e-5, rtol=1e-4)
    assert not any(getattr(module, "merged", False) for module in adapted.modules())


def test_the_adapter_is_taken_out_even_if_the_stream_is_abandoned() -> None:
    adapted = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"]))
    stream = named_weights(adapted)
    next(stream)
    assert any(getattr(module, "merged", False) for module in adapted.modules())
    stream.close()
    assert not any(getattr(module, "merged", False) for module in adapted.modules())
