"""What a trainer is given, checked before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_gym import compat
from trl_gym.config import GymGRPOConfig
from trl_gym.errors import ConfigError


def checked_args(args: GymGRPOConfig | None, model: Any, kwargs: dict[str, Any]) -> GymGRPOConfig:
    """The configuration, or one error for what TRL takes and a Gym trainer cannot."""
    for name in ("tools", "environment_factory", "rollout_func"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"`{name}` cannot be combined with a NeMo Gym environment, which brings its own tools and rollouts; "
                "use TRL's GRPOTrainer, or write a Gym environment."
            )
    if args is None:
        name = model if isinstance(model, str) else compat.model_id(model)
        return GymGRPOConfig(output_dir=f"{Path(name).name or 'policy'}-GymGRPO")
    if not isinstance(args, GymGRPOConfig):
        raise ConfigError(f"`args` must be a GymGRPOConfig, got {type(args).__name__}.")
    return args
