"""Two ends of one transfer: whatever happens to one of them, nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import WeightSyncError
from trl_gym.weight_sync.transports.nccl import Handover, HandoverClosedError, Together

LONG_S = 60.0


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()  # lets the daemon threads go


def test_results_come_by_name() -> None:
    both = Together(LONG_S)
    both.start("one", lambda: 1)
    both.start("two", lambda: 2)
    assert both.wait() == {"one": 1, "two": 2}


def test_the_first_failure_is_raised_though_the_other_hangs(never: threading.Event) -> None:
    failed = threading.Event()
    both = Together(LONG_S, on_failure=failed.set)
    both.start("hangs", never.wait)
    both.start("fails", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        both.wait()
    assert failed.wait(LONG_S)


def test_the_cause_is_raised_and_not_what_it_caused() -> None:
    handover: Handover[int] = Handover(1)
    both = Together(LONG_S, on_failure=handover.close)
    both.start("takes", lambda: list(handover))
    both.start("fails", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        both.wait()


def test_time_is_up_names_who_is_late(never: threading.Event) -> None:
    given_up = threading.Event()
    both = Together(0.05, on_failure=given_up.set)
    both.start("the server, to load", never.wait)
    with pytest.raises(WeightSyncError, match=r"within 0.05 s \(`gym_sync_timeout`\).*the server, to load"):
        both.wait()
    assert given_up.is_set()


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12))
def test_items_arrive_in_order_and_bytes_are_bounded(sizes: list[int], max_bytes: int) -> None:
    handover: Handover[int] = Handover(max_bytes)
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.extend(handover))
    thread.start()
    for place, size in enumerate(sizes):
        assert handover.put(place, size, LONG_S)
        assert handover._num_bytes <= max(max_bytes, size)
    handover.finish()
    thread.join(LONG_S)
    assert taken == list(range(len(sizes)))


def test_an_item_bigger_than_the_limit_is_alone() -> None:
    handover: Handover[str] = Handover(10)
    assert handover.put("big", 99, LONG_S)
    assert not handover.put("small", 1, 0.01)  # no room, and nobody takes anything
    assert next(iter(handover)) == "big"
    assert handover.put("small", 1, LONG_S)


def test_closing_wakes_both_sides() -> None:
    handover: Handover[str] = Handover(1)
    assert handover.put("a", 1, LONG_S)
    closing = threading.Timer(0.05, handover.close)
    closing.start()
    assert not handover.put("b", 1, LONG_S)
    with pytest.raises(HandoverClosedError):
        list(handover)
    assert not handover.put("c", 1, LONG_S)
    closing.join()
