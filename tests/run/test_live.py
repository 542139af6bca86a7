"""What a live source decides without servers; the source at work is in `tests/e2e`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, RolloutError
from trl_gym.run.live import LiveSource


def source(folder: Path, **servers: Any) -> LiveSource:
    return LiveSource(GymGRPOConfig(output_dir=str(folder), use_cpu=True, report_to=[]), SimpleNamespace(**servers))


def test_a_row_without_an_agent_is_for_the_sole_one(tmp_path: Path) -> None:
    one = source(tmp_path, gym=SimpleNamespace(sole_agent="calculator"))
    assert one.agent_of({"agent_ref": None}) == "calculator"
    assert one.agent_of({"agent_ref": {"name": "search"}}) == "search"
    several = source(tmp_path, gym=SimpleNamespace(sole_agent=None, agents={"search": 1, "calculator": 2}))
    with pytest.raises(ConfigError, match=r"several \(calculator, search\)\. Load the file with `load_gym_dataset"):
        several.agent_of({})


def test_weights_that_somebody_else_has_changed_end_the_batch_on_rank_0(tmp_path: Path) -> None:
    policy = SimpleNamespace(client=SimpleNamespace(weight_version=lambda: "9"))
    live = source(tmp_path, policy=policy, require_same_policy=lambda: None)
    live._step = 3
    live._accelerator = SimpleNamespace(is_main_process=True)
    with pytest.raises(RolloutError, match="weights changed from version 3 to 9 during rollouts"):
        live._check_version()
    live._accelerator.is_main_process = False
    live._check_version()
