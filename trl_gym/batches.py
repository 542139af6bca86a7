"""Which groups a generation batch is made of: planned as far ahead as `gym_max_staleness` allows, taken as they end.

    tasks of this batch, and of those ahead ── plan ── RolloutSource.collect ── rewards ── the groups that are trained
                                                 ▲                               │
                                                 └── further tasks ── `gym_refill_rounds`: groups that teach nothing

TRL's loop hands over the tasks of one batch, and gets the rollouts of as many groups: with overlap, of those that have
ended, which may be others than those of the tasks. Every task is rolled out once and trained once, in whichever batch.

A group whose rewards are all the same has advantages of 0, and one with too few rewards is left out of the loss. Such
groups are replaced by groups of further tasks (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2). A round submits
n of them and takes n that have ended, so that as many stay in flight. What is left of such groups after the last round
is trained as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trl_gym.dataset import gym_row
from trl_gym.errors import ConfigError, naming
from trl_gym.ranks import Gather, agreed
from trl_gym.resume import QueueState
from trl_gym.rollout_options import Sampling
from trl_gym.rollouts.queue import EndedGroup, TaskGroup
from trl_gym.rollouts.request import RolloutRequest, stamp, task_hash
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import BatchInfo, RolloutSource
from trl_gym.rollouts.tasks import further_tasks, own_share

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig

_STALENESS = "gym_max_staleness"
BATCH_OPTIONS = (
    _STALENESS,
    *("num_generations", "per_device_train_batch_size", "steps_per_generation", "num_iterations"),
    "gradient_accumulation_steps",
)
_EQUAL = 1e-8  # rewards that are no further apart are the same

Example = dict[str, Any]
Ahead = Callable[[int], tuple[Sequence[Example], int] | None]
"""The number of a batch to come → its examples, and its `BatchInfo.step`; None where it is not known."""


Apart = Callable[[Sequence[tuple[Rollout, float]]], float]
"""Rollouts of a group that can be trained, with their rewards → see `RewardedGroup.apart`."""


class Plan(Protocol):
    """Makes the requests of a group."""

    def __call__(self, example: Example, *, step: int, batch: int, group: int, members: Sequence[int]) -> TaskGroup:
        """Return the group.

        Args:
            step: Number of the optimizer step that it is sampled for, see `BatchInfo.step`.
            batch: Number of the generation batch, in the run.
            group: Index in that batch, over all ranks.
            members: Indices of its members that are on this rank. Those of `gym_oversample` come behind them.
        """


class Dataset(Protocol):
    """A dataset of known length: `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Example: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Refill:
    """How groups that teach nothing are replaced."""

    dataset: Dataset  # that further tasks are drawn from
    num_rounds: int  # for each batch, at most
    min_group_size: int  # fewest rollouts with a reward that are trained
    seed: int  # of the draw


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardedGroup:
    """A group whose rollouts have ended, and their rewards."""

    ended: EndedGroup
    rewards: list[float | None]  # by rollout, checked; None takes one out
    # How far apart those are that can be trained, in what they are rewarded for; None: in these rewards.
    apart: float | None = None

    @property
    def valid(self) -> list[float]:
        """The rewards of rollouts that can be trained: without a token there is nothing to train."""
        rewards = zip(self.ended.rollouts, self.rewards, strict=True)
        return [reward for rollout, reward in rewards if reward is not None and rollout.trajectories]

    @property
    def is_flat(self) -> bool:
        """Whether all of these rewards are the same, of two at least."""
        # Not by the standard deviation: rounding leaves one to rewards of which none is a sum of powers of 2.
        if len(self.valid) < 2:
            return False
        return (max(self.valid) - min(self.valid) if self.apart is None else self.apart) <= _EQUAL

    def teaches(self, min_group_size: int) -> bool:
        """Tell whether an advantage of it may differ from 0."""
        return len(self.valid) >= min_group_size and not self.is_flat


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBatch:
    """The groups of one rank that are trained or evaluated together."""

    groups: list[RewardedGroup]
    replaced: list[RewardedGroup] = field(default_factory=list)  # groups that others have taken the place of
    # Values to log with this batch, by name; a name that several ranks have is averaged over all values.
    metrics: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Rollout]:
        """`[B]`, group by group."""
        return [rollout for group in self.groups for rollout in group.ended.rollouts]

    @property
    def rewards(self) -> list[float | None]:
        """`[B]`, checked; None takes a rollout out."""
        return [reward for group in self.groups for reward in group.rewards]

    @property
    def replaced_rollouts(self) -> list[tuple[Rollout, float | None]]:
        """The rollouts of `replaced`, with their rewards."""
        return [pair for group in self.replaced for pair in zip(group.ended.rollouts, group.rewards, strict=True)]

    @property
    def ended(self) -> list[EndedGroup]:
        """Every group that was collected for it."""
        return [group.ended for group in (*self.groups, *self.replaced)]

    @property
    def examples(self) -> list[Example]:
        """`[B]`, of the dataset; a mapping of its own for each, since TRL writes into them."""
        return [dict(group.ended.task.example) for group in self.groups for _ in group.rewards]


class Batches:
    """Makes generation batches. Every rank has one and calls its methods in step.

    Args:
        num_ahead: Generation batches of training that are begun beside the one that is trained next.
        most_ahead: How many may be, to make up for groups of earlier batches that have not ended.
        options: `gym_max_staleness`, and the options that say what a batch is, by name.
        choose: Returns the example that a group rolls out, given the one whose turn it is and the group's index.
        reward: Returns the rewards of rollouts, checked.
        apart: Returns how far apart rollouts are in what they are rewarded for, given them and their rewards; None: as
            far as the rewards are.
        refill: How groups that teach nothing are replaced in training; None leaves them.
        gather: From a list on every rank to the list of all, by rank; accelerate's unless given.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        source: RolloutSource,
        *,
        num_ahead: int = 0,
        most_ahead: int = 0,
        options: Mapping[str, int],
        choose: Callable[[Example, int], Example],
        plan: Plan,
        reward: Callable[[Sequence[Rollout]], list[float | None]],
        apart: Apart | None = None,
        refill: Refill | None = None,
        gather: Gather | None = None,
    ) -> None:
        self._accelerator, self._source = accelerator, source
        self._num_ahead, self._most_ahead, self._options = num_ahead, most_ahead, dict(options)
        self._choose, self._plan, self._reward = choose, plan, reward
        self._apart, self._refill, self._gather = apart, refill, gather or _gather
        self._num_planned = 0  # generation batches of training that are planned, in the run
        self._restored: list[dict[str, Any]] = []  # groups that were in flight when the checkpoint was written

    def evaluate(
        self, examples: Sequence[Example], num_members: int, *, number: int, info: BatchInfo
    ) -> GenerationBatch:
        """Roll a batch of an evaluation out; see `train`."""
        with agreed(self._accelerator, self._gather):
            groups = self._groups(examples, num_members, number, info.step)
        return self._collected(groups, len(groups), info)

    def train(
        self, examples: Sequence[Example], num_members: int, *, number: int, info: BatchInfo, ahead: Ahead
    ) -> GenerationBatch:
        """Return as many groups as a batch has.

        Args:
            examples: `[B]` of this rank, whose turn it is; each is repeated for every member of its group.
            number: Number of the batch, in the run.

        Raises:
            TrlGymError: On every rank, when rollouts cannot be had.
        """
        per_batch = len(self._parts(len(examples), num_members))
        with agreed(self._accelerator, self._gather):
            groups = [self._planned_again(saved, info.step) for saved in self._restored]
            self._restored = []
            # A group that took the place of another in a batch began with those of the next one.
            num_planned = per_batch * self._accelerator.num_processes
            begun = (*groups, *self._source.in_flight)
            late = sum(group.batch + (group.index >= num_planned) < number for group in begun)
            num_ahead = min(self._num_ahead + math.ceil(late / per_batch), self._most_ahead)
            groups += self._planned(examples, num_members, number, info.step)
            later_steps: list[int] = []
            for index in range(1, self._most_ahead + 1):
                if (coming := ahead(number + index)) is None:
                    break
                later_steps.append(coming[1])
                if index <= num_ahead:
                    groups += self._planned(coming[0], num_members, number + index, coming[1])
        info = dataclasses.replace(info, later_steps=tuple(later_steps), per_batch=per_batch)
        if self._refill is None:
            return self._collected(groups, per_batch, info)
        batch = self._collected(groups, per_batch, dataclasses.replace(info, is_last=False))
        return self._refilled(batch, self._refill, num_members, number=number, info=info)

    def state(self) -> QueueState:
        """Return what a checkpoint needs: the groups that are in flight."""
        return QueueState(
            num_planned=self._num_planned,
            options=self._options,
            groups=self._restored
            + [
                {
                    "example": group.example,
                    "step": group.requests[0].step,
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
        journal. Raises `ConfigError`: there are some, and options that say what a batch is have changed."""
        self._num_planned, self._restored = 0, []
        if not state.groups:  # all that was planned is trained
            return
        changed = [
            f"`{name}` is {self._options.get(name)} and was {value}"
            for name, value in state.options.items()
            if name != _STALENESS and self._options.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"The checkpoint has {len(state.groups)} groups of rollouts in flight (`{_STALENESS}`), which fit no "
                f"other batches: {', '.join(changed)}.",
                "Resume with the former values.",
            )
        self._num_planned, self._restored = state.num_planned, list(state.groups)
        if self._options[_STALENESS] < state.options[_STALENESS]:  # they may be too old when their turn comes
            self._restored = [saved | {"begun": None} for saved in state.groups]

    def _planned_again(self, saved: dict[str, Any], step: int) -> TaskGroup:
        place = {name: saved[name] for name in ("batch", "group", "members")}
        group = self._plan(saved["example"], step=saved.get("step", step), **place)  # earlier versions saved no step
        return dataclasses.replace(group, begun=None if saved["begun"] is None else Policy(*saved["begun"]))

    def _planned(self, examples: Sequence[Example], num_members: int, number: int, step: int) -> list[TaskGroup]:
        if number < self._num_planned:  # it is in flight, or was trained
            return []
        self._num_planned = number + 1
        return self._groups(examples, num_members, number, step)

    def _groups(self, examples: Sequence[Example], num_members: int, number: int, step: int) -> list[TaskGroup]:
        return [
            self._group(examples[first], members, step=step, number=number, group=group)
            for group, first, members in self._parts(len(examples), num_members)
        ]

    def _group(self, example: Example, members: Sequence[int], *, step: int, number: int, group: int) -> TaskGroup:
        return self._plan(self._choose(example, group), step=step, batch=number, group=group, members=members)

    def _parts(self, num_examples: int, num_members: int) -> list[tuple[int, int, list[int]]]:
        return group_parts(num_examples, num_members, rank=self._accelerator.process_index)

    def _collected(self, groups: Sequence[TaskGroup], number: int, info: BatchInfo) -> GenerationBatch:
        collected = self._source.collect(groups, number, info)
        with agreed(self._accelerator, self._gather):
            rollouts = [rollout for group in collected.groups for rollout in group.rollouts]
            rewards = iter(self._reward(rollouts) if rollouts else [])
            rewarded = [
                self._rewarded(group, list(itertools.islice(rewards, len(group.rollouts))))
                for group in collected.groups
            ]
        return GenerationBatch(groups=rewarded, metrics=collected.metrics)

    def _rewarded(self, ended: EndedGroup, rewards: list[float | None]) -> RewardedGroup:
        found = zip(ended.rollouts, rewards, strict=True)
        valid = [(rollout, reward) for rollout, reward in found if reward is not None and rollout.trajectories]
        judges = self._apart if self._refill is not None and valid else None
        apart = None if judges is None else judges(valid)
        return RewardedGroup(ended=ended, rewards=rewards, apart=apart)

    # ------------------------------------------------------------------------------------- groups that teach nothing

    def _refilled(
        self, batch: GenerationBatch, refill: Refill, num_members: int, *, number: int, info: BatchInfo
    ) -> GenerationBatch:
        """Replace groups that teach nothing, round by round; every rank makes as many rounds.

        Args:
            batch: What was collected first.
            num_members: Members of a group, all of them on one rank.
            number: Number of the batch, in the run.
        """
        groups, replaced, metrics = list(batch.groups), list[RewardedGroup](), batch.metrics
        num_groups = len(groups) * self._accelerator.num_processes  # so many have an index
        num_rounds = num_replaced = 0
        while num_rounds < refill.num_rounds:
            places = [place for place, group in enumerate(groups) if not group.teaches(refill.min_group_size)]
            told = self._gather([(len(places), self._tasks([*groups, *replaced]))])
            counts = [count for count, _ in told]
            if not any(counts):
                break
            with agreed(self._accelerator, self._gather):
                known = {task for _, own in told for task in own}
                rows = self._further(refill, counts, known, number=number, round_index=num_rounds)
                first = num_groups + sum(counts[: self._accelerator.process_index])
                further = [
                    self._group(refill.dataset[row], range(num_members), step=info.step, number=number, group=group)
                    for group, row in enumerate(rows, start=first)
                ]
            num_rounds += 1
            num_groups += sum(counts)
            num_replaced += min(sum(counts), len(refill.dataset))
            # A rank that lacks nothing takes part: ranks agree on lost servers while they collect.
            info = dataclasses.replace(info, is_first=False, is_last=num_rounds == refill.num_rounds)
            new = self._collected(further, len(further), info)
            metrics = new.metrics  # of all rounds so far
            for place, group in zip(places, new.groups, strict=False):  # a small dataset has fewer tasks
                replaced.append(groups[place])
                groups[place] = group
        metrics = metrics | refill_metrics(batch.groups, groups, refill.min_group_size)
        metrics |= {"refill/groups_replaced": [float(num_replaced)], "refill/rounds": [float(num_rounds)]}
        return GenerationBatch(groups=groups, replaced=replaced, metrics=metrics)

    def _tasks(self, groups: Sequence[RewardedGroup]) -> list[str]:
        """Return what this rank has rolled out for a batch, or is rolling out for any."""
        own = [*(group.ended.task for group in groups), *self._source.in_flight]
        return [_task(group.example) for group in own]

    def _further(
        self, refill: Refill, counts: Sequence[int], known: Collection[str], *, number: int, round_index: int
    ) -> list[int]:
        """Return the rows of the dataset that this rank rolls out in a round."""
        stream = further_tasks(
            len(refill.dataset),
            seed=refill.seed,
            batch=number,
            round_index=round_index,
            exclude=known,
            identity=lambda row: _task(refill.dataset[row]),
        )
        return own_share(stream, counts, self._accelerator.process_index)


def batches_of(
    args: GymGRPOConfig,
    accelerator: Accelerator,
    source: RolloutSource,
    dataset: Dataset,
    *,
    choose: Callable[[Example, int], Example],
    plan: Plan,
    reward: Callable[[Sequence[Rollout]], list[float | None]],
    apart: Apart | None = None,
) -> Batches:
    """Return the batches of a configuration, for tasks of a dataset to train on. For the others see `Batches`."""
    refill = Refill(
        dataset=dataset, num_rounds=args.gym_refill_rounds, min_group_size=args.gym_min_group_size, seed=args.seed
    )
    return Batches(
        accelerator,
        source,
        num_ahead=min(args.gym_batches_ahead, args.most_batches_ahead),
        most_ahead=args.most_batches_ahead,
        options={name: getattr(args, name) for name in BATCH_OPTIONS},
        choose=choose,
        plan=plan,
        reward=reward,
        apart=apart,
        refill=refill if args.gym_refill_rounds else None,
    )


def refill_metrics(
    before: Sequence[RewardedGroup], after: Sequence[RewardedGroup], min_group_size: int
) -> dict[str, list[float]]:
    """Return values to log of one rank's groups, before any of them was replaced and after; see `docs/reference`.

    Args:
        before: What was collected first.
        after: What is trained.
        min_group_size: Fewest rollouts with a reward that are trained.
    """
    metrics = {
        "refill/reward_before": [reward for group in before for reward in group.valid],
        "refill/zero_variance_before": [float(group.is_flat) for group in before],
        "refill/too_small_before": [float(len(group.valid) < min_group_size) for group in before],
        "refill/left_fraction": [float(not group.teaches(min_group_size)) for group in after],
    }
    return {name: values for name, values in metrics.items() if values}


def _task(example: Example) -> str:
    # Not `task_index`: concatenated datasets each count from 0, and mixed ones have rows that are there twice.
    return task_hash(gym_row(example))


def _gather(items: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object(items)


def plan_group(
    example: Example,
    name: str,
    *,
    step: int,
    batch: int,
    group: int,
    members: Sequence[int],
    num_wanted: int,
    agent_of: Callable[[Mapping[str, Any]], str],
    build: Callable[[dict[str, Any], RolloutRequest], dict[str, Any]],
    sampling: Sampling,
    completion_budget: int,
    agent_sampling: Callable[[str], str],
    chat_template_kwargs: Mapping[str, Any] | None,
) -> TaskGroup:
    """Make the requests of a group.

    Args:
        name: The group's, unique over all ranks and processes; names of rollouts begin with it.
        step, batch, group: See `Plan`.
        members: Indices of its members, those that are wanted first.
        build: Returns what is posted for a row; gets the request with the stamped one.
        sampling, completion_budget, chat_template_kwargs: See `request.stamp`.
        agent_sampling: Returns that of an agent, see there.

    Raises:
        DatasetError: The row cannot be sent.
        TrlGymError: `build` is wrong.
    """
    requests = []
    for member in members:
        row = gym_row(example)
        agent = agent_of(row)
        identity: dict[str, Any] = {
            "rollout_id": f"{name}-m{member}-a0",
            "task_index": int(example.get("task_index", group)),
            "member": member,
        }
        stamped = stamp(
            row,
            **identity,
            sampling=sampling,
            completion_budget=completion_budget,
            agent_sampling=agent_sampling(agent),
            chat_template_kwargs=chat_template_kwargs,
        )
        place: dict[str, Any] = {"step": step, "batch": batch, "group": group, "attempt": 0}
        request = RolloutRequest(**identity, **place, agent=agent, row=stamped)
        with naming("build_request", request.described):
            own = build(row, request)
            if own is not stamped:
                json.dumps(own)  # it has to be one that can be sent
        requests.append(dataclasses.replace(request, row=own))
    return TaskGroup(batch=batch, index=group, example=example, requests=tuple(requests), num_wanted=num_wanted)


def step_of_batch(
    batch: int, *, generate_every: int, accumulation: int, num_steps: int = 0, num_micro_steps: int = 0
) -> int:
    """Return the number, from 1, of the optimizer step in which a generation batch is first trained.

    Args:
        batch: Number of the batch, in the run; not one of an earlier step than the present one.
        generate_every: Micro-steps per generation batch: `steps_per_generation` × `num_iterations`.
        accumulation: `gradient_accumulation_steps`. The last step of an epoch may have fewer micro-steps, which is why
            it is counted from the present step: what is known of later batches is of one epoch.
        num_steps: Optimizer steps made before the present one.
        num_micro_steps: Micro-steps made before the present step.
    """
    return num_steps + 1 + (batch * generate_every - num_micro_steps) // accumulation


def group_parts(num_examples: int, num_members: int, *, rank: int) -> list[tuple[int, int, list[int]]]:
    """Divide a rank's part of a generation batch into groups, of which the first and the last may lie across ranks.

    Args:
        num_examples: Of every rank.

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
