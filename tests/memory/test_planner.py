"""The planner's arithmetic: golden cases that were added up by hand, and what must hold for every size."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    kv_bytes_per_token,
    logprob_bytes,
    plan,
)

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
