"""The prefix rule on lists of ints. The cases named T3, T4 and T6 are those that NeMo RL tests its own splice with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.policy_server.middleware.splice import (
    Closing,
    NoBoundaryError,
    NoMarkerError,
    Rendered,
    closing_of,
    continue_turn,
    plain_closing,
    room,
    splice,
    tool_closing,
)

END, NEWLINE, RETURN, OBSERVATION = 2, 3, 5, 6
CLOSING = Closing([END, NEWLINE], 0)
content = st.lists(st.integers(10, 99), min_size=1, max_size=6)


def turn(ids: list[int]) -> list[int]:
    return [4, *ids, END, NEWLINE]


# -- the splice -------------------------------------------------------------------------------------------------------


@given(
    history=content,
    sampled=st.lists(st.integers(100, 199), min_size=1, max_size=8),
    new=st.lists(content, max_size=3),
    closed=st.booleans(),
)
def test_the_prompt_is_all_that_was_seen_then_exactly_the_templates_tail(
    history: list[int], sampled: list[int], new: list[list[int]], closed: bool
) -> None:
    tail = [END, NEWLINE, *(token for ids in new for token in turn(ids)), 4]
    seen = [*history, 4, *sampled, *([END] if closed else [])]
    prompt = splice(seen, tail, CLOSING, {END} if closed else ())
    assert prompt[: len(seen)] == seen
    assert prompt[len(seen) :] == (tail[1:] if closed else tail)


def after_newest_turn(template: list[int], num_ends: int) -> list[int]:
    """The tail, found in a template's render as NeMo RL does: from the n-th turn end on."""
    ends = [index for index, token in enumerate(template) if token == END]
    return template[ends[num_ends - 1] :]


@pytest.mark.parametrize("model", ["same", "retokenized"])
@pytest.mark.parametrize("sampled_end", [True, False])
@pytest.mark.parametrize("newline_after_end", [True, False])
def test_t3(model: str, sampled_end: bool, newline_after_end: bool) -> None:
    blank = [NEWLINE] if newline_after_end else []
    template = [10, 11, END, *blank, 12, 382, 13, END, *blank, 14, END, *blank, 4]
    ours = [624 if token == 382 and model == "retokenized" else token for token in template]
    end = [index for index, token in enumerate(ours) if token == END][1]
    seen = ours[: end + sampled_end]
    assert splice(seen, after_newest_turn(template, 2), Closing([END, *blank], 0), ()) == ours


@pytest.mark.parametrize(
    ("seen", "template", "num_ends", "expected"),
    [
        ([100, 2], [9, 2, 9, 2, 77, 88], 2, [100, 2, 77, 88]),
        (
            [11, 12, 99, 99, 99, 55, 2],
            [11, 12, 56, 2, 70, 71, 2, 40, 41],
            1,
            [11, 12, 99, 99, 99, 55, 2, 70, 71, 2, 40, 41],
        ),
        (
            [11, 12, 13, 40, 41, 220, 17, 2],
            [11, 12, 13, 40, 41, 1001, 2, 21, 22, 40, 41],
            1,
            [11, 12, 13, 40, 41, 220, 17, 2, 21, 22, 40, 41],
        ),
    ],
    ids=["last turn end", "think shift", "documented example"],
)
def test_t4(seen: list[int], template: list[int], num_ends: int, expected: list[int]) -> None:
    assert splice(seen, after_newest_turn(template, num_ends), Closing([2], 0), ()) == expected


def test_t4_without_a_turn_end_nothing_is_guessed() -> None:
    with pytest.raises(NoBoundaryError, match="does not close this turn"):
        splice([7, 2], [9, 9, 10], Closing([2], 0), ())


@pytest.mark.parametrize(
    ("seen", "tail", "closing", "stops", "expected"),
    [
        # gpt-oss samples <|return|>, and its template writes <|end|> in history: the policy has closed its turn.
        ([1, 9, RETURN], [END, 7, 8], Closing([END], 0), {RETURN}, [7, 8]),
        # GLM closes nothing: the next turn's opening token is what the policy stops at.
        ([1, 9, OBSERVATION], [OBSERVATION, 7], Closing([], None), {OBSERVATION}, [7]),
        ([1, 9, OBSERVATION], [8, 7], Closing([], None), {OBSERVATION}, [8, 7]),  # it expected a tool, a user came
        ([1, 9, NEWLINE], [NEWLINE, 7], Closing([], None), (), [NEWLINE, 7]),  # cut off: sampled text ends nothing
        # Llama 2 writes a blank in front of </s>, which nobody samples.
        ([1, 9, END], [50, END, 7], Closing([50, END], 1, 1), (), [7]),
        ([1, 9], [50, END, 7], Closing([50, END], 1, 1), (), [50, END, 7]),
        ([1, 9, 50], [50, END, 7], Closing([50, END], 1, 1), (), [50, END, 7]),
        # Cohere ends a turn with two tokens.
        ([1, 9, 60, END], [60, END, 7], Closing([60, END], 1, 0), {END}, [7]),
        ([1, 9, 60], [60, END, 7], Closing([60, END], 1, 0), {END}, [END, 7]),
        ([1, 9], [60, END, 7], Closing([60, END], 1, 0), {END}, [60, END, 7]),
        # A tool call's markup is the policy's own, whatever the template would write.
        ([1, 9, 9, END], [30, 31, END, NEWLINE, 7], Closing([30, 31, END, NEWLINE], 2, 2, True), (), [NEWLINE, 7]),
        ([1, 9, 9], [30, 31, END, NEWLINE, 7], Closing([30, 31, END, NEWLINE], 2, 2, True), (), [END, NEWLINE, 7]),
        (
            [1, 9, 30],
            [30, 31, END, NEWLINE, 7],
            Closing([30, 31, END, NEWLINE], 2, 2, True),
            (),
            [31, END, NEWLINE, 7],
        ),
        ([1, 9, END], [30, 77, END, 7], Closing([30, 31, END], 2, 2, True), (), [7]),  # a call id in the markup
        ([1, 9, OBSERVATION], [30, OBSERVATION, 7], Closing([30], None, 0, True), {OBSERVATION}, [7]),
    ],
)
def test_turn_ends_of_all_kinds(
    seen: list[int], tail: list[int], closing: Closing, stops: set[int], expected: list[int]
) -> None:
    assert splice(seen, tail, closing, stops) == seen + expected


@pytest.mark.parametrize(
    ("tail", "closing", "stops", "why"),
    [
        ([9, 10], Closing([2], 0), (), "does not close this turn"),
        ([30, 6, 7], Closing([30], None, 0, True), (), "cut off behind a tool call"),
        ([31, 6, 7], Closing([30], None, 0, True), {8}, "no turn end after this tool call"),
    ],
)
def test_a_cut_that_would_be_a_guess_is_refused(tail: list[int], closing: Closing, stops: set[int], why: str) -> None:
    with pytest.raises(NoBoundaryError, match=why):
        splice([1, 8], tail, closing, stops)


def test_an_open_turn_is_continued_and_a_closed_one_is_not() -> None:
    assert continue_turn([1, 9], CLOSING, ()) == [1, 9]
    for last, stops in ((END, ()), (RETURN, {RETURN})):
        with pytest.raises(NoBoundaryError, match="closed by the policy"):
            continue_turn([1, 9, last], CLOSING, stops)


# -- where a turn ends ------------------------------------------------------------------------------------------------


def test_what_follows_the_marker() -> None:
    rendered = Rendered([1, 2, 3, 4, 5, 6], ["zqx0", "Ġa", "Ġzq", "x0", "<end>", "Ċ"])
    assert rendered.after("zqx0") == Rendered([5, 6], ["<end>", "Ċ"])  # the last one counts
    assert Rendered([1, 2], ["a", "zqx0"]).after("zqx0") == Rendered([], [])
    with pytest.raises(NoMarkerError):
        rendered.after("zqx1")
    with pytest.raises(NoBoundaryError, match="spans the end"):
        Rendered([1, 2], ["zqx", '0"']).after("zqx0")


@given(pieces=st.lists(st.text("ab0", min_size=1, max_size=3), max_size=6), cut=st.integers(0, 12))
def test_the_marker_is_found_however_it_is_tokenized(pieces: list[str], cut: int) -> None:
    mark = "zqx0"
    strings = [*pieces, *filter(None, (mark[: cut % 4], mark[cut % 4 :])), "<end>", *pieces]
    rendered = Rendered(list(range(len(strings))), strings)
    assert rendered.after(mark).strings == ["<end>", *pieces]


def test_blanks_end_no_turn_and_a_known_stop_does() -> None:
    assert plain_closing(Rendered([50, END, NEWLINE], ["▁", "</s>", "<0x0A>"]), ()).turn_end == END
    assert plain_closing(Rendered([60, END], ["<|END_RESPONSE|>", "<|END_OF_TURN|>"]), {END}) == Closing([60, END], 1)
    assert plain_closing(Rendered([NEWLINE, NEWLINE], ["Ċ", "ĊĊ"]), ()).turn_end is None
    assert plain_closing(Rendered([], []), {END}) == Closing([], None)


def test_a_tool_calls_markup_is_told_from_the_turn_end() -> None:
    rendered = Rendered([30, 31, END, NEWLINE], ['"}', "</tool_call>", "<|im_end|>", "Ċ"])
    assert tool_closing(rendered, CLOSING, ()) == Closing(rendered.ids, 2, 2, True)
    gpt_oss = Rendered([30, 31], ['"}', "<|call|>"])
    assert tool_closing(gpt_oss, CLOSING, ()).turn_end is None
    assert tool_closing(gpt_oss, CLOSING, {31}).turn_end == 31


def test_the_generation_prompt_is_no_part_of_the_closing() -> None:
    assert closing_of([2, 9, 40, 41], [40, 41]) == 2
    assert closing_of([2, 9], []) == 2
    assert closing_of([40, 41], [40, 41]) == 0
    assert closing_of([2, 9], [40, 41]) is None
    assert closing_of([41], [40, 41]) is None


# -- room -------------------------------------------------------------------------------------------------------------


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


def test_t6_context_capped_completions() -> None:
    assert room(3058, max_model_len=8192) == 5134
    assert room(8192, max_model_len=8192) == 0
