"""The collector against a real local HTTP server that plays a Gym agent."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import until
from tests.rollouts.fake_agent import Ledger, collect, make, requests
from trl_gym.errors import FailureKind, PolicyServerError, PolicyServerLostError, ServerError
from trl_gym.gym.servers import AgentInfo
from trl_gym.policy_server.middleware.identity import ROLLOUT_HEADER, rollout_key
from trl_gym.rollout_options import Sampling
from trl_gym.rollouts.attempts import CollectionStatus, Phase
from trl_gym.rollouts.collector import RolloutCollector, RolloutResult, Submission
from trl_gym.rollouts.request import PolicyAccess, stamp


async def test_results_come_in_the_order_of_the_requests(agent: Any) -> None:
    _, lookup = agent
    seen: list[CollectionStatus] = []
    rows = [{"seconds": 0.2 - 0.05 * index} for index in range(4)]
    results = await collect(lookup, rows, progress=seen.append)
    assert [result.answer["reward"] for result in results] == [0.0, 1.0, 2.0, 3.0]
    assert all(result.failure is None and result.seconds > 0 for result in results)
    ends = [status for status in seen if status.num_done]
    assert [status.num_done for status in ends] == [1, 2, 3, 4]
    assert [status.num_running for status in ends] == [3, 2, 1, 0]
    assert all((status.num_failed, status.num_total) == (0, 4) for status in seen)
    assert [status.slowest is None for status in ends] == [False, False, False, True]


async def test_one_failure_leaves_its_siblings_alone(agent: Any) -> None:
    _, lookup = agent
    rows = [{}, {"do": "raise"}, {"do": "drop"}, {"seconds": 30, "agent": "slow"}, {}]
    results = await collect(lookup, rows, environments={"slow": {"deadline": 0.5}})
    kinds = [result.failure.kind if result.failure else None for result in results]
    assert kinds == [None, FailureKind.ENVIRONMENT, FailureKind.INFRASTRUCTURE, FailureKind.DEADLINE, None]
    assert "the verifier raised" in results[1].failure.text


async def test_the_cap_holds(agent: Any) -> None:
    behaviour, lookup = agent
    await collect(lookup, [{"seconds": 0.05}] * 20, max_inflight=3)
    assert behaviour.most_at_once <= 3
    assert behaviour.started == 20


async def test_a_dead_server_ends_the_collection_at_once(agent: Any) -> None:
    """NeMo Gym retries a refused connection forever: waiting for the deadline would hang the run."""
    behaviour, lookup = agent

    def check() -> None:
        if behaviour.running == 3:
            raise ServerError("policy server ended (exit code 9)")

    ended: list[RolloutResult] = []
    with pytest.raises(ServerError, match="exit code 9"):
        await collect(lookup, [{"seconds": 30}] * 3, check=check, deadline_s=60.0, finish=ended.append)
    assert [(result.failure.kind, result.failure.rollout_id) for result in ended] == [
        (FailureKind.CANCELLED, f"r{index}") for index in range(3)
    ]
    await until(lambda: behaviour.cancelled == 3)
    assert behaviour.cancelled == 3


async def test_an_engine_that_hangs_ends_the_collection(agent: Any) -> None:
    """Its rollouts would wait for their deadlines."""
    behaviour, lookup = agent
    with pytest.raises(PolicyServerLostError, match="the engine of http://policy hangs"):
        await collect(lookup, [{"seconds": 30}] * 2, ledger=Ledger("http://policy"), deadline_s=60.0)
    await until(lambda: behaviour.cancelled == 2)


async def test_an_error_in_finish_reaches_the_caller(agent: Any) -> None:
    _, lookup = agent

    def finish(result: RolloutResult) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        await collect(lookup, [{}, {"seconds": 20}], finish=finish)


async def test_finish_runs_in_the_collectors_thread_as_rollouts_end(agent: Any) -> None:
    _, lookup = agent
    threads: set[str] = set()

    def finish(result: RolloutResult) -> RolloutResult:
        threads.add(threading.current_thread().name)
        return result

    await collect(lookup, [{}] * 3, finish=finish)
    assert threads == {"trl-gym-collector"}


async def test_a_collector_can_be_used_again_and_after_close(agent: Any) -> None:
    _, lookup = agent
    collector = make(lookup, max_inflight=4)
    for _ in range(2):
        for _ in range(2):
            assert len(await asyncio.to_thread(collector.collect, requests({}, {}), lambda result: result)) == 2
        await asyncio.to_thread(collector.close)
    collector.close()


async def test_an_unknown_agent_is_an_error_not_a_failed_rollout(agent: Any) -> None:
    from trl_gym.errors import ConfigError

    def lookup(name: str) -> AgentInfo:
        raise ConfigError(f"there is no agent `{name}`")

    with pytest.raises(ConfigError, match="no agent `a`"):
        await collect(lookup, [{}])


async def test_each_result_brings_the_records_of_its_calls(agent: Any) -> None:
    _, lookup = agent
    ledger = Ledger()
    results = await collect(lookup, [{}, {"do": "raise"}], ledger=ledger)
    assert [result.records for result in results] == [[{"status": 200, "of": name}] for name in ("r0", "r1")]
    assert ledger.cancelled == []
    assert [result.records for result in await collect(lookup, [{}])] == [None]


async def test_a_rollout_that_missed_its_deadline_is_cancelled_at_the_policy_server(agent: Any) -> None:
    """NeMo Gym before 0.7 would go on with it."""
    _, lookup = agent
    ledger = Ledger()
    rows = [{}, {"seconds": 30, "agent": "slow"}]
    results = await collect(lookup, rows, ledger=ledger, environments={"slow": {"deadline": 0.5}})
    assert results[1].failure.kind is FailureKind.DEADLINE
    assert ledger.cancelled == [["r1"]]
    assert sorted(ledger.taken) == ["r0", "r1"]


async def test_what_runs_when_a_collection_ends_early_is_cancelled_together(agent: Any) -> None:
    _, lookup = agent
    ledger = Ledger()

    def finish(result: RolloutResult) -> RolloutResult:
        if result.request.rollout_id == "r1":
            raise OSError("no space left on device")
        return result

    rows = [{}, {"after": 3}, *[{"seconds": 20}] * 3]
    with pytest.raises(OSError, match="no space left"):
        await collect(lookup, rows, finish=finish, ledger=ledger, max_inflight=2)
    [cancelled] = ledger.cancelled
    assert "r2" in cancelled
    assert not {"r0", "r1", "r4"} & set(cancelled)  # two have ended, one has never begun


async def test_giving_up_tells_the_policy_server_before_the_session_closes(agent: Any) -> None:
    """As Ctrl-C does: the trainer's thread stops waiting and closes the collector at once."""
    behaviour, lookup = agent
    ledger = Ledger()
    collector = make(lookup, deadline_s=60.0, ledger=ledger)
    future = collector.submit(requests({"seconds": 30}, {"seconds": 30}), lambda result: result).future
    await until(lambda: behaviour.running == 2)
    future.cancel()
    await asyncio.to_thread(collector.close)
    assert ledger.cancelled == [["r0", "r1"]]


async def test_closing_gives_up_what_still_runs(agent: Any) -> None:
    behaviour, lookup = agent
    ledger = Ledger()
    collector = make(lookup, deadline_s=60.0, ledger=ledger)
    future = collector.submit(requests({"seconds": 30}), lambda result: result).future
    await until(lambda: behaviour.running)
    await asyncio.to_thread(collector.close)
    assert future.cancelled()
    assert ledger.cancelled == [["r0"]]


async def test_a_policy_server_that_cannot_be_told_does_not_hide_the_cause(agent: Any, caplog: Any) -> None:
    behaviour, lookup = agent
    ledger = Ledger()

    def check() -> None:
        if not behaviour.running:
            return
        ledger.broken = PolicyServerError("connection refused")
        raise ServerError("policy server ended (exit code 9)")

    with caplog.at_level(logging.WARNING), pytest.raises(ServerError, match="exit code 9"):
        await collect(lookup, [{"seconds": 30}], check=check, ledger=ledger)
    assert "1 rollouts could not be cancelled" in caplog.text and "connection refused" in caplog.text


async def test_records_that_cannot_be_had_end_the_collection(agent: Any) -> None:
    _, lookup = agent
    ledger = Ledger()
    ledger.broken = PolicyServerError("this server keeps no records")
    with pytest.raises(PolicyServerError, match="keeps no records"):
        await collect(lookup, [{}], ledger=ledger)


async def test_nothing_is_left_behind(agent: Any) -> None:
    _, lookup = agent
    collector = make(lookup, deadline_s=0.3, retries={"infrastructure": 1}, ledger=Ledger())
    rows = [{}] * 20 + [{"do": "drop"}] * 5 + [{"seconds": 5}] * 5
    for _ in range(2):
        await asyncio.to_thread(collector.collect, requests(*rows), lambda result: result)
    worker = collector._worker
    left = asyncio.run_coroutine_threadsafe(_tasks(), worker._loop).result()
    assert left == 1, "only the one that counts"
    threads = {thread.name for thread in threading.enumerate()}
    assert "trl-gym-collector" in threads
    await asyncio.to_thread(collector.close)
    assert worker.session.closed and worker._loop.is_closed()
    assert not [thread for thread in threading.enumerate() if thread.name == "trl-gym-collector"]


async def _tasks() -> int:
    return len(asyncio.all_tasks())


async def test_an_agent_gets_the_key_of_its_rollout_and_no_record_has_it(agent: Any) -> None:
    behaviour, lookup = agent
    options: dict[str, Any] = {"task_index": 0, "member": 0, "sampling": Sampling(), "completion_budget": 9}
    row = stamp({"responses_create_params": {"input": "x"}}, rollout_id="r0", **options)
    takes = dataclasses.replace(lookup("a"), run_fields=frozenset({"policy_base_url", "policy_api_key"}))
    access = PolicyAccess(("http://policy:1/v1",), "the-key")
    [result] = await collect(lambda _: takes, [row], access=access)
    assert result.failure is None
    [(headers, received)] = behaviour.received
    key = rollout_key("the-key", result.request.tag)
    assert headers[ROLLOUT_HEADER] == key
    assert (received["policy_base_url"], received["policy_api_key"]) == ("http://policy:1/v1", key)
    assert key not in str(result.request)


async def test_a_failure_quotes_no_key(agent: Any) -> None:
    _, lookup = agent
    key = rollout_key("the-key", {"rollout": "r0"})
    [result] = await collect(lookup, [{"do": "raise", "text": f"POST http://x/trl_gym/rollouts/{key}/v1: HTTP 404"}])
    assert result.failure.text == "POST http://x/trl_gym/rollouts/[redacted]/v1: HTTP 404"


# -- single rollouts that are ended early, and collections that are given up ------------------------------------------


class Recording:
    """A `finish` that keeps what it is given, and may do something when a rollout ends."""

    def __init__(self, then: Callable[[RolloutResult], None] = lambda result: None) -> None:
        self.ended: list[RolloutResult] = []
        self.then = then

    def __call__(self, result: RolloutResult) -> RolloutResult:
        self.ended.append(result)
        self.then(result)
        return result

    def names(self) -> list[str]:
        return [result.request.rollout_id for result in self.ended]


async def outcome(submission: Submission[RolloutResult]) -> list[RolloutResult]:
    return await asyncio.wrap_future(submission.future)


async def leave(collector: RolloutCollector[Any]) -> None:
    """Close a collector in which nothing runs any more, and no place is taken."""
    worker = collector._worker
    assert worker is not None
    await until(lambda: asyncio.run_coroutine_threadsafe(_tasks(), worker._loop).result() == 1, "no task is left")
    assert not worker._running and not worker.admission._running.total() and not worker.session.connector._acquired
    await asyncio.to_thread(collector.close)


async def test_a_rollout_that_runs_is_ended_alone_and_its_records_are_kept(agent: Any) -> None:
    behaviour, lookup = agent
    ledger, finish = Ledger(), Recording()
    options = {"retries": {"infrastructure": 3, "deadline": 3}, "max_inflight": 2, "deadline_s": 60.0}
    collector = make(lookup, ledger=ledger, **options)
    submission = collector.submit(requests({"seconds": 30}, {"seconds": 30}, {}), finish)
    await until(lambda: behaviour.running == 2)
    submission.interrupt([0], "its group has enough")
    submission.interrupt([0], "again")
    await until(lambda: sorted(finish.names()) == ["r0", "r2"], "the place went to the one that waited")
    submission.interrupt([1, 2, 0], "the batch is full")
    results = await outcome(submission)
    assert [result.failure and (result.failure.kind, result.failure.text) for result in results] == [
        (FailureKind.CANCELLED, "its group has enough"),
        (FailureKind.CANCELLED, "the batch is full"),
        None,
    ]
    assert results[0].failure.as_json().items() >= {"rollout_id": "r0", "where": "a /run", "attempt": 0}.items()
    assert results[0].failure.seconds > 0
    assert [result.records for result in results] == [[{"status": 200, "of": f"r{place}"}] for place in range(3)]
    assert ledger.cancelled == [["r0"], ["r1"]] and sorted(ledger.taken) == ["r0", "r1", "r2"]
    assert sorted(finish.names()) == ["r0", "r1", "r2"] and behaviour.started == 3
    submission.interrupt([0, 1, 2], "too late")
    await leave(collector)
    submission.interrupt([0, 1, 2], "much too late")
    submission.cancel()


async def test_what_never_ran_is_not_told_to_the_policy_server(agent: Any) -> None:
    """One waits for a place; one pauses before another attempt; one has not even begun."""
    behaviour, lookup = agent
    ledger, finish = Ledger(), Recording()
    collector = make(lookup, ledger=ledger, max_inflight=1, deadline_s=60.0, retries={"infrastructure": 5})
    first = collector.submit(requests({"do": "drop"}), finish)
    await until(lambda: finish.names() == ["r0"])
    blocker = collector.submit(requests({"seconds": 30, "name": "blocker"}), lambda result: result)
    await until(lambda: behaviour.running == 1 and ledger.cancelled, "the blocker runs, the other pauses or waits")
    asked = (list(ledger.cancelled), list(ledger.taken))
    first.interrupt([0], "enough")
    second = collector.submit(requests({}, {}), finish)
    second.interrupt([0, 1], "enough")
    results = [*await outcome(first), *await outcome(second)]
    assert [(result.failure.kind, result.seconds, result.records) for result in results] == [
        (FailureKind.CANCELLED, 0.0, [])
    ] * 3
    assert [result.request.rollout_id for result in results] == ["r0-a1", "r0", "r1"]
    assert (ledger.cancelled, ledger.taken) == asked and behaviour.started == 2
    await asyncio.to_thread(blocker.cancel)
    await leave(collector)


async def test_finish_ends_siblings_and_what_ends_meanwhile_stays_as_it_is(agent: Any) -> None:
    behaviour, lookup = agent

    def enough(result: RolloutResult) -> None:
        if result.failure is None:
            submission.interrupt(range(4), "its group has enough")

    finish = Recording(enough)
    collector = make(lookup, deadline_s=60.0, ledger=Ledger())
    submission = collector.submit(requests({"after": 4}, *[{"seconds": 30}] * 3), finish)
    results = await outcome(submission)
    assert [result.failure and result.failure.text for result in results] == [None, *["its group has enough"] * 3]
    await until(lambda: behaviour.cancelled == 3)
    await leave(collector)


async def test_no_attempt_follows_one_whose_records_are_fetched_when_it_is_ended(agent: Any) -> None:
    _, lookup = agent
    asked, may_answer = threading.Event(), threading.Event()

    class Slow(Ledger):
        async def take(self, session: Any, rollout_id: str) -> tuple[list[Any], str]:
            asked.set()
            await asyncio.to_thread(may_answer.wait)
            return await super().take(session, rollout_id)

    collector = make(lookup, ledger=Slow(), retries={"environment": 5})
    finish = Recording()
    submission = collector.submit(requests({"do": "raise"}), finish)
    await asyncio.to_thread(asked.wait)
    submission.interrupt([0], "enough")
    may_answer.set()
    [result] = await outcome(submission)
    assert finish.ended == [result] and result.retried_kinds == frozenset()
    assert result.failure.kind is FailureKind.ENVIRONMENT and result.records == [{"status": 200, "of": "r0"}]
    await leave(collector)


async def test_an_end_that_the_policy_server_cannot_be_told_is_that_of_the_collection(agent: Any) -> None:
    behaviour, lookup = agent
    ledger, finish = Ledger(), Recording()
    collector = make(lookup, ledger=ledger, deadline_s=60.0)
    submission = collector.submit(requests({"seconds": 30}, {"seconds": 30}), finish)
    await until(lambda: behaviour.running == 2)
    ledger.broken = PolicyServerLostError("no answer within 60 s")
    submission.interrupt([0], "enough")
    with pytest.raises(PolicyServerLostError, match="no answer within"):
        await outcome(submission)
    submission.cancel()
    texts = [(result.failure.text, result.records, result.was_lost) for result in finish.ended]
    assert texts == [("enough", None, True), ("the collection ended while it ran", None, False)]
    await leave(collector)


async def test_giving_up_waits_until_the_policy_server_was_told(agent: Any) -> None:
    behaviour, lookup = agent
    ledger, finish = Ledger(), Recording()
    collector = make(lookup, ledger=ledger, deadline_s=60.0)
    other = collector.submit(requests({"seconds": 30, "name": "other"}), finish)
    submission = collector.submit(requests({}, {"seconds": 30}), finish)
    await until(lambda: behaviour.running == 2 and finish.ended)
    for _ in range(2):
        await asyncio.to_thread(submission.cancel)
        assert ledger.cancelled == [["r1"]] and finish.names() == ["r0", "r1"]
    assert submission.future.cancelled() and not other.future.done()
    unborn = collector.submit(requests({"seconds": 30}), finish)
    unborn.cancel()
    ended = finish.names()
    assert unborn.future.cancelled()
    assert ended in (["r0", "r1"], ["r0", "r1", "r0"]), "the second where it had begun already"
    await asyncio.to_thread(other.cancel)
    await leave(collector)
    assert finish.names()[: len(ended)] == ended and len(finish.names()) == len(ended) + 1


async def test_a_place_that_does_not_exist_is_the_callers_error(agent: Any) -> None:
    _, lookup = agent
    collector = make(lookup)
    submission = collector.submit(requests({}), lambda result: result)
    with pytest.raises(IndexError):
        submission.interrupt([1], "enough")
    assert (await outcome(submission))[0].failure is None
    await leave(collector)


async def test_places_and_stall_warnings_belong_to_the_collection_that_they_are_for(agent: Any, caplog: Any) -> None:
    """One place: the older collection's further attempt gets it before the younger one, which warns of its own."""
    behaviour, lookup = agent
    collector = make(lookup, max_inflight=1, deadline_s=60.0, retries={"infrastructure": 1}, stall_timeout_s=0.2)
    blocker, older, younger = (
        collector.submit([dataclasses.replace(one, rollout_id=name) for one in requests(*rows)], Recording())
        for name, rows in (
            ("blocker", [{"seconds": 30, "name": "blocker"}]),
            ("older", [{"do": "drop", "times": 1, "name": "older"}]),
            ("younger", [{"seconds": 30, "name": "younger"}] * 2),
        )
    )
    with caplog.at_level(logging.WARNING):
        await until(lambda: len(set(_outstanding(caplog.text))) == 3, "each warns")
    assert all(len(set(_outstanding(record.message))) == 1 for record in caplog.records)
    await asyncio.to_thread(blocker.cancel)
    waits = (Phase.WAITING, 1)
    await until(lambda: [(one.phase, one.attempt) for one in older._collection._tally.outstanding.values()] == [waits])
    younger.interrupt([0], "enough")
    assert (await outcome(older))[0].request.attempt == 1
    await until(lambda: behaviour.started == 5)
    names = [row["name"] for _, row in behaviour.received]
    assert names == ["blocker", "older", "younger", "older", "younger"]
    await asyncio.to_thread(younger.cancel)
    await leave(collector)


def _outstanding(warning: str) -> list[str]:
    return re.findall(r"^  (\w+) \(", warning, re.MULTILINE)
