"""GRPO on a NeMo Gym environment: the script of `trl-gym train`, for launchers that want a path.

python recipes/grpo.py --config recipes/quickstart.yaml
python recipes/grpo.py --config recipes/quickstart.yaml --model_name_or_path Qwen/Qwen3-0.6B --gym_engine auto
accelerate launch --num_processes 8 recipes/grpo.py --config my.yaml     # or: -m trl_gym.train --config my.yaml
"""

import sys

from trl_gym.train import main

if __name__ == "__main__":
    sys.exit(main())
