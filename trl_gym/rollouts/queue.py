"""Groups of rollouts in flight: more than one generation batch of them, so that engines work while training runs.

    collect(new groups, number) ── launch ── wait until enough have ended ── agree with all ranks ── the oldest of them
                                       │                    ▲
                                       └─ collector's thread: rollouts end, groups become whole, whenever they do

Between a group's first weights and the step that trains it, at most `gym_max_staleness` others are made. Which groups
are taken decides whether all others can still be trained in time (`choose`): those that have ended, oldest first, as
long as no later batch is left with more groups that are due than it has room for. Until then the oldest are waited
for, or what they still wait for is cancelled (`gym_on_stale`).

When the policy server is lost, what has ended stays, and only the lost rollouts run again:

    the server dies ── recover: all ranks agree, server restarted, weights pushed ── the lost ones are launched again

A rollout that failed by itself has ended. One that failed for infrastructure reasons, or whose model calls the server
could no longer report, may be lost because of the server. So may one that continued with weights that are not ours,
because the server was back before anyone noticed. Errors in the background are looked at when groups are collected,
which every rank does in step.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_gym.errors import FailureKind, ServerLoss
from trl_gym.rollouts.attempts import CollectionStatus, Progress, RolloutResult
from trl_gym.rollouts.collector import RolloutCollector, Submission
from trl_gym.rollouts.ledger import weight_versions
from trl_gym.rollouts.request import RolloutRequest, next_attempt
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.rollout import Rollout

_POLL_S = 0.5  # for Ctrl-C to arrive while groups are waited for

logger = logging.getLogger(__name__)

Finish = Callable[[RolloutResult], Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGroup:
    """The rollouts of one task that are each other's baseline; of a group that lies across ranks, this rank's part."""

    batch: int  # number of the generation batch, in the run, that the task was drawn for
    index: int  # index in that batch, over all ranks
    example: dict[str, Any]  # of the dataset
    requests: tuple[RolloutRequest, ...]  # by member
    num_wanted: int  # rollouts that make the group; of more requests, the first that end with a reward
    begun: Policy | None = None  # the policy that sampled what an interrupted run has finished of it


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedGroup:
    """A group whose rollouts have ended."""

    task: TaskGroup
    rollouts: list[Rollout]  # `[num_wanted]` by member, failures included
    surplus: list[Rollout] = field(default_factory=list)  # what was launched beyond, mostly cancelled
    born: int  # version of the weights that its first rollouts began with


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """What samples a rank's groups: calls to the servers, to the journal, and to the other ranks."""

    collector: RolloutCollector[Rollout]  # runs rollouts
    # Gets the error that ended rollouts on this rank, None without one, and tells every rank whether a server is lost.
    # Raises, on every rank, any other error. Called in step, once per wait.
    agree: Callable[[Exception | None], ServerLoss | None]
    # Gets the lost server back, a policy server with the current weights. Told the loss and how many rollouts it cost
    # here.
    recover: Callable[[ServerLoss, int], None]
    policy: Callable[[], Policy]  # returns the policy that is sampled with now
    finisher: Callable[[Policy], Finish]  # makes, for a policy, what turns an attempt that has ended into a rollout
    # Returns, by index, the requests' rollouts that an interrupted run has finished with a policy.
    recall: Callable[[Sequence[RolloutRequest], Policy], Mapping[int, Rollout]] = lambda requests, policy: {}
    # Called before rollouts are launched; ranks agree on an error of it as on one of a rollout.
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None  # called when enough have ended; ranks agree on an error of it too
    # Tells a server that came back which rollouts nobody waits for: NeMo Gym may still be running them.
    cancel: Callable[[list[str]], Any] = lambda rollout_ids: None
    progress: Progress | None = None  # gets the state of all rollouts, while they are waited for


# -- which groups are taken -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group in flight, as `choose` sees it."""

    later: int  # how many of the batches to come may train it; 0 for one that is due
    is_whole: bool  # whether all of its rollouts have ended


def choose(
    candidates: Sequence[Candidate], number: int, *, num_later: int, per_batch: int
) -> tuple[list[int] | None, list[int]]:
    """Return which groups to take now; None as long as there is no sound choice.

    The earliest deadline goes first. Groups stand in the order in which they began, so that of those that have ended
    the first are taken. A choice is sound if, for every `t`, of the groups that the next `t` batches at most may train
    no more are left than these have room for: `t × per_batch`.

    Args:
        candidates: All groups in flight, by age: `later` does not decrease. With `number` of them taken, the others
            have room in the batches to come.
        num_later: Batches to come that are known.
        per_batch: Groups of each of them.

    Returns:
        `number` indices or None, and the indices of those unfinished groups that would be left without a place.
    """
    assert all(one.later <= next_one.later for one, next_one in itertools.pairwise(candidates)), "they stand by age"
    whole = [index for index, one in enumerate(candidates) if one.is_whole][:number]
    due: list[int] = []
    for later in sorted({one.later for one in candidates if one.later < num_later}):
        prefix = sum(one.later <= later for one in candidates)
        num_lacking = prefix - later * per_batch - sum(index < prefix for index in whole)
        unfinished = [index for index in range(prefix) if not candidates[index].is_whole]
        due += [index for index in unfinished[: max(num_lacking, 0)] if index not in due]
    return (whole if len(whole) == number and not due else None), due


# -- the queue --------------------------------------------------------------------------------------------------------


class RolloutQueue:
    """The groups of one rank that wait to begin, are in flight, or have ended. Every rank has one, and calls its
    methods in step.

    Args:
        sampler: What samples them.
        max_staleness: Optimizer steps that may lie between the weights a group began with and the step that trains it.
        in_order: Take groups in their order, whole generation batches: groups may lie across ranks, which must take
            the same ones.
        drops: Cancel what a group that would become too stale still waits for, instead of waiting for it, once enough
            other groups have ended.
    """

    def __init__(
        self, sampler: Sampler, *, max_staleness: int = 0, in_order: bool = True, drops: bool = False
    ) -> None:
        self._sampler = sampler
        self._max_staleness, self._in_order, self._drops = max_staleness, in_order, drops
        self._entries: list[_Entry] = []
        self._launches: list[_Launch] = []
        self._given_up: list[str] | None = None  # lost attempts, which Gym may still be running; None without a loss
        self._changed = threading.Condition()  # held while entries change
        self._is_waiting = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def in_flight(self) -> list[TaskGroup]:
        """The groups that have not been taken, by age, each with the policy that it began with."""
        return [dataclasses.replace(entry.task, begun=entry.begun or entry.task.begun) for entry in self._entries]

    def collect(
        self,
        groups: Sequence[TaskGroup],
        number: int,
        *,
        step: int,
        later_steps: Sequence[int] = (),
        per_batch: int = 0,
    ) -> list[EndedGroup]:
        """Put groups into the queue, launch those that there is room for, and return some that have ended, by age.

        Args:
            step: Number of the optimizer step that trains what is returned; see `BatchInfo.step`.
            later_steps: Those of each batch to come that may train what is in flight.
            per_batch: Groups of each of them.

        Raises:
            TrlGymError: On every rank, when a rollout cannot be had.
        """
        self._entries += map(_Entry, groups)
        assert len(self._entries) >= number, f"{number} groups are asked for, and {len(self._entries)} are there"
        room = number + len(later_steps) * per_batch
        chosen = self._until(lambda: self._chosen(number, step, later_steps, per_batch), room)
        self._entries = [entry for entry in self._entries if entry not in chosen]
        return [entry.ended() for entry in chosen]

    def drain(self) -> None:
        """Wait until what has begun has ended; it stays in the queue."""
        if not self._begun:
            return
        self._until(lambda: [] if all(entry.is_whole for entry in self._begun) else None, 0)

    def abandon(self) -> None:
        """Give up whatever is in flight, and forget it. Local."""
        self._give_up_launches()
        self._entries = []

    def give_up_lost(self) -> int:
        """Give up every launch, since a server was lost. Local; the next `collect` or `drain` launches what has not
        ended again. Returns how many rollouts will run again."""
        launched = [entry for entry in self._entries if entry.launch is not None]
        self._give_up_launches()
        newest = self._sampler.policy().version
        lost = [rollout_id for entry in launched for rollout_id in entry.give_up_lost(newest)]
        self._given_up = (self._given_up or []) + lost
        return sum(len(entry.missing()) for entry in launched)

    @property
    def _begun(self) -> list[_Entry]:
        return [entry for entry in self._entries if entry.begun is not None]

    def _chosen(self, number: int, step: int, later_steps: Sequence[int], per_batch: int) -> list[_Entry] | None:
        if self._in_order:
            first = self._begun[:number]
            return first if all(entry.is_whole for entry in first) else None
        # After a resume, groups of which nothing was finished are younger than some that were planned after them.
        begun = sorted(self._begun, key=lambda entry: entry.policy.version)
        later = [sum(entry.policy.staleness(step) <= self._max_staleness for step in later_steps) for entry in begun]
        candidates = [Candidate(num, entry.is_whole) for num, entry in zip(later, begun, strict=True)]
        taken, due = choose(candidates, number, num_later=len(later_steps), per_batch=per_batch)
        if self._drops and sum(one.is_whole for one in candidates) >= number:
            for entry in (begun[index] for index in due):
                entry.interrupt(
                    "`gym_on_stale` is 'drop': its group began "
                    f"{entry.policy.staleness(step)} optimizer steps ago, and "
                    f"`gym_max_staleness` is {self._max_staleness}"
                )
        return None if taken is None else [begun[index] for index in taken]

    def _until(self, ready: Callable[[], list[_Entry] | None], room: int) -> list[_Entry]:
        """Launch what there is room for, and wait until `ready` returns something; continue after lost servers."""
        try:
            while True:
                found, error = self._attempt(ready, room)
                loss = self._sampler.agree(error)
                if loss is None:
                    assert found is not None, "an error is raised on every rank"
                    return found
                self._sampler.recover(loss, self.give_up_lost())
        except BaseException:  # Ctrl-C arrives here, in the trainer's thread
            self.abandon()
            raise

    def _attempt(
        self, ready: Callable[[], list[_Entry] | None], room: int
    ) -> tuple[list[_Entry] | None, Exception | None]:
        """Wait. An error is returned, not raised: the other ranks have to hear of it first."""
        try:
            self._sampler.before()
            if self._given_up is not None:
                self._sampler.cancel(self._given_up)
                self._given_up = None
            self._launch(room)
            self._is_waiting = True
            with self._changed:
                while True:
                    for launch in self._launches:  # first: what was lost shall run again while training goes on
                        launch.check()
                    if (found := ready()) is not None:
                        break
                    self._changed.wait(_POLL_S)
            self._sampler.after()
        except Exception as error:
            return None, error
        finally:
            self._is_waiting = False
        return found, None

    def _launch(self, room: int) -> None:
        policy = self._sampler.policy()
        fresh = [entry for entry in self._entries if entry.begun is None]
        for entry in fresh[: max(room - len(self._begun), 0)]:
            entry.begin(*self._recalled(entry.task, policy))
        todo = [entry for entry in self._begun if entry.launch is None and not entry.is_whole]
        self._launches = [launch for launch in self._launches if not launch.has_ended]
        if todo:
            launch = _Launch(todo, self._sampler, policy, self._changed, self._show)
            self._launches.append(launch)  # before it runs: Ctrl-C may come at any time
            launch.start()

    def _recalled(self, task: TaskGroup, policy: Policy) -> tuple[Policy, Mapping[int, Rollout]]:
        """Return the policy that a group begins with, and what an interrupted run has finished of it with that one."""
        begun = task.begun
        if begun is not None and policy.version - begun.version <= self._max_staleness:
            recalled = self._sampler.recall(task.requests, begun)
            if recalled and begun != policy:  # what was lost once was run again with the policy of the checkpoint
                recalled = {**self._sampler.recall(task.requests, policy), **recalled}
            if recalled:
                return begun, recalled
        return policy, self._sampler.recall(task.requests, policy)

    def _give_up_launches(self) -> None:
        for launch in self._launches:
            launch.give_up()
        self._launches = []
        for entry in self._entries:
            entry.launch = None

    def _show(self) -> None:
        """Show how far all launches are, while someone waits. Called in the collector's thread."""
        statuses = [status for launch in self._launches if (status := launch.status) is not None]
        if self._sampler.progress is not None and self._is_waiting and statuses:
            self._sampler.progress(_merged(statuses))


def _merged(statuses: Sequence[CollectionStatus]) -> CollectionStatus:
    counts = {
        name: sum(getattr(status, name) for status in statuses)
        for name in ("num_done", "num_failed", "num_running", "num_retried", "num_total")
    }
    slowest = max((status.slowest for status in statuses if status.slowest), key=lambda one: one[1], default=None)
    return CollectionStatus(**counts, slowest=slowest)


class _Entry:
    """A group in the queue.

    Attributes:
        begun: The policy that its first rollouts began with; None before.
        kept: Rollouts that have ended, by place among the requests, in the order in which they ended.
        newest: The newest attempt of each, by place.
        launch: What runs those that have not ended; None when nothing does.
    """

    def __init__(self, task: TaskGroup) -> None:
        self.task = task
        self.begun: Policy | None = None
        self.kept: dict[int, Rollout] = {}
        self.newest = dict(enumerate(task.requests))
        self.launch: _Launch | None = None
        self._interrupted: set[int] = set()

    def begin(self, policy: Policy, recalled: Mapping[int, Rollout]) -> None:
        self.begun = policy
        self.kept |= recalled
        if self._has_enough:
            self.newest = {place: self.newest[place] for place in recalled}

    @property
    def policy(self) -> Policy:
        assert self.begun is not None, "only what has begun has an age"
        return self.begun

    @property
    def is_whole(self) -> bool:
        return len(self.kept) == len(self.newest)

    @property
    def _has_enough(self) -> bool:
        return sum(one.failure is None for one in self.kept.values()) >= self.task.num_wanted

    def missing(self) -> list[int]:
        """Return the places of rollouts that have not ended."""
        return [place for place in self.newest if place not in self.kept]

    def keep(self, place: int, rollout: Rollout) -> None:
        """Note that a rollout has ended. Of a group that has enough rewards, the others are cancelled."""
        self.kept[place] = rollout
        if self._has_enough:
            self.interrupt(f"`gym_oversample`: its group has {self.task.num_wanted} rollouts with a reward")

    def interrupt(self, why: str) -> None:
        """Cancel what has not ended; it ends as a failure soon."""
        places = [place for place in self.missing() if place not in self._interrupted]
        if places and self.launch is not None:
            self._interrupted.update(places)
            self.launch.interrupt([self.newest[place] for place in places], why)

    def has_interrupted(self, place: int) -> bool:
        """Tell whether a rollout is cancelled because this group does not want it any more."""
        return place in self._interrupted

    def give_up_lost(self, newest: int) -> list[str]:
        """Prepare further attempts of what the loss of the server may have ended, or will not let end, and return the
        ids of the lost ones. A group that has enough rewards without them needs no further attempts.

        Args:
            newest: Version of the weights that the server held last.
        """
        if self.begun is None:
            return []
        ours = {str(version) for version in range(self.begun.version, newest + 1)}
        lost = {}
        for place, request in self.newest.items():
            kept = self.kept.get(place)
            if kept is None or (place not in self._interrupted and _may_be_lost(kept, ours)):
                self.kept.pop(place, None)
                lost[place] = request
        if self._has_enough:
            self.newest = {place: self.newest[place] for place in self.newest if place in self.kept}
        else:
            self.newest |= {place: next_attempt(request) for place, request in lost.items()}
        self._interrupted.intersection_update(self.kept)
        return sorted(request.rollout_id for request in lost.values())

    def ended(self) -> EndedGroup:
        """Return what the group is made of: of more rollouts than wanted, the first that ended with a reward."""
        by_worth = sorted(self.kept, key=lambda place: self.kept[place].failure is not None)
        wanted, surplus = by_worth[: self.task.num_wanted], by_worth[self.task.num_wanted :]
        return EndedGroup(
            task=self.task,
            rollouts=[self.kept[place] for place in sorted(wanted)],
            surplus=[self.kept[place] for place in sorted(surplus)],
            born=self.policy.version,
        )


def _may_be_lost(rollout: Rollout, ours: set[str]) -> bool:
    """Tell whether the loss of the server may be why a rollout ended as it did."""
    kind = None if rollout.failure is None else rollout.failure.kind
    return kind is FailureKind.INFRASTRUCTURE or not ours.issuperset(weight_versions(rollout.records or []))


class _Launch:
    """What runs the missing rollouts of some groups: one collection."""

    def __init__(
        self,
        entries: Sequence[_Entry],
        sampler: Sampler,
        policy: Policy,
        changed: threading.Condition,
        show: Callable[[], None],
    ) -> None:
        self.status: CollectionStatus | None = None
        self._collector, self._changed, self._show = sampler.collector, changed, show
        self._finish = sampler.finisher(policy)
        self._submission: Submission[Rollout] | None = None
        self._is_given_up = False
        self._place: dict[_Key, tuple[int, _Entry, int]] = {}
        self._requests: list[RolloutRequest] = []
        for entry in entries:
            entry.launch = self
            for place in entry.missing():
                self._place[_key(entry.newest[place])] = len(self._requests), entry, place
                self._requests.append(entry.newest[place])

    def start(self) -> None:
        with self._changed:  # rollouts that end at once wait until the submission is known
            self._submission = self._collector.submit(self._requests, self._keep, self._report)
        self._submission.future.add_done_callback(self._notify)

    @property
    def has_ended(self) -> bool:
        """Whether all of its rollouts have ended, without an error that someone has to hear of."""
        future = self._running.future
        return future.done() and future.exception() is None

    def check(self) -> None:
        """Raise what has ended it, if it was an error."""
        if self._running.future.done():
            self._running.future.result()

    def interrupt(self, requests: Sequence[RolloutRequest], why: str) -> None:
        self._running.interrupt([self._place[_key(request)][0] for request in requests], why)

    def give_up(self) -> None:
        """End it; nothing is kept afterwards."""
        self._is_given_up = True
        if self._submission is None:
            return
        try:
            self._submission.cancel()
        except TimeoutError:  # ranks are waiting for this one: what the thread does later is not kept
            logger.warning("%d rollouts that were given up have not ended in time", len(self._requests))

    @property
    def _running(self) -> Submission[Rollout]:
        assert self._submission is not None, "start first"
        return self._submission

    def _keep(self, result: RolloutResult) -> Rollout:
        rollout = self._finish(result)
        kind = None if rollout.failure is None else rollout.failure.kind
        with self._changed:
            if self._is_given_up:
                return rollout
            _, entry, place = self._place[_key(result.request)]
            entry.newest[place] = result.request
            # Where the policy server could not tell which tokens it sampled, or where the whole collection ends, an
            # error is on the way.
            is_known = result.failure is not None or result.records is not None
            is_given_up = kind is FailureKind.CANCELLED and not entry.has_interrupted(place)
            if is_known and not is_given_up and not result.was_lost and kind not in result.retried_kinds:
                entry.keep(place, rollout)
                self._changed.notify_all()
        return rollout

    def _report(self, status: CollectionStatus) -> None:
        self.status = status
        self._show()

    def _notify(self, _: Any) -> None:
        with self._changed:
            self._changed.notify_all()


_Key = tuple[int, int, int]


def _key(request: RolloutRequest) -> _Key:
    return request.batch, request.group, request.member
