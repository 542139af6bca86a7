"""`trl-gym plan` on a machine without a GPU, for machines with some."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import MambaConfig, Qwen3Config

from tests.conftest import RECIPES
from trl_gym import cli
from trl_gym.commands.plan import _parse

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
EIGHT = ("--per-device-train-batch-size", "8")  # a group in a single process


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
    assert cli.main(argv) == 0
    assert "Training uses 8 GPUs of this host and the policy server 1 of them" in capsys.readouterr().out
    argv += ["--gym-vllm-args", '{"data-parallel-size": 8}']
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


def test_training_is_planned_alone_where_the_server_has_gpus_of_its_own(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--config", options(tmp_path, model), "--gpu-memory", "23.6", "--gpus", "2", *EIGHT]
    awake = ["--vllm-enable-sleep-mode", "false", "--gym-gpu-memory", "given"]
    assert cli.main([*argv, *awake, "--vllm-mode", "server"]) == 0
    out = capsys.readouterr().out
    assert "trained on 2 GPUs of 23.6 GiB (the whole model on each); its policy server runs elsewhere" in out
    assert "trainer  optimizer state" in out and "KV cache" not in out and "utilization" not in out
    assert cli.main([*argv, *awake, "--gym-server-devices", "2,3"]) == 0
    training, served = capsys.readouterr().out.split("its policy server, on GPUs 2,3\n")
    assert "trainer  weights" in training and "server " not in training
    assert "server   KV cache" in served and "trainer" not in served
    assert cli.main([*argv, *awake, "--vllm-mode", "server", "--gpu-memory", "4"]) == 1
    assert "GiB are needed during update and the device has 4.0" in capsys.readouterr().out


def test_an_engine_in_the_trainers_process_has_no_weights_of_its_own(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options(tmp_path, model, gpu_memory="given")
    config = tmp_path / "run.yaml"
    config.write_text(config.read_text().replace("vllm_enable_sleep_mode: true", ""))
    argv = ["plan", "--config", str(config), "--gpu-memory", "23.6", "--gpus", "2", *EIGHT]
    assert cli.main([*argv, "--gym-engine", "transformers"]) == 0
    named = capsys.readouterr().out
    assert "which samples in the same processes (transformers)" in named and "default:" not in named
    assert "server" not in named and "utilization" not in named and "Warning" not in named
    [cache] = re.findall(r"^engine   KV cache +([\d.]+) +· +· +(\d+) tokens × 229376 B$", named, re.MULTILINE)
    assert float(cache[0]) == pytest.approx(int(cache[1]) * 229376 / 2**30, abs=0.01)  # 2 × 28 × 8 × 128 × 4 bytes
    assert int(cache[1]) == 8 * (2048 + 4 * 32)  # all rollouts of a process
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert cli.main(argv) == 0
    told, _, table = capsys.readouterr().out.partition("\n")
    assert "since vLLM is not installed" in told and "`--gym_engine vllm`" in told and table == named
    assert cli.main([*argv, "--gpu-memory", "10.5"]) == 1
    out = capsys.readouterr().out
    assert "no room for keys and values of one sequence of 2048 tokens" in out and "needed during update" in out
    assert "tensor_parallel" not in out and "FSDP" not in out and "--accelerate-config" not in out  # not with it


def test_the_number_of_processes_is_that_of_the_gpus(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--config", options(tmp_path, model), "--gpu-memory", "23.6", *EIGHT]
    sharded = ["--accelerate-config", str(RECIPES / "accelerate" / "fsdp2.yaml")]  # has 8
    for words, processes in ([], 1), (["--gpus", "2"], 2), (sharded, 8), ([*sharded, "--gpus", "4"], 4):
        cli.main([*argv, *words, "--gym-vllm-args", json.dumps({"data-parallel-size": processes})])
        out = capsys.readouterr().out
        assert f"trained on {processes} GPU{'s' if processes > 1 else ''} of" in out and "Warning" not in out
        state = 4.44 / (processes if "--accelerate-config" in words else 1)
        assert float(re.findall(r"optimizer state +([\d.]+)", out)[0]) == pytest.approx(state, abs=0.01)
    assert cli.main([*argv, "--gpus", "2", "--gym-vllm-args", '{"data-parallel-size": 8}']) == 1
    assert "The policy server has 8 workers" in capsys.readouterr().out
    for wrong in (["--gpus", "0"], ["--gpus", "1.5"], ["--gpu-memory", "-1"], ["--gpu-memory", "nan"]):
        with pytest.raises(SystemExit):
            cli.main([*argv, *wrong])
        assert "invalid positive number" in capsys.readouterr().err


def test_default_batches_are_those_of_the_gpus(model: Path) -> None:
    argv = ["--model_name_or_path", str(model), "--report_to", "none"]
    sizes = {gpus: _parse(argv, gpus)[0].gradient_accumulation_steps for gpus in (1, 8)}
    assert sizes == {1: 8, 8: 1}


def test_a_model_that_is_only_on_the_hub_is_said_in_seconds(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    argv = ["plan", "--config", options(tmp_path, model), "--gpus", "8", "--gpu-memory", "24"]
    assert cli.main([*argv, "--model-name-or-path", "nobody/no-such-model"]) == 1
    said = capsys.readouterr().err
    assert "nobody/no-such-model is not in the cache of the Hugging Face Hub, and http://127.0.0.1:1 cannot" in said
    assert "hf download nobody/no-such-model --local-dir FOLDER" in said and "no more of it than config.json" in said
    assert "Retrying" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model-name-or-path", "./nowhere"], "The model folder ./nowhere does not exist"),
        (["--num-generations", "3", "--steps-per-generation", "1"], "does not divide"),
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
