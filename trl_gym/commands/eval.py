"""`trl-gym eval`: mean@k and pass@k of a policy on any number of named sets, without training."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_gym.commands.summary import Outcome

DESCRIPTION = (
    "Evaluate a policy behind an OpenAI endpoint. Every set is rolled out NUM_GENERATIONS times per row and recorded "
    "as by `trl-gym rollout`; the table shows, per set, mean@k (mean success) and pass@k (the chance that one of k "
    "attempts succeeds, without bias). Failed rollouts are no attempts. The same command again runs what is missing."
)


def run(options: argparse.Namespace) -> int:
    """Return the exit status: 0 when every rollout has a reward or a recorded failure, 130 after Ctrl-C."""
    from rich.console import Console

    from trl_gym.commands.collect import run_collection, write_json
    from trl_gym.commands.options import parse
    from trl_gym.commands.summary import outcomes, show_table
    from trl_gym.rollouts.journal import read_journal

    collect_options = parse(options, "eval")
    console, errors = Console(), Console(stderr=True)
    collected = run_collection(collect_options, errors)
    if collected is None:
        return 130
    ended = outcomes(read_journal(collect_options.journal_dir), collected.jobs)
    num_generations = collect_options.num_generations
    results = evaluate([file.name for file in collect_options.datasets], ended, num_generations)
    path = collect_options.output_dir / "eval.json"
    write_json(
        path,
        {"schema": 1, "model": collect_options.model, "num_generations": num_generations, "sets": results},
    )
    show_table(*table(results), console)
    console.print(f"results: {path}", highlight=False, soft_wrap=True, markup=False)
    return 0


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
        by_agent: defaultdict[str, list[Outcome]] = defaultdict(list)
        for outcome in own:
            by_agent[outcome.agent].append(outcome)
        environments = {agent: _metrics(part, num_generations) for agent, part in sorted(by_agent.items())}
        results[name] = {**_metrics(own, num_generations), "environments": environments}
    return results


def table(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows; a set with several environments has a row for each below its own."""
    rows = []
    for name, result in results.items():
        rows.append((name, result))
        if len(result["environments"]) > 1:
            rows += [(f"{name} · {agent}", own) for agent, own in result["environments"].items()]
    metrics = list(dict.fromkeys(key for _, result in rows for key in result if _is_shown(key)))
    header = ["set", "rollouts", "failed", "reward", *metrics]
    return header, [
        [
            name,
            str(result["rollouts"]),
            ", ".join(f"{number} {kind}" for kind, number in result["failed"].items()) or "0",
            _number(result["reward_mean"]),
            *(_number(result.get(metric)) for metric in metrics),
        ]
        for name, result in rows
    ]


def _metrics(ended: Sequence[Outcome], num_generations: int) -> dict[str, Any]:
    from trl_gym.commands.summary import summary_of
    from trl_gym.rollouts.evaluation import attempt_metrics

    tasks: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for outcome in ended:
        if outcome.success is not None:
            tasks[outcome.agent, outcome.task].append(outcome.success)
    return asdict(summary_of(ended)) | attempt_metrics(tasks.values(), num_generations)


def _is_shown(key: str) -> bool:
    return key.startswith("mean@") or (key.startswith("pass@") and "/" not in key)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
