"""Load versions of a LoRA adapter into a vLLM server, choose the one that answers a call, and unload them.

    POST /trl_gym/adapters         {"name": "policy@12", "path": …, "version": "12", "max_adapters": 2, "wait_s": 60}
                                   checks, loads and makes it current: every rollout that begins afterwards uses it
    POST /trl_gym/adapters/clear   makes the server's own weights the policy again

A rollout keeps the version that was current at its first call; a call without a rollout uses the newest. The server's
own weights are a version like any other: a rollout that began before the first adapter goes on without one. A rollout
releases its adapter when its records are taken, when it is cancelled, or after an hour without a call.

Only vLLM's HTTP routes are used, in process: `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`, and
`/update_weight_version`, after which `/weight_info` reports the adapter's version.

A loaded adapter need not be in memory: vLLM may drop one that was not used lately and read its folder again; if the
folder is gone by then, the engine dies. Therefore an adapter is unloaded only when it is not current, held by no
rollout and answers no call, and the writer of its folder keeps the folder as long as the adapter is listed as held.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from trl_gym.policy_server.adapter_files import InvalidAdapterError, read_adapter
from trl_gym.policy_server.middleware.http import (
    AnsweredError,
    Message,
    Reply,
    Scope,
    Send,
    ServerInfo,
    WrappedServer,
    json_object,
)
from trl_gym.policy_server.middleware.turn import InvalidTurnError
from trl_gym.policy_server.middleware.versions import Sampled

_logger = logging.getLogger("trl_gym.adapters")

_MAX_ROLLOUTS = 16_384  # as many as have records (`ledger.RolloutBook`)
_FORGOTTEN_AFTER_S = 3600.0  # a rollout without calls for so long has lost its trainer
_LOOK_EVERY_S = 0.05  # while a new adapter waits for an old one to be released
_NAMED_HOLDERS = 3


@dataclass(slots=True)
class Adapter:
    """One loaded version of the policy's adapter."""

    name: str  # the trainer's name for it, e.g. `"policy@12"`
    # vLLM's name for it. It is always new: vLLM's prefix cache and cache of adapters go by names, and a resumed
    # trainer sends a version again.
    served: str
    version: str  # weight version, e.g. `"12"`
    path: str  # its folder; vLLM may read it again as long as the adapter is loaded
    num_rollouts: int = 0  # number of rollouts that hold it
    num_running: int = 0  # number of calls that it is answering

    def describe(self) -> dict[str, Any]:
        """Return it as JSON, for `/trl_gym/info`."""
        return {
            "name": self.name,
            "version": self.version,
            "path": self.path,
            "rollouts": self.num_rollouts,
            "running": self.num_running,
        }


@dataclass(slots=True)
class _Hold:
    adapter: Adapter | None
    last_call: float
    num_running: int = 0


class AdapterBook:
    """The loaded adapters and the rollouts that hold them: bookkeeping without I/O.

    Attributes:
        current: The newest; None as long as the server's own weights are the policy.
        held: All loaded adapters, oldest first.
    """

    def __init__(self) -> None:
        self.current: Adapter | None = None
        self.held: list[Adapter] = []
        self._holds: OrderedDict[str, _Hold] = OrderedDict()  # by rollout, in the order of their last calls

    def add(self, adapter: Adapter) -> None:
        """Make a loaded adapter current."""
        self.held.append(adapter)
        self.current = adapter

    def remove(self, adapter: Adapter) -> None:
        self.held.remove(adapter)

    def retire(self) -> None:
        """Make the server's own weights the policy; all rollouts release their adapters."""
        self.current = None
        self.release(list(self._holds))

    def idle(self) -> list[Adapter]:
        """Return the loaded adapters that are not in use."""
        current = self.current
        return [a for a in self.held if a is not current and not a.num_rollouts and not a.num_running]

    def release(self, rollouts: Sequence[str]) -> None:
        """Release the adapters of rollouts that have ended; their running calls keep theirs until answered."""
        for rollout in rollouts:
            hold = self._holds.pop(rollout, None)
            if hold is not None and hold.adapter is not None:
                hold.adapter.num_rollouts -= 1

    def expire(self, now: float) -> None:
        """Release rollouts without a call for an hour. `now` is in seconds, as in `serving`."""
        quiet = [
            rollout
            for rollout, hold in self._holds.items()
            if not hold.num_running and now - hold.last_call > _FORGOTTEN_AFTER_S
        ]
        self.release(quiet)

    def named(self, name: str) -> Adapter | None:
        """Return the newest loaded adapter of that name, as the trainer calls it; None if there is none."""
        return next((adapter for adapter in reversed(self.held) if adapter.name == name), None)

    @contextmanager
    def serving(self, rollout: str | None, now: float) -> Iterator[Adapter | None]:
        """Yield the adapter that answers a call to the policy, in use for so long; None: the server's own weights."""
        if rollout is None:
            newest = self.current
            with self.answering(newest):
                yield newest
            return
        hold = self._hold(rollout, now)
        hold.num_running += 1
        try:
            with self.answering(hold.adapter):
                yield hold.adapter
        finally:
            hold.num_running -= 1

    @contextmanager
    def answering(self, adapter: Adapter | None) -> Iterator[None]:
        """Keep this adapter loaded while it answers a call."""
        if adapter is None:
            yield
            return
        adapter.num_running += 1
        try:
            yield
        finally:
            adapter.num_running -= 1

    def holders(self, limit: int) -> dict[str, list[str]]:
        """Return name of each loaded adapter other than the current → up to `limit` rollouts that hold it."""
        holders: dict[str, list[str]] = {a.name: [] for a in self.held if a is not self.current}
        for rollout, hold in self._holds.items():
            if hold.adapter is not None and len(holders.get(hold.adapter.name, range(limit))) < limit:
                holders[hold.adapter.name].append(rollout)
        return holders

    def _hold(self, rollout: str, now: float) -> _Hold:
        hold = self._holds.get(rollout)
        if hold is None:
            hold = self._holds[rollout] = _Hold(self.current, now)
            if self.current is not None:
                self.current.num_rollouts += 1
            if len(self._holds) > _MAX_ROLLOUTS:
                self.release([next(iter(self._holds))])
        hold.last_call = now
        self._holds.move_to_end(rollout)
        return hold


class AdapterControl:
    """Load, choose and unload adapters.

    Args:
        server_info: Information about the wrapped server; notified when the version changes.

    Attributes:
        book: The loaded adapters and the rollouts that hold them.
    """

    def __init__(self, server_info: ServerInfo) -> None:
        self.book = AdapterBook()
        self._server_info = server_info
        self._changing = asyncio.Lock()
        self._own_version: str | None = None  # version of the server's own weights, while an adapter is the policy

    def describe(self) -> dict[str, Any]:
        """Return the part of `/trl_gym/info` about adapters."""
        current = self.book.current
        return {"current": current and current.name, "held": [adapter.describe() for adapter in self.book.held]}

    async def policy_names(self, server: WrappedServer) -> Sequence[str]:
        """Return the names under which the policy is served. Raises `AnsweredError`."""
        return (await self._server_info.all(server))["model_names"] if self.book.held else ()

    async def versions_of(
        self, adapter: Adapter | None, server: WrappedServer, sampled: Sampled
    ) -> tuple[str | None, str | None]:
        """Return the weight versions of the first and of the last token of a call. Raises `AnsweredError`."""
        if adapter is not None:
            return adapter.version, adapter.version
        if self.book.current is not None:
            return self._own_version, self._own_version
        return self._server_info.history.versions(sampled, await self._server_info.weight_version(server))

    @contextmanager
    def routed(self, model: Any, rollout: str | None, policy_names: Sequence[str]) -> Iterator[Adapter | None]:
        """Yield the adapter that answers a request, in use for so long; None: the server's own weights.

        Args:
            model: The request's model: the policy (or nothing), one of our adapters, or anything else.
            policy_names: Result of `policy_names`.
        """
        if not model or not self.book.held or model in policy_names:
            with self.book.serving(rollout, time.monotonic()) as adapter:
                yield adapter
            return
        adapter = self.book.named(model) if isinstance(model, str) else None
        with self.book.answering(adapter):
            yield adapter

    @contextmanager
    def rerouted(
        self, scope: Scope, body: bytes, send: Send, policy_names: Sequence[str]
    ) -> Iterator[tuple[Scope, bytes, Send]]:
        """Yield what to pass on instead of a request, so that the policy answers it."""
        request = (json_object(body) or {}) if self.book.held else {}
        with self.routed(request.get("model"), None, policy_names) as adapter:
            if adapter is None or not request:
                yield scope, body, send
                return
            asked = request.get("model") or policy_names[0]
            body = json.dumps({**request, "model": adapter.served}, separators=(",", ":")).encode()
            yield _with_length(scope, len(body)), body, _renaming(send, adapter.served, asked)

    async def load(self, server: WrappedServer, request: Mapping[str, Any]) -> Reply:
        """Load an adapter and make it current. Replies 400 if it cannot be served, 409 if there is no room for it."""
        name, path, version = (_text(request, key) for key in ("name", "path", "version"))
        max_adapters, wait_s = _number(request, "max_adapters", 2), _number(request, "wait_s", 0)
        server = on_its_own(server)
        async with self._changing:
            await self._make_room(server, name, max_adapters, wait_s)
            try:
                files = await asyncio.to_thread(read_adapter, path)
            except InvalidAdapterError as error:
                raise InvalidTurnError(f"the adapter {name} at {path} was not loaded: {error}") from error
            if self.book.current is None:
                self._own_version = await self._server_info.weight_version(server)
            adapter = Adapter(name, f"{name}#{secrets.token_hex(4)}", version, path)
            await self._load(server, adapter)
            self.book.add(adapter)
            await self._unload_idle(server)
        return Reply.from_json(200, {**self.describe(), "num_bytes": files.num_bytes})

    async def clear(self, server: WrappedServer, *, new_weights: bool = False) -> Reply:
        """Make the server's own weights the policy again and unload adapters.

        Args:
            new_weights: Whether these weights are new, so that their version is set already.
        """
        server = on_its_own(server)
        async with self._changing:
            was_adapted = self.book.current is not None
            self.book.retire()
            if was_adapted and not new_weights and self._own_version is not None:
                await server.ask_json("POST", "/update_weight_version", {"new_version": self._own_version})
                self._server_info.weights_changed()
            await self._unload_idle(server)
        return Reply.from_json(200, self.describe())

    async def release(self, server: WrappedServer, rollouts: Sequence[str]) -> None:
        """Release the adapters of rollouts that have ended; unload those that are not in use any more."""
        self.book.release(rollouts)
        if self.book.idle() and not self._changing.locked():  # the holder of the lock unloads at its end
            async with self._changing:
                await self._unload_idle(on_its_own(server))

    async def _make_room(self, server: WrappedServer, name: str, max_adapters: float, wait_s: float) -> None:
        """Wait until one more adapter may be loaded. Raises `AnsweredError`."""
        deadline = time.monotonic() + wait_s
        while len(self.book.held) >= max_adapters:
            self.book.expire(time.monotonic())
            await self._unload_idle(server)
            if len(self.book.held) < max_adapters:
                return
            if time.monotonic() >= deadline:
                raise AnsweredError(Reply.error(409, self._no_room(name, max_adapters)))
            await asyncio.sleep(_LOOK_EVERY_S)

    def _no_room(self, name: str, max_adapters: float) -> str:
        holders = "; ".join(
            f"{adapter} by {', '.join(rollouts) or 'calls without a rollout'}"
            for adapter, rollouts in self.book.holders(_NAMED_HOLDERS).items()
        )
        return (
            f"{name} was not loaded: {max_adapters:g} adapters are loaded (`gym_max_adapters`) and rollouts that have "
            f"not ended hold the older ones ({holders}). Raise `gym_max_adapters`, or end these rollouts "
            "(POST /trl_gym/rollouts/cancel)"
        )

    async def _load(self, server: WrappedServer, adapter: Adapter) -> None:
        """Load an adapter into the server and set its version; both or neither. Raises `AnsweredError`."""
        loading = {"lora_name": adapter.served, "lora_path": adapter.path}
        reply = await server.ask("POST", "/v1/load_lora_adapter", loading)
        if not reply.ok:
            raise AnsweredError(await _refusal(server, adapter, reply))
        reply = await server.ask("POST", "/update_weight_version", {"new_version": adapter.version})
        self._server_info.weights_changed()
        if not reply.ok:
            await self._unload(server, adapter)
            text = f"the server did not take the weight version {adapter.version!r}: {reply.error_text()}"
            raise AnsweredError(replace(Reply.error(500, text), status=max(reply.status, 500)))

    async def _unload_idle(self, server: WrappedServer) -> None:
        for adapter in self.book.idle():
            self.book.remove(adapter)
            await self._unload(server, adapter)

    async def _unload(self, server: WrappedServer, adapter: Adapter) -> None:
        reply = await server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.served})
        if not reply.ok:  # it will not be used; it costs a line in /v1/models
            _logger.warning("%s could not be unloaded: %s", adapter.name, reply.error_text())


async def _refusal(server: WrappedServer, adapter: Adapter, reply: Reply) -> Reply:
    """Make the reply after vLLM did not load an adapter: vLLM answers 500 for a wrong one and for its own death."""
    text = f"vLLM did not load {adapter.name} from {adapter.path}: {reply.error_text()}"
    if reply.status == 404 and b"lora" not in reply.body.lower():
        text = (
            f"{adapter.name} was not loaded: this server has no route for adapters. Start it with --enable-lora and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (`trl-gym serve --enable-lora` sets that)"
        )
        return Reply.error(400, text)
    is_alive = reply.status < 500 or (await server.ask("GET", "/health")).ok
    return Reply.error(400 if is_alive else 500, text)


def on_its_own(server: WrappedServer) -> WrappedServer:
    """Return the same server for a change that must not end half-way because the client hangs up."""
    return replace(server, receive=_never)


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def _with_length(scope: Scope, num_bytes: int) -> Scope:
    headers = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(num_bytes).encode())]}


def _renaming(send: Send, served: str, asked: str) -> Send:
    """Return a `send` that gives the model the client's name for it; the length changes, so it is left out."""
    old, new = json.dumps(served).encode(), json.dumps(asked).encode()

    async def renamed(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(key, value) for key, value in message["headers"] if key.lower() != b"content-length"]
            message = {**message, "headers": kept}
        elif message["type"] == "http.response.body":
            message = {**message, "body": message.get("body", b"").replace(old, new)}
        await send(message)

    return renamed


def _text(request: Mapping[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidTurnError(f"`{key}` must be a string that is not empty, not {value!r}")
    return value


def _number(request: Mapping[str, Any], key: str, default: float) -> float:
    value = request.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise InvalidTurnError(f"`{key}` must be a number of at least 0, not {value!r}")
    return value
