"""Which lines of a journal count: one rule, and everyone who reads a journal goes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rollouts.recorded import POLICY, grouped, request, rollout
from trl_gym.commands.collect import Job, Task, done, missing
from trl_gym.commands.summary import outcomes
from trl_gym.errors import ConfigError, FailureKind, RolloutFailure
from trl_gym.report.index import states
from trl_gym.report.rows import row_of
from trl_gym.rollouts.journal import Attempt, Journal, LineState, line_states, read_journal
from trl_gym.rollouts.reuse import Recall
from trl_gym.rollouts.rollout import journal_record
from trl_gym.rollouts.source import BatchInfo, JournalSource

Tried = tuple[float | str, bool]  # reward, or kind of failure; whether the line says that another attempt follows

CASES: list[tuple[list[Tried], float | str | None]] = [
    ([(0.5, False)], 0.5),
    ([("deadline", False)], "deadline"),
    ([("infrastructure", True), (0.5, False)], 0.5),
    ([("infrastructure", True)], None),
    ([(0.5, True)], None),  # rewarded just as the policy server was lost, and never run again
    ([(0.5, True), (0.25, False)], 0.25),
    ([(0.25, False), (0.5, True)], 0.25),
    ([("cancelled", False)], None),
    ([("cancelled", False), (0.5, False)], 0.5),
    ([("deadline", False), (0.5, False)], 0.5),
    ([(0.5, False), ("deadline", False)], 0.5),
    ([(0.5, False), (0.25, False)], 0.25),
    ([("deadline", False), ("environment", False)], "environment"),
    ([("deadline", False), ("environment", False), ("infrastructure", True), ("cancelled", False)], "environment"),
]


def write(folder: Path, tried: list[Tried], mode: str = "train") -> list[dict[str, Any]]:
    """Write the attempts at a rollout of task 0, after a rollout of task 1 that ended well."""
    journal = Journal(folder)
    for task, ended, is_retried in [(1, 1.0, False), *((0, *one) for one in tried)]:
        failure = None
        if isinstance(ended, str):
            failure = RolloutFailure(kind=FailureKind(ended), text="broken", where="calculator /run")
        one = rollout(request(task), reward=0.0 if isinstance(ended, str) else ended, failure=failure)
        line = journal_record(one, mode=mode, weight_version=str(POLICY.version))
        journal.append({**line, **POLICY.tags(), "dataset": "easy", "retried": is_retried})
    journal.close()
    return list(read_journal(folder))


def in_summary(folder: Path, tried: list[Tried]) -> float | str | None:
    records = write(folder, tried, mode="rollout")
    job = Job(Task("easy", 0, records[-1]["task_hash"], {}), 0)
    ended = [one.failure or one.reward for one in outcomes(records, [job])]
    is_done = bool(missing([job], done(records)) == [])
    assert is_done == (len(ended) == 1 and not isinstance(ended[0], str)), "run again unless it has a reward"
    return ended[0] if ended else None


def in_viewer(folder: Path, tried: list[Tried]) -> float | str | None:
    rows = [row_of(record) for record in write(folder, tried, mode="rollout")]
    counted = [row for row, state in zip(rows, states(rows), strict=True) if state is LineState.COUNTED]
    assert len(counted) <= 2 and counted[0].reward == 1.0
    return (counted[1].failure or counted[1].reward) if len(counted) == 2 else None


def in_replay(folder: Path, tried: list[Tried]) -> float | str | None:
    write(folder, tried)
    try:
        info = BatchInfo(run="r", step=1, mode="train")
        [group] = JournalSource(folder).collect(grouped([request(0)]), 1, info).groups
        [replayed] = group.rollouts
    except ConfigError as error:
        assert "no rollout of the task" in str(error)
        return None
    return replayed.reward if replayed.failure is None else str(replayed.failure.kind)


def in_recall(folder: Path, tried: list[Tried]) -> float | str | None:
    write(folder, tried)
    recalled = Recall(folder).take_all([request(0)], POLICY, newest=POLICY.version)
    return recalled[0].reward if recalled else None


@pytest.mark.parametrize("found_by", [in_summary, in_viewer, in_replay, in_recall])
@pytest.mark.parametrize(("tried", "expected"), CASES)
def test_everyone_goes_by_the_same_rule(
    tmp_path: Path, found_by: Callable[..., Any], tried: list[Tried], expected: float | str | None
) -> None:
    if found_by is in_recall and isinstance(expected, str):
        expected = None  # what failed is collected again
    assert found_by(tmp_path, tried) == expected


attempts = st.builds(
    Attempt,
    rollout=st.sampled_from("ab"),
    failure=st.sampled_from([None, None, "deadline", "cancelled"]),
    is_retried=st.booleans(),
)


@given(attempts=st.lists(attempts, max_size=12), limit=st.none() | st.integers(0, 3))
def test_rewards_count_before_failures_and_later_lines_before_earlier_ones(
    attempts: list[Attempt], limit: int | None
) -> None:
    found = line_states(attempts, lambda rollout: limit)
    for name in "ab":
        own = [(one, state) for one, state in zip(attempts, found, strict=True) if one.rollout == name]
        ended = [one for one, _ in own if one.state is LineState.COUNTED]
        rewards = [one for one in ended if one.has_reward]
        counted = [one for one, state in own if state is LineState.COUNTED]
        assert all(state is one.state for one, state in own if one not in ended)
        if limit is None:
            assert sum(map(id, counted)) == sum(map(id, rewards or ended[-1:]))
        else:
            failures = [one for one in ended if not one.has_reward]
            kept = (failures + rewards)[max(len(ended) - limit, 0) :]
            assert sum(map(id, counted)) == sum(map(id, kept))


def test_a_line_of_an_earlier_version_says_less() -> None:
    assert Attempt.of({"failure": None}).has_reward
    assert Attempt.of({"failure": {"kind": "deadline"}, "retried": False}).state is LineState.COUNTED
