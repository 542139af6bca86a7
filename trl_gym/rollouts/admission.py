"""Budgets of environments, and admission: caps and launch rates of the rank and of each agent, fair between agents.

One `Budget` per agent: the options of the run, overruled by those that `gym_environments` has for that agent. A
rollout that waits holds nothing. When a place is free it goes to the agent that has the fewest running rollouts, so an
environment whose rollouts hang can fill its share and no more: the others go on in theirs. Among the rollouts of one
agent those of the older collection go first, also further attempts: training waits for them first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from trl_gym.errors import ConfigError, FailureKind
from trl_gym.rollout_options import RolloutOptions, by_kind

# -- budgets: seconds, places, starts per second and further attempts of each environment -----------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limits of one agent's rollouts."""

    deadline_s: float  # seconds from dispatch to the answer
    max_inflight: int | None = None  # rollouts of this agent at the same time; None leaves it to the cap of the rank
    # Rollouts of this agent started per second; None leaves it to the rate of the rank.
    launch_rate: float | None = None
    # Further attempts by kind of failure; a kind that is missing has none.
    retries: Mapping[FailureKind, int] = field(default_factory=dict)

    def retried_kinds(self, failed: Mapping[FailureKind, int]) -> frozenset[FailureKind]:
        """Return the kinds of failure that would be followed by another attempt.

        Args:
            failed: Number of the rollout's attempts that have failed so far, by kind.
        """
        return frozenset(kind for kind, allowed in self.retries.items() if failed.get(kind, 0) < allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The budgets of a rank."""

    default: Budget  # the budget of an agent without one of its own
    max_inflight: int  # rollouts at the same time, over all agents
    launch_rate: float | None = None  # rollouts started per second, over all agents; None for no limit
    own: Mapping[str, Budget] = field(default_factory=dict)  # budgets of single agents

    def budget_for(self, agent: str) -> Budget:
        return self.own.get(agent, self.default)

    def check_agents(self, known: Collection[str]) -> None:
        """
        Raises:
            ConfigError: A budget is for an agent that the running Gym does not have.
        """
        problems = []
        for agent in self.own:
            if agent not in known:
                closest = difflib.get_close_matches(agent, known, n=1)
                hint = f" Did you mean {closest[0]!r}?" if closest else ""
                problems.append(f"`gym_environments` names {agent!r}, which is no agent of this NeMo Gym.{hint}")
        if problems:
            listed = ", ".join(sorted(known)) or "none"
            raise ConfigError("\n".join(problems), f"Use one of its agents: {listed}.")


def budgets_from_options(options: RolloutOptions) -> Budgets:
    """Make budgets from options that were checked.

    An agent's `retries` replace those of the kinds that they name; the other kinds keep the run's.
    """
    default = Budget(deadline_s=options.deadline, retries=_by_kind(options.retries))
    own = {agent: _own_budget(changes, default) for agent, changes in options.environments.items()}
    return Budgets(default=default, max_inflight=options.max_inflight, launch_rate=options.launch_rate, own=own)


def _own_budget(changes: Mapping[str, Any], default: Budget) -> Budget:
    cap = changes.get("max_inflight")
    return dataclasses.replace(
        default,
        deadline_s=float(changes.get("deadline", default.deadline_s)),
        max_inflight=None if cap is None else int(cap),
        launch_rate=changes.get("launch_rate"),
        retries={**default.retries, **_by_kind(by_kind(changes.get("retries") or {}))},
    )


def _by_kind(retries: Mapping[str, int]) -> dict[FailureKind, int]:
    return {FailureKind(kind): number for kind, number in retries.items()}


# -- places -----------------------------------------------------------------------------------------------------------


class Admission:
    """Gives out places for rollouts, within one event loop.

    Args:
        budgets: Caps and rates.
    """

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._waiting: dict[str, list[tuple[float, int, asyncio.Future[None]]]] = {}  # heaps
        self._numbers = itertools.count()
        self._running: Counter[str] = Counter()
        self._next_start: dict[str | None, float] = {}  # by agent; of the rank under None
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def place(self, agent: str, since: float = 0.0) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Args:
            since: When its collection began. Among the rollouts of an agent the least goes first; of equals, who came
                first.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting.setdefault(agent, []), (since, next(self._numbers), turn))
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
            *_, turn = heapq.heappop(self._waiting[agent])
            turn.set_result(None)
            self._running[agent] += 1
            self._count_start(agent, now)

    def _has_waiting(self, agent: str) -> bool:
        waiting = self._waiting[agent]
        while waiting and waiting[0][-1].done():  # cancelled while it waited
            heapq.heappop(waiting)
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
