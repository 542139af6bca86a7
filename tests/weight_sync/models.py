"""Small models and adapters of the tests of weight sync, on one rank and on several."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

# An odd vocabulary: shards of two ranks differ in size, or are padded.
_SIZES: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def model(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, tie_word_embeddings=tied)).to(dtype)


def mixture() -> Qwen3MoeForCausalLM:
    """Whose experts transformers holds fused and the checkpoint one by one."""
    torch.manual_seed(0)
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **experts))


def with_adapter(base: torch.nn.Module, *, adapters: int = 1, **options: Any) -> PeftModel:
    """Adapters with random values, all of them active."""
    configs = [LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"]} | options) for _ in range(adapters)]
    adapted = get_peft_model(base, configs[0])
    for index, config in enumerate(configs[1:]):
        adapted.add_adapter(f"other{index}", config)
    if adapters > 1:
        adapted.base_model.set_adapter(["default", *(f"other{index}" for index in range(adapters - 1))])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return adapted
