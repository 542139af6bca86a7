from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.rollouts.requests import Sampling, stamp

json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def stamped(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    options = {
        "rollout_id": "run-train0-g0-m1-a0",
        "task_index": 7,
        "member": 1,
        "sampling": Sampling(temperature=0.7),
        "completion_budget": 64,
    }
    return stamp(row, **(options | changes))


def tag(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["responses_create_params"]["metadata"]["extra_body"])


@given(st.dictionaries(st.text(max_size=8), json_value, max_size=4))
def test_a_row_keeps_everything_else_and_is_not_changed_in_place(extra: dict[str, Any]) -> None:
    row = extra | {"responses_create_params": {"input": "hi", "metadata": {"k": "v"}}}
    before = copy.deepcopy(row)
    result = stamped(row)
    assert row == before
    assert {key: result[key] for key in extra if key != "responses_create_params"} == {
        key: value for key, value in extra.items() if key != "responses_create_params"
    }
    assert result["responses_create_params"]["metadata"]["k"] == "v"


def test_identity_sampling_and_budget_travel_with_every_model_call() -> None:
    result = stamped({"responses_create_params": {"input": "hi"}})
    assert result["_ng_task_index"] == 7
    assert result["_ng_rollout_index"] == 1
    assert result["_ng_rollout_id"] == "run-train0-g0-m1-a0"
    assert result["responses_create_params"]["temperature"] == 0.7
    assert tag(result)["trl_gym"] == {
        "rollout": "run-train0-g0-m1-a0",
        "sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        "completion_budget": 64,
    }


@pytest.mark.parametrize(("asked", "given_"), [(None, 64), (16, 16), (1000, 64)])
def test_one_call_gets_at_most_the_budget(asked: int | None, given_: int) -> None:
    result = stamped({"responses_create_params": {"input": "hi", "max_output_tokens": asked}})
    assert result["responses_create_params"]["max_output_tokens"] == given_


def test_a_rows_own_extra_body_is_kept() -> None:
    row = {"responses_create_params": {"input": "hi", "metadata": {"extra_body": '{"seed": 3}'}}}
    assert tag(stamped(row))["seed"] == 3


def test_null_metadata_is_replaced() -> None:
    assert "trl_gym" in tag(stamped({"responses_create_params": {"input": "hi", "metadata": None}}))


def test_a_rows_own_template_arguments_win() -> None:
    row = {"responses_create_params": {"input": "hi", "metadata": {"chat_template_kwargs": '{"a": 1}'}}}
    result = stamped(row, chat_template_kwargs={"a": 0, "b": 2})
    assert json.loads(result["responses_create_params"]["metadata"]["chat_template_kwargs"]) == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_broken_extra_body_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"metadata\.extra_body"):
        stamped({"responses_create_params": {"input": "hi", "metadata": {"extra_body": text}}})
