from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import TrlParser

from trl_gym.config import GymGRPOConfig
from trl_gym.errors import ConfigError

BASE: dict[str, Any] = {
    "output_dir": "unused",
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "report_to": [],
}


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(
            **BASE
            | {
                "num_generations": 3,
                "gym_mode": "magic",
                "gym_deadline": -1,
                "gym_max_inflight": 0,
                "gym_drift": "ignore",
                "gym_vllm_args": {"port": 80, "max_model_len": 10},
                "gym_weight_dir": str(tmp_path / "missing"),
                "max_completion_length": 512,
                "vllm_max_model_length": 512,
                "vllm_mode": "somewhere",
            }
        )
    message = str(caught.value)
    assert "10 problem(s)" in message
    for name in (
        "gym_mode", "gym_deadline", "gym_max_inflight", "gym_drift", "'port'", "`vllm_max_model_length`",
        "gym_weight_dir", "max_completion_length", "vllm_mode", "num_generations",
    ):  # fmt: skip
        assert name in message, name


def test_a_head_url_means_attach_and_excludes_configs() -> None:
    assert GymGRPOConfig(**BASE, gym_head_url="http://127.0.0.1:1").gym_mode == "attach"
    with pytest.raises(ConfigError, match="set only one"):
        GymGRPOConfig(**BASE, gym_head_url="http://127.0.0.1:1", gym_config_paths=["a.yaml"])
    with pytest.raises(ConfigError, match="gym_head_url"):
        GymGRPOConfig(**BASE, gym_mode="attach")


def test_a_server_url_needs_server_mode() -> None:
    with pytest.raises(ConfigError, match="vllm_mode"):
        GymGRPOConfig(**BASE, vllm_server_base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="has no effect"):
        GymGRPOConfig(**BASE, vllm_mode="server", gym_vllm_args={"seed": 1})


def test_options_that_rollouts_cannot_honour_are_refused() -> None:
    with pytest.raises(ConfigError, match="vllm_structured_outputs_regex"):
        GymGRPOConfig(**BASE, vllm_structured_outputs_regex="a+")


def test_precision_of_the_server_follows_the_trainer() -> None:
    assert GymGRPOConfig(**BASE).serving_dtype == "float32"  # on a CPU bf16 is off unless asked for
    assert GymGRPOConfig(**BASE, bf16=True).serving_dtype == "bfloat16"
    assert GymGRPOConfig(**BASE).probe_tolerance < GymGRPOConfig(**BASE, bf16=True).probe_tolerance
    assert GymGRPOConfig(**BASE, gym_probe_tolerance=0.5).probe_tolerance == 0.5


def test_yaml_and_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "output_dir: out\nuse_cpu: true\nper_device_train_batch_size: 8\nnum_generations: 8\nreport_to: []\n"
        "gym_config_paths: [a.yaml]\ngym_vllm_args: {tool-call-parser: hermes}\ngym_deadline: 5\n"
    )
    (args,) = TrlParser([GymGRPOConfig]).parse_args_and_config(
        ["--config", str(config), "--gym_overrides", '{"a": {"b": 1}}', "--gym_deadline", "7.5"]
    )
    assert args.gym_config_paths == ["a.yaml"]
    assert args.gym_vllm_args == {"tool-call-parser": "hermes"}
    assert args.gym_overrides == {"a": {"b": 1}}
    assert args.gym_deadline == 7.5
    assert args.gym_log_dir == str(Path("out") / "logs")


def test_broken_json_is_one_of_the_problems() -> None:
    with pytest.raises(ConfigError, match="gym_overrides"):
        GymGRPOConfig(**BASE, gym_overrides="{not json")
