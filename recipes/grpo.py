"""GRPO on a NeMo Gym environment: the one training script; what is trained on what stands in a YAML.

    accelerate launch recipes/grpo.py --config recipes/quickstart.yaml
    accelerate launch recipes/grpo.py --config recipes/quickstart.yaml --model_name_or_path Qwen/Qwen3-0.6B

Every option of `GymGRPOConfig`, TRL's `ModelConfig` and `ScriptArguments` below can stand in the YAML and be
overridden on the command line.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from trl_gym import GymGRPOConfig


@dataclass
class ScriptArguments:
    """What this script needs beside the trainer's configuration.

    Args:
        train_files (`list[str]`, *optional*): Gym JSONL files to train on.
        eval_files (`list[str]`, *optional*): Gym JSONL files to evaluate on.
        data_script (`str`, *optional*): Script that makes both, called with `--output_dir <output_dir>/data`; it
            writes `train.jsonl` and `validation.jsonl`.
        train_weights (`list[float]`, *optional*): Share of each of the `train_files`, in any unit. Without it, their
            rows are put after one another.
        agent (`str`, *optional*): Agent for rows that name none.
        resume (`bool`): Go on from the newest complete checkpoint in `output_dir`, if there is one: for jobs that are
            put into a queue again.
        small_policy_dir (`str`): Where the small policy is built when `model_name_or_path` is not given.
        small_policy_learning_rate (`float`): Learning rate for it: half a million parameters want a thousand times
            that of a real model.
    """

    train_files: list[str] = field(default_factory=list, metadata={"help": "Gym JSONL files to train on."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "Gym JSONL files to evaluate on."})
    data_script: str | None = field(
        default=None, metadata={"help": "Script that writes train.jsonl and validation.jsonl to --output_dir."}
    )
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of each of the train_files; without it, all rows of all."}
    )
    agent: str | None = field(default=None, metadata={"help": "Agent for rows that name none."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint in output_dir, if there is one."}
    )
    small_policy_dir: str = field(
        default="runs/small_policy", metadata={"help": "Where the small policy is built when no model is given."}
    )
    small_policy_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate when no model is given."})


def quiet() -> None:
    """Keep libraries from talking over the progress bar; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("transformers", "trl", "datasets", "accelerate", "httpx", "vllm.triton_utils.importing"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_data(script: str, output_dir: str) -> tuple[Path, Path]:
    """Run a data script; it is deterministic, so running it again changes nothing."""
    folder = Path(output_dir) / "data"
    subprocess.run([sys.executable, script, "--output_dir", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder / "train.jsonl", folder / "validation.jsonl"


def load_train(script: ScriptArguments, seed: int) -> Dataset:
    """What is trained on: the files mixed by weight, or one after the other.

    Raises:
        DatasetError: A file is missing or broken, or there are more or fewer weights than files.
    """
    from trl_gym import load_gym_dataset, mix_gym_datasets

    if script.train_weights is None:
        return load_gym_dataset(script.train_files, agent=script.agent)
    parts = [load_gym_dataset(file, agent=script.agent) for file in script.train_files]
    return mix_gym_datasets(parts, script.train_weights, seed=seed)


def load_as_told(model: ModelConfig, args: GymGRPOConfig) -> None:
    """Hand on what TRL's `ModelConfig` says about loading; `model_init_kwargs` wins where both do."""
    from trl import get_quantization_config

    told = {
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "revision": None if model.model_revision == "main" else model.model_revision,
        "quantization_config": get_quantization_config(model),
    }
    args.model_init_kwargs = {name: value for name, value in told.items() if value is not None} | (
        args.model_init_kwargs or {}
    )
    if told["revision"] is not None and args.vllm_mode == "colocate":
        args.gym_vllm_args = {"revision": told["revision"], **(args.gym_vllm_args or {})}


def main() -> None:
    quiet()
    started = time.monotonic()
    from accelerate import PartialState
    from transformers.utils import logging as transformers_logging
    from trl import ModelConfig, TrlParser, get_peft_config

    from trl_gym import GymGRPOConfig, GymGRPOTrainer, load_gym_dataset
    from trl_gym.resume import last_complete_checkpoint

    transformers_logging.disable_progress_bar()
    parser = TrlParser((ScriptArguments, GymGRPOConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config()
    state = PartialState()

    with state.main_process_first():
        if script.data_script is not None:
            train_file, eval_file = make_data(script.data_script, args.output_dir)
            script.train_files.append(str(train_file))
            script.eval_files.append(str(eval_file))
        if model.model_name_or_path is None:
            from tiny_policy import build_tiny_policy

            model.model_name_or_path = str(build_tiny_policy(script.small_policy_dir, seed=args.seed))
            args.learning_rate = script.small_policy_learning_rate
    load_as_told(model, args)
    if script.resume and args.resume_from_checkpoint is None:
        args.resume_from_checkpoint = last_complete_checkpoint(args.output_dir)
    ready = time.monotonic()

    with GymGRPOTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=load_train(script, args.seed),
        eval_dataset=load_gym_dataset(script.eval_files, agent=script.agent) if script.eval_files else None,
        peft_config=get_peft_config(model),
    ) as trainer:
        up = time.monotonic()
        if state.is_main_process:
            print(f"policy server log: {trainer.policy_server.log_path}")
            print(f"NeMo Gym log:      {trainer.gym_servers.log_path}")
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if script.eval_files and args.eval_strategy != "no" and args.max_steps % (args.eval_steps or 1):
            trainer.evaluate()
    if state.is_main_process:
        from summary import summarize

        summarize(args.output_dir, {"policy and data": ready - started, "servers and model": up - ready})


if __name__ == "__main__":
    from trl_gym.errors import TrlGymError

    try:
        main()
    except TrlGymError as error:
        sys.exit(f"\n{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; servers are stopped, finished rollouts are in the journal", file=sys.stderr)
        sys.exit(130)
