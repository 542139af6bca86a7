"""The prefix rule on lists of ints. The cases named T3 and T4 are those that NeMo RL tests its own splice with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.policy_server.splice import NoBoundaryError, continue_turn, find_closing, room, splice

END, NEWLINE = 2, 3
CLOSING = [END, NEWLINE]
content = st.lists(st.integers(10, 99), min_size=1, max_size=6)


def turn(ids: list[int]) -> list[int]:
    return [4, *ids, *CLOSING]


@given(
    earlier=st.lists(content, max_size=4),
    sampled=st.lists(st.integers(100, 199), min_size=1, max_size=8),
    retokenized=content,
    tail=st.lists(content, max_size=3),
    closed=st.booleans(),
)
def test_the_prompt_is_all_that_was_seen_then_exactly_the_templates_tail(
    earlier: list[list[int]], sampled: list[int], retokenized: list[int], tail: list[list[int]], closed: bool
) -> None:
    history = [token for ids in earlier for token in turn(ids)]
    before = [*history, *turn(retokenized)]
    new = [*(token for ids in tail for token in turn(ids)), 4]  # generation prompt
    seen = [*history, 4, *sampled, *([END] if closed else [])]

    prompt = splice(seen, before, [*before, *new], CLOSING)

    assert prompt[: len(seen)] == seen
    assert prompt[len(seen) :] == ([NEWLINE] if closed else CLOSING) + new


@given(earlier=st.lists(content, min_size=1, max_size=4), thought=content, answer=content, data=st.data())
def test_thinking_that_the_template_drops_later_does_not_move_the_cut(
    earlier: list[list[int]], thought: list[int], answer: list[int], data: st.DataObject
) -> None:
    before = [token for ids in earlier for token in [4, *thought, *ids, *CLOSING]]
    kept = data.draw(st.lists(st.booleans(), min_size=len(earlier), max_size=len(earlier)))
    shortened = [
        token
        for ids, keep in zip(earlier, kept, strict=True)
        for token in [4, *(thought if keep else []), *ids, *CLOSING]
    ]
    new = [*turn(answer), 4]
    seen = [*before[:-2], END]
    assert splice(seen, before, [*shortened, *new], CLOSING) == [*seen, NEWLINE, *new]


@pytest.mark.parametrize("model", ["same", "retokenized"])
@pytest.mark.parametrize("sampled_end", [True, False])
@pytest.mark.parametrize("newline_in_template_prefix", [True, False])
def test_t3(model: str, sampled_end: bool, newline_in_template_prefix: bool) -> None:
    template = [10, 11, END, NEWLINE, 12, 382, 13, END, NEWLINE, 14, END, NEWLINE, 4]
    end = 8  # after the turn end of the newest turn
    ours = [624 if token == 382 and model == "retokenized" else token for token in template]
    seen = ours[:end] if sampled_end else ours[: end - 1]
    closing = CLOSING if newline_in_template_prefix else [END]
    assert splice(seen, template[: end - 1 + len(closing)], template, closing) == ours


@pytest.mark.parametrize(
    ("seen", "before", "full", "expected"),
    [
        ([], [9, 2], [9, 2, 33, 44], [9, 2, 33, 44]),
        ([100, 2], [9, 2, 9, 2], [9, 2, 9, 2, 77, 88], [100, 2, 77, 88]),
        (
            [11, 12, 99, 99, 99, 55, 2],
            [11, 12, 88, 88, 88, 56, 2],
            [11, 12, 56, 2, 70, 71, 2, 40, 41],
            [11, 12, 99, 99, 99, 55, 2, 70, 71, 2, 40, 41],
        ),
        (
            [11, 12, 13, 40, 41, 220, 17, 2],
            [11, 12, 13, 40, 41, 1001, 2],
            [11, 12, 13, 40, 41, 1001, 2, 21, 22, 40, 41],
            [11, 12, 13, 40, 41, 220, 17, 2, 21, 22, 40, 41],
        ),
    ],
    ids=["nothing seen", "last turn end", "think shift", "documented example"],
)
def test_t4(seen: list[int], before: list[int], full: list[int], expected: list[int]) -> None:
    assert splice(seen, before, full, [2]) == expected


@pytest.mark.parametrize(
    ("before", "full", "closing", "why"),
    [
        ([9, 9, 9], [9, 9, 9, 2, 10], [2], "does not close this turn"),
        ([9, 2], [9, 2, 10], [], "writes nothing after"),
        ([9, 2, 8, 2], [9, 2, 8], [2], "fewer turn ends"),
        ([9, 2, 8, 2], [5, 2, 9, 2, 8, 2, 7], [2], "differently"),  # a system turn that appears later
        ([9, 2, 8, 2], [8, 2, 7, 2, 6], [2], "differently"),  # an early turn that is dropped later
    ],
)
def test_a_cut_that_would_be_a_guess_is_refused(
    before: list[int], full: list[int], closing: list[int], why: str
) -> None:
    with pytest.raises(NoBoundaryError, match=why):
        splice([1, 2], before, full, closing)


def test_the_closing_is_found_by_two_contents() -> None:
    assert find_closing([1, 7, 10, 2, 3], [1, 7, 11, 2, 3]) == [2, 3]
    assert find_closing([1, 10], [1, 11]) == []


def test_an_open_turn_is_continued_and_a_closed_one_is_not() -> None:
    assert continue_turn([1, 5], CLOSING) == [1, 5]
    with pytest.raises(NoBoundaryError, match="closed by the policy"):
        continue_turn([1, 5, END], CLOSING)


@given(
    prompt=st.integers(1, 2000), limit=st.integers(1, 2000), budget=st.integers(1, 2000), first=st.integers(1, 2000)
)
def test_room_keeps_both_limits(prompt: int, limit: int, budget: int, first: int) -> None:
    left = room(prompt, max_model_len=limit, completion_budget=budget, num_first_prompt=first)
    assert prompt + left <= limit
    assert prompt + left - first <= budget
    assert prompt + left == limit or prompt + left - first == budget
    assert room(prompt, max_model_len=limit) == limit - prompt
    assert room(prompt, max_model_len=10**6, completion_budget=budget) == budget
