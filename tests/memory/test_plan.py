"""The arithmetic: golden cases added up by hand, and properties of every size. Then its input from configurations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
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
    MOMENTS,
    ROLLOUTS,
    SYNC,
    UPDATE,
    DeviceMemory,
    MemoryPlan,
    ModelShape,
    ServingShape,
    TrainingShape,
    activation_bytes,
    count_params,
    estimate,
    kv_bytes_per_token,
    logprob_bytes,
    optimizer_bytes,
    plan,
    this_device,
    try_estimate,
)
from trl_gym.run.servers import server_options

QWEN3_4B = ModelShape(
    num_params=4_022_468_096, num_layers=36, hidden_size=2560, intermediate_size=9728,
    num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=151_936,
)  # fmt: skip
QWEN3_06B = ModelShape(
    num_params=596_049_920, num_layers=28, hidden_size=1024, intermediate_size=3072,
    num_heads=16, num_kv_heads=8, head_dim=128, vocab_size=151_936,
)  # fmt: skip
GPU_24 = DeviceMemory(total_bytes=int(23.6 * GIB))
GPU_80 = DeviceMemory(total_bytes=int(79.2 * GIB))


def in_gib(result: MemoryPlan, name: str, owner: str = "trainer") -> float:
    return next(item.num_bytes for item in result.items if (item.owner, item.name) == (owner, name)) / GIB


def full(model: ModelShape, **changes: Any) -> TrainingShape:
    return TrainingShape(**{"trainable_params": model.num_params, "sequences": 8, "sequence_length": 2048} | changes)


def test_keys_and_values_of_a_token() -> None:
    serving = ServingShape(context=1, concurrency=1)
    assert kv_bytes_per_token(QWEN3_4B, serving) == 2 * 36 * 8 * 128 * 2 == 147_456
    assert kv_bytes_per_token(QWEN3_4B, dataclasses.replace(serving, tensor_parallel=4)) == 147_456 / 4
    # More ranks than heads: every rank still holds one.
    assert kv_bytes_per_token(QWEN3_4B, dataclasses.replace(serving, tensor_parallel=16)) == 147_456 / 8
    assert kv_bytes_per_token(QWEN3_4B, dataclasses.replace(serving, kv_bytes=1)) == 147_456 / 2


def test_four_billion_on_eight_big_gpus_sharded_and_asleep() -> None:
    training = full(QWEN3_4B, world_size=8, stage=3, sequence_length=8192)
    serving = ServingShape(
        context=8192, concurrency=32, sleep=True, max_num_seqs=1024, max_num_batched_tokens=8192, transfer_bytes=GIB
    )
    result = plan(QWEN3_4B, training, serving, GPU_80)
    assert in_gib(result, "weights") == pytest.approx(4.022e9 * 4 / 8 / GIB, abs=0.01)
    assert in_gib(result, "optimizer state") == pytest.approx(4.022e9 * 8 / 8 / GIB, abs=0.01)
    assert in_gib(result, "weights", "server") == pytest.approx(4.022e9 * 2 / GIB, abs=0.01)
    # The residual stream of 36 layers in float32, and one layer at a time.
    assert in_gib(result, "activations") == pytest.approx(42.9, abs=0.1)
    assert result.utilization == pytest.approx(0.592, abs=0.002)
    assert result.sequences == 32 and result.problems == ()
    assert all(result.peaks[moment] <= GPU_80.total_bytes for moment in MOMENTS)
    # What a server without sleep mode could have is bounded by the update.
    awake = plan(QWEN3_4B, training, dataclasses.replace(serving, sleep=False), GPU_80)
    assert awake.utilization < result.utilization
    assert "more than fits during update" in awake.problems[0].text and awake.problems[0].remedy.startswith(
        "Set it to"
    )


def test_an_adapter_of_four_billion_on_a_small_gpu() -> None:
    training = TrainingShape(trainable_params=33_000_000, weight_bytes=2, sequences=2, sequence_length=4096)
    serving = ServingShape(context=4096, concurrency=16, sleep=True)
    result = plan(QWEN3_4B, training, serving, GPU_24)
    assert in_gib(result, "weights") == in_gib(result, "weights", "server") == pytest.approx(7.49, abs=0.01)
    assert in_gib(result, "optimizer state") == pytest.approx(0.25, abs=0.01)
    assert result.utilization == pytest.approx(0.572, abs=0.003)
    assert result.sequences == 7  # of 16 that are wanted
    assert "7 sequences of 4096 (wanted: 16)" in result.describe()
    [refused] = result.problems
    assert "0.3 leaves 0 tokens" in refused.text and "vLLM will refuse to start" in refused.text
    assert "Set it to 0.57" in refused.remedy
    assert plan(QWEN3_4B, training, dataclasses.replace(serving, utilization=None), GPU_24).problems == ()


def test_a_small_model_on_a_small_gpu_with_and_without_sleep() -> None:
    serving = ServingShape(context=2048, concurrency=64)
    awake = plan(QWEN3_06B, full(QWEN3_06B), serving, GPU_24)
    asleep = plan(QWEN3_06B, full(QWEN3_06B), dataclasses.replace(serving, sleep=True), GPU_24)
    assert awake.utilization == pytest.approx(0.277, abs=0.003)
    assert asleep.utilization == pytest.approx(0.618, abs=0.003)
    assert (awake.sequences, asleep.sequences) == (18, 54)
    assert in_gib(awake, "autocast copies") == pytest.approx(0.596e9 * 2 / GIB, abs=0.01)
    assert any("0.3 is" in problem.text and "during update" in problem.text for problem in awake.problems)
    offloaded = plan(QWEN3_06B, full(QWEN3_06B, offload_optimizer=True), asleep_with(serving), GPU_24)
    assert offloaded.sequences == 64  # 4.4 GiB of moments are 20 sequences


def asleep_with(serving: ServingShape) -> ServingShape:
    return dataclasses.replace(serving, sleep=True)


def test_what_cannot_fit_is_said_with_what_helps() -> None:
    result = plan(QWEN3_4B, full(QWEN3_4B), ServingShape(context=4096, concurrency=16), GPU_24)
    assert result.utilization is None and result.kv_tokens == 0
    (missing, given_fraction) = result.problems
    assert "GiB are missing during update" in missing.text
    for option in ("vllm_enable_sleep_mode", "per_device_train_batch_size", "FSDP2"):
        assert option in missing.remedy
    assert "refuse to start" in given_fraction.text


def test_an_update_that_does_not_fit_by_itself_is_found_although_the_server_sleeps() -> None:
    training = full(QWEN3_06B, sequences=64, checkpointing=False)
    result = plan(QWEN3_06B, training, ServingShape(context=2048, concurrency=8, sleep=True), GPU_24)
    assert result.utilization is not None
    assert any("needed during update" in p.text and "gradient_checkpointing=True" in p.remedy for p in result.problems)


def test_gpus_of_their_own_are_the_servers_alone() -> None:
    serving = ServingShape(context=4096, concurrency=16, shares_device=False)
    result = plan(QWEN3_4B, full(QWEN3_4B), serving, GPU_24)
    assert result.utilization is not None and all(item.owner != "trainer" for item in result.items)


def test_the_table_adds_up() -> None:
    result = plan(QWEN3_06B, full(QWEN3_06B), ServingShape(context=2048, concurrency=64), GPU_24)
    table = result.describe()
    rows = [line.split() for line in table.splitlines()]
    totals = next(row for row in rows if row[0] == "sum")
    for column, moment in enumerate(MOMENTS):
        cells = [line[30 + 10 * column : 40 + 10 * column].strip() for line in table.splitlines()]
        start, end = 1, next(place for place, row in enumerate(rows) if row[0] == "sum")
        added = sum(float(cell) for cell in cells[start:end] if cell != "·")
        assert added == pytest.approx(float(totals[1 + column]), abs=0.1), moment
    assert f"= {result.utilization:.3f}" in table
    assert "Given: 0.3, 41983 tokens." in table
    assert "Warning: " in table
    assert max(len(line) for line in table.splitlines() if not line.startswith("Warning")) <= 130


# -- what must hold for every size ------------------------------------------------------------------------------------

models = st.builds(
    ModelShape,
    num_params=st.integers(10**8, 10**10),
    num_layers=st.integers(1, 80),
    hidden_size=st.sampled_from([512, 1024, 4096]),
    intermediate_size=st.sampled_from([1024, 4096, 16384]),
    num_heads=st.sampled_from([8, 16, 32]),
    num_kv_heads=st.sampled_from([1, 2, 8]),
    head_dim=st.sampled_from([64, 128]),
    vocab_size=st.sampled_from([1000, 32000, 152_000]),
)
trainings = st.builds(
    TrainingShape,
    trainable_params=st.integers(10**6, 10**8),
    weight_bytes=st.sampled_from([0.5625, 2, 4]),
    optimizer_bytes=st.sampled_from([0, 2, 8, 12]),
    world_size=st.sampled_from([1, 2, 8]),
    stage=st.integers(0, 3),
    sequences=st.integers(1, 16),
    sequence_length=st.integers(16, 8192),
    checkpointing=st.booleans(),
    reference=st.booleans(),
    grads_kept=st.booleans(),
    offload_optimizer=st.booleans(),
)
servings = st.builds(
    ServingShape,
    context=st.integers(16, 8192),
    rollout_tokens=st.one_of(st.none(), st.integers(16, 8192)),
    concurrency=st.integers(1, 256),
    tensor_parallel=st.sampled_from([1, 2, 8]),
    sleep=st.booleans(),
    transfer_bytes=st.sampled_from([0, GIB]),
    utilization=st.floats(0.05, 0.95),
    shares_device=st.booleans(),
)
devices = st.builds(DeviceMemory, total_bytes=st.integers(8 * GIB, 192 * GIB), used_bytes=st.sampled_from([0, GIB]))


@settings(max_examples=30)
@given(models, trainings, servings, devices)
def test_a_proposal_fits_at_every_moment_at_which_the_cache_exists(
    model: ModelShape, training: TrainingShape, serving: ServingShape, device: DeviceMemory
) -> None:
    result = plan(model, training, serving, device)
    assert result.describe()
    if result.utilization is None:
        assert result.problems
        return
    assert 0 < result.utilization <= 0.95
    assert result.kv_tokens >= serving.context
    moments = (ROLLOUTS,) if serving.sleep else (ROLLOUTS, SYNC, UPDATE)
    assert all(result.peaks[moment] <= device.total_bytes for moment in moments)


def room(result: MemoryPlan) -> float:
    return -1.0 if result.utilization is None else result.kv_tokens


@settings(max_examples=30)
@given(models, trainings, servings, devices, st.sampled_from(["sequences", "sequence_length"]))
def test_a_bigger_batch_never_leaves_more_for_the_server(
    model: ModelShape, training: TrainingShape, serving: ServingShape, device: DeviceMemory, name: str
) -> None:
    bigger = dataclasses.replace(training, **{name: 2 * getattr(training, name)})
    assert activation_bytes(model, bigger) > activation_bytes(model, training)
    assert logprob_bytes(model, bigger) >= logprob_bytes(model, training)
    assert room(plan(model, bigger, serving, device)) <= room(plan(model, training, serving, device))


@settings(max_examples=30)
@given(models, trainings, servings, devices)
def test_memory_that_is_freed_is_never_less_for_the_server(
    model: ModelShape, training: TrainingShape, serving: ServingShape, device: DeviceMemory
) -> None:
    before = room(plan(model, training, serving, device))
    sleeping = dataclasses.replace(serving, sleep=True)
    more = dataclasses.replace(device, total_bytes=2 * device.total_bytes)
    offloaded = dataclasses.replace(training, offload_optimizer=True)
    assert room(plan(model, training, sleeping, device)) >= before
    assert room(plan(model, offloaded, serving, device)) >= before
    assert room(plan(model, training, serving, more)) >= before - 1


@settings(max_examples=30)
@given(models, trainings, servings, devices)
def test_a_longer_context_never_holds_more_sequences(
    model: ModelShape, training: TrainingShape, serving: ServingShape, device: DeviceMemory
) -> None:
    serving = dataclasses.replace(serving, rollout_tokens=None)
    longer = dataclasses.replace(serving, context=2 * serving.context)
    plans = [plan(model, training, one, device) for one in (longer, serving)]
    # Beyond what is wanted, rounding the fraction decides.
    more, fewer = (min(one.sequences, serving.concurrency) for one in plans)
    assert more <= fewer


# -- from configurations ----------------------------------------------------------------------------------------------

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
    ahead = args(tmp_path, gradient_accumulation_steps=1, gym_max_staleness=2)
    assert estimate(ahead, model, 1, DEVICE, environment={}).serving.concurrency == 8 * 3
    # The model could do 32768 tokens, a rollout will not: 512 after a prompt.
    unbounded = estimate(args(tmp_path, vllm_max_model_length=None), model, 1, DEVICE, environment={})
    assert (unbounded.serving.context, unbounded.serving.sequence) == (32_768, 512 + 1024)
    wide = args(tmp_path, gym_weight_buffer_mb=1)  # the biggest tensor makes both buffers as big as itself
    head = numbers(estimate(wide, Qwen3ForCausalLM(qwen(vocab_size=8192)), 1, DEVICE, environment={}))
    assert head["trainer transfer buffers"] == 2 * 8192 * qwen().hidden_size * 4
    by_file = estimate(args(tmp_path, gym_weight_transport="file"), model, 1, DEVICE, environment={})
    assert numbers(by_file)["trainer transfer buffers"] == 0


def test_further_rows_make_micro_batches_larger(tmp_path: Path) -> None:
    """3 rows for every 2 rollouts, none of them longer than the context."""
    model = Qwen3ForCausalLM(qwen())
    options = {"gym_max_rows_factor": 1.5, "per_device_train_batch_size": 8}
    one, more = (
        numbers(estimate(args(tmp_path, **options, **own), model, 1, DEVICE, environment={}))
        for own in ({}, {"gym_drift": "split"})
    )
    assert more["trainer activations"] / one["trainer activations"] == pytest.approx(12 / 8, rel=0.01)


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
    folder, embedding = str(tmp_path / "model"), 512 * 128
    found = numbers(estimate(changed, folder, 1, DEVICE, peft_config=LORA, environment={}))
    assert found["trainer weights"] == int((total - embedding) * 0.5625 + embedding * 2)
    asked = BitsAndBytesConfig(load_in_8bit=True)  # what the trainer was given comes first
    found = numbers(estimate(changed, folder, 1, DEVICE, quantization_config=asked, environment={}))
    assert found["trainer weights"] == total - embedding + embedding * 2


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
        with torch.device("meta"):  # the part for images has its real size
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
