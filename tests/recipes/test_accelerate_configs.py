"""The accelerate configs say to the installed accelerate what their comments say to the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"


def launch_arguments(name: str) -> Any:
    """What `accelerate launch` makes of a config."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "train.py"])
    return _validate_launch_command(arguments)[0]


def test_every_config_is_checked_here() -> None:
    checked = {"ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml", "cpu_two_processes.yaml"}
    assert {path.name for path in CONFIGS.iterdir()} == checked


@pytest.mark.parametrize(
    ("name", "kind", "num_processes", "precision"),
    [
        ("ddp.yaml", DistributedType.MULTI_GPU, 8, "bf16"),
        ("fsdp2.yaml", DistributedType.FSDP, 8, "bf16"),
        ("zero2.yaml", DistributedType.DEEPSPEED, 8, "bf16"),
        ("zero3.yaml", DistributedType.DEEPSPEED, 8, "bf16"),
        ("cpu_two_processes.yaml", DistributedType.MULTI_GPU, 2, "no"),
    ],
)
def test_processes_and_precision(name: str, kind: DistributedType, num_processes: int, precision: str) -> None:
    config = load_config_from_file(str(CONFIGS / name))
    assert config.distributed_type == kind
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (1, num_processes, precision)
    assert config.use_cpu is (name == "cpu_two_processes.yaml")


@pytest.mark.parametrize(("name", "stage"), [("zero2.yaml", 2), ("zero3.yaml", 3)])
def test_zero(name: str, stage: int) -> None:
    arguments = launch_arguments(name)
    assert arguments.use_deepspeed
    assert int(arguments.zero_stage) == stage
    assert (arguments.offload_param_device, arguments.offload_optimizer_device) == ("none", "none")
    assert str(arguments.zero3_init_flag).lower() == str(stage == 3).lower()


def test_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launch_arguments("fsdp2.yaml")
    assert arguments.use_fsdp and not arguments.cpu
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


def test_processes_on_a_cpu_are_started() -> None:
    """For `distributed_type: MULTI_CPU` accelerate would start one."""
    arguments = launch_arguments("cpu_two_processes.yaml")
    assert arguments.multi_gpu and not arguments.cpu  # what its launcher goes by
    assert arguments.num_processes == 2
