"""Train language models with TRL's GRPO on NVIDIA NeMo Gym environments.

The public names are imported when they are first used: `import trl_gym` needs neither torch nor vLLM.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "ForkServer": "trl_gym.policy_server.fork_server",
    "GymGRPOConfig": "trl_gym.config",
    "GymGRPOTrainer": "trl_gym.trainer",
    "GymServers": "trl_gym.gym.servers",
    "PolicyServer": "trl_gym.policy_server.server",
    "TrlGymError": "trl_gym.errors",
    "load_gym_dataset": "trl_gym.dataset",
    "mix_gym_datasets": "trl_gym.dataset",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig as GymGRPOConfig
    from trl_gym.dataset import load_gym_dataset as load_gym_dataset
    from trl_gym.dataset import mix_gym_datasets as mix_gym_datasets
    from trl_gym.errors import TrlGymError as TrlGymError
    from trl_gym.gym.servers import GymServers as GymServers
    from trl_gym.policy_server.fork_server import ForkServer as ForkServer
    from trl_gym.policy_server.server import PolicyServer as PolicyServer
    from trl_gym.trainer import GymGRPOTrainer as GymGRPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_gym' has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # modules leave hardly any garbage, and looking for it takes a sixth of the time
    try:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    except (ImportError, RuntimeError):
        from trl_gym.compat import check_versions

        check_versions()  # says what is behind it where packages do not fit together
        raise
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)
