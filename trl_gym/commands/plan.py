"""Which rollouts are still to be done: those of the datasets, less those that a journal has already."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_gym.commands.options import CollectOptions, NamedFile
from trl_gym.dataset import gym_row, load_gym_dataset
from trl_gym.errors import ConfigError
from trl_gym.rollouts.identity import task_hash
from trl_gym.rollouts.journal import journal_files

MANIFEST = "collection.json"
Key = tuple[str, str, int]  # dataset, task hash, member: what a rollout is recognized by


@dataclass(frozen=True, slots=True)
class Task:
    """One dataset row.

    Attributes:
        dataset: Name of its file.
        index: The row's number over all files.
        hash: See `identity.task_hash`.
        row: The row.
    """

    dataset: str
    index: int
    hash: str
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One rollout to run: the `member`-th of a task."""

    task: Task
    member: int

    @property
    def key(self) -> Key:
        return self.task.dataset, self.task.hash, self.member


def load_tasks(files: Sequence[NamedFile], *, agent: str | None, limit: int | None) -> list[Task]:
    """All rows of all files, in order.

    Raises:
        DatasetError: A file has lines that are not Gym rows.
    """
    rows = [
        (file.name, gym_row(example))
        for file in files
        for example in load_gym_dataset(file.path, agent=agent, limit=limit)
    ]
    return [Task(name, index, task_hash(row), row) for index, (name, row) in enumerate(rows)]


def all_jobs(tasks: Sequence[Task], num_generations: int) -> list[Job]:
    """Every rollout, task by task."""
    return [Job(task, member) for task in tasks for member in range(num_generations)]


def key_of(record: Mapping[str, Any]) -> Key:
    """By what a journal's line is recognized. The number of a row does not count: files may be put in another order,
    cut or continued."""
    return record["dataset"], record["task_hash"], record["member"]


def done(records: Iterable[Mapping[str, Any]]) -> Counter[Key]:
    """How many rollouts of a journal have a reward, by key. Rows that are there twice have twice as many."""
    return Counter(key_of(record) for record in records if record["failure"] is None)


def missing(jobs: Sequence[Job], finished: Mapping[Key, int]) -> list[Job]:
    """The jobs that are not finished, in order."""
    left = Counter(finished)
    found = []
    for job in jobs:
        if left[job.key] > 0:
            left[job.key] -= 1
        else:
            found.append(job)
    return found


def claim(options: CollectOptions) -> None:
    """Make an output folder that of these options, or see that it is.

    Raises:
        ConfigError: Another model, or other sampling, was rolled out into it: the two would be mixed.
    """
    manifest = {
        "mode": options.mode,
        "model": options.model,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_tokens": options.max_tokens,
    }
    path = options.output_dir / MANIFEST
    if not path.exists():
        if journal_files(options.journal_dir):
            raise ConfigError(
                f"{options.output_dir} holds the journal of something else (a training run?); choose another "
                "--output_dir."
            )
        options.output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest, indent=2) + "\n")
        return
    before = _read(path)
    changed = [f"{name} {before.get(name)!r} → {now!r}" for name, now in manifest.items() if before.get(name) != now]
    if changed:
        raise ConfigError(
            f"{options.output_dir} holds rollouts with other options ({', '.join(changed)}); choose another "
            "--output_dir, or remove it."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); choose another --output_dir, or remove it.") from error
