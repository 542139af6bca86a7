"""Sample from the very model that a trainer trains, between its steps.

                     ┌───────────── trainer's thread ─────────────┐
    step  ── unpark ──┤  rollouts run: the trainer waits for them  ├── park ── step
                     └──────────────────┬─────────────────────────┘
    event loop of the server:  generate, generate, …     held while parked or paused
                     │
    a thread of transformers:  one forward pass after another     a `Session`, begun by the first request

Nothing is copied: a step changes the weights that are sampled from. What must not happen is that anything outlives a
change of weights that was computed with the old ones, or that trainer and engine compute at once. So a session ends at
every park and pause. Requests that run then keep their tokens and, once the gate is open, go on in a new session as a
longer prompt: computed again, by the weights that are in the model then. A session may also end with an exception,
which transformers only logs: here every caller is told, and the engine is lost until it is given a model again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.transformers_engine.counters import EngineCounters
from trl_gym.policy_server.transformers_engine.session import (
    EngineOptions,
    Session,
    autocast_of,
    check_positions,
    free_memory,
    in_eval_mode,
    num_blocks,
    sampled_model,
)

logger = logging.getLogger(__name__)

PauseMode = Literal["wait", "abort", "keep"]
_LOOK_S = 1.0  # between two looks whether the thread that samples is alive
_ENDED = "The policy server of this process was stopped"  # also why an engine is lost
_GREEDY = 1e-5  # temperatures below are taken for zero, as vLLM does
_ALMOST_ZERO = 1e-6  # that of greedy sampling: scores that differ by more than float32's resolution are told apart


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """How one completion is sampled."""

    max_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # the likeliest tokens that have this probability together
    top_k: int = 0  # so many of the likeliest tokens; 0 for all
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def filters(self) -> frozenset[str]:
        """Return which tokens are left out by."""
        given = {"top_p": self.top_p < 1, "top_k": self.top_k > 0}
        return frozenset(name for name, is_set in given.items() if is_set)


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled."""

    ids: list[int]  # `[T]`
    logprobs: list[float]  # `[T]`, in nats, of the distribution that was sampled from: after temperature and filters
    finish_reason: Literal["stop", "length", "abort"]
    stop_id: int | None  # the token at which it stopped
    queue_s: float  # seconds until it was begun
    first_token_s: float  # seconds from there to the first token
    decode_s: float  # seconds from there to the last token


class EngineLostError(PolicyServerLostError):
    """The thread that samples has ended, or hangs; give the engine its model again."""


class UnknownTokenError(ValueError):
    """A prompt has a token that the model does not know."""


class ModelBusyError(PolicyServerError):
    """The trainer computes with the model."""


class Gate:
    """Something that is open or not, waited for in event loops and changed from any thread."""

    def __init__(self, *, is_open: bool) -> None:
        self._is_open = is_open
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    @property
    def is_open(self) -> bool:
        return self._is_open

    def open(self) -> None:
        """Open it, and let pass who waits."""
        with self._lock:
            self._is_open = True
            waiting, self._waiting = self._waiting, set()
        for loop, future in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_set, future)

    def close(self) -> None:
        self._is_open = False

    async def passed(self) -> None:
        """Return when it is open, or was for a moment."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._is_open:
                return
            entry = (loop, loop.create_future())
            self._waiting.add(entry)
        try:
            await entry[1]
        finally:
            with self._lock:
                self._waiting.discard(entry)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@dataclass(slots=True)
class _Job:
    """A request, over all sessions that it takes."""

    prompt: list[int]
    request: SamplingRequest
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    created: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first: float | None = None
    last: float | None = None
    aborted: bool = False

    def absorb(self, output: Any) -> None:
        """Take the tokens of a session."""
        self.ids += output.generated_tokens
        self.logprobs += output.logprobs
        if self.started is None and output.lifespan[0] >= 0:
            self.started = output.lifespan[0]
        if output.timestamps:
            self.first = output.timestamps[0] if self.first is None else self.first
            self.last = output.timestamps[-1]

    def finished(self, stop_ids: Collection[int]) -> Completion | None:
        """Return the completion if nothing is left to sample."""
        stopped = bool(self.ids) and self.ids[-1] in stop_ids
        is_full = len(self.ids) >= self.request.max_tokens
        if not (stopped or is_full or self.aborted):
            return None
        started = self.created if self.started is None else self.started
        first = started if self.first is None else self.first
        return Completion(
            ids=self.ids,
            logprobs=self.logprobs,
            finish_reason="stop" if stopped else "length" if is_full else "abort",
            stop_id=self.ids[-1] if stopped else None,
            queue_s=max(0.0, started - self.created),
            first_token_s=max(0.0, first - started),
            decode_s=max(0.0, (first if self.last is None else self.last) - first),
        )


class Engine:
    """Samples from a model that is trained elsewhere. Parked at first.

    Args:
        eos_token_ids: Tokens that end a completion, beside those of the model's generation config.

    Attributes:
        counters: What was done.
        weight_version: Of the weights in the model; whoever changes them sets it.
    """

    def __init__(self, options: EngineOptions, *, eos_token_ids: Collection[int] = ()) -> None:
        self.options = options
        self.counters = EngineCounters()
        self.weight_version = "default"
        self._given_eos = frozenset(eos_token_ids)
        self._eos = self._given_eos
        self._model: PreTrainedModel | None = None
        self._session: Session | None = None
        self._filters: frozenset[str] = frozenset()  # that a request has set: sessions have them from then on
        self._lost: str | None = None
        self._is_parked, self._is_lent, self._is_paused = True, False, False
        self._changing = threading.RLock()  # held from when sampling is stopped until it may begin again
        self._scored: int | None = None  # prompts that `prompt_logprobs` is done with; None where it does not run
        self._submitting = threading.Lock()  # held for moments: a request that has passed the gate is in the session
        self._gate = Gate(is_open=False)
        self._idle = Gate(is_open=True)
        self._jobs: set[str] = set()  # names of those in a session

    # -- the model ----------------------------------------------------------------------------------------------------

    def take(self, model: torch.nn.Module) -> None:
        """Sample from this model from now on. The engine is parked or not as before, and no longer lost.

        Args:
            model: The trainer's, wrapped or not.

        Raises:
            ConfigError: It cannot be sampled from in this process, or the context does not fit into memory.
        """
        taken = sampled_model(model)
        check_positions(taken.config, self.options.max_model_len)
        num_blocks(taken, self.options, free_memory(taken.device))
        with self._stopped():
            self._model, self._lost = taken, None
            eos = taken.generation_config.eos_token_id if taken.generation_config is not None else None
            own = () if eos is None else (eos,) if isinstance(eos, int) else eos
            self._eos = self._given_eos | frozenset(own)

    def unpark(self) -> None:
        """Let requests be sampled: the trainer leaves the model alone. Called from any thread."""
        with self._change():
            self._is_parked = False
            self._reopen()

    def park(self) -> None:
        """Give the model back, and return when it is an ordinary one again. Called from any thread.

        Attention, the mode (train or eval) of each submodule and the device's memory are as before. Requests that run
        are frozen and go on after `unpark`.
        """
        self._is_parked = True
        with self._stopped():
            pass

    def end(self) -> None:
        """Give the model back, and answer all requests that wait or run, and those that come, with an error."""
        self._lost = self._lost or _ENDED
        self.park()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Be unparked for a while."""
        self.unpark()
        try:
            yield
        finally:
            self.park()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let `prompt_logprobs` have the model for a while although the engine is parked: who has parked it does not
        compute meanwhile."""
        self._is_lent = True
        try:
            yield
        finally:
            with self._change():  # what is computed now ends first
                self._is_lent = False

    # -- pause --------------------------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode) -> None:
        """Sample nothing until `resume`; requests that come are held. Returns when nothing is sampled.

        Args:
            mode: What happens to requests that run: `"wait"` lets them end, `"abort"` ends them with the tokens that
                they have, `"keep"` freezes them: they go on with the weights of that time, and their keys and values
                are computed again.
        """
        self._is_paused = True
        if mode == "wait":
            self._gate.close()
            await self._idle.passed()
        await asyncio.to_thread(self.forget, abort=mode == "abort")
        await self._idle.passed()  # each request has taken its tokens, which are counted

    def resume(self) -> None:
        """Sample again, unless the engine is parked."""
        with self._change():
            self._is_paused = False
            self._reopen()

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    def forget(self, *, abort: bool = False) -> None:
        """Forget all keys and values. Requests that run go on afterwards, or with `abort` end as they are."""
        with self._stopped(abort=abort):
            pass

    @contextmanager
    def changing(self) -> Iterator[PreTrainedModel]:
        """Lend the model to who changes its weights; nothing is sampled meanwhile, and nothing of before is kept.
        Raises `EngineLostError`: there is no model yet."""
        with self._stopped():
            yield self._present()

    def _present(self) -> PreTrainedModel:
        if self._model is None:
            raise EngineLostError("The engine has no model yet.", "Wait until the trainer has loaded it.")
        return self._model

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Hold the model. Raises `PolicyServerError`: `prompt_logprobs` has it and hangs, for which looks are counted,
        since a process that was frozen as a whole makes none."""
        look_s, num_looks, before = min(_LOOK_S, self.options.hang_timeout_s), 0, self._scored
        while not self._changing.acquire(timeout=look_s):
            num_looks = num_looks + 1 if self._scored is not None and self._scored == before else 0
            before = self._scored
            if num_looks * look_s >= self.options.hang_timeout_s:
                raise PolicyServerError(
                    "A forward pass of `prompt_logprobs` hangs, and keeps the model: it has not ended for "
                    f"{self.options.hang_timeout_s:g} s (`gym_server_hang_timeout`).",
                    "End this process, and resume the run. Raise the option where one forward pass takes minutes.",
                )
        try:
            yield
        finally:
            self._changing.release()

    @contextmanager
    def _stopped(self, *, abort: bool = False) -> Iterator[None]:
        """Hold all requests, end the session, and let them go on afterwards where nothing else holds them."""
        with self._change():
            with self._submitting:
                self._gate.close()
                session, self._session = self._session, None
            if session is not None:
                session.aborting = abort
                session.stop()
            try:
                yield
            finally:
                self._reopen()

    def _reopen(self) -> None:
        if not (self._is_parked or self._is_paused or self._model is None):
            self._gate.open()
        elif self._lost is not None:
            self._gate.open()  # who waits is told

    # -- requests -----------------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], request: SamplingRequest) -> Completion:
        """Sample one completion; it is held while the engine is paused or parked. Cancelling it aborts it.

        Args:
            prompt_ids: `[T]`, T ≥ 1.
            request: How to sample. Prompt and `max_tokens` fit into `max_model_len` together.

        Raises:
            EngineLostError: The thread that samples has ended.
            PolicyServerError: transformers refused this request.
            UnknownTokenError: The model does not have one of the tokens.
        """
        job = _Job(list(prompt_ids), request)
        stop_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self._eos)
        while (completion := job.finished(stop_ids)) is None:
            self.counters.held += 1
            try:
                await self._gate.passed()
            finally:
                self.counters.held -= 1
            await self._sample(job, stop_ids)
        self.counters.add(len(job.prompt), completion)
        return completion

    async def _sample(self, job: _Job, stop_ids: frozenset[int]) -> None:
        """Sample in the session that there is, until the request or the session ends."""
        if self._session is not None and not job.request.filters <= self._session.filters:
            self._filters |= job.request.filters
            await asyncio.to_thread(self.forget)
            return
        with self._submitting:
            self.check()
            if not self._gate.is_open:
                return
            self._check_tokens(job.prompt)
            session = self._begun(job.request.filters)
            future = self._submit(session, job, stop_ids)
            self._enter(job)
        try:
            output = await self._answer(session, future)
        except BaseException as error:
            session.cancel(job.name)
            self.counters.aborted += isinstance(error, asyncio.CancelledError)
            raise
        finally:
            self._leave(job)
        if output is not None:
            job.absorb(output)
            self.counters.generation_tokens += len(output.generated_tokens)  # also of one that is aborted
        if session.stopping:
            job.aborted = session.aborting
        elif output is None or output.error is not None:
            if session.has_died:
                self._lose(session.cause if output is None else output.error)
            raise PolicyServerError(f"transformers could not sample a completion: {output and output.error}.")

    def _begun(self, filters: frozenset[str]) -> Session:
        """Return the session, which this request may be the first one of."""
        if self._session is None:
            self._filters |= filters
            self._session = Session(self._present(), self.options, self._filters)
        return self._session

    def _check_tokens(self, ids: Sequence[int]) -> None:
        """Check that tokens are of the vocabulary: any other would end the thread that samples."""
        size = self._present().get_input_embeddings().weight.shape[0]
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise UnknownTokenError(f"Token id {max(ids)} is out of vocabulary: the model has {size} tokens")

    def _submit(self, session: Session, job: _Job, stop_ids: frozenset[int]) -> asyncio.Future[Any]:
        request = job.request
        sampling: dict[str, float] = {"temperature": float(request.temperature)}
        if request.temperature < _GREEDY:
            sampling["temperature"] = _ALMOST_ZERO
        if "top_p" in session.filters:
            sampling["top_p"] = float(request.top_p)
        if "top_k" in session.filters:
            vocabulary = self._present().config.get_text_config().vocab_size
            sampling["top_k"] = min(request.top_k, vocabulary) or vocabulary
        return session.submit(
            job.name, job.prompt + job.ids, max_tokens=request.max_tokens - len(job.ids), stop_ids=stop_ids, **sampling
        )

    async def _answer(self, session: Session, future: asyncio.Future[Any]) -> Any:
        """Wait for a request, and look meanwhile whether anybody still samples."""
        while True:
            await asyncio.wait({future}, timeout=_LOOK_S)
            if future.done():
                return future.result()
            if session.has_died:
                self._lose(session.cause)

    def _enter(self, job: _Job) -> None:
        self._jobs.add(job.name)
        self.counters.running = len(self._jobs)
        self._idle.close()

    def _leave(self, job: _Job) -> None:
        self._jobs.discard(job.name)
        self.counters.running = len(self._jobs)
        if not self._jobs:
            self._idle.open()

    # -- its end ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `EngineLostError` if the thread that samples has ended, or hangs."""
        session = self._session
        if self._lost is None and session is not None and session.has_died:
            self._lost = session.cause
        if self._lost is _ENDED:
            raise EngineLostError(f"{_ENDED}.")
        if self._lost is not None:
            raise EngineLostError(
                f"The thread that samples from the model is lost: {self._lost}.",
                "Look at its traceback, which transformers has logged. Restarting the engine needs no other process.",
            )

    def _lose(self, cause: str) -> None:
        """Take note that the session is dead, and raise `EngineLostError`."""
        if self._lost is None:
            logger.error("the transformers engine is lost: %s", cause)
            self._lost = cause
        self.check()

    # -- log-probabilities of given tokens ----------------------------------------------------------------------------

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Compute log-probabilities of given sequences at temperature 1, also while the engine is paused. Blocks;
        called from any thread.

        Args:
            prompts: `[N][T_i]`, T_i ≥ 1.

        Returns:
            `[N][T_i - 1]`, from the second token on.

        Raises:
            EngineLostError: There is no model yet.
            ModelBusyError: The engine is parked, and the model is not `lent`.
            UnknownTokenError: The model does not have one of the tokens.
        """
        with self._stopped(), torch.no_grad():
            model = self._present()
            if self._is_parked and not self._is_lent:
                raise ModelBusyError(
                    "The engine is parked, and the trainer computes with its model.",
                    "Ask for prompt_logprobs during rollouts or a weight sync.",
                )
            for ids in prompts:
                self._check_tokens(ids)
            found: list[list[float]] = []
            try:
                with in_eval_mode(model), autocast_of(model, self.options.autocast):
                    for ids in prompts:
                        self._scored = len(found)
                        found.append(_logprobs(model, list(ids)))
            finally:
                self._scored = None
            return found


def _logprobs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None]).squeeze(1).tolist()
