"""One batch of rollouts on an event loop: attempts, retries, and a watch beside them.

    rollout    wait for a place ─► POST /run ─► records of its calls ─► `finish` ─┬─► value
                     ▲                                                            │ failed, and may be retried
                     └───────────────── pause ◄── a new rollout id ◄──────────────┘
    watch      about every second: are the servers there? has anything ended lately?

A rollout that fails is a value like any other. So is one that is ended early, because its environment is down or its
caller has no use for it: its failure stands in `Collection._ends`, and its task is cancelled.

What ends the collection is an exception: the policy server or the whole Gym is gone, an environment is down and may
not be skipped, `finish` raised, or the caller gave up. Then every task is cancelled, what ran is recorded as
cancelled, and the policy server is told that nobody waits any more: NeMo Gym before 0.7 goes on with a rollout whose
client has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

import aiohttp

from trl_gym.errors import FailureKind, GymServerLostError, PolicyServerError, PolicyServerLostError, RolloutFailure
from trl_gym.gym.client import GymAnswer, feel_pulse, run_rollout
from trl_gym.policy_server.middleware.ledger import CallRecord
from trl_gym.rollouts.admission import Admission
from trl_gym.rollouts.ledger import CallState, EngineWatch, HangWatch
from trl_gym.rollouts.request import RolloutRequest, next_attempt

if TYPE_CHECKING:
    from trl_gym.rollouts.collector import RolloutCollector

logger = logging.getLogger(__name__)

BACKOFF_S = 0.5  # before the second attempt, on average three quarters of it
MAX_BACKOFF_S = 30.0
_LOOK_EVERY_S = 1.0
_HURRIED_LOOK_S = 0.1  # while a rollout waits to hear whether its servers are gone
_PATIENCE = 3  # looks in a row before a server counts as gone
_CAUSE_S = 6.0  # for a server that has just died to be seen as dead: its supervisor kills first what it has left
_GIVE_UP_TIMEOUT_S = 5.0  # for telling a policy server that may be the reason for giving up
_MAX_LISTED = 16  # outstanding rollouts; more are grouped
# Failures after which a server behind the agent may go on with the rollout.
_MAY_GO_ON = frozenset({FailureKind.DEADLINE, FailureKind.INFRASTRUCTURE, FailureKind.CANCELLED})


class Ended(Protocol):
    """A value of `finish`: says whether the rollout failed."""

    @property
    def failure(self) -> RolloutFailure | None: ...


T = TypeVar("T", bound=Ended)


Progress = Callable[["CollectionStatus"], None]
"""Called in the collector's thread whenever a rollout ends, and about every second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutResult:
    """The end of one attempt."""

    request: RolloutRequest
    answer: dict[str, Any] | None  # Gym's answer; None when the attempt failed
    failure: RolloutFailure | None  # why it failed; None when it did not
    seconds: float  # wall time from dispatch (after waiting for a place) to the end
    # The policy server's records of its model calls; empty when it was never dispatched, None without a ledger.
    records: list[CallRecord] | None = None
    # If it has failed for one of these, also for a reason that only `finish` sees, another attempt follows and this
    # one is not the last word.
    retried_kinds: frozenset[FailureKind] = frozenset()
    # Whether the policy server was lost before it could tell of this attempt's model calls. If the server comes back
    # another attempt follows, whatever the answer.
    was_lost: bool = False


class Pulses(Protocol):
    """NeMo Gym, which may hang: `GymServers`."""

    hang_timeout_s: float

    @property
    def pulse_urls(self) -> Sequence[str]: ...
    def note_hung(self, urls: Sequence[str], /) -> None: ...


class Collection(Generic[T]):
    """Run one batch of rollouts, once. Made in any thread; used in that of the event loop.

    Args:
        context: Has the servers that it works with, and the limits.
        admission: Shared with other collections of the rank.
        requests, finish, progress: See `RolloutCollector.submit`.
    """

    def __init__(
        self,
        context: RolloutCollector[Any],
        session: aiohttp.ClientSession,
        admission: Admission,
        requests: Sequence[RolloutRequest],
        finish: Callable[[RolloutResult], T],
        progress: Progress | None,
    ) -> None:
        self._context, self._session, self._admission = context, session, admission
        self._finish, self._progress = finish, progress
        self._clock = time.monotonic
        self._rng = random.Random()
        self._tally = Tally(len(requests))
        self._tasks: list[asyncio.Task[T]] = []
        self._current = list(requests)  # the newest attempt of each rollout
        self._ends: dict[int, RolloutFailure] = {}  # what rollouts end with that were ended early, by their place
        self._down: set[str] = set()  # environments that are skipped
        self._refused: Counter[str] = Counter()  # of this watch, by server
        self._num_suspicious = 0
        self._suspicion, self._looked = asyncio.Event(), asyncio.Event()
        self._num_unanswered_pings = 0
        self._engines = None if context.ledger is None else EngineWatch(context.ledger, session)
        gym = context.gym
        self._pulse = None if gym is None else HangWatch(partial(feel_pulse, session), gym.hang_timeout_s)
        self._is_lost = False  # the policy server
        self._server: str | None = None  # what its process said of itself
        self._began = self._last_end = self._last_warning = self._clock()

    async def run(self) -> list[T]:
        """Run all requests; return the values of `finish` in their order."""
        self._tasks = [asyncio.create_task(self._rollout(index)) for index in range(len(self._current))]
        watch = asyncio.create_task(self._watch())
        rollouts = asyncio.gather(*self._tasks)
        try:
            ends: set[asyncio.Future[Any]] = {rollouts, watch}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return rollouts.result() if rollouts.done() else watch.result()
        finally:
            for task in (*self._tasks, watch):  # `gather` leaves the siblings of a task that raised running
                task.cancel()
            await asyncio.gather(*self._tasks, watch, rollouts, return_exceptions=True)
            for questions in (self._engines, self._pulse):
                if questions is not None:
                    questions.close()
            await self._give_up()

    def end_early(self, failures: Mapping[int, RolloutFailure]) -> None:
        """End rollouts, by their place, with these failures.

        One that has ended, or whose records are being fetched, ends as it would; no attempt follows. Of several ends
        of one rollout the first holds.
        """
        for index, failure in failures.items():
            if index in self._ends:
                continue
            self._ends[index] = failure
            one = self._tally.outstanding.get(index)
            if one is not None and one.phase is not Phase.RECORDING:
                self._tasks[index].cancel()  # one that has not begun looks for itself

    # -- one rollout --------------------------------------------------------------------------------------------------

    async def _rollout(self, index: int) -> T:
        failed: Counter[FailureKind] = Counter()
        while True:
            result = await self._attempt(index, failed)
            value, retried_kinds = await self._end_attempt(index, result)
            failure = value.failure
            self._last_end = self._clock()
            if failure is None or failure.kind not in retried_kinds:
                self._tally.num_done += 1
                self._tally.num_failed += failure is not None
                self._report()
                return value
            failed[failure.kind] += 1
            self._tally.num_retried += 1
            self._current[index] = next_attempt(result.request)

    async def _attempt(self, index: int, failed: Counter[FailureKind]) -> RolloutResult:
        request = self._current[index]
        started: float | None = None
        try:
            if failed:
                self._enter(index, Phase.PAUSED)
                await asyncio.sleep(backoff_s(failed.total(), self._rng))
            if index in self._ends:
                return self._result(request, self._ends[index], 0.0)
            self._enter(index, Phase.WAITING)
            budget = self._context.budgets.budget_for(request.agent)
            async with self._admission.place(request.agent, self._began):
                self._enter(index, Phase.RUNNING)
                started = self._clock()
                outcome = await self._run(request, budget.deadline_s)
            seconds = self._clock() - started
            if isinstance(outcome, RolloutFailure) and outcome.kind is FailureKind.INFRASTRUCTURE:
                await self._look_closely()
            return self._result(request, outcome, seconds, budget.retried_kinds(failed))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if index not in self._ends or task is None or task.uncancel() > 0:  # the collection ends
                raise
            seconds = 0.0 if started is None else self._clock() - started
            return self._result(request, self._ends[index], seconds)

    async def _run(self, request: RolloutRequest, deadline_s: float) -> GymAnswer | RolloutFailure:
        agent, access = self._context.agent(request.agent), self._context.access
        headers, own = ({}, {}) if access is None else access.of(request, agent)
        row = {**request.row, **own}  # not into the request, which is recorded: `own` has a key
        return await run_rollout(self._session, agent, row, deadline_s=deadline_s, headers=headers)

    def _result(
        self,
        request: RolloutRequest,
        outcome: GymAnswer | RolloutFailure,
        seconds: float,
        retried_kinds: frozenset[FailureKind] = frozenset(),
    ) -> RolloutResult:
        failure = outcome if isinstance(outcome, RolloutFailure) else None
        return RolloutResult(
            request=request,
            answer=None if isinstance(outcome, RolloutFailure) else outcome.result,
            failure=None if failure is None else failure.of(**request.identity, seconds=seconds),
            seconds=seconds,
            retried_kinds=retried_kinds,
        )

    async def _end_attempt(self, index: int, result: RolloutResult) -> tuple[T, frozenset[FailureKind]]:
        """Fetch the records of an attempt that has ended and hand it to `finish`, whatever the policy server says.
        Returns the value of `finish`, and the kinds of failure after which another attempt follows."""
        before = self._tally.outstanding.get(index)
        has_run = before is not None and before.phase is Phase.RUNNING
        self._enter(index, Phase.RECORDING)
        ledger, rollout_id = self._context.ledger, result.request.rollout_id
        records: list[CallRecord] | None = None if ledger is None else []
        broken: PolicyServerError | None = None
        try:
            if ledger is not None and has_run:
                if result.failure is not None and result.failure.kind in _MAY_GO_ON:
                    await ledger.cancel(self._session, [rollout_id])
                records, who = await ledger.take(self._session, rollout_id)
                self._require_same_server(who)
        except PolicyServerError as error:
            broken, records = error, None
        except asyncio.CancelledError:
            self._record_last(dataclasses.replace(result, retried_kinds=frozenset(), was_lost=self._is_lost))
            raise
        self._tally.leave(index)
        if index in self._ends:
            result = dataclasses.replace(result, retried_kinds=frozenset())
        was_lost = isinstance(broken, PolicyServerLostError)
        value = self._finish(dataclasses.replace(result, records=records, was_lost=was_lost))
        if broken is not None:
            self._is_lost = was_lost
            await self._raise_with_cause(broken)
        return value, result.retried_kinds

    async def _raise_with_cause(self, error: PolicyServerError) -> NoReturn:
        """Raise, if possible with what a dead process says: that is more than the connection that it closed tells."""
        if isinstance(error.__cause__, OSError | aiohttp.ClientError):
            for _ in range(round(_CAUSE_S / _HURRIED_LOOK_S)):
                await asyncio.to_thread(self._context.check)
                await asyncio.sleep(_HURRIED_LOOK_S)
        raise error

    def _enter(self, index: int, phase: Phase) -> None:
        request = self._current[index]
        one = Outstanding(request.agent, request.rollout_id, request.attempt, phase, self._clock())
        self._tally.enter(index, one)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._tally.status(self._clock()))

    # -- the watch ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> NoReturn:
        """Check the servers until one of them is found to be lost."""
        while True:
            try:
                await self._look()
            except PolicyServerLostError:
                self._is_lost = True
                raise
            looked, self._looked = self._looked, asyncio.Event()
            looked.set()
            self._report()
            now = self._clock()
            if now - max(self._last_end, self._last_warning) >= self._context.stall_timeout_s:
                self._last_warning = now
                await self._warn_of_stall()
            if self._num_suspicious:
                await asyncio.sleep(_HURRIED_LOOK_S)
            else:
                self._suspicion.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        await self._suspicion.wait()

    async def _look(self) -> None:
        await asyncio.to_thread(self._context.check)  # it may ask over the network
        if self._context.ledger is not None:
            who = await self._context.ledger.ping(self._session)
            self._num_unanswered_pings = 0 if who is not None else self._num_unanswered_pings + 1
            self._require_same_server(who)
            self._server = who or self._server
            if self._num_unanswered_pings >= _PATIENCE:
                raise PolicyServerLostError(self._context.ledger.describe_silence())
        if self._engines is not None:
            self._engines.look()
        if self._context.gym is not None and self._pulse is not None:
            self._context.gym.note_hung(self._pulse.look(self._context.gym.pulse_urls))
        self._mark_down(await asyncio.to_thread(self._context.agents_down, self._refused))

    def _require_same_server(self, who: str | None) -> None:
        """Raise if another process answers. It may have been down for less than a look; its ledger is lost, and those
        rollouts that run now are answered by other weights."""
        if who and who != (self._server or who):
            raise PolicyServerLostError("The policy server was restarted: another process answers than before.")

    async def _look_closely(self) -> None:
        """Wait, after an infrastructure failure, until a server that is gone has been noticed as gone. Otherwise a
        dead environment would use up the attempts of its rollouts before the cause is known."""
        self._num_suspicious += 1
        self._suspicion.set()
        try:
            for _ in range(_PATIENCE + 1):  # the first may have begun before
                await self._looked.wait()
        finally:
            self._num_suspicious -= 1

    def _mark_down(self, down: Mapping[str, str]) -> None:
        outstanding = self._tally.outstanding
        for agent in {one.agent for one in outstanding.values()} & (down.keys() - self._down):
            indices = [index for index, one in outstanding.items() if one.agent == agent]
            text = f"the environment `{agent}` is down: {down[agent]}"
            if self._context.on_environment_down == "fail":
                log = self._context.gym_log()
                log = f"\n\n{log}\n" if log else ""
                raise GymServerLostError(
                    f"T{text[1:]}. {len(indices)} of its rollouts were outstanding.{log}",
                    "Restart it, or set `gym_on_environment_down` to 'skip' to go on without it.",
                )
            logger.warning("%s. Its %d outstanding rollouts fail; the next batch tries it again.", text, len(indices))
            self._down.add(agent)
            failure = RolloutFailure(kind=FailureKind.INFRASTRUCTURE, text=text, where=f"{agent} /run")
            self.end_early(dict.fromkeys(indices, failure))

    async def _warn_of_stall(self) -> None:
        running = [one.rollout_id for one in self._tally.running.values()]
        calls = {}
        if self._context.ledger is not None and running:
            try:
                calls = await self._context.ledger.peek(self._session, running)
            except PolicyServerError as error:
                logger.warning("What stalled rollouts wait for cannot be asked: %s", error)
        now = self._clock()
        outstanding = sorted(self._tally.outstanding.values(), key=lambda one: one.since)
        logger.warning(describe_stall(outstanding, calls, now=now, silent_s=now - self._last_end))

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _give_up(self) -> None:
        """Record what was running and tell the policy server; why the collection ends is on its way to the caller."""
        at_servers = (Phase.RUNNING, Phase.RECORDING)
        given_up = [(index, one) for index, one in self._tally.outstanding.items() if one.phase in at_servers]
        now = self._clock()
        for index, one in given_up:
            if one.phase is Phase.RUNNING:
                request = self._current[index]
                failure = RolloutFailure(
                    kind=FailureKind.CANCELLED, text="the collection ended while it ran", where=f"{one.agent} /run"
                )
                if not self._record_last(self._result(request, failure, now - one.since)):
                    break
        if given_up and self._context.ledger is not None:
            ids = sorted(one.rollout_id for _, one in given_up)
            try:
                await self._context.ledger.cancel(self._session, ids, timeout_s=_GIVE_UP_TIMEOUT_S)
            except PolicyServerError as error:
                logger.warning(
                    "%d rollouts could not be cancelled at the policy server and may go on until they end by "
                    "themselves: %s",
                    len(ids),
                    error,
                )

    def _record_last(self, result: RolloutResult) -> bool:
        """Record an attempt while the collection ends; return whether that worked."""
        try:
            self._finish(result)
        except Exception as error:  # why the collection ends must not be replaced by this
            logger.warning("%s could not be recorded: %r", result.request.rollout_id, error)
            return False
        return True


# -- what a person is told --------------------------------------------------------------------------------------------


class Phase(StrEnum):
    """The phase of a rollout that has not ended."""

    WAITING = "waiting"  # for a place
    RUNNING = "running"  # sent to its agent
    PAUSED = "paused"  # before another attempt
    RECORDING = "recording"  # ended; records of its model calls are fetched, the journal is written


@dataclass(frozen=True, slots=True)
class Outstanding:
    """One rollout that has not ended."""

    agent: str  # name of its agent
    rollout_id: str  # id of the current attempt
    attempt: int  # 0 for the first try
    phase: Phase  # the phase that it is in
    since: float  # when that phase began, in seconds of `time.monotonic`


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionStatus:
    """The progress of a collection."""

    num_done: int  # rollouts that have ended, failed ones included
    num_failed: int  # those without a reward
    num_running: int  # sent to their agents and not answered
    num_retried: int  # attempts that failed and were, or will be, followed by another
    num_total: int  # rollouts asked for
    # Agent and seconds of the rollout that has been running longest; None when none runs.
    slowest: tuple[str, float] | None = None


def waits_for(one: Outstanding, call: CallState | None) -> str:
    """Say in a few words what an outstanding rollout waits for.

    Args:
        call: The state of its model calls at the policy server; None when that does not say.
    """
    if one.phase is Phase.WAITING:
        return "not dispatched (cap)"
    if one.phase is Phase.PAUSED:
        return "pause before another attempt"
    if one.phase is Phase.RECORDING:
        return "records of its model calls (policy server)"
    if call is None:
        return f"{one.agent} (what it does is not known: the policy server does not say)"
    if call.num_running:
        return "model call (policy server)"
    if call.num_answered:
        return f"tool or verifier of {one.agent}"
    return f"tool or verifier of {one.agent} (no model call yet)"


def describe_stall(
    outstanding: Sequence[Outstanding], calls: Mapping[str, CallState], *, now: float, silent_s: float
) -> str:
    """Return a warning that lists every outstanding rollout, grouped by agent and cause when there are many.

    Args:
        outstanding: The rollouts that have not ended, longest first.
        calls: The states of their model calls by rollout id, as far as the policy server has answered.
        now: The time on the clock of `Outstanding.since`.
        silent_s: Seconds since a rollout has ended.
    """
    waits = [(one, waits_for(one, calls.get(one.rollout_id)), now - one.since) for one in outstanding]
    lines = [
        f"  {one.rollout_id} ({one.agent}, {seconds:.0f} s, attempt {one.attempt}): {what}"
        for one, what, seconds in waits
    ]
    if len(lines) > _MAX_LISTED:
        groups: defaultdict[tuple[str, str], list[tuple[Outstanding, float]]] = defaultdict(list)
        for one, what, seconds in waits:
            groups[one.agent, what].append((one, seconds))
        lines = [_group_line(agent, what, members) for (agent, what), members in groups.items()]
    head = f"No rollout has ended for {silent_s:.0f} s; {len(outstanding)} are outstanding:"
    return "\n".join([head, *lines])


def _group_line(agent: str, what: str, members: Sequence[tuple[Outstanding, float]]) -> str:
    oldest, seconds = max(members, key=lambda member: member[1])
    attempts = sorted({one.attempt for one, _ in members})
    tried = f"attempt {attempts[0]}" if len(attempts) == 1 else f"attempts {attempts[0]} to {attempts[-1]}"
    return f"  {len(members)} of {agent}, {tried}: {what}; longest {oldest.rollout_id}, {seconds:.0f} s"


class Tally:
    """The counts of one collection, and its outstanding rollouts.

    Attributes:
        outstanding: Rollouts that have not ended, by their place among the requests.
        running: Those of them that are with their agents, longest first.
    """

    def __init__(self, num_total: int) -> None:
        self.num_total = num_total
        self.num_done = self.num_failed = self.num_retried = 0
        self.outstanding: dict[int, Outstanding] = {}
        self.running: dict[int, Outstanding] = {}

    def enter(self, index: int, one: Outstanding) -> None:
        """Note that a rollout begins a phase."""
        self.outstanding[index] = one
        self.running.pop(index, None)
        if one.phase is Phase.RUNNING:
            self.running[index] = one

    def leave(self, index: int) -> None:
        """Note that an attempt has ended; its end decides whether another follows."""
        self.outstanding.pop(index, None)
        self.running.pop(index, None)

    def status(self, now: float) -> CollectionStatus:
        oldest = next(iter(self.running.values()), None)
        return CollectionStatus(
            num_done=self.num_done,
            num_failed=self.num_failed,
            num_running=len(self.running),
            num_retried=self.num_retried,
            num_total=self.num_total,
            slowest=None if oldest is None else (oldest.agent, now - oldest.since),
        )


def backoff_s(num_failed: int, rng: random.Random) -> float:
    """Return the seconds to wait before the next attempt: doubling, capped, and spread, so that rollouts which failed
    together do not come back together.

    Args:
        num_failed: Attempts that have failed so far, at least 1.
        rng: A generator of its own: training draws from the global one.

    Returns:
        Between half and all of `min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (num_failed - 1))`.
    """
    longest = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** min(num_failed - 1, 16))
    return longest * rng.uniform(0.5, 1.0)
