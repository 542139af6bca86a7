"""Two ends of one transfer: whatever happens to one of them, no one waits forever."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import WeightSyncError
from trl_gym.weight_sync.transports.nccl import BoundedQueue, QueueClosedError, ThreadGroup

LONG_S = 60.0


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()  # lets the daemon threads go


def test_results_come_by_name() -> None:
    threads = ThreadGroup(LONG_S)
    threads.start("one", lambda: 1)
    threads.start("two", lambda: 2)
    assert threads.wait() == {"one": 1, "two": 2}


def test_the_first_failure_is_raised_though_the_other_hangs(never: threading.Event) -> None:
    failed = threading.Event()
    threads = ThreadGroup(LONG_S, on_failure=failed.set)
    threads.start("hangs", never.wait)
    threads.start("fails", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        threads.wait()
    assert failed.wait(LONG_S)


def test_the_cause_is_raised_and_not_what_it_caused() -> None:
    outgoing: BoundedQueue[int] = BoundedQueue(1)
    threads = ThreadGroup(LONG_S, on_failure=outgoing.close)
    threads.start("takes", lambda: list(outgoing))
    threads.start("fails", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        threads.wait()


def test_time_is_up_names_who_is_late(never: threading.Event) -> None:
    given_up = threading.Event()
    threads = ThreadGroup(0.05, on_failure=given_up.set)
    threads.start("the server, to load", never.wait)
    with pytest.raises(WeightSyncError, match=r"within 0.05 s; still waiting for: the server, to load") as caught:
        threads.wait()
    assert given_up.is_set() and caught.value.silent_s == 0.05, "what it was waited for counts when it is looked at"


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12))
def test_items_arrive_in_order_and_bytes_are_bounded(sizes: list[int], max_bytes: int) -> None:
    outgoing: BoundedQueue[int] = BoundedQueue(max_bytes)
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.extend(outgoing))
    thread.start()
    for place, size in enumerate(sizes):
        assert outgoing.put(place, size, LONG_S)
        assert outgoing._num_bytes <= max(max_bytes, size)
    outgoing.finish()
    thread.join(LONG_S)
    assert taken == list(range(len(sizes)))


def test_an_item_bigger_than_the_limit_is_alone() -> None:
    outgoing: BoundedQueue[str] = BoundedQueue(10)
    assert outgoing.put("big", 99, LONG_S)
    assert not outgoing.put("small", 1, 0.01)  # no room, and no one takes anything
    assert next(iter(outgoing)) == "big"
    assert outgoing.put("small", 1, LONG_S)


def test_closing_wakes_both_sides() -> None:
    outgoing: BoundedQueue[str] = BoundedQueue(1)
    assert outgoing.put("a", 1, LONG_S)
    closing = threading.Timer(0.05, outgoing.close)
    closing.start()
    assert not outgoing.put("b", 1, LONG_S)
    with pytest.raises(QueueClosedError):
        list(outgoing)
    assert not outgoing.put("c", 1, LONG_S)
    closing.join()
