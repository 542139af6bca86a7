"""What becomes of a rollout that has ended, for every drift policy, and what the journal says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.rollouts.sampled import record, records_of
from trl_gym.errors import FailureKind, RolloutError, RolloutFailure
from trl_gym.policy_server.middleware.ledger import CallDrift, CallRecord, DriftCause
from trl_gym.rollouts.collector import RolloutResult
from trl_gym.rollouts.journal import Journal, read_journal
from trl_gym.rollouts.metrics import rollout_metrics
from trl_gym.rollouts.objectives import component_problem
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import facts_of
from trl_gym.rollouts.source import Finisher, OwnSampling
from trl_gym.rollouts.trajectory import from_calls


def request() -> RolloutRequest:
    row = {"responses_create_params": {"input": "1 + 2?"}, "a": 1}
    identity = {"rollout_id": "r", "task_index": 4, "member": 0}
    return RolloutRequest(**identity, group=1, attempt=0, agent="calculator", row=row)


def message(prompt: str, sampled: str) -> dict[str, Any]:
    return {
        "type": "message",
        "prompt_token_ids": [ord(char) for char in prompt],
        "generation_token_ids": [ord(char) for char in sampled],
        "generation_log_probs": [-0.5] * len(sampled),
    }


DRIFTED = [message("q", "AB"), message("qAB?", "C"), message("qXB?C!", "D"), message("other", "E")]


def result(output: list[dict[str, Any]] | None = None, **changes: Any) -> RolloutResult:
    answer = {"reward": 1.0, "response": {"output": DRIFTED if output is None else output}}
    fields = {"request": request(), "answer": answer, "failure": None, "seconds": 0.1, "records": records_of(answer)}
    return RolloutResult(**(fields | changes))


REFUSED = CallRecord(status=400, prompt="rendered", seconds=0.1)


def finisher(tmp_path: Path, policy: Any) -> Finisher:
    return Finisher(
        build=lambda answer, request, calls: from_calls(calls, drift=policy),
        decode=lambda ids: "".join(map(chr, ids)),
        journal=Journal(tmp_path),
        drift_policy=policy,
        mode="train",
        weight_version="3",
        tags={"run": "r1", "weights": "w"},
    )


def test_the_head_is_trained_and_the_first_drift_explained(tmp_path: Path) -> None:
    rollout = finisher(tmp_path, "truncate")(result())
    assert rollout.reward == 1.0
    assert rollout.trajectories[0].num_turns == 2
    assert (rollout.drift.turn, rollout.drift.position, rollout.drift.cause) == (2, 1, DriftCause.RETEMPLATED)
    [line] = read_journal(tmp_path)
    assert line["failure"] is None
    assert (line["run"], line["weights"]) == ("r1", "w")
    assert line["drift"] == rollout.drift.as_json()
    assert (line["drift"]["seen_text"], line["drift"]["prompt_text"]) == ("qAB?C", "qXB?C!")
    assert line["completion_ids"] == [ord(char) for char in "AB?C"]


def test_an_excluded_rollout_has_no_reward_and_says_why(tmp_path: Path) -> None:
    rollout = finisher(tmp_path, "exclude")(result())
    assert rollout.failure.kind is FailureKind.POLICY
    assert rollout.failure.text.startswith("excluded for drift: the prompt of model call 2")
    assert rollout.reward is None and rollout.success is None and rollout.metrics() == {}
    assert rollout.drift.cause is DriftCause.RETEMPLATED
    assert rollout.trajectories == []
    [line] = read_journal(tmp_path)
    assert line["drift"]["cause"] == "retemplated"
    assert line["reward"] is None and line["response"] is not None


def test_an_error_stops_and_the_rollout_is_in_the_journal(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"Rollout r of calculator drifted.*'error'.*model call 2.*'truncate'"):
        finisher(tmp_path, "error")(result())
    [line] = read_journal(tmp_path)
    assert line["drift"]["turn"] == 2


def test_the_cause_is_the_servers_where_it_says_one(tmp_path: Path) -> None:
    drift = {2: CallDrift(DriftCause.MESSAGE_WITHOUT_IDS, "no ids came")}
    records = records_of({"response": {"output": DRIFTED}}, drift)
    rollout = finisher(tmp_path, "truncate")(result(records=records))
    assert rollout.drift.cause is DriftCause.MESSAGE_WITHOUT_IDS
    assert "no ids came" in rollout.drift.text


@pytest.mark.parametrize("policy", ["truncate", "exclude", "error"])
def test_without_drift_every_policy_does_the_same(tmp_path: Path, policy: str) -> None:
    rollout = finisher(tmp_path, policy)(result(DRIFTED[:2]))
    assert rollout.drift is None and rollout.reward == 1.0
    assert rollout.trajectories[0].num_turns == 2


def test_an_answer_that_cannot_be_trained_on_is_the_environments_failure(tmp_path: Path) -> None:
    finish = dataclasses.replace(finisher(tmp_path, "truncate"), problem_of=component_problem)
    answer = {"reward": 1.0, "response": {"output": DRIFTED}, "reward_components": {"style": "good"}}
    rollout = finish(result(answer=answer, retried_kinds=frozenset({FailureKind.ENVIRONMENT})))
    assert rollout.failure.kind is FailureKind.ENVIRONMENT and rollout.reward is None
    assert "the answer cannot be used: a finite number is needed as reward component" in rollout.failure.text
    [line] = read_journal(tmp_path)
    assert line["retried"] and "`reward_components['style']` is 'good'" in line["failure"]["text"]
    assert finish(result(answer=answer | {"reward_components": {"style": 1.0}})).reward == 1.0


def test_a_failure_of_gyms_is_passed_on(tmp_path: Path) -> None:
    failure = RolloutFailure(kind=FailureKind.DEADLINE, text="took too long", where="calculator /run")
    rollout = finisher(tmp_path, "error")(result(answer=None, failure=failure, records=[record([], [1, 2], [3])]))
    assert rollout.failure is failure
    [line] = read_journal(tmp_path)
    assert line["failure"]["kind"] == "deadline"
    assert len(line["turns"]) == 1


def test_an_answer_none_of_whose_model_calls_was_answered_is_a_failure(tmp_path: Path) -> None:
    rollout = finisher(tmp_path, "truncate")(result([], records=[REFUSED]))
    assert rollout.failure.kind is FailureKind.POLICY and rollout.drift is None
    assert "no trainable token" in rollout.failure.text
    answer = {"reward": 0.0, "response": {"output": [], "incomplete_details": {"reason": "max_output_tokens"}}}
    rollout = finisher(tmp_path, "truncate")(result(answer=answer, records=[REFUSED]))
    assert "already cut (max_output" in rollout.failure.text


def test_an_agent_that_makes_no_model_call_is_no_policy(tmp_path: Path) -> None:
    rollout = finisher(tmp_path, "truncate")(result([]))
    assert rollout.failure.kind is FailureKind.ENVIRONMENT
    assert rollout.failure.text.endswith("no model call of this rollout has reached it")


def test_without_a_ledger_nothing_is_compared_and_nothing_trained(tmp_path: Path) -> None:
    def build(answer: Any, request: RolloutRequest, calls: Any) -> list[Any]:
        return list(calls)

    finish = dataclasses.replace(finisher(tmp_path, "truncate"), build=build, has_ledger=False)
    said = {"type": "message", "role": "assistant", "content": "hello"}
    rollout = finish(result([said], records=None))
    assert rollout.failure is None and rollout.reward == 1.0 and rollout.trajectories == []


def test_a_failure_that_only_the_finisher_sees_knows_its_rollout(tmp_path: Path) -> None:
    rollout = finisher(tmp_path, "truncate")(result([]))
    asked = request()
    assert rollout.failure.rollout_id == asked.rollout_id and rollout.failure.agent == asked.agent
    assert (rollout.failure.task_index, rollout.failure.seconds) == (asked.task_index, 0.1)


def test_the_line_of_an_attempt_that_is_tried_again_says_so(tmp_path: Path) -> None:
    finish = finisher(tmp_path, "truncate")
    finish(result([], records=[REFUSED], retried_kinds=frozenset({FailureKind.POLICY})))
    finish(result([], records=[REFUSED], retried_kinds=frozenset({FailureKind.DEADLINE})))
    finish(result(DRIFTED[:2], retried_kinds=frozenset({FailureKind.POLICY})))
    finish(result(was_lost=True))
    assert [line["retried"] for line in read_journal(tmp_path)] == [True, False, False, True]


def test_an_exception_of_the_users_method_names_it_and_the_rollout(tmp_path: Path) -> None:
    finish = finisher(tmp_path, "truncate")
    finish(result())

    def build(answer: Any, request: RolloutRequest, calls: Any) -> Any:
        return answer["steps"]

    words = r"`build_trajectories` raised KeyError for rollout r of calculator, task 4: 'steps'"
    with pytest.raises(RolloutError, match=words) as error:
        dataclasses.replace(finish, build=build)(result())
    assert isinstance(error.value.__cause__, KeyError)
    assert len(list(read_journal(tmp_path))) == 1  # what had ended is there


def test_a_rollout_whose_ledger_was_lost_is_not_trained(tmp_path: Path) -> None:
    rollout = finisher(tmp_path, "truncate")(result(records=None))
    assert rollout.failure.kind is FailureKind.INFRASTRUCTURE and "lost" in rollout.failure.text
    assert rollout.reward is None and rollout.trajectories == []


def test_an_answer_that_nobody_sampled_is_not_trained(tmp_path: Path) -> None:
    rollout = finisher(tmp_path, "truncate")(result(records=[]))
    assert rollout.failure.kind is FailureKind.ENVIRONMENT
    assert "the answer contradicts the policy server" in rollout.failure.text


def test_sampling_of_an_agents_own_is_told_once_counted_and_written_down(tmp_path: Path) -> None:
    told: list[str] = []
    finish = dataclasses.replace(
        finisher(tmp_path, "truncate"), own_sampling=OwnSampling(told.append, lambda agent: "strip")
    )
    first = record([], [1, 2], [3], own_sampling=("logit_bias", "seed"))
    refused = CallRecord(status=400, prompt="rendered", seconds=0.1, own_sampling=("seed", "stop_at"))
    failure = RolloutFailure(kind=FailureKind.DEADLINE, text="took too long", where="calculator /run")
    rollouts = [finish(result(answer=None, failure=failure, records=found)) for found in ([first], [first, refused])]
    assert ["(logit_bias, seed)" in told[0], "(stop_at)" in told[1]] == [True, True] and len(told) == 2
    assert "Model calls of calculator" in told[0] and "`gym_agent_sampling` is 'strip'" in told[0]
    metrics = rollout_metrics([facts_of(rollout, None, "train") for rollout in rollouts])
    assert metrics["rollouts/own_sampling_calls"] == metrics["gym/calculator/rollouts/own_sampling_calls"] == 3.0
    assert next(read_journal(tmp_path))["turns"][0]["own_sampling"] == ["logit_bias", "seed"]
    plain = rollout_metrics([facts_of(finish(result()), 1.0, "train")])
    assert "rollouts/own_sampling_calls" not in plain and len(told) == 2
