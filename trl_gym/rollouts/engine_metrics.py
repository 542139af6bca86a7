"""Metrics of the engines behind a policy server during one phase of rollouts, from what they count themselves.

vLLM counts since its start and shows it at `GET /metrics`, in Prometheus' text format (version 0.0.4). Read before a
phase and after it, the differences are the phase's. Every counter is there once per engine; those of all engines of
all servers are added.

| metric | of the counters |
|---|---|
| `engine/prefix_cache_hit_rate` | `vllm:prefix_cache_hits` ÷ `vllm:prefix_cache_queries`, both in tokens |
| `engine/preemptions` | `vllm:num_preemptions` |
| `engine/prompt_tokens_per_second`, `engine/generation_tokens_per_second` | `vllm:…_tokens` ÷ seconds |
| `engine/running`, `engine/waiting` | sums of `vllm:request_inference_time_seconds`, `…_queue_time_…` ÷ seconds |

The last line is Little's law: as many requests run on average as the seconds that requests ran, divided by those that
passed. It is exact where every request of the phase ends in it, and costs no look in between.

A metric is left out, never 0, where its counters are missing (another engine, `--disable-log-stats`), are not numbers,
or are not the same ones before and after: a server that restarted meanwhile counts from zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Series = tuple[int, str, str]  # index of the server, name of the counter, its labels as they stand

_COUNTERS = {
    "hits": "vllm:prefix_cache_hits_total",
    "queries": "vllm:prefix_cache_queries_total",
    "preemptions": "vllm:num_preemptions_total",
    "prompt": "vllm:prompt_tokens_total",
    "generation": "vllm:generation_tokens_total",
    "running": "vllm:request_inference_time_seconds_sum",
    "waiting": "vllm:request_queue_time_seconds_sum",
}
_NAMES = frozenset(_COUNTERS.values())
_VALUE = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"  # neither NaN nor infinite
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*"'
_SAMPLE = re.compile(
    rf"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{(?P<labels>(?:{_LABEL}(?:,{_LABEL})*,?)?)\}})?[ \t]+(?P<value>{_VALUE})"
    r"(?:[ \t]+-?\d+)?[ \t]*"
)


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """The counters at one moment."""

    at: float  # on a clock, in seconds
    values: Mapping[Series, float] = field(default_factory=dict)


def parse_counters(texts: Sequence[str], at: float) -> EngineCounters:
    """Read the counters that metrics are made of.

    A counter that has one line which is not a sample with a finite number is left out, on all servers.

    Args:
        texts: One answer to `GET /metrics` per server.
        at: When they were read.
    """
    values: dict[Series, float] = {}
    broken: set[str] = set()
    for server, text in enumerate(texts):
        for line in text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name not in _NAMES:
                continue
            sample = _SAMPLE.fullmatch(line)
            value = math.inf if sample is None else float(sample["value"])
            if sample is None or not math.isfinite(value) or value < 0:
                broken.add(name)
            else:
                values[server, name, sample["labels"] or ""] = value
    return EngineCounters(at, {series: value for series, value in values.items() if series[1] not in broken})


def engine_metrics(before: EngineCounters, after: EngineCounters) -> dict[str, float]:
    """Return the metrics of the time between two looks.

    Args:
        after: The second look, at the same servers.
    """
    passed = after.at - before.at
    if passed <= 0:
        return {}
    counted = {key: _difference(name, before, after) for key, name in _COUNTERS.items()}
    hits, queries = counted["hits"], counted["queries"]
    metrics = {
        "prefix_cache_hit_rate": hits / queries if hits is not None and queries else None,
        "preemptions": counted["preemptions"],
        **{f"{kind}_tokens_per_second": _per(counted[kind], passed) for kind in ("prompt", "generation")},
        **{state: _per(counted[state], passed) for state in ("running", "waiting")},
    }
    return {f"engine/{name}": value for name, value in metrics.items() if value is not None}


def _difference(name: str, before: EngineCounters, after: EngineCounters) -> float | None:
    """Return what was counted in between, over all engines; None where that cannot be said."""
    series = [one for one in after.values if one[1] == name]
    if not series or set(series) != {one for one in before.values if one[1] == name}:
        return None
    differences = [after.values[one] - before.values[one] for one in series]
    return None if min(differences) < 0 else sum(differences)


def _per(value: float | None, seconds: float) -> float | None:
    return None if value is None else value / seconds
