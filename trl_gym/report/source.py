"""Find what a run's folder holds: its journal, metrics, a tokenizer, log-probabilities of the trainer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trl_gym.errors import ConfigError
from trl_gym.rollouts.journal import TOKENIZER, TRAINING_LOGPROBS, as_of_today, journal_files, read_objects

TOKENIZER_FILE = "tokenizer.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class _LogprobsShape(msgspec.Struct):
    rollout_id: str
    logprobs: list[float | None]
    schema: int = 1
    step: int | None = None
    advantage: float | None = None
    further_rows: list[list[float | None]] = []


@dataclass(frozen=True, slots=True)
class Trained:
    """What the trainer has recorded of a rollout."""

    rollout_id: str  # its name
    step: int | None  # the step that trained it; None in lines of earlier versions
    advantage: float | None  # what it was trained with; None in lines of earlier versions
    # Of each row `[T]`, in nats, `T` as in the journal line's `completion_ids` or `further_rows`, or empty; what
    # stands where the environment's tokens are is not looked at, and None stands where they were not finite.
    logprobs: list[list[float | None]]


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run that has something to show."""

    name: str  # name of its folder
    folder: Path  # the run's folder
    journal: Path  # folder of its rollouts
    metrics: Path | None  # `metrics.jsonl`; None when there is none (`trl-gym rollout` writes none)
    tokenizer: Path | None  # a `tokenizer.json`; None when none was found


def open_run(path: str | Path, tokenizer: str | Path | None = None) -> RecordedRun:
    """Find what there is to show.

    Args:
        path: A run's output folder, or the folder of its journal.
        tokenizer: A `tokenizer.json`, or the folder of one; None takes the run's own: of its newest checkpoint, else
            the one that was saved when it began.

    Raises:
        ConfigError: The folder does not exist, has no journal, or no tokenizer is where one was named.
    """
    given = _folder(path)
    journal = given / "rollouts" if journal_files(given / "rollouts") else given
    if not journal_files(journal):
        raise ConfigError(
            f"{str(given)!r} has no journal: it has no `rollouts/step-*.jsonl`. A run writes the first one when its "
            "first rollout ends.",
            "Wait for that if the run goes on, else name the `output_dir` of another run.",
        )
    folder = given.resolve().parent if given.name == "rollouts" and journal == given else given
    metrics = folder / "metrics.jsonl"
    return RecordedRun(
        name=folder.resolve().name,
        folder=folder,
        journal=journal,
        metrics=metrics if metrics.is_file() else None,
        tokenizer=_named_tokenizer(Path(tokenizer).expanduser()) if tokenizer is not None else _own_tokenizer(folder),
    )


def changes(path: str | Path) -> tuple[Any, ...] | None:
    """Return what tells whether a run has gone on: names, sizes and times of its files. None before its first rollout.
    Raises `ConfigError`: the folder does not exist."""
    folder = _folder(path)
    files = [*journal_files(folder / "rollouts"), *journal_files(folder), folder / "metrics.jsonl"]
    found = {file: file.stat() for file in files if file.is_file()}
    if not any(one.st_size for file, one in found.items() if file.name != "metrics.jsonl"):
        return None
    return tuple((file.name, one.st_size, one.st_mtime_ns) for file, one in found.items())


def read_metrics(run: RecordedRun) -> list[dict[str, Any]]:
    """Return the objects of `metrics.jsonl`, one per logged step, with None for numbers that are not finite.

    Its last line is rewritten in place while the run goes on, and a full disk tears lines; these are left out.
    """
    return [] if run.metrics is None else list(read_objects(run.metrics))


def read_trained(run: RecordedRun) -> Iterator[Trained]:
    """Yield what was trained, where a run has recorded it (see `rollouts.logprobs`).

    It is in the file of the step that trained the rollout, which need not be the one that it was sampled for. Of one
    that was trained again after a resume, the last step's comes last.
    """
    for path in sorted((run.folder / TRAINING_LOGPROBS).glob("*.jsonl"), key=_numbers_in):
        for record in map(as_of_today, read_objects(path, _LogprobsShape)):
            rows = [record["logprobs"], *record.get("further_rows", [])]
            yield Trained(record["rollout_id"], record.get("step"), record.get("advantage"), rows)


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"The folder {str(folder)!r} of a run does not exist.",
            "Name the `output_dir` of a training, or of `trl-gym rollout`; it has a folder `rollouts`.",
        )
    return folder


def _numbers_in(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name


def _named_tokenizer(path: Path) -> Path:
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"`--tokenizer` is {str(path)!r}, and no {TOKENIZER_FILE} is there.",
            "Name the folder of a model or checkpoint that has one, or leave the option out to see token ids.",
        )
    return file


def _own_tokenizer(folder: Path) -> Path | None:
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    checkpoints = sorted(((int(match[1]), path) for match, path in matches if match is not None), reverse=True)
    candidates = [*(path for _, path in checkpoints), folder, folder / TOKENIZER]
    return next((path / TOKENIZER_FILE for path in candidates if (path / TOKENIZER_FILE).is_file()), None)
