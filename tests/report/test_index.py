"""Which lines of a journal count, what is sampled, and the numbers per step."""

from __future__ import annotations

import dataclasses
import statistics
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trl_gym.commands.summary import evaluate, outcomes
from trl_gym.report.index import advantages, causes, ordered, previews, sample, states, step_stats
from trl_gym.report.rows import Row, row_of
from trl_gym.rollouts.journal import LineState

RECORD: dict[str, Any] = {
    "step": 3,
    "mode": "train",
    "task_index": 5,
    "task_hash": "aa",
    "group": 1,
    "member": 0,
    "attempt": 0,
    "rollout_id": "r",
    "agent": "calculator",
    "weight_versions": ["3"],
    "reward": 1.0,
    "failure": None,
    "drift": None,
    "finish_reason": "stop",
    "prompt_ids": [1, 2],
    "completion_ids": [3, 4, 5],
    "env_mask": [1, 0, 1],
    "turns": [{"kind": "model"}],
    "seconds": 2.0,
    "verify": {"success": 0.5},
    "retried": False,
    "run": "a",
    "weights": "w",
    "time": 10.0,
    "response": {"output": []},
    "row": {"responses_create_params": {"input": [{"role": "user", "content": "What\n is  it?"}]}},
}
FAILURE = {"kind": "deadline", "text": "too slow", "where": "calculator /run"}
BASE = row_of(RECORD)


def row(**changes: Any) -> Row:
    return dataclasses.replace(BASE, **changes)


def failed(**changes: Any) -> Row:
    return row(reward=None, success=None, failure="deadline", cause="too slow", where="/run", **changes)


def test_a_row_is_what_the_line_says() -> None:
    assert (BASE.reward, BASE.success, BASE.version, BASE.text) == (1.0, 0.5, "3", "What is it?")
    assert (BASE.prompt_tokens, BASE.environment_tokens, BASE.sampled_tokens, BASE.turns) == (2, 1, 2, 1)


def test_a_line_of_an_earlier_version_is_read_with_what_it_has() -> None:
    names = ("step", "mode", "task_index", "group", "rollout_id", "agent", "reward", "row")
    old = row_of({name: RECORD[name] for name in names} | {"rollout_id": "5a17c0de-train0-b0-g1-m3-a0"})
    assert (old.task, old.member, old.success, old.failure, old.seconds) == ("5", 3, 1.0, None, None)


def test_what_is_not_recorded_is_not_0() -> None:
    unknown = {"completion_ids": [], "turns": [], "response": None, "finish_reason": None}
    none = row_of(RECORD | unknown)
    assert (none.turns, none.tool_calls, none.tool_errors, none.prompt_tokens, none.sampled_tokens) == (None,) * 5
    said = {"output": [{"type": "message", "role": "assistant", "content": "4"}]}
    elsewhere = row_of(RECORD | unknown | {"response": said, "finish_reason": "stop"})  # another's server: no tokens
    assert (elsewhere.turns, elsewhere.tool_calls, elsewhere.sampled_tokens) == (1, 0, None)
    assert [(s.drifted, s.truncated) for s in step_stats([none], states([none]))] == [(None, None)]
    assert [(s.drifted, s.truncated) for s in step_stats([elsewhere], states([elsewhere]))] == [(None, 0)]
    assert [(s.drifted, s.truncated) for s in step_stats([BASE], states([BASE]))] == [(0, 0)]


def test_a_truncated_rollout_is_one_that_gym_cut_and_not_one_that_failed() -> None:
    assert row(finish="max_output_tokens").is_truncated
    assert not row(finish="stop").is_truncated
    assert not failed(finish="max_output_tokens").is_truncated


def test_attempts_that_were_tried_again_or_given_up_do_not_count() -> None:
    rows = [
        failed(is_retried=True),
        row(attempt=1),
        failed(member=1),
        dataclasses.replace(failed(member=2), failure="cancelled"),
        row(member=3, is_retried=True),
    ]
    expected = [LineState.RETRIED, LineState.COUNTED, LineState.COUNTED, LineState.CANCELLED, LineState.LOST]
    assert states(rows) == expected


def test_a_step_that_was_sampled_again_by_other_weights_counts_once() -> None:
    rows = [
        row(time=1.0, sampler=("a", "old")),
        row(time=2.0, sampler=("a", "new")),
        row(time=1.0, sampler=("a", "old"), begun=2),
    ]
    assert states(rows) == [LineState.SUPERSEDED, LineState.COUNTED, LineState.COUNTED]


def test_a_later_reward_replaces_a_failure_and_never_the_other_way_round() -> None:
    assert states([failed(), row()]) == [LineState.SUPERSEDED, LineState.COUNTED]
    assert states([row(), failed()]) == [LineState.COUNTED, LineState.SUPERSEDED]


def test_two_rewards_for_one_task_are_two_rollouts_in_training_and_one_repeated_in_evaluation() -> None:
    assert states([row(), row()]) == [LineState.COUNTED, LineState.COUNTED]
    assert states([row(mode="eval"), row(mode="eval")]) == [LineState.SUPERSEDED, LineState.COUNTED]


def test_a_group_is_one_of_its_batch_whichever_weights_its_members_began_with() -> None:
    """Several batches begin with the same weights; after a lost server, members of one group begin with newer ones."""
    rows = [
        row(batch=7, member=0),
        row(batch=8, member=0),
        failed(batch=8, member=1, is_retried=True),
        row(batch=8, member=1, attempt=1, begun=4, sampler=("a", "newer")),
        row(batch=8, member=0, begun=5, sampler=("a", "resumed"), reward=0.5),
        row(batch=8, member=0, sampler=("another run", "w"), time=9.0, begun=9),
    ]
    keys = [one.group_key for one in rows]
    assert keys[1] == keys[2] == keys[3] == keys[4] and len(set(keys)) == 3
    counted = LineState.COUNTED
    assert states(rows) == [counted, LineState.SUPERSEDED, LineState.RETRIED, counted, counted, counted]
    assert [row_of(RECORD | {"batch": 7, "mode": mode}).batch for mode in ("train", "eval")] == [7, None]
    mixed = [*rows, row(batch=None), row(mode="eval")]  # a run that an earlier version began
    assert sorted(ordered(mixed)) == list(range(len(mixed)))


def test_a_rollout_that_was_ended_early_is_no_failure() -> None:
    ended = dataclasses.replace(failed(batch=7, member=1), failure="cancelled")
    rows = [row(batch=7), ended]
    assert causes(rows, states(rows)) == []
    [stats] = step_stats(rows, states(rows))
    assert (stats.rollouts, stats.failures, stats.others) == (1, {}, {"cancelled": 1})


def test_numbers_of_a_step_are_over_its_counted_rollouts() -> None:
    rewards = [0.0, 0.25, 1.0]
    rows = [row(member=m, reward=r, success=float(r == 1), seconds=1.0 + m) for m, r in enumerate(rewards)]
    rows += [
        failed(member=3),
        failed(member=4, is_retried=True),
        row(member=5, drift="retemplated", finish="max_output_tokens"),
    ]
    (stats,) = step_stats(rows, states(rows))
    rewards.append(1.0)
    assert (stats.rollouts, stats.failures, stats.others) == (5, {"deadline": 1}, {"retried": 1})
    assert (stats.reward, stats.reward_std) == (statistics.fmean(rewards), statistics.stdev(rewards))
    assert (stats.drifted, stats.truncated, stats.agent) == (1, 1, None)
    assert (stats.seconds_p50, stats.seconds_p95) == (2.0, 2.85)


def test_several_environments_are_counted_together_and_apart() -> None:
    rows = [row(), row(agent="library", reward=0.0)]
    assert [(s.agent, s.reward) for s in step_stats(rows, states(rows))] == [
        (None, 0.5),
        ("calculator", 1.0),
        ("library", 0.0),
    ]


def test_a_step_without_any_reward_has_no_mean() -> None:
    (stats,) = step_stats([failed()], [LineState.COUNTED])
    assert (stats.reward, stats.reward_std, stats.success, stats.seconds_p50) == (None, None, None, None)


def test_causes_are_counted_with_attempts_that_were_tried_again() -> None:
    rows = [failed(is_retried=True), failed(attempt=1), row(member=1)]
    (cause,) = causes(rows, states(rows))
    assert (cause.kind, cause.count, cause.counted, cause.text) == ("deadline", 2, 1, "too slow")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=60), st.integers(1, 20))
def test_a_sample_is_whole_groups_in_order_and_always_the_same(places: list[tuple[int, int, int]], limit: int) -> None:
    rows = [row(step=step, group=group, member=member) for step, group, member in places]
    order = ordered(rows)
    assert sorted(order) == list(range(len(rows)))
    chosen = sample(rows, order, limit)
    assert len(chosen) <= limit or len(chosen) == len(rows) <= limit
    assert chosen == [index for index in order if index in set(chosen)] == sample(rows, order, limit)
    whole = {rows[index].group_key for index in chosen}
    left_out = {rows[index].group_key for index in set(order) - set(chosen)}
    assert len(whole & left_out) <= 1 and (not whole & left_out or len(whole) == 1)
    assert bool(chosen) == bool(rows)


@given(st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.floats(-9, 9))), max_size=30))
def test_advantages_are_those_that_trl_computes_from_the_groups_rewards(
    members: list[tuple[int, float | None]],
) -> None:
    rows = [
        failed(group=group, member=m) if reward is None else row(group=group, member=m, reward=reward)
        for m, (group, reward) in enumerate(members)
    ]
    found = advantages(rows, states(rows))
    for group in range(3):
        own = [(one.reward, found[at]) for at, one in enumerate(rows) if one.group == group]
        rewards = [reward for reward, _ in own if reward is not None]
        assert all((reward is None) == (advantage is None) for reward, advantage in own)
        for reward, advantage in own:
            if reward is not None and advantage is not None:
                spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
                assert abs(advantage * (spread + 1e-4) - (reward - statistics.fmean(rewards))) < 1e-9
    assert advantages([row(mode="eval")], [LineState.COUNTED]) == [None]


def test_attempts_are_estimated_as_by_the_evaluation_command() -> None:
    """With rows in another order when the command was given again, and a failed rollout, which is no attempt."""
    answers = [(0, 0, 1.0), (0, 1, 0.0), (0, 2, None), (1, 0, 1.0), (1, 1, 1.0), (2, 2, 0.0)]
    given_record = {"mode": "eval", "step": 0, "dataset": "easy", "run": "", "weights": "", "verify": {}}
    records = [
        RECORD
        | given_record
        | {"group": task + 5 * member, "task_hash": f"t{task}", "member": member, "reward": reward}
        | {"failure": FAILURE if reward is None else None}
        for task, member, reward in answers
    ]
    rows = [row_of(record) for record in records]
    [stats] = step_stats(rows, states(rows))
    jobs = [SimpleNamespace(key=("easy", f"t{task}", member)) for task, member, _ in answers]
    expected = evaluate(["easy"], outcomes(records, jobs), 3)["easy"]
    assert stats.attempts == {name: value for name, value in expected.items() if "@" in name}
    assert set(stats.attempts) == {"pass@1", "pass@1/tasks", "pass@2", "pass@2/tasks", "mean@3"}
    assert step_stats([row(member=1)], [LineState.COUNTED])[0].attempts == {}  # of training there are none


def test_a_task_that_a_dataset_has_twice_is_two_in_the_evaluation_of_a_training() -> None:
    rows = [row(mode="eval", group=group, member=member, success=1.0 - group) for group in (0, 1) for member in (0, 1)]
    [stats] = step_stats(rows, [LineState.COUNTED] * 4)
    assert (stats.attempts["pass@1/tasks"], stats.attempts["pass@2"]) == (2, 0.5)


@given(st.lists(st.text(alphabet="ab ", max_size=30), min_size=1, max_size=5), st.text(alphabet="xy ", max_size=40))
def test_lists_show_where_the_tasks_of_an_environment_differ(ends: list[str], start: str) -> None:
    texts = [" ".join(f"{start} {end}".split()) for end in ends]
    shown = previews([row(text=text) for text in texts])
    for text in texts:
        preview = shown["calculator", text]
        assert preview == text[:160] or text.endswith(preview.removeprefix("…"))
        assert preview or not text
    assert len({shown["calculator", text] for text in texts}) == len(set(texts))  # as different as they were


def test_a_beginning_that_all_tasks_share_is_left_out_up_to_a_word() -> None:
    alike = "You are given the following problem. Solve it: what is " + "x " * 100
    shown = previews([row(text=f"{alike}1 + 1?"), row(text=f"{alike}10 + 2?"), row(agent="b", text=alike)])
    assert sorted(shown.values()) == [alike[:160], "…1 + 1?", "…10 + 2?"]


def test_without_a_limit_everything_is_shown() -> None:
    rows = [row(member=m) for m in range(9)]
    assert sample(rows, ordered(rows), None) == ordered(rows) == list(range(9))
