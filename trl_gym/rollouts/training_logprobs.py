"""The trainer's log-probabilities of sampled tokens, beside the journal: `<output_dir>/training_logprobs/*.jsonl`.

A rollout is journaled before it is trained on, and these are known later, so they have files of their own. One object
per rollout: `{"rollout_id": …, "logprobs": [T]}`, in nats, one for each of the journal's `completion_ids`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_gym.errors import RolloutError

if TYPE_CHECKING:
    import torch

    from trl_gym.rollouts.rollout import Rollout

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
