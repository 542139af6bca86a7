"""What all ranks know about one generation batch, and what they decide from it together.

Ranks roll out their own rows; groups may lie across ranks. One gather per batch tells every rank the facts of every
rollout, so that all come to the same decision: nobody trains, or raises, alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trl_gym.errors import RolloutError
from trl_gym.rollouts.batch import describe_causes, failure_causes
from trl_gym.rollouts.facts import RolloutFacts, facts_of
from trl_gym.rollouts.groups import check_same_task, undersized
from trl_gym.rollouts.rollout import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank tells the others.

    Attributes:
        facts: `[B]`, of its rollouts, in the order of its rows.
        causes: Of its failures, with their numbers.
    """

    facts: list[RolloutFacts]
    causes: Counter[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBatch:
    """A generation batch of all ranks.

    Attributes:
        facts: `[N]`, by rank and row: the order of rows that `accelerate.utils.gather` makes.
        own: Where this rank's rows are among them.
        causes: Of failures, with their numbers.
    """

    facts: list[RolloutFacts]
    own: slice
    causes: Counter[str]

    @property
    def num_valid(self) -> int:
        return sum(fact.is_valid for fact in self.facts)

    @property
    def own_valid(self) -> list[bool]:
        """`[B]`, which rows of this rank are trained."""
        return [fact.is_valid for fact in self.facts[self.own]]

    @property
    def own_rewards(self) -> list[float | None]:
        """`[B]`, the rewards to train on; None for a rollout that is not trained."""
        return [fact.trained_reward if fact.is_valid else None for fact in self.facts[self.own]]

    def without_small_groups(self, min_group_size: int) -> SharedBatch:
        """The same batch, in which no member of a group with too few rewards is trained.

        Raises:
            RolloutError: A group holds rollouts of several tasks.
        """
        groups = [fact.group for fact in self.facts]
        check_same_task(groups, [(fact.agent, fact.task) for fact in self.facts])
        small = undersized(groups, [fact.is_valid for fact in self.facts], min_group_size)
        facts = [dataclasses.replace(f, is_valid=False) if f.group in small else f for f in self.facts]
        return dataclasses.replace(self, facts=facts)

    def check(self, min_valid_fraction: float, *, step: int, where: str) -> None:
        """
        Args:
            min_valid_fraction: Part of the rollouts that must be trained.
            step: Optimizer step whose weights sampled them.
            where: Where to read more, a sentence.

        Raises:
            RolloutError: Too few of the rollouts can be trained on.
        """
        num_total, num_valid = len(self.facts), self.num_valid
        if num_valid and num_valid >= min_valid_fraction * num_total:
            return
        num_failed = sum(fact.failure is not None for fact in self.facts)
        num_without = sum(fact.failure is None and fact.trained_reward is None for fact in self.facts)
        num_dropped = num_total - num_valid - num_failed - num_without
        if num_failed == num_total:
            summary = f"All {num_total} rollouts of step {step} failed; there is nothing to train on"
        else:
            summary = (
                f"Only {num_valid} of the {num_total} rollouts of step {step} can be trained on, and "
                f"`gym_min_valid_fraction` is {min_valid_fraction:g}: {num_failed} failed, {num_without} got no "
                f"reward, {num_dropped} are in groups with too few of the others (`gym_min_group_size`)"
            )
        causes = f":\n{describe_causes(self.causes)}\n" if self.causes else ". "
        raise RolloutError(f"{summary}{causes}{where}")


def share(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    *,
    batch: str,
    rank: int,
    gather: Callable[[list[RankReport]], list[RankReport]],
) -> SharedBatch:
    """Tell the other ranks and hear from them. Every rank calls it.

    Args:
        rollouts: `[B]`, of this rank.
        rewards: `[B]`, the rewards to train on. Without a token there is nothing to train, whatever the reward.
        batch: Name of the batch, the same on every rank.
        rank: Of this process.
        gather: From a list on every rank to the list of all, by rank (accelerate's `gather_object`).
    """
    facts = [
        facts_of(rollout, reward if rollout.trajectories else None, batch)
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]
    reports = gather([RankReport(facts=facts, causes=failure_causes(rollouts))])
    first = sum(len(report.facts) for report in reports[:rank])
    return SharedBatch(
        facts=[fact for report in reports for fact in report.facts],
        own=slice(first, first + len(facts)),
        causes=sum((report.causes for report in reports), Counter()),
    )
