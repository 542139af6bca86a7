"""Turn a generation batch of finished rollouts into what TRL trains on and shows. Pure functions.

TRL's batch has one row per rollout, whatever became of it: groups are formed by row. A rollout without a reward keeps
its row, with one masked token (`training_rows`), a NaN reward (out of its group's baseline) and advantage 0: it adds
exactly 0 to every sum. What the sums are divided by is corrected here (`mark`, `weighted`). With V rows that have a
reward out of N, in M micro-batches (over ranks and the micro-steps that share the generation batch), v of them in this
one of B:

    loss_type              TRL 1.16 computes, per micro-batch              should be          weight
    grpo, sapo             sum over rows of a token mean / B               / (V/M)            N / V
    luspo                  sum over rows of a token sum / B                / (V/M)            N / V
    dr_grpo                sum over tokens / (B · max length)              / (V/M · …)        N / V
    bnpo                   mean over the tokens that it has                a share of v / V   v · M / V
    dapo, cispo, vespo     sum over tokens / (unmasked tokens of all / M)  right              1

and takes the mean over the M micro-batches (accumulation, ranks). B = N/M. For `bnpo` "without the failed rollouts" is
a matter of taste: its micro-batches are weighted by the rows that they have, which for one micro-batch is no change,
and lets one that has none count for nothing instead of for 0 in the mean.

All these losses are homogeneous in the advantages (what depends on their sign does not change), so the weight is put
on the advantages, and on `beta`, whose KL term is divided alike. The entropy bonus and the router loss have divisors
of their own and keep them. Rows cannot simply be dropped: ranks would disagree on shapes that TRL gathers. V counts
the generation batch, as `num_items_in_batch` does: with several optimizer steps per generation batch, each has its
share on average.

Ranks roll out their own rows; groups may lie across ranks. One gather per batch (`share`) tells every rank the facts
of every rollout, so that all come to the same decision: no rank trains, or raises, alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_gym.errors import ConfigError, Problem, RolloutError
from trl_gym.rollouts.rollout import Rollout, RolloutFacts, facts_of
from trl_gym.rollouts.trajectory import Trajectory, finish_reason

_NUM_CAUSES = 20  # that a rank tells the others; a cause may be 600 characters long
_NUM_SHOWN = 5  # of them, in an error


def training_rows(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    *,
    pad_id: int,
    eos_id: int,
    mask_truncated: bool = False,
    with_logprobs: bool = True,
) -> dict[str, list[Any]]:
    """Return the columns of TRL's `rollout_func`, one entry per rollout.

    A rollout without a reward gets a single masked token: TRL needs one, and it trains nothing.

    Args:
        rollouts: `[B]`.
        rewards: `[B]`; None takes a rollout out.
        pad_id: Stands for the prompt of a rollout without a reward.
        eos_id: Stands for its completion.
        mask_truncated: Mask the tokens of rollouts that Gym reports as cut. As in TRL, their rewards stay in the
            baseline and their rows in what the loss divides by.
        with_logprobs: Otherwise the log-probabilities are None, which TRL reads as unknown: those of evaluation, when
            it samples from another distribution than the one that is trained, are no measure of anything.

    Returns:
        `prompt_ids` `[B][P]`, `completion_ids`, `logprobs` and `env_mask` `[B][T]`, and for the reward functions
        `gym_reward` `[B]` and `gym_result` `[B]`.
    """
    nothing = Trajectory(prompt_ids=[pad_id], completion_ids=[eos_id], env_mask=[0], logprobs=[0.0], num_turns=0)
    trained = [
        rollout.trajectories[0] if rollout.trajectories and reward is not None else nothing
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]
    masked = [mask_truncated and rollout.is_truncated for rollout in rollouts]
    return {
        "prompt_ids": [trajectory.prompt_ids for trajectory in trained],
        "completion_ids": [trajectory.completion_ids for trajectory in trained],
        "logprobs": [t.logprobs if with_logprobs else [None] * len(t.logprobs) for t in trained],
        "env_mask": [[0] * len(t.env_mask) if cut else t.env_mask for t, cut in zip(trained, masked, strict=True)],
        "gym_reward": list(rewards),
        "gym_result": [rollout.answer for rollout in rollouts],
    }


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


def as_problems(causes: Counter[str]) -> list[Problem]:
    """Return the most frequent causes for an error: `12 × environment (my_agent /run): …`."""
    return [Problem(f"{count} × {cause}") for cause, count in causes.most_common(_NUM_SHOWN)]


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


# -- what the loss is divided by --------------------------------------------------------------------------------------

VALID = "rollout_is_valid"
NUM_VALID = "num_valid_rollouts"
NUM_MICRO_BATCHES = "num_micro_batches"

_MEAN_OVER_ROWS = ("grpo", "sapo", "luspo", "dr_grpo")
_MEAN_OVER_MICRO_BATCH = ("bnpo",)
_MEAN_OVER_ALL_TOKENS = ("dapo", "cispo", "vespo")
LOSS_TYPES = (*_MEAN_OVER_ROWS, *_MEAN_OVER_MICRO_BATCH, *_MEAN_OVER_ALL_TOKENS)


def checked_rewards(rewards: Sequence[float | None], num_rollouts: int) -> list[float | None]:
    """Check what `compute_rewards` returned, and return it with None for NaN, which TRL uses.

    Args:
        rewards: `[B]`.
        num_rollouts: `B`.

    Raises:
        RolloutError: The number is wrong, or a reward is infinite.
    """
    if len(rewards) != num_rollouts:
        raise RolloutError(
            f"`compute_rewards` returned {len(rewards)} rewards for {num_rollouts} rollouts.", "Return one for each."
        )
    infinite = [index for index, reward in enumerate(rewards) if reward is not None and math.isinf(reward)]
    if infinite:
        raise RolloutError(
            f"`compute_rewards` returned {rewards[infinite[0]]} for rollout {infinite[0]}.",
            "Return a finite number, or None to take a rollout out of the loss.",
        )
    return [None if reward is None or math.isnan(reward) else float(reward) for reward in rewards]


def mark(batch: dict[str, Any], valid: Sequence[bool], *, num_valid: int, num_micro_batches: int) -> dict[str, Any]:
    """Return a generation batch that knows which of its rows count; TRL may shuffle and split it.

    Args:
        batch: The result of `GRPOTrainer._generate_and_score_completions`, `B` rows of this rank.
        valid: `[B]`, whether a row counts.
        num_valid: Rows that count, over all ranks.
        num_micro_batches: Micro-batches that the batch is split into, over all ranks.
    """
    return batch | {
        VALID: torch.tensor(valid, device=batch["completion_ids"].device),
        NUM_VALID: torch.tensor(num_valid),
        NUM_MICRO_BATCHES: torch.tensor(num_micro_batches),
    }


def weighted(batch: Mapping[str, Any], loss_type: str) -> tuple[dict[str, Any], float]:
    """Return a micro-batch whose loss leaves out the rows that do not count, and the weight that its KL term needs.

    Args:
        batch: A part of what `mark` returned, `B` rows; anything else is returned as it is, with weight 1.
        loss_type: One of `LOSS_TYPES`.

    Raises:
        ConfigError: `loss_type` is not one of them.
    """
    rows = dict(batch)
    valid, total, num_micro_batches = (rows.pop(name, None) for name in (VALID, NUM_VALID, NUM_MICRO_BATCHES))
    if valid is None:
        return rows, 1.0
    weight = _weight(loss_type, len(valid), int(valid.sum()), int(total), int(num_micro_batches))
    if weight != 1.0:
        rows["advantages"] = rows["advantages"] * weight
    return rows, weight


def _weight(loss_type: str, num_rows: int, num_valid: int, total: int, num_micro_batches: int) -> float:
    if loss_type not in LOSS_TYPES:
        raise ConfigError(
            f"`loss_type` is {loss_type!r}, and what it divides by is not known: failed rollouts would weigh in it.",
            f"Choose one of {', '.join(LOSS_TYPES)}.",
        )
    if num_valid == 0 or loss_type in _MEAN_OVER_ALL_TOKENS:
        return 1.0  # without a valid row there is only 0 to be weighted
    counted = num_valid if loss_type in _MEAN_OVER_MICRO_BATCH else num_rows
    return counted * num_micro_batches / total


# -- what ranks decide together ---------------------------------------------------------------------------------------


RankReport = tuple[list[RolloutFacts], Counter[str]]
"""What a rank tells the others: the facts of its rollouts, `[B]` by row, and the causes of its failures, counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBatch:
    """A generation batch on all ranks."""

    facts: list[RolloutFacts]  # `[N]`, by rank and row: the order of rows that `accelerate.utils.gather` makes
    own: slice  # this rank's rows among them
    causes: Counter[str]  # causes of failures, counted

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
        """Return the same batch, in which no member of a group with too few rewards is trained.

        Raises:
            RolloutError: A group has rollouts of several tasks: its baseline would mean nothing.
        """
        task_of: dict[str, tuple[str, int]] = {}
        for fact in self.facts:
            task = fact.agent, fact.task
            if task_of.setdefault(fact.group, task) != task:
                raise RolloutError(
                    f"Group {fact.group} has rollouts of the tasks {task_of[fact.group]} and {task}.",
                    "Put the rollouts of a task next to each other in your own sampler or data loader, as TRL's does.",
                )
        sizes = Counter(fact.group for fact in self.facts if fact.is_valid)
        small = {group for group in task_of if sizes[group] < min_group_size}
        facts = [dataclasses.replace(f, is_valid=False) if f.group in small else f for f in self.facts]
        return dataclasses.replace(self, facts=facts)

    def check(self, min_valid_fraction: float, *, step: int, where: str) -> None:
        """Check that enough of the rollouts are trained.

        Args:
            min_valid_fraction: Fraction of the rollouts that must be trained.
            step: Optimizer step whose weights sampled them.
            where: Tells the user where to read more: a sentence that begins with a verb.

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
        raise RolloutError(f"{summary}.", where, as_problems(self.causes))


def share(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    *,
    batch: str,
    rank: int,
    gather: Callable[[list[RankReport]], list[RankReport]],
) -> SharedBatch:
    """Tell the other ranks about this rank's rollouts, and return what all have told. Every rank calls it in step.

    Args:
        rollouts: `[B]`, of this rank.
        rewards: `[B]`, the rewards to train on. Without a token there is nothing to train, whatever the reward.
        batch: Name of the batch, the same on every rank.
        rank: This rank.
        gather: From a list on every rank to the list of all, by rank (accelerate's `gather_object`).
    """
    facts = [
        facts_of(rollout, reward if rollout.trajectories else None, batch)
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]
    reports = gather([(facts, failure_causes(rollouts))])
    first = sum(len(own) for own, _ in reports[:rank])
    return SharedBatch(
        facts=[fact for own, _ in reports for fact in own],
        own=slice(first, first + len(facts)),
        causes=sum((causes for _, causes in reports), Counter()),
    )
