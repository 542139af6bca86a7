"""Turn config files and overrides of a user into the dictionary that Gym merges last.

Gym merges, weakest first: the files of `config_paths`, `env.yaml`, an initial dictionary. Our settings go into that
dictionary, in a file: no value is quoted for a command line, and none can be read from the process list.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trl_gym import recipes
from trl_gym.errors import ConfigError, Problem

NONCE_KEY = "trl_gym_nonce"
API_KEY_VARIABLE = "TRL_GYM_POLICY_API_KEY"
TRAINING_MODEL_CONFIG = "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"
# Of a server's section, or of a whole file: what it keeps in memory is for all rollouts.
SINGLE_PROCESS_KEY = "trl_gym_single_process"
POLICY_MODEL = "policy_model"  # the name by which every agent of Gym's configs refers to its model server

# Added to TRAINING_MODEL_CONFIG: the chat templates of most models have no developer role, which several of Gym's
# datasets use. That config's `uses_reasoning_parser: true` also fits policy servers without a reasoning parser; with
# `false` Gym fails every answer that has thinking in it.
_MODEL_DEFAULTS = {"replace_developer_role_with_system": True}
_NUM_ANCESTORS = 3  # of a config file's folder, searched for the code of servers
_AGENTS = "responses_api_agents"
_SERVER_KINDS = ("environment_servers", "resources_servers", _AGENTS, "responses_api_models")
_CONFIG_FOLDERS = ("benchmarks", "environments", *_SERVER_KINDS)
# Overrides that would break the life cycle → what to do instead.
_RESERVED = {
    "config_paths": "Use the `config_paths` argument.",
    "dry_run": "Remove it: servers have to run.",
    NONCE_KEY: "Remove it: it identifies the servers that were started.",
}


@dataclass(frozen=True, slots=True)
class ResolvedConfigs:
    """Config files as absolute paths."""

    paths: list[Path]  # the files for Gym, with the training model server when no file defines one
    search_roots: list[Path]  # folders to look for the code of servers in, before the installation
    adds_model_server: bool  # the training one
    agents: tuple[str, ...] = ()  # names of the agents that the files define, sorted
    merged: Mapping[str, Any] = field(default_factory=dict, repr=False)  # what the files say, without interpolation


def resolve_configs(config_paths: Sequence[str | Path], installation_root: Path) -> ResolvedConfigs:
    """Find every config file as Gym would, and the files that they include. Raises `ConfigError` if files do not exist
    or are not YAML mappings; lists all of them."""
    if not config_paths:
        raise ConfigError(
            "No NeMo Gym config was given.",
            "Name at least one, for example "
            "`resources_servers/example_single_tool_call/configs/example_single_tool_call.yaml`.",
        )
    places = [Path.cwd(), installation_root]
    problems: list[Problem] = []
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
        raise ConfigError("NeMo Gym configs cannot be used:", problems=problems)
    adds_model_server = not any(POLICY_MODEL in content for content in contents.values())
    if adds_model_server:
        paths = [*paths, installation_root / TRAINING_MODEL_CONFIG]
    merged: dict[str, Any] = {}
    for content in contents.values():
        merge_into(merged, copy.deepcopy(content))
    agents = sorted(name for name, value in merged.items() if isinstance(value, dict) and _AGENTS in value)
    roots = _search_roots(contents, installation_root)
    return ResolvedConfigs(paths, roots, adds_model_server, tuple(agents), merged)


def single_process_reasons(configs: ResolvedConfigs, overrides: Mapping[str, Any]) -> list[str]:
    """Say why the servers of these configs must not run in several processes; empty when they may.

    Args:
        configs: From `resolve_configs`.
        overrides: From `expand_overrides`.

    Returns:
        One clause per reason: a server, or a whole file, that says so, and ports that only one process can have.
    """
    config: dict[str, Any] = copy.deepcopy(dict(configs.merged))
    merge_into(config, overrides)
    reasons = [f"a config demands a single process (`{SINGLE_PROCESS_KEY}`)"] if config.get(SINGLE_PROCESS_KEY) else []
    if port := (overrides.get("head_server") or {}).get("port"):
        reasons.append(f"the head server has the fixed port {port}")
    for name, server in _server_sections(config):
        if server.get(SINGLE_PROCESS_KEY):
            reasons.append(f"`{name}` demands a single process (`{SINGLE_PROCESS_KEY}`)")
        if server.get("port"):
            reasons.append(f"`{name}` has the fixed port {server['port']}")
    return reasons


def _server_sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name of each server and what is said of it: `{name: {kind: {implementation: {…}}}}`."""
    for name, kinds in config.items():
        for kind in _SERVER_KINDS:
            servers = kinds.get(kind) if isinstance(kinds, Mapping) else None
            for server in servers.values() if isinstance(servers, Mapping) else ():
                if isinstance(server, Mapping):
                    yield name, server


def _find_all(entries: Sequence[tuple[str, str]], places: Sequence[Path], problems: list[Problem]) -> list[Path]:
    """Return absolute paths of the entries that exist; add a problem for each of the others."""
    found: list[Path] = []
    for entry, note in entries:
        path = Path(recipes.find(entry))
        candidates = [path] if path.is_absolute() else [place / path for place in places]
        existing = next((candidate for candidate in candidates if candidate.is_file()), None)
        if existing is not None:
            found.append(existing.absolute())
            continue
        looked_at = "".join(f"\n      {candidate}" for candidate in candidates)
        matches = "".join(f"\n      {match}" for match in _closest_configs(entry, places[-1]))
        remedy = f"\n    Use one of the closest in the installation:{matches}" if matches else "Correct the path."
        problems.append(Problem(f"{entry}{note} does not exist. Looked at:{looked_at}", remedy))
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


def _load_yaml(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(Problem(f"{path} cannot be read as YAML: {error}"))
        return {}
    if content is not None and not isinstance(content, dict):
        problems.append(Problem(f"{path} holds a {type(content).__name__} and not a mapping."))
        return {}
    return content or {}


def _search_roots(config_files: Mapping[Path, Any], installation_root: Path) -> list[Path]:
    """Return the folders of the user's configs and their ancestors, then the working directory.

    Folders of the installation are left out: a server in the user's folder may replace one of the same name.
    """
    roots: list[Path] = []
    for path in config_files:
        if installation_root.resolve() not in path.resolve().parents:
            roots += [path.parent, *list(path.parent.parents)[:_NUM_ANCESTORS]]
    return list(dict.fromkeys([*roots, Path.cwd()]))


def expand_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `{"a.b": 1, "c": {"d": 2}}` into `{"a": {"b": 1}, "c": {"d": 2}}`.

    Only keys of the outermost level are split at dots; deeper keys may contain dots.

    Raises:
        ConfigError: If two keys contradict each other, a value has no JSON form, or a key is reserved.
    """
    expanded: dict[str, Any] = {}
    for dotted, value in overrides.items():
        first, *rest = dotted.split(".")
        if first in _RESERVED:
            raise ConfigError(f"The override `{dotted}` is set by trl-gym.", _RESERVED[first])
        for key in reversed(rest):
            value = {key: value}
        merge_into(expanded, {first: _as_plain(value, dotted)}, strict=True)
    return expanded


def _as_plain(value: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(value, default=_path_as_text))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The override `{where}` cannot be written as YAML: {error}.", "Use strings, numbers, lists and mappings."
        ) from error


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def merge_into(target: dict[str, Any], source: Mapping[str, Any], *, strict: bool = False, where: str = "") -> None:
    """Merge nested mappings. `source` wins; with `strict` a contradiction raises ConfigError."""
    for key, value in source.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge_into(target[key], value, strict=strict, where=path)
        elif strict and key in target and target[key] != value:
            raise ConfigError(f"The overrides set `{path}` twice: {target[key]!r} and {value!r}.", "Keep one of them.")
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def initial_config(
    configs: ResolvedConfigs,
    overrides: Mapping[str, Any],
    *,
    nonce: str,
    head_address: tuple[str, int],
    policy_base_urls: Sequence[str],
    policy_model_name: str,
) -> dict[str, Any]:
    """Return the dictionary that Gym merges last. `overrides` comes from `expand_overrides`.

    The policy's API key is a reference to an environment variable: Gym's head server returns the whole config, and Gym
    0.4 writes it into the command line of each server.
    """
    host, port = head_address
    config: dict[str, Any] = {
        NONCE_KEY: nonce,
        "config_paths": [str(path) for path in configs.paths],
        # Gym's model server also takes a list, and keeps a rollout on one server.
        "policy_base_url": list(policy_base_urls) if len(policy_base_urls) > 1 else policy_base_urls[0],
        "policy_model_name": policy_model_name,
        "policy_api_key": f"${{oc.env:{API_KEY_VARIABLE}}}",
        # 0.7 is not ready until the policy server answers; ours may be started after Gym.
        "model_endpoint_readiness_timeout_seconds": 0,
    }
    if configs.adds_model_server:
        config[POLICY_MODEL] = {"responses_api_models": {"vllm_model": dict(_MODEL_DEFAULTS)}}
    merge_into(config, overrides)
    merge_into(config, {"head_server": {"host": host, "port": port}})
    return config
