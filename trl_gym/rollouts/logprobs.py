"""How far the log-probabilities of sampling (policy server) and of training (trainer's forward pass) are apart.

The gap shows what status codes cannot: weights that did not arrive, a temperature that is not the same on both sides,
a forward pass of other tokens than were sampled. Resolved by turn, it shows a prefix that was not what is trained.

TRL computes the trainer's side before the update, as `old_per_token_logps`, when `vllm_importance_sampling_correction`
is on (the default), or when generation is not aligned with optimizer steps. Otherwise there is nothing to compare, and
no gap is logged: it would cost a forward pass of its own.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trl_gym.errors import RolloutError

if TYPE_CHECKING:
    from trl_gym.rollouts.rollout import Rollout

_NUM_TURNS = 8  # from here on turns are counted together


@dataclass(frozen=True, slots=True)
class GapSum:
    """Absolute differences of log-probabilities in nats, summed up so that ranks can be added.

    Attributes:
        total: Their sum.
        num_tokens: How many.
        largest: The largest.
    """

    total: float
    num_tokens: int
    largest: float


def batch_gaps(
    batch: Mapping[str, Any], turn_ends: Sequence[Sequence[int]], agents: Sequence[str]
) -> dict[str, GapSum]:
    """Gaps of what `GRPOTrainer._generate_and_score_completions` returns, by metric name without the ending.

    Args:
        batch: `old_per_token_logps`, `sampling_per_token_logps`, `completion_mask` and `tool_mask`, each `[B, T]`.
        turn_ends: `[B]`, see `Trajectory.turn_ends`; empty for a rollout that is not trained.
        agents: `[B]`, names of agents.

    Returns:
        Empty when one of the two log-probabilities is missing.
    """
    training, sampling = batch.get("old_per_token_logps"), batch.get("sampling_per_token_logps")
    if training is None or sampling is None:
        return {}
    mask = batch["completion_mask"]
    if (tool_mask := batch.get("tool_mask")) is not None:
        mask = mask * tool_mask
    return gap_sums(sampling, training, mask, turn_ends, agents)


def gap_sums(
    sampling: torch.Tensor,
    training: torch.Tensor,
    mask: torch.Tensor,
    turn_ends: Sequence[Sequence[int]],
    agents: Sequence[str],
) -> dict[str, GapSum]:
    """Gaps over the sampled tokens of trained rollouts: over all (`""`), by turn and by agent.

    Args:
        sampling: `[B, T]`, in nats.
        training: `[B, T]`, in nats.
        mask: `[B, T]`, nonzero where the policy sampled a token that is trained.
        turn_ends: `[B]`, index just after the last sampled token of each turn.
        agents: `[B]`.

    Returns:
        Nothing for what has no token. Keys: `logprob_gap`, `logprob_gap/turn_<i>`, `gym/<agent>/logprob_gap`.
    """
    selected = mask.bool()
    gaps = (training.float() - sampling.float()).abs()[selected].cpu()
    row_of, turn_of = (index[selected.cpu()] for index in _row_and_turn(turn_ends, mask.shape[1]))
    sums = {"logprob_gap": _sum(gaps)}
    for turn in turn_of.unique().tolist():
        sums[f"logprob_gap/turn_{turn}" + ("+" if turn == _NUM_TURNS else "")] = _sum(gaps[turn_of == turn])
    for agent in sorted(set(agents)):
        is_agents = torch.tensor([name == agent for name in agents])
        sums[f"gym/{agent}/logprob_gap"] = _sum(gaps[is_agents[row_of]])
    return {name: gap for name, gap in sums.items() if gap.num_tokens}


def merge(ranks: Sequence[Mapping[str, GapSum]]) -> dict[str, float]:
    """Metrics over all ranks, every token with the same weight: `logprob_gap/mean`, `logprob_gap/max`, and the mean
    for each turn and agent.

    Args:
        ranks: What `gap_sums` returned on each.
    """
    by_name: defaultdict[str, list[GapSum]] = defaultdict(list)
    for sums in ranks:
        for name, gap in sums.items():
            by_name[name].append(gap)
    metrics = {
        name: sum(gap.total for gap in gaps) / sum(gap.num_tokens for gap in gaps) for name, gaps in by_name.items()
    }
    if (overall := metrics.pop("logprob_gap", None)) is None:
        return {}
    # torch, because Python's `max` may lose a NaN.
    largest = torch.tensor([gap.largest for gap in by_name["logprob_gap"]]).max().item()
    return {"logprob_gap/mean": overall, "logprob_gap/max": largest, **metrics}


def _row_and_turn(turn_ends: Sequence[Sequence[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and turn of every position, `[B, T]` each; turns from `_NUM_TURNS` on are one."""
    positions = torch.arange(length)
    turns = [torch.bucketize(positions, torch.tensor(ends, dtype=torch.long), right=True) for ends in turn_ends]
    rows = torch.arange(len(turn_ends))[:, None].expand(-1, length)
    return rows, torch.stack(turns).clamp(max=_NUM_TURNS)


def _sum(gaps: torch.Tensor) -> GapSum:
    if not gaps.numel():
        return GapSum(0.0, 0, 0.0)
    return GapSum(gaps.double().sum().item(), gaps.numel(), gaps.max().item())


# --------------------------------------------------------------------------------------------------------------------
# TRL's `sampling/importance_sampling_ratio/…` over the rollouts that are trained, every token or sequence with the
# same weight. TRL takes means of ranks' means, and counts rows that are not trained.

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


# --------------------------------------------------------------------------------------------------------------------
# The trainer's log-probabilities of sampled tokens, beside the journal: `<output_dir>/training_logprobs/*.jsonl`.
#
# A rollout is journaled before it is trained on, and these are known later, so they have files of their own. One
# object
# per rollout: `{"rollout_id": …, "logprobs": [T]}`, in nats, one for each of the journal's `completion_ids`.

FOLDER = "training_logprobs"
_DIGITS = 5


def record(
    output_dir: str | Path, logprobs: torch.Tensor, rollouts: Sequence[Rollout], *, step: int, rank: int
) -> None:
    """Append those of one generation batch.

    Args:
        output_dir: Of the run.
        logprobs: `[B, T]`, in nats, as the trainer computed them before the update.
        rollouts: `[B]`; failed ones are left out.
        step: Optimizer steps that went into the weights.
        rank: Of this process.

    Raises:
        RolloutError: They cannot be written.
    """
    folder = Path(output_dir) / FOLDER
    lines = []
    for row, rollout in zip(logprobs.float().cpu(), rollouts, strict=True):
        if not rollout.trajectories:
            continue
        values = row[: len(rollout.trajectories[0].completion_ids)].tolist()
        line = {"rollout_id": rollout.request.rollout_id, "logprobs": [round(value, _DIGITS) for value in values]}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"step-{step}.rank-{rank}.jsonl").open("a") as file:
            file.writelines(lines)
    except OSError as error:
        raise RolloutError(
            f"The trainer's log-probabilities could not be written to {folder} ({error}). Free some space there, or "
            "make it writable, and resume: the rollouts themselves are in the journal."
        ) from error
