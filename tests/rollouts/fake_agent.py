"""What the collector talks to, without NeMo Gym and vLLM: an agent over real HTTP, and the policy server's ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.gym.servers import AgentInfo
from trl_gym.rollout_options import RolloutOptions
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.collector import RolloutCollector
from trl_gym.rollouts.ledger import CallState
from trl_gym.rollouts.request import RolloutRequest


class Agent:
    """`/run` does what the row says: `{"do": "answer" | "sleep" | "raise" | "drop", …}`. With `after`, it waits until
    so many have begun."""

    def __init__(self) -> None:
        self.running = self.most_at_once = self.started = self.cancelled = 0
        self.dropped: Counter[str] = Counter()
        self.received: list[tuple[dict[str, str], dict[str, Any]]] = []

    async def run(self, request: web.Request) -> web.StreamResponse:
        row = await request.json()
        self.received.append((dict(request.headers), row))
        self.started += 1
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            await asyncio.sleep(row.get("seconds", 0))
            while self.started < row.get("after", 0):
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if row.get("do") == "drop" and self.dropped[row["name"]] < row.get("times", 99):
            self.dropped[row["name"]] += 1
            request.transport.close()
        if row.get("do") == "raise":
            return web.json_response(row.get("text", "the verifier raised"), status=500)
        return web.json_response({"reward": row["value"], "response": {"output": []}})


class Ledger:
    """Plays the policy server's part; keeps what it was asked. With a root, it has an engine that never answers."""

    hang_timeout_s, busy_until = 0.1, 0.0

    def __init__(self, *roots: str) -> None:
        self.roots = roots
        self.taken: list[str] = []
        self.cancelled: list[list[str]] = []
        self.broken: PolicyServerError | None = None
        self.calls: dict[str, CallState] = {}
        self.answers = True
        self.instance = ""

    async def ping(self, session: Any) -> str | None:
        return self.instance if self.answers else None

    def describe_silence(self) -> str:
        return "the policy server refuses connections"

    async def ask_engine(self, session: Any, root: str) -> None:
        await asyncio.Event().wait()

    def hang_of(self, root: str) -> PolicyServerLostError:
        return PolicyServerLostError(f"the engine of {root} hangs")

    async def peek(self, session: Any, rollout_ids: Any) -> dict[str, CallState]:
        self._refuse()
        return {name: self.calls.get(name, CallState(0, 0)) for name in rollout_ids}

    async def take(self, session: Any, rollout_id: str) -> tuple[list[Any], str]:
        self._refuse()
        self.taken.append(rollout_id)
        return [{"status": 200, "of": rollout_id}], self.instance

    async def cancel(self, session: Any, rollout_ids: Any, *, timeout_s: float = 60.0) -> None:
        assert not session.closed
        await asyncio.sleep(0.05)
        self._refuse()
        self.cancelled.append(list(rollout_ids))

    def _refuse(self) -> None:
        if self.broken is not None:
            raise self.broken


def requests(*rows: dict[str, Any]) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            rollout_id=f"r{index}",
            task_index=index,
            group=0,
            member=index,
            attempt=0,
            agent=row.get("agent", "a"),
            row=_row(f"r{index}") | {"value": float(index), "name": f"r{index}"} | row,
        )
        for index, row in enumerate(rows)
    ]


def _row(rollout_id: str) -> dict[str, Any]:
    return {"responses_create_params": {"input": "x"}, "_ng_rollout_id": rollout_id}


def make(lookup: Callable[[str], AgentInfo], **options: Any) -> RolloutCollector[Any]:
    names = ("max_inflight", "retries", "launch_rate", "environments")
    limits = {"deadline": options.pop("deadline_s", 60.0), "max_inflight": 64, "retries": {}}
    limits |= {name: options.pop(name) for name in names if name in options}
    return RolloutCollector(lookup, budgets=budgets_from_options(RolloutOptions(**limits)), **options)


async def collect(lookup: Callable[[str], AgentInfo], rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Run the synchronous collector in a thread, as the trainer's thread would."""
    finish = options.pop("finish", lambda result: result)
    progress = options.pop("progress", None)
    collector = make(lookup, **options)
    try:
        return await asyncio.to_thread(collector.collect, requests(*rows), finish, progress)
    finally:
        await asyncio.to_thread(collector.close)
