"""A model's configuration, from a folder, the cache or the Hugging Face Hub, with an error that says which is missing.

transformers asks an unreachable hub six times, half a minute in all, and then names neither the folder nor the cache
that would do. Here the cache is asked first, and the hub only where something answers at its address.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from trl_gym.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CONNECT_TIMEOUT_S = 3.0
_PATH_BEGINS = (".", "/", "~")  # as no name on the hub does


def uses_proxy() -> bool:
    """Tell whether requests go through a proxy, so that a connection of our own says nothing."""
    return any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))


def why_unreachable(url: str) -> str | None:
    """Connect to a URL's host, send nothing, and say why that fails; None where it works.

    Args:
        url: With scheme and host; waits 3 s at most.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model; of all its files, only config.json is needed.

    Args:
        name: Folder, or name on the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConfigError: The folder has no config.json, or the model is neither in the cache nor to be had from the hub.
    """
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith(_PATH_BEGINS):
        remedy = "Set `model_name_or_path` to a folder that has config.json, or to a name on the Hugging Face Hub."
        if not folder.is_dir():
            raise ConfigError(f"The model folder {name} does not exist.", remedy)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"The model folder {name} has no config.json.", remedy)
        return _loaded(str(folder), revision, trust_remote_code, from_cache=True)
    from huggingface_hub import constants

    try:
        return _loaded(name, revision, trust_remote_code, from_cache=True)
    except ConfigError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
        if reason is None and not uses_proxy():
            reason = why_unreachable(constants.ENDPOINT)
        if reason is not None:
            raise ConfigError(
                f"The model {name} is not in the cache of the Hugging Face Hub, and {constants.ENDPOINT} cannot be "
                f"asked ({reason}).",
                f"Run `hf download {name} --local-dir FOLDER` where there is a network, and set `model_name_or_path` "
                "to that folder.",
            ) from error
    return _loaded(name, revision, trust_remote_code, from_cache=False)


def _loaded(name: str, revision: str | None, trust_remote_code: bool, *, from_cache: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=from_cache
        )
    except Exception as error:  # not there, not to be read, of an unknown kind: transformers raises several
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"The configuration of the model {name} cannot be loaded ({reason}).",
            "Check `model_name_or_path`, and that the installed transformers knows this kind of model.",
        ) from error
