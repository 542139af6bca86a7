from __future__ import annotations

import gc
from pathlib import Path

from trl_gym.run.servers import succeed


class Trainer:
    def __init__(self) -> None:
        self.num_closed = 0

    def close(self) -> None:
        self.num_closed += 1


def test_a_trainer_for_the_same_folder_replaces_the_one_before(tmp_path: Path) -> None:
    first, second, elsewhere = Trainer(), Trainer(), Trainer()
    succeed(tmp_path / "out", first)
    succeed(tmp_path / "other", elsewhere)
    succeed(f"{tmp_path}/x/../out", second)
    assert (first.num_closed, second.num_closed, elsewhere.num_closed) == (1, 0, 0)
    succeed(tmp_path / "out", second)
    assert second.num_closed == 0


def test_one_that_is_gone_is_not_kept_alive(tmp_path: Path) -> None:
    closed: list[Path] = []

    class Telling(Trainer):
        def close(self) -> None:
            closed.append(tmp_path)

    first = Telling()
    succeed(tmp_path, first)
    del first
    gc.collect()
    succeed(tmp_path, Trainer())
    assert closed == []
