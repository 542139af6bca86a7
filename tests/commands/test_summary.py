from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from trl_gym.commands.collect import Job, Task
from trl_gym.commands.summary import Outcome, as_json, evaluate, outcomes, show_summary, summarize, table

TASK = Task("easy", 0, "t0", {})


def record(member: int = 0, reward: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    fields = {
        "dataset": "easy",
        "task_hash": "t0",
        "member": member,
        "agent": "calculator",
        "failure": None if reward is not None else {"kind": "deadline"},
        "reward": reward,
        "verify": {},
        "turns": [{"kind": "model"}, {"kind": "tool"}, {"kind": "model"}],
        "response": {"output": []},
        "seconds": 1.0 + member,
    }
    return fields | changes


def jobs(num: int, task: Task = TASK) -> list[Job]:
    return [Job(task, member) for member in range(num)]


def outcome(dataset: str = "easy", task: str = "t0", success: float | None = 1.0, agent: str = "a") -> Outcome:
    return Outcome(
        dataset=dataset,
        task=task,
        agent=agent,
        failure=None if success is not None else "deadline",
        reward=success,
        success=success,
        turns=2,
        seconds=1.0,
    )


def test_a_rollout_counts_once_as_it_ended_last() -> None:
    records = [
        record(0, reward=None),  # run again below
        record(0, reward=0.5),
        record(1, reward=None, retried=True),
        record(1, reward=None),  # never got better
        record(1, reward=None, failure={"kind": "environment"}),
        record(2, reward=1.0),
        record(7, reward=1.0),  # not asked for
        record(2, reward=0.0),  # done twice by mistake
        record(3, reward=1.0, retried=True),  # as the policy server was lost; not run again
    ]
    ended = outcomes(records, jobs(4))
    assert [(one.reward, one.failure) for one in ended] == [(0.5, None), (None, "environment"), (0.0, None)]


def test_a_row_that_is_there_twice_counts_twice() -> None:
    twice = [*jobs(1), *jobs(1, Task("easy", 1, "t0", {}))]
    assert len(outcomes([record(0), record(0, reward=0.0), record(0)], twice)) == 2
    assert [one.failure for one in outcomes([record(0), record(0, reward=None)], twice)] == [None, "deadline"]


def test_numbers_per_environment() -> None:
    records = [record(member, reward=float(member), reward_components={"x": member}) for member in range(4)]
    records.append(record(4, reward=None))
    records.append(record(5, agent="other", verify={"success": True}, reward=0.0))
    summaries = summarize(outcomes(records, jobs(6)))
    one = summaries["calculator"]
    assert (one.rollouts, one.failed) == (5, {"deadline": 1})
    assert one.reward_mean == 1.5
    assert one.reward_std == pytest.approx(1.2909944)
    assert one.reward_components == {"x": 1.5}
    assert one.success == 0.75  # a reward of 1 and above
    assert one.turns == 2.0
    assert (one.seconds_p50, one.seconds_p95) == (2.5, pytest.approx(3.85))
    assert summaries["other"].success == 1.0
    assert as_json(summaries)["other"]["failed"] == {}


def test_model_calls_are_counted_without_token_ids() -> None:
    output = [{"type": kind} for kind in ("reasoning", "function_call", "function_call_output", "message")]
    [ended] = outcomes([record(turns=[], response={"output": output})], jobs(1))
    assert ended.turns == 2


def test_an_environment_of_failures_has_no_numbers() -> None:
    text = io.StringIO()
    show_summary(summarize(outcomes([record(reward=None)], jobs(1))), Console(file=text))
    assert text.getvalue() == (
        "calculator: rollouts 1, failed 1 deadline, reward –, success –, turns –, seconds p50 / p95 – / –\n"
    )


def test_a_table_in_a_terminal_and_lines_in_a_pipe() -> None:
    summaries = summarize(outcomes([record(0), record(1, reward=0.0)], jobs(2)))
    piped, terminal = io.StringIO(), io.StringIO()
    show_summary(summaries, Console(file=piped))
    show_summary(summaries, Console(file=terminal, force_terminal=True, width=120))
    assert "reward 0.500 ± 0.707, success 0.500, turns 2.0, seconds p50 / p95 1.50 / 1.95" in piped.getvalue()
    assert "┃" in terminal.getvalue() and "0.500 ± 0.707" in terminal.getvalue()


def test_evaluation_per_set() -> None:
    ended = [outcome(task="t0", success=value) for value in (1.0, 0.0)]
    ended += [outcome(task="t1", success=value) for value in (0.0, 0.0)]
    ended += [outcome("hard", "t9", success=1.0), outcome("hard", "t9", success=None)]
    results = evaluate(["easy", "hard"], ended, num_generations=2)
    easy, hard = results["easy"], results["hard"]
    assert (easy["mean@2"], easy["pass@1"], easy["pass@2"], easy["pass@2/tasks"]) == (0.25, 0.25, 0.5, 2.0)
    assert (hard["mean@2"], hard["pass@1"], hard["failed"]) == (1.0, 1.0, {"deadline": 1})
    assert "pass@2" not in hard  # a failed rollout is no attempt
    header, rows = table(results)
    assert header == ["set", "rollouts", "failed", "reward", "pass@1", "pass@2", "mean@2"]
    assert rows == [
        ["easy", "4", "0", "0.250", "0.250", "0.500", "0.250"],
        ["hard", "2", "1 deadline", "1.000", "1.000", "–", "1.000"],
    ]


def test_a_set_of_several_environments_has_a_row_for_each() -> None:
    results = evaluate(["mix"], [outcome("mix", "t0", 1.0, "a"), outcome("mix", "t1", 0.0, "b")], 1)
    assert [row[0] for row in table(results)[1]] == ["mix", "mix · a", "mix · b"]
    assert results["mix"]["mean@1"] == 0.5
    assert results["mix"]["environments"]["a"]["mean@1"] == 1.0
