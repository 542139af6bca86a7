"""How `host.py` is started: its settings file and its environment. Values that are secret stay out of `ps`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trl_gym.gym.config import API_KEY_VARIABLE
from trl_gym.gym.install import GymInstallation
from trl_gym.processes import ChildProcess

Mode = Literal["host", "upstream"]

LOCALHOST = "127.0.0.1"
_HOST_SCRIPT = Path(__file__).with_name("host.py")


def spawn(
    installation: GymInstallation,
    mode: Mode,
    config: Mapping[str, Any],
    *,
    search_roots: list[Path],
    head_fd: int | None,
    work_dir: Path,
    log_path: Path,
    policy_api_key: str,
) -> ChildProcess:
    """Start Gym's interpreter on `host.py`.

    Args:
        installation: The Gym to start.
        mode: See `host.py`.
        config: What Gym merges last.
        search_roots: Folders below which the code of servers is looked for, before the installation.
        head_fd: The listening socket of the head server, or None where Gym binds it itself.
        work_dir: A private folder that outlives the process. `error_path(work_dir)` receives the reason when the
            servers cannot be started.
        log_path: File for the output.
        policy_api_key: Bearer token for the policy server.
    """
    config = dict(config)
    if mode == "upstream":
        # Every server gets a link to Gym's own environment instead of one that `uv` builds.
        config["skip_venv_if_present"] = True
        config["uv_venv_dir"] = str(work_dir / "environments")
        config["uv_cache_dir"] = str(work_dir / "uv-cache")
    settings = {
        "mode": mode,
        "config": config,
        "search_roots": [str(root) for root in search_roots],
        "head_fd": head_fd,
        "error_path": str(error_path(work_dir)),
        "work_dir": str(work_dir),
    }
    settings_path = work_dir / "settings.json"
    _write_private(settings_path, json.dumps(settings))
    return ChildProcess(
        "NeMo Gym",
        [installation.python, _HOST_SCRIPT, settings_path],
        log_path=log_path,
        env=_environment(installation, mode, config, work_dir, policy_api_key),
        pass_fds=[] if head_fd is None else [head_fd],
    )


def error_path(work_dir: Path) -> Path:
    """Where `host.py` says in a sentence why it cannot start."""
    return work_dir / "error.txt"


def _environment(
    installation: GymInstallation, mode: Mode, config: Mapping[str, Any], work_dir: Path, policy_api_key: str
) -> dict[str, str | None]:
    no_proxy = [value for value in (os.environ.get("no_proxy"), os.environ.get("NO_PROXY")) if value]
    local = ",".join(dict.fromkeys([*no_proxy, LOCALHOST, "localhost"]))
    env: dict[str, str | None] = {
        API_KEY_VARIABLE: policy_api_key,
        "PYTHONUNBUFFERED": "1",
        "no_proxy": local,  # Gym's servers find each other over HTTP
        "NO_PROXY": local,
        "NEMO_GYM_CONFIG_DICT": None,  # Gym's way to hand a config to its children; not to be inherited
        "NEMO_GYM_CONFIG_PATH": None,
    }
    if mode == "upstream":
        env["PATH"] = os.pathsep.join([str(installation.python.parent), os.environ.get("PATH", os.defpath)])
        env["UV_PYTHON_DOWNLOADS"] = "never"
        env["RAY_USAGE_STATS_ENABLED"] = "0"
        if not config.get("ray_head_node_address"):
            env |= _own_ray_cluster(work_dir)
    return env


def _own_ray_cluster(work_dir: Path) -> dict[str, str | None]:
    """Keep Ray's traces in our folder; by default it writes a token to the home folder and files to /tmp/ray."""
    token_path = work_dir / "ray-token"
    _write_private(token_path, secrets.token_hex(32))
    return {"RAY_TMPDIR": str(work_dir), "RAY_AUTH_TOKEN_PATH": str(token_path), "RAY_AUTH_TOKEN": None}


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
