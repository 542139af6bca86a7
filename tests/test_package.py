"""Importing is cheap, and the public names are the ones that are promised."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trl_gym

HEAVY = ("torch", "vllm", "transformers", "trl", "datasets", "aiohttp")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import trl_gym, trl_gym.errors") == set()


@pytest.mark.parametrize(
    "module", ["trl_gym.policy_server.server", "trl_gym.gym.servers", "trl_gym.rollouts.trajectory", "trl_gym.cli"]
)
def test_servers_and_command_line_need_neither_torch_nor_vllm(module: str) -> None:
    assert not {"torch", "vllm", "transformers"} & loaded_after(f"import {module}")


def test_config_and_dataset_do_not_load_vllm() -> None:
    assert "vllm" not in loaded_after("from trl_gym import GymGRPOConfig, load_gym_dataset")


def test_public_names() -> None:
    assert sorted(trl_gym.__all__) == [
        "GymGRPOConfig",
        "GymGRPOTrainer",
        "GymServers",
        "PolicyServer",
        "TrlGymError",
        "__version__",
        "load_gym_dataset",
        "mix_gym_datasets",
    ]
    for name in trl_gym.__all__:
        assert getattr(trl_gym, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = trl_gym.nonsense
