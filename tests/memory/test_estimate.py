"""What the planner is told about real configurations: parameters counted without memory, stages, optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    MambaConfig,
    Mistral3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
)

from trl_gym import GymGRPOConfig
from trl_gym.errors import Problem
from trl_gym.memory.plan import (
    GIB,
    DeviceMemory,
    MemoryPlan,
    ModelShape,
    count_params,
    estimate,
    optimizer_bytes,
    this_device,
    try_estimate,
)
from trl_gym.run.servers import server_options

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
    plan = estimate(config, model, 1, DEVICE, environment={})
    found = numbers(plan)
    assert found["trainer weights"] == found["trainer gradients"] == found["trainer reference model"] == 4 * total
    assert found["trainer optimizer state"] == 8 * total
    assert found["server weights"] == 4 * total  # this machine trains, and serves, in float32
    assert found["trainer transfer buffers"] == 2 * 512_000_000
    assert plan.wanted_tokens == 20 * 4096  # of 32 rollouts, as many as vLLM runs at a time
    # The model could do 32768 tokens, a rollout will not: 512 after a prompt.
    unbounded = estimate(args(tmp_path, vllm_max_model_length=None), model, 1, DEVICE, environment={})
    assert (unbounded.serving.context, unbounded.serving.sequence) == (32_768, 512 + 1024)
    by_file = estimate(args(tmp_path, gym_weight_transport="file"), model, 1, DEVICE, environment={})
    assert numbers(by_file)["trainer transfer buffers"] == 0


def test_an_adapter_has_no_reference_and_small_moments(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(qwen()).to(torch.bfloat16)
    total, trained = count_params(qwen(), model, LORA)
    found = numbers(estimate(args(tmp_path, beta=0.1), model, 1, DEVICE, peft_config=LORA, environment={}))
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
    found = numbers(estimate(args(tmp_path), model, 4, DEVICE, environment=environment))
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
    found = numbers(estimate(args(tmp_path, bf16=True), model, 1, DEVICE, environment=environment))
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
    found = numbers(estimate(changed, str(tmp_path / "model"), 1, DEVICE, peft_config=LORA, environment={}))
    embedding = 512 * 128
    assert found["trainer weights"] == int((total - embedding) * 0.5625 + embedding * 2)


def text_config(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Small sizes of the text part of a model of several parts."""
    part = kind().get_text_config()
    return {
        "model_type": part.model_type, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [Mistral3Config, Qwen2_5_VLConfig, Qwen3VLConfig, LlavaConfig])
@pytest.mark.parametrize("named", [True, False], ids=["architectures", "none"])
def test_models_of_images_and_text_are_estimated_by_their_text_part(
    kind: type[PreTrainedConfig], named: bool, tmp_path: Path
) -> None:
    config = kind(text_config=text_config(kind))
    if named:
        config.architectures = [AutoModelForImageTextToText.from_config(config).__class__.__name__]
    config.save_pretrained(tmp_path / "model")
    plan = try_estimate(args(tmp_path), str(tmp_path / "model"), 1, DEVICE, peft_config=LORA, environment={})
    assert isinstance(plan, MemoryPlan), plan
    assert plan.kv_bytes_per_token == 2 * 2 * 2 * 32 * 2
    assert numbers(plan)["server weights"] == 4 * count_params(config, "name")[0]


def test_what_cannot_be_estimated_is_a_problem_and_no_error(tmp_path: Path) -> None:
    MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path / "mamba")
    found = try_estimate(args(tmp_path), str(tmp_path / "mamba"), 1, DEVICE, environment={})
    assert isinstance(found, Problem) and "MambaConfig has no number for num_attention_heads" in found.text
    missing = try_estimate(args(tmp_path), str(tmp_path / "nowhere"), 1, DEVICE, environment={})
    assert isinstance(missing, Problem) and "nowhere" in missing.text


REMOTE = """
from transformers import Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = "own_of_a_test"
class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(REMOTE)
    told = qwen().to_dict() | {
        "model_type": "own_of_a_test", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    trusted = args(tmp_path, trust_remote_code=True)
    assert isinstance(try_estimate(trusted, str(folder), 1, DEVICE, environment={}), MemoryPlan)
    assert isinstance(try_estimate(args(tmp_path), str(folder), 1, DEVICE, environment={}), Problem)


def test_a_server_is_started_although_its_memory_could_not_be_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path / "mamba")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("trl_gym.run.servers.this_device", lambda: DEVICE)
    config = args(tmp_path, gym_gpu_memory="auto", vllm_gpu_memory_utilization=0.42)
    flags, _ = server_options(config, str(tmp_path / "mamba"))
    assert flags["gpu-memory-utilization"] == 0.42
    assert "could not be estimated (ValueError: MambaConfig has no number" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_there_is_nothing_to_plan_without_cuda() -> None:
    assert this_device() is None
