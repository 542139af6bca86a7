"""From what a user gives (config files, overrides) to the one dictionary that Gym merges last.

Gym merges, weakest first: the files of `config_paths`, `env.yaml`, an initial dictionary. Everything of ours goes into
that dictionary, in a file: no value is ever quoted for a command line, and none can be read from the process list.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_gym.errors import ConfigError

NONCE_KEY = "trl_gym_nonce"
API_KEY_VARIABLE = "TRL_GYM_POLICY_API_KEY"
TRAINING_MODEL_CONFIG = "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"
POLICY_MODEL = "policy_model"  # the name by which every agent of Gym's configs refers to its model server

# Set beside TRAINING_MODEL_CONFIG. The config expects a reasoning parser in the policy server and fails without one;
# the chat templates of most models know no developer role, which several of Gym's datasets use.
_MODEL_DEFAULTS = {"uses_reasoning_parser": False, "replace_developer_role_with_system": True}
_NUM_ANCESTORS = 3  # of a config file's folder, searched for the code of servers
_CONFIG_FOLDERS = (
    "benchmarks",
    "environment_servers",
    "environments",
    "resources_servers",
    "responses_api_agents",
    "responses_api_models",
)
# Overrides that would break the life cycle, and what to use instead.
_OURS = {
    "config_paths": "the `config_paths` argument",
    "dry_run": "nothing: servers have to run",
    NONCE_KEY: "nothing: it identifies the servers that were started",
}


@dataclass(frozen=True, slots=True)
class ResolvedConfigs:
    """Config files as absolute paths.

    Attributes:
        paths: What to hand to Gym, the training model server included when no file defines one.
        search_roots: Folders below which the code of servers is looked for, before the installation.
        adds_model_server: Whether the training model server was added.
    """

    paths: list[Path]
    search_roots: list[Path]
    adds_model_server: bool


def resolve_configs(config_paths: Sequence[str | Path], installation_root: Path) -> ResolvedConfigs:
    """Find every config file as Gym would, and those that they include.

    Raises:
        ConfigError: If files do not exist or are no YAML mappings; lists all of them.
    """
    if not config_paths:
        raise ConfigError(
            "no NeMo Gym config given. Name at least one, for example "
            "`resources_servers/example_single_tool_call/configs/example_single_tool_call.yaml`"
        )
    places = [Path.cwd(), installation_root]
    problems: list[str] = []
    paths = _find_all([(str(path), "") for path in config_paths], places, problems)
    contents: dict[Path, dict[str, Any]] = {}
    queue = list(paths)
    while queue:
        path = queue.pop(0)
        if path in contents:
            continue
        contents[path] = _load_yaml(path, problems)
        included = [(str(entry), f" (included by {path})") for entry in contents[path].get("config_paths") or []]
        queue += _find_all(included, places, problems)
    if problems:
        raise ConfigError("NeMo Gym configs cannot be used:\n" + "\n".join(problems))
    adds_model_server = not any(POLICY_MODEL in content for content in contents.values())
    if adds_model_server:
        paths = [*paths, installation_root / TRAINING_MODEL_CONFIG]
    return ResolvedConfigs(paths, _search_roots(contents, installation_root), adds_model_server)


def _find_all(entries: Sequence[tuple[str, str]], places: Sequence[Path], problems: list[str]) -> list[Path]:
    """Absolute paths of those entries that exist; a problem for each of the others."""
    found: list[Path] = []
    for entry, note in entries:
        path = Path(entry).expanduser()
        candidates = [path] if path.is_absolute() else [place / path for place in places]
        existing = next((candidate for candidate in candidates if candidate.is_file()), None)
        if existing is not None:
            found.append(existing.absolute())
            continue
        looked_at = "".join(f"\n      {candidate}" for candidate in candidates)
        matches = "".join(f"\n      {match}" for match in _closest_configs(entry, places[-1]))
        did_you_mean = f"\n    closest in the installation:{matches}" if matches else ""
        problems.append(f"  - {entry}{note} does not exist. Looked at:{looked_at}{did_you_mean}")
    return found


def _closest_configs(entry: str, installation_root: Path) -> list[str]:
    known = [
        str(path.relative_to(installation_root))
        for folder in _CONFIG_FOLDERS
        for path in (installation_root / folder).glob("*/**/*.yaml")
    ]
    by_path = difflib.get_close_matches(entry, known, n=3, cutoff=0.6)
    name = Path(entry).name
    by_name = [path for path in known if Path(path).name == name]
    stems = {Path(path).stem: path for path in known}
    by_stem = [stems[stem] for stem in difflib.get_close_matches(Path(entry).stem, list(stems), n=3, cutoff=0.75)]
    return list(dict.fromkeys([*by_name, *by_path, *by_stem]))[:3]


def _load_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"  - {path} cannot be read: {error}")
        return {}
    if content is not None and not isinstance(content, dict):
        problems.append(f"  - {path} holds a {type(content).__name__} and not a mapping")
        return {}
    return content or {}


def _search_roots(config_files: Mapping[Path, Any], installation_root: Path) -> list[Path]:
    """Folders of the user's configs and their ancestors, then the working directory.

    Configs of the installation do not count: a server in the user's folder may replace one of the same name.
    """
    roots: list[Path] = []
    for path in config_files:
        if installation_root.resolve() not in path.resolve().parents:
            roots += [path.parent, *list(path.parent.parents)[:_NUM_ANCESTORS]]
    return list(dict.fromkeys([*roots, Path.cwd()]))


def expand_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1, "c": {"d": 2}}` becomes `{"a": {"b": 1}, "c": {"d": 2}}`.

    Only keys of the outermost level are split at dots; deeper ones may contain dots of their own.

    Raises:
        ConfigError: If two keys contradict each other, a value has no JSON form, or a key is not the user's to set.
    """
    expanded: dict[str, Any] = {}
    for dotted, value in overrides.items():
        first, *rest = dotted.split(".")
        if first in _OURS:
            raise ConfigError(f"the override `{dotted}` is set by trl-gym. Use {_OURS[first]}")
        for key in reversed(rest):
            value = {key: value}
        merge_into(expanded, {first: _as_plain(value, dotted)}, strict=True)
    return expanded


def _as_plain(value: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(value, default=_path_as_text))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the override `{where}` cannot be written as YAML: {error}") from error


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def merge_into(target: dict[str, Any], source: Mapping[str, Any], *, strict: bool = False, where: str = "") -> None:
    """Merge nested mappings; `source` wins, or with `strict` a contradiction is a ConfigError."""
    for key, value in source.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge_into(target[key], value, strict=strict, where=path)
        elif strict and key in target and target[key] != value:
            raise ConfigError(f"the overrides set `{path}` twice: {target[key]!r} and {value!r}")
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def initial_config(
    configs: ResolvedConfigs,
    overrides: Mapping[str, Any],
    *,
    nonce: str,
    head_address: tuple[str, int],
    policy_base_url: str,
    policy_model_name: str,
) -> dict[str, Any]:
    """The dictionary that Gym merges last. `overrides` is what `expand_overrides` returned.

    The policy's API key is a reference to an environment variable: Gym's head server hands out the whole config, and
    Gym 0.4 writes it into the command line of each server.
    """
    host, port = head_address
    config: dict[str, Any] = {
        NONCE_KEY: nonce,
        "config_paths": [str(path) for path in configs.paths],
        # Gym's model server takes a list as well, and keeps a rollout on one of them.
        "policy_base_url": policy_base_url.split(",") if "," in policy_base_url else policy_base_url,
        "policy_model_name": policy_model_name,
        "policy_api_key": f"${{oc.env:{API_KEY_VARIABLE}}}",
        # 0.7 would not call itself ready before the policy server answers; ours may be started after Gym.
        "model_endpoint_readiness_timeout_seconds": 0,
    }
    if configs.adds_model_server:
        config[POLICY_MODEL] = {"responses_api_models": {"vllm_model": dict(_MODEL_DEFAULTS)}}
    merge_into(config, overrides)
    merge_into(config, {"head_server": {"host": host, "port": port}})
    return config
