"""NeMo Gym: its interpreter, its configs, the agents that they define."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from trl_gym.doctor.checks import Finding, failed, from_error, ok
from trl_gym.doctor.context import Subject
from trl_gym.errors import ConfigError
from trl_gym.gym.config import expand_overrides, resolve_configs
from trl_gym.gym.discovery import AGENTS, look_at_head, new_http_session
from trl_gym.gym.install import MIN_PYTHON, PYTHON_VARIABLE, SUPPORTED_GYM, find_installation

_REMEDY = (
    f"`uv venv --python {'.'.join(map(str, MIN_PYTHON))} .gym-venv && uv pip install --python .gym-venv/bin/python "
    f"'nemo-gym{SUPPORTED_GYM}'`, or name another interpreter: `--gym_python` or {PYTHON_VARIABLE}."
)
_TIMEOUT_S = 10.0


def interpreter(subject: Subject) -> Iterator[Finding]:
    """An interpreter with a supported nemo-gym."""
    if not subject.starts_gym:
        return
    try:
        found = find_installation(subject.args.gym_python)
    except ConfigError as error:
        text = str(error).split(" Run `make setup`")[0].split("\nRun `make setup`")[0]
        yield failed(text, _REMEDY)
        return
    subject.installation = found
    yield ok(f"nemo-gym {found.version} at {found.python} (supported: {SUPPORTED_GYM})")


def configs(subject: Subject) -> Iterator[Finding]:
    """Configs are found in the working directory or in the installed nemo-gym, with all that they include."""
    if not subject.starts_gym:
        return
    if not subject.args.gym_config_paths:
        yield failed("`gym_config_paths` is not set", "Name the YAML of at least one environment.")
        return
    remedy = "Paths are looked up from the working directory, then inside the installed nemo-gym."
    try:
        subject.configs = resolve_configs(subject.args.gym_config_paths, subject.installation.root)
    except ConfigError as error:
        yield from from_error(error, remedy)
        return
    if isinstance(subject.args.gym_overrides, dict):
        expand_overrides(subject.args.gym_overrides)
    agents = tuple(sorted(declared_agents(subject.configs.paths, subject.installation.root)))
    subject.agents = agents
    if not agents:
        yield failed(
            "the configs define no agent (a server of the kind `responses_api_agents`)",
            "Add the config of an agent to `gym_config_paths`.",
        )
    else:
        yield ok(f"{', '.join(map(str, subject.args.gym_config_paths))}: {_agents_text(agents)}")


def head_server(subject: Subject) -> Iterator[Finding]:
    """A running Gym answers and has agents."""
    if not subject.serves or subject.starts_gym or not subject.args.gym_head_url:
        return
    with new_http_session() as session:
        view = look_at_head(session, subject.args.gym_head_url.rstrip("/"), timeout_s=_TIMEOUT_S)
    subject.agents = tuple(sorted(view.agents()))
    if not subject.agents:
        yield failed(f"{subject.args.gym_head_url} has no agents", "Start that Gym with the config of an agent.")
    else:
        yield ok(f"{subject.args.gym_head_url}: {_agents_text(subject.agents)}")


def declared_agents(paths: Iterable[Path], installation_root: Path) -> set[str]:
    """Names of agents in configs and in those that they include; the files are known to be there."""
    names: set[str] = set()
    queue, seen = list(paths), set[Path]()
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        names |= {name for name, value in content.items() if isinstance(value, dict) and AGENTS in value}
        for entry in content.get("config_paths") or []:
            places = (Path(), Path.cwd(), installation_root)
            found = (place / Path(entry).expanduser() for place in places)
            queue += [next(one for one in found if one.is_file()).absolute()]
    return names


def _agents_text(agents: tuple[str, ...]) -> str:
    return f"agent {agents[0]}" if len(agents) == 1 else f"agents {', '.join(agents)}"
