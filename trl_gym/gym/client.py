"""Run a rollout: one `POST /run` at an agent server, and what its answer or its error means.

A failure is a value, not an exception: a rollout that fails must not cancel its siblings.

Gym's servers pass an error on as the `repr` of the bytes that they received, inside a JSON string, once per server:

    "Hit an exception in SimpleAgent___math_agent calling an inner server: b'\\"Hit an exception in VLLMModel___…\\"'"

Two hops already mean three layers of quotes. `read_error` peels them off, in time that grows with the length of what
is read: neither the number of servers nor the text inside of a literal is believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import aiohttp

from trl_gym.dataset import body_of
from trl_gym.errors import FailureKind, RolloutFailure, error_body_text
from trl_gym.gym.discovery import AgentInfo
from trl_gym.responses import answer_problem
from trl_gym.supervisor import OPEN_FILES, raise_open_files
from trl_gym.untrusted import (
    MAX_ERROR_BYTES,
    BodyTooLongError,
    number,
    parse_json,
    read_beginning,
    read_body,
    redirect_problem,
)

_SPARE_CONNECTIONS = 16
# Gym's servers close a connection that has idled for 5 s; a row sent at that moment would be lost.
_KEEP_ALIVE_S = 2.0
_MAX_BODY_CHARS = 200  # quoted of an answer that cannot be used
MAX_TEXT_CHARS = 2000  # of one message: a verifier may put a whole response into its exception
MAX_ANSWER_BYTES = 256 * 2**20  # of one rollout
MAX_REWARD = 1e15  # TRL adds up a group's rewards, and their squares, in float32
_MAX_HOPS = 16  # servers that have passed an error on
_SEARCHED_CHARS = 20_000  # at the beginning and at the end of a message

# `<class>___<instance name>` is the session key by which Gym's servers call themselves.
_HOP = re.compile(
    r"^Hit an exception in (?:\S{1,200}?___)?(?P<server>.{1,200}?) calling an inner server: (?P<answer>.*)$", re.DOTALL
)
# What `repr` writes of bytes, and nothing else.
_BYTES_LITERAL = re.compile(
    r"""b'([^'\\]*+(?:\\(?:[\\'nrt]|x[0-9a-f]{2})[^'\\]*+)*+)'|b"([^"\\]*+(?:\\(?:[\\nrt]|x[0-9a-f]{2})[^"\\]*+)*+)\""""
)
# Words of aiohttp, requests, Ray and Gym's own middleware for a cause outside the environment's code.
_INFRASTRUCTURE = re.compile(
    r"Cannot connect to host|Connect call failed|Connection (?:refused|reset|closed|aborted)|Connection\w{0,40}Error|"
    r"Client(?:Connector|OS|Payload)\w{0,40}Error|Server(?:Disconnected|Timeout)\w{0,40}Error|Server disconnected|"
    r"Broken pipe|BrokenPipeError|Too many open files|No space left|Out of memory|MemoryError|"
    r"An unknown error occurred|Request was cancelled",
    re.IGNORECASE,
)
_TOO_MANY_FILES = "Too many open files"
_NO_CAUSE = frozenset({"", "Internal Server Error"})


@dataclass(frozen=True, slots=True)
class GymAnswer:
    """A finished rollout."""

    # Gym's answer to `/run`: `responses_create_params`, `response`, `reward` (finite) and whatever the environment
    # adds.
    result: dict[str, Any]
    seconds: float  # time from sending the row to having read the answer


def new_session(max_inflight: int) -> aiohttp.ClientSession:
    """Open a client for up to `max_inflight` rollouts at a time; close it on the loop that opened it.

    This process may open as many files from here on as its hard limit allows: a rollout in flight is a connection.

    It keeps no cookies: they carry Gym's environment sessions, and two rollouts with one session share their state.
    It has no total timeout, since `run_rollout` has a deadline, uses no proxy (aiohttp's default) and unpacks nothing.
    """
    raise_open_files()
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(
            limit=max_inflight + _SPARE_CONNECTIONS, limit_per_host=0, keepalive_timeout=_KEEP_ALIVE_S
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,  # of what is compressed all the same, a megabyte may hold a gigabyte
    )


async def feel_pulse(session: aiohttp.ClientSession, url: str) -> None:
    """Return when a server has answered anything, or cannot be reached."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        async with session.get(f"{url}/", allow_redirects=False):
            pass


async def run_rollout(
    session: aiohttp.ClientSession,
    agent: AgentInfo,
    row: Mapping[str, Any],
    *,
    deadline_s: float,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> GymAnswer | RolloutFailure:
    """Run one dataset row to its end.

    Args:
        row: Everything that Gym gets: `responses_create_params`, the verifier's fields, `_ng_*` ids.
        deadline_s: Seconds until the rollout is given up. Gym itself never gives up.
        headers: Further headers, by which a Gym that we started knows the rollout in every request made for it.

    Returns:
        The answer, or the failure. HTTP errors, redirects, broken connections, answers that are too long
        (`MAX_ANSWER_BYTES`), of another form or without a usable reward, and samples that the environment
        masks are failures.

    Raises:
        asyncio.CancelledError: If the calling task is cancelled.
        TypeError: If the row cannot be written as JSON.
    """
    where = f"{agent.name} /run"
    body = body_of(row)
    start = time.monotonic()
    try:
        async with agent.in_flight, asyncio.timeout(deadline_s) as deadline:
            url, headers = f"{agent.url}/run", {"Content-Type": "application/json", **headers}
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                status, location = response.status, response.headers.get("Location")
                answer = await (read_body(response, MAX_ANSWER_BYTES) if status == 200 else read_beginning(response))
    except BodyTooLongError as error:
        return _failure(FailureKind.ENVIRONMENT, str(error), where)
    except TimeoutError as error:
        if deadline.expired():
            return _failure(FailureKind.DEADLINE, f"no answer within {deadline_s:g} s", where)
        return _failure(FailureKind.INFRASTRUCTURE, f"{agent.url}: {error!r}", where)
    except (aiohttp.ClientError, OSError) as error:
        return _failure(FailureKind.INFRASTRUCTURE, f"{agent.url}: {type(error).__name__}: {error}", where)
    if (redirect := redirect_problem(url, status, location)) is not None:
        return _failure(FailureKind.ENVIRONMENT, redirect, where)
    if status != 200:
        return _failure(*read_error(answer, status), where)
    return _read_answer(answer, time.monotonic() - start, where)


def _read_answer(body: bytes, seconds: float, where: str) -> GymAnswer | RolloutFailure:
    """Check everything about an answer that the rest of the package relies on."""
    try:
        result = parse_json(body)
    except ValueError as error:
        text = f"the answer is not JSON that can be read ({error}): {_quoted(body)}"
        return _failure(FailureKind.ENVIRONMENT, text, where)
    if not isinstance(result, dict):
        return _failure(FailureKind.ENVIRONMENT, f"the answer is not a JSON object: {_quoted(body)}", where)
    if "episode_id" in result:  # 0.7: an environment server's envelope around result or failure
        envelope = result
        if envelope.get("failure"):
            return _declared_failure(envelope["failure"], "the environment server reports a failure", where)
        result = envelope.get("result")
        if not isinstance(result, dict):
            return _failure(FailureKind.ENVIRONMENT, f"neither `result` nor `failure`: {_quoted(body)}", where)
    if _is_masked(result):
        return _declared_failure(result, "the environment masked this sample", where)
    problem = _reward_problem(result) or answer_problem(result)
    if problem is not None:
        return _failure(FailureKind.ENVIRONMENT, f"the answer cannot be used: {problem}", where)
    return GymAnswer(result=result, seconds=seconds)


def _reward_problem(result: Mapping[str, Any]) -> str | None:
    reward = result.get("reward")
    value = None if isinstance(reward, bool) else number(reward)
    if value is not None and abs(value) <= MAX_REWARD:
        return None
    got = f"`reward` is {_shortened(repr(reward), _MAX_BODY_CHARS)}" if "reward" in result else "there is no `reward`"
    return f"a finite number is needed as reward, of {MAX_REWARD:g} at most, but {got}"


def _is_masked(result: Mapping[str, Any]) -> bool:
    """Tell whether the environment says that the reward measures nothing.

    A `mask_sample` in the answer (0.7: always there) decides alone. Gym documents `failure_kind` as independent of
    it: a sample that degraded and was still measured validly has a kind and is not masked.
    """
    instance_config = result.get("instance_config")  # the SWE agents put it there
    if isinstance(instance_config, Mapping) and instance_config.get("mask_sample"):
        return True
    if "mask_sample" in result:
        return bool(result["mask_sample"])
    return bool(result.get("failure_kind"))


def _declared_failure(record: Any, what: str, where: str) -> RolloutFailure:
    """Make a failure of `failure_kind`, `failure_reason` and `stage`, as Gym 0.7 names them."""
    fields = record if isinstance(record, Mapping) else {"failure_reason": str(record)}
    failure_kind = str(fields.get("failure_kind") or "")
    details = [
        _shortened(str(fields[key]), MAX_TEXT_CHARS)
        for key in ("stage", "failure_kind", "failure_reason")
        if fields.get(key)
    ]
    is_transport = failure_kind.startswith("transport_")
    kind = FailureKind.INFRASTRUCTURE if is_transport else FailureKind.ENVIRONMENT
    return _failure(kind, ": ".join([what, *details]), where)


def _failure(kind: FailureKind, text: str, where: str) -> RolloutFailure:
    if _TOO_MANY_FILES in text:
        text = (
            f"{text}. The limit of open files is {raise_open_files()} here, as the hard limit demands. Raise that one "
            f"(`ulimit -Hn`, `--ulimit nofile` of a container, `LimitNOFILE` of a service) to {OPEN_FILES}, or "
            "lower `gym_max_inflight`"
        )
    return RolloutFailure(kind=kind, text=text, where=where)


def read_error(body: bytes, status: int) -> tuple[FailureKind, str]:
    """Return a kind and one sentence for an HTTP answer other than 200.

    Returns:
        INFRASTRUCTURE if the innermost message speaks of connections or does not exist, otherwise ENVIRONMENT. The
        sentence names the servers on the way, outermost first.
    """
    servers, message = unwrap(body)
    if message in _NO_CAUSE:
        text = f"HTTP {status} without a cause (Gym's log may have it)"
        kind = FailureKind.INFRASTRUCTURE
    else:
        text = _shortened(message, MAX_TEXT_CHARS)
        searched = message[:_SEARCHED_CHARS] + message[_SEARCHED_CHARS:][-_SEARCHED_CHARS:]
        is_infrastructure = status in (404, 502, 503, 504) or _INFRASTRUCTURE.search(searched)
        kind = FailureKind.INFRASTRUCTURE if is_infrastructure else FailureKind.ENVIRONMENT
        if status != 500:
            text = f"HTTP {status}: {text}"
    if servers:
        text = f"{' → '.join(servers)} → the server that it called: {text}"
    return kind, text


def unwrap(body: bytes) -> tuple[list[str], str]:
    """Return the servers that passed the error on, outermost first and each once, and the innermost message."""
    servers: list[str] = []
    text = error_body_text(body[:MAX_ERROR_BYTES])
    for _ in range(_MAX_HOPS):
        hop = _HOP.match(text)
        if hop is None:
            break
        if hop["server"] not in servers[-1:]:  # an agent calls its own /v1/responses
            servers.append(hop["server"])
        answer = _bytes_literal(hop["answer"])
        if answer is None:  # cut off by a logger, or quoted in an unknown way: better raw than lost
            return servers, hop["answer"].strip()
        text = error_body_text(answer)
    return servers, text


def _bytes_literal(text: str) -> bytes | None:
    """Read the `repr` of bytes, without evaluating it; None for anything else."""
    literal = _BYTES_LITERAL.fullmatch(text.strip())
    if literal is None or not text.isascii():
        return None
    inside = literal[1] if literal[1] is not None else literal[2]
    return inside.encode("ascii").decode("unicode_escape").encode("latin-1")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _quoted(body: bytes) -> str:
    return repr(_shortened(body[: 4 * _MAX_BODY_CHARS].decode(errors="replace"), _MAX_BODY_CHARS))
