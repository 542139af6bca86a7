"""The trainer's log-probabilities beside the journal, as the viewer reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trl_gym.errors import RolloutError
from trl_gym.rollouts.logprobs import record


def rollout(name: str, num_tokens: int | None) -> Any:
    """One with a trajectory of so many completion tokens, or a failed one."""
    trajectories = [] if num_tokens is None else [SimpleNamespace(completion_ids=list(range(num_tokens)))]
    return SimpleNamespace(request=SimpleNamespace(rollout_id=name), trajectories=trajectories)


def test_each_rollout_has_one_for_each_of_its_tokens_and_failed_ones_have_none(tmp_path: Path) -> None:
    logprobs = torch.tensor([[-0.5, -1.25, 0.0], [-9.0, -9.0, -9.0], [-0.125, -2.0, -3.0]])
    rollouts = [rollout("a", 2), rollout("failed", None), rollout("b", 3)]
    record(tmp_path, logprobs, rollouts, step=4, rank=1)
    record(tmp_path, logprobs[:1], [rollout("c", 1)], step=4, rank=1)  # a second batch of that step
    lines = (tmp_path / "training_logprobs" / "step-4.rank-1.jsonl").read_text().splitlines()
    assert {line["rollout_id"]: line["logprobs"] for line in map(json.loads, lines)} == {
        "a": [-0.5, -1.25],
        "b": [-0.125, -2.0, -3.0],
        "c": [-0.5],
    }


def test_a_torn_line_does_not_swallow_the_next_and_nan_is_null(tmp_path: Path) -> None:
    file = tmp_path / "training_logprobs" / "step-0.rank-0.jsonl"
    file.parent.mkdir()
    file.write_text('{"rollout_id": "torn", "logp')  # by a full disk; the run went on
    for name in "ab":
        record(tmp_path, torch.tensor([[math.nan, -math.inf, -0.5]]), [rollout(name, 3)], step=0, rank=0)
    torn, *whole = file.read_text().splitlines()
    assert torn == '{"rollout_id": "torn", "logp'
    assert [json.loads(line) for line in whole] == [
        {"rollout_id": name, "logprobs": [None, None, -0.5]} for name in "ab"
    ]


def test_rows_and_rollouts_must_be_of_one_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        record(tmp_path, torch.zeros(2, 3), [rollout("a", 3)], step=0, rank=0)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "training_logprobs").write_text("in the way")
    with pytest.raises(RolloutError, match=f"could not be written to {tmp_path}/training_logprobs"):
        record(tmp_path, torch.zeros(1, 3), [rollout("a", 3)], step=0, rank=0)
