"""Which environments are down: their agent, or a server that the agent needs, is gone.

NeMo Gym's servers retry a refused connection for ever, so a rollout whose resources server has died hangs until its
deadline and never says why. Here every server is looked at directly.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl_gym.gym.discovery import ServerInstance

_CONNECT_TIMEOUT_S = 1.0
_PATIENCE = 3  # looks in a row that must be refused


class ServerProbe:
    """Notices servers that are gone: at once by their process where it is ours, else when their address has refused
    connections several looks in a row. A server that is slow, or whose queue is full, is there."""

    def __init__(self) -> None:
        self._refused: Counter[str] = Counter()

    def gone(self, instances: Iterable[ServerInstance], *, knows_processes: bool) -> dict[str, str]:
        """Look once.

        Args:
            instances: Servers to look at.
            knows_processes: Whether their pids are of this machine, one per server.

        Returns:
            By name of the server, what is wrong with it.
        """
        gone = {}
        for instance in instances:
            if knows_processes and not is_alive(instance.pid):
                gone[instance.name] = f"its process (pid {instance.pid}) has ended"
                continue
            self._refused[instance.name] = self._refused[instance.name] + 1 if _refuses(instance.url) else 0
            if self._refused[instance.name] >= _PATIENCE:
                gone[instance.name] = f"{instance.url} refuses connections"
        return gone


def needed_servers(config: Mapping[str, Any], agent: str) -> frozenset[str]:
    """Names of the servers that take part in an agent's rollouts: itself, and what its config refers to, and so on."""
    found, to_visit = set(), [agent]
    while to_visit:
        name = to_visit.pop()
        if name not in found:
            found.add(name)
            to_visit += _references(config.get(name))
    return frozenset(found)


def _references(node: Any) -> list[str]:
    """Names in `{"type": "resources_servers", "name": …}`, at any depth."""
    if isinstance(node, Mapping):
        kind, name = node.get("type"), node.get("name")
        own = [name] if isinstance(name, str) and isinstance(kind, str) and kind in _SERVER_KINDS else []
        return own + [reference for value in node.values() for reference in _references(value)]
    if isinstance(node, list):
        return [reference for value in node for reference in _references(value)]
    return []


_SERVER_KINDS = frozenset({"resources_servers", "responses_api_agents", "responses_api_models", "environment_servers"})


def _refuses(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # no answer in time, no route: slow, or a network that may come back


def is_alive(pid: int | None) -> bool:
    """False for a process that ended, also while its parent has not noticed. True where we cannot know."""
    if pid is None or not Path("/proc/self").exists():
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
