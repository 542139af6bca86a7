"""What comes from outside (HTTP answers, files, texts that a policy wrote), read within bounds.

Everything here ends in a value or in a `ValueError`, whatever comes: no RecursionError, no OverflowError, no read
without end. What was parsed is nested at most `MAX_DEPTH` levels deep, so that whatever walks it later (`json.dumps`,
`copy.deepcopy`, the journal's redaction) stays within Python's recursion limit, and types are checked once, where a
value comes in; behind that place code relies on them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import msgspec

if TYPE_CHECKING:
    import aiohttp
    import requests

MAX_DEPTH = 200  # levels of lists and objects within each other
MAX_CONTAINERS = 2_000_000  # lists and objects in one value
MAX_BODY_BYTES = 256 * 2**20  # of an answer
MAX_ERROR_BYTES = 4 * 2**20  # of an answer that is an error: as much of it as is read
MAX_NUMBER = 1e100  # of a measurement: sums of as many as there will ever be stay finite
_SCALARS = frozenset({str, int, float, bool, type(None)})
_CHUNK_BYTES = 2**16
_MAX_SHOWN_CHARS = 100  # of an address


def parse_json(text: str | bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON.

    Args:
        constant: Makes a value of `NaN`, `Infinity` and `-Infinity`; None makes floats.

    Raises:
        ValueError: It is no JSON, or is nested deeper than `MAX_DEPTH`, has more than `MAX_CONTAINERS` lists and
            objects, or an integer of more than 4,300 digits.
    """
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        # The slow parser has the last word, also where the fast one is strict: NaN, half a surrogate, 1e400.
        try:
            value = json.loads(text, parse_constant=constant)
        except RecursionError:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    if _num_brackets(text) > MAX_DEPTH:
        check_depth(value)
    return value


def check_portable(text: str) -> None:
    """Check that JSON, which a policy wrote, can be read by everyone who gets it: it has no NaN, no half of a
    surrogate, no number without end, and at most `MAX_DEPTH` levels. Raises `ValueError`."""
    try:
        check_depth(msgspec.json.decode(text.encode()))
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    json.loads(text)  # refuses integers of more than 4,300 digits


# An escape of a whole character beyond the first plane, of half of one, or another one.
_HALF = rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>" + _HALF + rb")|\\.", re.DOTALL
)


def without_halves(body: bytes) -> bytes:
    """Return JSON in whose texts escapes of half a surrogate are six plain characters: no UTF-8 has halves."""
    return _ESCAPE.sub(lambda found: b"\\" * (found["half"] is not None) + found[0], body)


def _num_brackets(text: str | bytes) -> int:
    """Return a number that no depth and no number of containers in a JSON text exceeds; counting is cheap."""
    return text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")


def check_depth(value: Any) -> None:
    """Check that a value of lists and dictionaries can be walked; it may hold itself, as YAML can say. Raises
    `ValueError`: it is nested deeper than `MAX_DEPTH`, or has more than `MAX_CONTAINERS` lists and objects, each
    counted as often as it is found."""
    level, total = [value] if isinstance(value, dict | list) else [], 0
    for _ in range(MAX_DEPTH):
        level = list(itertools.islice(_containers(level), MAX_CONTAINERS))
        total += len(level)
        if not level:
            return
        if total >= MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS:,} lists and objects")
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _containers(level: list[Any]) -> Iterator[Any]:
    for node in level:
        children = node.values() if isinstance(node, dict) else node
        if not _SCALARS.issuperset(map(type, children)):  # long lists of numbers are common
            yield from (child for child in children if isinstance(child, dict | list))


def shape_problem(value: Any, shape: Any) -> str | None:
    """Say how a parsed JSON value differs from a type, e.g. ``Expected `int`, got `str` - at `$.a[0]` ``; else None.

    Args:
        value: The value; fields that the type does not have may be anything.
        shape: A type as msgspec reads it: a `Struct`, a `TypedDict`, `list[int]`, …
    """
    try:
        msgspec.convert(value, shape)
    except UnicodeEncodeError:  # half a surrogate in a key, which says nothing about types
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        return shape_problem(json.loads(text), shape)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def require_shape(value: Any, shape: Any) -> Any:
    """Return a value of this type. Raises `ValueError` for any other; see `shape_problem`."""
    if (problem := shape_problem(value, shape)) is not None:
        raise ValueError(problem)
    return value


def number(value: object) -> float | None:
    """Return a measurement; None for what is no number, not finite, or so large that sums of it are not."""
    if isinstance(value, bool | int | float) and -MAX_NUMBER <= value <= MAX_NUMBER:
        return float(value)
    return None


# -- HTTP -------------------------------------------------------------------------------------------------------------


class BodyTooLongError(ValueError):
    """An answer is longer than is read."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the answer is longer than {limit:,} bytes")


async def read_body(response: aiohttp.ClientResponse, limit: int = MAX_BODY_BYTES) -> bytes:
    """Read the body of an answer. Raises `BodyTooLongError`: it has more than `limit` bytes; `aiohttp.ClientError`:
    the connection broke."""
    body = await read_beginning(response, limit + 1)
    if len(body) > limit:
        raise BodyTooLongError(limit)
    return body


async def read_beginning(response: aiohttp.ClientResponse, limit: int = MAX_ERROR_BYTES) -> bytes:
    """Read the body of an answer, or the first `limit` bytes of it."""
    chunks, room = [], limit
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        chunks.append(chunk[:room])
        room -= len(chunks[-1])
        if room == 0:
            break
    return b"".join(chunks)


def read_response(response: requests.Response, limit: int = MAX_BODY_BYTES) -> bytes:
    """Read the body of an answer to a request that was sent with `stream=True`; it is closed if that fails. Raises
    `BodyTooLongError`: it has more than `limit` bytes; `requests.RequestException`: the connection broke."""
    chunks, size = [], 0
    for chunk in response.iter_content(_CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            response.close()
            raise BodyTooLongError(limit)
    return b"".join(chunks)


def redirect_problem(url: str, status: int, location: str | None) -> str | None:
    """Say where an answer redirects to; None if it does not.

    Redirects are not followed: what is sent along (a task, a key) is for the server that was asked.

    Args:
        location: Its `Location` header.
    """
    if not 300 <= status < 400:
        return None
    try:
        host = urlsplit(urljoin(url, location or "")).netloc.rpartition("@")[2] if location else "nowhere"
    except ValueError:
        host = repr(location)
    return f"HTTP {status}: it redirects to {host[:_MAX_SHOWN_CHARS]}, and redirects are not followed"
