"""One process of NeMo Gym with all servers of the configs: started or attached to, waited for, looked after.

What we start has a process session of its own and ends with us, however we end (`processes.py`). Its settings and
secrets reach it in a private file and in its environment, never on the command line, which `ps` shows. An attached Gym
is never changed or stopped; it may have a process per server, which makes no difference here.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import socket
import tempfile
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import requests

from trl_gym.errors import GymServerError, GymServerLostError
from trl_gym.given import RAY_SOCKETS, socket_folder
from trl_gym.gym.config import API_KEY_VARIABLE, NONCE_KEY, ResolvedConfigs, initial_config
from trl_gym.gym.discovery import (
    LOOKS_IN_A_ROW,
    AgentInfo,
    HeadUnreachable,
    HeadView,
    InFlight,
    answers,
    is_alive,
    look_at_head,
    needed_servers,
    servers_gone,
    with_run_fields,
)
from trl_gym.gym.install import GymInstallation
from trl_gym.processes import ChildProcess, bind_socket, reachable, wait_until
from trl_gym.storage import writing
from trl_gym.supervisor import is_stopped, remove
from trl_gym.threads import gym_environment

Mode = Literal["host", "upstream"]

LOCALHOST = "127.0.0.1"
_HOST_SCRIPT = Path(__file__).with_name("host.py")
_SCHEMA_TIMEOUT_S = 30.0
_MAX_ASKED = 8  # servers at a time
_REQUEST_TIMEOUT_S = 2.0  # of one request to a server; while it starts, requests queue at its listening socket
_CHECK_TIMEOUT_S = 30.0  # of one that has answered before: on a busy machine it is slow, and not gone
# For the head server of Gym's own launcher, which binds the port again. Ray's servers, which start in between, take
# the ports above, which the operating system gives away; Gym's other servers take those below.
_RELEASED_PORTS = range(20_001, 32_768)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """What every process of one NeMo Gym is started with; for the fields see `GymServers`."""

    mode: Mode
    installation: GymInstallation
    configs: ResolvedConfigs
    overrides: Mapping[str, Any] = field(repr=False)  # from `expand_overrides`
    policy_base_urls: Sequence[str]
    policy_model_name: str
    policy_api_key: str = field(repr=False)


class GymProcess:
    """A head server and the servers behind it.

    Args:
        http: For requests to it; not closed here.
        head_url: URL of a head server that runs already, without a slash at the end; else call `start`.
        which: Which one it is of several, for messages, e.g. `" (process 2 of 3)"`.
        is_ours: Whether another rank of this run has started what runs at `head_url`.

    Attributes:
        in_flight: The rollouts that we have there now.
        log_path: Its log; None for one that runs elsewhere.
        child: The process that we started; None until then, once it is stopped, and for one that runs elsewhere.
    """

    def __init__(
        self, http: requests.Session, head_url: str | None = None, *, which: str = "", is_ours: bool = False
    ) -> None:
        self.in_flight = InFlight()
        self.log_path: Path | None = None
        self.child: ChildProcess | None = None
        self._http = http
        self._head_url = head_url
        self._which = which
        self._nonce = None if head_url is not None else uuid.uuid4().hex
        self._view: HeadView | None = None
        self._agents: dict[str, AgentInfo] = {}
        self._has_process_per_server = False
        # Whether the pids that it tells are of this machine: a rank of another host reaches it by another name.
        self._is_near = is_ours and urlsplit(head_url or "").hostname in (LOCALHOST, "localhost")
        self._num_stopped = 0  # looks in a row that found it stopped
        self._hung: frozenset[str] = frozenset()
        self._work_dir: Path | None = None

    @property
    def head_url(self) -> str:
        assert self._head_url is not None, "set by `start`"
        return self._head_url

    @property
    def view(self) -> HeadView:
        """What its head server says, once it is ready."""
        assert self._view is not None, "set by `wait_ready`"
        return self._view

    @property
    def agents(self) -> dict[str, AgentInfo]:
        """Agents by name, once it is ready."""
        return self._agents

    def start(self, options: StartOptions, log_path: Path) -> None:
        """Start it and return at once. Raises `GymServerError`: the port of the head server is taken; `ConfigError`:
        no folder has a name that is short enough for Ray's sockets."""
        self.log_path = log_path
        self._has_process_per_server = options.mode == "upstream"
        host, port = head_address(options.overrides)
        head_socket = bind_head(self._http, host, port, options.mode)
        safe = "Its process was not started."
        with head_socket, writing("NeMo Gym's log or settings", log_path, safe=safe, kind=GymServerError):
            host, port = head_socket.getsockname()[:2]
            below = socket_folder(RAY_SOCKETS) if self._has_process_per_server else None
            self._work_dir = Path(tempfile.mkdtemp(prefix="trl-gym-", dir=below))
            config = initial_config(
                options.configs,
                options.overrides,
                nonce=str(self._nonce),
                head_address=(host, port),
                policy_base_urls=options.policy_base_urls,
                policy_model_name=options.policy_model_name,
            )
            self.child = self._spawn(options, config, head_socket, log_path, self._work_dir)
        self._head_url = f"http://{reachable(host)}:{port}"

    def wait_ready(self, deadline: float, timeout_s: float) -> None:
        """Wait until the head server and every server behind it answer.

        Args:
            deadline: `time.monotonic()` at which time is up.
            timeout_s: Seconds that it had until then, for the message.

        Raises:
            GymServerError: A server died, something else answers, or time is up.
        """
        view = self._wait_for_head(deadline, timeout_s)
        self._wait_for_servers(view, deadline, timeout_s)
        with ThreadPoolExecutor(_MAX_ASKED) as pool:
            ask = partial(with_run_fields, self._http, timeout_s=_SCHEMA_TIMEOUT_S)
            view.instances[:] = pool.map(ask, view.instances)
        self._agents = view.agents(self.in_flight)
        self._view = view

    def check(self) -> None:
        """Raise if it does not answer (one that runs elsewhere), or if processes of it have ended. Raises
        `GymServerError`: names what died."""
        if self._nonce is None:
            look_at_head(self._http, self.head_url, timeout_s=_CHECK_TIMEOUT_S)
            return
        self.check_process()
        if self._has_process_per_server and self._view is not None:
            dead = [f"`{server.name}`" for server in self._view.instances if not is_alive(server.pid)]
            if dead:
                raise GymServerError(f"NeMo Gym servers have died: {', '.join(dead)}. {self.log_end()}")

    def check_process(self) -> None:
        """Raise if the process that this run started has ended, or was stopped in three looks in a row. Raises
        `GymServerLostError`: says whether it had been ready, how long it ran, and why it ended."""
        if self.child is not None and self.child.poll() is not None:
            raise self._death(self.child)
        pid = self._sole_pid if self.child is not None or self._is_near else None
        self._num_stopped = self._num_stopped + 1 if pid is not None and is_stopped(pid) else 0
        if self._num_stopped >= LOOKS_IN_A_ROW:
            raise GymServerLostError(
                f"NeMo Gym{self._which} answers nothing: its process (pid {pid}) was stopped by someone (SIGSTOP)."
            )

    @property
    def pulse_urls(self) -> list[str]:
        """URLs to ask whether it hangs: of its head server where all servers are one process, else of each server."""
        if self._view is None:
            return []
        return [self.head_url] if self._sole_pid is not None else [one.url for one in self._view.instances]

    @property
    def _sole_pid(self) -> int | None:
        """Pid of the process that all servers are in; None where they are in several, or do not say."""
        pids = {one.pid for one in (self._view.instances if self._view is not None else ())} - {None}
        return pids.pop() if len(pids) == 1 and not self._has_process_per_server else None

    def note_hung(self, urls: Collection[str], timeout_s: float) -> None:
        """Note which of `pulse_urls` have not answered for too long; see `GymServers.note_hung`."""
        if self.head_url in urls:
            raise GymServerLostError(
                f"NeMo Gym{self._which} at {self.head_url} hangs, or a server in it blocks all others: it accepts "
                f"requests, and has answered none for {timeout_s:g} s (`gym_server_hang_timeout`). {self.log_end()}",
                "Let environments wait with `await`, and compute long in other threads or processes; or raise the "
                "option.",
            )
        self._hung = frozenset(urls)

    def agents_down(self, refused: Counter[str]) -> dict[str, str]:
        """Look once at every server; see `GymServers.agents_down`."""
        gone = servers_gone(
            self.view.instances, refused, knows_processes=self._has_process_per_server, hung=self._hung
        )
        return {
            agent: "; ".join(f"server `{name}`: {gone[name]}" for name in sorted(needed & gone.keys()))
            for agent in self._agents
            if (needed := needed_servers(self.view.config, agent)) & gone.keys()
        }

    def log_end(self) -> str:
        """Return the last lines and the path of its log, for messages; empty for one that runs elsewhere."""
        if self.child is None:
            return ""
        return f"Last lines of its log:\n\n{self.child.log_tail()}\n\nThe whole log: {self.log_path}"

    def forget(self) -> None:
        """Remove what a process left behind that was stopped. Idempotent."""
        self.child = None
        work_dir, self._work_dir = self._work_dir, None
        if work_dir is not None:
            remove(str(work_dir))  # links and Ray's temporary files; of one that was started, its supervisor has

    def _spawn(
        self, options: StartOptions, config: dict[str, Any], head: socket.socket, log_path: Path, work_dir: Path
    ) -> ChildProcess:
        """Run `host.py` with Gym's interpreter; `config` is the dictionary that Gym merges last."""
        head_fd = None
        if options.mode == "host":
            head_fd = head.fileno()
        else:
            head.close()  # Gym binds the port again. The nonce tells whether another process was faster.
            # Every server gets a link to Gym's own environment instead of one that `uv` builds.
            config["skip_venv_if_present"] = True
            config["uv_venv_dir"] = str(work_dir / "environments")
            config["uv_cache_dir"] = str(work_dir / "uv-cache")
        settings = {
            "mode": options.mode,
            "config": config,
            "search_roots": [str(root) for root in options.configs.search_roots],
            "head_fd": head_fd,
            "error_path": str(error_path(log_path)),
            "work_dir": str(work_dir),
            "policy_urls": list(options.policy_base_urls),
        }
        error_path(log_path).unlink(missing_ok=True)  # of an earlier one
        settings_path = work_dir / "settings.json"
        _write_private(settings_path, json.dumps(settings))
        return ChildProcess(
            f"NeMo Gym{self._which}",
            [options.installation.python, "-P", _HOST_SCRIPT, settings_path],
            log_path=log_path,
            env=_environment(options, config, work_dir),
            pass_fds=[] if head_fd is None else [head_fd],
            scratch=work_dir,
        )

    def _wait_for_head(self, deadline: float, timeout_s: float) -> HeadView:
        while True:
            self.check_process()
            try:
                view = look_at_head(self._http, self.head_url, timeout_s=_REQUEST_TIMEOUT_S)
            except HeadUnreachable as error:
                if not wait_until(deadline):
                    raise self._too_late(error.problem, timeout_s) from error
                continue
            if self._nonce is not None and view.config.get(NONCE_KEY) != self._nonce:
                raise GymServerError(
                    f"Another NeMo Gym answers at {self.head_url}: it took the port before ours could.",
                    "Leave `head_server.port` out to get a free one.",
                )
            if view.instances:
                return view
            if not wait_until(deadline):
                raise self._too_late("The head server names no servers.", timeout_s)

    def _wait_for_servers(self, view: HeadView, deadline: float, timeout_s: float) -> None:
        waiting = list(view.instances)
        while True:
            self.check_process()
            waiting = [one for one in waiting if not answers(self._http, one.url, timeout_s=_REQUEST_TIMEOUT_S)]
            if not waiting:
                return
            if not wait_until(deadline):
                names = ", ".join(f"`{one.name}` at {one.url}" for one in waiting)
                raise self._too_late(f"No answer comes from {names}.", timeout_s)

    def _death(self, child: ChildProcess) -> GymServerError:
        """Say when the servers ended and why: in the words of `host.py` if it left any, else with the log's end."""
        assert self.log_path is not None
        cause = self.log_end()
        if (path := error_path(self.log_path)).is_file():
            cause = f"{path.read_text()}\n\nThe whole log: {self.log_path}"
        if self._view is None:
            return GymServerError(f"NeMo Gym{self._which} did not start: it {child.describe_end()}. {cause}")
        return GymServerLostError(f"NeMo Gym{self._which} was ready and {child.describe_end()}. {cause}")

    def _too_late(self, what: str, timeout_s: float) -> GymServerError:
        return GymServerError(f"NeMo Gym{self._which} is not ready after {timeout_s:g} s. {what} {self.log_end()}")


def error_path(log_path: Path) -> Path:
    """Return the path at which `host.py` says why it failed. Its folder is gone by then."""
    return log_path.with_suffix(".error.txt")


def head_address(overrides: Mapping[str, Any]) -> tuple[str, int]:
    """Return host and port of the head server; the port is 0 unless an override fixes it."""
    head = overrides.get("head_server") or {}
    host = head.get("host") or overrides.get("default_host") or LOCALHOST
    return str(host), int(head.get("port") or 0)


def bind_head(http: requests.Session, host: str, port: int, mode: Mode) -> socket.socket:
    """Bind the head server's socket. Raises `GymServerError`: the port is taken; says whether a NeMo Gym has it."""
    for likely in random.SystemRandom().sample(_RELEASED_PORTS, 20) if mode == "upstream" and not port else ():
        with contextlib.suppress(OSError):
            return bind_socket(host, likely)
    try:
        return bind_socket(host, port)
    except OSError as error:
        neighbour, remedy = "", "Leave the port out to get a free one."
        with contextlib.suppress(GymServerError):
            look_at_head(http, f"http://{host}:{port}", timeout_s=_REQUEST_TIMEOUT_S)
            neighbour = " Another NeMo Gym runs there."
            remedy = f"Use GymServers.attach('http://{host}:{port}'), or leave the port out to get a free one."
        raise GymServerError(
            f"The head server of NeMo Gym cannot listen on {host}:{port}: {error.strerror}.{neighbour}", remedy
        ) from error


def _environment(options: StartOptions, config: Mapping[str, Any], work_dir: Path) -> dict[str, str | None]:
    no_proxy = [value for value in (os.environ.get("no_proxy"), os.environ.get("NO_PROXY")) if value]
    local = ",".join(dict.fromkeys([*no_proxy, LOCALHOST, "localhost"]))
    env: dict[str, str | None] = {
        API_KEY_VARIABLE: options.policy_api_key,
        "PYTHONUNBUFFERED": "1",
        "no_proxy": local,  # Gym's servers find each other over HTTP
        "NO_PROXY": local,
        "NEMO_GYM_CONFIG_DICT": None,  # Gym passes its config to its children with these; not to be inherited
        "NEMO_GYM_CONFIG_PATH": None,
        **gym_environment(),
    }
    if options.mode == "upstream":
        env["PATH"] = os.pathsep.join([str(options.installation.python.parent), os.environ.get("PATH", os.defpath)])
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
