"""Rows that are computed without most of their padding, and their places in micro-batches. That the gradient is TRL's
is in `tests/test_gradient.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.rollouts.padding import Results, by_length, compute_rows, is_sum_over_rows, num_loss_tokens, token_weights
from trl_gym.rollouts.rows import LOSS_TYPES

PAD = 0
lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7)


def padded(rows: list[tuple[int, int]], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask as TRL pads them, and the width of the completions. No two rows begin alike."""
    width, num_kept = (-(-max(own) // multiple) * multiple for own in zip(*rows, strict=True))
    ids, mask = (torch.zeros(len(rows), width + num_kept, dtype=torch.long) for _ in "im")
    for row, (prompt, completion) in enumerate(rows):
        own = slice(width - prompt, width + completion)
        ids[row, own] = torch.arange(1, prompt + completion + 1) * 7 + 100 * row
        mask[row, own] = 1
    return ids, mask, num_kept


class Model:
    """What TRL computes of a token, from all tokens before it that the mask shows, and 0 where it shows none."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self.scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, num_kept: int) -> Results:
        assert 1 <= num_kept < ids.shape[1]  # TRL slices by its negative
        self.calls.append((ids, mask, num_kept))
        read = (ids * mask).cumsum(1).double() * mask * self.scale
        return -read[:, -num_kept:], read[:, -num_kept:] / 2, mask.double().mean()


@given(lengths, st.integers(1, 8), st.integers(1, 4))
def test_every_token_has_the_result_that_it_has_in_the_padded_batch(
    rows: list[tuple[int, int]], num_rows: int, multiple: int
) -> None:
    ids, mask, num_kept = padded(rows, multiple)
    whole, parts = Model(), Model()
    expected = whole(ids, mask, num_kept)
    found = compute_rows(parts, ids, mask, num_kept, num_rows=num_rows, multiple=multiple)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    weights = torch.rand_like(expected[0])
    for results in (found, expected):
        (results[0] * weights).sum().backward()
    assert parts.scale.grad == pytest.approx(whole.scale.grad)
    assert found[2] == pytest.approx(torch.stack([m.double().mean() for _, m, _ in parts.calls]).mean())


@given(lengths, st.integers(1, 8), st.integers(1, 4))
def test_calls_are_as_wide_as_their_longest_row_and_rows_begin_in_the_first_column(
    rows: list[tuple[int, int]], num_rows: int, multiple: int
) -> None:
    model = Model()
    compute_rows(model, *padded(rows, multiple), num_rows=num_rows, multiple=multiple)
    sizes = sorted((prompt + completion for prompt, completion in rows), reverse=True)
    groups = [sizes[start : start + num_rows] for start in range(0, len(sizes), num_rows)]
    assert [mask.sum(1).tolist() for _, mask, _ in model.calls] == groups
    assert [ids.shape[1] for ids, *_ in model.calls] == [-(-group[0] // multiple) * multiple for group in groups]
    assert all((mask.diff(dim=1) <= 0).all() and mask[:, 0].all() for _, mask, _ in model.calls)


@given(lengths, st.integers(1, 8))
def test_rows_that_are_hidden_whole_are_not_computed_unless_there_are_no_others(
    rows: list[tuple[int, int]], num_rows: int
) -> None:
    ids, mask, num_kept = padded(rows)
    for step in (2, 1):  # every second row, then all
        model, hidden = Model(), mask.clone()
        hidden[::step] = 0
        found = compute_rows(model, ids, hidden, num_kept, num_rows=num_rows)
        assert found[0].shape == (len(rows), num_kept) and found[0].requires_grad
        expected = Model()(ids, hidden, num_kept)
        is_shown = hidden.any(1)
        assert torch.equal(found[0][is_shown], expected[0][is_shown])
        assert sum(len(own) for own, *_ in model.calls) == max(int(is_shown.sum()), 1)
        assert all(own.any(1).all() for _, own, _ in model.calls)


def test_a_completion_that_is_masked_whole_has_zeros() -> None:
    ids, mask, num_kept = padded([(2, 3), (3, 3)])
    mask[:, -num_kept:] = 0
    logprobs, entropies, _ = compute_rows(Model(), ids, mask, num_kept, num_rows=1)
    assert logprobs.abs().sum() == 0 and entropies is not None and logprobs.shape == entropies.shape == (2, 3)


def test_what_was_not_asked_for_is_not_there() -> None:
    found = compute_rows(lambda ids, mask, kept: (mask[:, -kept:].double(), None, None), *padded([(1, 2)]), num_rows=1)
    assert found[1:] == (None, None)


# -- micro-batches ----------------------------------------------------------------------------------------------------


def micro_batches(rows: list[tuple[int, int]], num: int) -> list[dict[str, Any]]:
    """As TRL splits them, with what a subclass may have added."""
    ids, mask, num_kept = padded(rows)
    size, total = len(rows) // num, torch.tensor(5)
    names = [str(row) for row in range(len(rows))]
    return [
        {
            "prompt_ids": ids[own, :-num_kept],
            "prompt_mask": mask[own, :-num_kept],
            "completion_mask": mask[own, -num_kept:],
            "row": torch.arange(len(rows))[own],
            "num_items_in_batch": total,
            "names": names[own],
            "nothing": None,
        }
        for own in (slice(start, start + size) for start in range(0, size * num, size))
    ]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_rows_are_sorted_within_an_optimizer_step(steps: int, together: int, size: int, data: st.DataObject) -> None:
    count = steps * together * size
    rows = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=count, max_size=count))
    given_batches = micro_batches(rows, steps * together)
    found = by_length(given_batches, together)
    assert [len(batch["row"]) for batch in found] == [size] * (steps * together)
    for step in range(steps):
        own = found[step * together :][:together]
        places = [row for batch in own for row in batch["row"].tolist()]
        first = step * together * size
        assert sorted(places) == list(range(first, first + together * size))
        # The longest first; rows of one length stay in their order.
        assert places == sorted(places, key=lambda row: (-sum(rows[row]), row))
    for batch in found:
        assert batch["names"] == [str(row) for row in batch["row"].tolist()]
        assert batch["prompt_mask"].sum(1).tolist() == [rows[row][0] for row in batch["row"].tolist()]
        assert batch["num_items_in_batch"] == 5 and batch["nothing"] is None
        assert batch.keys() == given_batches[0].keys()


def test_rows_with_images_stay() -> None:
    """A row may have several, and TRL has joined those of a micro-batch."""
    batches = [batch | {"num_images": [1]} for batch in micro_batches([(1, 1), (1, 2)], 2)]
    assert all(found is batch for found, batch in zip(by_length(batches, 2), batches, strict=True))


def test_which_losses_are_sums_over_rows() -> None:
    off = {"top_entropy_quantile": 1.0, "has_entropy_bonus": False, "has_router_loss": False}
    assert [name for name in LOSS_TYPES if not is_sum_over_rows(name, **off)] == ["bnpo"]
    for change in ({"top_entropy_quantile": 0.5}, {"has_entropy_bonus": True}, {"has_router_loss": True}):
        assert not is_sum_over_rows("dapo", **off | change)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_weighted_mean_of_means_is_one_over_all_tokens(steps: int, together: int, data: st.DataObject) -> None:
    values = data.draw(
        st.lists(st.lists(st.floats(-9, 9), max_size=5), min_size=steps * together, max_size=steps * together)
    )
    weights = token_weights(torch.tensor([len(own) for own in values]), together)
    means = torch.tensor([sum(own) / max(len(own), 1) for own in values], dtype=torch.float64)
    for step in range(steps):
        own = slice(step * together, (step + 1) * together)
        tokens = [value for one in values[own] for value in one]
        assert (means * weights)[own].mean() == pytest.approx(sum(tokens) / max(len(tokens), 1), abs=1e-9)
    assert weights.mean() == pytest.approx(1)


def test_tokens_of_the_environment_are_not_in_the_loss() -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    assert num_loss_tokens({"completion_mask": mask}) == 3
    assert num_loss_tokens({"completion_mask": mask, "tool_mask": torch.tensor([[1, 0, 1, 1]])}) == 2
