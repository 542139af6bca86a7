"""From finished rollouts to what is trained, logged and recorded."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec

from tests.rollouts.sampled import calls_in, record, records_of
from trl_gym.errors import FailureKind, RolloutFailure, as_problems
from trl_gym.policy_server.middleware.ledger import CallRecord, DriftCause
from trl_gym.rollouts.batch import describe_drift, failure_causes, table_columns
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout, journal_record
from trl_gym.rollouts.trajectory import DriftReport, ModelCall, from_calls, model_calls

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
    return Rollout(
        request=request(), answer=result, failure=None, trajectories=from_calls(calls_in(result)), seconds=0.5
    )


def bad(kind: FailureKind = FailureKind.DEADLINE, text: str = "took 3 s") -> Rollout:
    failure = RolloutFailure(kind=kind, text=text, where="calculator /run")
    return Rollout(request=request(), answer=None, failure=failure, trajectories=[], seconds=3.0)


def drifted(cause: DriftCause, agent: str = "calculator", *, excluded: bool = False) -> Rollout:
    report = DriftReport(turn=1, position=2, cause=cause, seen_text="a", prompt_text="b", text=f"it is {cause}")
    failure = RolloutFailure(kind=FailureKind.POLICY, text="excluded", where=agent) if excluded else None
    rollout = good()
    return Rollout(
        request=request(agent=agent, rollout_id=f"{agent}-{cause}"),
        answer=rollout.answer,
        failure=failure,
        trajectories=[] if excluded else rollout.trajectories,
        seconds=0.1,
        drift=report,
    )


def with_records(rollout: Rollout, records: list[CallRecord], calls: list[ModelCall]) -> Rollout:
    return dataclasses.replace(rollout, records=records, counted=tuple(call.index for call in calls))


def test_the_table_says_whose_row_it_is() -> None:
    assert table_columns([good(), bad()]) == {
        "environment": ["calculator", "calculator"],
        "rollout_id": ["r", "r"],
        "finish_reason": ["stop", "deadline failure"],
    }


def test_success_is_the_full_reward_where_the_verifier_says_nothing() -> None:
    assert [good(1.0).success, good(0.9).success, bad().success] == [1.0, 0.0, None]


def test_failures_are_counted_by_cause() -> None:
    rollouts = [bad(), bad(), bad(FailureKind.ENVIRONMENT, "verifier raised"), good()]
    first, second = as_problems(failure_causes(rollouts))
    assert first.text == "2 × deadline (calculator /run): took 3 s"
    assert second.text.startswith("1 × environment")


def test_drift_is_described_once_per_agent_and_cause() -> None:
    batch = [good(), drifted(DriftCause.RETEMPLATED), *[drifted(DriftCause.RETOKENIZED)] * 2]
    batch += [drifted(DriftCause.RETOKENIZED, "search", excluded=True)]
    lines = describe_drift(batch)
    assert len(lines) == 3
    assert lines[0] == (
        "2 of 4 rollouts of calculator drifted (retokenized). In calculator-retokenized, it is retokenized"
    )
    assert any(line.startswith("1 of 1 rollouts of search drifted (retokenized)") for line in lines)
    assert describe_drift([good(), bad()]) == []


def test_turns_have_what_the_server_measured() -> None:
    """The failed call in between has no place in Gym's answer, and a call that the answer lacks comes last."""
    measured = {"queue_s": 0.01, "prefill_s": 0.02, "decode_s": 0.03}
    first, second = records_of({"response": {"output": OUTPUT}})
    first = msgspec.structs.replace(first, cached_tokens=1, **measured)
    second = msgspec.structs.replace(second, cached_tokens=3, last_version="4", **measured)
    refused = CallRecord(status=400, prompt="exact", seconds=0.1)
    records = [first, refused, second, record([first], [9], [9, 9], weight_version="4")]
    calls = model_calls(records)
    line = journal_record(with_records(good(), records, calls), mode="train", weight_version="9")
    names = ("prompt_tokens", "generation_tokens", "cached_tokens", "queue_s", "prefill_s", "decode_s")
    models = [turn for turn in line["turns"] if turn["kind"] == "model"]
    assert [tuple(turn[name] for name in names) for turn in models] == [
        (2, 1, 1, 0.01, 0.02, 0.03),
        (4, 1, 3, 0.01, 0.02, 0.03),
        (1, 2, None, None, None, None),
    ]
    assert [(turn["weight_version"], turn.get("last_version")) for turn in models] == [
        ("3", None),
        ("3", "4"),
        ("4", None),
    ]
    assert line["weight_versions"] == ["3", "4"]
    assert line["turns"][1] == {"kind": "tool", "name": "add", "seconds": None, "error": None}


def test_the_calls_of_a_failed_rollout_are_known_from_the_records() -> None:
    records = [record([], [1, 2], [3], queue_s=0.01), CallRecord(status=400, prompt="exact", seconds=0.1)]
    rollout = with_records(bad(), records, model_calls(records))
    line = journal_record(rollout, mode="train", weight_version="9")
    assert [(turn["prompt_tokens"], turn["queue_s"]) for turn in line["turns"]] == [(2, 0.01)]


def test_journal_record_has_the_agreed_keys() -> None:
    record = journal_record(good(), mode="train", weight_version="3")
    assert record["weight_versions"] == ["3"]
    assert record["drift"] is None
    assert set(record) == {
        "step", "mode", "task_index", "task_hash", "request_hash", "batch", "group", "member", "rollout_id",
        "attempt", "agent", "weight_versions", "reward", "reward_components", "failure", "drift", "finish_reason",
        "prompt_ids", "completion_ids", "env_mask", "logprobs", "turn_ends", "further_rows", "turns", "seconds", "row",
        "response", "verify",
    }  # fmt: skip
    assert [(turn["kind"], turn.get("name")) for turn in record["turns"]] == [
        ("model", None),
        ("tool", "add"),
        ("model", None),
    ]
    failed = journal_record(bad(), mode="train", weight_version="3")
    assert failed["reward"] is None
    cause = {"kind": "deadline", "text": "took 3 s", "where": "calculator /run"}
    assert failed["failure"].items() >= cause.items()
    excluded = journal_record(drifted(DriftCause.NO_BOUNDARY, excluded=True), mode="eval", weight_version="3")
    assert set(excluded["drift"]) == {"turn", "position", "cause", "seen_text", "prompt_text", "text"}
    assert excluded["reward"] is None
    json.dumps([record, failed, excluded], allow_nan=False)
