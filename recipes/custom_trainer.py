"""GRPO with a trainer of one's own: every method that a subclass may override, on the calculator.

    python recipes/custom_trainer.py --config recipes/quickstart.yaml --output_dir runs/custom_trainer

`docs/custom_trainer.md` explains the four overrides, each in a class of its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trl_gym import GymGRPOConfig, GymGRPOTrainer, load_gym_dataset
from trl_gym.dataset import gym_row
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.trajectory import ModelCall, Trajectory


@dataclass
class CustomConfig(GymGRPOConfig):
    """`GymGRPOConfig` and what the trainer below adds to it."""

    easy_steps: int = field(default=8, metadata={"help": "Optimizer steps on sums only, before everything."})
    turn_tokens: int = field(default=32, metadata={"help": "Tokens that one model call may have."})
    turn_cost: float = field(default=0.05, metadata={"help": "Taken from the reward for each model call but one."})


class CustomTrainer(GymGRPOTrainer):
    """A curriculum, a limit per turn, credit for the turn that decided, and a reward that counts turns."""

    def choose_task(self, example: dict[str, Any], group: int) -> dict[str, Any]:
        """Curriculum: sums first. Evaluation asks as well, and gets what it asked for.

        One by the success rate of tasks is `trl_gym.rollouts.pools.TaskPools`.
        """
        if not self.model.training or self.state.global_step >= self.args.easy_steps or is_sum(example):
            return example
        # Chosen by the example alone: the members of a group may be on different ranks and must get the same task.
        return self.train_dataset[self.sums[example["task_index"] % len(self.sums)]]

    def build_request(self, row: dict[str, Any], request: RolloutRequest) -> dict[str, Any]:
        """A custom request: no turn may use up the tokens of the whole rollout."""
        params = request.row["responses_create_params"]
        limit = min(params["max_output_tokens"], self.args.turn_tokens)
        return {**request.row, "responses_create_params": {**params, "max_output_tokens": limit}}

    def build_trajectories(
        self, answer: dict[str, Any], request: RolloutRequest, calls: Sequence[ModelCall]
    ) -> list[Trajectory]:
        """Per-turn credit: when the call was wrong, the turns after it decided nothing and are not trained."""
        trajectories = super().build_trajectories(answer, request, calls)
        if answer["call_correct"]:
            return trajectories
        return [train_turns(trajectory, 1) for trajectory in trajectories]

    def compute_rewards(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The environment's reward, less a little for every turn but the first. None stays None: failed."""
        return [
            None if rollout.reward is None else rollout.reward - self.args.turn_cost * num_extra_turns(rollout)
            for rollout in rollouts
        ]

    @cached_property
    def sums(self) -> list[int]:
        """Indices of the easy tasks."""
        return [index for index, example in enumerate(self.train_dataset) if is_sum(example)]


def bare_answer(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """An extra reward function: 1 for a rollout whose last word is a number and nothing else."""
    last = [messages[-1] for messages in completions]
    return [float(m["role"] == "assistant" and bool(re.fullmatch(r"-?\d+", m["content"].strip()))) for m in last]


def is_sum(example: dict[str, Any]) -> bool:
    return gym_row(example)["expected_tool"] == "add"


def train_turns(trajectory: Trajectory, num_turns: int) -> Trajectory:
    """The same tokens, of which only those of the first turns are trained; the others stay as context."""
    keep = trajectory.turn_ends[min(num_turns, trajectory.num_turns) - 1]
    rest = len(trajectory.completion_ids) - keep
    return dataclasses.replace(
        trajectory,
        env_mask=trajectory.env_mask[:keep] + [0] * rest,
        logprobs=trajectory.logprobs[:keep] + [0.0] * rest,
    )


def num_extra_turns(rollout: Rollout) -> int:
    return rollout.trajectories[0].num_turns - 1 if rollout.trajectories else 0


def main() -> None:
    from trl_gym.train import ScriptArguments, make_data, model_to_train, quiet

    quiet()
    from accelerate import PartialState
    from trl import ModelConfig, TrlParser, get_peft_config

    script, args, model = TrlParser((ScriptArguments, CustomConfig, ModelConfig)).parse_args_and_config()
    args.reward_weights = args.reward_weights or [1.0, 0.1]  # the environment's, `bare_answer`'s
    with PartialState().main_process_first():
        train_file, eval_file = make_data(script.data_script, args.output_dir)
    if model.model_name_or_path is None:
        args.learning_rate = script.small_policy_learning_rate
    with CustomTrainer(
        model=model_to_train(model.model_name_or_path, script),
        reward_funcs=[bare_answer],
        args=args,
        train_dataset=load_gym_dataset(train_file),
        eval_dataset=load_gym_dataset(eval_file),
        peft_config=get_peft_config(model),
    ) as trainer:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
