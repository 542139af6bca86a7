"""Which rollouts of a generation batch are trained, and how the loss forgets the others.

TRL's batch has one row per rollout, whatever became of it: groups are formed by row. A rollout without a reward keeps
its row, with one masked token (`batch.training_rows`), a NaN reward (out of its group's baseline) and advantage 0: it
adds exactly 0 to every sum. What is left to mend is what the sums are divided by. With V rows that have a reward out
of N, in M micro-batches (over ranks and the micro-steps that share the generation batch), v of them in this one of B:

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
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from trl_gym.errors import ConfigError, RolloutError

VALID = "rollout_is_valid"
NUM_VALID = "num_valid_rollouts"
NUM_MICRO_BATCHES = "num_micro_batches"

_MEAN_OVER_ROWS = ("grpo", "sapo", "luspo", "dr_grpo")
_MEAN_OVER_MICRO_BATCH = ("bnpo",)
_MEAN_OVER_ALL_TOKENS = ("dapo", "cispo", "vespo")
LOSS_TYPES = (*_MEAN_OVER_ROWS, *_MEAN_OVER_MICRO_BATCH, *_MEAN_OVER_ALL_TOKENS)


def checked_rewards(rewards: Sequence[float | None], num_rollouts: int) -> list[float | None]:
    """What `compute_rewards` returned; NaN, as TRL has it, is None.

    Args:
        rewards: `[B]`.
        num_rollouts: `B`.

    Raises:
        RolloutError: The number is wrong, or a reward is infinite.
    """
    if len(rewards) != num_rollouts:
        raise RolloutError(
            f"`compute_rewards` returned {len(rewards)} rewards for {num_rollouts} rollouts; return one each."
        )
    infinite = [index for index, reward in enumerate(rewards) if reward is not None and math.isinf(reward)]
    if infinite:
        raise RolloutError(
            f"`compute_rewards` returned {rewards[infinite[0]]} for rollout {infinite[0]}; return a finite number, or "
            "None to take a rollout out of the loss."
        )
    return [None if reward is None or math.isnan(reward) else float(reward) for reward in rewards]


def undersized(groups: Sequence[Hashable], has_reward: Sequence[bool], min_size: int) -> set[Hashable]:
    """Groups with too few rewards to make a baseline of; those without any are among them.

    Args:
        groups: `[N]`, group of each rollout over all ranks.
        has_reward: `[N]`.
        min_size: Rewards that a group needs.
    """
    sizes = Counter(group for group, is_valid in zip(groups, has_reward, strict=True) if is_valid)
    return {group for group in groups if sizes[group] < min_size}


def check_same_task(groups: Sequence[Hashable], tasks: Sequence[Hashable]) -> None:
    """
    Args:
        groups: `[N]`, group of each rollout over all ranks.
        tasks: `[N]`, task of each rollout.

    Raises:
        RolloutError: A group holds rollouts of several tasks: its baseline would mean nothing.
    """
    task_of: dict[Hashable, Hashable] = {}
    for group, task in zip(groups, tasks, strict=True):
        if task_of.setdefault(group, task) != task:
            raise RolloutError(
                f"Group {group} has rollouts of the tasks {task_of[group]} and {task}. TRL's sampler puts the "
                "rollouts of a task next to each other; a sampler or data loader of your own must do so too."
            )


def mark(batch: dict[str, Any], valid: Sequence[bool], *, num_valid: int, num_micro_batches: int) -> dict[str, Any]:
    """A generation batch that knows which of its rows count; TRL may shuffle and split it.

    Args:
        batch: What `GRPOTrainer._generate_and_score_completions` returns, `B` rows of this rank.
        valid: `[B]`.
        num_valid: Rows with a reward over all ranks.
        num_micro_batches: Micro-batches that it makes, over all ranks.
    """
    return batch | {
        VALID: torch.tensor(valid, device=batch["completion_ids"].device),
        NUM_VALID: torch.tensor(num_valid),
        NUM_MICRO_BATCHES: torch.tensor(num_micro_batches),
    }


def weighted(batch: Mapping[str, Any], loss_type: str) -> tuple[dict[str, Any], float]:
    """A micro-batch whose loss forgets the rows that do not count, and the weight that its KL term needs.

    Args:
        batch: A piece of what `mark` returned, `B` rows; anything else is returned as it is, with weight 1.
        loss_type: One of `LOSS_TYPES`.

    Raises:
        ConfigError: What that loss divides by is not known.
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
            f"`loss_type` is {loss_type!r}, and what it divides by is not known: failed rollouts would weigh in it. "
            f"Choose one of {', '.join(LOSS_TYPES)}."
        )
    if num_valid == 0 or loss_type in _MEAN_OVER_ALL_TOKENS:
        return 1.0  # without a valid row there is only 0 to be weighted
    counted = num_valid if loss_type in _MEAN_OVER_MICRO_BATCH else num_rows
    return counted * num_micro_batches / total
