"""Which rollout may start next: caps and launch rates of the rank and of each agent, fair between agents.

A rollout that waits holds nothing. When a place is free it goes to the agent that has the fewest running rollouts, so
an environment whose rollouts hang can fill its share and no more: the others go on in theirs.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from trl_gym.rollouts.budgets import Budgets


class Admission:
    """Belongs to one event loop.

    Args:
        budgets: Caps and rates.
    """

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._running: Counter[str] = Counter()
        self._next_start: dict[str | None, float] = {}  # by agent; of the rank under None
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def place(self, agent: str) -> AsyncIterator[None]:
        """Wait for a place and hold it. First come, first served among the rollouts of one agent."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(agent, deque()).append(turn)
        # Not at once: those who ask in the same turn of the loop, as a batch does, are chosen from together.
        self._come_back(asyncio.get_running_loop().time())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted and cancelled at once
                self._leave(agent)
            raise
        try:
            yield
        finally:
            self._leave(agent)

    def _leave(self, agent: str) -> None:
        self._running[agent] -= 1
        self._admit()

    def _admit(self) -> None:
        """Let in whoever may start now; come back when a rate allows the next."""
        now = asyncio.get_running_loop().time()
        while self._running.total() < self._budgets.max_inflight:
            agents = [agent for agent in list(self._waiting) if self._has_waiting(agent) and self._has_place(agent)]
            if not agents:
                return
            opens = {agent: max(self._next_start.get(agent, now), self._next_start.get(None, now)) for agent in agents}
            ready = [agent for agent in agents if opens[agent] <= now]
            if not ready:
                self._come_back(min(opens.values()))
                return
            agent = min(ready, key=self._running.__getitem__)
            self._waiting[agent].popleft().set_result(None)
            self._running[agent] += 1
            self._count_start(agent, now)

    def _has_waiting(self, agent: str) -> bool:
        waiting = self._waiting[agent]
        while waiting and waiting[0].done():  # cancelled while it waited
            waiting.popleft()
        if not waiting:
            del self._waiting[agent]
        return bool(waiting)

    def _has_place(self, agent: str) -> bool:
        cap = self._budgets.budget_for(agent).max_inflight
        return cap is None or self._running[agent] < cap

    def _count_start(self, agent: str, now: float) -> None:
        for key, rate in ((None, self._budgets.launch_rate), (agent, self._budgets.budget_for(agent).launch_rate)):
            if rate is not None:
                self._next_start[key] = max(self._next_start.get(key, now), now) + 1 / rate

    def _come_back(self, at: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._timed_admit)

    def _timed_admit(self) -> None:
        self._timer = None
        self._admit()
