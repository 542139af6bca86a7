"""What the planner is told about real configurations: parameters counted without memory, stages, optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_gym import GymGRPOConfig
from trl_gym.memory.plan import (
    GIB,
    DeviceMemory,
    MemoryPlan,
    ModelShape,
    count_params,
    from_trainer,
    optimizer_bytes,
    this_device,
)

DEVICE = DeviceMemory(total_bytes=24 * GIB)
LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])


def qwen(**changes: Any) -> Qwen3Config:
    return Qwen3Config(
        **{
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
        }
        | changes
    )  # fmt: skip


def args(tmp_path: Path, **changes: Any) -> GymGRPOConfig:
    return GymGRPOConfig(
        **{"output_dir": str(tmp_path), "use_cpu": True, "vllm_max_model_length": 4096, "max_completion_length": 512}
        | changes
    )


def numbers(plan: MemoryPlan) -> dict[str, int]:
    return {f"{item.owner} {item.name}": item.num_bytes for item in plan.items}


def test_parameters_are_counted_as_they_are() -> None:
    model = Qwen3ForCausalLM(qwen())
    exact = sum(parameter.numel() for parameter in model.parameters())
    assert count_params(qwen(), "some/name") == (exact, exact)
    adapted = get_peft_model(Qwen3ForCausalLM(qwen()), LORA)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert count_params(qwen(), "some/name", LORA) == (exact, trained)
    assert count_params(qwen(), adapted) == (exact, trained)
    # The configuration that was given is not changed by it.
    assert LORA.base_model_name_or_path is None


def test_a_big_model_is_counted_without_its_memory() -> None:
    config = qwen(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    assert count_params(config, "Qwen/Qwen3-4B") == (4_022_468_096, 4_022_468_096)


def test_shape_of_a_config() -> None:
    shape = ModelShape.from_config(qwen(), 1000)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.vocab_size) == (2, 2, 64, 512)


def test_a_trainers_configuration(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(qwen())
    total = sum(parameter.numel() for parameter in model.parameters())
    config = args(
        tmp_path, per_device_train_batch_size=8, steps_per_generation=4, beta=0.1, gym_vllm_args={"max_num_seqs": 20}
    )
    plan = from_trainer(config, model, 1, DEVICE, environment={})
    found = numbers(plan)
    assert found["trainer weights"] == found["trainer gradients"] == found["trainer reference model"] == 4 * total
    assert found["trainer optimizer state"] == 8 * total
    assert found["server weights"] == 4 * total  # this machine trains, and serves, in float32
    assert found["trainer transfer buffers"] == 2 * 512_000_000
    assert plan.wanted_tokens == 20 * 4096  # of 32 rollouts, as many as vLLM runs at a time
    # The model could do 32768 tokens, a rollout will not: 512 after a prompt.
    unbounded = from_trainer(args(tmp_path, vllm_max_model_length=None), model, 1, DEVICE, environment={})
    assert (unbounded.context, unbounded.sequence) == (32_768, 512 + 1024)
    by_file = from_trainer(args(tmp_path, gym_weight_transport="file"), model, 1, DEVICE, environment={})
    assert "trainer transfer buffers" not in numbers(by_file)


def test_an_adapter_has_no_reference_and_small_moments(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(qwen()).to(torch.bfloat16)
    total, trained = count_params(qwen(), model, LORA)
    found = numbers(from_trainer(args(tmp_path, beta=0.1), model, 1, DEVICE, peft_config=LORA, environment={}))
    assert found["trainer weights"] == 2 * total
    assert found["trainer optimizer state"] == 8 * trained  # PEFT keeps adapters in float32
    assert "trainer reference model" not in found


@pytest.mark.parametrize(
    ("environment", "weights", "optimizer"),
    [
        ({}, 4.0, 8.0),
        ({"ACCELERATE_USE_FSDP": "true"}, 1.0, 2.0),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}, 4.0, 2.0),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 4.0, 2.0),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, 1.0, 2.0),
    ],
)
def test_sharding_is_what_accelerate_was_told(
    tmp_path: Path, environment: dict[str, str], weights: float, optimizer: float
) -> None:
    model = Qwen3ForCausalLM(qwen())
    total = sum(parameter.numel() for parameter in model.parameters())
    found = numbers(from_trainer(args(tmp_path), model, 4, DEVICE, environment=environment))
    assert found["trainer weights"] == weights * total
    assert found["trainer optimizer state"] == optimizer * total
    assert ("trainer DDP buckets" in found) == (not environment)


@pytest.mark.parametrize(
    ("environment", "weights", "gradients", "optimizer", "copies"),
    [
        ({}, 2, 2, 4, 0),  # torch's AdamW keeps its moments in the weights' dtype
        ({"ACCELERATE_USE_FSDP": "true"}, 4, 4, 8, 0),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, 2, 2, 12, 0),
    ],
)
def test_mixed_precision_of_a_model_in_sixteen_bits(
    tmp_path: Path, environment: dict[str, str], weights: int, gradients: int, optimizer: int, copies: int
) -> None:
    model = Qwen3ForCausalLM(qwen()).to(torch.bfloat16)
    total = sum(parameter.numel() for parameter in model.parameters())
    found = numbers(from_trainer(args(tmp_path, bf16=True), model, 1, DEVICE, environment=environment))
    assert found["server weights"] == 2 * total
    assert found["trainer weights"] == weights * total
    assert found["trainer gradients"] == gradients * total
    assert found["trainer optimizer state"] == optimizer * total
    assert found.get("trainer autocast copies", 0) == copies * total


@pytest.mark.parametrize(
    ("optim", "expected"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("adamw_torch_4bit", 1), ("lion_32bit", 4), ("sgd", 0),
     ("paged_adamw_8bit", 0), ("ademamix", 12), ("adafactor", 0)],
)  # fmt: skip
def test_optimizers_by_name(optim: str, expected: float) -> None:
    assert optimizer_bytes(optim, 4) == expected


def test_torchs_own_optimizer_keeps_what_the_planner_says() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.AdamW([weight])
        optimizer.step()
        moments = [value for value in optimizer.state[weight].values() if value.numel() > 1]
        kept = sum(value.numel() * value.element_size() for value in moments)
        assert kept == 1000 * optimizer_bytes("adamw_torch", dtype.itemsize)


def test_four_bit_weights_take_a_little_more_than_half_a_byte(tmp_path: Path) -> None:
    config = qwen(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
    total, _ = count_params(config, "name")
    config.save_pretrained(tmp_path / "model")
    changed = args(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    found = numbers(from_trainer(changed, str(tmp_path / "model"), 1, DEVICE, peft_config=LORA, environment={}))
    embedding = 512 * 128
    assert found["trainer weights"] == int((total - embedding) * 0.5625 + embedding * 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_there_is_nothing_to_plan_without_cuda() -> None:
    assert this_device() is None
