"""One rollout is one HTTP call: `POST /run` at an agent server.

Failures are values, not exceptions: a rollout that fails must not cancel its siblings.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.gym.discovery import AgentInfo
from trl_gym.gym.error_text import explain

_SPARE_CONNECTIONS = 16
# Gym's servers close a connection that has idled for 5 s; a row sent at that moment would be lost.
_KEEP_ALIVE_S = 2.0


@dataclass(frozen=True, slots=True)
class GymAnswer:
    """A finished rollout.

    Attributes:
        result: Gym's answer to `/run`: `responses_create_params`, `response`, `reward` (finite) and whatever the
            environment adds.
        seconds: From sending the row to having read the answer.
    """

    result: dict[str, Any]
    seconds: float


def new_session(max_inflight: int) -> aiohttp.ClientSession:
    """A client for up to `max_inflight` rollouts at a time; close it on the loop that made it.

    No cookies are kept: they carry Gym's environment sessions, and two rollouts that share one share their state.
    There is no total timeout either, since `run_rollout` has a deadline of its own.
    """
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(
            limit=max_inflight + _SPARE_CONNECTIONS, limit_per_host=0, keepalive_timeout=_KEEP_ALIVE_S
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
    )


async def run_rollout(
    session: aiohttp.ClientSession, agent: AgentInfo, row: Mapping[str, Any], *, deadline_s: float
) -> GymAnswer | RolloutFailure:
    """Run one dataset row to its end.

    Args:
        session: See `new_session`.
        agent: The agent server that runs it.
        row: Everything Gym gets: `responses_create_params`, the verifier's fields, `_ng_*` ids.
        deadline_s: Seconds after which the rollout is given up. Gym itself never gives up.

    Returns:
        The answer, or why there is none. HTTP errors, broken connections, answers without a usable reward and
        samples that the environment masks are all failures.

    Raises:
        asyncio.CancelledError: If the calling task is cancelled.
        TypeError: If the row cannot be written as JSON.
    """
    where = f"{agent.name} /run"
    body = json.dumps(_without_nulls(row)).encode()
    start = time.monotonic()
    try:
        async with asyncio.timeout(deadline_s) as deadline:
            headers = {"Content-Type": "application/json"}
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
        return _failure(*explain(answer, status), where)
    return _read_answer(answer, time.monotonic() - start, where)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """0.4.0 answers 500 to `"metadata": null`; for every other parameter null means the same as leaving it out."""
    parameters = row.get("responses_create_params")
    if not isinstance(parameters, Mapping):
        return dict(row)
    return {**row, "responses_create_params": {key: value for key, value in parameters.items() if value is not None}}


def _read_answer(body: bytes, seconds: float, where: str) -> GymAnswer | RolloutFailure:
    try:
        result = json.loads(body)
    except ValueError:
        return _failure(FailureKind.ENVIRONMENT, f"the answer is not JSON: {_start_of(body)}", where)
    if not isinstance(result, dict):
        return _failure(FailureKind.ENVIRONMENT, f"the answer is not a JSON object: {_start_of(body)}", where)
    if "episode_id" in result:  # 0.7: an environment server's envelope around result or failure
        envelope = result
        if envelope.get("failure"):
            return _declared_failure(envelope["failure"], "the environment server reports a failure", where)
        result = envelope.get("result")
        if not isinstance(result, dict):
            return _failure(FailureKind.ENVIRONMENT, f"neither `result` nor `failure`: {_start_of(body)}", where)
    if _is_masked(result):
        return _declared_failure(result, "the environment masked this sample", where)
    reward = result.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        got = f"`reward` is {reward!r}" if "reward" in result else "there is no `reward`"
        return _failure(FailureKind.ENVIRONMENT, f"a finite number is needed as reward, but {got}", where)
    return GymAnswer(result=result, seconds=seconds)


def _is_masked(result: Mapping[str, Any]) -> bool:
    """Whether the environment says that the reward measures nothing.

    With a `mask_sample` in the answer (0.7: in every one) it alone decides. Gym documents `failure_kind` as
    independent of it: a sample that degraded and was still measured validly has a kind and is not masked.
    """
    instance_config = result.get("instance_config")  # where the SWE agents put it
    if isinstance(instance_config, Mapping) and instance_config.get("mask_sample"):
        return True
    if "mask_sample" in result:
        return bool(result["mask_sample"])
    return bool(result.get("failure_kind"))


def _declared_failure(record: Any, what: str, where: str) -> RolloutFailure:
    """From `failure_kind`, `failure_reason` and `stage` as Gym 0.7 names them."""
    fields = record if isinstance(record, Mapping) else {"failure_reason": str(record)}
    failure_kind = str(fields.get("failure_kind") or "")
    details = [str(fields[key]) for key in ("stage", "failure_kind", "failure_reason") if fields.get(key)]
    is_transport = failure_kind.startswith("transport_")
    kind = FailureKind.INFRASTRUCTURE if is_transport else FailureKind.ENVIRONMENT
    return _failure(kind, ": ".join([what, *details]), where)


def _failure(kind: FailureKind, text: str, where: str) -> RolloutFailure:
    return RolloutFailure(kind=kind, text=text, where=where)


def _start_of(body: bytes) -> str:
    text = body[:200].decode(errors="replace")
    return repr(text + ("…" if len(body) > 200 else ""))
