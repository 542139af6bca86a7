"""The NeMo Gym servers of a training run: started by us in one of two ways, or attached to.

    GymServers(["…/calculator.yaml"], policy_base_url="http://127.0.0.1:8000/v1")          host (default)
    GymServers([…], mode="upstream", …)                                                    `gym env start`
    GymServers.attach("http://node7:11000")                                                somebody else's

      NEW ──start──► STARTING ──wait_ready──► READY ──stop──► STOPPED       (stop is allowed everywhere)
      attach ───────────────────────────────► READY

What we start is in a process session of its own and ends with us, however we end (`processes.py`). An attached Gym is
never started, changed or stopped.
"""

from __future__ import annotations

import difflib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from trl_gym.errors import ConfigError, GymServerError
from trl_gym.gym.config import API_KEY_VARIABLE, NONCE_KEY, expand_overrides, initial_config, resolve_configs
from trl_gym.gym.discovery import (
    AgentInfo,
    HeadUnreachable,
    HeadView,
    ServerInstance,
    ServerProbe,
    answers,
    is_alive,
    look_at_head,
    needed_servers,
    new_http_session,
)
from trl_gym.gym.install import GymInstallation, find_installation
from trl_gym.processes import ChildProcess, bind_socket, wait_until

# --------------------------------------------------------------------------------------------------------------------
# How `host.py` is started: its settings file and its environment. Values that are secret stay out of `ps`.

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


_REQUEST_TIMEOUT_S = 2.0  # of one look at a server; while it starts, calls queue at its listening socket
_POLL_S = 0.1


class GymState(Enum):
    """Where a `GymServers` is in its life."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


class GymServers:
    """Owns, or knows, the servers of one NeMo Gym.

    Args:
        config_paths: Gym's YAML configs: absolute, relative to the working directory or inside the installed nemo-gym.
            The training model server is added when none of them defines `policy_model`.
        mode: `"host"`: all servers in one process, ready in seconds. `"upstream"`: Gym's own launcher with Ray and one
            process per server; for environments that use Ray or need more than one core.
        policy_base_url: OpenAI base URL of the policy server, ending in `/v1`; of several, separated by commas. May be
            given later, see `connect_policy`.
        policy_model_name: Model name that the policy server expects.
        policy_api_key: Sent as bearer token to the policy server. Travels in the environment only.
        python: Gym's interpreter; see `interpreter.find_installation` for where it is looked for.
        overrides: Any option of Gym's config as nested mapping or with dotted keys; wins over every file. A string
            may refer to other options, `"${policy_model_name}"`.
        log_dir: Folder for `gym.log`.
        start_timeout_s: Seconds from `start` until every server must answer.
    """

    def __init__(
        self,
        config_paths: Sequence[str | Path] = (),
        *,
        mode: Literal["host", "upstream"] = "host",
        policy_base_url: str | None = None,
        policy_model_name: str = "policy",
        policy_api_key: str = "EMPTY",
        python: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        log_dir: str | Path = "trl_gym_logs",
        start_timeout_s: float = 120.0,
    ) -> None:
        if mode not in ("host", "upstream"):
            raise ConfigError(f"`mode` is 'host' or 'upstream', not {mode!r}; for a running Gym use GymServers.attach")
        if isinstance(config_paths, str | Path):
            raise ConfigError(f"`config_paths` is a list of paths; got {config_paths!r}")
        self.log_path: Path | None = Path(log_dir).absolute() / "gym.log"
        self.gym_version = "unknown"  # until start; an attached Gym does not tell
        self._config_paths = list(config_paths)
        self._mode = mode
        self._policy = (policy_base_url, policy_model_name, policy_api_key)
        self._python = python
        self._overrides = expand_overrides(overrides or {})
        self._start_timeout_s = start_timeout_s
        self._state = GymState.NEW
        self._is_attached = False
        self._nonce = uuid.uuid4().hex
        self._head_url: str | None = None
        self._view: HeadView | None = None
        self._agents: dict[str, AgentInfo] = {}
        self._child: ChildProcess | None = None
        self._work_dir: Path | None = None
        self._deadline = 0.0
        self._http = new_http_session()
        self._probe = ServerProbe()

    @classmethod
    def attach(cls, head_url: str, *, timeout_s: float = 60.0) -> GymServers:
        """Use a Gym that somebody else runs.

        Args:
            head_url: URL of its head server, e.g. `"http://127.0.0.1:11000"`.
            timeout_s: How long to wait for it and its servers to answer, in seconds.

        Raises:
            GymServerError: If nothing answers, something else answers, or some of its servers do not.
        """
        if urlsplit(head_url).scheme not in ("http", "https"):
            raise ConfigError(f"a head server's URL looks like http://127.0.0.1:11000; got {head_url!r}")
        servers = cls()
        servers._is_attached = True
        servers.log_path = None
        servers._head_url = head_url.rstrip("/")
        servers._start_timeout_s = timeout_s
        servers._deadline = time.monotonic() + timeout_s
        servers._state = GymState.STARTING
        return servers.wait_ready()

    # --- What is there ---

    @property
    def state(self) -> GymState:
        return self._state

    @property
    def head_url(self) -> str:
        """URL of the head server; known from `start` on."""
        if self._head_url is None:
            raise GymServerError("the NeMo Gym servers have not been started, so there is no head URL yet")
        return self._head_url

    @property
    def agents(self) -> dict[str, AgentInfo]:
        """Agents by name. Known once the servers are ready."""
        self._require(GymState.READY, "list agents")
        return dict(self._agents)

    @property
    def servers(self) -> list[ServerInstance]:
        """All servers behind the head server. Known once they are ready."""
        self._require(GymState.READY, "list servers")
        return list(self._view.instances) if self._view else []

    @property
    def sole_agent(self) -> str | None:
        """Name of the only agent, when there is exactly one: then rows need not name any."""
        return next(iter(self.agents)) if len(self.agents) == 1 else None

    def agent(self, name: str) -> AgentInfo:
        """Look up an agent.

        Raises:
            ConfigError: If there is none of that name; lists those that there are.
        """
        agents = self.agents
        if name in agents:
            return agents[name]
        closest = difflib.get_close_matches(name, agents, n=1)
        hint = f" Did you mean `{closest[0]}`?" if closest else ""
        known = ", ".join(f"`{known}`" for known in sorted(agents)) or "none"
        raise ConfigError(f"there is no agent `{name}` in this NeMo Gym.{hint} Agents: {known}")

    # --- Life cycle ---

    def connect_policy(self, base_url: str, model_name: str, api_key: str = "EMPTY") -> None:
        """Say where the policy is served.

        Before `start` this is what Gym will use. Afterwards, and for an attached Gym, it cannot be changed any more:
        then it is only compared.

        Raises:
            GymServerError: If the running Gym sends its model calls somewhere else.
        """
        if self._state is GymState.NEW:
            self._policy = (base_url, model_name, api_key)
            return
        if self._state is GymState.STOPPED:
            raise GymServerError("the NeMo Gym servers have been stopped")
        configured = self._view.policy_base_urls() if self._view else str(self._policy[0]).split(",")
        if set(map(_normalized, base_url.split(","))) != set(map(_normalized, configured)):
            remedy = "Start it with that `policy_base_url`, or serve the policy where it looks."
            raise GymServerError(
                f"the NeMo Gym at {self.head_url} calls the policy at {' and '.join(configured) or 'no known URL'}, "
                f"but the policy is served at {base_url}. {remedy}"
            )

    def start(self) -> Self:
        """Spawn the servers and return at once; `wait_ready` waits.

        Raises:
            ConfigError: If Gym or a config cannot be found, or no policy URL is known. Nothing was started.
            GymServerError: If the port of the head server is taken, or the servers were started before.
        """
        self._require(GymState.NEW, "start")
        installation = find_installation(self._python)
        configs = resolve_configs(self._config_paths, installation.root)
        assert self.log_path is not None
        policy_base_url, policy_model_name, policy_api_key = self._policy
        if policy_base_url is None:
            raise ConfigError("no `policy_base_url`: pass it to GymServers, or call connect_policy before start")
        host, port = self._head_address()
        head_socket = self._bind_head(host, port)
        try:
            host, port = head_socket.getsockname()[:2]
            self._work_dir = Path(tempfile.mkdtemp(prefix="trl-gym-"))
            config = initial_config(
                configs,
                self._overrides,
                nonce=self._nonce,
                head_address=(host, port),
                policy_base_url=policy_base_url,
                policy_model_name=policy_model_name,
            )
            if self._mode == "upstream":
                head_socket.close()  # Gym binds it anew. Whoever is faster is recognized by the missing nonce.
            self._child = spawn(
                installation,
                self._mode,
                config,
                search_roots=configs.search_roots,
                head_fd=head_socket.fileno() if self._mode == "host" else None,
                work_dir=self._work_dir,
                log_path=self.log_path,
                policy_api_key=policy_api_key,
            )
        except BaseException:
            self.stop()
            raise
        finally:
            head_socket.close()  # the child has its own copy
        self._head_url = f"http://{LOCALHOST if host == '0.0.0.0' else host}:{port}"
        self.gym_version = installation.version
        self._deadline = time.monotonic() + self._start_timeout_s
        self._state = GymState.STARTING
        return self

    def wait_ready(self) -> Self:
        """Wait until our head server and every server behind it answers.

        Raises:
            GymServerError: If a server died, something else answers, or time is up. What was started is stopped.
        """
        if self._state is GymState.READY:
            return self
        self._require(GymState.STARTING, "wait for")
        try:
            view = self._wait_for_head()
            self._wait_for_servers(view)
        except BaseException:
            self.stop()
            raise
        self._view = view
        self._agents = view.agents()
        self._state = GymState.READY
        return self

    def check(self) -> None:
        """Notice that servers have died. Cheap enough for every step.

        Raises:
            GymServerError: Names what died, with exit code, last log lines and log path where we started it.
        """
        if self._state not in (GymState.STARTING, GymState.READY):
            raise GymServerError(f"the NeMo Gym servers are {self._state.value}, not running")
        if self._is_attached:
            look_at_head(self._http, self.head_url, timeout_s=_REQUEST_TIMEOUT_S)
            return
        self.check_process()
        if self._mode == "upstream" and self._view is not None:
            dead = [f"`{server.name}`" for server in self._view.instances if not is_alive(server.pid)]
            if dead:
                raise GymServerError(f"NeMo Gym servers have died: {', '.join(dead)}.\n\n{self.log_end()}")

    def check_process(self) -> None:
        """Notice that the Gym that we started has ended as a whole; single servers are `agents_down`'s.

        Raises:
            GymServerError: With exit code, last log lines and log path.
        """
        if self._child is not None and self._child.poll() is not None:
            raise self._death()

    def agents_down(self) -> dict[str, str]:
        """By name, agents that cannot run rollouts because a server that they need is gone: which one, and why.

        A refused connection counts when three calls in a row see it; call it about every second.
        """
        if self._state is not GymState.READY or self._view is None:
            return {}
        knows_processes = self._mode == "upstream" and not self._is_attached
        gone = self._probe.gone(self._view.instances, knows_processes=knows_processes)
        return {
            agent: "; ".join(f"server `{name}`: {gone[name]}" for name in sorted(needed & gone.keys()))
            for agent in self._agents
            if (needed := needed_servers(self._view.config, agent)) & gone.keys()
        }

    def log_end(self) -> str:
        """Last lines and path of the Gym's log, for messages; empty for an attached Gym."""
        if self._child is None:
            return ""
        return f"Last lines of its log:\n\n{self._child.log_tail()}\n\nThe whole log: {self.log_path}"

    def stop(self) -> None:
        """Stop what we started. Idempotent; an attached Gym keeps running."""
        self._state = GymState.STOPPED
        child, self._child = self._child, None
        work_dir, self._work_dir = self._work_dir, None
        try:
            if child is not None:
                child.stop()
        finally:
            self._http.close()
            if work_dir is not None:
                shutil.rmtree(work_dir, ignore_errors=True)  # links and Ray's temporary files

    def __enter__(self) -> Self:
        if self._state is GymState.NEW:
            self.start()
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- Starting ---

    def _head_address(self) -> tuple[str, int]:
        """Host and port of the head server; port 0 unless an override fixes it."""
        head = self._overrides.get("head_server") or {}
        host = head.get("host") or self._overrides.get("default_host") or LOCALHOST
        return str(host), int(head.get("port") or 0)

    def _bind_head(self, host: str, port: int) -> socket.socket:
        try:
            return bind_socket(host, port)
        except OSError as error:
            raise GymServerError(
                f"the head server of NeMo Gym cannot listen on {host}:{port}: {error.strerror}."
                f"{self._neighbour(host, port)}"
            ) from error

    def _neighbour(self, host: str, port: int) -> str:
        """Who has the port, when it is another Gym."""
        url = f"http://{host}:{port}"
        try:
            look_at_head(self._http, url, timeout_s=_REQUEST_TIMEOUT_S)
        except GymServerError:
            return " Leave the port out to get a free one."
        return (
            f" Another NeMo Gym runs there: use GymServers.attach({url!r}), or leave the port out to get a free one."
        )

    def _wait_for_head(self) -> HeadView:
        while True:
            self._raise_if_dead()
            try:
                view = look_at_head(self._http, self.head_url, timeout_s=_REQUEST_TIMEOUT_S)
            except HeadUnreachable as error:
                if not wait_until(self._deadline, _POLL_S):
                    raise self._too_late(str(error)) from error
                continue
            if not self._is_attached and view.config.get(NONCE_KEY) != self._nonce:
                raise GymServerError(
                    f"another NeMo Gym answers at {self.head_url}: it took the port before ours could. "
                    f"Leave `head_server.port` out to get a free one.\n\n{self.log_end()}"
                )
            if view.instances:
                return view
            if not wait_until(self._deadline, _POLL_S):
                raise self._too_late("the head server names no servers")

    def _wait_for_servers(self, view: HeadView) -> None:
        waiting = list(view.instances)
        while True:
            self._raise_if_dead()
            waiting = [one for one in waiting if not answers(self._http, one.url, timeout_s=_REQUEST_TIMEOUT_S)]
            if not waiting:
                return
            if not wait_until(self._deadline, _POLL_S):
                names = ", ".join(f"`{one.name}` at {one.url}" for one in waiting)
                raise self._too_late(f"no answer from {names}")

    # --- Explaining ---

    def _require(self, state: GymState, what: str) -> None:
        if self._state is not state:
            now, needed = self._state.value, state.value
            raise GymServerError(f"cannot {what} NeMo Gym servers that are {now}: they have to be {needed}")

    def _raise_if_dead(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            raise self._death()

    def _death(self) -> GymServerError:
        """What the script said, where it had time to; else exit code and log."""
        assert self._child is not None and self._work_dir is not None
        if (path := error_path(self._work_dir)).is_file():
            reason = path.read_text()
            return GymServerError(f"NeMo Gym did not start: {reason}\n\nThe whole log: {self.log_path}")
        return GymServerError(self._child.describe_death())

    def _too_late(self, what: str) -> GymServerError:
        return GymServerError(f"NeMo Gym is not ready after {self._start_timeout_s:g} s: {what}.\n\n{self.log_end()}")


def _normalized(url: str) -> str:
    parts = urlsplit(url.rstrip("/"))
    host = LOCALHOST if parts.hostname == "localhost" else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port}{parts.path}"
