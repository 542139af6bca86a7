"""Work that has two ends, here and in the server, and must not hang when one of them fails.

    main thread    walks the stream of weights, puts each tensor into the `Handover`, waits
    thread         takes tensors from the `Handover` and sends them
    thread         waits for the server's answer

Threads are daemons: one that is stuck in a collective with a dead peer is left behind, and does not keep the process
from ending.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from trl_gym.errors import WeightSyncError

T = TypeVar("T")


class Together:
    """Runs several pieces of work side by side; the first failure, or the deadline, ends the wait for all of them.

    Args:
        timeout_s: From now until all of them must be done.
        on_failure: Called once, from any thread, when one has failed.
    """

    def __init__(self, timeout_s: float, on_failure: Callable[[], None] = lambda: None) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._on_failure = on_failure
        self._running: set[str] = set()
        self._outcomes: queue.SimpleQueue[tuple[str, Any, Exception | None]] = queue.SimpleQueue()

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def start(self, name: str, work: Callable[[], Any]) -> None:
        """Begin `work`; `name` says in messages what is being waited for."""

        def run() -> None:
            try:
                self._outcomes.put((name, work(), None))
            except Exception as error:  # raised by `wait`
                self._outcomes.put((name, None, error))  # before the others fail because of this one
                self._on_failure()

        self._running.add(name)
        threading.Thread(target=run, name=f"trl-gym: {name}", daemon=True).start()

    def wait(self) -> dict[str, Any]:
        """Wait for all that was started.

        Returns:
            What each returned, by name.

        Raises:
            WeightSyncError: Time is up.
            Exception: Of the first that failed.
        """
        results = {}
        while self._running:
            try:
                name, result, error = self._outcomes.get(timeout=self.remaining_s)
            except queue.Empty:
                self._on_failure()
                raise WeightSyncError(
                    f"Weights did not arrive within {self._timeout_s:g} s (`gym_sync_timeout`); still waiting for: "
                    f"{', '.join(sorted(self._running))}."
                ) from None
            self._running.remove(name)
            if error is not None:
                raise error
            results[name] = result
        return results


class HandoverClosedError(Exception):
    """Whoever takes from it is told that nothing more will come, and that what came is not all."""


class Handover(Generic[T]):
    """A queue between two threads that holds a bounded number of bytes.

    Args:
        max_bytes: Held at a time; a single item may be bigger, and is then alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._num_bytes = 0
        self._finished = self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, num_bytes: int, timeout_s: float) -> bool:
        """Wait for room, then add the item.

        Returns:
            False when it was closed, or there was no room in time: nobody takes items any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(num_bytes), timeout_s)
            if self._closed or not self._has_room(num_bytes):
                return False
            self._items.append((item, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """That was the last item."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give up: nothing is added or taken from here on, and what it holds is let go. Idempotent."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._num_bytes = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Take items until the last one. Raises `HandoverClosedError` when it is closed before."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._finished or self._items)
                if self._closed:
                    raise HandoverClosedError
                if not self._items:
                    return
                item, num_bytes = self._items.popleft()
                self._num_bytes -= num_bytes
                self._changed.notify_all()
            yield item

    def _has_room(self, num_bytes: int) -> bool:
        return not self._items or self._num_bytes + num_bytes <= self._max_bytes
