from __future__ import annotations

import errno
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import ConfigError, RolloutError
from trl_gym.policy_server.middleware.identity import rollout_key
from trl_gym.rollouts import journal as journal_module
from trl_gym.rollouts.journal import (
    Journal,
    journal_files,
    read_journal,
    read_line,
    read_lines,
    read_objects,
    training_files,
)


def record(step: int = 0, mode: str = "train", **fields: object) -> dict[str, object]:
    return {"step": step, "mode": mode, **fields}


def values(folder: Path) -> list[Any]:
    return [r["value"] for r in read_journal(folder)]


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
    assert all(r["schema"] == 3 and r["rank"] == 3 and r["time"] > 0 for r in rollouts)
    assert any(r.get("text") == "zwei\u2028Zeilen" for r in rollouts)
    journal.close()
    journal.close()


def test_a_run_in_the_same_folder_adds_and_never_touches_what_is_there(tmp_path: Path) -> None:
    for value in (1, 2):
        journal = Journal(tmp_path)
        journal.append(record(value=value))
        journal.close()
    assert [path.name for path in journal_files(tmp_path)] == ["step-0.rank-0.jsonl", "step-0.rank-0.part-1.jsonl"]
    assert values(tmp_path) == [1, 2]


def test_a_torn_last_line_does_not_merge_with_the_next_and_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    journal.append(record(value="ä" * 20))
    journal.close()
    path = journal.path(0, "train")
    whole = path.read_bytes()
    for torn in (whole[:20], whole[: whole.index("ä".encode()) + 1], b"\0" * 50):  # also within a character
        path.write_bytes(whole + torn)
        resumed = Journal(tmp_path)
        resumed.append(record(value="next"))
        resumed.close()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert values(tmp_path) == ["ä" * 20, "next"]
        assert f"line 2: torn by a crash after {len(torn)} bytes" in caplog.text
        journal.path(0, "train", 1).unlink()
    path.write_bytes(whole[:20] + b"\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        list(read_journal(tmp_path))


def test_numbers_that_json_has_not_become_null_and_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A dataset row or a reward component with NaN ended the training with a bare ValueError."""
    journal = Journal(tmp_path)
    odd = record(agent="calc", rollout_id="r1", row={"bound": math.inf}, reward_components={"x": math.nan, "y": 1.0})
    odd["response"] = {"usage": [1.0, -math.inf]}
    for _ in range(2):
        journal.append(odd)
    journal.append(record(agent="calc", reward=1.0))
    journal.close()
    first, second, third = (line.record for line in read_lines(tmp_path))
    assert first | {"time": 0} == second | {"time": 0} and third["reward"] == 1.0
    assert (first["row"], first["reward_components"]) == ({"bound": None}, {"x": None, "y": 1.0})
    assert first["response"] == {"usage": [1.0, None]}
    assert "NaN" not in journal.path(0, "train").read_text() and math.isinf(odd["row"]["bound"])  # type: ignore[index]
    [warning] = caplog.messages
    assert "r1, a rollout of calc" in warning
    assert "`row.bound`, `reward_components.x`, `response.usage[]`" in warning


def test_a_line_is_readable_by_others_before_commit(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(record(value=1))
    assert json.loads(journal.path(0, "train").read_text())["value"] == 1
    journal.close()


def test_a_full_file_goes_on_in_a_new_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_bytes=300)
    for value in range(12):
        journal.append(record(value=value, text="x" * 60))
    journal.append(record(value=12, text="x" * 1000))  # longer than a file may be: alone in one
    journal.commit()
    files = journal_files(tmp_path)
    assert len(files) > 10 - 4 and files[0].name == "step-0.rank-0.jsonl"
    assert [path.name for path in files] == sorted((p.name for p in files), key=lambda n: (len(n), n))
    assert all(path.stat().st_size <= 300 for path in files[:-1])
    assert values(tmp_path) == list(range(13))
    journal.close()


def test_steps_ranks_and_parts_are_read_in_numerical_order(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        for rank in (10, 2):
            journal = Journal(tmp_path, rank=rank)
            journal.append(record(step=step, value=(step, rank)))
            journal.close()
    expected = [[9, 2], [9, 10], [10, 2], [10, 10], [100, 2], [100, 10]]
    assert values(tmp_path) == expected
    by_step = {step: [path.name for path in paths] for step, paths in training_files(tmp_path).items()}
    assert by_step == {step: [f"step-{step}.rank-{rank}.jsonl" for rank in (2, 10)] for step in (9, 10, 100)}


def test_earlier_versions_counted_the_steps_of_training_from_0_and_are_read_with_the_others(tmp_path: Path) -> None:
    """A run of an earlier version that was resumed: its files name another step than new ones do."""
    for schema, steps in ((2, (8, 9, 10)), (3, (10, 11))):
        journal = Journal(tmp_path)
        for step in steps:
            version = {} if schema == 2 else {"version": step - 1}
            journal.append({"schema": schema, **record(step=step, value=[schema, step]), **version})
        journal.append({"schema": schema, **record(step=8 + schema, mode="eval", value=[schema, "eval"])})
        journal.close()
    lines = list(read_lines(tmp_path))
    assert [line.record["value"] for line in lines] == [
        [2, "eval"], [3, "eval"], [2, 8], [2, 9], [3, 10], [2, 10], [3, 11],
    ]  # fmt: skip
    assert [line.record["step"] for line in lines] == [10, 11, 9, 10, 10, 11, 11]
    assert [line.record.get("version") for line in lines[2:]] == [8, 9, 9, 10, 10]
    assert [read_line(line.path, line.offset, line.length) for line in lines] == [line.record for line in lines]
    files = {step: [path.name for path in paths] for step, paths in training_files(tmp_path).items()}
    assert files == {
        9: ["step-8.rank-0.jsonl"],
        10: ["step-9.rank-0.jsonl", "step-10.rank-0.part-1.jsonl"],
        11: ["step-10.rank-0.jsonl", "step-11.rank-0.jsonl"],
    }


def test_rollouts_of_several_steps_that_end_in_turns_share_their_files(tmp_path: Path) -> None:
    """As with `gym_max_staleness`; what is not written to for long is closed."""
    journal = Journal(tmp_path)
    for turn in range(6):
        for step in (7, 8, 9):
            journal.append(record(step=step, value=turn))
    journal.append(record(step=8, mode="eval"))
    journal.commit()
    assert len(journal_files(tmp_path)) == 4
    for step in range(10, 30):
        journal.append(record(step=step))
    journal.commit()
    assert len(journal._parts) == 8 and journal._ended == []
    journal.append(record(step=7, value="late"))
    journal.close()
    assert [path.name for path in training_files(tmp_path)[7]] == ["step-7.rank-0.jsonl", "step-7.rank-0.part-1.jsonl"]


def test_a_line_can_be_read_again_from_its_place(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for value in ("é", 2, [3]):
        journal.append(record(value=value))
    journal.close()
    for line in read_lines(tmp_path):
        assert read_line(line.path, line.offset, line.length) == line.record


finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100)


@given(st.lists(finite | st.floats(width=32, allow_nan=False, allow_infinity=False)), st.booleans())
def test_log_probabilities_are_the_same_to_the_bit(tmp_path_factory: Any, values: list[float], narrow: bool) -> None:
    numbers = [*values, -0.0] if narrow else [*values, 0.1]  # the latter is no float32
    rows = [
        {"logprobs": own, "completion_ids": [1] * len(own), "env_mask": [1] * len(own)} for own in (numbers, values)
    ]
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    journal.append(record(**rows[0], further_rows=[rows[1]]))
    journal.close()
    [line] = read_journal(folder)
    assert repr([line["logprobs"], line["further_rows"][0]["logprobs"]]) == repr([numbers, values])
    [raw] = journal_files(folder)[0].read_text().splitlines()
    name = "float32" if all(array("f", [one])[0] == one for one in numbers if abs(one) < 1e38) else "float64"
    assert max(map(abs, numbers)) >= 1e38 or list(json.loads(raw)["logprobs"]) == [name]


def test_log_probabilities_that_are_no_numbers_are_null(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.append(record(rollout_id="r", agent="a", logprobs=[-1.0, math.nan], response={"x": math.inf}))
    journal.close()
    line = json.loads(journal_files(tmp_path)[0].read_text())
    assert (line["logprobs"], line["response"]) == ([-1.0, None], {"x": None})
    assert "`logprobs[]`, `response.x`" in caplog.text


def test_secrets_are_on_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "value-of-a-variable")
    journal = Journal(tmp_path, secrets=("key-of-the-server",))
    key = rollout_key("an-api-key", {"rollout": "r0"})
    journal.append(
        record(
            row={"text": "value-of-a-variable"},
            response={"policy_api_key": "x", "generation_token_ids": [1, key]},  # no place is taken for numbers
            failure={"kind": "k", "text": "key-of-the-server!"},
            completion_ids=[1],
            logprobs=[-1.0],
        )
    )
    journal.close()
    [line] = read_journal(tmp_path)
    assert line["row"] == {"text": "[redacted]"}
    assert line["response"] == {"policy_api_key": "[redacted]", "generation_token_ids": [1, "[redacted]"]}
    assert line["failure"]["text"] == "[redacted]!"


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_stops_and_leaves_what_was_written_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """The fault is injected: a write that takes some bytes, and then no more."""
    journal = Journal(tmp_path)
    journal.append(record(value=1))
    real_write, calls = os.write, []

    def write(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 1 and written:
            return real_write(descriptor, data[:written])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_module.os, "write", write)
    with pytest.raises(RolloutError, match=r"(?s)step-0\.rank-0\.jsonl.*No space left.*MB of .* free.*Make room"):
        journal.append(record(value=2))
    monkeypatch.undo()
    assert journal.path(0, "train").read_bytes().endswith(b"}\n")
    assert values(tmp_path) == [1]
    journal.append(record(value=3))  # room was made
    journal.close()
    assert values(tmp_path) == [1, 3]


def test_a_really_full_device_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(record(value=1))
    [part] = journal._parts.values()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, part.descriptor)
    os.close(full)
    with pytest.raises(RolloutError, match="No space left on device"):
        journal.append(record(value=2))
    assert values(tmp_path) == [1]


def test_a_refused_fsync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append(record(value=1))

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal_module.os, "fsync", fsync)
    with pytest.raises(RolloutError, match="Input/output error"):
        journal.commit()


def test_commit_does_not_make_append_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append(record(value=1))
    in_fsync, may_end = threading.Event(), threading.Event()
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        in_fsync.set()
        assert may_end.wait(timeout=30)
        real_fsync(descriptor)

    monkeypatch.setattr(journal_module.os, "fsync", fsync)
    committing = threading.Thread(target=journal.commit)
    committing.start()
    assert in_fsync.wait(timeout=30)
    journal.append(record(value=2))  # would hang here
    may_end.set()
    committing.join()
    monkeypatch.undo()
    journal.close()
    assert values(tmp_path) == [1, 2]


def _write_until_killed(folder: str, started: Any) -> None:
    journal = Journal(folder)
    for value in range(10**9):
        journal.append(record(value=value, text="x" * 5000))
        if value == 50:
            started.set()


def test_a_writer_that_is_killed_loses_nothing_that_was_appended_and_disturbs_nobody(tmp_path: Path) -> None:
    """Two processes with the same rank by mistake, one of them killed in the middle of writing."""
    context = multiprocessing.get_context("fork")
    started = [context.Event(), context.Event()]
    writers = [context.Process(target=_write_until_killed, args=(str(tmp_path), event)) for event in started]
    for writer, event in zip(writers, started, strict=True):
        writer.start()
        assert event.wait(timeout=60)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    found = values(tmp_path)
    restarts = [index for index, value in enumerate(found) if value == 0]
    assert len(restarts) == 2
    for first, last in ((0, restarts[1]), (restarts[1], len(found))):
        assert found[first:last] == list(range(last - first))
        assert last - first > 50


def whole(**changes: Any) -> dict[str, Any]:
    """A line as the journal writes it."""
    tokens = {"prompt_ids": [1], "completion_ids": [3, 4], "env_mask": [1, 1], "logprobs": [-1, -1], "turn_ends": [2]}
    return {
        "schema": 3,
        "step": 1,
        "mode": "train",
        "rollout_id": "r-g0-m0-a0",
        "agent": "a",
        "task_hash": "t",
        "group": 0,
        "member": 0,
        "weight_versions": ["0"],
        "reward": 1.0,
        "failure": None,
        "drift": None,
        "seconds": 1.0,
        **tokens,
        "row": {"responses_create_params": {"input": "x"}},
        "response": {"output": [{"type": "message"}]},
        "verify": {"reward": 1.0},
        "turns": [{"kind": "model"}],
        **changes,
    }


ODD_LINES: dict[str, tuple[str, str]] = {
    "a list": ("[1]", "object"),
    "null": ("null", "object"),
    "no step": ("{}", "step"),
    "deep": (json.dumps(whole(x="@")).replace('"@"', "[" * 100_000 + "]" * 100_000), "nested"),
    "rather deep": (json.dumps(whole(x="@")).replace('"@"', "[" * 900 + "]" * 900), "nested"),
    "a reward of 400 digits": (json.dumps(whole(reward="@")).replace('"@"', "9" * 400), "$.reward"),
    "a reward of 1e308": (json.dumps(whole(reward=1e308)), "$.reward"),
    "a reward that is NaN": (json.dumps(whole(reward=math.nan)), "$.reward"),
    "no reward": (json.dumps(whole(reward=None)), "neither a failure nor a reward"),
    "step is text": (json.dumps(whole(step="x")), "$.step"),
    "fewer masks than tokens": (json.dumps(whole(env_mask=[1])), "different lengths"),
    "masks of 2": (json.dumps(whole(env_mask=[2, 1])), "$.env_mask[0]"),
    "ids are text": (json.dumps(whole(completion_ids=["b", "c"])), "$.completion_ids[0]"),
    "ids are negative": (json.dumps(whole(prompt_ids=[-1])), "$.prompt_ids[0]"),
    "ids are huge": (json.dumps(whole(completion_ids=[2**60, 10**30])), "$.completion_ids[0]"),
    "a further row is text": (json.dumps(whole(further_rows=["x"])), "$.further_rows[0]"),
    "a further row is broken": (json.dumps(whole(further_rows=[{"completion_ids": [1], "env_mask": []}])), "lengths"),
    "turns are text": (json.dumps(whole(turns=["a", 5])), "$.turns[0]"),
    "response is text": (json.dumps(whole(response="x")), "$.response"),
    "an item is text": (json.dumps(whole(response={"output": ["x", None]})), "$.response.output[0]"),
    "logprobs of another size": (json.dumps(whole(logprobs={"float32": "AAAA"})), "cannot be unpacked"),
    "logprobs of other numbers": (json.dumps(whole(logprobs={"float16": "AAA="})), "cannot be unpacked"),
    "logprobs of no base64": (json.dumps(whole(logprobs={"float64": 5})), "cannot be unpacked"),
    "fewer logprobs": (json.dumps(whole(logprobs={"float32": "AACAvw=="})), "different lengths"),
    "the row is a list": (json.dumps(whole(row=[1])), "$.row"),
    "the failure is text": (json.dumps(whole(failure="oops")), "$.failure"),
    "a name that cannot be a key": (json.dumps(whole(run=[1])), "$.run"),
    "zeros": ("\0" * 100, "not JSON"),
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_an_odd_line_is_named_and_never_half_read(tmp_path: Path, name: str) -> None:
    line, words = ODD_LINES[name]
    good = json.dumps(whole())
    (tmp_path / "step-0.rank-0.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ConfigError, match=r"step-0\.rank-0\.jsonl, line 2: .*" + re.escape(words)):
        list(read_lines(tmp_path))


def test_lines_that_may_be_odd(tmp_path: Path) -> None:
    lines = [whole(), whole(verify={"reward": 1, "x": 1e999}), whole(step=10**30), whole(run=None, row={"\ud800": 1})]
    (tmp_path / "step-0.rank-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_journal(tmp_path)) == lines


def test_odd_objects_beside_the_journal_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"a": NaN}\n[1]\n' + b"[" * 100_000 + b'\n\xff\n{"b": 2}\n')
    assert list(read_objects(file)) == [{"a": None}, {"b": 2}]
    assert all(f"line {number} " in text for number, text in zip((2, 3, 4), caplog.messages, strict=True))
