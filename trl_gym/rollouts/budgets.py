"""What the rollouts of an environment may cost: seconds, places, starts per second, further attempts. Pure.

One `Budget` per agent: the options of the run, overruled by what `gym_environments` says about that agent.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_gym.errors import ConfigError, FailureKind

BACKOFF_S = 0.5  # before the second attempt, on average three quarters of it
MAX_BACKOFF_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the rollouts of one agent may cost.

    Attributes:
        deadline_s: Seconds from dispatch to the answer.
        max_inflight: Rollouts of this agent at the same time; None leaves it to the cap of the rank.
        launch_rate: Rollouts of this agent started per second; None leaves it to the rate of the rank.
        retries: Further attempts by kind of failure; a kind that is missing has none.
    """

    deadline_s: float
    max_inflight: int | None = None
    launch_rate: float | None = None
    retries: Mapping[FailureKind, int] = field(default_factory=dict)

    def retried_kinds(self, failed: Mapping[FailureKind, int]) -> frozenset[FailureKind]:
        """The kinds of failure that would be followed by another attempt.

        Args:
            failed: How many attempts of the rollout have failed so far, by kind.
        """
        return frozenset(kind for kind, allowed in self.retries.items() if failed.get(kind, 0) < allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The budgets of a rank.

    Attributes:
        default: Of every agent without one of its own.
        max_inflight: Rollouts at the same time, over all agents.
        launch_rate: Rollouts started per second, over all agents; None for no limit.
        own: Budgets of single agents.
    """

    default: Budget
    max_inflight: int
    launch_rate: float | None = None
    own: Mapping[str, Budget] = field(default_factory=dict)

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
            raise ConfigError("\n".join([*problems, f"Its agents: {listed}."]))


def budgets_from_options(
    *,
    deadline_s: float,
    max_inflight: int,
    retries: Mapping[str, int] | None = None,
    launch_rate: float | None = None,
    environments: Mapping[str, Mapping[str, Any]] | None = None,
) -> Budgets:
    """From `gym_deadline`, `gym_max_inflight`, `gym_retries`, `gym_launch_rate` and `gym_environments`.

    An agent's `retries` replace those of the kinds that they name; the other kinds keep the run's.

    Raises:
        ConfigError: An agent's `max_inflight` is not a whole number of at least 1.
    """
    default = Budget(deadline_s=deadline_s, retries=_by_kind(retries or {}))
    own = {agent: _own_budget(agent, changes, default) for agent, changes in (environments or {}).items()}
    return Budgets(default=default, max_inflight=max_inflight, launch_rate=launch_rate, own=own)


def _own_budget(agent: str, changes: Mapping[str, Any], default: Budget) -> Budget:
    cap = changes.get("max_inflight")
    if cap is not None and (cap < 1 or cap != int(cap)):
        raise ConfigError(
            f"`gym_environments[{agent!r}]['max_inflight']` is {cap!r}; it must be a whole number of at least 1."
        )
    retries = changes.get("retries") or {}
    named = {"infrastructure": retries} if isinstance(retries, int) else retries
    return dataclasses.replace(
        default,
        deadline_s=float(changes.get("deadline", default.deadline_s)),
        max_inflight=None if cap is None else int(cap),
        launch_rate=changes.get("launch_rate"),
        retries={**default.retries, **_by_kind(named)},
    )


def _by_kind(retries: Mapping[str, int]) -> dict[FailureKind, int]:
    return {FailureKind(kind): number for kind, number in retries.items()}


def backoff_s(num_failed: int, rng: random.Random) -> float:
    """Seconds to wait before the next attempt: doubling, capped, and spread, so that rollouts which failed together
    do not come back together.

    Args:
        num_failed: Attempts that have failed so far, at least 1.
        rng: Never the global one: training draws from that.

    Returns:
        Between half and all of `min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (num_failed - 1))`.
    """
    longest = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** min(num_failed - 1, 16))
    return longest * rng.uniform(0.5, 1.0)
