"""Many requests → many results. The one place where the synchronous trainer meets asynchronous HTTP.

    trainer thread                       collector thread (one event loop, for the collector's whole life)
    ──────────────                       ─────────────────────────────────────────────────────────────────
    submit(requests) ────────────────►   one task per request, at most `max_inflight` past the gate
    future.result()                      each: POST /run, the policy server's records of its calls, then
                                         `finish(result)` in this thread
                     ◄────────────────   the values of `finish`, in the order of the requests
                                         beside them: every second, are the servers alive?

A rollout that fails is a result like any other. What ends a collection early is an exception: a server that died
(NeMo Gym would retry a refused connection for ever), an error in `finish`, or the trainer's thread giving up. In all
three cases every task of the collection is cancelled before the exception reaches the caller. NeMo Gym before 0.7 does
not notice that its client has left, so the policy server is told as well: of rollouts that missed their deadline at
once, of those of a collection that ends early together.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import aiohttp

from trl_gym.errors import FailureKind, PolicyServerError, RolloutFailure
from trl_gym.gym.client import GymAnswer, new_session, run_rollout
from trl_gym.gym.servers import AgentInfo
from trl_gym.policy_server.calls import CallRecord
from trl_gym.rollouts.call_records import RolloutLedger
from trl_gym.rollouts.requests import RolloutRequest

logger = logging.getLogger(__name__)

_CHECK_EVERY_S = 1.0
_GIVE_UP_TIMEOUT_S = 5.0  # for telling a policy server that may be the reason for giving up
_CLOSE_TIMEOUT_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutResult:
    """How one rollout ended.

    Attributes:
        request: What was asked.
        answer: Gym's answer; None when the rollout failed.
        failure: Why it failed; None when it did not.
        seconds: Wall time from dispatch (after the in-flight gate) to the end.
        records: The policy server's records of its model calls; None without a ledger.
    """

    request: RolloutRequest
    answer: dict[str, Any] | None
    failure: RolloutFailure | None
    seconds: float
    records: list[CallRecord] | None = None


class Progress(Protocol):
    """Called in the collector's thread whenever a rollout ends."""

    def __call__(self, num_done: int, num_failed: int, num_total: int) -> None: ...


class RolloutCollector(Generic[T]):
    """Runs rollouts on NeMo Gym agents.

    Args:
        agent: Address of an agent by name; raises for one that is unknown.
        deadline_s: Seconds that one rollout may take.
        max_inflight: Rollouts that run at the same time.
        check: Raises when a server that rollouts need has died; called about every second.
        ledger: Records and cancellation at the policy server; None for a server that has neither.
    """

    def __init__(
        self,
        agent: Callable[[str], AgentInfo],
        *,
        deadline_s: float,
        max_inflight: int,
        check: Callable[[], None] = lambda: None,
        ledger: RolloutLedger | None = None,
    ) -> None:
        self._agent = agent
        self._deadline_s = deadline_s
        self._max_inflight = max_inflight
        self._check = check
        self._ledger = ledger
        self._worker: _Worker | None = None
        self._finalizer: weakref.finalize | None = None

    def collect(
        self,
        requests: Sequence[RolloutRequest],
        finish: Callable[[RolloutResult], T],
        progress: Progress | None = None,
    ) -> list[T]:
        """Run all requests and wait. See `submit`."""
        future = self.submit(requests, finish, progress)
        try:
            return future.result()
        except BaseException:  # Ctrl-C arrives here, in the trainer's thread
            future.cancel()
            raise

    def submit(
        self,
        requests: Sequence[RolloutRequest],
        finish: Callable[[RolloutResult], T],
        progress: Progress | None = None,
    ) -> concurrent.futures.Future[list[T]]:
        """Start running all requests.

        Args:
            requests: What to run.
            finish: Called once per rollout, as it ends, in the collector's thread; its values are returned in the
                order of the requests. An exception in it ends the collection.
            progress: Told about every rollout that ends.

        Raises (from the future):
            ServerError: A server died, or the policy server refused to hand out its records.
        """
        if self._worker is None:
            self._worker = _Worker(self._max_inflight)
            # Also when nobody calls `close`: at the latest when the interpreter ends.
            self._finalizer = weakref.finalize(self, self._worker.close)
        session = self._worker.session
        return self._worker.start(lambda: self._collect(session, list(requests), finish, progress))

    def close(self) -> None:
        """Give up what still runs, close connections, end the thread. Idempotent; the collector can be used again."""
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None

    async def _collect(
        self,
        session: aiohttp.ClientSession,
        requests: list[RolloutRequest],
        finish: Callable[[RolloutResult], T],
        progress: Progress | None,
    ) -> list[T]:
        gate = asyncio.Semaphore(self._max_inflight)
        tally = _Tally(len(requests), progress)
        running: set[str] = set()

        async def one(request: RolloutRequest) -> T:
            async with gate:
                running.add(request.rollout_id)
                result = await self._run(session, request)
            result = await self._settle(session, result)
            running.discard(request.rollout_id)
            value = finish(result)
            tally.count(result)
            return value

        tasks = [asyncio.create_task(one(request)) for request in requests]
        watch = asyncio.create_task(self._watch())
        rollouts = asyncio.gather(*tasks)
        try:
            await asyncio.wait({rollouts, watch}, return_when=asyncio.FIRST_COMPLETED)
            return rollouts.result() if rollouts.done() else watch.result()
        finally:
            for task in (*tasks, watch):  # `gather` leaves the siblings of a task that raised running
                task.cancel()
            await asyncio.gather(*tasks, watch, rollouts, return_exceptions=True)
            if running:
                await self._give_up(session, sorted(running))

    async def _run(self, session: aiohttp.ClientSession, request: RolloutRequest) -> RolloutResult:
        started = time.monotonic()
        outcome = await run_rollout(session, self._agent(request.agent), request.row, deadline_s=self._deadline_s)
        seconds = time.monotonic() - started
        if isinstance(outcome, GymAnswer):
            return RolloutResult(request=request, answer=outcome.result, failure=None, seconds=seconds)
        return RolloutResult(request=request, answer=None, failure=outcome, seconds=seconds)

    async def _settle(self, session: aiohttp.ClientSession, result: RolloutResult) -> RolloutResult:
        """What is to be done at the policy server once a rollout has ended."""
        if self._ledger is None:
            return result
        rollout_id = result.request.rollout_id
        if result.failure is not None and result.failure.kind is FailureKind.DEADLINE:
            await self._ledger.cancel(session, [rollout_id])
        return dataclasses.replace(result, records=await self._ledger.take(session, rollout_id))

    async def _give_up(self, session: aiohttp.ClientSession, rollout_ids: list[str]) -> None:
        if self._ledger is None:
            return
        try:
            await self._ledger.cancel(session, rollout_ids, timeout_s=_GIVE_UP_TIMEOUT_S)
        except PolicyServerError as error:  # why the collection ended is already on its way to the caller
            logger.warning(
                "%d rollouts could not be cancelled at the policy server and may go on until they end by themselves: "
                "%s",
                len(rollout_ids),
                error,
            )

    async def _watch(self) -> Any:
        """Never returns; raises when a server is gone."""
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            await asyncio.to_thread(self._check)  # it may ask over the network


class _Worker:
    """An event loop in a thread, with one HTTP session and the collections that run on it."""

    def __init__(self, max_inflight: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trl-gym-collector", daemon=True)
        self._thread.start()
        self._collections: set[asyncio.Task[Any]] = set()
        self.session = self.run(_in_loop(new_session, max_inflight)).result()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def start(self, collection: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        return self.run(self._tracked(collection))

    def close(self) -> None:
        self.run(self._wind_up()).result(timeout=_CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        self._loop.close()

    async def _tracked(self, collection: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = asyncio.current_task()
        self._collections.add(task)
        try:
            return await collection()
        finally:
            self._collections.discard(task)

    async def _wind_up(self) -> None:
        """A collection that is given up still has to tell the policy server, over the session that is closed here."""
        collections = list(self._collections)
        for task in collections:
            if not task.cancelling():  # a second cancellation would interrupt the telling
                task.cancel()
        await asyncio.gather(*collections, return_exceptions=True)
        await self.session.close()


async def _in_loop(make: Callable[[int], aiohttp.ClientSession], max_inflight: int) -> aiohttp.ClientSession:
    return make(max_inflight)


class _Tally:
    def __init__(self, num_total: int, progress: Progress | None) -> None:
        self._num_total, self._progress = num_total, progress
        self._num_done = self._num_failed = 0

    def count(self, result: RolloutResult) -> None:
        self._num_done += 1
        self._num_failed += result.failure is not None
        if self._progress is not None:
            self._progress(self._num_done, self._num_failed, self._num_total)
