"""One server process that serves the policy: start it beside the trainer, or attach to one that runs elsewhere.

    with PolicyServer("runs/tiny_policy", vllm_args={"max-model-len": 512}) as server:
        server.client.chat(messages=[{"role": "user", "content": "Hello"}])

`start` returns at once with a `base_url` whose port is ours already, so that other servers can start meanwhile;
`wait_ready` returns when the process that we started answers with the nonce that we gave it. Nothing that was started
here outlives this process (`trl_gym.processes`), and nothing that was attached to is ever stopped.

    NEW ──start──► STARTING ──wait_ready──► READY
     └───────────────┴────────stop───────────┴──► STOPPED
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

from trl_gym.errors import PolicyServerError
from trl_gym.policy_server import command, diagnosis, splice_probe
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.entry import ENV_NONCE
from trl_gym.processes import ChildProcess, bind_socket, wait_until

_PROBE_TIMEOUT_S = 2.0  # while the model loads, requests queue at the socket: look at the process this often

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
    """

    base_url: str
    model_name: str
    placement: Placement
    weight_transports: tuple[str, ...]
    client: PolicyClient
    keeps_records: bool

    def check(self) -> None:
        """Called before each batch of rollouts. Raises `PolicyServerError` if the server has died."""


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
    ) -> None:
        self.model = model
        self.model_name = served_model_name
        self.placement: Placement = "colocate"
        self.weight_transports: tuple[str, ...] = ("file",)
        self.keeps_records = True
        self.state = ServerState.NEW
        self.log_path: Path | None = None
        self._host, self._port = host, port
        self._flags = command.flags_from(vllm_args)
        self._env = dict(env or {})
        self._log_dir = Path(log_dir)
        self._start_timeout_s = start_timeout_s
        self._api_key = api_key
        self._nonce = secrets.token_hex(16)
        self._process: ChildProcess | None = None  # None also for a server that we are attached to
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
        command.check_before_start(self.model, self._host, self._api_key, self._flags)
        try:
            sock = bind_socket(self._host, self._port)
        except OSError as error:
            raise PolicyServerError(
                f"port {self._port} on {self._host} is in use, or the address is not this machine's "
                f"({error.strerror}); choose another or leave it at 0"
            ) from error
        with sock:
            port = sock.getsockname()[1]
            self.log_path = self._log_dir / f"policy_server-{port}.log"
            self._process = ChildProcess(
                "policy server",
                command.serve_command(
                    self.model,
                    host=self._host,
                    port=port,
                    listen_fd=sock.fileno(),
                    name=self.model_name,
                    flags=self._flags,
                ),
                log_path=self.log_path,
                # A key of the user's shell must not become the server's without our client knowing it.
                env={"VLLM_API_KEY": self._api_key, **self._env, ENV_NONCE: self._nonce},
                pass_fds=[sock.fileno()],
            )
        self._client = PolicyClient(f"http://{_reachable(self._host)}:{port}/v1", api_key=self._api_key)
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
        except BaseException:
            self.stop()
            raise
        self.state = ServerState.READY
        return self

    def check(self) -> None:
        """Raise `PolicyServerError` (cause, hint, exit code, last log lines, log path) if our process has died."""
        if self._process is None or self.state is ServerState.STOPPED or self._process.poll() is None:
            return
        raise PolicyServerError("\n\n".join(filter(None, [self._explanation(), self._process.describe_death()])))

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

    def _await_info(self, deadline: float) -> dict[str, Any]:
        """Poll `GET /trl_gym/info` until it answers; notice a dead process and a stranger at once."""
        while True:
            try:
                info = self.client.info(timeout_s=_PROBE_TIMEOUT_S)
            except PolicyServerError as error:
                self.check()
                is_final = isinstance(error, PolicyResponseError) and error.status in _FINAL_STATUSES
                if self._process is None and is_final:
                    raise PolicyServerError(splice_probe.explain_stranger(self.client, error)) from error
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
        return diagnosis.explain(self.log_path) if self.log_path else ""


def _reachable(host: str) -> str:
    """The address under which we reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
