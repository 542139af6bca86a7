"""Judge a generation batch of finished rollouts: what is trained of it, decided by all ranks, and what is shown. Pure
functions.

A rollout without a reward keeps its place, with a NaN reward (out of its group's baseline) and advantage 0. What TRL
trains on of the others, and what the loss divides by, is in `rows.py`.

Ranks roll out their own rollouts; groups may lie across ranks. One gather per batch (`share`) tells every rank the
facts of every rollout, so that all come to the same decision: no rank trains, or raises, alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trl_gym.errors import RolloutError, as_problems
from trl_gym.gym.client import MAX_REWARD
from trl_gym.rollouts.rollout import Rollout, RolloutFacts, facts_of
from trl_gym.rollouts.rows import fit
from trl_gym.rollouts.trajectory import finish_reason

_NUM_CAUSES = 20  # that a rank tells the others; a cause may be 600 characters long


def table_columns(rollouts: Sequence[Rollout]) -> dict[str, list[str]]:
    """Return columns for TRL's completions table, `[B]` each."""
    return {
        "environment": [rollout.request.agent for rollout in rollouts],
        "rollout_id": [rollout.request.rollout_id for rollout in rollouts],
        "finish_reason": [
            f"{rollout.failure.kind} failure" if rollout.failure is not None else finish_reason(rollout.answer or {})
            for rollout in rollouts
        ],
    }


def failure_causes(rollouts: Sequence[Rollout]) -> Counter[str]:
    """Count the most frequent causes of failure."""
    causes = Counter(
        f"{rollout.failure.kind} ({rollout.failure.where}): {rollout.failure.text[:600]}"
        for rollout in rollouts
        if rollout.failure is not None
    )
    return Counter(dict(causes.most_common(_NUM_CAUSES)))


def describe_drift(rollouts: Sequence[Rollout]) -> list[str]:
    """Return one line per agent and cause, most frequent first: how many rollouts drifted, and the first of them."""
    examples: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.drift is not None:
            example = f"In {rollout.request.rollout_id}, {rollout.drift.text}"
            examples[rollout.request.agent, rollout.drift.cause].append(example)
    return [
        f"{len(drifted)} of {sum(rollout.request.agent == agent for rollout in rollouts)} rollouts of {agent} drifted "
        f"({cause}). {drifted[0]}"
        for (agent, cause), drifted in sorted(examples.items(), key=lambda item: -len(item[1]))
    ]


def checked_rewards(rewards: Sequence[float | None], num_rollouts: int) -> list[float | None]:
    """Check what `compute_rewards` returned, and return it with None for NaN, which TRL uses.

    Args:
        rewards: `[B]`.
        num_rollouts: `B`.

    Raises:
        RolloutError: There are too few or too many, or one is no number, or too large for float32 (`MAX_REWARD`).
    """
    if len(rewards) != num_rollouts:
        raise RolloutError(
            f"`compute_rewards` returned {len(rewards)} rewards for {num_rollouts} rollouts.", "Return one for each."
        )
    checked: list[float | None] = []
    for index, reward in enumerate(rewards):
        try:
            value = None if reward is None else float(reward)
        except (TypeError, ValueError, OverflowError):
            value = math.inf
        if value is not None and abs(value) > MAX_REWARD:
            raise RolloutError(
                f"`compute_rewards` returned {str(reward)[:100]!r} for rollout {index}.",
                f"Return a number of at most {MAX_REWARD:g}, or None to take a rollout out of the loss.",
            )
        checked.append(None if value is None or math.isnan(value) else value)
    return checked


# -- what ranks decide together ---------------------------------------------------------------------------------------


RankReport = tuple[list[RolloutFacts], list[RolloutFacts], Counter[str]]
"""What a rank tells the others: facts of its rollouts, `[B]` by place, and of those that were replaced; the causes of
their failures, counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBatch:
    """A generation batch on all ranks."""

    facts: list[RolloutFacts]  # `[N]`, by rank and place: the order that `accelerate.utils.gather` makes
    own: slice  # this rank's rollouts among them
    causes: Counter[str]  # causes of failures, counted
    # Of rollouts whose groups were replaced, and that are not trained; valid are those that could have been.
    replaced: list[RolloutFacts] = field(default_factory=list)

    @property
    def num_valid(self) -> int:
        return sum(fact.is_valid for fact in self.facts)

    @property
    def finished(self) -> list[RolloutFacts]:
        """Every rollout that was collected for the batch, trained or not."""
        return [*self.facts, *self.replaced]

    @property
    def own_dropped(self) -> list[int | None]:
        """`[B]`, how many of its rows a rollout of this rank loses; None for one that is not trained."""
        return [fact.dropped_rows if fact.is_valid else None for fact in self.facts[self.own]]

    @property
    def own_rewards(self) -> list[float | None]:
        """`[B]`, the rewards to train on; None for a rollout that is not trained."""
        return [fact.trained_reward if fact.is_valid else None for fact in self.facts[self.own]]

    def without_small_groups(self, min_group_size: int) -> SharedBatch:
        """Return the same batch, in which no member of a group with too few rewards is trained. Raises `RolloutError`:
        a group has rollouts of several tasks: its baseline would mean nothing."""
        task_of: dict[str, tuple[str, int]] = {}
        for fact in self.finished:
            task = fact.agent, fact.task
            if task_of.setdefault(fact.group, task) != task:
                raise RolloutError(
                    f"Group {fact.group} has rollouts of the tasks {task_of[fact.group]} and {task}.",
                    "Put the rollouts of a task next to each other in your own sampler or data loader, as TRL's does.",
                )
        sizes = Counter(fact.group for fact in self.finished if fact.is_valid)
        small = {group for group in task_of if sizes[group] < min_group_size}
        facts, replaced = (
            [dataclasses.replace(fact, is_valid=False) if fact.group in small else fact for fact in found]
            for found in (self.facts, self.replaced)
        )
        return dataclasses.replace(self, facts=facts, replaced=replaced)

    def with_replaced_untrained(self) -> SharedBatch:
        """Return the same batch, in which no rollout that was replaced is valid."""
        return dataclasses.replace(
            self, replaced=[dataclasses.replace(fact, is_valid=False) for fact in self.replaced]
        )

    def fitted(self, *, num_ranks: int, multiple: int, factor: float) -> tuple[SharedBatch, int]:
        """Return the same batch, in which no rank has too many rows, and the rows of each rank; see `rows.fit`."""
        counts = [len(fact.row_tokens) if fact.is_valid else 0 for fact in self.facts]
        num_rows, dropped = fit(counts, num_ranks=num_ranks, multiple=multiple, factor=factor)
        facts = [
            dataclasses.replace(fact, dropped_rows=lost) if lost else fact
            for fact, lost in zip(self.facts, dropped, strict=True)
        ]
        return dataclasses.replace(self, facts=facts), num_rows

    def check(self, min_valid_fraction: float, *, step: int, where: str) -> None:
        """Check that enough of the rollouts are trained, or could be: replacing groups does not hide failures.

        Args:
            min_valid_fraction: Fraction of the rollouts, replaced ones included, that must be valid.
            step: Number of the optimizer step that they were sampled for.
            where: Tells the user where to read more: a sentence that begins with a verb.

        Raises:
            RolloutError: Too few of the rollouts can be trained on.
        """
        found = self.finished if self.num_valid else self.facts  # nothing may be left to train of what was replaced
        num_total, num_valid = len(found), sum(fact.is_valid for fact in found)
        if num_valid and num_valid >= min_valid_fraction * num_total:
            return
        num_failed = sum(fact.failure is not None for fact in found)
        num_without = sum(fact.failure is None and fact.trained_reward is None for fact in found)
        num_dropped = num_total - num_valid - num_failed - num_without
        if num_failed == num_total:
            summary = f"All {num_total} rollouts of step {step} failed; there is nothing to train on"
        else:
            summary = (
                f"Only {num_valid} of the {num_total} rollouts of step {step} can be trained on, and "
                f"`gym_min_valid_fraction` is {min_valid_fraction:g}: {num_failed} failed, {num_without} got no "
                f"reward, {num_dropped} are in groups with too few of the others (`gym_min_group_size`)"
            )
        raise RolloutError(f"{summary}.", where, as_problems(self.causes))


def share(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    *,
    mode: str,
    rank: int,
    gather: Callable[[list[RankReport]], list[RankReport]],
    step: int | None = None,
    replaced: Sequence[tuple[Rollout, float | None]] = (),
) -> SharedBatch:
    """Tell the other ranks about this rank's rollouts, and return what all have told. Every rank calls it in step.

    Args:
        rollouts: `[B]`, of this rank.
        rewards: `[B]`, the rewards to train on. Without a token there is nothing to train, whatever the reward.
        mode: `"train"` or `"eval"`.
        gather: From a list on every rank to the list of all, by rank (accelerate's `gather_object`).
        step: Number of the optimizer step that trains them, for staleness; None in an evaluation.
        replaced: Rollouts of this rank whose groups were replaced, with their rewards.
    """
    facts, others = (
        [facts_of(rollout, reward if rollout.trajectories else None, mode, step) for rollout, reward in pairs]
        for pairs in (zip(rollouts, rewards, strict=True), replaced)
    )
    reports = gather([(facts, others, failure_causes([*rollouts, *(rollout for rollout, _ in replaced)]))])
    first = sum(len(own) for own, _, _ in reports[:rank])
    return SharedBatch(
        facts=[fact for own, _, _ in reports for fact in own],
        own=slice(first, first + len(facts)),
        causes=sum((causes for _, _, causes in reports), Counter()),
        replaced=[fact for _, own, _ in reports for fact in own],
    )
