"""JSON, numbers and HTTP bodies of strangers end in a value or in a `ValueError`."""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.untrusted import (
    MAX_DEPTH,
    BodyTooLongError,
    check_depth,
    check_portable,
    number,
    parse_json,
    read_response,
    redirect_problem,
    shape_problem,
    without_halves,
)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=2), inner), max_leaves=9
)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@given(VALUES)
def test_json_is_read_as_json(value: Any) -> None:
    assert repr(parse_json(json.dumps(value))) == repr(json.loads(json.dumps(value)))


@given(st.binary() | st.text())
def test_anything_else_is_a_value_error(text: str | bytes) -> None:
    with suppress(ValueError):
        parse_json(text)


@pytest.mark.parametrize("text", ["9" * 5000, nested(MAX_DEPTH + 1), nested(1000), nested(100_000), "[" * 100_000])
def test_what_cannot_be_walked_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_what_was_read_can_be_walked() -> None:
    value = parse_json(nested(MAX_DEPTH))
    assert json.dumps(copy.deepcopy(value)) == nested(MAX_DEPTH)


def test_yaml_that_holds_itself_is_refused() -> None:
    itself: list[Any] = []
    itself.append(itself)
    bomb: list[Any] = ["x"]
    for _ in range(9):
        bomb = [bomb] * 9
    for value in (itself, {"a": itself}, bomb, [bomb] * 1000):
        with pytest.raises(ValueError, match=r"nested more|lists and objects"):
            check_depth(value)


@given(st.lists(st.text(st.characters() | st.sampled_from('\\"\ud800\udfff\ue000u'), max_size=12), max_size=3))
def test_halves_of_surrogates_become_text(texts: list[str]) -> None:
    body = json.dumps(texts).encode()
    whole = [json.loads(json.dumps(text)) for text in texts]  # two halves in a row are one character
    plain = ["".join(f"\\u{ord(one):04x}" if "\ud800" <= one <= "\udfff" else one for one in text) for text in whole]
    assert msgspec.json.decode(without_halves(body)) == plain
    assert without_halves(without_halves(body)) == without_halves(body)


@pytest.mark.parametrize(
    ("text", "is_portable"),
    [
        *(
            ("{}", True),
            ("null", True),
            ('{"a": "\\ud83d\\ude00 é"}', True),
            ("9" * 4300, True),
            ("[" * 200 + "]" * 200, True),
        ),
        *((text, False) for text in ("", "{", "NaN", "1e999", '"\\udbea"', '"\udbea"', "9" * 5000, "[" * 9999)),
    ],
)
def test_what_everyone_can_read(text: str, is_portable: bool) -> None:
    try:
        check_portable(text)
    except ValueError:
        assert not is_portable
    else:
        assert is_portable


@given(LEAVES | VALUES)
def test_measurements_are_finite_and_can_be_summed(value: Any) -> None:
    found = number(value)
    assert found is None or abs(found) <= 1e100


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), 1e308, "1", None, [1]])
def test_what_is_no_measurement(value: Any) -> None:
    assert number(value) is None


def test_shapes() -> None:
    class Shape(msgspec.Struct):
        a: int

    assert shape_problem({"a": 1, "b": "x"}, Shape) is None
    assert "$.a" in (shape_problem({"a": True}, Shape) or "")
    assert shape_problem({"\ud800": 1, "a": 2}, Shape) is None
    assert "$.a" in (shape_problem({"\ud800": 1, "a": "\ud800"}, Shape) or "")


@pytest.mark.parametrize(
    ("location", "host"),
    [("http://key@other:9/x", "to other:9,"), ("/x", "to here:1,"), (None, "to nowhere,"), ("http://[::", "[::")],
)
def test_where_a_redirect_leads(location: str | None, host: str) -> None:
    assert host in (redirect_problem("http://here:1/run", 302, location) or "")
    assert redirect_problem("http://here:1/run", 200, location) is None


@contextmanager
def endless() -> Iterator[str]:
    """A server whose answer has no end."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                while True:
                    connection.sendall(b"x" * 2**16)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_a_long_body_is_not_read_to_its_end() -> None:
    with (
        endless() as url,
        requests.get(url, stream=True, timeout=60) as response,
        pytest.raises(BodyTooLongError, match="longer than 1,000,000 bytes"),
    ):
        read_response(response, 1_000_000)
