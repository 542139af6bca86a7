"""Tell under which weights a call was sampled, also when weights change while it runs.

vLLM names the version that it holds now, and none in an answer. But nothing is sampled between a pause and the resume
after it, and the middleware sees both. So a call's first and last token have the versions of the stretches, between
two such pauses, in which they lie:

    ── "3" ──┤ stopped    resumed ├── "4" ──      pause: nothing is sampled under the old weights any more
      x───── ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ ────x          "keep": frozen, then continued: from "3" to "4"
           ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ x───x        queued meanwhile: "4"
      x────x                      ┄┄              "wait": ended before; only its answer is late: "3"

The engine says how long a call was queued, and how long it took to its first and last token
(`--enable-per-request-metrics`). Counted from when the call was sent, this is when they were sampled, too early by
what the API server needed for the prompt; counted back from the answer, too late by what it needed for that. Mostly
both err by less than a pause takes. Where they disagree the earlier one holds: a token is never said to be fresher
than it is. Of a server that does not measure it is known when calls were sent and answered.
SGLang says itself which tokens were sampled under which version.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_CHANGES = 64  # that a call may outlast; of an older one the oldest known version is told


@dataclass(slots=True)
class _Change:
    """Weights gave way to others."""

    before: str | None  # the version until then; None where nobody had asked for it
    stopped: float  # from here on nothing is sampled with the old weights
    resumed: float = math.inf  # from here on something may be sampled with the new ones


@dataclass(frozen=True, slots=True)
class Sampled:
    """When the first and the last token of a call were sampled: earliest and latest moment of each, in seconds."""

    first: tuple[float, float]
    last: tuple[float, float]
    told: tuple[str, str] | None = None  # the versions of both, where the engine itself says so

    @classmethod
    def of(
        cls,
        sent: float,
        answered: float,
        metrics: Mapping[str, Any] | None,
        spans: Sequence[Mapping[str, Any]] | None = None,
    ) -> Sampled:
        """Find the moments.

        Args:
            metrics: vLLM's `metrics` of the answer, in milliseconds.
            spans: SGLang's `weight_versions`: stretches of tokens, in order, with the `version` of each.
        """
        if spans:
            told = (spans[0]["version"], spans[-1]["version"])
            return cls((sent, answered), (answered, answered), told)
        metrics = metrics or {}
        until_first, decoding = metrics.get("time_to_first_token_ms"), metrics.get("generation_time_ms")
        if until_first is None or decoding is None:
            return cls((sent, answered), (answered, answered))
        first = min(sent + ((metrics.get("queue_time_ms") or 0.0) + until_first) / 1000, answered)
        seconds = decoding / 1000
        return cls((first, max(first, answered - seconds)), (min(first + seconds, answered), answered))


class WeightHistory:
    """When the weights of one server changed.

    Args:
        clock: Returns seconds; those of `Sampled` are of the same clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._changes: deque[_Change] = deque(maxlen=_MAX_CHANGES)
        self._stopped: float | None = None  # since when the server is paused

    def paused(self) -> None:
        """Take note that the server samples nothing any more."""
        if self._stopped is None:
            self._stopped = self.clock()

    def resuming(self) -> None:
        """Take note that it will sample again."""
        self._stopped = None
        for change in self._changes:
            change.resumed = min(change.resumed, self.clock())

    def changed(self, before: str | None) -> None:
        """Take note that it holds other weights than those of version `before`."""
        now = self.clock()
        if self._stopped is None:
            self._changes.append(_Change(before, now, now))
        elif not self._changes or self._changes[-1].resumed < math.inf:  # else only the last one of a pause counts
            self._changes.append(_Change(before, self._stopped))

    def versions(self, sampled: Sampled, now: str | None) -> tuple[str | None, str | None]:
        """Return the versions of the first and of the last token of a call."""
        if sampled.told is not None:
            return sampled.told
        first = self._place(*sampled.first)
        last = max(first, self._place(*sampled.last))
        known = [*(change.before for change in self._changes), now]
        return known[first], known[last]

    def _place(self, earliest: float, latest: float) -> int:
        """Return how many changes a token was sampled behind, which is nowhere inside of a pause."""
        at_least = sum(change.stopped <= earliest for change in self._changes)
        at_most = sum(change.resumed <= latest for change in self._changes)
        return min(at_least, at_most)
