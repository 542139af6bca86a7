"""Trajectories: every trained token is the token that was sampled, and drift is never repaired by guessing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.rollouts.trajectory import (
    DriftError,
    ModelCall,
    TrajectoryError,
    contiguous_head,
    describe,
    finish_reason,
    from_gym,
    model_calls,
)

token = st.integers(0, 1000)


def answer(*calls: dict[str, Any], **response: Any) -> dict[str, Any]:
    """A Gym answer with these bundles, a tool result after each as Gym puts it."""
    output: list[dict[str, Any]] = []
    for call in calls:
        output += [{"type": "function_call", "name": "f"} | call, {"type": "function_call_output", "output": "1"}]
    return {"response": {"output": output, **response}, "reward": 1.0}


def bundle(prompt: list[int], generation: list[int], logprobs: list[float] | None = None) -> dict[str, Any]:
    return {
        "prompt_token_ids": prompt,
        "generation_token_ids": generation,
        "generation_log_probs": [-0.5] * len(generation) if logprobs is None else logprobs,
    }


@st.composite
def contiguous_calls(draw: st.DrawFn) -> list[ModelCall]:
    seen = draw(st.lists(token, min_size=1, max_size=8))
    calls = []
    for _ in range(draw(st.integers(1, 5))):
        generation = draw(st.lists(token, min_size=1, max_size=6))
        logprobs = draw(st.lists(st.floats(-20, 0), min_size=len(generation), max_size=len(generation)))
        calls.append(ModelCall(list(seen), generation, logprobs))
        seen = seen + generation + draw(st.lists(token, max_size=5))
    return calls


def test_the_documented_example() -> None:
    [trajectory] = from_gym(answer(bundle([1, 2], [3], [-1.0]), bundle([1, 2, 3, 4, 5], [6, 7], [-2.0, -3.0])))
    assert trajectory.prompt_ids == [1, 2]
    assert trajectory.completion_ids == [3, 4, 5, 6, 7]
    assert trajectory.env_mask == [1, 0, 0, 1, 1]
    assert trajectory.logprobs == [-1.0, 0.0, 0.0, -2.0, -3.0]
    assert trajectory.turn_ends == [1, 5]
    assert trajectory.num_turns == 2
    assert trajectory.drift is None


@given(contiguous_calls())
def test_contiguous_calls_are_joined_without_loss(calls: list[ModelCall]) -> None:
    trajectory = contiguous_head(calls)
    assert trajectory.drift is None
    assert trajectory.prompt_ids + trajectory.completion_ids == calls[-1].prompt_ids + calls[-1].generation_ids
    sampled = [t for t, mask in zip(trajectory.completion_ids, trajectory.env_mask, strict=True) if mask]
    assert sampled == [t for call in calls for t in call.generation_ids]
    drawn = [p for p, mask in zip(trajectory.logprobs, trajectory.env_mask, strict=True) if mask]
    assert drawn == [p for call in calls for p in call.logprobs]
    assert all(p == 0.0 for p, mask in zip(trajectory.logprobs, trajectory.env_mask, strict=True) if not mask)
    assert trajectory.turn_ends[-1] == len(trajectory.completion_ids)


@given(contiguous_calls(), st.data())
def test_one_changed_token_of_the_history_is_drift_at_that_token(calls: list[ModelCall], data: st.DataObject) -> None:
    turn = data.draw(st.integers(0, len(calls) - 1))
    if turn == 0:
        return
    seen_before = calls[turn - 1].prompt_ids + calls[turn - 1].generation_ids
    position = data.draw(st.integers(0, len(seen_before) - 1))
    changed = list(calls[turn].prompt_ids)
    changed[position] += 1
    drifted = [*calls[:turn], ModelCall(changed, calls[turn].generation_ids, calls[turn].logprobs), *calls[turn + 1 :]]
    trajectory = contiguous_head(drifted)
    assert trajectory.drift is not None
    assert (trajectory.drift.turn, trajectory.drift.position) == (turn, position)
    assert trajectory.drift.seen == seen_before
    assert trajectory.drift.prompt == changed
    assert trajectory.drift.sampled == [0] * len(calls[0].prompt_ids) + trajectory.env_mask
    assert trajectory.completion_ids == contiguous_head(calls[:turn]).completion_ids


def test_a_shorter_prompt_is_drift() -> None:
    """A template that strips history makes the prompt shorter; TRL's removed example appended it in silence."""
    trajectory = contiguous_head([ModelCall([1, 2], [3, 4], [0.0, 0.0]), ModelCall([1, 2, 3], [9], [0.0])])
    assert trajectory.drift is not None
    assert trajectory.completion_ids == [3, 4]
    assert "model call 1" in describe(trajectory.drift)


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_drift_keeps_the_head(policy: Any) -> None:
    [trajectory] = from_gym(answer(bundle([1], [2]), bundle([9, 9, 9], [4])), drift=policy)
    assert trajectory.completion_ids == [2]


@pytest.mark.parametrize("policy", ["exclude", "error"])
def test_drift_can_be_refused(policy: Any) -> None:
    with pytest.raises(DriftError, match="model call 1") as caught:
        from_gym(answer(bundle([1], [2]), bundle([9, 9, 9], [4])), drift=policy)
    assert (caught.value.drift.turn, caught.value.drift.position) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, -math.inf, None, "-1"])
def test_a_logprob_that_is_no_number_never_passes(value: Any) -> None:
    with pytest.raises(TrajectoryError, match="not a finite number"):
        model_calls(answer(bundle([1], [2], [value])))


def test_lengths_must_agree() -> None:
    with pytest.raises(TrajectoryError, match="2 generated tokens and 1 log-prob"):
        model_calls(answer(bundle([1], [2, 3], [-1.0])))


def test_a_bundle_without_prompt_is_refused() -> None:
    with pytest.raises(TrajectoryError, match="without their prompt"):
        model_calls(answer({"generation_token_ids": [1], "generation_log_probs": [0.0]}))


@pytest.mark.parametrize("result", [{}, {"response": {}}, {"response": {"output": None}}, answer()])
def test_nothing_to_train_says_what_was_there(result: dict[str, Any]) -> None:
    with pytest.raises(TrajectoryError, match="no trainable token"):
        from_gym(result)


def test_overflow_on_the_first_call_is_named() -> None:
    cut = {"response": {"output": [{"type": "message"}], "incomplete_details": {"reason": "max_output_tokens"}}}
    with pytest.raises(TrajectoryError, match="first model call was already cut"):
        from_gym(cut)
    assert finish_reason(cut) == "max_output_tokens"
    assert finish_reason({"response": {}}) == "stop"
