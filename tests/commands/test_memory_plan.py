"""`trl-gym plan` on a machine without a GPU, for machines with some."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import MambaConfig, Qwen3Config

from tests.conftest import RECIPES
from trl_gym import cli

SIZES = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
OPTIONS = """
model_name_or_path: {model}
output_dir: {folder}/out
gym_config_paths: [environment.yaml]
per_device_train_batch_size: 1
num_generations: 8
max_completion_length: 1024
vllm_max_model_length: 2048
vllm_enable_sleep_mode: true
gym_gpu_memory: {gpu_memory}
report_to: none
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    Qwen3Config(**SIZES).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def options(folder: Path, model: Path, *, gpu_memory: str = "auto") -> str:
    path = folder / "run.yaml"
    path.write_text(OPTIONS.format(model=model, folder=folder, gpu_memory=gpu_memory))
    return str(path)


def test_a_run_that_fits(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", options(tmp_path, model), "--gpus", "8", "--gpu-memory", "23.6"]
    assert cli.main(argv) == 0  # groups of 8 are spread over 8 processes with one completion each
    out = capsys.readouterr().out
    assert "trainer  optimizer state            4.44" in out and "vllm_gpu_memory_utilization = " in out
    assert "Warning" not in out
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_fit_and_what_helps(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(tmp_path, model)
    assert cli.main(["plan", "--config", config, "--gpus", "8", "--gpu-memory", "8"]) == 1
    assert "There is no room for the KV cache" in capsys.readouterr().out
    given = ["--gym-gpu-memory", "given", "--vllm-gpu-memory-utilization", "0.9"]
    assert cli.main(["plan", "--config", config, "--gpus", "8", "--gpu-memory", "23.6", *given]) == 1
    out = capsys.readouterr().out
    assert "0.9 is" in out and "more than fits during rollouts" in out and "Set it to 0." in out


def test_sharding_is_that_of_accelerates_file(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", options(tmp_path, model), "--gpu-memory", "23.6", "--accelerate-config"]
    for name, state in (("fsdp2", "0.56"), ("zero3", "0.83"), ("zero2", "0.83")):
        assert cli.main([*argv, str(RECIPES / "accelerate" / f"{name}.yaml")]) == 0
        assert f"optimizer state            {state}" in capsys.readouterr().out
    assert cli.main([*argv, str(tmp_path / "nowhere.yaml")]) == 1
    assert "nowhere.yaml is not a configuration of accelerate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vllm-mode", "server", "--vllm-enable-sleep-mode", "false"], "shares no GPU with training"),
        (["--num-generations", "3"], "divisible"),
        (["--no-such-option", "3"], "no_such_option"),
    ],
)
def test_what_cannot_be_planned_is_said(
    tmp_path: Path, model: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--config", options(tmp_path, model), "--gpus", "8", "--gpu-memory", "24"]
    assert cli.main([*argv, *words]) == 1
    assert said in capsys.readouterr().err


def test_a_model_that_cannot_be_estimated_has_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path / "mamba")
    argv = ["plan", "--config", options(tmp_path, tmp_path / "mamba"), "--gpus", "8", "--gpu-memory", "24"]
    assert cli.main(argv) == 1
    assert "MambaConfig has no number for num_attention_heads" in capsys.readouterr().err


def test_without_a_gpu_the_memory_must_be_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["plan", "--config", options(tmp_path, model), "--gpus", "8"]) == 1
    assert "--gpu-memory" in capsys.readouterr().err
