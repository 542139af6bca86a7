"""Which weights sampled a call's first and last token, whatever happens while it runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trl_gym.policy_server.middleware.versions import Sampled, WeightHistory


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def history(*pauses: tuple[float, float]) -> WeightHistory:
    """Weights "0", which give way to "1", "2", … in these pauses."""
    clock = Clock()
    found = WeightHistory(clock)
    for place, (stopped, resumed) in enumerate(pauses):
        clock.now = stopped
        found.paused()
        found.changed(str(place))
        clock.now = resumed
        found.resuming()
    return found


def metrics(queued: float, to_first: float, decoding: float) -> dict[str, Any]:
    return {
        "queue_time_ms": queued * 1000,
        "time_to_first_token_ms": to_first * 1000,
        "generation_time_ms": decoding * 1000,
    }


PUSHED = history((10.0, 11.0))


def told(sent: float, answered: float, measured: dict[str, Any] | None) -> tuple[str | None, str | None]:
    return PUSHED.versions(Sampled.of(sent, answered, measured), "1")


def test_a_call_that_was_frozen_has_two_versions() -> None:
    assert told(8.0, 13.0, metrics(0.0, 0.5, 4.4)) == ("0", "1")
    assert told(8.0, 13.0, None) == ("0", "1")  # also where nothing is measured


def test_a_call_that_ended_before_the_push_has_the_old_one_although_its_answer_is_late() -> None:
    assert told(8.0, 11.5, metrics(0.0, 0.5, 1.4)) == ("0", "0")


def test_a_call_that_waited_for_the_push_has_the_new_one() -> None:
    assert told(8.0, 13.0, metrics(3.1, 0.1, 1.8)) == ("1", "1")  # in the engine's queue
    assert told(10.5, 13.0, metrics(0.6, 0.1, 1.8)) == ("1", "1")  # it came while the server was paused
    assert told(10.5, 13.0, None) == ("1", "1")


def test_a_call_before_anything_was_pushed_and_one_that_outlasts_two_pushes() -> None:
    sampled = Sampled.of(8.0, 33.0, metrics(0.0, 0.5, 24.4))
    assert WeightHistory(Clock()).versions(sampled, "default") == ("default", "default")
    assert history((10.0, 11.0), (20.0, 21.0)).versions(sampled, "2") == ("0", "2")


def test_a_new_version_without_a_pause_counts_from_then_on() -> None:
    clock = Clock()
    renamed = WeightHistory(clock)
    clock.now = 10.0
    renamed.changed("0")
    assert renamed.versions(Sampled.of(8.0, 9.9, None), "1") == ("0", "0")
    assert renamed.versions(Sampled.of(10.1, 12.0, None), "1") == ("1", "1")


def test_an_update_in_two_parts_is_one_change() -> None:
    clock = Clock()
    found = WeightHistory(clock)
    found.paused()
    found.changed("0")
    found.changed("1")
    assert found.versions(Sampled.of(-1.0, -0.5, None), "2") == ("0", "0")
    clock.now = 1.0
    found.resuming()
    assert found.versions(Sampled.of(1.5, 2.0, None), "2") == ("2", "2")


def test_versions_that_the_engine_names_itself_count() -> None:
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 9}]
    assert history((1.0, 2.0)).versions(Sampled.of(0.0, 3.0, None, spans), "9") == ("3", "4")
    assert history((1.0, 2.0)).versions(Sampled.of(2.5, 3.0, None, []), "9") == ("9", "9")


@given(
    widths=st.lists(st.floats(0.5, 5.0), min_size=2, max_size=9),
    first=st.floats(0.0, 40.0),
    decoding=st.floats(0.0, 20.0),
    queued=st.floats(0.0, 10.0),
    delays=st.tuples(st.floats(0.0, 0.4), st.floats(0.0, 0.4)),
)
def test_versions_are_those_of_the_stretches_where_tokens_lie(
    widths: list[float], first: float, decoding: float, queued: float, delays: tuple[float, float]
) -> None:
    """Whatever the API server needs, as long as a pause is longer."""
    edges = [5.0 + sum(widths[:end]) for end in range(len(widths) + 1)]
    pauses = [pair for place, pair in enumerate(pairwise(edges)) if place % 2 == 0]

    def sampled_at(moment: float) -> float:  # nothing is sampled in a pause
        return next((end for start, end in pauses if start < moment < end), moment)

    first, last = sampled_at(first), sampled_at(sampled_at(first) + decoding)
    spans = metrics(queued, 0.25, last - first)
    sampled = Sampled.of(first - 0.25 - queued - delays[0], last + delays[1], spans)
    expected = tuple(str(sum(resumed <= moment for _, resumed in pauses)) for moment in (first, last))
    on_edge = any(abs(moment - edge) < 1e-6 for moment in (first, last) for edge in edges)
    found = history(*pauses).versions(sampled, str(len(pauses)))
    assert found == expected or (on_edge and all(map(str.__le__, map(str, found), expected)))
