"""Errors keep what is wrong and what to do apart; a failure is as the journal has it."""

from __future__ import annotations

import json
import pickle

import pytest

from trl_gym.errors import (
    ConfigError,
    FailureKind,
    Problem,
    RolloutError,
    RolloutFailure,
    TrlGymError,
    error_body_text,
    naming,
)


def test_an_error_keeps_problem_and_remedy_apart_and_says_both() -> None:
    error = ConfigError("`gym_mode` is 'x'.", "Set it to 'host'.")
    assert (error.problem, error.remedy) == ("`gym_mode` is 'x'.", "Set it to 'host'.")
    assert str(error) == "`gym_mode` is 'x'. Set it to 'host'."


def test_an_error_of_several_problems_lists_each_with_its_remedy() -> None:
    error = ConfigError("2 problems:", problems=[Problem("A is odd.", "Set `a`."), Problem("B is odd.")])
    assert str(error) == "2 problems:\n  - A is odd. Set `a`.\n  - B is odd."


def test_an_error_travels_between_processes_whole() -> None:
    error = ConfigError("p", "r", [Problem("a", "b")])
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, TrlGymError)
    assert (copy.problem, copy.remedy, copy.problems, str(copy)) == ("p", "r", (Problem("a", "b"),), str(error))


def test_a_failure_keeps_its_cause_and_learns_whose_it_is() -> None:
    failure = RolloutFailure(kind=FailureKind.DEADLINE, text="no answer within 3 s", where="calc /run")
    written = failure.of(agent="calc", task_index=4, rollout_id="x-a1", attempt=1, seconds=3.00004).as_json()
    assert json.loads(json.dumps(written)) == {
        "kind": "deadline",
        "text": "no answer within 3 s",
        "where": "calc /run",
        "agent": "calc",
        "task_index": 4,
        "rollout_id": "x-a1",
        "attempt": 1,
        "seconds": 3.0,
    }


def test_an_exception_of_a_users_method_is_named() -> None:
    words = r"`compute_rewards` raised KeyError for 4 rollouts: 'score'\."
    with pytest.raises(RolloutError, match=words) as error, naming("compute_rewards", "4 rollouts"):
        {}["score"]
    assert isinstance(error.value.__cause__, KeyError)
    for meant in (ConfigError("so"), ZeroDivisionError("so")):
        with pytest.raises(type(meant)), naming("choose_task", "a group", unless=ZeroDivisionError):
            raise meant


def test_an_error_body_nested_too_deep_is_text() -> None:
    body = b'{"detail": ' + b"[" * 100_000
    assert error_body_text(body) == body.decode()
