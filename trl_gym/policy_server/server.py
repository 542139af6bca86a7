"""The policy server: start one beside the trainer, or attach to one, or several replicas, that run elsewhere.

    with PolicyServer("runs/tiny_policy", vllm_args={"max-model-len": 512}) as server:
        server.client.chat(messages=[{"role": "user", "content": "Hello"}])

`start` returns at once with a `base_url` whose port is ours already, so that other servers can start meanwhile;
`wait_ready` returns when the process that we started answers with the nonce that we gave it. Nothing that was started
here outlives this process (`trl_gym.processes`), and nothing that was attached to is ever stopped.

Several servers elsewhere are used as one policy:

    vllm_server_base_url: http://node1:8000/v1,http://node2:8000/v1

NeMo Gym gets the list, and its model server keeps a rollout on one of them (0.4: by turns, 0.7: by hash of the
session; both read). What the trainer tells one server it tells all (`PolicyClient`). They must be ours (`trl-gym
serve`); `trl-gym gateway` is for servers that are not, and for one address in front of several.

    NEW ──start──► STARTING ──wait_ready──► READY
     │               └─── restart (ours) ────┤
     └──────────────────────stop─────────────┴──► STOPPED

`restart` replaces a server of ours that has died by another one on the same port, so that its address stays valid;
`trl_gym.run.recovery` decides when, and how often.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError, Problem
from trl_gym.given import VLLM_SOCKETS, home_path, socket_folder, usable_key
from trl_gym.policy_server import command, splice_probe
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.command import ENV_NONCE, ENV_SCRATCH, ServeCommand, api_key_from_environment, default_key
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.policy_server.middleware.identity import gym_key
from trl_gym.policy_server.parsers import Parsers, choose
from trl_gym.policy_server.transformers_engine.alone import chosen_parsers
from trl_gym.processes import ChildProcess, ServerState, bind_socket, execute, reachable, wait_until
from trl_gym.storage import writing
from trl_gym.threads import server_environment

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 2.0  # while the model loads, requests queue at the socket: look at the process this often

_REBIND_TIMEOUT_S = 30.0  # for the port of a server that has just died
_FINAL_STATUSES = (401, 403, 404)  # of a server that is up and will not become ours by waiting
_WITHOUT_RENDEZVOUS = ("file", "adapter")  # a process group over several servers is not made here


class PolicyBackend(Protocol):
    """The part of a policy server that a run needs, whatever engine is behind it.

    Attributes:
        base_urls: OpenAI base URLs, given to Gym; several are replicas of one policy.
        model_name: Name under which the policy is served, given to Gym.
        weight_transports: Ways in which it accepts weights, best first.
        client: Control plane, used by rank 0 between optimizer steps, and to cancel rollouts.
        is_ours: Whether its process was started here, so that `restart` can replace it.
        state: Where it is in its life.
    """

    @property
    def base_urls(self) -> tuple[str, ...]: ...
    @property
    def model_name(self) -> str: ...
    @property
    def weight_transports(self) -> tuple[str, ...]: ...
    @property
    def client(self) -> PolicyClient: ...
    @property
    def is_ours(self) -> bool: ...
    @property
    def state(self) -> ServerState: ...

    def start(self) -> Any:
        """Spawn its process and return before it is ready. Called when `state` is `NEW`."""

    def wait_ready(self) -> Any:
        """Wait until it serves. Raises `PolicyServerError`."""

    def check(self) -> None:
        """Raise `PolicyServerLostError` if its process was started here and has ended. Asks nothing over the network:
        it is called about every second while rollouts run."""

    def restart(self) -> None:
        """Replace its process by another one at the same address; return when that answers.

        Raises:
            PolicyServerError: It did not start, or is not ours. If it did not start, another try may help.
            ConfigError: It did not start, and another try would not help.
        """

    def stop(self) -> None:
        """End its process, if it is ours. Idempotent."""


@dataclass(frozen=True)
class OwnCommand:
    """A server of ours: vLLM's with our middleware inside, or one on transformers. A `ServeCommand`."""

    model: str | Path
    flags: list[str]  # of `command.flags_from`
    engine: str = "vllm"  # one of `command.ENGINES`
    environment: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _chosen(self) -> tuple[Parsers, list[str]]:
        """The parsers, and all flags."""
        if self.engine == "transformers":
            return chosen_parsers(self.model, self.flags), self.flags
        return choose(self.model, self.flags)

    @property
    def parsers(self) -> Parsers:
        return self._chosen[0]

    def check(self, host: str, api_key: str | None, environment: Mapping[str, str]) -> None:
        command.check_before_start(self.model, host, api_key, self.flags, environment, self.engine)

    def words(self, *, host: str, port: int, listen_fd: int, name: str) -> list[str]:
        return command.serve_command(
            self.model,
            host=host,
            port=port,
            listen_fd=listen_fd,
            name=name,
            flags=self._chosen[1],
            engine=self.engine,
        )


class PolicyServer:
    """An OpenAI server behind the on-policy middleware: vLLM's, one on transformers, or another engine's. Implements
    `PolicyBackend`.

    Args:
        model: Model folder or name.
        served_model_name: Name under which it is served.
        host: Address to listen on.
        port: Port to listen on; 0 lets the operating system choose.
        vllm_args: Flags of `vllm serve`, e.g. `{"max-model-len": 512, "tool-call-parser": "hermes"}`; see
            `command.flags_from`. Parsers of tool calls and thinking that they do not name are guessed (`parsers`).
        env: Environment variables of the server, on top of ours.
        log_dir: Folder for the log of the server process.
        start_timeout_s: How long `wait_ready` waits.
        api_key: Bearer token that the server demands on every route but `/health`. Default: the one in VLLM_API_KEY,
            else a random one (`client.api_key`). Empty: none is demanded, and no weights are taken.
        devices: GPUs of its own, as for `CUDA_VISIBLE_DEVICES`; it shares ours when not given.
        engine: One of `command.ENGINES`. With `transformers`, `vllm_args` are flags of `transformers_engine/alone.py`.
        fork_server: Forks the process, at a restart too; started and stopped by whoever made it. Default: the process
            is executed, and imports vLLM.
        serving: What its process runs, in place of `engine` and `vllm_args`: another engine's server
            (`sglang.server.SglangCommand`).

    Raises:
        ConfigError: `vllm_args` cannot be turned into flags, or the key cannot be sent.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        served_model_name: str = "policy",
        host: str = "127.0.0.1",
        port: int = 0,
        vllm_args: Mapping[str, Any] | Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        log_dir: str | Path = "trl_gym_logs",
        start_timeout_s: float = 600.0,
        api_key: str | None = None,
        devices: str | None = None,
        engine: str = "vllm",
        fork_server: ForkServer | None = None,
        serving: ServeCommand | None = None,
    ) -> None:
        self.model = Path(model).expanduser() if isinstance(model, Path) else home_path(model)
        self.model_name = served_model_name
        self._weight_transports: tuple[str, ...] | None = None
        self.state = ServerState.NEW
        self.log_path: Path | None = None
        self._host, self._port = host, port
        self._serving = serving or OwnCommand(self.model, command.flags_from(vllm_args), engine)
        self._env = dict(env or {}) | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
        self._log_dir = Path(log_dir).expanduser()
        self._start_timeout_s = start_timeout_s
        self._api_key = usable_key("api_key", api_key) if api_key is not None else default_key()
        self._fork_server = fork_server
        self._nonce = secrets.token_hex(16)
        self._process: ChildProcess | None = None  # None also for a server that we are attached to
        self._num_starts = 0
        self._client: PolicyClient | None = None
        self._info: dict[str, Any] = {}

    @classmethod
    def attach(
        cls, base_urls: str | Sequence[str], *, api_key: str | None = None, timeout_s: float = 240.0
    ) -> PolicyServer:
        """Use a server that runs elsewhere (`trl-gym serve` or `trl-gym gateway`), or several replicas; they are never
        stopped from here.

        That it continues sampled tokens exactly is checked where that matters, when a trainer starts
        (`splice_probe.check_splice`).

        Args:
            base_urls: OpenAI base URLs; in one text they are separated by commas.
            api_key: Bearer token. Default: the one in VLLM_API_KEY, if there is one.
            timeout_s: How long to wait until all answer, in seconds.

        Raises:
            ConfigError: No URL is given, or one of them twice, or one is no URL; or the key cannot be sent.
            PolicyServerError: One does not answer in time or is not a trl-gym policy server (the message distinguishes
                a wrong key, an OpenAI server without our middleware and something else), or they are not replicas.
        """
        server = cls(model="", api_key=api_key or api_key_from_environment() or "", start_timeout_s=timeout_s)
        server._client = PolicyClient(base_urls, api_key=server._api_key)
        server.state = ServerState.STARTING
        server.wait_ready()
        server.model = server.model_name = server._info["model_names"][0]
        return server

    @property
    def client(self) -> PolicyClient:
        """Control plane.

        Raises:
            PolicyServerError: Before `start`.
        """
        if self._client is None:
            raise PolicyServerError(f"The policy server is {self.state}.", "Call `start` first.")
        return self._client

    @property
    def base_urls(self) -> tuple[str, ...]:
        """OpenAI base URLs, valid from `start` on. Raises `PolicyServerError` before."""
        return self.client.base_urls

    @property
    def base_url(self) -> str:
        """`"http://127.0.0.1:PORT/v1"`; several are separated by commas. See `base_urls`."""
        return self.client.base_url

    @property
    def gym_key(self) -> str:
        """Key for the NeMo Gym of a run (`GymServers(policy_api_key=…)`): it samples with it, and changes no weights.
        Valid from `start` on. Raises `PolicyServerError` before."""
        return gym_key(self.client.api_key, "warn")

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together. Raises `PolicyServerError` before `wait_ready`."""
        self._demand("max_model_len", ServerState.READY)
        return self._info["max_model_len"]

    @property
    def parsers(self) -> Parsers | None:
        """What reads the model's tool calls and thinking: as `vllm_args` say, or guessed from the model's files. None
        for a server that was attached to, which does not tell, and for an engine that decides itself."""
        is_elsewhere = self._client is not None and self._process is None
        return None if is_elsewhere else self._serving.parsers

    def start(self) -> PolicyServer:
        """Bind the port and start loading; returns at once.

        Raises:
            ConfigError: The model folder, the engine, the address or TMPDIR cannot work; nothing is started then.
            PolicyServerError: The port is taken.
        """
        self._demand("start", ServerState.NEW)
        environment = {**os.environ, **self._env}
        self._serving.check(self._host, self._api_key, environment)
        for line in self._serving.parsers.lines() if self._serving.parsers is not None else ():
            logger.info("%s", line)
        self._env |= self._serving.environment
        try:
            sock = bind_socket(self._host, self._port)
        except OSError as error:
            raise PolicyServerError(
                f"Port {self._port} on {self._host} is in use, or the address is not this machine's "
                f"({error.strerror}).",
                "Choose another port, or leave it at 0.",
            ) from error
        with sock:
            self._port = sock.getsockname()[1]
            self._spawn(sock)
        self._client = PolicyClient(f"http://{reachable(self._host)}:{self._port}/v1", api_key=self._api_key)
        self.state = ServerState.STARTING
        return self

    def wait_ready(self) -> PolicyServer:
        """Wait until our process answers.

        Raises:
            PolicyServerError: It died, or did not answer in time (it is stopped then); names the cause from its log.
        """
        if self.state is ServerState.READY:
            return self
        self._demand("wait_ready", ServerState.STARTING)
        deadline = time.monotonic() + self._start_timeout_s
        try:
            infos = [self._await_info(client, deadline) for client in self.client.singly()]
            _require_replicas(self.base_urls, infos)
            self._info = infos[0]
        except PolicyServerLostError as error:
            self.stop()
            raise PolicyServerError(error.problem, error.remedy) from error  # it was never there: nothing is lost
        except BaseException:
            self.stop()
            raise
        self.state = ServerState.READY
        return self

    @property
    def weight_transports(self) -> tuple[str, ...]:
        """Ways in which it accepts weights, asked of the server, which may have been started for any. Valid from
        `wait_ready` on.

        Raises:
            ConfigError: Several servers accept none that works for several, or one was started without a key.
        """
        if self._weight_transports is None:
            accepted = [_accepted_by(client) for client in self.client.singly()]
            self._weight_transports = accepted[0] if len(accepted) == 1 else _shared(accepted, self.base_urls)
        return self._weight_transports

    @property
    def is_ours(self) -> bool:
        """True if its process was started here (a server that was attached to has none)."""
        return self._process is not None

    def restart(self) -> None:
        """End what is left of our process and start another one on the same port; return when it answers.

        It has the weights of the model folder: send the current ones before anything is sampled.

        Raises:
            PolicyServerError: It could not be started, with the cause from its log, or is not ours, or was stopped.
            ConfigError: It died while it started, of something that another start does not change.
        """
        if self._process is None or self.state not in (ServerState.READY, ServerState.STARTING):
            raise PolicyServerError(
                f"The policy server at {self.base_url} cannot be restarted from here: it is {self.state}, or not "
                "ours.",
                "Start it again where it was started.",
            )
        self._process.stop()
        self.client.close()  # its connections lead to the dead one
        self.state = ServerState.STARTING
        self._nonce = secrets.token_hex(16)
        with self._rebind() as sock:
            self._spawn(sock)
        try:
            self._info = self._await_info(self.client, time.monotonic() + self._start_timeout_s)
        except BaseException as error:
            self._process.stop()
            if isinstance(error, PolicyServerLostError) and would_die_again(self._process.log_path):
                raise ConfigError(error.problem, error.remedy) from error
            raise
        self.state = ServerState.READY

    def check(self) -> None:
        """Raise `PolicyServerLostError` (cause, exit code, last log lines, log path) if our process has died."""
        if self._process is None or self.state is ServerState.STOPPED or self._process.poll() is None:
            return
        cause = cause_of_death(self._process.log_path)
        text = self._process.describe_death()
        raise PolicyServerLostError(f"{cause.text}\n\n{text}" if cause.text else text, cause.remedy)

    def stopped(self) -> list[str]:
        """Return those of our processes that someone has stopped (SIGSTOP), by name and pid."""
        return [] if self._process is None else self._process.stopped()

    def stop(self) -> None:
        """Stop the process, if it is ours. Idempotent."""
        self.state = ServerState.STOPPED
        if self._process is not None:
            self._process.stop()
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> PolicyServer:
        return self.start().wait_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _demand(self, what: str, state: ServerState) -> None:
        if self.state is not state:
            raise PolicyServerError(f"`{what}` needs a policy server that is {state}; this one is {self.state}.")

    def _spawn(self, sock: socket.socket) -> None:
        """Start the process on a socket that listens already. Each start has its own log: the last one says why the
        server died."""
        again = f"-restart{self._num_starts}" if self._num_starts else ""
        self._num_starts += 1
        self.log_path = self._log_dir / f"policy_server-{self._port}{again}.log"
        safe = "Its process was not started."
        scratch = Path(socket_folder(VLLM_SOCKETS, {**os.environ, **self._env}), f"trl-gym-{secrets.token_hex(4)}")
        # A key of the user's shell must not become the server's without our client knowing it.
        env = {**server_environment(), "VLLM_API_KEY": self._api_key, **self._env, ENV_NONCE: self._nonce}
        with writing("The policy server's log", self.log_path, safe=safe, kind=PolicyServerError):
            self._process = ChildProcess(
                "policy server",
                self._serving.words(host=self._host, port=self._port, listen_fd=sock.fileno(), name=self.model_name),
                log_path=self.log_path,
                env=env | {ENV_SCRATCH: str(scratch)},
                pass_fds=[sock.fileno()],
                start=execute if self._fork_server is None else self._fork_server.fork,
                scratch=scratch,
            )

    def _rebind(self) -> socket.socket:
        """Bind our port again. Connections that the dead server left behind do not hold it (`SO_REUSEADDR`); what is
        left of its processes does, for a moment."""
        deadline = time.monotonic() + _REBIND_TIMEOUT_S
        while True:
            try:
                return bind_socket(self._host, self._port)
            except OSError as error:
                if not wait_until(deadline):
                    raise PolicyServerError(
                        f"Port {self._port} on {self._host}, where the policy server ran and where NeMo Gym looks for "
                        f"it, was taken by another process while it was down ({error.strerror}).",
                        "Free the port.",
                    ) from error

    def _await_info(self, client: PolicyClient, deadline: float) -> dict[str, Any]:
        """Poll `GET /trl_gym/info` until it answers; notice a dead process and another server at once."""
        while True:
            try:
                info = client.info(timeout_s=_PROBE_TIMEOUT_S)
            except PolicyServerError as error:
                self.check()
                refused = error if isinstance(error, PolicyResponseError) else None
                if self._process is None and refused is not None and refused.status in _FINAL_STATUSES:
                    raise splice_probe.unusable(client, refused) from error
                if not wait_until(deadline):
                    raise self._timed_out(client, error) from error
                continue
            if self._process is not None and info.get("nonce") != self._nonce:
                raise PolicyServerError(
                    f"{client.root_url} is answered by another server than the one we started.",
                    "Choose another port, or leave it at 0.",
                )
            return info

    def _timed_out(self, client: PolicyClient, last: PolicyServerError) -> PolicyServerError:
        waited = f"The policy server at {client.base_url} was not ready after {self._start_timeout_s:g} s"
        if self._process is None:
            return PolicyServerError(f"{waited}. The last attempt: {last}", "Start it, or correct its URL.")
        return PolicyServerError(
            f"{waited}; it was stopped. Last lines of its log:\n{self._process.log_tail()}\n\n"
            f"The whole log: {self.log_path}",
            "Raise `gym_server_start_timeout` if it was still loading.",
        )


def _require_replicas(base_urls: Sequence[str], infos: Sequence[Mapping[str, Any]]) -> None:
    for base_url, info in zip(base_urls[1:], infos[1:], strict=True):
        for what in ("model_names", "max_model_len"):
            if info[what] != infos[0][what]:
                raise PolicyServerError(
                    f"{base_urls[0]} and {base_url} are to serve the same policy, and differ in {what}: "
                    f"{infos[0][what]!r} and {info[what]!r}.",
                    "Start them alike.",
                )


def _accepted_by(client: PolicyClient) -> tuple[str, ...]:
    info = client.info()
    if not info.get("has_key", True):  # earlier versions do not say, and took weights of everybody
        raise ConfigError(
            f"The policy server at {client.base_url} was started without a key, and so takes no weights of anybody.",
            "Start it with a key (`--api-key` or VLLM_API_KEY, without `--no-key`), and set VLLM_API_KEY here.",
        )
    if (told := info.get("weight_transports")) is not None:
        return tuple(told)
    config = client.server_config()  # behind a gateway, or of an older version; vLLM runs `pip list` for its answer
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    return (*filter(None, [backend]), *(("adapter",) if config.get("lora_config") else ()))


def _shared(accepted: Sequence[tuple[str, ...]], base_urls: Sequence[str]) -> tuple[str, ...]:
    """Return what all servers accept and what can be done for several."""
    shared = set(_WITHOUT_RENDEZVOUS).intersection(*accepted)
    if not shared:
        listed = "; ".join(f"{url}: {', '.join(names)}" for url, names in zip(base_urls, accepted, strict=True))
        raise ConfigError(
            f"Several policy servers can be sent weights by {' or '.join(_WITHOUT_RENDEZVOUS)} only, and these were "
            f"started for others ({listed}).",
            """Start each with --weight-transfer-config '{"backend": "file"}' and set `gym_weight_dir` to a folder """
            "that all of them see, or run one server with --data-parallel-size.",
        )
    return tuple(name for name in accepted[0] if name in shared)


# -- why a server process ended, from its log -------------------------------------------------------------------------

_MAX_LOG_BYTES = 512 * 1024  # from the end; the cause is followed by a few hundred lines of consequences

# An exception as a traceback ends, argparse's last word, or one of our own refusals; vLLM puts "(EngineCore pid=7)
# ERROR 11-22 12:00:00 [core.py:1] " in front.
_PREFIX = re.compile(r"^(?:\((?:\w+)(?: \w+)* pid=\d+\) )?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]+\] )?")
_CAUSE = re.compile(r"^(?:[\w.]*(?:Error|Exception)(?:: .+|$)|(?:[\w. -]+: )?error: .+)")
_PYDANTIC = re.compile(r"validation errors? for \w+$")  # the reason is on the next line

# Logged by processes that only notice that another one failed, and by SGLang when it asks itself too early.
_CONSEQUENCES = (
    *("Engine core initialization failed", "Engine core proc", "WorkerProc initialization failed"),
    *("Please see the error messages above", "/freeze_gc", "ConnectionRefusedError: [Errno 111]"),
    "NewConnectionError: HTTPConnection(host='127.0.0.1'",
)

_ODD_CALL = "json.decoder.JSONDecodeError"  # logged by vLLM where the policy says a tool call that is no JSON

_REMEDIES: list[tuple[str, str]] = [
    (r"Repo id must be in the form", "Give a model path that exists on this machine, or a name on the hub."),
    (
        r"greater than the derived max_model_len",
        "Lower max-model-len: the model was made for less (max_position_embeddings in its config.json).",
    ),
    (
        r"unrecognized arguments",
        "Leave out the flag that this engine does not know; `vllm serve --help=all` (`python -m sglang.launch_server "
        "--help`) lists those that it knows.",
    ),
    (
        r"[Ii]nvalid tool call parser",
        "Choose one of the names in the message, or load your own with --tool-parser-plugin.",
    ),
    (
        r"(?:increase|raise|Raise) --mem-fraction-static",
        "Raise `vllm_gpu_memory_utilization` (SGLang's mem-fraction-static) or lower `vllm_max_model_length`: weights "
        "and cache do not fit.",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache|KV cache is needed|"
        r"(?:estimated maximum model length|max seq len)",
        "Lower max-model-len, or give the KV cache more memory (gpu-memory-utilization; on CPU kv-cache-memory-bytes "
        "or the environment variable VLLM_CPU_KVCACHE_SPACE, in GiB).",
    ),
    (
        r"out of memory|OutOfMemoryError|Free memory on device|Cannot allocate memory|MemoryError",
        "Lower gpu-memory-utilization or max-model-len, or end what else uses this device: memory ran out.",
    ),
    (
        r"are not supported for now|architectures .* failed to be inspected|does not recognize this architecture|"
        r"no vLLM implementation",
        "Choose another model or version of vLLM: this one cannot serve the architecture in the model's config.json.",
    ),
    (
        r"the fork server ended",
        "Start it again: in the same process it imports vLLM itself then. Out of memory is the usual cause.",
    ),
    (r"the fork server could not fork", "Free memory, or raise the number of processes that are allowed (ulimit -u)."),
    (r"chat template", "Give --chat-template FILE, or save the tokenizer with its chat_template."),
    (r"[Aa]ddress already in use|cannot listen on", "Choose another port or leave it at 0: this one is taken."),
    (
        r"tokenizer",
        "Save the tokenizer again with tokenizer.save_pretrained(folder): the model folder's cannot be loaded.",
    ),
    (
        r"weight transfer backend",
        "Add `trl_gym` to VLLM_PLUGINS, if it is set: vLLM did not load the plugin of trl-gym.",
    ),
]

# Causes that lie in the configuration: flags, files and names do not change by trying again, memory and ports may.
_LASTING = (
    r"Repo id must be in the form|greater than the derived max_model_len|unrecognized arguments|"
    r"[Ii]nvalid tool call parser|are not supported for now|architectures .* failed to be inspected|"
    r"does not recognize this architecture|no vLLM implementation|weight transfer backend|"
    r"^FileNotFoundError|is not supported: |: error: argument "
)


def find_cause(log: str) -> str:
    """Return the line that names the cause, without vLLM's prefixes; empty if no line looks like one.

    The *first* exception that is not a consequence counts: what comes later was raised while handling it, or by a
    process that only noticed. Of lines that repeat it, none adds anything.
    """
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    causes = [_whole(line, following) for line, following in pairwise([*lines, ""]) if _CAUSE.match(line)]
    causes = [line for line in causes if _ODD_CALL not in line]
    primary = [line for line in causes if not any(phrase in line for phrase in _CONSEQUENCES)]
    cause = next(iter([*primary, *causes]), "")
    return cause if len(cause) <= 1000 else f"{cause[:1000]} …"


def remedy_for(cause: str) -> str:
    """Return what to do about a cause that is known; else an empty text."""
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, cause)), "")


def cause_of_death(log_path: Path) -> Problem:
    """Return the cause that a log names, and its remedy; empty texts where it names none."""
    try:
        with open(log_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_LOG_BYTES))
            cause = find_cause(file.read().decode(errors="replace"))
    except OSError as error:  # it was removed; that must not prevent a restart
        return Problem(f"Its log {log_path} cannot be read: {error}")
    return Problem(cause, remedy_for(cause))


def would_die_again(log_path: Path) -> bool:
    """Return whether a server that ended while it started did so for a reason that another start does not change."""
    return re.search(_LASTING, cause_of_death(log_path).text) is not None


def _whole(line: str, following: str) -> str:
    if _PYDANTIC.search(line):
        line = f"{line}: {following.strip().partition(' [type=')[0]}"
    return line.strip()
