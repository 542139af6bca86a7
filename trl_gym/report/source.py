"""What a run's folder holds: its journal, its metrics, a tokenizer, log-probabilities of the trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_gym.errors import ConfigError
from trl_gym.rollouts.journal import journal_files

TOKENIZER_FILE = "tokenizer.json"
TRAINING_LOGPROBS = "training_logprobs"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has something to show.

    Attributes:
        name: Of its folder.
        folder: Of the run.
        journal: Folder of its rollouts.
        metrics: `metrics.jsonl`; None when there is none (`trl-gym rollout` writes none).
        tokenizer: A `tokenizer.json`; None when none was found.
    """

    name: str
    folder: Path
    journal: Path
    metrics: Path | None
    tokenizer: Path | None


def open_run(path: str | Path, tokenizer: str | Path | None = None) -> Run:
    """Find what there is to show.

    Args:
        path: A run's output folder, or the folder of its journal.
        tokenizer: A `tokenizer.json`, or the folder of one; None takes the run's own, of its newest checkpoint.

    Raises:
        ConfigError: There is no such folder, no journal in it, or no tokenizer where one was named.
    """
    given = Path(path)
    if not given.is_dir():
        raise ConfigError(
            f"There is no run {str(given)!r}: RUN is the `output_dir` of a training, or of `trl-gym rollout`; it has "
            "a folder `rollouts`."
        )
    journal = given / "rollouts" if journal_files(given / "rollouts") else given
    if not journal_files(journal):
        raise ConfigError(
            f"{str(given)!r} has no journal: no `rollouts/step-*.jsonl` in it. A run writes the first one when its "
            "first rollout ends; if it runs, wait for that, else name the `output_dir` of another run."
        )
    folder = given.resolve().parent if given.name == "rollouts" and journal == given else given
    metrics = folder / "metrics.jsonl"
    return Run(
        name=folder.resolve().name,
        folder=folder,
        journal=journal,
        metrics=metrics if metrics.is_file() else None,
        tokenizer=_named_tokenizer(Path(tokenizer)) if tokenizer is not None else _own_tokenizer(folder),
    )


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`, one per logged step.

    Its last line is rewritten in place while the run goes on; half of one is left out.

    Raises:
        ConfigError: A line before the last is not JSON.
    """
    if run.metrics is None:
        return []
    lines = run.metrics.read_bytes().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line, parse_constant=lambda _: None))  # a browser reads no NaN
        except ValueError as error:
            if number < len(lines):
                raise ConfigError(
                    f"{run.metrics}, line {number}: not JSON ({error}). Mend the line, or move the file away to view "
                    "the rollouts alone."
                ) from error
    return metrics


def read_training_logprobs(run: Run) -> Iterator[tuple[str, list[float]]]:
    """The trainer's log-probabilities of sampled tokens, by rollout id, where a run has recorded them.

    They are known after the journal's line was written, so they stand beside it: `<RUN>/training_logprobs/*.jsonl`,
    one object `{"rollout_id": str, "logprobs": [T]}` per rollout, in nats, `T` as in the line's `completion_ids`
    (what stands where the environment's tokens are is not looked at). Half a last line is left out.
    """
    for path in sorted((run.folder / TRAINING_LOGPROBS).glob("*.jsonl")):
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    yield record["rollout_id"], record["logprobs"]


def _named_tokenizer(path: Path) -> Path:
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"`--tokenizer` is {str(path)!r}, and there is no {TOKENIZER_FILE} there: name the folder of a model or "
            "checkpoint that has one, or leave the option out to see token ids."
        )
    return file


def _own_tokenizer(folder: Path) -> Path | None:
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    checkpoints = sorted(((int(match[1]), path) for match, path in matches if match is not None), reverse=True)
    candidates = [*(path for _, path in checkpoints), folder]
    return next((path / TOKENIZER_FILE for path in candidates if (path / TOKENIZER_FILE).is_file()), None)
