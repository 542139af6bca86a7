"""Summarize a journal per environment (`trl-gym rollout`) or set (`trl-gym eval`): data, tables, piped lines."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_gym.commands.collect import Job, counted
from trl_gym.responses import model_call_indices, output_items
from trl_gym.rollouts.evaluation import attempt_metrics
from trl_gym.rollouts.metrics import mean, percentile
from trl_gym.rollouts.rollout import components_of, success_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of one rollout: the part of a journal's line that summaries need."""

    dataset: str  # name of its file
    task: str  # task hash
    agent: str  # environment
    failure: str | None  # kind of failure; None when it has a reward
    reward: float | None  # its reward; None when it failed
    success: float | None  # 0 to 1; None when it failed
    turns: int  # model calls
    seconds: float  # wall time
    components: Mapping[str, float] = field(default_factory=dict)  # its reward components by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Rollouts of one environment. Numbers that need a reward leave failed rollouts out; None where there is none."""

    rollouts: int  # number of rollouts, failed ones included
    failed: dict[str, int]  # number of failed ones by kind of failure
    reward_mean: float | None  # mean reward
    reward_std: float | None  # sample standard deviation of the reward; 0.0 for a single rollout
    reward_components: dict[str, float]  # mean of each component, of the rollouts that have it
    success: float | None  # mean success
    turns: float | None  # mean number of model calls
    seconds_p50: float | None  # median of wall times
    seconds_p95: float | None  # 95th percentile of wall times


def outcomes(records: Iterable[Mapping[str, Any]], jobs: Sequence[Job]) -> list[Outcome]:
    """Return how the rollouts that were asked for have ended, see `collect.counted`."""
    return counted(records, jobs, _outcome)


def summarize(ended: Iterable[Outcome]) -> dict[str, Summary]:
    """Summarize by environment, in the order of their names."""
    return {agent: _summary_of(own) for agent, own in _by_agent(ended)}


def _by_agent(ended: Iterable[Outcome]) -> list[tuple[str, list[Outcome]]]:
    by_agent: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in ended:
        by_agent[outcome.agent].append(outcome)
    return sorted(by_agent.items())


def _summary_of(ended: Sequence[Outcome]) -> Summary:
    good = [outcome for outcome in ended if outcome.failure is None]
    rewards = [outcome.reward for outcome in good if outcome.reward is not None]
    seconds = [outcome.seconds for outcome in good]
    return Summary(
        rollouts=len(ended),
        failed=dict(Counter(outcome.failure for outcome in ended if outcome.failure is not None).most_common()),
        reward_mean=mean(rewards),
        reward_std=(statistics.stdev(rewards) if len(rewards) > 1 else 0.0) if rewards else None,
        reward_components=_means(outcome.components for outcome in good),
        success=mean([outcome.success for outcome in good if outcome.success is not None]),
        turns=mean([outcome.turns for outcome in good]),
        seconds_p50=percentile(seconds, 50),
        seconds_p95=percentile(seconds, 95),
    )


def _means(components: Iterable[Mapping[str, float]]) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for own in components:
        for name, value in own.items():
            values[name].append(value)
    return {name: statistics.fmean(own) for name, own in sorted(values.items())}


def show_summary(summaries: Mapping[str, Summary], console: Console) -> None:
    """Show one row per environment."""
    header = ["environment", "rollouts", "failed", "reward", "success", "turns", "seconds p50 / p95"]
    rows = [
        [
            agent,
            str(one.rollouts),
            _failures(one.failed),
            "–" if one.reward_mean is None else f"{one.reward_mean:.3f} ± {one.reward_std:.3f}",
            _shown(one.success),
            _shown(one.turns, 1),
            f"{_shown(one.seconds_p50, 2)} / {_shown(one.seconds_p95, 2)}",
        ]
        for agent, one in summaries.items()
    ]
    show_table(header, rows, console)


def evaluate(names: Sequence[str], ended: Sequence[Outcome], num_generations: int) -> dict[str, dict[str, Any]]:
    """Compute per set the numbers of `Summary`, `mean@k`, `pass@k` and the latter's number of tasks, and all of it by
    environment.

    Args:
        names: Names of the sets, in the order in which they are shown.
        ended: Rollouts of all sets.
        num_generations: Attempts that were asked for.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        own = [outcome for outcome in ended if outcome.dataset == name]
        environments = {agent: _metrics(part, num_generations) for agent, part in _by_agent(own)}
        results[name] = {**_metrics(own, num_generations), "environments": environments}
    return results


def _metrics(ended: Sequence[Outcome], num_generations: int) -> dict[str, Any]:
    tasks: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for outcome in ended:
        if outcome.success is not None:
            tasks[outcome.agent, outcome.task].append(outcome.success)
    return asdict(_summary_of(ended)) | attempt_metrics(tasks.values(), num_generations)


def table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of an evaluation; a set with several environments has a row for each below its own."""
    rows = []
    for name, result in results.items():
        rows.append((name, result))
        if len(result["environments"]) > 1:
            rows += [(f"{name} · {agent}", own) for agent, own in result["environments"].items()]
    metrics = dict.fromkeys(
        key
        for _, result in rows
        for key in result
        if key.startswith("mean@") or (key.startswith("pass@") and "/" not in key)
    )
    return ["set", "rollouts", "failed", "reward", *metrics], [
        [
            name,
            str(result["rollouts"]),
            _failures(result["failed"]),
            _shown(result["reward_mean"]),
            *(_shown(result.get(metric)) for metric in metrics),
        ]
        for name, result in rows
    ]


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Show a table in a terminal, `first: second 2, third 3` per row where output is piped."""
    if console.is_terminal:
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    for row in rows:
        fields = ", ".join(f"{name} {value}" for name, value in zip(header[1:], row[1:], strict=True))
        console.print(f"{row[0]}: {fields}", highlight=False, soft_wrap=True, markup=False)


def as_json(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    return {agent: asdict(one) for agent, one in summaries.items()}


def _outcome(record: Mapping[str, Any]) -> Outcome:
    failure, reward = record.get("failure"), record.get("reward")
    return Outcome(
        dataset=record.get("dataset") or "",
        task=record.get("task_hash", ""),
        agent=record.get("agent", ""),
        failure=None if failure is None else failure["kind"],
        reward=reward,
        success=None if failure is not None or reward is None else success_of(record.get("verify") or {}, reward),
        # As recorded; without token ids, as the output shows them.
        turns=sum(turn.get("kind") == "model" for turn in record.get("turns", ()))
        or len(set(model_call_indices(output_items(record))) - {None}),
        seconds=record.get("seconds") or 0.0,
        components={} if failure is not None else components_of(record),
    )


def _failures(failed: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in failed.items()) or "0"


def _shown(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
