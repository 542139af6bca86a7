"""The NeMo Gym of a training run: started in one of two ways, or attached to.

    GymServers(["…/calculator.yaml"], policy_base_url="http://127.0.0.1:8000/v1")          host (default)
    GymServers([…], mode="upstream", …)                                                    `gym env start`
    GymServers.attach("http://node7:11000")                                                started elsewhere

      NEW ──start──► STARTING ──wait_ready──► READY ──stop──► STOPPED       (stop is allowed everywhere)
      attach ───────────────────────────────► READY

It may run in several processes, each with all servers of the configs (`process.py`): a Gym is one thread, and
resources servers keep the state of a rollout in memory. A rollout stays in the process that `GymServers.agent` chose
for it: the one with the fewest rollouts of ours in flight. Whoever attaches does so to all of them.
"""

from __future__ import annotations

import difflib
import logging
import random
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from trl_gym.errors import ConfigError, GymServerError
from trl_gym.given import checked_urls, split_urls, usable_key
from trl_gym.gym.config import expand_overrides, resolve_configs, single_process_reasons
from trl_gym.gym.discovery import AgentInfo, ServerInstance, new_http_session
from trl_gym.gym.install import find_installation
from trl_gym.gym.process import LOCALHOST, GymProcess, Mode, StartOptions
from trl_gym.processes import ServerState, stop_all
from trl_gym.redaction import secrets_in
from trl_gym.threads import num_cores

logger = logging.getLogger(__name__)

# They keep a process busy if each takes as many seconds as it costs times 64: 1 s at two turns, 2 s at ten.
_ROLLOUTS_PER_PROCESS = 64
_CORES_PER_PROCESS = 4  # the others are for policy server, trainer and what environments start


class GymServers:
    """Own, or attach to, the servers of one NeMo Gym.

    Args:
        config_paths: Gym's YAML configs: absolute, relative to the working directory or inside the installed nemo-gym.
            The training model server is added when none of them defines `policy_model`.
        mode: `"host"` runs all servers in one process, or in several of them that each have all servers; ready in
            seconds. `"upstream"` runs Gym's own launcher with Ray and one process per server, for environments that
            use Ray.
        policy_base_url: OpenAI base URL of the policy server, ending in `/v1`; a list, or text with commas, for
            several. May be given later, see `connect_policy`.
        policy_model_name: Model name that the policy server expects.
        policy_api_key: Bearer token for the policy server; passed in the environment only.
        python: Gym's interpreter; `install.find_installation` says where it is looked for.
        overrides: Options of Gym's config as nested mapping or with dotted keys; they win over every file. A string
            may refer to other options: `"${policy_model_name}"`.
        log_dir: Folder for `gym.log`; further processes write `gym-2.log`, `gym-3.log`, ….
        start_timeout_s: Seconds from `start` until every server must answer.
        processes: Number of processes of mode `"host"`. Default: `default_processes`, or 1 where the configs demand it
            (`config.single_process_reasons`).
        rollouts_in_flight: Rollouts that will run at the same time, for that default.
        hang_timeout_s: Seconds without an answer after which a server counts as hanging, while rollouts run.

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
        processes: int | None = None,
        rollouts_in_flight: int = 1,
        hang_timeout_s: float = 300.0,
    ) -> None:
        if mode not in ("host", "upstream"):
            remedy = "Use 'host' or 'upstream', or GymServers.attach for a running Gym."
            raise ConfigError(f"`mode` must be 'host' or 'upstream', not {mode!r}.", remedy)
        if isinstance(config_paths, str | Path):
            raise ConfigError(f"`config_paths` must be a list of paths, not {config_paths!r}.", "Put it into a list.")
        if processes is not None and processes < 1:
            raise ConfigError(f"`processes` is {processes}.", "Set it to a whole number of at least 1.")
        self.gym_version = "unknown"  # until `start`; an attached Gym does not say
        self._config_paths = list(config_paths)
        self._mode: Mode = mode
        urls = checked_urls("policy_base_url", policy_base_url) if policy_base_url else []
        self._policy = (urls, policy_model_name, usable_key("policy_api_key", policy_api_key) or "EMPTY")
        self._python = python
        self._overrides = expand_overrides(overrides or {})
        self._log_dir = Path(log_dir).expanduser().absolute()
        self._start_timeout_s = start_timeout_s
        self._asked_processes = processes
        self._rollouts_in_flight = rollouts_in_flight
        self.hang_timeout_s = hang_timeout_s
        self._num_restarts = 0
        self._is_ours = False  # although it is attached to
        self._state = ServerState.NEW
        self._processes: list[GymProcess] = []
        self._rng = random.Random()  # training draws from the global one
        self._deadline = 0.0
        self._http = new_http_session()

    @classmethod
    def attach(
        cls, head_url: str, *, timeout_s: float = 60.0, hang_timeout_s: float = 300.0, is_ours: bool = False
    ) -> GymServers:
        """Use a Gym that runs already.

        Args:
            head_url: URL of its head server, e.g. `"http://127.0.0.1:11000"`; several, of Gyms with the same agents,
                separated by commas.
            timeout_s: Seconds to wait until it and its servers answer.

        Raises:
            ConfigError: If `head_url` is not an HTTP URL, or names none.
            GymServerError: If one of them or of their servers does not answer, something else answers, or their agents
                differ.
        """
        servers = cls(start_timeout_s=timeout_s, hang_timeout_s=hang_timeout_s)
        servers._is_ours = is_ours
        return servers.attach_again(head_url)

    def attach_again(self, head_url: str) -> GymServers:
        """Use the Gym that runs at this URL instead of the one that was attached to; see `attach`."""
        urls = list(dict.fromkeys(url.rstrip("/") for url in checked_urls("gym_head_url", head_url)))
        self._processes = [GymProcess(self._http, url, is_ours=self._is_ours) for url in urls]
        self._deadline = time.monotonic() + self._start_timeout_s
        self._state = ServerState.STARTING
        return self.wait_ready()

    def restart(self) -> Self:
        """Replace the processes that we started by new ones, at other addresses; return when they are ready. Raises
        `ConfigError` or `GymServerError`: they cannot be started again."""
        self.stop()
        self._processes = []
        self._num_restarts += 1
        self._state = ServerState.NEW
        return self.start().wait_ready()

    @property
    def state(self) -> ServerState:
        return self._state

    @property
    def head_url(self) -> str:
        """URL of the head server; those of several processes, separated by commas. `attach` takes both. Raises
        `GymServerError`: before `start`."""
        if not self._processes:
            raise GymServerError("The NeMo Gym servers have no URL: they were not started.", "Call `start` first.")
        return ",".join(process.head_url for process in self._processes)

    @property
    def log_path(self) -> Path | None:
        """The log of the first process; those of further ones are beside it. None for a Gym that we did not start."""
        return self._processes[0].log_path if self._processes else None

    @property
    def num_processes(self) -> int:
        """Number of head servers, known after `start`."""
        return len(self._processes)

    @property
    def agents(self) -> dict[str, AgentInfo]:
        """Agents by name, once the servers are ready; those of the first process."""
        self._require(ServerState.READY, "list agents")
        return dict(self._processes[0].agents)

    @property
    def servers(self) -> list[ServerInstance]:
        """All servers, of every process, once they are ready."""
        self._require(ServerState.READY, "list servers")
        return [instance for process in self._processes for instance in process.view.instances]

    @property
    def secrets(self) -> list[str]:
        """Keys and passwords of its configuration, such as a judge's, which no file may contain. Valid when ready."""
        return [secret for process in self._processes for secret in secrets_in(process.view.config)]

    @property
    def sole_agent(self) -> str | None:
        """Name of the agent if there is exactly one: rows need not name it then."""
        return next(iter(self.agents)) if len(self.agents) == 1 else None

    def agent(self, name: str) -> AgentInfo:
        """Look up an agent for a rollout that starts now, in the process that has the fewest of ours in flight. Raises
        `ConfigError` if no agent has that name; lists all names."""
        agents = self.agents
        if name in agents:
            chosen = least_busy([process.in_flight.number for process in self._processes], self._rng)
            return self._processes[chosen].agents[name]
        closest = difflib.get_close_matches(name, agents, n=1)
        known = ", ".join(f"`{known}`" for known in sorted(agents)) or "none"
        hint = f"Did you mean `{closest[0]}`?" if closest else "Correct the name, or add the config of that agent."
        raise ConfigError(f"This NeMo Gym has no agent `{name}`; it has {known}.", hint)

    def connect_policy(self, base_url: str | Sequence[str], model_name: str, api_key: str = "EMPTY") -> None:
        """Set where the policy is served, before `start`; compare it with what Gym uses afterwards. Raises
        `ConfigError` if `base_url` is no HTTP URL, or the key cannot be sent; `GymServerError` if the running Gym
        sends its model calls to another URL."""
        if self._state is ServerState.NEW:
            self._policy = (
                checked_urls("policy_base_url", base_url),
                model_name,
                usable_key("api_key", api_key) or "EMPTY",
            )
            return
        if self._state is ServerState.STOPPED:
            raise GymServerError("The NeMo Gym servers have been stopped.", "Make a new GymServers.")
        is_known = self._state is ServerState.READY
        for process in self._processes:
            configured = process.view.policy_base_urls() if is_known else self._policy[0]
            if set(map(_normalized, split_urls(base_url))) != set(map(_normalized, configured)):
                raise GymServerError(
                    f"The NeMo Gym at {process.head_url} calls the policy at "
                    f"{' and '.join(configured) or 'no known URL'}, but the policy is served at "
                    f"{' and '.join(split_urls(base_url))}.",
                    "Start that Gym with this `policy_base_url`, or serve the policy at the URL that it calls.",
                )

    def start(self) -> Self:
        """Start the servers and return at once; `wait_ready` waits for them.

        Raises:
            ConfigError: If Gym or a config cannot be found, the policy's URL is not set, or the servers cannot run in
                as many processes. Nothing was started.
            GymServerError: If the port of the head server is taken, or `start` was called before.
        """
        self._require(ServerState.NEW, "start")
        installation = find_installation(self._python)
        configs = resolve_configs(self._config_paths, installation.root)
        policy_base_urls, policy_model_name, policy_api_key = self._policy
        if not policy_base_urls:
            raise ConfigError(
                "`policy_base_url` is not set.", "Pass it to GymServers, or call `connect_policy` before `start`."
            )
        options = StartOptions(
            mode=self._mode,
            installation=installation,
            configs=configs,
            overrides=self._overrides,
            policy_base_urls=policy_base_urls,
            policy_model_name=policy_model_name,
            policy_api_key=policy_api_key,
        )
        reasons = single_process_reasons(configs, self._overrides)
        number = choose_processes(self._asked_processes, self._mode, reasons, self._rollouts_in_flight)
        try:
            for index in range(number):
                which = "" if number == 1 else f" (process {index + 1} of {number})"
                self._processes.append(process := GymProcess(self._http, which=which))
                process.start(options, self._log_dir / log_name(index, self._num_restarts))
        except BaseException:
            self.stop()
            raise
        self.gym_version = installation.version
        self._deadline = time.monotonic() + self._start_timeout_s
        self._state = ServerState.STARTING
        return self

    def wait_ready(self) -> Self:
        """Wait until our head servers and every server behind them answer. Raises `GymServerError` if a server died,
        something else answers, or time is up. The servers are stopped."""
        if self._state is ServerState.READY:
            return self
        self._require(ServerState.STARTING, "wait for")
        try:
            for process in self._processes:
                process.wait_ready(self._deadline, self._start_timeout_s)
            self._require_same_agents()
        except BaseException:
            self.stop()
            raise
        self._state = ServerState.READY
        return self

    def check(self) -> None:
        """Raise if servers have died. Cheap enough for every step. Raises `GymServerError`: names what died, with exit
        code, last log lines and log path if we started it."""
        if self._state not in (ServerState.STARTING, ServerState.READY):
            raise GymServerError(f"The NeMo Gym servers are {self._state}, not running.", "Start them first.")
        for process in self._processes:
            process.check()

    def check_process(self) -> None:
        """Raise if a process that we started has ended or was stopped; `agents_down` is about single servers. Raises
        `GymServerLostError`: says which one, whether it had been ready, how long it ran, and why it ended."""
        for process in self._processes:
            process.check_process()

    @property
    def pulse_urls(self) -> list[str]:
        """URLs that answer GET as long as nothing hangs."""
        return [url for process in self._processes for url in process.pulse_urls]

    def note_hung(self, urls: Collection[str]) -> None:
        """Note which of `pulse_urls` have not answered for `hang_timeout_s`: `agents_down` counts them as gone. Raises
        `GymServerLostError`: all servers of a process hang."""
        for process in self._processes:
            process.note_hung([url for url in process.pulse_urls if url in urls], self.hang_timeout_s)

    def agents_down(self, refused: Counter[str]) -> dict[str, str]:
        """Return the agents that cannot run rollouts: name → which server that they need is gone, and why.

        An agent is down as soon as it is in one of several processes. A server that refuses connections counts as gone
        in a watch's third call in a row; call this about every second, in any thread.

        Args:
            refused: Of this watch, empty at first; see `discovery.servers_gone`.
        """
        down: dict[str, str] = {}
        for process in self._processes if self._state is ServerState.READY else ():
            for agent, reason in process.agents_down(refused).items():
                down[agent] = f"{down[agent]}; {reason}" if agent in down else reason
        return down

    def log_end(self) -> str:
        """Return the last lines and the path of Gym's logs, for messages; empty for an attached Gym."""
        return "\n\n".join(filter(None, [process.log_end() for process in self._processes]))

    def stop(self) -> None:
        """Stop the servers that we started; an attached Gym keeps running. Idempotent."""
        self._state = ServerState.STOPPED
        try:
            stop_all([process.child for process in self._processes if process.child is not None])
        finally:
            self._http.close()
            for process in self._processes:
                process.forget()

    def __enter__(self) -> Self:
        if self._state is ServerState.NEW:
            self.start()
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _require_same_agents(self) -> None:
        first, *others = self._processes
        for other in others:
            if other.agents.keys() != first.agents.keys():
                differing = ", ".join(f"`{name}`" for name in sorted(other.agents.keys() ^ first.agents.keys()))
                raise GymServerError(
                    f"The NeMo Gyms at {first.head_url} and {other.head_url} differ in their agents: {differing}.",
                    "Start both with the same configs, or attach to one.",
                )

    def _require(self, state: ServerState, what: str) -> None:
        if self._state is not state:
            now, needed = self._state, state
            raise GymServerError(f"Cannot {what} NeMo Gym servers that are {now}: they have to be {needed}.")


def choose_processes(asked: int | None, mode: str, reasons: Sequence[str], rollouts_in_flight: int) -> int:
    """Return how many processes a NeMo Gym gets; a number that was asked for is taken or refused.

    Args:
        asked: `gym_processes`; None for the default.
        mode: See `GymServers`.
        reasons: Why its servers must not run in several, from `single_process_reasons`.
        rollouts_in_flight: Rollouts that run at the same time, over all ranks.

    Raises:
        ConfigError: More than one was asked for, and that cannot be.
    """
    if mode != "host":
        reasons = [f"the mode is {mode!r}, where Gym's launcher starts a process per server"]
    if asked is not None and asked > 1 and reasons:
        raise ConfigError(
            f"NeMo Gym cannot run in {asked} processes (`gym_processes`): {', '.join(reasons)}.",
            "Leave `gym_processes` out, or change what needs a single process.",
        )
    wanted = asked or default_processes(rollouts_in_flight, num_cores())
    number = 1 if reasons else wanted
    if wanted > 1 and mode == "host":
        chosen = f"one process: {', '.join(reasons)}" if reasons else f"{number} processes"
        logger.info("For %d rollouts in flight NeMo Gym runs in %s", rollouts_in_flight, chosen)
    return number


def default_processes(rollouts_in_flight: int, num_cores: int) -> int:
    """Return how many processes a NeMo Gym gets that says nothing of it.

    One for every 64 rollouts in flight, and at most one for every four cores: on a small machine the engine needs the
    cores more, and a process costs about 300 MB and the seconds of its start.

    Args:
        rollouts_in_flight: Rollouts that run at the same time, over all ranks.
    """
    return max(1, min(-(-rollouts_in_flight // _ROLLOUTS_PER_PROCESS), num_cores // _CORES_PER_PROCESS))


def least_busy(in_flight: Sequence[int], rng: random.Random) -> int:
    """Return the index of the smallest number; among equals by chance, since every rank chooses for itself.

    Args:
        in_flight: Rollouts in each process; not empty.
    """
    fewest = min(in_flight)
    return rng.choice([index for index, number in enumerate(in_flight) if number == fewest])


def log_name(index: int, num_restarts: int) -> str:
    """Return the name of the log of a process. Each start has its own: the one before says why it was needed."""
    which = f"-{index + 1}" if index else ""
    return f"gym{which}{f'-restart{num_restarts}' if num_restarts else ''}.log"


def _normalized(url: str) -> str:
    parts = urlsplit(url.rstrip("/"))
    host = LOCALHOST if parts.hostname == "localhost" else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port}{parts.path}"
