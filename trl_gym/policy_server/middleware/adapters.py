"""Versions of a LoRA adapter in a vLLM server: loaded, put into service, taken out again.

    POST /trl_gym/adapters         {"name": "policy@12", "path": …, "version": "12", "max_adapters": 2, "wait_s": 60}
                                   checked, loaded, current: every rollout that begins from here on gets it
    POST /trl_gym/adapters/clear   the server's own weights are the policy again

Only vLLM's HTTP surface is used, in process: `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`, and
`/update_weight_version`, by which `/weight_info` reports the adapter's version.

Loaded is not the same as in memory: vLLM may drop an adapter that it was not asked for lately and read its folder
again, and if the folder is gone then, the engine dies. Therefore an adapter is unloaded only when nobody uses it, and
whoever wrote its folder keeps that until it is not listed as held any more.
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
from trl_gym.policy_server.middleware.http import AnsweredError, Inner, Message, Reply, Scope, Send, ServerFacts
from trl_gym.policy_server.middleware.turn import InvalidTurnError

_logger = logging.getLogger("trl_gym.adapters")


# --------------------------------------------------------------------------------------------------------------------
# Which adapter answers a call: pure bookkeeping, no I/O.
#
# A rollout keeps the version that was current at its first call; a call without a rollout gets the newest. An adapter
# is in use as long as it is current, a rollout holds it, or it is answering a call; `idle` names those that are not.
#
#     a rollout lets go of its adapter when   its records are taken, it is cancelled,
#                                             or it has made no call for an hour (`expire`)
#
# The server's own weights are a version like any other: a rollout that began before the first adapter came goes on
# without one.

_MAX_ROLLOUTS = 16_384  # as many as have records (`calls.RolloutBook`)
_FORGOTTEN_AFTER_S = 3600.0  # whoever started such a rollout has gone without saying so


@dataclass(slots=True)
class Adapter:
    """One version of the policy's adapter, loaded.

    Attributes:
        name: As the trainer calls it, e.g. `"policy@12"`.
        served: As vLLM calls it; never used before, for vLLM's prefix cache and its memory of adapters go by names,
            and a trainer that is resumed sends a version once more.
        version: Weight version, e.g. `"12"`.
        path: Its folder; vLLM may read it again as long as the adapter is loaded.
        num_rollouts: Rollouts that hold it.
        num_running: Calls that it is answering.
    """

    name: str
    served: str
    version: str
    path: str
    num_rollouts: int = 0
    num_running: int = 0

    def describe(self) -> dict[str, Any]:
        """As JSON, for `/trl_gym/info`."""
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
    """The adapters that are loaded, and who holds which.

    Attributes:
        current: The newest; None as long as the server's own weights are the policy.
        held: All that are loaded, oldest first.
    """

    def __init__(self) -> None:
        self.current: Adapter | None = None
        self.held: list[Adapter] = []
        self._holds: OrderedDict[str, _Hold] = OrderedDict()  # by rollout, the one that was quiet longest first

    def add(self, adapter: Adapter) -> None:
        """It is loaded and answers from here on."""
        self.held.append(adapter)
        self.current = adapter

    def remove(self, adapter: Adapter) -> None:
        self.held.remove(adapter)

    def retire(self) -> None:
        """From here on the server's own weights are the policy; nobody holds anything."""
        self.current = None
        self.release(list(self._holds))

    def idle(self) -> list[Adapter]:
        """Loaded, and of no use to anybody."""
        used = self.current
        return [a for a in self.held if a is not used and not a.num_rollouts and not a.num_running]

    def release(self, rollouts: Sequence[str]) -> None:
        """These rollouts have ended. Calls of theirs that are running keep their adapter until they are answered."""
        for rollout in rollouts:
            hold = self._holds.pop(rollout, None)
            if hold is not None and hold.adapter is not None:
                hold.adapter.num_rollouts -= 1

    def expire(self, now: float) -> None:
        """Release rollouts that were quiet for an hour. `now` is in seconds, as in `serving`."""
        quiet = [
            rollout
            for rollout, hold in self._holds.items()
            if not hold.num_running and now - hold.last_call > _FORGOTTEN_AFTER_S
        ]
        self.release(quiet)

    def named(self, name: str) -> Adapter | None:
        """The newest adapter that the trainer calls so, if it is loaded."""
        return next((adapter for adapter in reversed(self.held) if adapter.name == name), None)

    @contextmanager
    def serving(self, rollout: str | None, now: float) -> Iterator[Adapter | None]:
        """While a call that names the policy is answered: by this adapter, or by the server's own weights if None."""
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
        """While a call is answered by this very adapter: it stays loaded for so long."""
        if adapter is None:
            yield
            return
        adapter.num_running += 1
        try:
            yield
        finally:
            adapter.num_running -= 1

    def holders(self, limit: int) -> dict[str, list[str]]:
        """Name of each adapter in use other than the current → up to `limit` rollouts that hold it."""
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


_LOOK_EVERY_S = 0.05  # while a new adapter waits for an old one to be let go of
_NAMED_HOLDERS = 3


class AdapterControl:
    """What the middleware knows and does about adapters.

    Args:
        facts: About the server behind; told when the version changes.

    Attributes:
        book: Who holds which.
    """

    def __init__(self, facts: ServerFacts) -> None:
        self.book = AdapterBook()
        self._facts = facts
        self._changing = asyncio.Lock()
        self._own_version: str | None = None  # of the server's own weights, while an adapter is the policy

    def describe(self) -> dict[str, Any]:
        """For `/trl_gym/info`."""
        current = self.book.current
        return {"current": current and current.name, "held": [adapter.describe() for adapter in self.book.held]}

    async def policy_names(self, inner: Inner) -> Sequence[str]:
        """Names under which the policy is served. Raises `AnsweredError`."""
        return (await self._facts.all(inner))["model_names"] if self.book.held else ()

    async def version_of(self, adapter: Adapter | None, inner: Inner) -> str | None:
        """Weight version of what answered a call. Raises `AnsweredError`."""
        if adapter is not None:
            return adapter.version
        return await self._facts.weight_version(inner) if self.book.current is None else self._own_version

    @contextmanager
    def routed(self, model: Any, rollout: str | None, policy_names: Sequence[str]) -> Iterator[Adapter | None]:
        """While a request is answered: the adapter that answers it, or None for the server's own weights.

        Args:
            model: What the request names: the policy (or nothing), one of our adapters, or anything else.
            rollout: Whose call it is.
            policy_names: As from `policy_names`.
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
        """While a request is passed on as it is: what to pass on instead, so that the policy answers it."""
        request = _as_object(body) if self.book.held else {}
        with self.routed(request.get("model"), None, policy_names) as adapter:
            if adapter is None or not request:
                yield scope, body, send
                return
            asked = request.get("model") or policy_names[0]
            body = json.dumps({**request, "model": adapter.served}, separators=(",", ":")).encode()
            yield _with_length(scope, len(body)), body, _renaming(send, adapter.served, asked)

    async def load(self, inner: Inner, request: Mapping[str, Any]) -> Reply:
        """Load an adapter and make it current. 400 if it cannot be served, 409 if there is no room for it."""
        name, path, version = (_text(request, key) for key in ("name", "path", "version"))
        max_adapters, wait_s = _number(request, "max_adapters", 2), _number(request, "wait_s", 0)
        inner = _on_its_own(inner)
        async with self._changing:
            await self._make_room(inner, name, max_adapters, wait_s)
            try:
                files = await asyncio.to_thread(read_adapter, path)
            except InvalidAdapterError as error:
                raise InvalidTurnError(f"the adapter {name} at {path} was not loaded: {error}") from error
            if self.book.current is None:
                self._own_version = await self._facts.weight_version(inner)
            adapter = Adapter(name, f"{name}#{secrets.token_hex(4)}", version, path)
            await self._load(inner, adapter)
            self.book.add(adapter)
            await self._unload_idle(inner)
        return Reply.from_json(200, {**self.describe(), "num_bytes": files.num_bytes})

    async def clear(self, inner: Inner, *, new_weights: bool = False) -> Reply:
        """The server's own weights are the policy again; adapters are unloaded.

        Args:
            inner: The server.
            new_weights: Whether these are not the ones that the adapters came to, and have brought their version.
        """
        inner = _on_its_own(inner)
        async with self._changing:
            was_adapted = self.book.current is not None
            self.book.retire()
            if was_adapted and not new_weights and self._own_version is not None:
                await inner.ask_json("POST", "/update_weight_version", {"new_version": self._own_version})
                self._facts.weights_changed()
            await self._unload_idle(inner)
        return Reply.from_json(200, self.describe())

    async def release(self, inner: Inner, rollouts: Sequence[str]) -> None:
        """These rollouts have ended; what only they held is unloaded."""
        self.book.release(rollouts)
        if self.book.idle() and not self._changing.locked():  # who has it locked unloads at its end
            async with self._changing:
                await self._unload_idle(_on_its_own(inner))

    async def _make_room(self, inner: Inner, name: str, max_adapters: float, wait_s: float) -> None:
        """Wait until one more adapter may be loaded. Raises `AnsweredError`."""
        deadline = time.monotonic() + wait_s
        while len(self.book.held) >= max_adapters:
            self.book.expire(time.monotonic())
            await self._unload_idle(inner)
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

    async def _load(self, inner: Inner, adapter: Adapter) -> None:
        """Into the server, and its version; both or neither. Raises `AnsweredError`."""
        loading = {"lora_name": adapter.served, "lora_path": adapter.path}
        reply = await inner.ask("POST", "/v1/load_lora_adapter", loading)
        if not reply.ok:
            raise AnsweredError(await _refusal(inner, adapter, reply))
        reply = await inner.ask("POST", "/update_weight_version", {"new_version": adapter.version})
        self._facts.weights_changed()
        if not reply.ok:
            await self._unload(inner, adapter)
            text = f"the server did not take the weight version {adapter.version!r}: {reply.error_text()}"
            raise AnsweredError(replace(Reply.error(500, text), status=max(reply.status, 500)))

    async def _unload_idle(self, inner: Inner) -> None:
        for adapter in self.book.idle():
            self.book.remove(adapter)
            await self._unload(inner, adapter)

    async def _unload(self, inner: Inner, adapter: Adapter) -> None:
        reply = await inner.ask("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.served})
        if not reply.ok:  # nobody will ask for it; what it takes is a line in /v1/models
            _logger.warning("%s could not be unloaded: %s", adapter.name, reply.error_text())


async def _refusal(inner: Inner, adapter: Adapter, reply: Reply) -> Reply:
    """What to answer when vLLM did not load an adapter: it says 500 for one that is wrong, and for its own death."""
    text = f"vLLM did not load {adapter.name} from {adapter.path}: {reply.error_text()}"
    if reply.status == 404 and b"lora" not in reply.body.lower():
        text = (
            f"{adapter.name} was not loaded: this server has no route for adapters. Start it with --enable-lora and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (`trl-gym serve --enable-lora` sets that)"
        )
        return Reply.error(400, text)
    is_alive = reply.status < 500 or (await inner.ask("GET", "/health")).ok
    return Reply.error(400 if is_alive else 500, text)


def _on_its_own(inner: Inner) -> Inner:
    """The same application, for a change that must not end half-way because a client hangs up."""
    return replace(inner, receive=_never)


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def _as_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; empty if it is none, for which the server has its own words."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _with_length(scope: Scope, num_bytes: int) -> Scope:
    headers = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(num_bytes).encode())]}


def _renaming(send: Send, served: str, asked: str) -> Send:
    """A `send` that calls the model what the client called it. The length changes with it, so none is announced."""
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
