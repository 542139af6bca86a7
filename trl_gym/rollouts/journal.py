"""Append-only record of every rollout: what was asked, what came back, which tokens are trained.

One JSON object per line in `<output_dir>/rollouts/step-<k>.rank-<r>.jsonl` (`eval-step-<k>.…` for evaluation), where k
is the optimizer step whose weights sampled it. A line is on disk before its rollout is trained on. Viewer, debugging,
resume and offline training read the same files.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1


class Journal:
    """Writes the rollouts of one rank.

    `append` may be called from the collector's thread while `commit` is called from the trainer's.

    Args:
        folder: `<output_dir>/rollouts`; made when missing.
        rank: This process's rank.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file: Any = None
        self._path: Path | None = None

    def path(self, step: int, mode: str) -> Path:
        prefix = "step" if mode == "train" else f"{mode}-step"
        return self.folder / f"{prefix}-{step}.rank-{self.rank}.jsonl"

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one rollout; it is safe from a crash of this process at once, and from one of the machine after
        `commit`.

        Raises:
            OSError: The disk is full or gone; nothing is trained on that could not be recorded.
            ValueError: The record holds NaN or infinity.
        """
        line = json.dumps({"schema": SCHEMA, "rank": self.rank, **record}, ensure_ascii=False, allow_nan=False)
        with self._lock:
            self._open(self.path(record["step"], record["mode"]))
            self._file.write(line + "\n")
            self._file.flush()

    def commit(self) -> None:
        """fsync what was appended."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = self._path = None

    def _open(self, path: Path) -> None:
        if path == self._path:
            return
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - stays open over many appends
        self._path = path


def read_journal(folder: str | Path) -> Iterator[dict[str, Any]]:
    """All rollouts of a run, by file. A last line that a crash tore is left out; one in the middle is an error.

    Raises:
        ValueError: A line that is not the last of its file is not JSON.
    """
    for path in sorted(Path(folder).glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):  # no newline after it: torn while it was written
                    continue
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
