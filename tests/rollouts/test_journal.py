from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trl_gym.rollouts.journal import Journal, read_journal


def record(step: int = 0, mode: str = "train", **fields: object) -> dict[str, object]:
    return {"step": step, "mode": mode, **fields}


def test_lines_are_found_again_with_schema_and_rank(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rollouts", rank=3)
    journal.append(record(reward=1.0, text="zwei\u2028Zeilen"))
    journal.append(record(step=1, reward=None))
    journal.append(record(step=1, mode="eval", reward=0.5))
    journal.commit()
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "eval-step-1.rank-3.jsonl",
        "step-0.rank-3.jsonl",
        "step-1.rank-3.jsonl",
    ]
    rollouts = list(read_journal(tmp_path / "rollouts"))
    assert {(r["mode"], r["step"], r["reward"]) for r in rollouts} == {
        ("train", 0, 1.0),
        ("train", 1, None),
        ("eval", 1, 0.5),
    }
    assert all(r["schema"] == 1 and r["rank"] == 3 for r in rollouts)
    assert any(r.get("text") == "zwei\u2028Zeilen" for r in rollouts)
    journal.close()
    journal.close()


def test_appending_again_keeps_what_was_there(tmp_path: Path) -> None:
    for value in (1, 2):
        journal = Journal(tmp_path)
        journal.append(record(value=value))
        journal.close()
    assert [r["value"] for r in read_journal(tmp_path)] == [1, 2]


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(record(value=1))
    journal.close()
    path = journal.path(0, "train")
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert [r["value"] for r in read_journal(tmp_path)] == [1]
    path.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        list(read_journal(tmp_path))


def test_nan_is_refused_rather_than_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(ValueError):
        journal.append(record(reward=math.nan))
    journal.append(record(reward=1.0))
    assert [r["reward"] for r in read_journal(tmp_path)] == [1.0]
    journal.close()


def test_a_line_is_readable_by_others_before_commit(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(record(value=1))
    assert json.loads(journal.path(0, "train").read_text())["value"] == 1
    journal.close()
