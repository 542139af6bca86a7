"""What counts as the same history."""

from __future__ import annotations

from typing import Any

import pytest

from trl_gym.policy_server.middleware.calls import Digest, Histories, digest

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
