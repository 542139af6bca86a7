"""What engines count becomes metrics of a phase; what cannot be said is left out, and nothing raises."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.rollouts.engine_metrics import engine_metrics, parse_counters

NAMES = {
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_queue_time_seconds_sum",
}
METRICS = {
    "engine/prefix_cache_hit_rate",
    "engine/preemptions",
    "engine/running",
    "engine/waiting",
    "engine/prompt_tokens_per_second",
    "engine/generation_tokens_per_second",
}
amounts = st.floats(0, 1e15)


def text(values: dict[tuple[str, int], float]) -> str:
    """As prometheus_client writes it."""
    lines = ["# HELP vllm:num_preemptions_total Cumulative number.", "# TYPE vllm:num_preemptions_total counter"]
    lines += [
        f'{name}{{engine="{engine}",model_name="po,l}}icy"}} {value!r}' for (name, engine), value in values.items()
    ]
    return "\n".join([*lines, "python_info 1.0", 'vllm:num_requests_running{engine="0"} 3.0', ""])


def counted(names: set[str], first: float, engines: int = 2) -> dict[tuple[str, int], float]:
    places = itertools.product(sorted(names), range(engines))
    return {place: first * number for number, place in enumerate(places, start=1)}


def test_the_differences_of_all_engines_and_servers_are_the_metrics() -> None:
    def look(hits: float, seconds: float) -> list[str]:
        first = {("vllm:prefix_cache_hits_total", 0): hits, ("vllm:prefix_cache_hits_total", 1): 2 * hits}
        queries = {("vllm:prefix_cache_queries_total", engine): 4 * hits for engine in (0, 1)}
        second = {
            ("vllm:generation_tokens_total", 0): 100 * seconds,
            ("vllm:request_inference_time_seconds_sum", 0): 7 * seconds,
        }
        return [text(first | queries | second), text(second)]

    metrics = engine_metrics(parse_counters(look(10, 1), at=50.0), parse_counters(look(30, 3), at=54.0))
    assert metrics == {
        "engine/prefix_cache_hit_rate": 60 / 160,
        "engine/generation_tokens_per_second": 2 * 200 / 4,
        "engine/running": 2 * 14 / 4,
    }


@given(before=amounts, more=amounts, seconds=st.floats(1e-3, 1e5))
def test_every_metric_is_there_and_none_is_negative(before: float, more: float, seconds: float) -> None:
    looks = [
        parse_counters([text(counted(NAMES, value))], at)
        for value, at in ((before, 1.0), (before + more, 1 + seconds))
    ]
    metrics = engine_metrics(*looks)
    assert METRICS - metrics.keys() <= {"engine/prefix_cache_hit_rate"}  # where nothing was looked for
    assert min(metrics.values()) >= 0


@given(missing=st.sampled_from(sorted(NAMES)))
def test_what_is_not_counted_is_left_out_alone(missing: str) -> None:
    looks = [parse_counters([text(counted(NAMES - {missing}, value))], at) for value, at in ((1.0, 1.0), (2.0, 2.0))]
    assert len(METRICS - engine_metrics(*looks).keys()) == 1


@pytest.mark.parametrize(
    "line",
    [
        'vllm:num_preemptions_total{engine="0"} NaN',
        'vllm:num_preemptions_total{engine="0"} +Inf',
        'vllm:num_preemptions_total{engine="0"} -1',
        'vllm:num_preemptions_total{engine="0"} 1e999',
        'vllm:num_preemptions_total{engine="0"}',
        'vllm:num_preemptions_total{engine="0} 1',
        "vllm:num_preemptions_total{engine=0} 1",
        "vllm:num_preemptions_total one",
        "vllm:num_preemptions_total 1 2 3",
    ],
)
def test_a_line_that_is_no_sample_takes_its_metric_out(line: str) -> None:
    looks = [
        parse_counters([f"{text(counted(NAMES, value))}\n{line}\n"], at) for value, at in ((1.0, 1.0), (2.0, 2.0))
    ]
    assert METRICS - engine_metrics(*looks).keys() == {"engine/preemptions"}


@given(
    garbage=st.lists(st.one_of(st.text(), st.sampled_from(sorted(NAMES)).flatmap(lambda n: st.text().map(n.__add__))))
)
def test_nothing_that_a_server_says_raises(garbage: list[str]) -> None:
    looks = [parse_counters(garbage, at) for at in (1.0, 2.0)]
    assert all(value == 0 for value in engine_metrics(*looks).values())  # the same twice


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (counted(NAMES, 5.0), counted(NAMES, 1.0)),  # restarted
        (counted(NAMES, 1.0), counted(NAMES, 5.0, engines=3)),  # another engine has come
        (counted(NAMES, 1.0), counted(NAMES, 5.0, engines=1)),
        ({}, counted(NAMES, 5.0)),
        (counted(NAMES, 1.0), {}),
    ],
)
def test_counters_that_are_not_the_same_ones_say_nothing(
    before: dict[tuple[str, int], float], after: dict[tuple[str, int], float]
) -> None:
    assert engine_metrics(parse_counters([text(before)], 1.0), parse_counters([text(after)], 2.0)) == {}


def test_no_time_and_no_server_say_nothing() -> None:
    look = parse_counters([text(counted(NAMES, 1.0))], at=1.0)
    assert engine_metrics(look, look) == {}
    assert engine_metrics(parse_counters([], 1.0), parse_counters([], 2.0)) == {}
