"""Calls of rollouts: records are bounded, cancelled rollouts stay cancelled; and which histories count as the same."""

from __future__ import annotations

from typing import Any

import pytest

from trl_gym.policy_server.middleware import ledger as calls
from trl_gym.policy_server.middleware.http import Reply
from trl_gym.policy_server.middleware.ledger import Digest, Histories, RolloutBook, digest, record_of


def record(answer: dict[str, Any] | None = None, reply: Reply | None = None) -> calls.CallRecord:
    return record_of(reply or Reply.from_json(200, answer), answer, exact=True, seconds=0.5, drift=None)


def test_a_record_is_null_where_the_server_says_nothing() -> None:
    bare = record(answer={"choices": [{"finish_reason": "length"}], "usage": {"prompt_tokens": 5}})
    assert (bare["prompt_tokens"], bare["completion_tokens"], bare["cached_tokens"]) == (5, None, None)
    assert (bare["queue_s"], bare["finish_reason"]) == (None, "length")
    assert "error" not in bare
    assert record(reply=Reply.error(400, "full"))["error"] == "full"


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


Json = dict[str, Any]
USER: Json = {"role": "user", "content": "hi"}
ASSISTANT: Json = {"role": "assistant", "content": "well"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def of(*messages: Json, sampled: tuple[bytes | None, ...] = (), options: bytes = b"{}") -> Digest:
    return digest(messages, [*sampled, *[None] * (len(messages) - len(sampled))], options)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ([USER], [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]),
        ([ASSISTANT], [ASSISTANT | {"reasoning_content": "hm", "refusal": None}]),
        ([ASSISTANT | {"tool_calls": [CALL]}], [ASSISTANT | {"tool_calls": [CALL | {"id": "another"}]}]),
        ([USER | {"content": None}], [USER | {"content": ""}]),
    ],
)
def test_the_same_meaning_has_the_same_digest(then: list[Json], now: list[Json]) -> None:
    assert of(*then) == of(*now)


@pytest.mark.parametrize(
    "now",
    [
        [USER | {"content": "ho"}],
        [USER | {"role": "system"}],
        [USER, USER],
        [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [USER | {"tool_calls": [CALL]}],
    ],
)
def test_another_meaning_has_another_digest(now: list[Json]) -> None:
    assert of(USER).messages != of(*now).messages


def test_a_sampled_message_is_its_ids() -> None:
    edited = ASSISTANT | {"content": "without thinking"}
    assert of(USER, ASSISTANT, sampled=(None, b"[1]")) == of(USER, edited, sampled=(None, b"[1]"))
    assert of(USER, ASSISTANT, sampled=(None, b"[1]")) != of(USER, ASSISTANT, sampled=(None, b"[2]"))


def test_what_was_changed_is_named() -> None:
    histories, seen = Histories(), [1, 2, 3]
    assert histories.difference(seen, of(USER)) is None  # another server's answer
    histories.remember(seen, of(USER))
    assert histories.difference(seen, of(USER)) is None
    assert "messages" in (histories.difference(seen, of(USER, USER)) or "")
    assert "tools" in (histories.difference(seen, of(USER, options=b"[]")) or "")


def test_an_agent_may_merge_what_it_got_into_its_last_message() -> None:
    histories, seen = Histories(), [1, 2, 3]
    histories.remember(seen, of(USER, ASSISTANT))
    assert histories.difference(seen, of(USER)) is None
    assert histories.difference(seen, of(USER, ASSISTANT)) is None
    assert histories.difference(seen, of(ASSISTANT)) is not None
