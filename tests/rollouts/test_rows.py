"""Which rows a batch has, and what the loss is multiplied with for each; `tests/test_gradient.py` asks TRL's loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rollouts.test_batch import OUTPUT, bad, good, request
from trl_gym.config_checks import TOKEN_MEAN_LOSSES
from trl_gym.errors import ConfigError
from trl_gym.rollouts.rollout import Rollout, facts_of, from_record, journal_record
from trl_gym.rollouts.rows import LOSS_TYPES, Row, fit, joined, mark, rows_of, training_rows, weighted
from trl_gym.rollouts.trajectory import Trajectory

MEAN_OVER_ROWS = ("grpo", "sapo", "luspo", "dr_grpo")


def trajectory(*mask: int, prompt: int = 1) -> Trajectory:
    ids = [10 * len(mask) + place for place in range(len(mask))]
    logprobs = [-0.5 * own for own in mask]
    return Trajectory(
        prompt_ids=[7] * prompt, completion_ids=ids, env_mask=list(mask), logprobs=logprobs, num_turns=1,
        turn_ends=[len(mask)],
    )  # fmt: skip


def of(*trajectories: Trajectory, **answer: Any) -> Rollout:
    return dataclasses.replace(good(**answer), trajectories=list(trajectories))


def columns(*rollouts: Rollout, num_rows: int | None = None, **options: Any) -> dict[str, list[Any]]:
    """What TRL gets of rollouts of which those with a reward are trained."""
    rewards = [rollout.reward for rollout in rollouts]
    dropped = [None if reward is None else 0 for reward in rewards]
    rows = rows_of(rollouts, dropped, num_rows or len(rollouts), pad_id=0, eos_id=9)
    return training_rows(rows, rollouts, rewards, **options)


# -- which rows there are ---------------------------------------------------------------------------------------------


def test_a_failed_rollout_trains_nothing() -> None:
    found = columns(good(), bad())
    assert found["prompt_ids"] == [[1, 2], [0]]
    assert found["completion_ids"] == [[3, 4, 5], [9]]
    assert found["env_mask"] == [[1, 0, 1], [0]]
    assert found["logprobs"] == [[-0.1, 0.0, -0.2], [0.0]]
    assert found["gym_reward"] == [1.0, None]
    assert found["gym_result"][1] is None


def test_every_trajectory_of_a_trained_rollout_is_a_row() -> None:
    """And what TRL has per rollout stays per rollout. A failed one leaves its place to others."""
    rollouts = [bad(), of(trajectory(1, 1), trajectory(0, 1), trajectory(1, 0, 1)), of(trajectory(1)), bad()]
    found = columns(*rollouts, num_rows=6)
    assert found["env_mask"] == [[0, 1], [1, 1], [1], [1, 0, 1], [0], [0]]
    assert found["gym_reward"] == [None, 1.0, 1.0, None]
    assert len(found["gym_result"]) == 4
    rows = rows_of(rollouts, [None, 0, 0, None], 6, pad_id=0, eos_id=9)
    assert joined(rows, 4, eos_id=9) == [[9], [20, 21, 20, 21, 30, 31, 32], [10], [9]]  # for reward functions
    rows = rows_of([bad(), of(trajectory(1), trajectory(1, 1))], [None, 0], 2, pad_id=0, eos_id=9)
    assert [row.index for row in rows] == [1, 0]
    assert joined(rows, 2, eos_id=9)[1] == [10, 20, 21]  # in their order all the same


def test_truncated_rollouts_are_masked_where_gym_says_so() -> None:
    cut = good(response={"output": OUTPUT, "incomplete_details": {"reason": "max_output_tokens"}})
    cut = dataclasses.replace(cut, trajectories=[*cut.trajectories, trajectory(1)])
    found = columns(good(), cut, bad(), num_rows=4, mask_truncated=True)
    assert found["env_mask"] == [[1, 0, 1], [0, 0, 0], [0], [0]]  # in the failed one's place, too
    assert found["gym_reward"] == [1.0, 1.0, None]  # its reward stays in the baseline
    assert columns(cut, num_rows=2)["env_mask"] == [[1, 0, 1], [1]]


def test_unknown_logprobs_are_none_for_each_token() -> None:
    assert columns(good(), bad(), with_logprobs=False)["logprobs"] == [[None, None, None], [None]]


def test_shares_are_by_tokens_and_of_what_is_left() -> None:
    rollouts = [of(trajectory(1, 1, 1), trajectory(0, 1), trajectory(1, 1, 0)), of(trajectory(0), trajectory(0, 0))]
    rows = rows_of(rollouts, [1, 0], 5, pad_id=0, eos_id=9)
    places = [(row.rollout, row.index, row.share) for row in rows]
    assert places == [(0, 1, 1 / 3), (1, 0, 0.5), (0, 2, 2 / 3), (1, 1, 0.5), (None, 0, 0.0)]


def test_the_rollouts_with_most_rows_lose_the_oldest() -> None:
    # Rank 0 has 11 rows and room for 8; rank 1 has 4, and as many rows as rank 0 all the same.
    counts = [5, 0, 5, 1, 1, 2, 1, 0]
    assert fit(counts, num_ranks=2, multiple=2, factor=2.0) == (8, [2, 0, 1, 0, 0, 0, 0, 0])
    assert fit(counts, num_ranks=2, multiple=4, factor=3.0) == (12, [0] * 8)
    assert fit(counts, num_ranks=2, multiple=1, factor=1.0) == (4, [4, 0, 3, 0, 0, 0, 0, 0])
    assert fit([1, 0, 1, 1], num_ranks=1, multiple=4, factor=2.0) == (4, [0] * 4)


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1.0, 1.3, 2.0, 3.7]), st.data()
)  # fmt: skip
def test_rows_fit(num_ranks: int, multiple: int, factor_of_rollouts: int, factor: float, data: st.DataObject) -> None:
    num_rollouts = multiple * factor_of_rollouts
    size = num_ranks * num_rollouts
    counts = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    num_rows, dropped = fit(counts, num_ranks=num_ranks, multiple=multiple, factor=factor)
    assert num_rows % multiple == 0 and num_rollouts <= num_rows <= num_rollouts * factor
    kept = [count - lost for count, lost in zip(counts, dropped, strict=True)]
    assert all((own == 0) == (count == 0) and 0 <= own <= count for own, count in zip(kept, counts, strict=True))
    ranks = [slice(first, first + num_rollouts) for first in range(0, size, num_rollouts)]
    assert num_rows - max(sum(kept[own]) for own in ranks) < multiple or num_rows == num_rollouts
    for own in ranks:
        lost = [left for left, gone in zip(kept[own], dropped[own], strict=True) if gone]
        # None is dropped where there is room for it, and none of a rollout while another has two rows more.
        assert not lost or sum(kept[own]) == math.floor(num_rollouts * factor) // multiple * multiple
        assert not lost or max(kept[own]) <= min(lost) + 1


def test_a_rollout_and_all_of_its_rows_come_back_from_the_journal() -> None:
    rollout = of(trajectory(1, 0, 1), trajectory(1, prompt=3), trajectory(0, 1))
    line = journal_record(rollout, mode="train", weight_version="1")
    assert (line["env_mask"], [own["env_mask"] for own in line["further_rows"]]) == ([1, 0, 1], [[1], [0, 1]])
    assert set(line["further_rows"][0]) == {"prompt_ids", "completion_ids", "env_mask", "logprobs", "turn_ends"}
    assert from_record(line, request()).trajectories == rollout.trajectories
    del line["further_rows"]  # as it was written when a rollout had one row
    assert from_record(line, request()).trajectories == rollout.trajectories[:1]
    failed = journal_record(bad(), mode="train", weight_version="1")
    assert (failed["prompt_ids"], failed["further_rows"]) == ([], [])
    assert from_record(failed, request()).trajectories == []


def test_the_numbers_of_a_rollout_are_those_of_all_its_rows() -> None:
    facts = facts_of(of(trajectory(1, 0, 1), trajectory(0, 1, prompt=4)), 1.0, "b")
    assert (facts.prompt_tokens, facts.environment_tokens, facts.sampled_tokens, facts.turns) == (5, 2, 3, 2)
    assert facts.row_tokens == (3, 5)


# -- how much they weigh ----------------------------------------------------------------------------------------------


def batch(num_rollouts: int) -> dict[str, torch.Tensor]:
    return {"advantages": torch.arange(1.0, num_rollouts + 1), "num_items_in_batch": torch.tensor(7)}


def rows_with(*shares: float) -> list[Row]:
    """A row of another rollout each, or one that fills up where the share is 0."""
    return [
        Row(rollout=place if share else None, index=0, trajectories=[trajectory(1)], share=share)
        for place, share in enumerate(shares)
    ]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_is_touched_when_nothing_failed(loss_type: str) -> None:
    """To the bit: any number of rows and micro-batches."""
    for num_rows, num_micro_batches in ((3, 7), (6, 1), (5, 3)):
        total = num_rows * num_micro_batches
        rows = rows_with(*[1.0] * num_rows)
        marked = mark(batch(num_rows), rows, num_valid=total, num_micro_batches=num_micro_batches)
        trained, weight = weighted(marked, loss_type)
        assert weight == 1.0
        assert trained.keys() == batch(num_rows).keys()
        assert torch.equal(trained["advantages"], batch(num_rows)["advantages"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights(loss_type: str) -> None:
    """Two micro-batches of four rows: of this one two and a half rollouts, of the other one two and a half."""
    marked = mark(batch(4), rows_with(1.0, 0.0, 1.0, 0.5), num_valid=5, num_micro_batches=2)
    trained, weight = weighted(marked, loss_type)
    expected = 8 / 5 if loss_type in MEAN_OVER_ROWS else 2.5 * 2 / 5 if loss_type == "bnpo" else 1.0
    assert weight == pytest.approx(expected)
    last = 0.5 if loss_type in TOKEN_MEAN_LOSSES else 1.0
    torch.testing.assert_close(trained["advantages"], torch.tensor([1.0, 0.0, 3.0, 4.0 * last]) * expected)
    assert marked["advantages"].tolist() == [1.0, 0.0, 3.0, 4.0]  # it may be used for several iterations


def test_the_rows_of_a_rollout_share_its_advantage() -> None:
    rollouts = [of(trajectory(1), trajectory(1)), bad(), of(trajectory(1))]
    rows = rows_of(rollouts, [0, None, 0], 4, pad_id=0, eos_id=9)
    marked = mark(batch(3), rows, num_valid=2, num_micro_batches=1)
    assert [row.rollout for row in rows] == [0, 0, 2, None]
    assert marked["advantages"].tolist() == [1.0, 1.0, 3.0, 0.0]


def test_advantages_by_token_are_weighted_by_row() -> None:
    marked = mark(batch(2), rows_with(1.0, 0.5), num_valid=2, num_micro_batches=1)
    by_token = marked | {"advantages": torch.ones(2, 3)}
    assert weighted(by_token, "grpo")[0]["advantages"].tolist() == [[1.0] * 3, [0.5] * 3]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_micro_batch_without_any_takes_part(loss_type: str) -> None:
    """Its weight must not be 0: with `beta` at 0 it would leave out a reduction that the other ranks wait in."""
    marked = mark(batch(2), rows_with(0.0, 0.0), num_valid=3, num_micro_batches=2)
    assert weighted(marked, loss_type)[1] > 0


def test_an_unknown_loss_is_refused_rather_than_wrong() -> None:
    with pytest.raises(ConfigError, match=r"`loss_type` is 'new'.*grpo"):
        weighted(mark(batch(2), rows_with(1.0, 1.0), num_valid=2, num_micro_batches=1), "new")


def test_a_batch_that_is_not_marked_is_left_alone() -> None:
    assert weighted(batch(2), "grpo")[1] == 1.0


def test_a_batch_from_a_checkpoint_of_before_there_were_shares() -> None:
    old = {
        "advantages": torch.tensor([2.0, 0.0]),
        "rollout_is_valid": torch.tensor([True, False]),
        "num_valid_rollouts": torch.tensor(3),
        "num_micro_batches": torch.tensor(2),
    }
    trained, weight = weighted(old, "grpo")
    assert weight == pytest.approx(4 / 3)
    assert trained["advantages"].tolist() == pytest.approx([8 / 3, 0.0])


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from(LOSS_TYPES)
)  # fmt: skip
def test_weights_make_a_mean_over_what_counts(micro_batches: list[list[int]], loss_type: str) -> None:
    """Each rollout's own loss is 1, of which a row has its share. Then the loss over all micro-batches is 1, however
    failures and rows are spread. Rollouts are of three rows at most: a row is a third, two thirds or all of one."""
    shares = [[thirds / 3 for thirds in own] for own in micro_batches]
    total = round(sum(map(sum, shares)))
    if not total or total != pytest.approx(sum(map(sum, shares))):
        return
    losses = []
    for own in shares:
        trained, weight = weighted(
            mark({"advantages": torch.ones(3)}, rows_with(*own), num_valid=total, num_micro_batches=len(shares)),
            loss_type,
        )
        weights = trained["advantages"].tolist()
        if loss_type in TOKEN_MEAN_LOSSES:
            losses.append(sum(weights) / 3)  # the token mean of a row is 1, whatever its share
        elif loss_type in MEAN_OVER_ROWS:
            losses.append(sum(one * share for one, share in zip(weights, own, strict=True)) / 3)
        elif loss_type == "bnpo":
            losses.append(weight * (sum(own) > 0))
        else:
            losses.append(sum(own) * len(shares) / total)
    assert sum(losses) / len(shares) == pytest.approx(1.0)
