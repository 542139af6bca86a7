"""Trajectories → rows of TRL's batch: which of them there are, and how much each weighs in the loss. Pure functions.

A rollout has a row for each of its trajectories, and none when it is not trained: it failed, has no reward, or its
group was left out. Groups are formed of rollouts, never of rows: rewards and advantages are TRL's, one per rollout,
and each row gets that of its rollout (`mark`). Every rank has the same number R of rows, at least as many as rollouts:
TRL gathers tensors of equal shape, and splits them into micro-batches. What is missing is filled with rows of one
masked token and advantage 0, which add exactly 0 to every sum. More rows than `gym_max_rows_factor` allows are dropped
(`fit`).

What the sums are divided by is corrected here (`weighted`). With V rollouts that are trained, in M micro-batches (over
ranks and the micro-steps that share the generation batch) of B rows each; share: the part of its rollout's sampled
tokens that a row has, 1 in all; v: the sum of the shares in a micro-batch:

    loss_type              TRL 1.16 computes, per micro-batch              should be          weight
    grpo, sapo             sum over rows of a token mean / B               / (V/M)            share · B · M / V
    luspo                  sum over rows of a token sum / B                / (V/M)            B · M / V
    dr_grpo                sum over tokens / (B · max length)              / (V/M · …)        B · M / V
    bnpo                   mean over the tokens that it has                a share of v / V   v · M / V
    dapo, cispo, vespo     sum over tokens / (unmasked tokens of all / M)  right              1

and takes the mean over the M micro-batches (accumulation, ranks). A rollout weighs what it would if its rows were one.
For `bnpo` "without the failed rollouts" is a matter of taste: its micro-batches are weighted by the rollouts that they
have, which for one micro-batch is no change, and lets one without any count for nothing instead of for 0 in the mean.

All these losses are homogeneous in the advantages (what depends on their sign does not change), so the weight is put
on the advantages, and on `beta`, whose KL term is divided alike. But `beta` is one number for a micro-batch and cannot
have the share of `grpo` and `sapo`: with it, several rows are refused. The entropy bonus and the router loss have
divisors of their own and keep them. V counts the generation batch, as `num_items_in_batch` does: with several
optimizer steps per generation batch, each has its share on average.

What TRL does by sequence it does by row, each of which was sampled in one context: the importance ratio of
`importance_sampling_level` and of the `sequence_…` values of `vllm_importance_sampling_mode`, `vespo`'s weight and
`off_policy_mask_threshold`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_gym.config_checks import TOKEN_MEAN_LOSSES
from trl_gym.errors import ConfigError
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of this rank's batch."""

    rollout: int | None  # index of its rollout on this rank; None for a row that fills up
    index: int  # index of its trajectory in the rollout
    trajectories: Sequence[Trajectory]  # those of the rollout
    share: float  # part of the rollout's sampled tokens that it has: 1 in all rows of one; 0 where it has none

    @property
    def trajectory(self) -> Trajectory:
        """Its tokens; their lists are made again at each look."""
        return self.trajectories[self.index]


# -- which rows there are ---------------------------------------------------------------------------------------------


def fit(counts: Sequence[int], *, num_ranks: int, multiple: int, factor: float) -> tuple[int, list[int]]:
    """Return the rows of each rank, and how many of each rollout's rows are dropped: its oldest ones.

    As long as a rank has too many rows, the rollout with most of them (of several, the first) loses its oldest one.
    A rollout keeps at least one. The choice depends on the counts alone: every rank makes it for all.

    Args:
        counts: `[N]`, trajectories of every rollout by rank, as many rollouts on each; 0 for one that is not trained.
        multiple: Micro-batches of a rank: its rows are a multiple of it, as its rollouts are.
        factor: How many times as many rows as rollouts a rank may have; at least 1.

    Returns:
        `R`, at least the rollouts of a rank, and `[N]`.
    """
    num_rollouts = len(counts) // num_ranks
    most = max(math.floor(num_rollouts * factor) // multiple * multiple, num_rollouts)
    num_rows, dropped = num_rollouts, [0] * len(counts)
    for first in range(0, len(counts), num_rollouts):
        own = counts[first : first + num_rollouts]
        heap = [(-count, index) for index, count in enumerate(own, start=first)]
        heapq.heapify(heap)
        for _ in range(sum(own) - most):
            count, index = heap[0]
            heapq.heapreplace(heap, (count + 1, index))
            dropped[index] += 1
        num_rows = max(num_rows, math.ceil(min(sum(own), most) / multiple) * multiple)
    return num_rows, dropped


def rows_of(
    rollouts: Sequence[Rollout], dropped: Sequence[int | None], num_rows: int, *, pad_id: int, eos_id: int
) -> list[Row]:
    """Return this rank's rows, `[R]`.

    The first row of a rollout stands in the rollout's place. Further rows take the places of rollouts that are not
    trained, and those behind; rows that fill up take what is left.

    Args:
        rollouts: `[B]`, of this rank.
        dropped: `[B]`, how many of each one's rows are dropped; None for a rollout that is not trained.
        num_rows: `R`.
        pad_id: The prompt of a row that fills up; its completion is `eos_id`, since TRL needs a token.
    """
    by_place = [
        [] if first is None else _rows_of_one(place, rollout.trajectories, first)
        for place, (rollout, first) in enumerate(zip(rollouts, dropped, strict=True))
    ]
    nothing = Trajectory(prompt_ids=[pad_id], completion_ids=[eos_id], env_mask=[0], logprobs=[0.0], num_turns=0)
    filler = Row(rollout=None, index=0, trajectories=[nothing], share=0.0)
    further = [row for own in by_place for row in own[1:]]
    others = iter(further + [filler] * (num_rows - sum(map(len, by_place))))
    return [own[0] if own else next(others) for own in by_place] + list(others)


def _rows_of_one(place: int, trajectories: Sequence[Trajectory], first: int) -> list[Row]:
    kept = range(first, len(trajectories))
    sampled = [trajectories[index].env_mask.count(1) for index in kept]
    total = sum(sampled)
    return [
        Row(rollout=place, index=index, trajectories=trajectories, share=own / total if total else 1 / len(kept))
        for index, own in zip(kept, sampled, strict=True)
    ]


def training_rows(
    rows: Sequence[Row],
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    *,
    mask_truncated: bool = False,
    with_logprobs: bool = True,
) -> dict[str, list[Any]]:
    """Return the columns of TRL's `rollout_func`.

    Args:
        rows: `[R]`.
        rollouts: `[B]`.
        rewards: `[B]`; None for a rollout that is not trained.
        mask_truncated: Mask the tokens of rollouts that Gym reports as cut. As in TRL, their rewards stay in the
            baseline and their rows in what the loss divides by.
        with_logprobs: Otherwise the log-probabilities are None, which TRL reads as unknown: those of evaluation, when
            it samples from another distribution than the one that is trained, are no measure of anything.

    Returns:
        `prompt_ids` `[R][P]`, `completion_ids`, `logprobs` and `env_mask` `[R][T]`, and for the reward functions
        `gym_reward` `[B]` and `gym_result` `[B]`.
    """
    trained = [row.trajectory for row in rows]
    cut = [mask_truncated and row.rollout is not None and rollouts[row.rollout].is_truncated for row in rows]
    return {
        "prompt_ids": [trajectory.prompt_ids for trajectory in trained],
        "completion_ids": [trajectory.completion_ids for trajectory in trained],
        "logprobs": [t.logprobs if with_logprobs else [None] * len(t.logprobs) for t in trained],
        "env_mask": [[0] * len(t.env_mask) if is_cut else t.env_mask for t, is_cut in zip(trained, cut, strict=True)],
        "gym_reward": list(rewards),
        "gym_result": [rollout.answer for rollout in rollouts],
    }


def joined(rows: Sequence[Row], num_rollouts: int, *, eos_id: int) -> list[list[int]]:
    """Return the completion of each rollout, `[B][T]`, for the reward functions: those of its rows one after another,
    and `eos_id` alone for one that is not trained."""
    completions: list[list[int]] = [[] for _ in range(num_rollouts)]
    for row in sorted(rows, key=lambda row: row.index):
        if row.rollout is not None:
            completions[row.rollout] = completions[row.rollout] + row.trajectory.completion_ids
    return [completion or [eos_id] for completion in completions]


# -- how much they weigh ----------------------------------------------------------------------------------------------

SHARE = "rollout_is_valid"  # the name that it has in checkpoints from when a rollout had one row: 1, or 0 for a failed
NUM_VALID = "num_valid_rollouts"
NUM_MICRO_BATCHES = "num_micro_batches"

_MEAN_OVER_ROWS = ("grpo", "sapo", "luspo", "dr_grpo")
MEAN_OVER_MICRO_BATCH = ("bnpo",)
_MEAN_OVER_ALL_TOKENS = ("dapo", "cispo", "vespo")
# What TRL hands to the model of rows that may have images; see `GymGRPOTrainer._get_per_token_logps_and_entropies`.
_OF_IMAGES = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
LOSS_TYPES = (*_MEAN_OVER_ROWS, *MEAN_OVER_MICRO_BATCH, *_MEAN_OVER_ALL_TOKENS)


def mark(batch: dict[str, Any], rows: Sequence[Row], *, num_valid: int, num_micro_batches: int) -> dict[str, Any]:
    """Return a generation batch in which each row has the advantage and the share of its rollout; TRL may shuffle and
    split it.

    Args:
        batch: The result of `GRPOTrainer._generate_and_score_completions`: `R` rows of this rank, and the advantages
            `[B]` of its rollouts.
        rows: `[R]`.
        num_valid: Rollouts that are trained, over all ranks.
        num_micro_batches: Micro-batches that the batch is split into, over all ranks.
    """
    advantages = batch["advantages"]
    share = torch.tensor([row.share for row in rows], dtype=torch.float32, device=advantages.device)
    is_trained = torch.tensor([row.rollout is not None for row in rows], device=advantages.device)
    spread = advantages[[row.rollout or 0 for row in rows]]
    return batch | {
        "advantages": torch.where(is_trained, spread, torch.zeros_like(spread)),
        SHARE: share,
        NUM_VALID: torch.tensor(num_valid),
        NUM_MICRO_BATCHES: torch.tensor(num_micro_batches),
    }


def weighted(batch: Mapping[str, Any], loss_type: str) -> tuple[dict[str, Any], float]:
    """Return a micro-batch whose loss counts each trained rollout once, and the weight that its KL term needs.

    Args:
        batch: A part of what `mark` returned, `B` rows; anything else is returned as it is, with weight 1.
        loss_type: One of `LOSS_TYPES`.

    Returns:
        Rows that are not trained have masks of 0, upon which `padding.compute_rows` leaves them out: also out of the
        router loss, which knows no other mask. Where there are images, it does not compute them.

    Raises:
        ConfigError: `loss_type` is not one of them.
    """
    rows = dict(batch)
    share, total, num_micro_batches = (rows.pop(name, None) for name in (SHARE, NUM_VALID, NUM_MICRO_BATCHES))
    if share is None:
        return rows, 1.0
    if not any(rows.get(name) is not None for name in _OF_IMAGES):
        is_trained = share[:, None] > 0
        rows |= {name: rows[name] * is_trained for name in ("prompt_mask", "completion_mask") if name in rows}
    weight = _weight(loss_type, len(share), float(share.sum()), int(total), int(num_micro_batches))
    advantages = rows["advantages"]
    if loss_type in TOKEN_MEAN_LOSSES:
        rows["advantages"] = advantages * (share * weight).view(-1, *(1,) * (advantages.dim() - 1))
    elif weight != 1.0:
        rows["advantages"] = advantages * weight
    return rows, weight


def _weight(loss_type: str, num_rows: int, num_valid: float, total: int, num_micro_batches: int) -> float:
    if loss_type not in LOSS_TYPES:
        raise ConfigError(
            f"`loss_type` is {loss_type!r}, and what it divides by is not known: failed rollouts would weigh in it.",
            f"Choose one of {', '.join(LOSS_TYPES)}.",
        )
    if num_valid == 0 or loss_type in _MEAN_OVER_ALL_TOKENS:
        return 1.0  # without a valid row there is only 0 to be weighted
    counted = num_valid if loss_type in MEAN_OVER_MICRO_BATCH else num_rows
    return counted * num_micro_batches / total


# -- TRL's means over rows --------------------------------------------------------------------------------------------

ROW_COUNTS = "row_counts"


def num_trained_rows(micro_batch: Mapping[str, Any]) -> torch.Tensor:
    """Return how many rows of a part of what `mark` returned are of rollouts that are trained, `[]`."""
    return (micro_batch[SHARE] > 0).sum()


def row_counts(num_rows: torch.Tensor, num_trained: torch.Tensor, num_together: int) -> torch.Tensor:
    """Return what `mean_of_trained` needs of each micro-batch, `[M, 3]`.

    Args:
        num_rows: `[M]`, rows of each micro-batch, over all ranks.
        num_trained: `[M]`, those of them that are trained.
        num_together: How many micro-batches in succession belong to one optimizer step.
    """
    in_step = num_trained.double().view(-1, num_together).mean(1).repeat_interleave(num_together)
    return torch.stack([num_rows.double(), num_trained.double(), in_step], dim=1)


def mean_of_trained(mean: float, counts: torch.Tensor, *, untrained: float) -> float:
    """Return a value of a micro-batch whose mean over an optimizer step's is that of the step's trained rows.

    Args:
        mean: Over all rows of the micro-batch, on all ranks.
        counts: `[3]`, see `row_counts`.
        untrained: The value of a row that is not trained.

    Returns:
        NaN where the step trains no row, which TRL leaves out.
    """
    num_rows, num_trained, in_step = counts.tolist()
    return (mean * num_rows - untrained * (num_rows - num_trained)) / in_step if in_step else math.nan
