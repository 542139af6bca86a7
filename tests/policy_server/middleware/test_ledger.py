"""Calls of rollouts: the ledger is bounded, ended rollouts stay ended; and which histories count as the same."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from trl_gym.policy_server.middleware import ledger
from trl_gym.policy_server.middleware.http import Reply
from trl_gym.policy_server.middleware.ledger import (
    CallRecord,
    Digest,
    Histories,
    RolloutBook,
    digest_of,
    record_of,
    token_ids,
)
from trl_gym.policy_server.middleware.turn import Turn

Json = dict[str, Any]
USER: Json = {"role": "user", "content": "hi"}
ASSISTANT: Json = {"role": "assistant", "content": "well"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def record(answer: Json | None = None, reply: Reply | None = None) -> CallRecord:
    return record_of(reply or Reply.from_json(200, answer), answer, exact=True, seconds=0.5)


def turn(*messages: Json, rollout: str | None = "a", **body: Any) -> Turn:
    tag = {"trl_gym": {"rollout": rollout}} if rollout is not None else {}
    parsed = Turn.from_json(json.dumps({"messages": messages, **tag, **body}).encode())
    assert parsed is not None
    return parsed


def sample(book: RolloutBook, asked: Turn, prompt: list[int], ids: list[int], text: str = "well") -> Json:
    """Let a turn be answered with these tokens; the message that its client gets."""
    assert asked.rollout is not None
    calls = book.calls(asked.rollout)
    calls.recognize(asked)
    message = {"role": "assistant", "content": text}
    bundle = {"generation_token_ids": ids, "generation_log_probs": [-0.5] * len(ids)}
    tokens = calls.tokens_of(asked, {**message, **bundle}, prompt)
    made = record_of(Reply.from_json(200, {}), None, exact=True, seconds=0.5, tokens=tokens)
    book.append(calls, asked, msgspec.structs.replace(made, prompt_tokens=len(prompt)))
    return {**message, "prompt_token_ids": [tokens.handle], "generation_token_ids": [tokens.handle]}


def test_a_record_is_null_where_the_server_says_nothing() -> None:
    bare = record(answer={"choices": [{"finish_reason": "length"}], "usage": {"prompt_tokens": 5}})
    assert (bare.prompt_tokens, bare.completion_tokens, bare.cached_tokens) == (5, None, None)
    assert (bare.queue_s, bare.finish_reason, bare.error) == (None, "length", None)
    assert record(reply=Reply.error(400, "full")).error == "full"


def test_what_was_taken_is_forgotten_and_its_rollout_has_ended() -> None:
    book = RolloutBook()
    sample(book, turn(USER), [1, 2], [3])
    with book.running("a") as running:
        assert len(book.records(["a", "b"])["a"]) == 1
        assert book.take(["b"]) == {"b": []}
        taken = book.take(["a"])
        assert running.is_set()  # nobody waits for that call
    assert [token_ids(taken["a"] or [], 0)] == [[1, 2, 3]]
    assert book.records(["a"]) == {"a": []} and book.has_ended("a") and not book.has_ended("c")
    assert book.take(["a"]) == taken  # for a trainer that did not get the answer


def test_the_oldest_rollouts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_MAX_ROLLOUTS", 2)
    monkeypatch.setattr(ledger, "_MAX_ENDED", 2)
    book = RolloutBook()
    for name in "abca":
        book.append(book.calls(name), turn(USER, rollout=name), record())
    assert {name: len(records) for name, records in book.records(list("abc")).items()} == {"a": 1, "b": 0, "c": 1}
    book.cancel(["a", "b", "c"])
    assert [book.has_ended(name) for name in "abc"] == [False, True, True]


def test_tokens_without_room_are_dropped_with_their_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_MAX_BYTES", 100)
    book = RolloutBook()
    for name in "abc":
        sample(book, turn(USER, rollout=name), [1, 2, 3], [4, 5])  # 36 bytes each
    assert [book.take([name])[name] is None for name in "abc"] == [True, False, False]


def test_cancelling_aborts_what_runs() -> None:
    book = RolloutBook()
    with book.running("a") as first, book.running("a") as second, book.running("b") as other:
        assert book.cancel(["a", "unknown"]) == 2
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)
        assert book.num_running(["a", "b", "unknown"]) == {"a": 2, "b": 1, "unknown": 0}
    assert book.num_running(["a"]) == {"a": 0}
    assert book.cancel(["a"]) == 0
    assert book.has_ended("unknown")


def test_only_what_is_new_is_kept() -> None:
    book = RolloutBook()
    first = sample(book, turn(USER), [1, 2], [3])
    more = turn(USER, first, {"role": "user", "content": "more"})
    sample(book, more, [1, 2, 3, 4], [5])
    assert more.seen == [1, 2, 3] and more.call == 0
    tokens = book.calls("a").records[1].tokens
    assert tokens is not None and (tokens.parent, len(tokens.prompt)) == (0, 4)
    assert token_ids(book.calls("a").records, 1) == [1, 2, 3, 4, 5]


def test_parallel_calls_and_retries_are_told_apart() -> None:
    book = RolloutBook()
    answers = [sample(book, turn(USER), [1, 2], [3 + index], text) for index, text in enumerate(["a", "b", "b"])]
    more = {"role": "user", "content": "more"}
    bare = [{key: answer[key] for key in ("role", "content")} for answer in answers]
    for message, call in [(answers[0], 0), (answers[1], 1), (bare[0], 0), (bare[1], 2)]:
        asked = turn(USER, message, more)
        book.calls("a").recognize(asked)
        assert asked.call == call  # of two that say the same without a handle, the newest
    asked = turn({"role": "user", "content": "another"}, bare[0], more)
    book.calls("a").recognize(asked)
    assert asked.call is None


def of(*messages: Json, **body: Any) -> Digest:
    return digest_of(turn(*messages, rollout=None, **body), len(messages))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ([USER], [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]),
        ([ASSISTANT], [ASSISTANT | {"reasoning_content": "hm", "refusal": None}]),
        ([ASSISTANT], [ASSISTANT | {"content": "<think>hm</think>\n\nwell"}]),
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


def sampled(message: Json, ids: list[int]) -> Json:
    return message | {"prompt_token_ids": [1], "generation_token_ids": ids, "generation_log_probs": [-0.5]}


def test_a_sampled_message_is_its_ids() -> None:
    edited = ASSISTANT | {"content": "without thinking"}
    assert of(USER, sampled(ASSISTANT, [1])) == of(USER, sampled(edited, [1]))
    assert of(USER, sampled(ASSISTANT, [1])) != of(USER, sampled(ASSISTANT, [2]))


def test_what_was_changed_is_named() -> None:
    histories, front = Histories(), [USER, USER]
    asked = turn(*front, sampled(ASSISTANT, [2, 3]), rollout=None)
    assert histories.difference(asked) is None  # another server's answer
    histories.remember([1, 2, 3], of(*front))
    assert histories.difference(asked) is None
    edited = turn(USER, sampled(ASSISTANT, [2, 3]), rollout=None)
    assert "messages" in (histories.difference(edited) or "")
    others = turn(*front, sampled(ASSISTANT, [2, 3]), rollout=None, tools=[{"type": "function"}])
    assert "tools" in (histories.difference(others) or "")
    histories.remember([1, 2, 3], of(USER))  # another conversation with the same tokens
    assert histories.difference(edited) is None and histories.difference(asked) is None


@pytest.mark.parametrize(("num_others", "is_told"), [(1, True), (8, True), (500, False)])
def test_what_was_forgotten_is_not_called_rewritten(num_others: int, is_told: bool) -> None:
    """Of conversations in the same tokens (a template need not write all of a message) only some are kept."""
    histories = Histories()
    fronts = [[USER | {"content": f"hi {number}"}] for number in range(num_others + 1)]
    for front in fronts:
        histories.remember([1, 2, 3], of(*front))
    for front in fronts:
        assert histories.difference(turn(*front, sampled(ASSISTANT, [2, 3]), rollout=None)) is None
    edited = turn(USER | {"content": "other"}, sampled(ASSISTANT, [2, 3]), rollout=None)
    assert (histories.difference(edited) is not None) == is_told


def test_an_agent_may_merge_what_it_got_into_its_last_message() -> None:
    histories = Histories()
    histories.remember([1, 2, 3], of(USER, ASSISTANT))
    for front, is_same in [([USER], True), ([USER, ASSISTANT], True), ([ASSISTANT], False)]:
        asked = turn(*front, sampled(ASSISTANT, [2, 3]), rollout=None)
        assert (histories.difference(asked) is None) == is_same


def test_an_equal_conversation_does_not_take_over_an_older_one() -> None:
    book = RolloutBook()
    bare = [{"role": "assistant", "content": text} for text in ("ok", "well")]
    more = {"role": "user", "content": "more"}
    sample(book, turn(USER), [1, 2], [3], "ok")
    sample(book, turn(USER, bare[0], more), [1, 2, 3, 4], [5], "well")
    sample(book, turn(USER), [1, 2], [6], "ok")  # another conversation begins alike
    asked = turn(USER, bare[0], more, bare[1], more)
    book.calls("a").recognize(asked)
    assert (asked.call, asked.newest, asked.seen) == (1, 3, [1, 2, 3, 4, 5])


def test_a_call_that_outlives_its_rollout_or_its_room_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    book = RolloutBook()
    first = sample(book, turn(USER), [1, 2], [3])
    calls, late = book.calls("a"), turn(USER, first, {"role": "user", "content": "more"})
    calls.recognize(late)
    taken = book.take(["a"])
    bundle = {"generation_token_ids": [5], "generation_log_probs": [-0.5]}
    tokens = calls.tokens_of(late, bundle, [1, 2, 3, 4])
    book.append(calls, late, record_of(Reply.from_json(200, {}), None, exact=True, seconds=0.5, tokens=tokens))
    assert book.records(["a"]) == {"a": []} and book.take(["a"]).keys() == taken.keys()

    sample(book, turn(USER, rollout="b"), [1, 2], [3])
    calls, late = book.calls("b"), turn(USER, {"role": "assistant", "content": "well"}, USER, rollout="b")
    calls.recognize(late)
    assert late.call == 0
    monkeypatch.setattr(ledger, "_MAX_BYTES", 0)
    sample(book, turn(USER, rollout="c"), [1, 2], [3])
    tokens = calls.tokens_of(late, bundle, [1, 2, 3, 4])
    book.append(calls, late, record_of(Reply.from_json(200, {}), None, exact=True, seconds=0.5, tokens=tokens))
    assert book.take(["b"]) == {"b": None}


def test_ids_of_calls_do_not_count_but_which_call_was_answered() -> None:
    def history(*ids: str, answered: str) -> list[Json]:
        calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in ids]
        return [USER, {**ASSISTANT, "tool_calls": calls}, {"role": "tool", "tool_call_id": answered, "content": "1"}]

    assert of(*history("a", "b", answered="a")) == of(*history("x", "y", answered="x"))
    assert of(*history("a", "b", answered="a")) != of(*history("a", "b", answered="b"))


def test_a_conversation_that_begins_with_examples_has_lost_nothing() -> None:
    book, example = RolloutBook(), {"role": "assistant", "content": "for example"}
    first = sample(book, turn(USER), [1, 2], [3])
    other = turn({"role": "system", "content": "another agent"}, USER, example, USER)
    book.calls("a").recognize(other)
    assert not book.calls("a").has_lost(other)
    edited = turn(USER, {**ASSISTANT, "content": "edited"}, USER)
    book.calls("a").recognize(edited)
    assert book.calls("a").has_lost(edited)
    elsewhere = turn(USER, first, USER, rollout="b")  # a server that never saw this rollout
    book.calls("b").recognize(elsewhere)
    assert book.calls("b").has_lost(elsewhere)
