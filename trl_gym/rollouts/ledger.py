"""The policy server's records of a rollout's model calls: fetched when the rollout has ended, and matched to the calls
in Gym's answer.

A request per rollout and not one per batch: the journal's line is written when the rollout ends, so that a crash loses
nothing, and needs them. It takes about a millisecond, while other rollouts go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import root_url, server_urls
from trl_gym.policy_server.middleware.ledger import CallRecord
from trl_gym.rollouts.trajectory import ModelCall

RECORDS_PATH = "/trl_gym/rollouts/records"
CANCEL_PATH = "/trl_gym/rollouts/cancel"
_TIMEOUT_S = 60.0
_PEEK_TIMEOUT_S = 5.0  # for questions that only a person waits for
_PAUSES_S = (0.1, 0.3)  # after a broken connection


@dataclass(frozen=True, slots=True)
class CallState:
    """The model calls of a rollout that has not ended."""

    num_answered: int  # calls that were answered
    num_running: int | None  # calls that are being answered; None where the server does not say


def ledger_for(base_urls: str | Sequence[str], api_key: str | None = None) -> Ledger:
    """Return the ledger of a policy server, or of several.

    Args:
        base_urls: Their base URLs; see `server_urls`.
        api_key: The bearer token of all of them.
    """
    ledgers = [RolloutLedger(root_url(url), api_key) for url in server_urls(base_urls)]
    return ledgers[0] if len(ledgers) == 1 else FleetLedger(ledgers)


class RolloutLedger:
    """Records and cancellation of rollouts at one policy server, for a running event loop.

    Args:
        root_url: Address of the server, without `/v1`.
        api_key: Its bearer token, if it demands one.
    """

    def __init__(self, root_url: str, api_key: str | None = None) -> None:
        self._root_url = root_url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def take(self, session: aiohttp.ClientSession, rollout_id: str) -> list[CallRecord]:
        """Fetch the records of a rollout that has ended, in the order of its calls; the server forgets them.

        Raises:
            PolicyServerError: The server cannot be reached, or keeps no records.
        """
        body = {"rollouts": [rollout_id], "forget": True}
        return (await self._post(session, RECORDS_PATH, body, _TIMEOUT_S))["records"][rollout_id]

    async def peek(self, session: aiohttp.ClientSession, rollout_ids: Sequence[str]) -> dict[str, CallState]:
        """Return the state of rollouts that have not ended, one entry per id. Nothing is forgotten.

        Raises:
            PolicyServerError: See `take`.
        """
        body = {"rollouts": list(rollout_ids), "forget": False}
        answer = await self._post(session, RECORDS_PATH, body, _PEEK_TIMEOUT_S)
        running = answer.get("running", {})  # a gateway of an older trl-gym does not say
        return {
            name: CallState(num_answered=len(answer["records"][name]), num_running=running.get(name))
            for name in rollout_ids
        }

    async def ping(self, session: aiohttp.ClientSession, *, timeout_s: float = _PEEK_TIMEOUT_S) -> str | None:
        """Ask which process answers.

        Returns:
            A name that differs from process to process, or `""` from one that is slow, complains or does not say; None
            when nothing listens at the server's address any more.
        """
        try:
            answer = await self._post_once(session, RECORDS_PATH, {"rollouts": [], "forget": False}, timeout_s)
        except PolicyServerError as error:
            return None if isinstance(error.__cause__, aiohttp.ClientConnectorError) else ""
        return answer.get("instance") or ""

    def describe_silence(self) -> str:
        return f"The policy server at {self._root_url} refuses connections: it has ended, or its network is gone."

    async def cancel(
        self, session: aiohttp.ClientSession, rollout_ids: Sequence[str], *, timeout_s: float = _TIMEOUT_S
    ) -> None:
        """End rollouts that nobody waits for. NeMo Gym before 0.7 goes on with a rollout whose client has left.

        Raises:
            PolicyServerError: See `take`.
        """
        await self._post(session, CANCEL_PATH, {"rollouts": list(rollout_ids)}, timeout_s)

    async def _post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        """Post with a few tries.

        A network that drops a connection now and then is no reason to give a batch up, and a connection that the
        server closed while it idled has lost nothing. An answer with records that was lost on the way cannot be had
        again; then there are none, which says "not known".
        """
        for pause_s in _PAUSES_S:
            try:
                return await self._post_once(session, path, body, timeout_s)
            except PolicyServerError as error:
                if not isinstance(error.__cause__, aiohttp.ClientConnectionError):
                    raise
            await asyncio.sleep(pause_s)
        return await self._post_once(session, path, body, timeout_s)

    async def _post_once(self, session: aiohttp.ClientSession, path: str, body: Any, timeout_s: float) -> Any:
        url = f"{self._root_url}{path}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with session.post(url, json=body, headers=self._headers, timeout=timeout) as response:
                if response.status == 200:
                    return await response.json()
                text = (await response.text())[:500]
        except TimeoutError as error:
            raise PolicyServerLostError(f"POST {url}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise PolicyServerLostError(f"POST {url}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise PolicyServerError(f"POST {url}: {type(error).__name__}: {error}") from error
        if response.status != 404:
            raise PolicyServerError(f"POST {url}: HTTP {response.status}: {text}")
        raise PolicyServerError(
            f"POST {url}: HTTP 404: {text}. This server keeps no records of rollouts: another version of trl-gym "
            "started it.",
            "Restart it with the installed one (`trl-gym serve MODEL` or `trl-gym gateway --upstream URL`).",
        )


class FleetLedger:
    """Records and cancellation at several policy servers: a rollout's calls are with the one that NeMo Gym has chosen
    for it, which only Gym knows, so all are asked.

    Args:
        ledgers: One per server.
    """

    def __init__(self, ledgers: Sequence[RolloutLedger]) -> None:
        self._ledgers = tuple(ledgers)
        self._silent: tuple[RolloutLedger, ...] = ()

    async def take(self, session: aiohttp.ClientSession, rollout_id: str) -> list[CallRecord]:
        parts = await asyncio.gather(*(ledger.take(session, rollout_id) for ledger in self._ledgers))
        return [record for part in parts for record in part]

    async def peek(self, session: aiohttp.ClientSession, rollout_ids: Sequence[str]) -> dict[str, CallState]:
        parts = await asyncio.gather(*(ledger.peek(session, rollout_ids) for ledger in self._ledgers))
        return {name: _sum_of([part[name] for part in parts]) for name in rollout_ids}

    async def ping(self, session: aiohttp.ClientSession) -> str | None:
        """Return None when any of them is gone: its rollouts cannot go on."""
        who = await asyncio.gather(*(ledger.ping(session) for ledger in self._ledgers))
        self._silent = tuple(one for one, answer in zip(self._ledgers, who, strict=True) if answer is None)
        if self._silent:
            return None
        names = [name for name in who if name]
        return "+".join(names) if len(names) == len(who) else ""

    def describe_silence(self) -> str:
        return " ".join(ledger.describe_silence() for ledger in self._silent)

    async def cancel(
        self, session: aiohttp.ClientSession, rollout_ids: Sequence[str], *, timeout_s: float = _TIMEOUT_S
    ) -> None:
        await asyncio.gather(*(ledger.cancel(session, rollout_ids, timeout_s=timeout_s) for ledger in self._ledgers))


Ledger = RolloutLedger | FleetLedger


def _sum_of(states: Sequence[CallState]) -> CallState:
    running = [state.num_running for state in states if state.num_running is not None]
    return CallState(sum(state.num_answered for state in states), sum(running) if running else None)


def match_records(calls: Sequence[ModelCall], records: Sequence[CallRecord]) -> list[CallRecord] | None:
    """Return the record of each model call, or None where matching would be a guess.

    Calls that failed, or sampled nothing, have no tokens in Gym's answer and are left out. What remains must agree
    call by call in the number of prompt and sampled tokens: an answer that Gym dropped (a retry) or put elsewhere (a
    judge that uses the policy) makes all of it doubtful.

    Args:
        calls: `[N]`, from Gym's answer.
        records: Records of the same rollout, in order.

    Returns:
        `[N]` records.
    """
    answered = [record for record in records if record["status"] == 200 and record["completion_tokens"] != 0]
    sizes = [(record["prompt_tokens"], record["completion_tokens"]) for record in answered]
    expected = [(len(call.prompt_ids), len(call.generation_ids)) for call in calls]
    return answered if sizes == expected else None


def weight_versions(records: Sequence[CallRecord]) -> list[str]:
    """Return the versions that answered a rollout's calls, each once, in order of use."""
    versions = (record["weight_version"] for record in records if record["status"] == 200)
    return list(dict.fromkeys(version for version in versions if version is not None))
