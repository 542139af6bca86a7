"""Many requests → many results: the one place where the synchronous trainer meets asynchronous HTTP.

trainer thread                       collector thread (one event loop, for the collector's whole life)
──────────────                       ─────────────────────────────────────────────────────────────────
submit(requests) ────────────────►   a `Collection`: one task per request, a watch beside them
interrupt(places) ───────────────►   the tasks of some of them end
future.result()                      `finish` and `progress` are called here
                 ◄────────────────   the values of `finish`, in the order of the requests
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Generic, Literal, TypeVar

import aiohttp

from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.gym.client import new_session
from trl_gym.gym.discovery import AgentInfo
from trl_gym.rollouts.admission import Admission, Budgets
from trl_gym.rollouts.attempts import Collection, Ended, Progress, Pulses, RolloutResult
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.request import PolicyAccess, RolloutRequest

__all__ = ["Ended", "Progress", "RolloutCollector", "RolloutResult", "Submission"]

_CLOSE_TIMEOUT_S = 30.0  # guards against a hang: on a busy machine it takes seconds to tell the servers

T = TypeVar("T", bound=Ended)
R = TypeVar("R")


@dataclass(eq=False)
class RolloutCollector(Generic[T]):
    """Runs rollouts on NeMo Gym agents, with these servers and within these limits."""

    agent: Callable[[str], AgentInfo]  # finds the address of an agent by name; raises for one that is unknown
    _: KW_ONLY
    budgets: Budgets  # deadlines, caps, rates and retries
    # Raises when rollouts cannot go on at all: the policy server, or the whole Gym, has ended. Called about every
    # second by each collection that runs, in threads.
    check: Callable[[], None] = lambda: None
    # Returns agents that cannot run rollouts now, by name, with the reason, given a counter of the collection's; see
    # `GymServers.agents_down`. Called as often as `check`.
    agents_down: Callable[[Counter[str]], Mapping[str, str]] = lambda refused: {}
    # "fail" ends a collection with outstanding rollouts of such an agent; "skip" makes these fail at once.
    on_environment_down: Literal["fail", "skip"] = "fail"
    gym_log: Callable[[], str] = str  # returns the end of the Gym's log, for messages
    ledger: Ledger | None = None  # records and cancellation at the policy server; None for a server that has neither
    # Makes the keys with which agents call the policy as their rollout; None for a server that has no such keys.
    access: PolicyAccess | None = None
    stall_timeout_s: float = 60.0  # seconds without a rollout that ends, after which all outstanding ones are listed
    gym: Pulses | None = None  # asked whether it hangs; nobody notices that without it
    _worker: _Worker | None = field(default=None, init=False)
    _finalizer: weakref.finalize[..., Any] | None = field(default=None, init=False)

    def collect(
        self,
        requests: Sequence[RolloutRequest],
        finish: Callable[[RolloutResult], T],
        progress: Progress | None = None,
    ) -> list[T]:
        """Run all requests and wait. See `submit`."""
        future = self.submit(requests, finish, progress).future
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
    ) -> Submission[T]:
        """Start running all requests, beside those that run already.

        Args:
            requests: The rollouts to run.
            finish: Called in the collector's thread once per attempt, as it ends. Its value says whether the rollout
                failed (also for reasons that only `finish` sees); if it did and `retried_kinds` of the result has
                that kind, the rollout is run again and the value dropped. The values of the last attempts are
                returned in the order of the requests. An exception in it ends the collection.
            progress: Gets the state of the collection.

        Raises (from the future):
            PolicyServerLostError: The policy server died, or cannot be reached.
            PolicyServerError: It refused to hand out its records.
            GymServerLostError: NeMo Gym died or hangs, or an environment is down and may not be skipped.
        """
        if self._worker is None:
            self._worker = _Worker(self.budgets)
            # Also when nobody calls `close`: at the latest when the interpreter ends.
            self._finalizer = weakref.finalize(self, self._worker.close)
        worker = self._worker
        collection = Collection(self, worker.session, worker.admission, requests, finish, progress)
        return Submission(worker, collection, requests, worker.start(collection))

    def close(self) -> None:
        """Give up what still runs, close connections, end the thread. Idempotent; the collector can be used again."""
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None


class Submission(Generic[T]):
    """A collection that was started; see `RolloutCollector.submit`.

    Attributes:
        future: Gets the values of `finish`, in the order of the requests.
    """

    def __init__(
        self,
        worker: _Worker,
        collection: Collection[T],
        requests: Sequence[RolloutRequest],
        future: concurrent.futures.Future[list[T]],
    ) -> None:
        self._worker, self._collection = worker, collection
        self._agents = [request.agent for request in requests]
        self.future = future

    def interrupt(self, places: Iterable[int], why: str) -> None:
        """End some rollouts; the others go on. Returns at once; callable in any thread, also from `finish`.

        One that waits, pauses or runs ends as a failure of kind `cancelled`, with the records of the model calls that
        it has made; the policy server refuses further ones. One that has ended, or whose records are being fetched,
        ends as it would. No attempt follows.

        Args:
            places: Indices of their requests.

        Raises:
            IndexError: There is no such request.
        """
        failures = {
            place: RolloutFailure(kind=FailureKind.CANCELLED, text=why, where=f"{self._agents[place]} /run")
            for place in places
        }
        self._worker.call(self._collection.end_early, failures)

    def cancel(self) -> None:
        """Give the collection up. When this returns, what ran has been recorded as cancelled, the policy server was
        told, and `finish` is not called any more. Idempotent. Raises `TimeoutError`: that took longer than 10 s."""
        self.future.cancel()
        self._worker.wait_for(self._collection)


class _Worker:
    """An event loop in a thread, with one HTTP session, one admission and the collections that run on it."""

    def __init__(self, budgets: Budgets) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trl-gym-collector", daemon=True)
        self._thread.start()
        self._running: dict[Collection[Any], asyncio.Task[Any]] = {}
        self.admission = Admission(budgets)
        self.session = self.run(_new_session(budgets.max_inflight)).result()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def start(self, collection: Collection[T]) -> concurrent.futures.Future[list[T]]:
        return self.run(self._tracked(collection))

    def call(self, function: Callable[[R], None], argument: R) -> None:
        """Call a function in the worker's thread, after what was started before; never once the worker has ended."""
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def wait_for(self, collection: Collection[Any]) -> None:
        """Wait, in another thread, until a collection that was given up has ended."""
        assert threading.current_thread() is not self._thread, "`finish` would wait for itself"
        ended = self._ended(collection)
        try:
            future = self.run(ended)
        except RuntimeError:
            ended.close()
            if not self._loop.is_closed():
                raise
        else:
            future.result(timeout=_CLOSE_TIMEOUT_S)

    def close(self) -> None:
        self.run(self._wind_up()).result(timeout=_CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        self._loop.close()

    async def _tracked(self, collection: Collection[T]) -> list[T]:
        task = asyncio.current_task()
        assert task is not None  # a coroutine that runs has one
        self._running[collection] = task
        try:
            return await collection.run()
        finally:
            del self._running[collection]

    async def _ended(self, collection: Collection[Any]) -> None:
        # One that was given up before its first step never runs; that step would have come before this one.
        if (task := self._running.get(collection)) is not None:
            await asyncio.wait([task])

    async def _wind_up(self) -> None:
        """Let collections that are given up tell the policy server, then close the session that they do it over."""
        collections = list(self._running.values())
        for task in collections:
            if not task.cancelling():  # a second cancellation would interrupt the telling
                task.cancel()
        await asyncio.gather(*collections, return_exceptions=True)
        await self.session.close()
        await self._loop.shutdown_default_executor()


async def _new_session(max_inflight: int) -> aiohttp.ClientSession:
    return new_session(max_inflight)
