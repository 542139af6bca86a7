"""A failure as the journal has it."""

from __future__ import annotations

import json

from trl_gym.errors import FailureKind, RolloutFailure


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
