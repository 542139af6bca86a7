"""A trainer that keeps what it sees, and small settings: what the training tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_gym import GymGRPOConfig, GymGRPOTrainer
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.trajectory import ModelCall, Trajectory

ROOT = Path(__file__).resolve().parents[2]
CALCULATOR = ROOT / "recipes" / "environments" / "calculator"
# Measured below 1e-4 in float32; the bound is the one that the project promises.
MAX_MEAN_GAP = 0.02
NUM_STEPS = 8


class RecordingTrainer(GymGRPOTrainer):
    """Keeps what reaches the loss, the rollouts it came from, and their model calls by rollout id."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        self.calls: dict[str, Sequence[ModelCall]] = {}
        self.printed = ""  # while it trained, where a test kept it
        super().__init__(*args, **kwargs)

    def build_trajectories(
        self, answer: dict[str, Any], request: RolloutRequest, calls: Sequence[ModelCall]
    ) -> list[Trajectory]:
        self.calls[request.rollout_id] = calls
        return super().build_trajectories(answer, request, calls)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.seen.append(
            {"mode": self._mode, "step": self.state.global_step, "rollouts": self._accounting.rollouts, **output}
        )
        return output


def gap(batch: dict[str, Any]) -> float:
    """Mean absolute difference in nats between sampling and training log-probabilities of the trained tokens."""
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    return (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[mask].abs().mean().item()


def config(output_dir: Path, kind: type[GymGRPOConfig] = GymGRPOConfig, **changes: Any) -> GymGRPOConfig:
    return kind(
        **{
            "output_dir": str(output_dir),
            "use_cpu": True,
            "seed": 0,
            "num_generations": 8,
            "per_device_train_batch_size": 64,
            "max_completion_length": 64,
            "max_steps": NUM_STEPS,
            # As in the quickstart: steady enough that a test may ask for progress.
            "learning_rate": 7e-4,
            "lr_scheduler_type": "constant",
            "adam_beta2": 0.95,
            "max_grad_norm": 0.2,
            "scale_rewards": "none",
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "eval_strategy": "steps",
            "eval_steps": NUM_STEPS // 2,
            "per_device_eval_batch_size": 64,
            "num_generations_eval": 1,
            "save_strategy": "no",
            "report_to": [],
            "gym_deadline": 120,
        }
        | changes
    )
