"""The parts of resuming that need no servers; the whole of it is in e2e/test_resume.py."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from trl_gym.errors import ConfigError
from trl_gym.resume import (
    QueueState,
    RunState,
    load_state,
    require_plain_tasks,
    restored,
    save_state,
)
from trl_gym.weight_sync.sums import fingerprint

BUFFERED = [
    {"ids": torch.arange(6).view(2, 3), "advantages": torch.tensor([0.5, -0.5]), "pixel_values": None, "n": 3},
    {"ids": torch.arange(6, 12).view(2, 3), "advantages": torch.tensor([1.0, float("nan")]), "n": torch.tensor(4)},
]


def test_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    user = {"seen": [[1, 0.5], ["a", None]], "weights": torch.arange(3), 4: {"b": (True,)}}
    state = RunState(run="r", num_micro_steps=6, num_ranks=2, buffered=BUFFERED, user=user)
    save_state(tmp_path / "checkpoint-3", 1, state)
    assert [path.name for path in (tmp_path / "checkpoint-3").iterdir()] == ["trl_gym_state.rank-1.pt"]
    read = load_state(tmp_path / "checkpoint-3", 1)
    assert (read.run, read.num_micro_steps, read.num_ranks) == ("r", 6, 2)
    for expected, actual in zip(BUFFERED, read.buffered, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    torch.testing.assert_close(read.user.pop("weights"), torch.arange(3))
    assert read.user == {"seen": [[1, 0.5], ["a", None]], 4: {"b": (True,)}}
    assert load_state(tmp_path / "checkpoint-3", 0) is None


@pytest.mark.parametrize("user", [{"a": Path("x")}, {"a": [lambda: 0]}, {"a": RunState}, RunState, [1]])
def test_a_state_of_code_is_refused(tmp_path: Path, user: Any) -> None:
    with pytest.raises(ConfigError, match="cannot hold what `checkpoint_state` returned"):
        save_state(tmp_path, 0, RunState(run="r", num_micro_steps=6, num_ranks=2, buffered=None, user=user))
    assert load_state(tmp_path, 0) is None


def test_state_of_another_schema_is_refused(tmp_path: Path) -> None:
    torch.save({"schema": 99}, tmp_path / "trl_gym_state.rank-0.pt")
    with pytest.raises(ConfigError, match="schema 99"):
        load_state(tmp_path, 0)


@pytest.mark.parametrize(
    "written",
    [
        b"garbage",
        b"",
        [1],
        {"schema": 1},
        {"schema": 1, "run": 5, "num_micro_steps": 1, "num_ranks": 1, "buffered": None},
        {"schema": 1, "run": "r", "num_micro_steps": -1, "num_ranks": 1, "buffered": None},
        {"schema": 1, "run": "r", "num_micro_steps": 1, "num_ranks": 1, "buffered": None, "user": [1]},
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, written: Any) -> None:
    file = tmp_path / "trl_gym_state.rank-0.pt"
    file.write_bytes(written) if isinstance(written, bytes) else torch.save(written, file)
    with pytest.raises(ConfigError, match=r"trl_gym_state\.rank-0\.pt cannot be read"):
        load_state(tmp_path, 0)


def test_a_state_is_taken_over_only_if_every_rank_has_one_of_as_many_ranks() -> None:
    own = RunState(run="r", num_micro_steps=7, num_ranks=2, buffered=BUFFERED)

    def found(num_ranks: list[int | None], num_micro_steps: int) -> RunState:
        fallback = {"run": "new", "num_micro_steps": num_micro_steps, "generate_every": 4}
        return restored("out/checkpoint-3", own, num_ranks, **fallback)

    assert found([2, 2], 6) is own
    for others in ([2], [2, None], [2, 2, 2]):
        assert found(others, 8) == RunState(run="new", num_micro_steps=8, num_ranks=len(others), buffered=None)
        with pytest.raises(ConfigError, match=r"saved in the middle of a generation batch .* written by 2 ranks"):
            found(others, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_sees_every_bit_and_every_name(dtype: torch.dtype) -> None:
    def model() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(dtype)

    accelerator = Accelerator(cpu=True)
    expected = fingerprint(model(), accelerator)
    assert fingerprint(model(), accelerator) == expected
    for index in range(4):
        changed = model()
        with torch.no_grad():
            flat = list(changed.parameters())[index].view(-1)
            flat[1] = (
                torch.nextafter(flat[1], torch.tensor(9, dtype=dtype)) if dtype != torch.bfloat16 else flat[1] * 1.01
            )
        assert fingerprint(changed, accelerator) != expected
    renamed = torch.nn.ModuleDict({"a": model()[0], "b": model()[1]})
    assert fingerprint(renamed, accelerator) != expected


def test_groups_in_flight_are_read_back_and_fit_no_other_number_of_ranks(tmp_path: Path) -> None:
    saved = {"example": {"prompt": "?"}, "batch": 4, "group": 1, "members": [0, 1], "begun": ("r", 3, "abc")}
    queue = QueueState(num_planned=5, options={"num_generations": 2}, groups=[saved])
    save_state(tmp_path, 0, RunState(run="r", num_micro_steps=4, num_ranks=2, buffered=None, queue=queue))
    own = load_state(tmp_path, 0)
    assert own is not None and own.queue == queue
    numbers = {"run": "x", "num_micro_steps": 4, "generate_every": 2}
    assert restored("c", own, [2, 2], **numbers) == own
    with pytest.raises(ConfigError, match="written by 2 ranks with groups of rollouts in flight"):
        restored("c", own, [2], **numbers)


def test_tasks_that_no_checkpoint_can_hold_are_refused() -> None:
    require_plain_tasks([{"prompt": [{"role": "user"}], "weight": 0.5, "ids": torch.arange(2), "none": None}])
    with pytest.raises(ConfigError, match=r"a column of the dataset has .*datetime"):
        require_plain_tasks({"prompt": "?", "when": datetime.datetime(2026, 1, 1)})
