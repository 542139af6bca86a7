"""What a request says of sampling is done, or refused."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trl_gym.policy_server.transformers_engine.engine import SamplingRequest
from trl_gym.policy_server.transformers_engine.sampling import RefusedError, overflow, read_sampling

LENGTH = 100


def test_a_request_that_says_nothing_samples_what_is_left_at_temperature_1() -> None:
    assert read_sampling({}, 30, LENGTH) == SamplingRequest(max_tokens=70)
    nulls = dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "n", "logit_bias"))
    assert read_sampling(nulls, 30, LENGTH) == SamplingRequest(max_tokens=70)


def test_what_the_engine_has() -> None:
    body = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 9, "stop_token_ids": [3], "ignore_eos": True}
    expected = SamplingRequest(9, temperature=0.7, top_p=0.9, top_k=20, stop_token_ids=(3,), ignore_eos=True)
    assert read_sampling(body, 30, LENGTH) == expected
    assert read_sampling({"max_tokens": 9, "max_completion_tokens": 4}, 30, LENGTH).max_tokens == 4
    assert read_sampling({"top_k": -1}, 30, LENGTH).top_k == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("n", 2),
        ("seed", 0),
        ("stop", ["\n"]),
        ("stop", "\n"),
        ("logit_bias", {"5": 1}),
        ("min_tokens", 3),
        ("bad_words", ["no"]),
        ("allowed_token_ids", [5]),
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"json": {}}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "add"}}),
        ("top_logprobs", 3),
        ("use_beam_search", True),
        ("thinking_token_budget", 5),
    ],
)
def test_what_it_lacks_is_named(name: str, value: Any) -> None:
    with pytest.raises(RefusedError, match=f"^{name}=.*is not supported by the transformers engine"):
        read_sampling({name: value}, 30, LENGTH)


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "text"}, "tool_choice": "auto", "n": 1, "min_p": 0.0, "repetition_penalty": 1.0},
        {"stop": [], "bad_words": [], "logit_bias": {}, "presence_penalty": 0, "top_logprobs": 0, "some_field": 5},
    ],
)
def test_what_changes_nothing_is_fine(body: dict[str, Any]) -> None:
    assert read_sampling(body, 30, LENGTH) == SamplingRequest(max_tokens=70)


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": -1},
        {"temperature": "warm"},
        {"temperature": True},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": 1.5},
        {"max_tokens": 0},
        {"max_tokens": "8"},
        {"stop_token_ids": "5"},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [True]},
        {"ignore_eos": 1},
    ],
)
def test_other_forms_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=f"^{next(iter(body))} must be"):
        read_sampling(body, 30, LENGTH)


def test_an_overflow_has_vllms_words() -> None:
    with pytest.raises(RefusedError) as refused:
        read_sampling({"max_tokens": 71}, 30, LENGTH)
    assert str(refused.value) == overflow(LENGTH, 30, 71)
    assert str(refused.value).startswith(
        "This model's maximum context length is 100 tokens. However, you requested 71 output tokens and your prompt "
        "contains 30 input tokens, for a total of 101 tokens."
    )
    with pytest.raises(RefusedError, match="maximum context length"):
        read_sampling({}, 100, LENGTH)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
fields = ["temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "stop_token_ids", "ignore_eos", "n"]


@given(
    st.dictionaries(st.sampled_from([*fields, "stop", "min_p", "tool_choice"]), json, max_size=4), st.integers(0, 120)
)
def test_any_request_is_read_or_refused(body: dict[str, Any], num_prompt_tokens: int) -> None:
    try:
        request = read_sampling(body, num_prompt_tokens, LENGTH)
    except RefusedError:
        return
    assert 1 <= request.max_tokens <= LENGTH - num_prompt_tokens
    assert request.temperature >= 0 and 0 < request.top_p <= 1 and request.top_k >= 0
