"""GRPO on a NeMo Gym environment: `trl_gym.train`, and a small policy where no model is given.

    python recipes/grpo.py --config recipes/quickstart.yaml
    python recipes/grpo.py --config recipes/quickstart.yaml --model_name_or_path Qwen/Qwen3-0.6B
    accelerate launch --num_processes 8 recipes/grpo.py --config my.yaml

With a model it is the same as `trl-gym train`, and `accelerate launch -m trl_gym.train` in several processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trl_gym.train import main


def small_policy(folder: str, seed: int) -> Path:
    from tiny_policy import build_tiny_policy

    return build_tiny_policy(folder, seed=seed)


if __name__ == "__main__":
    sys.exit(main(default_model=small_policy))
