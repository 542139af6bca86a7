"""How much memory a session takes, and which models it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import psutil
import pytest
import torch
from hypothesis import given
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from trl_gym.errors import ConfigError
from trl_gym.policy_server.transformers_engine.session import (
    BLOCK_SIZE,
    EngineOptions,
    autocast_of,
    available_on_host,
    check_positions,
    free_memory,
    num_blocks,
    sampled_model,
)


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(10**6, 10**11))
def test_blocks_are_enough_for_one_request_and_not_more_than_all_can_use(
    model_of_blocks: PreTrainedModel, length: int, concurrency: int, free_bytes: int
) -> None:
    options = EngineOptions(max_model_len=length, max_concurrency=concurrency)
    try:
        blocks = num_blocks(model_of_blocks, options, free_bytes)
    except ConfigError:
        return
    assert length + BLOCK_SIZE <= blocks * BLOCK_SIZE
    assert blocks <= concurrency * (length // BLOCK_SIZE + 5)
    assert blocks * BLOCK_SIZE * 1024 <= free_bytes  # 2 layers × key and value × 64 numbers of 4 bytes


@pytest.fixture(scope="module")
def model_of_blocks() -> PreTrainedModel:
    from tests.policy_server.tiny_model import build_model, build_tokenizer

    return build_model(build_tokenizer(), tie=True, seed=0)


def test_the_wrapped_model_is_found(model: PreTrainedModel) -> None:
    assert sampled_model(torch.nn.parallel.DataParallel(model)) is model


def test_sharded_models_are_refused(model: PreTrainedModel) -> None:
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed marks them
    with pytest.raises(ConfigError, match="the model is sharded"):
        sampled_model(model)


def test_prompt_learning_is_refused(model: PreTrainedModel) -> None:
    learned = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(ConfigError, match="'default' learns prompts"):
        sampled_model(get_peft_model(model, learned))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of the kind 'linear_attention'"),
        ({"attn_logit_softcapping": 50.0}, "capped attention scores"),
        ({"kv_lora_rank": 16}, "compressed keys and values"),
        ({"multi_query": True}, "one head of keys and values for all"),
    ],
)
def test_attention_that_it_does_not_compute_is_refused(
    model: PreTrainedModel, options: dict[str, Any], said: str
) -> None:
    for name, value in options.items():
        setattr(model.config, name, value)
    with pytest.raises(ConfigError, match=f"a Qwen3ForCausalLM has {said}"):
        sampled_model(model)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 1024),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64),
        ({"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 64),
        ({"rope_type": "yarn", "factor": 2.0}, None),
    ],
)
def test_positions_that_depend_on_the_longest_sequence_are_refused_beyond_their_length(
    model: PreTrainedModel, rope: dict[str, Any], longest: int | None
) -> None:
    model.config.rope_parameters = rope
    if longest is None:
        check_positions(model.config, 2048)
        return
    check_positions(model.config, longest)
    with pytest.raises(ConfigError, match=rf"`vllm_max_model_length`.* to at most {longest}\."):
        check_positions(model.config, longest + 1)


def test_a_model_with_attention_of_its_own_is_refused() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(ConfigError, match="a BloomForCausalLM has attention of its own"):
        sampled_model(BloomForCausalLM(BloomConfig(**sizes)))


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model is a Linear"):
        sampled_model(torch.nn.Linear(2, 2))


def test_the_host_has_memory(model: PreTrainedModel) -> None:
    assert 10**6 < free_memory(torch.device("cpu")) < 10**14


def test_page_cache_counts_as_free_and_a_containers_limit_counts(tmp_path: Path) -> None:
    host = psutil.virtual_memory()
    assert 0.5 * host.available < available_on_host(tmp_path) <= host.total
    given = {"memory.max": "3000\n", "memory.current": "2500\n", "memory.stat": "anon 9\ninactive_file 400\n"}
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    assert available_on_host(tmp_path) == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert available_on_host(tmp_path) > 10**6


def test_autocast_is_that_of_the_trainer(model: PreTrainedModel) -> None:
    weight = torch.ones(2, 2)
    with autocast_of(model, torch.bfloat16):
        assert (weight @ weight).dtype == torch.bfloat16
    with autocast_of(model, None):
        assert (weight @ weight).dtype == torch.float32
