"""TRL's `sampling/importance_sampling_ratio/…` over the rollouts that are trained, every token or sequence with the
same weight. TRL takes means of ranks' means, and counts rows that are not trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_NAME = "sampling/importance_sampling_ratio"


@dataclass(frozen=True, slots=True)
class RatioSum:
    """Importance sampling ratios, summed up so that ranks can be added.

    Attributes:
        total: Their sum.
        count: How many.
        smallest: The smallest; infinite when there is none.
        largest: The largest; minus infinite when there is none.
    """

    total: float
    count: int
    smallest: float
    largest: float


def ratio_sum(batch: Mapping[str, Any], valid: Sequence[bool]) -> RatioSum | None:
    """The ratios of what `GRPOTrainer._generate_and_score_completions` returns; None when it has none.

    Args:
        batch: `importance_sampling_ratio`, `[B, T]` by token or `[B, 1]` by sequence, and the masks.
        valid: `[B]`, rows that are trained.
    """
    ratios = batch.get("importance_sampling_ratio")
    if ratios is None:
        return None
    rows = torch.tensor(valid, device=ratios.device)
    mask = batch["completion_mask"] * batch["tool_mask"]
    chosen = ratios[rows].flatten() if ratios.shape[1] == 1 else ratios[mask.bool() & rows[:, None]]
    if not chosen.numel():
        return RatioSum(0.0, 0, math.inf, -math.inf)
    return RatioSum(chosen.double().sum().item(), chosen.numel(), chosen.min().item(), chosen.max().item())


def merge_ratios(ranks: Sequence[RatioSum | None]) -> dict[str, float]:
    """Metrics over all ranks; NaN when nothing is trained, which TRL leaves out. Empty when there are no ratios."""
    sums = [own for own in ranks if own is not None]
    if not sums:
        return {}
    count = sum(own.count for own in sums)
    return {
        f"{_NAME}/min": min(own.smallest for own in sums) if count else math.nan,
        f"{_NAME}/mean": sum(own.total for own in sums) / count if count else math.nan,
        f"{_NAME}/max": max(own.largest for own in sums) if count else math.nan,
    }
