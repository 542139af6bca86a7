"""The gap is over sampled tokens of trained rollouts only, every token with the same weight on every rank."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import RolloutError
from trl_gym.rollouts.logprobs import batch_gaps, cut_tokens, record
from trl_gym.rollouts.metrics import ValueSum, merge_cut, merge_gaps
from trl_gym.rollouts.rows import rows_of
from trl_gym.rollouts.trajectory import Trajectory


def gap_sums(
    sampling: torch.Tensor, training: torch.Tensor, mask: torch.Tensor, turn_ends: list[list[int]], agents: list[str]
) -> dict[str, ValueSum]:
    sides = {"sampling_per_token_logps": sampling, "old_per_token_logps": training}
    return batch_gaps({**sides, "completion_mask": mask}, turn_ends, agents)


def test_an_example() -> None:
    batch = {
        "sampling_per_token_logps": torch.tensor([[-1.0, 0.0, -2.0, 0.0], [-1.0, -1.0, 0.0, 0.0], [0.0] * 4]),
        # Where nothing was sampled the trainer's side is anything.
        "old_per_token_logps": torch.tensor([[-1.1, -9.0, -2.3, -9.0], [-1.0, -1.2, -9.0, -9.0], [-9.0] * 4]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),  # the third has failed
    }
    metrics = merge_gaps([batch_gaps(batch, [[1, 3], [2], []], ["a", "b", "c"])])
    assert metrics == pytest.approx(
        {
            "logprob_gap/mean": 0.6 / 4,
            "logprob_gap/max": 0.3,
            "logprob_gap/turn_0": 0.3 / 3,
            "logprob_gap/turn_1": 0.3,
            "gym/a/logprob_gap": 0.2,
            "gym/b/logprob_gap": 0.1,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("missing", ["old_per_token_logps", "sampling_per_token_logps"])
def test_without_one_side_there_is_no_gap(missing: str) -> None:
    ones = torch.ones(1, 1)
    batch = {name: ones for name in ("old_per_token_logps", "sampling_per_token_logps") if name != missing}
    assert merge_gaps([batch_gaps({**batch, "completion_mask": ones}, [[1]], ["a"])]) == {}


def test_late_turns_are_counted_together() -> None:
    ends = [list(range(1, 12))]
    gaps = gap_sums(torch.zeros(1, 11), torch.arange(11.0)[None], torch.ones(1, 11), ends, ["a"])
    assert gaps["logprob_gap/turn_7"] == ValueSum(7.0, 1, 7.0, 7.0)
    assert gaps["logprob_gap/turn_8+"] == ValueSum(27.0, 3, 8.0, 10.0)


def test_nan_is_not_hidden() -> None:
    gaps = gap_sums(torch.zeros(1, 2), torch.tensor([[math.nan, 0.0]]), torch.ones(1, 2), [[2]], ["a"])
    metrics = merge_gaps([{"logprob_gap": ValueSum(1.0, 1, 1.0, 1.0)}, gaps])
    assert math.isnan(metrics["logprob_gap/mean"]) and math.isnan(metrics["logprob_gap/max"])


def test_a_batch_with_nothing_to_train_has_no_gap() -> None:
    assert merge_gaps([gap_sums(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 1), [[], []], ["a", "a"])]) == {}
    assert merge_gaps([]) == {}


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[list[list[tuple[int, float]]], list[int], str]:
    """Turns of (is trained, gap) tokens with environment tokens between them, and the agent."""
    turns = draw(st.lists(st.lists(st.floats(0, 4, width=32), min_size=1, max_size=3), max_size=10))
    fillers = draw(st.lists(st.integers(0, 2), min_size=len(turns), max_size=len(turns)))
    return turns, fillers, draw(st.sampled_from("ab"))


@given(st.lists(rollouts(), min_size=1, max_size=4), st.integers(0, 4))
def test_ranks_together_say_what_one_would(batch: list, split: int) -> None:
    length = 1 + max(sum(map(len, turns)) + sum(fillers) for turns, fillers, _ in batch)
    training, mask = torch.full((len(batch), length), 99.0), torch.zeros(len(batch), length, dtype=torch.long)
    turn_ends, by_turn = [], {}
    for row, (turns, fillers, _) in enumerate(batch):
        at, ends = 0, []
        for index, (turn, filler) in enumerate(zip(turns, fillers, strict=True)):
            at += filler
            training[row, at : at + len(turn)] = torch.tensor(turn)
            mask[row, at : at + len(turn)] = 1
            at += len(turn)
            ends.append(at)
            by_turn.setdefault("8+" if index >= 8 else str(index), []).extend(turn)
        turn_ends.append(ends)
    agents = [agent for *_, agent in batch]

    def rank(rows: slice) -> dict[str, ValueSum]:
        return gap_sums(torch.zeros_like(training)[rows], training[rows], mask[rows], turn_ends[rows], agents[rows])

    split = min(split, len(batch))
    ranks = [rank(rows) for rows in (slice(0, split), slice(split, None)) if turn_ends[rows]]
    metrics = merge_gaps(ranks)
    assert metrics == pytest.approx(merge_gaps([rank(slice(None))]), abs=1e-6)
    every = [gap for gaps in by_turn.values() for gap in gaps]
    assert metrics.get("logprob_gap/max") == pytest.approx(max(every)) if every else not metrics
    for turn, gaps in by_turn.items():
        assert metrics[f"logprob_gap/turn_{turn}"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


# -- ratios that are cut ----------------------------------------------------------------------------------------------


def trl_ratios(
    batch: dict[str, torch.Tensor], mode: str, low: float | None, high: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ratios before and after TRL 1.16 cuts them (`grpo_trainer.py`, "Compute the importance sampling ratio")."""
    mask = batch["completion_mask"] * batch["tool_mask"]
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * mask
    difference = torch.nan_to_num(difference, nan=0.0)
    if mode in ("sequence_mask", "sequence_truncate"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    if mode in ("sequence_truncate", "token_truncate"):
        return ratio, torch.clamp(ratio, min=low, max=high)
    invalid = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio, ratio.masked_fill(invalid, value=0.0)


logps = st.lists(st.sampled_from([math.nan, 0.0, -0.25, -0.5, -1.0, -1.5, -3.0, -8.0]), min_size=5, max_size=5)
flags = st.lists(st.integers(0, 1), min_size=5, max_size=5)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@given(
    rows=st.lists(st.tuples(logps, logps, flags, flags, st.booleans()), min_size=1, max_size=4),
    low=st.sampled_from([None, 0.25, 0.5, math.exp(-0.5), 1.0]),
    high=st.sampled_from([None, 1.0, math.exp(0.5), 2.0, 3.0]),
)
def test_tokens_are_cut_whose_ratio_trl_changes(mode: str, rows: Any, low: float | None, high: float | None) -> None:
    if low is None and high is None and mode.endswith("truncate"):
        return  # torch.clamp refuses it
    training, sampling, completion, tool, valid = zip(*rows, strict=True)
    batch = {
        "old_per_token_logps": torch.tensor(training),
        "sampling_per_token_logps": torch.tensor(sampling),
        "completion_mask": torch.tensor(completion),
        "tool_mask": torch.tensor(tool),
    }
    before, after = (ratio.expand(len(rows), 5) for ratio in trl_ratios(batch, mode, low, high))
    is_trained = (batch["completion_mask"] * batch["tool_mask"]).bool() & torch.tensor(valid)[:, None]
    found = cut_tokens(batch, valid, mode=mode, clip_min=low, clip_max=high)
    assert (found.total, found.count) == ((before != after)[is_trained].sum(), is_trained.sum())


def test_the_fraction_that_is_cut_is_over_the_tokens_of_all_ranks() -> None:
    batch = {"completion_mask": torch.ones(1, 4), "sampling_per_token_logps": torch.full((1, 4), -2.0)}
    assert cut_tokens(batch, [True], mode="token_mask", clip_min=None, clip_max=2.0) is None
    batch["old_per_token_logps"] = torch.tensor([[-2.0, -1.0, -2.0, -3.0]])
    token, whole, nothing = (
        cut_tokens(batch, [valid], mode=mode, clip_min=None, clip_max=2.0)
        for mode, valid in (("token_truncate", True), ("sequence_mask", True), ("token_mask", False))
    )
    assert merge_cut([token, whole, nothing, None]) == {"sampling/importance_sampling_ratio/fraction_cut": 1 / 8}
    assert merge_cut([nothing, None]) == {}


# -- the trainer's log-probabilities on disk --------------------------------------------------------------------------


def rollout(name: str, *num_tokens: int) -> Any:
    """One whose trajectories have so many completion tokens, and of prompt and completion together four."""
    trajectories = [
        Trajectory(
            prompt_ids=[4] * (4 - number),
            completion_ids=[5] * number,
            env_mask=[1] * number,
            logprobs=[-0.5] * number,
            num_turns=1,
        )
        for number in num_tokens
    ]
    return SimpleNamespace(request=SimpleNamespace(rollout_id=name), trajectories=trajectories)


def write(folder: Path, logprobs: list[list[float]], *rollouts: tuple[Any, int | None], **where: int) -> None:
    """Write down those of rollouts that have lost so many rows, or are not trained (None)."""
    own, dropped = zip(*rollouts, strict=True)
    rows = rows_of(own, dropped, len(logprobs), pad_id=0, eos_id=9)
    record(folder, torch.tensor(logprobs), rows, own, [0.1234567 * at for at in range(len(own))], **where)


def test_each_row_has_one_for_each_of_its_tokens(tmp_path: Path) -> None:
    """Untrained rollouts have none, and dropped rows empty lists. Padding is not written."""
    logprobs = [[-0.5, -1.25, 0.0], [-1.0, -1.5, 0.0], [-0.125, -2.0, -3.0], [-9.0, 0.0, 0.0]]
    batch = (rollout("a", 2), 0), (rollout("untrained", 3), None), (rollout("b", 1, 3, 2), 1)
    write(tmp_path, logprobs, *batch, step=4, rank=1)
    write(tmp_path, [[-0.5, 0.0, 0.0]], (rollout("c", 1), 0), step=4, rank=1)  # a second batch of that step
    lines = (tmp_path / "training_logprobs" / "step-4.rank-1.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"schema": 3, "rollout_id": "a", "step": 4, "advantage": 0.0, "logprobs": [-0.5, -1.25]},
        {"schema": 3, "rollout_id": "b", "step": 4, "advantage": 0.24691, "logprobs": []}
        | {"further_rows": [[-0.125, -2.0, -3.0], [-1.0, -1.5]]},
        {"schema": 3, "rollout_id": "c", "step": 4, "advantage": 0.0, "logprobs": [-0.5]},
    ]


def test_a_torn_line_does_not_swallow_the_next_and_nan_is_null(tmp_path: Path) -> None:
    file = tmp_path / "training_logprobs" / "step-0.rank-0.jsonl"
    file.parent.mkdir()
    file.write_text('{"rollout_id": "torn", "logp')  # by a full disk; the run went on
    for name in "ab":
        write(tmp_path, [[math.nan, -math.inf, -0.5]], (rollout(name, 3), 0), step=0, rank=0)
    torn, *whole = file.read_text().splitlines()
    assert torn == '{"rollout_id": "torn", "logp'
    assert [json.loads(line) for line in whole] == [
        {"schema": 3, "rollout_id": name, "step": 0, "advantage": 0.0, "logprobs": [None, None, -0.5]} for name in "ab"
    ]


def test_rows_and_rollouts_must_be_of_one_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        record(tmp_path, torch.zeros(2, 3), [], [], [], step=0, rank=0)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "training_logprobs").write_text("in the way")
    with pytest.raises(RolloutError, match=f"cannot be written to {tmp_path}/training_logprobs"):
        write(tmp_path, [[0.0] * 3], (rollout("a", 3), 0), step=0, rank=0)
