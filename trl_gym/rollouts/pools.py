"""Draw tasks by what their rollouts have shown: a curriculum to call from `GymGRPOTrainer.choose_task`. Pure.

A group whose rollouts all succeed, or all fail, has no advantages: its rollouts are spent for nothing. `TaskPools`
tells by the success rate for which tasks that is likely, and gives their turns to others:

    pool       rollouts of the task that are remembered              default weight
    unknown    none                                                  1
    never      succeeded in at most `low` of the cases               0.25
    between    succeeded in some                                     1
    always     succeeded in at least `high` of the cases             0.1

A task is drawn in proportion to the weight of its pool. The dataset's order is kept as far as that allows: the task
whose turn it is keeps it with probability `weight ÷ largest weight of any task`, and else gives it to one that is
drawn by weight. As long as weights stay as they are, an epoch therefore draws each row with probability `weight ÷ sum
of weights`: what is rejected is drawn again from the target itself. With equal weights every task keeps its turn.

What was shown is forgotten by half in `half_life` batches, since the policy that showed it is gone. A task that was
never solved is therefore unknown again some time later, and gets another chance.

Every rank has pools of its own, and they agree: they are shown the facts of all ranks, and draw from a generator that
is seeded again for each group.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from trl_gym.errors import ConfigError
from trl_gym.untrusted import shape_problem

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_gym.rollouts.rollout import RolloutFacts

Example = dict[str, Any]

_REMEMBERED = 0.5  # rollouts, discounted for age; with fewer, nothing is known
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Line = tuple[str | int, Annotated[int, msgspec.Meta(ge=0)], _NotNegative, _NotNegative]


class Pool(StrEnum):
    """What is known of a task."""

    UNKNOWN = "unknown"
    NEVER = "never"
    BETWEEN = "between"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolWeights:
    """How often tasks are drawn, relative to each other: 0 is never, unless all tasks there are have weight 0."""

    unknown: float = 1.0
    never: float = 0.25
    between: float = 1.0
    always: float = 0.1

    def of(self, pool: Pool) -> float:
        weight: float = getattr(self, pool)
        return weight


@dataclass(frozen=True, slots=True)
class Counts:
    """Rollouts of a task or an environment, discounted for their age."""

    batch: int  # batches that had been shown when they were counted
    rollouts: float
    successes: float


class _StateShape(msgspec.Struct):
    batches: Annotated[int, msgspec.Meta(ge=0)]
    tasks: list[_Line]
    environments: list[_Line]


class TaskPools:
    """The tasks of a dataset, in pools by their success rate.

    Success is what the environment reports (`RolloutFacts.success`): its `success`, from 0 to 1, or else whether the
    reward reached 1. A failed rollout shows nothing. A task that is unknown is assumed to be solved never, or always,
    where its environment is.

    The first draw after a batch looks at every row, the others take microseconds.

    Args:
        dataset: From `load_gym_dataset` or `mix_gym_datasets`. A row that is in it twice is drawn twice as often.
        weights: How often tasks of a pool are drawn.
        half_life: Batches after which what was shown counts half.
        low: Highest success rate of a task that counts as never solved. A little above 0: old successes fade.
        high: Lowest success rate of one that counts as always solved.
        seed: Of the draws.

    Raises:
        ConfigError: A value is out of its range.

    Example:

    ```python
    pools = TaskPools(trainer.train_dataset, weights=PoolWeights(always=0.05))
    ```
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        weights: PoolWeights | None = None,
        half_life: float = 100.0,
        low: float = 0.02,
        high: float = 0.98,
        seed: int = 0,
    ) -> None:
        self._weights = weights or PoolWeights()
        if (problem := _problem(self._weights, half_life, low, high)) is not None:
            remedy = "Give finite weights of at least 0, a positive `half_life`, and 0 ≤ `low` < `high` ≤ 1."
            raise ConfigError(f"`TaskPools` has {problem}.", remedy)
        self._dataset, self._half_life, self._low, self._high, self._seed = dataset, half_life, low, high, seed
        agents = [agent or "" for agent in dataset["agent"][:]]
        self._rows = list(zip(dataset["task_index"][:], agents, strict=True))
        self._environment_of = dict(self._rows)  # rows may leave the agent to Gym; then it has no name here
        self._num_batches = 0
        self._tasks: dict[int, Counts] = {}
        self._environments: dict[str, Counts] = {}
        self._cumulated: list[float] | None = None  # weights of the rows, summed up; None until the next draw
        self._largest = 0.0

    def observe(self, facts: Sequence[RolloutFacts]) -> None:
        """Count what a batch has shown. Every rank calls it with the facts of all ranks, in the same order."""
        self._num_batches += 1
        self._cumulated = None
        tasks: defaultdict[int, list[float]] = defaultdict(list)
        environments: defaultdict[str, list[float]] = defaultdict(list)
        for fact in facts:
            if fact.success is not None:
                tasks[fact.task].append(fact.success)
                environments[self._environment_of.get(fact.task, fact.agent)].append(fact.success)
        self._tasks |= {task: self._added(self._tasks.get(task), own) for task, own in tasks.items()}
        self._environments |= {
            name: self._added(self._environments.get(name), own) for name, own in environments.items()
        }

    def choose(self, example: Example, group: int) -> Example:
        """Return the example that a group rolls out.

        The result follows from the seed, from what was observed, and from the arguments, so that it is the same for
        every member and on every rank. Two groups of a batch may get the same task.

        Args:
            example: The one whose turn it is.
            group: Index of the group in its batch, over all ranks.
        """
        if self._cumulated is None:
            self._weigh()
        assert self._cumulated is not None
        own = self._weights.of(self.pool_of(example["task_index"], example.get("agent")))
        draw = random.Random(f"trl-gym pools {self._seed} {self._num_batches} {example['task_index']} {group}")
        if self._largest == 0 or draw.random() * self._largest < own:
            return example
        [row] = draw.choices(range(len(self._rows)), cum_weights=self._cumulated)
        drawn: Example = self._dataset[row]
        return drawn

    def pool_of(self, task: int, agent: str | None) -> Pool:
        """Return the pool of a task, given its `task_index` and `agent` as the dataset has them."""
        pool = self._pool(self._tasks.get(task))
        return self._assumed(agent or "") if pool is Pool.UNKNOWN else pool

    def sizes(self) -> dict[str, int]:
        """Return the number of rows in each pool, by its name, for a log."""
        sizes = Counter(self.pool_of(task, agent) for task, agent in self._rows)
        return {str(pool): sizes[pool] for pool in Pool}

    def state_dict(self) -> dict[str, Any]:
        """Return what was observed, as JSON has it. Options and dataset are not in it."""
        return {
            "batches": self._num_batches,
            "tasks": [[task, *astuple(counts)] for task, counts in self._tasks.items()],
            "environments": [[name, *astuple(counts)] for name, counts in self._environments.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` has returned, for the same dataset. Raises `ConfigError`: it is something
        else."""
        if (problem := shape_problem(state, _StateShape)) is not None:
            raise ConfigError(f"The state of `TaskPools` cannot be read ({problem}).", "Start with new pools.")
        self._num_batches, self._cumulated = state["batches"], None
        self._tasks = {task: Counts(*counts) for task, *counts in state["tasks"]}
        self._environments = {name: Counts(*counts) for name, *counts in state["environments"]}

    def _added(self, before: Counts | None, successes: Sequence[float]) -> Counts:
        if before is None:
            return Counts(self._num_batches, len(successes), sum(successes))
        kept = self._kept(before)
        return Counts(
            self._num_batches, kept * before.rollouts + len(successes), kept * before.successes + sum(successes)
        )

    def _kept(self, counts: Counts) -> float:
        """Return the part of them that is remembered."""
        return 0.5 ** ((self._num_batches - counts.batch) / self._half_life)

    def _pool(self, counts: Counts | None) -> Pool:
        if counts is None or self._kept(counts) * counts.rollouts < _REMEMBERED:
            return Pool.UNKNOWN
        rate = counts.successes / counts.rollouts
        return Pool.NEVER if rate <= self._low else Pool.ALWAYS if rate >= self._high else Pool.BETWEEN

    def _assumed(self, environment: str) -> Pool:
        pool = self._pool(self._environments.get(environment))
        return Pool.UNKNOWN if pool is Pool.BETWEEN else pool

    def _weigh(self) -> None:
        known = {task: pool for task, counts in self._tasks.items() if (pool := self._pool(counts)) != Pool.UNKNOWN}
        by_task = {task: self._weights.of(pool) for task, pool in known.items()}
        others = {name: self._weights.of(self._assumed(name)) for name in set(self._environment_of.values())}
        weights = [by_task.get(task, others[environment]) for task, environment in self._rows]
        self._largest, self._cumulated = max(weights), list(itertools.accumulate(weights))


def _problem(weights: PoolWeights, half_life: float, low: float, high: float) -> str | None:
    by_name = {field.name: getattr(weights, field.name) for field in fields(weights)}
    if not all(0 <= weight < math.inf for weight in by_name.values()):
        return f"weights that are negative or no numbers: {by_name}"
    if not 0 < half_life < math.inf:
        return f"`half_life` {half_life}"
    if not 0 <= low < high <= 1:
        return f"`low` {low} and `high` {high}"
    return None
