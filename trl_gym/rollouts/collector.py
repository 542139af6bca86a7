"""Many requests → many results: the one place where the synchronous trainer meets asynchronous HTTP.

trainer thread                       collector thread (one event loop, for the collector's whole life)
──────────────                       ─────────────────────────────────────────────────────────────────
submit(requests) ────────────────►   a `Collection`: one task per request, a watch beside them
future.result()                      `finish` and `progress` are called here
interrupt(places) ───────────────►   these end as failures
                 ◄────────────────   the values of `finish`, in the order of the requests
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import aiohttp

from trl_gym.gym.client import new_session
from trl_gym.gym.discovery import AgentInfo
from trl_gym.rollouts.admission import Admission, Budgets
from trl_gym.rollouts.attempts import Collection, CollectionContext, Ended, Progress, RolloutResult
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.request import PolicyAccess, RolloutRequest

__all__ = ["Ended", "Progress", "RolloutCollector", "RolloutResult", "Submission"]

_CLOSE_TIMEOUT_S = 10.0

T = TypeVar("T", bound=Ended)
R = TypeVar("R")


class RolloutCollector(Generic[T]):
    """Runs rollouts on NeMo Gym agents.

    Args:
        agent: Finds the address of an agent by name; raises for one that is unknown.
        budgets: Deadlines, caps, rates and retries.
        check: Raises when rollouts cannot go on at all: the policy server, or the whole Gym, has ended. Called about
            every second, in a thread.
        agents_down: Returns agents that cannot run rollouts now, by name, with the reason; see
            `GymServers.agents_down`. Called as often as `check`.
        on_environment_down: `"fail"` ends a collection with outstanding rollouts of such an agent; `"skip"` makes
            these fail at once.
        gym_log: Returns the end of the Gym's log, for messages.
        ledger: Records and cancellation at the policy server; None for a server that has neither.
        access: Makes the keys with which agents call the policy as their rollout; None for a server that has no such
            keys.
        stall_timeout_s: Seconds without a rollout that ends, after which all outstanding ones are listed.
    """

    def __init__(
        self,
        agent: Callable[[str], AgentInfo],
        *,
        budgets: Budgets,
        check: Callable[[], None] = lambda: None,
        agents_down: Callable[[], Mapping[str, str]] = dict,
        on_environment_down: Literal["fail", "skip"] = "fail",
        gym_log: Callable[[], str] = str,
        ledger: Ledger | None = None,
        access: PolicyAccess | None = None,
        stall_timeout_s: float = 60.0,
    ) -> None:
        self._context = CollectionContext(
            agent=agent,
            budgets=budgets,
            check=check,
            agents_down=agents_down,
            on_environment_down=on_environment_down,
            gym_log=gym_log,
            ledger=ledger,
            access=access,
            stall_timeout_s=stall_timeout_s,
        )
        self._worker: _Worker | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

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
        """Start running all requests.

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
            GymServerError: NeMo Gym died, or an environment is down and may not be skipped.
        """
        if self._worker is None:
            self._worker = _Worker(self._context.budgets)
            # Also when nobody calls `close`: at the latest when the interpreter ends.
            self._finalizer = weakref.finalize(self, self._worker.close)
        return Submission(self._worker, self._context, requests, finish, progress)

    def close(self) -> None:
        """Give up what still runs, close connections, end the thread. Idempotent; the collector can be used again."""
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None


class Submission(Generic[T]):
    """Requests that run; made by `RolloutCollector.submit`, which says what the arguments are.

    Attributes:
        future: The values of `finish`, in the order of the requests.
    """

    def __init__(
        self,
        worker: _Worker,
        context: CollectionContext,
        requests: Sequence[RolloutRequest],
        finish: Callable[[RolloutResult], T],
        progress: Progress | None,
    ) -> None:
        self._worker = worker
        self._unwanted: dict[int, str] = {}
        self._collection: Collection[T] | None = None
        self._task: asyncio.Task[Any] | None = None

        async def run() -> list[T]:
            self._task = asyncio.current_task()
            parts = context, worker.session, worker.admission, finish, progress, self._unwanted
            self._collection = Collection(*parts)
            return await self._collection.run(requests)

        self.future = worker.start(run)

    def interrupt(self, places: Sequence[int], why: str) -> None:
        """End rollouts before their time, as failures of kind `cancelled` that are not retried. Returns at once, and
        may be called in any thread, in `finish` too.

        Args:
            places: Among the requests; those that have ended, or are being recorded, end as they would.
            why: The failures' text.
        """
        if not self.future.done():
            self._worker.call(self._interrupt, dict.fromkeys(places, why))

    def cancel(self) -> None:
        """Give all of it up, and wait until what ran is recorded and the policy server told. Idempotent. May be called
        in any thread but the collector's."""
        if not self.future.done():
            self._worker.run(self._wind_up()).result(timeout=_CLOSE_TIMEOUT_S)

    def _interrupt(self, unwanted: dict[int, str]) -> None:
        if self._collection is None:  # it has not begun
            self._unwanted |= unwanted
        else:
            self._collection.interrupt(unwanted)

    async def _wind_up(self) -> None:
        # `run` was handed to the loop before this was, so that it has begun.
        assert self._task is not None, "the loop takes what it is handed in order"
        if not self._task.cancelling():  # a second cancellation would interrupt the telling
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class _Worker:
    """An event loop in a thread, with one HTTP session, one admission and the collections that run on it."""

    def __init__(self, budgets: Budgets) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trl-gym-collector", daemon=True)
        self._thread.start()
        self._collections: set[asyncio.Task[Any]] = set()
        self.admission = Admission(budgets)
        self.session = self.run(_new_session(budgets.max_inflight)).result()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    def start(self, collection: Callable[[], Coroutine[Any, Any, R]]) -> concurrent.futures.Future[R]:
        return self.run(self._tracked(collection))

    def close(self) -> None:
        self.run(self._wind_up()).result(timeout=_CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        self._loop.close()

    async def _tracked(self, collection: Callable[[], Coroutine[Any, Any, R]]) -> R:
        task = asyncio.current_task()
        assert task is not None  # a coroutine that runs has one
        self._collections.add(task)
        try:
            return await collection()
        finally:
            self._collections.discard(task)

    async def _wind_up(self) -> None:
        """Let collections that are given up tell the policy server, then close the session that they do it over."""
        collections = list(self._collections)
        for task in collections:
            if not task.cancelling():  # a second cancellation would interrupt the telling
                task.cancel()
        await asyncio.gather(*collections, return_exceptions=True)
        await self.session.close()
        await self._loop.shutdown_default_executor()


async def _new_session(max_inflight: int) -> aiohttp.ClientSession:
    return new_session(max_inflight)
