"""Which adapter answers a call: pure bookkeeping, no I/O.

A rollout keeps the version that was current at its first call; a call without a rollout gets the newest. An adapter
is in use as long as it is current, a rollout holds it, or it is answering a call; `idle` names those that are not.

    a rollout lets go of its adapter when   its records are taken, it is cancelled,
                                            or it has made no call for an hour (`expire`)

The server's own weights are a version like any other: a rollout that began before the first adapter came goes on
without one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
