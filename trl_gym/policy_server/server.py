"""One server process that serves the policy: start it beside the trainer, or attach to one that runs elsewhere.

    with PolicyServer("runs/tiny_policy", vllm_args={"max-model-len": 512}) as server:
        server.client.chat(messages=[{"role": "user", "content": "Hello"}])

`start` returns at once with a `base_url` whose port is ours already, so that other servers can start meanwhile;
`wait_ready` returns when the process that we started answers with the nonce that we gave it. Nothing that was started
here outlives this process (`trl_gym.processes`), and nothing that was attached to is ever stopped.

    NEW ──start──► STARTING ──wait_ready──► READY
     │               └─── restart (ours) ────┤
     └──────────────────────stop─────────────┴──► STOPPED

A server that was started here and has died is started again on the same port by `restart`, so that whoever has its
address keeps it; who decides when, and how often, is `trl_gym.run.recovery`.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server import command, splice_probe
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.command import ENV_NONCE
from trl_gym.processes import ChildProcess, bind_socket, wait_until

# --------------------------------------------------------------------------------------------------------------------
# Why a server process ended, from its log: the line that says it, and what to do about it.

_MAX_LOG_BYTES = 512 * 1024  # from the end; the cause is followed by a few hundred lines of consequences

# An exception as a traceback ends, argparse's last word, or one of our own refusals; vLLM puts "(EngineCore pid=7)
# ERROR 11-22 12:00:00 [core.py:1] " in front.
_PREFIX = re.compile(r"^(?:\((?:\w+)(?: \w+)* pid=\d+\) )?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]+\] )?")
_CAUSE = re.compile(r"^(?:[\w.]*(?:Error|Exception)(?:: .+|$)|(?:[\w. -]+: )?error: .+)")
_PYDANTIC = re.compile(r"validation errors? for \w+$")  # the reason is on the next line

# Said by processes that only notice that another one failed.
_CONSEQUENCES = ("Engine core initialization failed", "Engine core proc", "WorkerProc initialization failed")

_HINTS: list[tuple[str, str]] = [
    (r"Repo id must be in the form", "a path that was given does not exist on this machine"),
    (
        r"greater than the derived max_model_len",
        "max-model-len is more than the model was made for (max_position_embeddings in its config.json)",
    ),
    (
        r"unrecognized arguments",
        "this vLLM does not know that flag; `vllm serve --help=all` lists those that it knows",
    ),
    (
        r"[Ii]nvalid tool call parser",
        "the message lists the names that vLLM knows; see also --tool-parser-plugin",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache|KV cache is needed|"
        r"(?:estimated maximum model length|max seq len)",
        "the KV cache is too small: lower max-model-len, or give it more memory (gpu-memory-utilization; on CPU "
        "kv-cache-memory-bytes or the environment variable VLLM_CPU_KVCACHE_SPACE, in GiB)",
    ),
    (
        r"out of memory|OutOfMemoryError|Free memory on device|Cannot allocate memory|MemoryError",
        "out of memory: lower gpu-memory-utilization or max-model-len, or end what else uses this device",
    ),
    (
        r"are not supported for now|architectures .* failed to be inspected|does not recognize this architecture|"
        r"no vLLM implementation",
        "this version of vLLM cannot serve the architecture named in the model's config.json",
    ),
    (r"chat template", "give --chat-template FILE, or save the tokenizer with its chat_template"),
    (r"[Aa]ddress already in use|cannot listen on", "the port is taken; choose another or leave it at 0"),
    (
        r"tokenizer",
        "the model folder's tokenizer cannot be loaded; save it again with tokenizer.save_pretrained(folder)",
    ),
    (
        r"weight transfer backend",
        "the plugin of trl-gym was not loaded by vLLM; VLLM_PLUGINS, if set, must contain `trl_gym`",
    ),
]

# Causes that lie in the configuration: flags, files and names do not change by trying again, memory and ports may.
_LASTING = (
    r"Repo id must be in the form|greater than the derived max_model_len|unrecognized arguments|"
    r"[Ii]nvalid tool call parser|are not supported for now|architectures .* failed to be inspected|"
    r"does not recognize this architecture|no vLLM implementation|weight transfer backend|"
    r"^FileNotFoundError|is not supported: |: error: argument "
)


def find_cause(log: str) -> str | None:
    """The line that names the cause, without vLLM's prefixes; `None` if no line looks like one.

    The *first* exception that is not a consequence counts: what comes later was raised while handling it, or by a
    process that only noticed. Of lines that repeat it, none adds anything.
    """
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    causes = [_whole(line, following) for line, following in pairwise([*lines, ""]) if _CAUSE.match(line)]
    primary = [line for line in causes if not any(phrase in line for phrase in _CONSEQUENCES)]
    if not (primary or causes):
        return None
    cause = (primary or causes)[0]
    return cause if len(cause) <= 1000 else f"{cause[:1000]} …"


def hint_for(cause: str) -> str | None:
    """What to do about it, for the causes that are known."""
    return next((hint for pattern, hint in _HINTS if re.search(pattern, cause)), None)


def explain(log_path: Path) -> str:
    """`"<cause>\\nHint: <hint>"` as far as known, else an empty string."""
    cause = _cause_in(log_path)
    if cause is None:
        return ""
    hint = hint_for(cause)
    return f"{cause}\nHint: {hint}" if hint else cause


def would_die_again(log_path: Path) -> bool:
    """Whether a server that ended while it started did so for a reason that another start does not change."""
    cause = _cause_in(log_path)
    return cause is not None and re.search(_LASTING, cause) is not None


def _cause_in(log_path: Path) -> str | None:
    try:
        with open(log_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_LOG_BYTES))
            return find_cause(file.read().decode(errors="replace"))
    except OSError as error:  # somebody removed it; that must not prevent a restart
        return f"Its log {log_path} cannot be read: {error}"


def _whole(line: str, following: str) -> str:
    if _PYDANTIC.search(line):
        line = f"{line}: {following.strip().partition(' [type=')[0]}"
    return line.strip()


_PROBE_TIMEOUT_S = 2.0  # while the model loads, requests queue at the socket: look at the process this often

_LOOK_TIMEOUT_S = 5.0
_REBIND_TIMEOUT_S = 10.0  # for the port of a server that has just died
_FINAL_STATUSES = (401, 403, 404)  # of a server that is up and will not become ours by waiting

Placement = Literal["colocate", "server"]


class PolicyBackend(Protocol):
    """What the trainer needs of a server, whatever engine is behind it.

    Attributes:
        base_url: OpenAI base URL, given to Gym.
        model_name: Name under which the policy is served, given to Gym.
        placement: Whether the server shares the trainer's devices.
        weight_transports: Ways in which it accepts weights, best first.
        client: Control plane, used by rank 0 between optimizer steps.
        keeps_records: Whether it answers `POST /trl_gym/rollouts/records` and `/cancel` (see `calls.py`). Without it
            the journal has no versions, seconds and cache hits of single model calls, drift is explained from the
            tokens alone, and a rollout that is given up goes on sampling.
        is_ours: Whether its process was started here, and `restart` starts another one.
        state: `"new"`, `"starting"`, `"ready"` or `"stopped"`.
    """

    @property
    def base_url(self) -> str: ...
    @property
    def model_name(self) -> str: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def weight_transports(self) -> tuple[str, ...]: ...
    @property
    def client(self) -> PolicyClient: ...
    @property
    def keeps_records(self) -> bool: ...
    @property
    def is_ours(self) -> bool: ...
    @property
    def state(self) -> str: ...

    def start(self) -> Any:
        """Spawn its process and return before it is ready. Called when `state` is `"new"`."""

    def wait_ready(self) -> Any:
        """Wait until it serves. Raises `PolicyServerError`."""

    def stop(self) -> None:
        """End its process, if it is ours. Idempotent."""

    def check(self) -> None:
        """Called before each batch of rollouts. Raises `PolicyServerLostError` if the server has died."""

    def restart(self) -> None:
        """Replace its process by another one at the same address; returns when that answers.

        Raises:
            PolicyServerError: It did not start, or is not ours. One that did not start may be tried again.
            ConfigError: It did not start, and would not if it were tried again.
        """

    def look(self) -> str | None:
        """Ask over the network who is there, for a few seconds.

        Returns:
            What differs from process to process; None when it does not say.

        Raises:
            PolicyServerError: Nobody answers, or somebody who does not serve the policy.
        """


class ServerState(StrEnum):
    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


class PolicyServer:
    """A vLLM OpenAI server with the on-policy middleware. Implements `PolicyBackend`.

    Args:
        model: Model folder or name.
        served_model_name: Name under which it is served.
        host: Address to listen on. One that other machines can reach demands `api_key`.
        port: Port to listen on; 0 lets the operating system choose.
        vllm_args: Flags of `vllm serve`, e.g. `{"max-model-len": 512, "tool-call-parser": "hermes"}`; see
            `command.flags_from`.
        env: Environment variables of the server, on top of ours.
        log_dir: Folder for the log of the server process.
        start_timeout_s: How long `wait_ready` waits.
        api_key: Bearer token that the server demands on every route but `/health`.
        devices: GPUs that it runs on, as for `CUDA_VISIBLE_DEVICES`, when it shall not share ours.

    Raises:
        ConfigError: If `vllm_args` cannot be turned into flags.
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
    ) -> None:
        self.model = model
        self.model_name = served_model_name
        self.placement: Placement = "colocate" if devices is None else "server"
        self._weight_transports: tuple[str, ...] | None = None
        self.keeps_records = True
        self.state = ServerState.NEW
        self.log_path: Path | None = None
        self._host, self._port = host, port
        self._flags = command.flags_from(vllm_args)
        self._env = dict(env or {}) | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
        self._log_dir = Path(log_dir)
        self._start_timeout_s = start_timeout_s
        self._api_key = api_key
        self._nonce = secrets.token_hex(16)
        self._process: ChildProcess | None = None  # None also for a server that we are attached to
        self._num_starts = 0
        self._client: PolicyClient | None = None
        self._info: dict[str, Any] = {}

    @classmethod
    def attach(cls, base_url: str, *, api_key: str | None = None, timeout_s: float = 240.0) -> PolicyServer:
        """Use a server that somebody else runs (`trl-gym serve` or `trl-gym gateway`); it is never stopped from here.

        Args:
            base_url: Its OpenAI base URL.
            api_key: Its API key, if it demands one.
            timeout_s: How long to wait for it to answer.

        That it continues sampled tokens exactly is checked where that matters, when a trainer starts
        (`splice_probe.check_splice`).

        Raises:
            PolicyServerError: If it does not answer in time or is not a trl-gym policy server; the message tells a
                wrong key, an OpenAI server without our middleware and something else apart.
        """
        server = cls(model="", api_key=api_key, start_timeout_s=timeout_s)
        server.placement = "server"
        server._client = PolicyClient(base_url, api_key=api_key)
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
            raise PolicyServerError(f"the policy server has not been started (state: {self.state})")
        return self._client

    @property
    def base_url(self) -> str:
        """`"http://127.0.0.1:PORT/v1"`, valid from `start` on. Raises `PolicyServerError` before."""
        return self.client.base_url

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together. Raises `PolicyServerError` before `wait_ready`."""
        self._demand("max_model_len", ServerState.READY)
        return self._info["max_model_len"]

    def start(self) -> PolicyServer:
        """Bind the port and start loading; returns at once.

        Raises:
            ConfigError: If the model folder, vLLM or the address cannot work; nothing is started then.
            PolicyServerError: If the port is taken.
        """
        self._demand("start", ServerState.NEW)
        command.check_before_start(self.model, self._host, self._api_key, self._flags, {**os.environ, **self._env})
        try:
            sock = bind_socket(self._host, self._port)
        except OSError as error:
            raise PolicyServerError(
                f"port {self._port} on {self._host} is in use, or the address is not this machine's "
                f"({error.strerror}); choose another or leave it at 0"
            ) from error
        with sock:
            self._port = sock.getsockname()[1]
            self._spawn(sock)
        self._client = PolicyClient(f"http://{_reachable(self._host)}:{self._port}/v1", api_key=self._api_key)
        self.state = ServerState.STARTING
        return self

    def wait_ready(self) -> PolicyServer:
        """Wait until our process answers.

        Raises:
            PolicyServerError: If it died, or did not answer in time (it is stopped then), with the cause from its log.
        """
        if self.state is ServerState.READY:
            return self
        self._demand("wait_ready", ServerState.STARTING)
        deadline = time.monotonic() + self._start_timeout_s
        try:
            self._info = self._await_info(deadline)
        except PolicyServerLostError as error:
            self.stop()
            raise PolicyServerError(str(error)) from error  # it was never there: nothing is lost
        except BaseException:
            self.stop()
            raise
        self.state = ServerState.READY
        return self

    @property
    def weight_transports(self) -> tuple[str, ...]:
        """Asked of the server, which may have been started by anybody and for anything. Valid from `wait_ready` on."""
        if self._weight_transports is None:
            config = self.client.server_config()
            backend = (config.get("weight_transfer_config") or {}).get("backend")
            adapter = ("adapter",) if config.get("lora_config") else ()
            self._weight_transports = (*filter(None, [backend]), *adapter)
        return self._weight_transports

    @property
    def is_ours(self) -> bool:
        """Whether its process was started here."""
        return self._process is not None

    def restart(self) -> None:
        """End what is left of our process and start another one on the same port; returns when it answers.

        The weights that it has are those of the model folder: send the current ones before anything is sampled.

        Raises:
            PolicyServerError: It could not be started, with the cause from its log, or is not ours, or was stopped.
            ConfigError: It died while it started, of something that another start does not change.
        """
        if self._process is None or self.state not in (ServerState.READY, ServerState.STARTING):
            raise PolicyServerError(f"this policy server cannot be restarted: it is {self.state}, or not ours")
        self._process.stop()
        self.client.close()  # its connections lead to the dead one
        self.state = ServerState.STARTING
        self._nonce = secrets.token_hex(16)
        with self._rebind() as sock:
            self._spawn(sock)
        try:
            self._info = self._await_info(time.monotonic() + self._start_timeout_s)
        except BaseException as error:
            self._process.stop()
            if isinstance(error, PolicyServerLostError) and would_die_again(self._process.log_path):
                raise ConfigError(str(error)) from error
            raise
        self.state = ServerState.READY

    def look(self) -> str | None:
        """See `PolicyBackend.look`; also raises when our own process has died."""
        self.check()
        info = self.client.patient(_LOOK_TIMEOUT_S).info()
        if self.model_name not in info.get("model_names", [self.model_name]):
            raise PolicyServerError(
                f"{self.client.base_url} serves {', '.join(info['model_names'])} now, and no {self.model_name}"
            )
        return info.get("instance")

    def check(self) -> None:
        """Raise `PolicyServerLostError` (cause, hint, exit code, last log lines, log path) if our process has died."""
        if self._process is None or self.state is ServerState.STOPPED or self._process.poll() is None:
            return
        raise PolicyServerLostError("\n\n".join(filter(None, [self._explanation(), self._process.describe_death()])))

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
            raise PolicyServerError(f"{what} needs a policy server that is {state}; this one is {self.state}")

    def _spawn(self, sock: socket.socket) -> None:
        """Start the process on a socket that listens already. A log of its own: the last one says why it died."""
        again = f"-restart{self._num_starts}" if self._num_starts else ""
        self._num_starts += 1
        self.log_path = self._log_dir / f"policy_server-{self._port}{again}.log"
        try:
            self._process = ChildProcess(
                "policy server",
                command.serve_command(
                    self.model,
                    host=self._host,
                    port=self._port,
                    listen_fd=sock.fileno(),
                    name=self.model_name,
                    flags=self._flags,
                ),
                log_path=self.log_path,
                # A key of the user's shell must not become the server's without our client knowing it.
                env={"VLLM_API_KEY": self._api_key, **self._env, ENV_NONCE: self._nonce},
                pass_fds=[sock.fileno()],
            )
        except OSError as error:
            raise PolicyServerError(
                f"The policy server's process cannot be started with the log {self.log_path}: {error}.",
                "Make room, or choose another folder for logs (`gym_log_dir`).",
            ) from error

    def _rebind(self) -> socket.socket:
        """Our port again. Connections that the dead server left behind do not hold it (`SO_REUSEADDR`); what is left
        of its processes does, for a moment."""
        deadline = time.monotonic() + _REBIND_TIMEOUT_S
        while True:
            try:
                return bind_socket(self._host, self._port)
            except OSError as error:
                if not wait_until(deadline):
                    raise PolicyServerError(
                        f"port {self._port} on {self._host}, on which the policy server ran, was taken by somebody "
                        f"else while it was down ({error.strerror}); NeMo Gym knows it under that port"
                    ) from error

    def _await_info(self, deadline: float) -> dict[str, Any]:
        """Poll `GET /trl_gym/info` until it answers; notice a dead process and a stranger at once."""
        while True:
            try:
                info = self.client.info(timeout_s=_PROBE_TIMEOUT_S)
            except PolicyServerError as error:
                self.check()
                refused = error if isinstance(error, PolicyResponseError) else None
                if self._process is None and refused is not None and refused.status in _FINAL_STATUSES:
                    raise PolicyServerError(splice_probe.explain_stranger(self.client, refused)) from error
                if not wait_until(deadline):
                    raise self._timed_out(error) from error
                continue
            if self._process is not None and info.get("nonce") != self._nonce:
                raise PolicyServerError(
                    f"{self.client.root_url} is answered by another server than the one we started"
                )
            return info

    def _timed_out(self, last: PolicyServerError) -> PolicyServerError:
        waited = f"the policy server at {self.client.base_url} was not ready after {self._start_timeout_s:g} s"
        if self._process is None:
            return PolicyServerError(f"{waited}. The last attempt: {last}")
        return PolicyServerError(
            f"{waited}; it was stopped. Last lines of its log:\n{self._process.log_tail()}\n\n"
            f"The whole log: {self.log_path}"
        )

    def _explanation(self) -> str:
        return explain(self.log_path) if self.log_path else ""


def _reachable(host: str) -> str:
    """The address under which we reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
