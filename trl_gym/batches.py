"""Which groups a generation batch is made of: planned as far ahead as `gym_max_staleness` allows, taken as they end.

    tasks of this batch, and of those ahead ── plan ── RolloutSource.collect ── rewards ── the groups that are trained

TRL's loop hands over the tasks of one batch, and gets the rollouts of as many groups: with overlap, of those that have
ended, which may be others than those of the tasks. Every task is rolled out once and trained once, in whichever batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trl_gym.ranks import agreed
from trl_gym.resume import QueueState
from trl_gym.rollouts.queue import EndedGroup, TaskGroup
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import BatchInfo, RolloutSource

if TYPE_CHECKING:
    from accelerate import Accelerator

Example = dict[str, Any]
Ahead = Callable[[int], tuple[Sequence[Example], int] | None]
"""The number of a batch to come → its examples, and the optimizer steps made before it; None where it is not known."""


class Plan(Protocol):
    """Makes the requests of a group."""

    def __call__(self, example: Example, *, batch: int, group: int, members: Sequence[int]) -> TaskGroup:
        """Return the group.

        Args:
            example: Of the dataset.
            batch: Number of the generation batch, in the run.
            group: Index in that batch, over all ranks.
            members: Indices of its members that are on this rank. Those of `gym_oversample` come behind them.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBatch:
    """The groups of one rank that are trained or evaluated together."""

    groups: list[EndedGroup]
    rewards: list[float | None]  # `[B]`, checked; None takes a rollout out
    # Values to log with this batch, by name; a name that several ranks have is averaged over all values.
    metrics: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Rollout]:
        """`[B]`, group by group."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def examples(self) -> list[Example]:
        """`[B]`, of the dataset; a mapping of its own for each, since TRL writes into them."""
        return [dict(group.task.example) for group in self.groups for _ in group.rollouts]


class Batches:
    """Makes generation batches. Every rank has one and calls its methods in step.

    Args:
        accelerator: The trainer's accelerator.
        source: Where rollouts come from.
        num_ahead: Generation batches of training that are begun beside the one that is trained next.
        most_ahead: How many may be, to make up for groups of earlier batches that have not ended.
        choose: Returns the example that a group rolls out, given the one whose turn it is and the group's index.
        plan: See `Plan`.
        reward: Returns the rewards of rollouts, checked.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        source: RolloutSource,
        *,
        num_ahead: int = 0,
        most_ahead: int = 0,
        choose: Callable[[Example, int], Example],
        plan: Plan,
        reward: Callable[[Sequence[Rollout]], list[float | None]],
    ) -> None:
        self._accelerator, self._source = accelerator, source
        self._num_ahead, self._most_ahead = num_ahead, most_ahead
        self._choose, self._plan, self._reward = choose, plan, reward
        self._num_planned = 0  # generation batches of training that are planned, in the run
        self._restored: list[dict[str, Any]] = []  # groups that were in flight when the checkpoint was written

    def evaluate(
        self, examples: Sequence[Example], num_members: int, *, number: int, info: BatchInfo
    ) -> GenerationBatch:
        """Roll a batch of an evaluation out; see `train`."""
        with agreed(self._accelerator):
            groups = self._groups(examples, num_members, number)
        return self._collected(groups, len(groups), info)

    def train(
        self, examples: Sequence[Example], num_members: int, *, number: int, info: BatchInfo, ahead: Ahead
    ) -> GenerationBatch:
        """Return as many groups as a batch has.

        Args:
            examples: `[B]` of this rank, whose turn it is; each is repeated for every member of its group.
            num_members: Members of a group.
            number: Number of the batch, in the run.
            info: The batch.
            ahead: See `Ahead`.

        Raises:
            TrlGymError: On every rank, when rollouts cannot be had.
        """
        per_batch = len(self._parts(len(examples), num_members))
        with agreed(self._accelerator):
            groups = [self._planned_again(saved) for saved in self._restored]
            self._restored = []
            late = sum(group.batch < number for group in (*groups, *self._source.in_flight))
            num_ahead = min(self._num_ahead + math.ceil(late / per_batch), self._most_ahead)
            groups += self._planned(examples, num_members, number)
            later_steps: list[int] = []
            for index in range(1, self._most_ahead + 1):
                if (coming := ahead(number + index)) is None:
                    break
                later_steps.append(coming[1])
                if index <= num_ahead:
                    groups += self._planned(coming[0], num_members, number + index)
        info = dataclasses.replace(info, later_steps=tuple(later_steps), per_batch=per_batch)
        return self._collected(groups, per_batch, info)

    def state(self) -> QueueState:
        """Return what a checkpoint needs: the groups that are in flight."""
        return QueueState(
            num_planned=self._num_planned,
            groups=self._restored
            + [
                {
                    "example": group.example,
                    "batch": group.batch,
                    "group": group.index,
                    "members": [request.member for request in group.requests[: group.num_wanted]],
                    "begun": None if group.begun is None else dataclasses.astuple(group.begun),
                }
                for group in self._source.in_flight
            ],
        )

    def restore(self, state: QueueState) -> None:
        """Continue with the groups that were in flight when a checkpoint was written; what they had finished is in the
        journal."""
        self._num_planned, self._restored = state.num_planned, list(state.groups)

    def _planned_again(self, saved: dict[str, Any]) -> TaskGroup:
        group = self._plan(saved["example"], batch=saved["batch"], group=saved["group"], members=saved["members"])
        return dataclasses.replace(group, begun=None if saved["begun"] is None else Policy(*saved["begun"]))

    def _planned(self, examples: Sequence[Example], num_members: int, number: int) -> list[TaskGroup]:
        if number < self._num_planned:  # it is in flight, or was trained
            return []
        self._num_planned = number + 1
        return self._groups(examples, num_members, number)

    def _groups(self, examples: Sequence[Example], num_members: int, number: int) -> list[TaskGroup]:
        return [
            self._plan(self._choose(examples[first], group), batch=number, group=group, members=members)
            for group, first, members in self._parts(len(examples), num_members)
        ]

    def _parts(self, num_examples: int, num_members: int) -> list[tuple[int, int, list[int]]]:
        return group_parts(num_examples, num_members, rank=self._accelerator.process_index)

    def _collected(self, groups: Sequence[TaskGroup], number: int, info: BatchInfo) -> GenerationBatch:
        collected = self._source.collect(groups, number, info)
        with agreed(self._accelerator):
            rewards = self._reward([rollout for group in collected.groups for rollout in group.rollouts])
        return GenerationBatch(groups=collected.groups, rewards=rewards, metrics=collected.metrics)


def group_parts(num_examples: int, num_members: int, *, rank: int) -> list[tuple[int, int, list[int]]]:
    """Divide a rank's part of a generation batch into groups, of which the first and the last may lie across ranks.

    Args:
        num_examples: Of every rank.
        num_members: Members of a group.
        rank: This rank.

    Returns:
        For each group its index over all ranks, the place of its first example on this rank, and the indices of its
        members here.
    """
    parts: list[tuple[int, int, list[int]]] = []
    for place in range(num_examples):
        group, member = divmod(rank * num_examples + place, num_members)
        if not parts or parts[-1][0] != group:
            parts.append((group, place, []))
        parts[-1][2].append(member)
    return parts
