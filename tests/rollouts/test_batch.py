"""From finished rollouts to what is trained, logged and recorded."""

from __future__ import annotations

import json
import math
from typing import Any

from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.rollouts.batch import describe_failures, rollout_metrics, training_rows
from trl_gym.rollouts.requests import RolloutRequest
from trl_gym.rollouts.rollout import Rollout, conversation, journal_record
from trl_gym.rollouts.trajectory import from_gym

OUTPUT = [
    {
        "type": "function_call",
        "name": "add",
        "arguments": '{"a": 1, "b": 2}',
        "prompt_token_ids": [1, 2],
        "generation_token_ids": [3],
        "generation_log_probs": [-0.1],
    },
    {"type": "function_call_output", "output": "3"},
    {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "It is 3."}],
        "prompt_token_ids": [1, 2, 3, 4],
        "generation_token_ids": [5],
        "generation_log_probs": [-0.2],
    },
]


def request(**changes: Any) -> RolloutRequest:
    fields = {
        "rollout_id": "r",
        "task_index": 4,
        "group": 1,
        "member": 0,
        "attempt": 0,
        "agent": "calculator",
        "row": {"responses_create_params": {"input": "1 + 2?"}, "a": 1},
    }
    return RolloutRequest(**(fields | changes))


def good(reward: float = 1.0, **answer: Any) -> Rollout:
    result = {"response": {"output": OUTPUT}, "reward": reward, **answer}
    return Rollout(request=request(), answer=result, failure=None, trajectories=from_gym(result), seconds=0.5)


def bad(kind: FailureKind = FailureKind.DEADLINE, text: str = "took 3 s") -> Rollout:
    failure = RolloutFailure(kind=kind, text=text, where="calculator /run")
    return Rollout(request=request(), answer=None, failure=failure, trajectories=[], seconds=3.0)


def test_a_failed_rollout_trains_nothing() -> None:
    rows = training_rows([good(), bad()], [1.0, None], pad_id=0, eos_id=9)
    assert rows["prompt_ids"] == [[1, 2], [0]]
    assert rows["completion_ids"] == [[3, 4, 5], [9]]
    assert rows["env_mask"] == [[1, 0, 1], [0]]
    assert rows["logprobs"] == [[-0.1, 0.0, -0.2], [0.0]]
    assert rows["gym_reward"] == [1.0, None]
    assert rows["gym_result"][1] is None


def test_a_reward_taken_away_by_a_subclass_takes_the_tokens_away_too() -> None:
    assert training_rows([good()], [None], pad_id=0, eos_id=9)["env_mask"] == [[0]]


def test_metrics_hold_every_number_of_the_verifier_and_no_echo_of_the_task() -> None:
    metrics = rollout_metrics([good(0.5, success=False, steps=2, note="x", a=1, bad=math.nan), bad()])
    assert metrics["gym/calculator/reward"] == [0.5]
    assert metrics["gym/calculator/steps"] == [2.0]
    assert metrics["success"] == [0.0]
    assert metrics["rollouts/failed_fraction"] == [0.0, 1.0]
    assert metrics["gym/calculator/failed/deadline"] == [1.0]
    assert metrics["rollouts/turns"] == [2.0]
    assert not {"gym/calculator/note", "gym/calculator/a", "gym/calculator/bad"} & set(metrics)


def test_success_is_the_full_reward_where_the_verifier_says_nothing() -> None:
    assert [good(1.0).success, good(0.9).success, bad().success] == [1.0, 0.0, None]


def test_failures_are_counted_by_cause() -> None:
    text = describe_failures([bad(), bad(), bad(FailureKind.ENVIRONMENT, "verifier raised"), good()])
    assert text.splitlines()[0] == "  2 × deadline (calculator /run): took 3 s"
    assert "1 × environment" in text


def test_journal_record_has_the_agreed_keys() -> None:
    record = journal_record(good(), step=3, mode="train", weight_versions=["3"])
    assert set(record) == {
        "step", "mode", "task_index", "group", "rollout_id", "attempt", "agent", "weight_versions", "reward",
        "reward_components", "failure", "finish_reason", "prompt_ids", "completion_ids", "env_mask", "logprobs",
        "turns", "seconds", "row", "response",
    }  # fmt: skip
    assert [(turn["kind"], turn.get("name")) for turn in record["turns"]] == [
        ("model", None),
        ("tool", "add"),
        ("model", None),
    ]
    failed = journal_record(bad(), step=3, mode="train", weight_versions=["3"])
    assert failed["reward"] is None
    assert failed["failure"] == {"kind": "deadline", "text": "took 3 s", "where": "calculator /run"}
    json.dumps([record, failed], allow_nan=False)


def test_nan_in_a_response_becomes_null() -> None:
    rollout = good()
    rollout.answer["response"]["usage"] = {"x": math.nan, "y": [math.inf, 1.0]}
    response = journal_record(rollout, step=0, mode="train", weight_versions=[])["response"]
    assert response["usage"] == {"x": None, "y": [None, 1.0]}


def test_the_conversation_is_what_happened() -> None:
    messages = conversation(good())
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
    assert messages[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    assert messages[1]["content"] == "3"
    assert messages[2]["content"] == "It is 3."
    assert conversation(bad()) == [{"role": "assistant", "content": ""}]
