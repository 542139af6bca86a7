"""The book of rollouts: bounded, and cancelled ones stay cancelled."""

from __future__ import annotations

import pytest

from trl_gym.policy_server.middleware import calls
from trl_gym.policy_server.middleware.calls import RolloutBook, record_of


def record(**more: object) -> calls.CallRecord:
    given = {"status": 200, "exact": True, "seconds": 0.5, "weight_version": "1", "drift": None, **more}
    return record_of(given.pop("answer", None), **given)


def test_a_record_is_null_where_the_server_says_nothing() -> None:
    bare = record(answer={"choices": [{"finish_reason": "length"}], "usage": {"prompt_tokens": 5}})
    assert (bare["prompt_tokens"], bare["completion_tokens"], bare["cached_tokens"]) == (5, None, None)
    assert (bare["queue_s"], bare["finish_reason"]) == (None, "length")
    assert "error" not in bare
    assert record(status=400, error="full")["error"] == "full"


def test_records_are_kept_while_calls_run_and_forgotten_on_demand() -> None:
    book = RolloutBook()
    book.calls("a").records.append(record())
    with book.running("a"):
        assert len(book.records(["a", "b"], forget=True)["a"]) == 1
        assert book.records(["b"], forget=False) == {"b": []}
    assert len(book.records(["a"], forget=True)["a"]) == 1
    assert book.records(["a"], forget=True) == {"a": []}


def test_the_oldest_rollouts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MAX_ROLLOUTS", 2)
    monkeypatch.setattr(calls, "_MAX_CANCELLED", 2)
    book = RolloutBook()
    for name in "abca":
        book.calls(name).records.append(record())
    assert {name: len(records) for name, records in book.records(list("abc"), forget=False).items()} == {
        "a": 1,
        "b": 0,
        "c": 1,
    }
    book.cancel(["a", "b", "c"])
    assert [book.is_cancelled(name) for name in "abc"] == [False, True, True]


def test_cancelling_aborts_what_runs() -> None:
    book = RolloutBook()
    with book.running("a") as first, book.running("a") as second, book.running("b") as other:
        assert book.cancel(["a", "unknown"]) == 2
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)
        assert book.num_running(["a", "b", "unknown"]) == {"a": 2, "b": 1, "unknown": 0}
    assert book.num_running(["a"]) == {"a": 0}
    assert book.cancel(["a"]) == 0
    assert book.is_cancelled("unknown")
