"""Which engine a configuration means, and what is refused for the one in the trainer's own process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trl_gym import GymGRPOConfig, engines
from trl_gym.errors import ConfigError


def config(folder: Path, **options: Any) -> GymGRPOConfig:
    return GymGRPOConfig(output_dir=str(folder), use_cpu=True, **options)


def test_auto_means_vllm_where_it_can_be_imported_and_transformers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = config(tmp_path)
    assert engines.started_engine(args) == "vllm"
    assert engines.describe_choice(args) is None
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert engines.started_engine(args) == "transformers"
    assert "since vLLM is not installed" in (engines.describe_choice(args) or "")
    named = config(tmp_path, gym_engine="sglang")
    assert engines.started_engine(named) == "sglang"
    assert engines.describe_choice(named) is None


REFUSED: dict[str, Any] = {
    "gym_max_staleness": 1,
    "gym_pause_mode": "keep",
    "gym_server_devices": "1",
    "gym_vllm_args": {"max-num-seqs": 8},
    "gym_gpu_memory": "auto",
    "vllm_enable_sleep_mode": True,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_tensor_parallel_size": 2,
    "gym_sync_only_trainable": True,
    "gym_weight_transport": "file",
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "gym_eval_sampling": {"min_p": 0.1},
    "fsdp": True,
    "model_init_kwargs": {"tp_plan": "auto"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_the_engine_lacks_is_refused_with_option_and_way_out(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(tmp_path, gym_engine="transformers", **{option: REFUSED[option]})
    [problem] = [one for one in refused.value.problems if "'transformers'" in one.text]
    assert option in problem.text or option in ("fsdp", "model_init_kwargs")
    assert "set `gym_engine` to 'vllm'" in problem.remedy


@pytest.mark.parametrize(
    "options", [{}, {"gym_engine": "vllm"}, {"gym_engine": "transformers", "vllm_mode": "server"}]
)
def test_a_response_template_is_refused_where_nothing_reads_with_it(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="`gym_response_template` is 'qwen3'"):
        config(tmp_path, gym_response_template="qwen3", **options)
    assert config(tmp_path, gym_response_template="qwen3", gym_engine="transformers").gym_response_template == "qwen3"


def test_the_same_is_refused_when_auto_has_chosen_it_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy server may be passed to the trainer: then no engine is started."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    args = config(tmp_path, gym_max_staleness=1, min_p=0.1)
    with pytest.raises(ConfigError, match="vLLM is not installed") as refused:
        engines.require_fit(args)
    assert len(refused.value.problems) == 2


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    options = {"gym_weight_transport": "shared", "gym_vllm_args": {}, "min_p": 0.0, "gym_refill_rounds": 2}
    engines.require_fit(config(tmp_path, gym_engine="transformers", **options))
    config(tmp_path, gym_engine="transformers", vllm_mode="server", min_p=0.1)  # asked when it is attached to


def test_weights_are_shared_with_no_engine_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only an engine in the trainer's own process"):
        config(tmp_path, gym_engine="vllm", gym_weight_transport="shared")


def test_engines_are_known_without_vllm_and_torch() -> None:
    assert "auto" not in engines.NAMES
    with pytest.raises(ConfigError, match="Choose one of auto, vllm, transformers, sglang"):
        GymGRPOConfig(output_dir="unused", use_cpu=True, gym_engine="triton")
