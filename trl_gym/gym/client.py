"""Run a rollout: one `POST /run` at an agent server, and what its answer or its error means.

A failure is a value, not an exception: a rollout that fails must not cancel its siblings.

Gym's servers pass an error on as the `repr` of the bytes that they received, inside a JSON string, once per server:

    "Hit an exception in SimpleAgent___math_agent calling an inner server: b'\\"Hit an exception in VLLMModel___…\\"'"

Two hops already mean three layers of quotes. `read_error` peels them off.
"""

from __future__ import annotations

import ast
import asyncio
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import aiohttp

from trl_gym.errors import FailureKind, RolloutFailure, error_body_text
from trl_gym.gym.discovery import AgentInfo

_SPARE_CONNECTIONS = 16
# Gym's servers close a connection that has idled for 5 s; a row sent at that moment would be lost.
_KEEP_ALIVE_S = 2.0
_MAX_BODY_CHARS = 200  # quoted of an answer that cannot be used
MAX_TEXT_CHARS = 2000  # of one message: a verifier may put a whole response into its exception

# `<class>___<instance name>` is the session key by which Gym's servers call themselves.
_HOP = re.compile(
    r"^Hit an exception in (?:\S+?___)?(?P<server>.+?) calling an inner server: (?P<answer>.*)$", re.DOTALL
)
# Words of aiohttp, requests, Ray and Gym's own middleware for a cause outside the environment's code.
_INFRASTRUCTURE = re.compile(
    r"Cannot connect to host|Connect call failed|Connection (?:refused|reset|closed|aborted)|Connection\w*Error|"
    r"Client(?:Connector|OS|Payload)\w*Error|Server(?:Disconnected|Timeout)\w*Error|Server disconnected|"
    r"Broken pipe|BrokenPipeError|Too many open files|No space left|Out of memory|MemoryError|"
    r"An unknown error occurred|Request was cancelled",
    re.IGNORECASE,
)
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

    It keeps no cookies: they carry Gym's environment sessions, and two rollouts with one session share their state.
    It has no total timeout, since `run_rollout` has a deadline, and uses no proxy (aiohttp's default).
    """
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(
            limit=max_inflight + _SPARE_CONNECTIONS, limit_per_host=0, keepalive_timeout=_KEEP_ALIVE_S
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
    )


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
        session: See `new_session`.
        agent: The agent server that runs it.
        row: Everything that Gym gets: `responses_create_params`, the verifier's fields, `_ng_*` ids.
        deadline_s: Seconds until the rollout is given up. Gym itself never gives up.
        headers: Further headers, by which a Gym that we started knows the rollout in every request made for it.

    Returns:
        The answer, or the failure. HTTP errors, broken connections, answers without a usable reward and samples that
        the environment masks are failures.

    Raises:
        asyncio.CancelledError: If the calling task is cancelled.
        TypeError: If the row cannot be written as JSON.
    """
    where = f"{agent.name} /run"
    body = json.dumps(_without_nulls(row)).encode()
    start = time.monotonic()
    try:
        async with asyncio.timeout(deadline_s) as deadline:
            headers = {"Content-Type": "application/json", **headers}
            async with session.post(f"{agent.url}/run", data=body, headers=headers) as response:
                answer = await response.read()
                status = response.status
    except TimeoutError as error:
        if deadline.expired():
            return _failure(FailureKind.DEADLINE, f"no answer within {deadline_s:g} s", where)
        return _failure(FailureKind.INFRASTRUCTURE, f"{agent.url}: {error!r}", where)
    except (aiohttp.ClientError, OSError) as error:
        return _failure(FailureKind.INFRASTRUCTURE, f"{agent.url}: {type(error).__name__}: {error}", where)
    if status != 200:
        return _failure(*read_error(answer, status), where)
    return _read_answer(answer, time.monotonic() - start, where)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out null parameters: Gym 0.4.0 answers 500 to `"metadata": null`; elsewhere null means the default."""
    parameters = row.get("responses_create_params")
    if not isinstance(parameters, Mapping):
        return dict(row)
    return {**row, "responses_create_params": {key: value for key, value in parameters.items() if value is not None}}


def _read_answer(body: bytes, seconds: float, where: str) -> GymAnswer | RolloutFailure:
    try:
        result = json.loads(body)
    except ValueError:
        return _failure(FailureKind.ENVIRONMENT, f"the answer is not JSON: {_quoted(body)}", where)
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
    reward = result.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        got = f"`reward` is {reward!r}" if "reward" in result else "there is no `reward`"
        return _failure(FailureKind.ENVIRONMENT, f"a finite number is needed as reward, but {got}", where)
    return GymAnswer(result=result, seconds=seconds)


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
    details = [str(fields[key]) for key in ("stage", "failure_kind", "failure_reason") if fields.get(key)]
    is_transport = failure_kind.startswith("transport_")
    kind = FailureKind.INFRASTRUCTURE if is_transport else FailureKind.ENVIRONMENT
    return _failure(kind, ": ".join([what, *details]), where)


def _failure(kind: FailureKind, text: str, where: str) -> RolloutFailure:
    return RolloutFailure(kind=kind, text=text, where=where)


def read_error(body: bytes, status: int) -> tuple[FailureKind, str]:
    """Return a kind and one sentence for an HTTP answer other than 200.

    Args:
        body: The answer's body as received.
        status: Its HTTP status.

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
        is_infrastructure = status in (404, 502, 503, 504) or _INFRASTRUCTURE.search(message)
        kind = FailureKind.INFRASTRUCTURE if is_infrastructure else FailureKind.ENVIRONMENT
        if status != 500:
            text = f"HTTP {status}: {text}"
    if servers:
        text = f"{' → '.join(servers)} → the server that it called: {text}"
    return kind, text


def unwrap(body: bytes) -> tuple[list[str], str]:
    """Return the servers that passed the error on, outermost first and each once, and the innermost message."""
    servers: list[str] = []
    text = error_body_text(body)
    while hop := _HOP.match(text):
        if hop["server"] not in servers[-1:]:  # an agent calls its own /v1/responses
            servers.append(hop["server"])
        answer = _bytes_literal(hop["answer"])
        if answer is None:  # cut off by a logger, or quoted in an unknown way: better raw than lost
            return servers, hop["answer"].strip()
        text = error_body_text(answer)
    return servers, text


def _bytes_literal(text: str) -> bytes | None:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, bytes) else None


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _quoted(body: bytes) -> str:
    return repr(_shortened(body.decode(errors="replace"), _MAX_BODY_CHARS))
