"""Ask a NeMo Gym head server for its servers and agents, and notice servers that are gone.

The config that a head server returns (`/global_config_dict_yaml`) holds API keys in clear: no function here puts it
into a message or a log.

Gym's servers retry a refused connection forever: a rollout whose resources server has died hangs until its deadline
and never says why. `servers_gone` therefore looks at every server directly.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import requests
import yaml

from trl_gym.errors import GymServerError
from trl_gym.supervisor import is_stopped
from trl_gym.untrusted import BodyTooLongError, check_depth, parse_json, read_response, redirect_problem, shape_problem

logger = logging.getLogger(__name__)

AGENTS = "responses_api_agents"
_SERVER_KINDS = frozenset({"resources_servers", AGENTS, "responses_api_models", "environment_servers"})
_POLICY_FIELDS = frozenset({"policy_base_url", "policy_api_key"})
_CONNECT_TIMEOUT_S = 1.0
LOOKS_IN_A_ROW = 3  # until a server that refuses connections, or was stopped, counts as gone


class InFlight:
    """Counts the rollouts that are with one process of NeMo Gym, over all of its agents: `async with in_flight: …`."""

    def __init__(self) -> None:
        self.number = 0
        self._lock = threading.Lock()  # several collectors may share a NeMo Gym

    async def __aenter__(self) -> None:
        with self._lock:
            self.number += 1

    async def __aexit__(self, *_: object) -> None:
        with self._lock:
            self.number -= 1


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """An agent server, which runs rollouts."""

    name: str  # name in the config, which rows give as `agent_ref.name`
    url: str  # base URL without a slash at the end
    resources_server: str | None  # name of its environment; None for agents without one
    kind: str  # name of its implementation, e.g. `"simple_agent"`
    # Those of `policy_base_url` and `policy_api_key` that its `/run` takes.
    run_fields: frozenset[str] = frozenset()
    in_flight: InFlight = field(default_factory=InFlight, repr=False, compare=False)  # of its process


@dataclass(frozen=True, slots=True)
class ServerInstance:
    """One entry of `/server_instances`."""

    name: str
    kind: str  # one of `_SERVER_KINDS`
    server: str  # name of the implementation
    url: str
    pid: int | None
    run_fields: frozenset[str] | None = None  # see `AgentInfo`; None where the head server does not say


@dataclass(frozen=True, slots=True)
class HeadView:
    """The answers of a head server. `repr` leaves the config out: it may contain API keys."""

    config: dict[str, Any] = field(repr=False)
    instances: list[ServerInstance]

    def agents(self, in_flight: InFlight | None = None) -> dict[str, AgentInfo]:
        """Return the agents by name; their rollouts are counted in `in_flight`."""
        in_flight = in_flight or InFlight()
        return {
            instance.name: AgentInfo(
                name=instance.name,
                url=instance.url,
                resources_server=_resources_server(self.config, instance),
                kind=instance.server,
                run_fields=instance.run_fields or frozenset(),
                in_flight=in_flight,
            )
            for instance in self.instances
            if instance.kind == AGENTS
        }

    def policy_base_urls(self) -> list[str]:
        """Return the URLs that the model servers call, as far as the config says them without interpolation."""
        value = self.config.get("policy_base_url")
        return [str(url) for url in (value if isinstance(value, list) else [value]) if url]


class HeadUnreachable(GymServerError):
    """Nothing answers (yet); try again while servers start."""


def new_http_session() -> requests.Session:
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    session.trust_env = False  # HTTP_PROXY is for the internet, not for our servers
    return session


def look_at_head(session: requests.Session, head_url: str, *, timeout_s: float) -> HeadView:
    """Read a head server's config and servers. Raises `HeadUnreachable` if nothing answers within `timeout_s` seconds;
    `GymServerError` if what answers is not a NeMo Gym head server."""
    config_text = _get_json(session, f"{head_url}/global_config_dict_yaml", timeout_s)
    instances = _get_json(session, f"{head_url}/server_instances", timeout_s)
    if not isinstance(config_text, str) or not isinstance(instances, list):
        raise _not_a_head(head_url, "its answers have another form")
    try:
        config = yaml.safe_load(config_text)
        check_depth(config)  # an alias may stand inside of itself, or multiply
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # Without the cause: a YAML error quotes the text around it.
        raise _not_a_head(head_url, f"its config is not YAML that can be read ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise _not_a_head(head_url, "its config is not a mapping")
    return HeadView(config=config, instances=[_instance(head_url, entry) for entry in instances])


def answers(session: requests.Session, url: str, *, timeout_s: float) -> bool:
    """Tell whether a server answers `GET /` with any status below 500; not every server has that route."""
    try:
        with session.get(f"{url}/", timeout=timeout_s, allow_redirects=False, stream=True) as response:
            return response.status_code < 500
    except requests.RequestException:
        return False


def with_run_fields(session: requests.Session, instance: ServerInstance, *, timeout_s: float) -> ServerInstance:
    """Ask an agent which policy fields its `/run` takes, unless that is known; one that does not say takes none.

    Args:
        timeout_s: Seconds to wait: a server writes its schema when it is asked for the first time.
    """
    if instance.kind != AGENTS or instance.run_fields is not None:
        return instance
    try:
        url = f"{instance.url}/openapi.json"
        response = session.get(url, timeout=timeout_s, allow_redirects=False, stream=True)
        fields = _run_properties(parse_json(read_response(response)))
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        logger.info("%s does not say which fields its /run takes: %s", instance.name, type(error).__name__)
        fields = set()
    return replace(instance, run_fields=_POLICY_FIELDS & fields)


def _run_properties(schema: Any) -> set[str]:
    body = schema["paths"]["/run"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    while "$ref" in body:
        body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    return set(body.get("properties", ()))


def _get_json(session: requests.Session, url: str, timeout_s: float) -> Any:
    head_url = url.rpartition("/")[0]
    try:
        response = session.get(url, timeout=timeout_s, allow_redirects=False, stream=True)
        body = read_response(response)
    except BodyTooLongError as error:
        raise _not_a_head(head_url, f"GET {url}: {error}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise HeadUnreachable(
            f"No NeMo Gym head server answers at {head_url} ({type(error).__name__}).",
            "Check the URL and that this Gym runs.",
        ) from error
    except requests.RequestException as error:
        raise _not_a_head(head_url, str(error)) from error
    if response.status_code != 200:
        said = redirect_problem(url, response.status_code, response.headers.get("Location"))
        raise _not_a_head(head_url, f"GET {url} answered {said or f'HTTP {response.status_code}'}")
    try:
        return parse_json(body)
    except ValueError as error:
        raise _not_a_head(head_url, f"GET {url} did not answer with JSON") from error


def _not_a_head(head_url: str, why: str) -> GymServerError:
    return GymServerError(
        f"{head_url} is not the head server of a NeMo Gym: {why}.",
        "Give the URL of the head server, whose `/server_instances` lists servers.",
    )


class _InstanceShape(msgspec.Struct):
    process_name: str
    server_type: str
    name: str
    url: str
    pid: Annotated[int, msgspec.Meta(ge=1)] | None = None


def _instance(head_url: str, entry: Any) -> ServerInstance:
    problem = shape_problem(entry, _InstanceShape) or _url_problem(entry["url"])
    if problem is not None:
        raise _not_a_head(head_url, f"an entry of /server_instances cannot be used ({problem})")
    return ServerInstance(
        name=entry["process_name"],
        kind=entry["server_type"],
        server=entry["name"],
        url=entry["url"].rstrip("/"),
        pid=entry.get("pid"),
    )


def _url_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        is_usable = False
    return None if is_usable else f"its URL is {url[:100]!r}"


def _resources_server(config: Mapping[str, Any], instance: ServerInstance) -> str | None:
    node: Any = config
    for key in (instance.name, instance.kind, instance.server, "resources_server", "name"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, str) else None


def servers_gone(
    instances: Iterable[ServerInstance], refused: Counter[str], *, knows_processes: bool, hung: Collection[str] = ()
) -> dict[str, str]:
    """Look once at every server, and return those that are gone.

    A process of ours counts as gone at once when it has ended, any other server when its address has refused
    connections, or its process was stopped, in three looks in a row. A server that is slow, or whose queue is full, is
    not gone.

    Args:
        refused: By URL, how many looks in a row were refused; changed in place. It is of one watch, which looks at
            regular intervals: where several watches shared it, a short pause would count as several looks.
        knows_processes: Whether their pids are of this machine, one per server.

    Returns:
        Name of each server that is gone → what is wrong with it.
    """
    gone = {}
    for instance in instances:
        if knows_processes and not is_alive(instance.pid):
            gone[instance.name] = f"its process (pid {instance.pid}) has ended"
            continue
        if instance.url in hung:
            gone[instance.name] = f"{instance.url} accepts requests and answers none: it hangs"
            continue
        is_halted = knows_processes and instance.pid is not None and is_stopped(instance.pid)
        refused[instance.url] = refused[instance.url] + 1 if is_halted or _refuses(instance.url) else 0
        if refused[instance.url] >= LOOKS_IN_A_ROW:
            said = f"its process (pid {instance.pid}) was stopped by someone (SIGSTOP)"
            gone[instance.name] = said if is_halted else f"{instance.url} refuses connections"
    return gone


def _refuses(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # no answer in time or no route: the server is slow, or the network may come back


def is_alive(pid: int | None) -> bool:
    """Return False for a process that has ended (zombies too), True if it runs or /proc cannot tell."""
    if pid is None or not Path("/proc/self").exists():
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def needed_servers(config: Mapping[str, Any], agent: str) -> frozenset[str]:
    """Return the servers that take part in an agent's rollouts: itself, what its config refers to, and so on."""
    found, to_visit = set(), [agent]
    while to_visit:
        name = to_visit.pop()
        if name not in found:
            found.add(name)
            to_visit += _references(config.get(name))
    return frozenset(found)


def _references(node: Any) -> list[str]:
    """Return the names in `{"type": "resources_servers", "name": …}`, at any depth."""
    if isinstance(node, Mapping):
        kind, name = node.get("type"), node.get("name")
        own = [name] if isinstance(name, str) and isinstance(kind, str) and kind in _SERVER_KINDS else []
        return own + [reference for value in node.values() for reference in _references(value)]
    if isinstance(node, list):
        return [reference for value in node for reference in _references(value)]
    return []
