"""A policy server in the trainer's own process: its model, continuous batching, and a thread that answers HTTP.

    NEW ──start──► STARTING ──take_model, wait_ready──► READY ──stop──► STOPPED
                      │                                   │
                      the port is ours, callers queue     restart: engine, application and thread are replaced

Servers start before the trainer loads its model, so that the model comes later (`take_model`). From then on a thread
runs an event loop with uvicorn, which answers as vLLM does (`app.py`) behind the middleware of every policy server.
That loop is the one place where asynchronous code runs; the trainer's thread asks it over HTTP, like every client. The
engine samples in a thread of its own.

Trainer and engine take turns on one model: inside `sampling` the model can be sampled from and not trained, outside it
is an ordinary one, and calls wait. Each rank has a server with its own copy of the model; `join` makes one policy of
them, which rank 0 controls and NeMo Gym gets the list of.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import uvicorn

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.command import new_key
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.parsers import Parsers
from trl_gym.policy_server.transformers_engine.answers import Choice, reader_of
from trl_gym.policy_server.transformers_engine.app import EngineApp
from trl_gym.policy_server.transformers_engine.engine import Engine
from trl_gym.policy_server.transformers_engine.rendering import ChatRenderer
from trl_gym.policy_server.transformers_engine.session import EngineOptions, sampled_model, turn_ends
from trl_gym.processes import ServerState, bind_socket, wait_until

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HOST = "127.0.0.1"
_PROBE_TIMEOUT_S = 2.0
_STOP_TIMEOUT_S = 10.0  # for the thread to end once it is told to


class TransformersServer:
    """Serves a model that is trained in this process. Implements `PolicyBackend`.

    Args:
        port: Port to listen on; 0 lets the operating system choose. A NeMo Gym that runs already must know it.
        max_model_len: Tokens of prompt and completion together; by default what the model was made for.
        max_concurrency: Calls that are sampled at the same time; others queue.
        reader: What reads tool calls and thinking out of answers; by default guessed from model and tokenizer.
        api_key: Bearer token that it demands on every route but `/health`; a random one unless given. Ranks that
            `join` need the same.
        start_timeout_s: How long `wait_ready` and `restart` wait.
        hang_timeout_s: How long a forward pass may take; a thread that takes longer counts as dead.
    """

    weight_transports = ("shared",)
    is_ours = True

    def __init__(
        self,
        *,
        model_name: str = "policy",
        port: int = 0,
        max_model_len: int | None = None,
        max_concurrency: int = 256,
        reader: Choice | None = None,
        api_key: str | None = None,
        start_timeout_s: float = 60.0,
        hang_timeout_s: float = 300.0,
    ) -> None:
        self.model_name = model_name
        self.state = ServerState.NEW
        self._port = port
        self._max_model_len, self._max_concurrency = max_model_len, max_concurrency
        self._reader = reader
        self._api_key = api_key or new_key()
        self._start_timeout_s, self._hang_timeout_s = start_timeout_s, hang_timeout_s
        self._model: torch.nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._autocast: torch.dtype | None = None
        self._socket: socket.socket | None = None
        self._client: PolicyClient | None = None
        self._engine: Engine | None = None
        self._listener: _Listener | None = None
        self._forgotten: weakref.finalize[Any, Any] | None = None
        self._nonce = ""
        self._samples = False
        self._lost: PolicyServerLostError | None = None  # what another rank has lost

    @property
    def client(self) -> PolicyClient:
        """Control plane, of all servers that were joined. Raises `PolicyServerError` before `start`."""
        if self._client is None:
            raise PolicyServerError(f"The policy server is {self.state}.", "Call `start` first.")
        return self._client

    @property
    def base_urls(self) -> tuple[str, ...]:
        """OpenAI base URLs, valid from `start` on; of all servers that were joined."""
        return self.client.base_urls

    @property
    def parsers(self) -> Parsers | None:
        """What reads tool calls and thinking, if it was given."""
        return None if self._reader is None else self._reader.parsers

    @property
    def own_url(self) -> str:
        """The base URL of this one."""
        return f"http://{_HOST}:{self._port}/v1"

    def start(self) -> TransformersServer:
        """Bind a port of this machine, at which callers queue until there is a model; returns at once."""
        if self.state is not ServerState.NEW:
            raise PolicyServerError(f"`start` needs a policy server that is new; this one is {self.state}.")
        self._socket = self._bind()
        self._client = PolicyClient(self.own_url, api_key=self._api_key)
        self.state = ServerState.STARTING
        return self

    def join(self, base_urls: Sequence[str]) -> None:
        """Use the servers of all ranks as one policy, before `wait_ready`.

        Args:
            base_urls: Their `own_url`, by rank.
        """
        self._client = PolicyClient(base_urls, api_key=self._api_key)

    def take_model(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, autocast: torch.dtype | None = None
    ) -> None:
        """Serve this model, which stays the trainer's: nothing is copied.

        Args:
            model: As it is trained, wrapped by DDP, PEFT or accelerate, or not.
            tokenizer: The policy's, with its chat template.
            autocast: Precision of the trainer's forward pass where it is not that of the weights.

        Raises:
            ConfigError: It cannot be sampled from in this process, see `Engine.take`; the tokenizer renders no chats.
        """
        if self.state is not ServerState.STARTING:
            raise PolicyServerError(f"`take_model` needs a policy server that starts; this one is {self.state}.")
        if not tokenizer.chat_template:
            raise ConfigError(
                "The policy's tokenizer has no chat template, by which the engine 'transformers' renders chats.",
                "Save the model's folder with its tokenizer, or set `chat_template` of the tokenizer that you pass.",
            )
        self._model, self._tokenizer, self._autocast = model, tokenizer, autocast
        self._serve()

    def wait_ready(self) -> TransformersServer:
        """Wait until the servers of all ranks answer. Raises `PolicyServerError`: one does not, or there is no model
        yet."""
        if self.state is ServerState.READY:
            return self
        if self._listener is None:
            raise PolicyServerError("The policy server has no model yet.", "Call `take_model` first.")
        self._await_answers()
        self.state = ServerState.READY
        return self

    def check(self) -> None:
        """Raise `PolicyServerLostError` if this rank's engine or server has ended, or another rank's has, as was noted
        with `note_loss`."""
        if self._lost is not None:
            raise self._lost
        if self.state is ServerState.STOPPED or self._engine is None or self._listener is None:
            return
        self._engine.check()
        self._listener.check()

    def note_loss(self, loss: PolicyServerLostError | None) -> None:
        """Make `check` raise what another rank's has raised, until `restart`."""
        self._lost = loss

    def restart(self) -> None:
        """Replace this rank's engine, application and thread, at the same address, with the same model: its weights
        are the trainer's own. Raises `PolicyServerError`: it does not answer, or was stopped."""
        if self._model is None or self.state is ServerState.STOPPED:
            raise PolicyServerError(f"The policy server at {self.own_url} cannot be restarted: it is {self.state}.")
        self._end()
        self.client.close()  # its connections lead to the old thread
        self._lost = None
        self._socket = self._bind()
        self._serve()
        self._await_info(PolicyClient(self.own_url, api_key=self._api_key), time.monotonic() + self._start_timeout_s)

    def stop(self) -> None:
        """End the threads; the model is an ordinary one afterwards. Idempotent."""
        self.state = ServerState.STOPPED
        self._end()
        if self._client is not None:
            self._client.close()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample while open. Whatever happens, the model can be trained afterwards, in the mode (train or eval) in
        which it was."""
        self._wake()
        try:
            yield
        finally:
            self._rest()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Let the model be an ordinary one while open, also inside of `sampling`, which goes on afterwards whatever
        happens. The server may be asked for `prompt_logprobs`, which must not be when this process computes."""
        samples = self._samples
        self._rest()
        try:
            with contextlib.nullcontext() if self._engine is None else self._engine.lent():
                yield
        finally:
            if samples:
                self._wake()

    def __enter__(self) -> TransformersServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wake(self) -> None:
        self._samples = True
        if self._engine is not None:
            self._engine.unpark()

    def _rest(self) -> None:
        self._samples = False
        if self._engine is not None:
            self._engine.park()

    def _bind(self) -> socket.socket:
        """Listen. What the last one has left of its connections does not hold the port."""
        try:
            sock = bind_socket(_HOST, self._port)
        except OSError as error:
            raise PolicyServerError(
                f"Port {self._port} on {_HOST}, for the policy server of a training process, is in use "
                f"({error.strerror}).",
                "Choose another port, or leave it at 0.",
            ) from error
        self._port = sock.getsockname()[1]
        return sock

    def _serve(self) -> None:
        assert self._model is not None and self._tokenizer is not None and self._socket is not None, "take a model"
        sampled = sampled_model(self._model)
        options = EngineOptions(
            max_model_len=self._max_model_len or _context_of(sampled),
            max_concurrency=self._max_concurrency,
            autocast=self._autocast,
            hang_timeout_s=self._hang_timeout_s,
        )
        self._engine = Engine(options, eos_token_ids=turn_ends(sampled, self._tokenizer))
        self._engine.take(self._model)
        if self._samples:
            self._engine.unpark()
        self._nonce = secrets.token_hex(16)
        reader = self._reader or reader_of(sampled.config, self._tokenizer)
        renderer = ChatRenderer(self._tokenizer, response_template=reader.template)
        settings = Settings(nonce=self._nonce, api_keys=(self._api_key,), weight_transports=self.weight_transports)
        app = OnPolicyMiddleware(EngineApp(self._engine, renderer, model_name=self.model_name), settings)
        self._listener = _Listener(app, self._socket)
        # Without a reference to this object: threads of one that is forgotten would keep the model.
        self._forgotten = weakref.finalize(self, _end_aside, self._engine, self._listener, self._socket)
        self._forgotten.atexit = False

    def _end(self) -> None:
        """Give the model back, answer the calls that wait with an error, and end the thread. Idempotent."""
        engine, listener, self._engine, self._listener = self._engine, self._listener, None, None
        if self._forgotten is not None:
            self._forgotten.detach()
        _end_all(engine, listener, self._socket)

    def _await_answers(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        for client in self.client.singly():
            info = self._await_info(client, deadline)
            if client.base_url == self.own_url and info.get("nonce") != self._nonce:
                raise PolicyServerError(f"{client.root_url} is answered by another server than the one we started.")

    def _await_info(self, client: PolicyClient, deadline: float) -> dict[str, Any]:
        while True:
            try:
                return client.info(timeout_s=_PROBE_TIMEOUT_S)
            except PolicyServerError as error:
                self.check()
                if not wait_until(deadline):
                    raise PolicyServerError(
                        f"The policy server at {client.base_url}, in a training process, was not ready after "
                        f"{self._start_timeout_s:g} s. The last attempt: {error}",
                        "Raise `gym_server_start_timeout` if that process was busy.",
                    ) from error


def _end_all(engine: Engine | None, listener: _Listener | None, sock: socket.socket | None) -> None:
    try:
        if engine is not None:
            engine.end()
    finally:
        if listener is not None:
            listener.stop()
        if sock is not None:
            sock.close()


def _end_aside(*parts: Any) -> None:
    """In a thread of its own: the one that collects garbage may be one of those that end."""
    threading.Thread(target=_end_all, args=parts, name="trl-gym: end policy server", daemon=True).start()


class _Listener:
    """A thread that answers HTTP at a socket until `stop`.

    Args:
        sock: Bound and listening; callers may queue at it already.
    """

    def __init__(self, app: OnPolicyMiddleware, sock: socket.socket) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, lifespan="off", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1
            )
        )
        # A daemon: a script that ends without `close` does not hang. Signals stay with the main thread.
        self._thread = threading.Thread(
            target=lambda: self._server.run(sockets=[sock]), name="trl-gym policy server", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise `PolicyServerLostError` if the thread has ended."""
        if not self._thread.is_alive():
            raise PolicyServerLostError("The thread of this process that serves the policy has ended.")

    def stop(self) -> None:
        """End the thread, and wait for that."""
        self._server.should_exit = True
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(_STOP_TIMEOUT_S)


def _context_of(model: PreTrainedModel) -> int:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ConfigError(
            "`vllm_max_model_length` is not set, and the model does not say for how many tokens it was made.",
            "Set it to the tokens of the longest conversation, its prompt included.",
        )
    return int(length)
