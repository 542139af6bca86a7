"""Start the NeMo Gym servers of a training run in one of two ways, or attach to running ones.

    GymServers(["…/calculator.yaml"], policy_base_url="http://127.0.0.1:8000/v1")          host (default)
    GymServers([…], mode="upstream", …)                                                    `gym env start`
    GymServers.attach("http://node7:11000")                                                started elsewhere

      NEW ──start──► STARTING ──wait_ready──► READY ──stop──► STOPPED       (stop is allowed everywhere)
      attach ───────────────────────────────► READY

What we start has a process session of its own and ends with us, however we end (`processes.py`). Its settings and
secrets reach it in a private file and in its environment, never on the command line, which `ps` shows. An attached Gym
is never started, changed or stopped.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import random
import secrets
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    with_run_fields,
)
from trl_gym.gym.install import GymInstallation, find_installation
from trl_gym.processes import ChildProcess, ServerState, bind_socket, split_urls, wait_until

Mode = Literal["host", "upstream"]

LOCALHOST = "127.0.0.1"
_HOST_SCRIPT = Path(__file__).with_name("host.py")
_SCHEMA_TIMEOUT_S = 30.0
_MAX_ASKED = 8  # servers at a time
_REQUEST_TIMEOUT_S = 2.0  # of one request to a server; while it starts, requests queue at its listening socket
# For the head server of Gym's own launcher, which binds the port again. Ray's servers, which start in between, take
# the ports above, which the operating system gives away; Gym's other servers take those below.
_RELEASED_PORTS = range(20_001, 32_768)


class GymServers:
    """Own, or attach to, the servers of one NeMo Gym.

    Args:
        config_paths: Gym's YAML configs: absolute, relative to the working directory or inside the installed nemo-gym.
            The training model server is added when none of them defines `policy_model`.
        mode: `"host"` runs all servers in one process, ready in seconds. `"upstream"` runs Gym's own launcher with Ray
            and one process per server, for environments that use Ray or need more than one core.
        policy_base_url: OpenAI base URL of the policy server, ending in `/v1`; a list, or text with commas, for
            several. May be given later, see `connect_policy`.
        policy_model_name: Model name that the policy server expects.
        policy_api_key: Bearer token for the policy server; passed in the environment only.
        python: Gym's interpreter; `install.find_installation` says where it is looked for.
        overrides: Options of Gym's config as nested mapping or with dotted keys; they win over every file. A string
            may refer to other options: `"${policy_model_name}"`.
        log_dir: Folder for `gym.log`.
        start_timeout_s: Seconds from `start` until every server must answer.

    Raises:
        ConfigError: If an argument has a wrong form.
    """

    def __init__(
        self,
        config_paths: Sequence[str | Path] = (),
        *,
        mode: Mode = "host",
        policy_base_url: str | Sequence[str] | None = None,
        policy_model_name: str = "policy",
        policy_api_key: str = "EMPTY",
        python: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        log_dir: str | Path = "trl_gym_logs",
        start_timeout_s: float = 120.0,
    ) -> None:
        if mode not in ("host", "upstream"):
            remedy = "Use 'host' or 'upstream', or GymServers.attach for a running Gym."
            raise ConfigError(f"`mode` must be 'host' or 'upstream', not {mode!r}.", remedy)
        if isinstance(config_paths, str | Path):
            raise ConfigError(f"`config_paths` must be a list of paths, not {config_paths!r}.", "Put it into a list.")
        self.log_path: Path | None = Path(log_dir).absolute() / "gym.log"
        self.gym_version = "unknown"  # until `start`; an attached Gym does not say
        self._config_paths = list(config_paths)
        self._mode = mode
        self._policy = (split_urls(policy_base_url or ()), policy_model_name, policy_api_key)
        self._python = python
        self._overrides = expand_overrides(overrides or {})
        self._start_timeout_s = start_timeout_s
        self._state = ServerState.NEW
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
        """Use a Gym that runs already.

        Args:
            head_url: URL of its head server, e.g. `"http://127.0.0.1:11000"`.
            timeout_s: Seconds to wait until it and its servers answer.

        Raises:
            ConfigError: If `head_url` is not an HTTP URL.
            GymServerError: If it or one of its servers does not answer, or something else answers.
        """
        if urlsplit(head_url).scheme not in ("http", "https"):
            raise ConfigError(
                f"{head_url!r} is not the URL of a head server.", "Give one that looks like http://127.0.0.1:11000."
            )
        servers = cls()
        servers._is_attached = True
        servers.log_path = None
        servers._head_url = head_url.rstrip("/")
        servers._start_timeout_s = timeout_s
        servers._deadline = time.monotonic() + timeout_s
        servers._state = ServerState.STARTING
        return servers.wait_ready()

    @property
    def state(self) -> ServerState:
        return self._state

    @property
    def head_url(self) -> str:
        """URL of the head server. Raises `GymServerError` before `start`."""
        if self._head_url is None:
            raise GymServerError("The NeMo Gym servers have no URL: they were not started.", "Call `start` first.")
        return self._head_url

    @property
    def agents(self) -> dict[str, AgentInfo]:
        """Agents by name, once the servers are ready."""
        self._require(ServerState.READY, "list agents")
        return dict(self._agents)

    @property
    def servers(self) -> list[ServerInstance]:
        """All servers behind the head server, once they are ready."""
        self._require(ServerState.READY, "list servers")
        return list(self._view.instances) if self._view else []

    @property
    def sole_agent(self) -> str | None:
        """Name of the agent if there is exactly one: rows need not name it then."""
        return next(iter(self.agents)) if len(self.agents) == 1 else None

    def agent(self, name: str) -> AgentInfo:
        """Look up an agent.

        Raises:
            ConfigError: If no agent has that name; lists all names.
        """
        agents = self.agents
        if name in agents:
            return agents[name]
        closest = difflib.get_close_matches(name, agents, n=1)
        known = ", ".join(f"`{known}`" for known in sorted(agents)) or "none"
        hint = f"Did you mean `{closest[0]}`?" if closest else "Correct the name, or add the config of that agent."
        raise ConfigError(f"This NeMo Gym has no agent `{name}`; it has {known}.", hint)

    def connect_policy(self, base_url: str | Sequence[str], model_name: str, api_key: str = "EMPTY") -> None:
        """Set where the policy is served, before `start`; compare it with what Gym uses afterwards.

        Args:
            base_url: See `policy_base_url`.
            model_name: See `policy_model_name`.
            api_key: See `policy_api_key`.

        Raises:
            GymServerError: If the running Gym sends its model calls to another URL.
        """
        if self._state is ServerState.NEW:
            self._policy = (split_urls(base_url), model_name, api_key)
            return
        if self._state is ServerState.STOPPED:
            raise GymServerError("The NeMo Gym servers have been stopped.", "Make a new GymServers.")
        configured = self._view.policy_base_urls() if self._view else self._policy[0]
        if set(map(_normalized, split_urls(base_url))) != set(map(_normalized, configured)):
            raise GymServerError(
                f"The NeMo Gym at {self.head_url} calls the policy at {' and '.join(configured) or 'no known URL'}, "
                f"but the policy is served at {' and '.join(split_urls(base_url))}.",
                "Start that Gym with this `policy_base_url`, or serve the policy at the URL that it calls.",
            )

    def start(self) -> Self:
        """Start the servers and return at once; `wait_ready` waits for them.

        Raises:
            ConfigError: If Gym or a config cannot be found, or the policy's URL is not set. Nothing was started.
            GymServerError: If the port of the head server is taken, or `start` was called before.
        """
        self._require(ServerState.NEW, "start")
        installation = find_installation(self._python)
        configs = resolve_configs(self._config_paths, installation.root)
        policy_base_urls, policy_model_name, _ = self._policy
        if not policy_base_urls:
            raise ConfigError(
                "`policy_base_url` is not set.", "Pass it to GymServers, or call `connect_policy` before `start`."
            )
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
                policy_base_urls=policy_base_urls,
                policy_model_name=policy_model_name,
            )
            self._child = self._spawn(installation, config, configs.search_roots, head_socket)
        except BaseException:
            self.stop()
            raise
        finally:
            head_socket.close()  # the child has its own copy
        self._head_url = f"http://{LOCALHOST if host == '0.0.0.0' else host}:{port}"
        self.gym_version = installation.version
        self._deadline = time.monotonic() + self._start_timeout_s
        self._state = ServerState.STARTING
        return self

    def wait_ready(self) -> Self:
        """Wait until our head server and every server behind it answer.

        Raises:
            GymServerError: If a server died, something else answers, or time is up. The servers are stopped.
        """
        if self._state is ServerState.READY:
            return self
        self._require(ServerState.STARTING, "wait for")
        try:
            view = self._wait_for_head()
            self._wait_for_servers(view)
        except BaseException:
            self.stop()
            raise
        self._view = view
        with ThreadPoolExecutor(_MAX_ASKED) as pool:
            ask = partial(with_run_fields, self._http, timeout_s=_SCHEMA_TIMEOUT_S)
            view.instances[:] = pool.map(ask, view.instances)
        self._agents = view.agents()
        self._state = ServerState.READY
        return self

    def check(self) -> None:
        """Raise if servers have died. Cheap enough for every step.

        Raises:
            GymServerError: Names what died, with exit code, last log lines and log path if we started it.
        """
        if self._state not in (ServerState.STARTING, ServerState.READY):
            raise GymServerError(f"The NeMo Gym servers are {self._state}, not running.", "Start them first.")
        if self._is_attached:
            look_at_head(self._http, self.head_url, timeout_s=_REQUEST_TIMEOUT_S)
            return
        self.check_process()
        if self._mode == "upstream" and self._view is not None:
            dead = [f"`{server.name}`" for server in self._view.instances if not is_alive(server.pid)]
            if dead:
                raise GymServerError(f"NeMo Gym servers have died: {', '.join(dead)}. {self.log_end()}")

    def check_process(self) -> None:
        """Raise if the Gym that we started has ended as a whole; `agents_down` is about single servers.

        Raises:
            GymServerError: Says whether it had been ready, how long it ran, and why it ended.
        """
        if self._child is not None and self._child.poll() is not None:
            raise self._death(self._child)

    def agents_down(self) -> dict[str, str]:
        """Return the agents that cannot run rollouts: name → which server that they need is gone, and why.

        A server that refuses connections counts as gone in the third call in a row; call this about every second.
        """
        if self._state is not ServerState.READY or self._view is None:
            return {}
        knows_processes = self._mode == "upstream" and not self._is_attached
        gone = self._probe.gone(self._view.instances, knows_processes=knows_processes)
        return {
            agent: "; ".join(f"server `{name}`: {gone[name]}" for name in sorted(needed & gone.keys()))
            for agent in self._agents
            if (needed := needed_servers(self._view.config, agent)) & gone.keys()
        }

    def log_end(self) -> str:
        """Return the last lines and the path of Gym's log, for messages; empty for an attached Gym."""
        if self._child is None:
            return ""
        return f"Last lines of its log:\n\n{self._child.log_tail()}\n\nThe whole log: {self.log_path}"

    def stop(self) -> None:
        """Stop the servers that we started; an attached Gym keeps running. Idempotent."""
        self._state = ServerState.STOPPED
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
        if self._state is ServerState.NEW:
            self.start()
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _head_address(self) -> tuple[str, int]:
        """Return host and port of the head server; the port is 0 unless an override fixes it."""
        head = self._overrides.get("head_server") or {}
        host = head.get("host") or self._overrides.get("default_host") or LOCALHOST
        return str(host), int(head.get("port") or 0)

    def _bind_head(self, host: str, port: int) -> socket.socket:
        for likely in random.sample(_RELEASED_PORTS, 20) if self._mode == "upstream" and not port else ():
            with contextlib.suppress(OSError):
                return bind_socket(host, likely)
        try:
            return bind_socket(host, port)
        except OSError as error:
            neighbour, remedy = "", "Leave the port out to get a free one."
            with contextlib.suppress(GymServerError):
                look_at_head(self._http, f"http://{host}:{port}", timeout_s=_REQUEST_TIMEOUT_S)
                neighbour = " Another NeMo Gym runs there."
                remedy = f"Use GymServers.attach('http://{host}:{port}'), or leave the port out to get a free one."
            raise GymServerError(
                f"The head server of NeMo Gym cannot listen on {host}:{port}: {error.strerror}.{neighbour}", remedy
            ) from error

    def _spawn(
        self, installation: GymInstallation, config: dict[str, Any], roots: list[Path], head: socket.socket
    ) -> ChildProcess:
        """Run `host.py` with Gym's interpreter; `config` is the dictionary that Gym merges last."""
        assert self.log_path is not None and self._work_dir is not None
        work_dir, head_fd = self._work_dir, None
        if self._mode == "host":
            head_fd = head.fileno()
        else:
            head.close()  # Gym binds the port again. The nonce tells whether another process was faster.
            # Every server gets a link to Gym's own environment instead of one that `uv` builds.
            config["skip_venv_if_present"] = True
            config["uv_venv_dir"] = str(work_dir / "environments")
            config["uv_cache_dir"] = str(work_dir / "uv-cache")
        settings = {
            "mode": self._mode,
            "config": config,
            "search_roots": [str(root) for root in roots],
            "head_fd": head_fd,
            "error_path": str(error_path(work_dir)),
            "work_dir": str(work_dir),
            "policy_urls": list(self._policy[0]),
        }
        settings_path = work_dir / "settings.json"
        _write_private(settings_path, json.dumps(settings))
        return ChildProcess(
            "NeMo Gym",
            [installation.python, "-P", _HOST_SCRIPT, settings_path],
            log_path=self.log_path,
            env=_environment(installation, self._mode, config, work_dir, self._policy[2]),
            pass_fds=[] if head_fd is None else [head_fd],
        )

    def _wait_for_head(self) -> HeadView:
        while True:
            self.check_process()
            try:
                view = look_at_head(self._http, self.head_url, timeout_s=_REQUEST_TIMEOUT_S)
            except HeadUnreachable as error:
                if not wait_until(self._deadline):
                    raise self._too_late(error.problem) from error
                continue
            if not self._is_attached and view.config.get(NONCE_KEY) != self._nonce:
                raise GymServerError(
                    f"Another NeMo Gym answers at {self.head_url}: it took the port before ours could.",
                    "Leave `head_server.port` out to get a free one.",
                )
            if view.instances:
                return view
            if not wait_until(self._deadline):
                raise self._too_late("The head server names no servers.")

    def _wait_for_servers(self, view: HeadView) -> None:
        waiting = list(view.instances)
        while True:
            self.check_process()
            waiting = [one for one in waiting if not answers(self._http, one.url, timeout_s=_REQUEST_TIMEOUT_S)]
            if not waiting:
                return
            if not wait_until(self._deadline):
                names = ", ".join(f"`{one.name}` at {one.url}" for one in waiting)
                raise self._too_late(f"No answer comes from {names}.")

    def _require(self, state: ServerState, what: str) -> None:
        if self._state is not state:
            now, needed = self._state, state
            raise GymServerError(f"Cannot {what} NeMo Gym servers that are {now}: they have to be {needed}.")

    def _death(self, child: ChildProcess) -> GymServerError:
        """Say when the servers ended and why: in the words of `host.py` if it left any, else with the log's end."""
        assert self._work_dir is not None
        cause = self.log_end()
        if (path := error_path(self._work_dir)).is_file():
            cause = f"{path.read_text()}\n\nThe whole log: {self.log_path}"
        if self._state is ServerState.STARTING:
            return GymServerError(f"NeMo Gym did not start: it {child.describe_end()}. {cause}")
        return GymServerError(f"NeMo Gym was ready and {child.describe_end()}. {cause}")

    def _too_late(self, what: str) -> GymServerError:
        return GymServerError(f"NeMo Gym is not ready after {self._start_timeout_s:g} s. {what} {self.log_end()}")


def error_path(work_dir: Path) -> Path:
    """Return the path at which `host.py` says why it failed."""
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
        "NEMO_GYM_CONFIG_DICT": None,  # Gym passes its config to its children with these; not to be inherited
        "NEMO_GYM_CONFIG_PATH": None,
    }
    if mode == "upstream":
        env["PATH"] = os.pathsep.join([str(installation.python.parent), os.environ.get("PATH", os.defpath)])
        env["UV_PYTHON_DOWNLOADS"] = "never"
        env["RAY_USAGE_STATS_ENABLED"] = "0"
        if not config.get("ray_head_node_address"):
            # Ray's files stay in our folder; by default it writes a token to the home folder and files to /tmp/ray.
            token_path = work_dir / "ray-token"
            _write_private(token_path, secrets.token_hex(32))
            env |= {"RAY_TMPDIR": str(work_dir), "RAY_AUTH_TOKEN_PATH": str(token_path), "RAY_AUTH_TOKEN": None}
    return env


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _normalized(url: str) -> str:
    parts = urlsplit(url.rstrip("/"))
    host = LOCALHOST if parts.hostname == "localhost" else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port}{parts.path}"
