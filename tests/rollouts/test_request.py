from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.gym.discovery import AgentInfo
from trl_gym.policy_server.middleware.identity import Gate, Identity, identity_of
from trl_gym.rollouts.request import (
    PolicyAccess,
    RolloutRequest,
    Sampling,
    next_attempt,
    request_hash,
    stamp,
    task_hash,
)

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


def test_what_an_agents_own_sampling_becomes_travels_where_it_is_not_the_default() -> None:
    row = {"responses_create_params": {"input": "hi"}}
    assert tag(stamped(row, agent_sampling="allow"))["trl_gym"]["agent_sampling"] == "allow"
    assert stamped(row, agent_sampling="strip") == stamped(row)
    assert request_hash(stamped(row, agent_sampling="refuse")) != request_hash(stamped(row))


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
    assert tag(result)["trl_gym"]["chat_template_kwargs"] == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_broken_extra_body_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"metadata\.extra_body"):
        stamped({"responses_create_params": {"input": "hi", "metadata": {"extra_body": text}}})


def first_attempt(row: dict[str, Any]) -> RolloutRequest:
    identity = {"rollout_id": "run-train0-g0-m1-a0", "task_index": 7, "member": 1}
    return RolloutRequest(**identity, group=0, attempt=0, agent="a", row=row)


@given(st.dictionaries(st.text(max_size=8), json_value, max_size=4), st.integers(1, 12))
def test_another_attempt_differs_in_its_id_everywhere_and_in_nothing_else(extra: dict[str, Any], times: int) -> None:
    row = stamped(extra | {"responses_create_params": {"input": "hi", "metadata": {"extra_body": '{"seed": 3}'}}})
    before = copy.deepcopy(row)
    request = first_attempt(row)
    for _ in range(times):
        request = next_attempt(request)
    assert row == before
    rollout_id = f"run-train0-g0-m1-a{times}"
    assert (request.rollout_id, request.attempt, request.task_index, request.member) == (rollout_id, times, 7, 1)
    assert request.row == stamped(before, rollout_id=rollout_id)


def test_a_row_of_ones_own_making_is_left_alone() -> None:
    row = {"responses_create_params": {"input": "hi", "metadata": None}, "x": 1}
    request = next_attempt(first_attempt(row))
    assert request.row == row and request.rollout_id.endswith("-a1")
    assert next_attempt(RolloutRequest(**{**vars_of(request), "rollout_id": "mine"})).rollout_id == "mine-a2"


def vars_of(request: RolloutRequest) -> dict[str, Any]:
    return {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}


# -- which rows are of the same task, and of the same request ---------------------------------------------------------


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
fields = st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), json_values, max_size=4)
parameters = st.fixed_dictionaries(
    {"input": st.text(min_size=1, max_size=8)},
    optional={
        "temperature": st.floats(0, 2),
        "max_output_tokens": st.integers(1, 99),
        "tools": st.lists(fields, max_size=2),
        "metadata": st.just({"mine": "yes"}),
    },
)
rows = st.builds(lambda own, params: {**own, "responses_create_params": params}, fields, parameters)


def stamped_row(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
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
    assert task_hash(stamped_row(row)) == expected
    assert task_hash(stamped_row(row, sampling=Sampling(temperature=0.1), completion_budget=7)) == expected
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
    expected = request_hash(stamped_row(row))
    assert request_hash(stamped_row(row, rollout_id="other", task_index=9, member=4)) == expected
    assert request_hash(stamped_row(row, sampling=Sampling(temperature=0.1))) != expected
    assert request_hash(stamped_row(row, sampling=Sampling(min_p=0.1))) != expected
    assert request_hash(stamped_row(row, completion_budget=49)) != expected
    assert request_hash(stamped_row(row, chat_template_kwargs={"enable_thinking": False})) != expected
    assert request_hash({**stamped_row(row), "agent_ref": {"name": "a"}}) != expected


URLS = ("http://a:1/v1", "http://b:2/v1")


def request(row: dict[str, Any], rollout_id: str = "r0") -> RolloutRequest:
    return RolloutRequest(rollout_id=rollout_id, task_index=7, group=0, member=1, attempt=0, agent="agent", row=row)


def agent(*run_fields: str) -> AgentInfo:
    return AgentInfo("agent", "http://agent:1", None, "simple_agent", frozenset(run_fields))


def identity(headers: dict[str, str], path: str = "/v1/chat/completions") -> Identity:
    """What a server with that API key takes the sender for."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    Gate(["the-key"]).admit(scope)
    assert scope["path"] == "/v1/chat/completions"
    return identity_of(scope)


@given(st.text(min_size=1, max_size=30), st.integers(1, 10**6))
def test_the_key_of_a_rollout_says_what_its_stamp_says(rollout_id: str, budget: int) -> None:
    row = {"responses_create_params": {"input": "hi"}}
    made = request(stamped(row, rollout_id=rollout_id, completion_budget=budget))
    headers, fields = PolicyAccess(URLS, "the-key").of(made, agent())
    assert fields == {}
    assert identity(headers | {"authorization": "Bearer the-key"}).tag == tag(made.row)["trl_gym"]


def test_the_next_attempt_has_a_key_of_its_own() -> None:
    made = request(stamped({"responses_create_params": {"input": "hi"}}), "run-train0-g0-m1-a0")
    headers, _ = PolicyAccess(URLS, "the-key").of(next_attempt(made), agent())
    assert identity(headers | {"authorization": "Bearer the-key"}).rollout == "run-train0-g0-m1-a1"


def test_an_agent_that_takes_a_policy_per_run_gets_one_of_its_own() -> None:
    made = request(stamped({"responses_create_params": {"input": "hi"}}))
    access = PolicyAccess(URLS, "the-key")
    _, fields = access.of(made, agent("policy_base_url", "policy_api_key"))
    assert fields["policy_base_url"] in URLS
    assert identity({"authorization": f"Bearer {fields['policy_api_key']}"}).tag == tag(made.row)["trl_gym"]

    _, fields = access.of(made, agent("policy_base_url"))
    assert set(fields) == {"policy_base_url"}
    path = fields["policy_base_url"].partition("/trl_gym")
    assert f"{path[0]}/v1" in URLS
    assert identity({}, "".join(path[1:]) + "/chat/completions").tag == tag(made.row)["trl_gym"]


def test_the_rollouts_of_several_policy_servers_are_spread_and_each_stays_with_one() -> None:
    access = PolicyAccess(URLS, "the-key")
    row = stamped({"responses_create_params": {"input": "hi"}})
    urls = [access.of(request(row, f"r{n}"), agent("policy_base_url"))[1]["policy_base_url"][:8] for n in range(50)]
    again = [access.of(request(row, f"r{n}"), agent("policy_base_url"))[1]["policy_base_url"][:8] for n in range(50)]
    assert urls == again and len(set(urls)) == 2


def test_a_row_keeps_its_own_policy_and_one_without_a_stamp_gets_no_key() -> None:
    own = stamped({"responses_create_params": {"input": "hi"}, "policy_base_url": "http://else/v1"})
    headers, fields = PolicyAccess(URLS, "the-key").of(request(own), agent("policy_base_url", "policy_api_key"))
    assert headers and fields == {}
    assert PolicyAccess(URLS).of(request({"responses_create_params": {"input": "hi"}}), agent()) == ({}, {})


def test_an_api_key_is_not_shown() -> None:
    assert "the-key" not in repr(PolicyAccess(URLS, "the-key"))
