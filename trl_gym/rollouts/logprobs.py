"""Log-probabilities of sampling (policy server) and of training (trainer's forward pass) of the same tokens: the gap
between them, TRL's importance sampling ratios, and the trainer's side on disk.

The gap shows what status codes cannot: weights that did not arrive, a temperature that is not the same on both sides,
a forward pass of other tokens than were sampled. Resolved by turn, it shows a prefix that was not what is trained.

TRL computes the trainer's side before the update, as `old_per_token_logps`, when `vllm_importance_sampling_correction`
is on (the default), or when generation is not aligned with optimizer steps. Otherwise there is nothing to compare, and
no gap is logged: it would cost a forward pass of its own.

On disk the trainer's log-probabilities stand beside the journal, in `<output_dir>/training_logprobs/*.jsonl`: a
rollout is journaled before it is trained on, and these are known later. One object per trained rollout:
`{"schema": 3, "rollout_id": …, "step": …, "advantage": …, "logprobs": [T]}`. The advantage is TRL's: after all reward
functions, their weights and the scaling. Log-probabilities are in nats, one for each of the journal's
`completion_ids`; null for one that is not finite. With several rows, `further_rows` has `[T]` of each of the journal's
`further_rows`. A row that was dropped (`gym_max_rows_factor`) has an empty list. `step` trained the rollout; that of
the journal's line, for which it was sampled, may be another one with `gym_max_staleness`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from trl_gym.rollouts.journal import SCHEMA, TRAINING_LOGPROBS
from trl_gym.rollouts.metrics import ValueSum
from trl_gym.storage import writing

if TYPE_CHECKING:
    from trl_gym.rollouts.rollout import Rollout
    from trl_gym.rollouts.rows import Row

_NUM_TURNS = 8  # from here on turns are counted together


def batch_gaps(
    batch: Mapping[str, Any], turn_ends: Sequence[Sequence[int]], agents: Sequence[str]
) -> dict[str, ValueSum]:
    """Return the gaps over the sampled tokens of trained rollouts: over all, by turn and by agent.

    Args:
        batch: From `GRPOTrainer._generate_and_score_completions`: `old_per_token_logps`, `sampling_per_token_logps` in
            nats, `completion_mask` and `tool_mask`, each `[B, T]`.
        turn_ends: `[B]`, see `Trajectory.turn_ends`; empty for a row without a trained token.
        agents: `[B]`, names of agents; empty for a row that fills up.

    Returns:
        `logprob_gap`, `logprob_gap/turn_<i>` and `gym/<agent>/logprob_gap`; nothing for what has no token. Empty when
        one of the two log-probabilities is missing.
    """
    training, sampling = batch.get("old_per_token_logps"), batch.get("sampling_per_token_logps")
    if training is None or sampling is None:
        return {}
    mask = batch["completion_mask"]
    if (tool_mask := batch.get("tool_mask")) is not None:
        mask = mask * tool_mask
    selected = mask.bool()
    gaps = (training.float() - sampling.float()).abs()[selected].cpu()
    row_of, turn_of = (index[selected.cpu()] for index in _row_and_turn(turn_ends, mask.shape[1]))
    sums = {"logprob_gap": _sum(gaps)}
    for turn in turn_of.unique().tolist():
        sums[f"logprob_gap/turn_{turn}" + ("+" if turn == _NUM_TURNS else "")] = _sum(gaps[turn_of == turn])
    for agent in sorted(set(agents)):
        is_agents = torch.tensor([name == agent for name in agents])
        sums[f"gym/{agent}/logprob_gap"] = _sum(gaps[is_agents[row_of]])
    return {name: gap for name, gap in sums.items() if gap.count}


def _row_and_turn(turn_ends: Sequence[Sequence[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and turn of every position, `[B, T]` each; turns from `_NUM_TURNS` on are one."""
    positions = torch.arange(length)
    turns = [torch.bucketize(positions, torch.tensor(ends, dtype=torch.long), right=True) for ends in turn_ends]
    rows = torch.arange(len(turn_ends))[:, None].expand(-1, length)
    return rows, torch.stack(turns).clamp(max=_NUM_TURNS)


def _sum(values: torch.Tensor) -> ValueSum:
    if not values.numel():
        return ValueSum(0.0, 0, math.inf, -math.inf)
    return ValueSum(values.double().sum().item(), values.numel(), values.min().item(), values.max().item())


# -- importance sampling ratios ---------------------------------------------------------------------------------------


def ratio_sum(batch: Mapping[str, Any], valid: Sequence[bool]) -> ValueSum | None:
    """Return the sum of ratios of what `GRPOTrainer._generate_and_score_completions` returns; None when it has none.

    Args:
        batch: `importance_sampling_ratio`, `[B, T]` by token or `[B, 1]` by sequence, and the masks.
        valid: `[B]`, rows that are trained.
    """
    ratios = batch.get("importance_sampling_ratio")
    if ratios is None:
        return None
    rows = torch.tensor(valid, device=ratios.device)
    mask = batch["completion_mask"] * batch["tool_mask"]
    return _sum(ratios[rows].flatten() if ratios.shape[1] == 1 else ratios[mask.bool() & rows[:, None]])


def cut_tokens(
    batch: Mapping[str, Any], valid: Sequence[bool], *, mode: str, clip_min: float | None, clip_max: float | None
) -> ValueSum | None:
    """Return which trained tokens have a ratio that TRL clipped or masked: 1 for each that has, 0 for others.

    With overlap rollouts are staler and ratios farther from 1. TRL's modes for sequences cut all tokens of a rollout
    whose ratios multiply to something out of bounds, which long stale rollouts do (`GRPOTrainer`, "Compute the
    importance sampling ratio": the ratio is `exp` of the difference of log-probabilities, of NaN 1).

    Args:
        batch: See `batch_gaps`; from `GRPOTrainer._generate_and_score_completions`.
        valid: `[B]`, rows that are trained.
        mode: `vllm_importance_sampling_mode`: truncation and masking cut the same tokens.
        clip_min: `vllm_importance_sampling_clip_min`; None for no bound.
        clip_max: `vllm_importance_sampling_clip_max`; None for no bound.

    Returns:
        None where one of the two log-probabilities is missing.
    """
    training, sampling = batch.get("old_per_token_logps"), batch.get("sampling_per_token_logps")
    if training is None or sampling is None:
        return None
    mask = batch["completion_mask"]
    if (tool_mask := batch.get("tool_mask")) is not None:
        mask = mask * tool_mask
    differences = torch.nan_to_num((training - sampling) * mask, nan=0.0)
    if mode.startswith("sequence"):
        differences = differences.sum(dim=-1, keepdim=True)
    ratios = differences.exp()
    lower, upper = (-math.inf if clip_min is None else clip_min), (math.inf if clip_max is None else clip_max)
    is_cut = ((ratios < lower) | (ratios > upper)).expand(mask.shape)
    return _sum(is_cut[mask.bool() & torch.tensor(valid, device=mask.device)[:, None]].float())


# -- on disk ----------------------------------------------------------------------------------------------------------

_DIGITS = 5


def record(
    output_dir: str | Path,
    logprobs: torch.Tensor,
    rows: Sequence[Row],
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    step: int,
    rank: int,
) -> None:
    """Append the trainer's log-probabilities and the advantages of one generation batch.

    Args:
        logprobs: `[R, T]`, in nats, as the trainer computed them before the update.
        rows: `[R]`; rollouts that have none are left out.
        rollouts: `[B]`.
        advantages: `[B]`.
        step: Number of the optimizer step that trains the batch.

    Raises:
        RolloutError: They cannot be written.
    """
    folder = Path(output_dir) / TRAINING_LOGPROBS
    found: dict[int, dict[int, list[float | None]]] = {}  # by rollout and by its row
    for values, row in zip(logprobs.float().cpu(), rows, strict=True):
        if row.rollout is not None:
            own = values[: len(row.trajectory.completion_ids)].tolist()
            rounded = [round(value, _DIGITS) if math.isfinite(value) else None for value in own]
            found.setdefault(row.rollout, {})[row.index] = rounded
    lines = []
    for place, by_row in found.items():
        first, *further = (by_row.get(index, []) for index in range(len(rollouts[place].trajectories)))
        line: dict[str, Any] = {"schema": SCHEMA, "rollout_id": rollouts[place].request.rollout_id, "step": step}
        line |= {"advantage": round(advantages[place], _DIGITS), "logprobs": first}
        line |= {"further_rows": further} if further else {}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    safe = "The rollouts themselves are in the journal."
    with writing("The trainer's log-probabilities", folder, safe=safe, also="and resume from the newest checkpoint"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"step-{step}.rank-{rank}.jsonl").open("ab+") as file:
            _end_torn_line(file)
            file.write("".join(lines).encode())


def _end_torn_line(file: IO[bytes]) -> None:
    """Keep a line that a full disk tore from swallowing the next one."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
