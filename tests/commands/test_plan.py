from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands.test_rollout_flags import options
from trl_gym.commands.collect import Task, all_jobs, claim, collect, done, load_tasks, missing
from trl_gym.commands.rollout_flags import NamedFile
from trl_gym.errors import ConfigError
from trl_gym.folder_owner import LOCK, FolderOwner
from trl_gym.rollout_options import RolloutOptions, Sampling

tasks = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), max_size=6).map(
    lambda rows: [Task(dataset, index, task, {}) for index, (dataset, task) in enumerate(rows)]
)


def record(key: tuple[str, str, int], failed: bool = False) -> dict[str, Any]:
    dataset, task, member = key
    failure = {"kind": "deadline"} if failed else None
    return {"dataset": dataset, "task_hash": task, "member": member, "failure": failure}


def test_rows_are_recognized_by_what_they_ask_not_by_where_they_stand(tmp_path: Path) -> None:
    rows = [{"responses_create_params": {"input": f"{number}?"}, "answer": number} for number in range(3)]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    one = load_tasks([NamedFile("set", first)], agent="a", limit=None)
    other = load_tasks([NamedFile("set", second)], agent=None, limit=None)
    assert [task.index for task in one] == [0, 1, 2]
    assert [task.hash for task in one] == [task.hash for task in reversed(other)]
    assert len({task.hash for task in one}) == 3
    both = load_tasks([NamedFile("one", first), NamedFile("two", second)], agent=None, limit=2)
    assert [(task.dataset, task.index) for task in both] == [("one", 0), ("one", 1), ("two", 2), ("two", 3)]


@given(tasks=tasks, num_generations=st.integers(1, 3), data=st.data())
def test_what_is_done_is_not_done_again_and_everything_else_is(
    tasks: list[Task], num_generations: int, data: st.DataObject
) -> None:
    jobs = all_jobs(tasks, num_generations)
    assert len(jobs) == len(tasks) * num_generations
    is_done = data.draw(st.lists(st.booleans(), min_size=len(jobs), max_size=len(jobs)))
    records = [record(job.key, failed=not good) for job, good in zip(jobs, is_done, strict=True)]
    left = missing(jobs, done(records))
    assert Counter(job.key for job in left) == Counter(
        job.key for job, good in zip(jobs, is_done, strict=True) if not good
    )
    assert missing(left, Counter()) == left
    assert missing(jobs, done([record(job.key) for job in jobs])) == []


def test_a_folder_is_of_one_model_and_sampling(tmp_path: Path) -> None:
    claim(options(tmp_path))
    claim(
        options(tmp_path, num_generations=8, base_url="http://moved:9/v1", rollouts=RolloutOptions(deadline=5))
    )  # more of the same
    with pytest.raises(ConfigError, match=r"model 'policy' → 'other', temperature 1.0 → 0.5.*--output-dir"):
        claim(options(tmp_path, model="other", rollouts=RolloutOptions(sampling=Sampling(temperature=0.5))))
    with pytest.raises(ConfigError, match="mode 'rollout' → 'eval'"):
        claim(options(tmp_path, mode="eval"))
    (tmp_path / "out" / "collection.json").unlink()
    (tmp_path / "out" / "rollouts").mkdir()
    claim(options(tmp_path))
    (tmp_path / "out" / "collection.json").unlink()
    (tmp_path / "out" / "rollouts" / "step-3.rank-0.jsonl").touch()
    with pytest.raises(ConfigError, match="perhaps of a training run"):
        claim(options(tmp_path))
    (tmp_path / "out" / "collection.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        claim(options(tmp_path))


def test_two_collections_do_not_share_a_folder(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"responses_create_params": {"input": "?"}}\n')
    asked = options(tmp_path, datasets=[NamedFile("set", rows)], agent="a")
    with FolderOwner(asked.output_dir, option="--output-dir", what="`trl-gym eval`"):
        with pytest.raises(ConfigError, match=r"`--output-dir` .* is in use: `trl-gym eval` \(process [0-9]+ on host"):
            collect(asked, say=print, progress=print)
        assert [path.name for path in asked.output_dir.iterdir()] == [LOCK], "nothing was begun"
