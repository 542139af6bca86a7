"""Captured bodies of real Gym servers (0.4.0 and 0.7.0), and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import FailureKind
from trl_gym.gym.client import MAX_TEXT_CHARS, read_error, unwrap

CAPTURED = json.loads(Path(__file__).with_name("captured_errors.json").read_text())


@pytest.mark.parametrize("case", CAPTURED, ids=lambda case: f"{case['gym']}-{case['name']}")
def test_captured_answers(case: dict[str, str]) -> None:
    kind, text = read_error(case["body"].encode(), int(case["status"]))
    assert (str(kind), text) == (case["kind"], case["text"])


def wrap(message: str, *servers: str) -> bytes:
    """What Gym makes of an error that `servers` (outermost first) hand on."""
    body = json.dumps(message).encode()
    for server in reversed(servers):
        body = json.dumps(f"Hit an exception in {server} calling an inner server: {body!r}").encode()
    return body


@given(
    st.text().filter(lambda text: not text.startswith("Hit an exception")),
    st.lists(st.from_regex(r"[A-Z][A-Za-z]{0,9}___[a-z_]{1,9}", fullmatch=True), max_size=4),
)
def test_any_message_survives_any_number_of_hops(message: str, servers: list[str]) -> None:
    names = [server.partition("___")[2] for server in servers]
    each_once = [name for i, name in enumerate(names) if name not in names[i - 1 : i]]
    assert unwrap(wrap(message, *servers)) == (each_once, message.strip())


@given(st.binary())
def test_no_body_is_too_strange(body: bytes) -> None:
    kind, text = read_error(body, 500)
    assert kind in FailureKind and text


@pytest.mark.parametrize(
    "message",
    [
        'ClientConnectorError("Cannot connect to host 127.0.0.1:1 ssl:default [Connect call failed")',
        "ServerDisconnectedError('Server disconnected')",
        "ConnectionResetError(104, 'Connection reset by peer')",
        "An unknown error occurred",
        "Request was cancelled",
        "",
    ],
)
def test_inner_connection_errors_are_infrastructure(message: str) -> None:
    assert read_error(wrap(message, "SimpleAgent___agent", "VLLMModel___policy_model"), 500)[0] == "infrastructure"


def test_cut_off_text_is_shown_raw() -> None:
    body = json.dumps("Hit an exception in A___b calling an inner server: b'\"KeyErr").encode()
    assert unwrap(body) == (["b"], "b'\"KeyErr")


def test_long_messages_are_shortened() -> None:
    text = read_error(wrap("x" * 10_000, "A___b"), 500)[1]
    assert len(text) < MAX_TEXT_CHARS + 100 and "10000 characters" in text
