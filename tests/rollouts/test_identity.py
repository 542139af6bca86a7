from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trl_gym.rollouts.request import Sampling, request_hash, stamp, task_hash

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
fields = st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), json_values, max_size=4)
parameters = st.fixed_dictionaries(
    {"input": st.text(max_size=8)},
    optional={
        "temperature": st.floats(0, 2),
        "max_output_tokens": st.integers(1, 99),
        "tools": st.lists(fields, max_size=2),
        "metadata": st.just({"mine": "yes"}),
    },
)
rows = st.builds(lambda own, params: {**own, "responses_create_params": params}, fields, parameters)


def stamped(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "rollout_id": "r",
        "task_index": 1,
        "member": 0,
        "sampling": Sampling(),
        "completion_budget": 50,
    }
    return stamp(row, **(given | changes))


@given(row=rows)
def test_a_stamp_does_not_change_the_task(row: dict[str, Any]) -> None:
    before = copy.deepcopy(row)
    expected = task_hash(row)
    assert task_hash(stamped(row)) == expected
    assert task_hash(stamped(row, sampling=Sampling(temperature=0.1), completion_budget=7)) == expected
    assert task_hash({**row, "agent_ref": {"name": "a"}}) == expected
    assert row == before


@given(row=rows, other=rows)
def test_different_questions_are_different_tasks(row: dict[str, Any], other: dict[str, Any]) -> None:
    def question(one: dict[str, Any]) -> str:
        asked = {name: one["responses_create_params"].get(name) for name in ("input", "tools", "metadata")}
        return json.dumps({**one, "responses_create_params": asked}, sort_keys=True)

    assert (task_hash(row) == task_hash(other)) == (question(row) == question(other))


@given(row=rows)
def test_a_request_is_known_by_all_but_its_ids(row: dict[str, Any]) -> None:
    expected = request_hash(stamped(row))
    assert request_hash(stamped(row, rollout_id="other", task_index=9, member=4)) == expected
    assert request_hash(stamped(row, sampling=Sampling(temperature=0.1))) != expected
    assert request_hash(stamped(row, sampling=Sampling(min_p=0.1))) != expected
    assert request_hash(stamped(row, completion_budget=49)) != expected
    assert request_hash(stamped(row, chat_template_kwargs={"enable_thinking": False})) != expected
    assert request_hash({**stamped(row), "agent_ref": {"name": "a"}}) != expected
