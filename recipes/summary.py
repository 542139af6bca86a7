"""What a run achieved: a table, the checkpoint, a picture of the reward. Reads only what is on disk."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_gym.rollouts.journal import read_journal


def summarize(output_dir: str | Path, start_up: Mapping[str, float]) -> None:
    """Print the table and write `reward.png`.

    Args:
        output_dir: The run's folder, with `metrics.jsonl` and `rollouts/`.
        start_up: Seconds of the phases before training, by name.
    """
    folder = Path(output_dir)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    console = Console()
    console.print(_table(metrics, _count(folder / "rollouts"), start_up))
    picture = plot_reward(metrics, folder / "reward.png")
    for name, path in (("checkpoint", newest_checkpoint(folder)), ("reward curve", picture)):
        if path is not None:
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step, if one was saved."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def plot_reward(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Training and validation reward and success over optimizer steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (
        ("reward", "training reward", {"color": "#76b900", "alpha": 0.7}),
        ("eval_reward", "validation reward", {"color": "#1a1a1a", "marker": "o"}),
        ("eval_success", "validation success", {"color": "#1a1a1a", "marker": "s", "linestyle": "--"}),
    ):
        points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="mean over rollouts", ylim=(-0.02, 1.02), title=path.parent.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _count(rollouts: Path) -> Counter[str]:
    counted: Counter[str] = Counter()
    for rollout in read_journal(rollouts):
        counted["rollouts"] += 1
        counted["failed"] += rollout["failure"] is not None
        counted["sampled tokens"] += sum(rollout["env_mask"])
        counted["tokens"] += len(rollout["prompt_ids"]) + len(rollout["completion_ids"])
    return counted


def _table(metrics: Sequence[Mapping[str, Any]], counted: Mapping[str, int], start_up: Mapping[str, float]) -> Table:
    table = Table(title="before → after", title_justify="left", show_header=False)
    evaluated = [row for row in metrics if row.get("eval_reward") is not None]
    trained = [row for row in metrics if row.get("reward") is not None]
    for label, name, rows in (
        ("validation success", "eval_success", evaluated),
        ("validation reward", "eval_reward", evaluated),
        ("training reward", "reward", trained),
    ):
        if rows and rows[0].get(name) is not None:
            table.add_row(label, f"{rows[0][name]:.3f} → {rows[-1][name]:.3f}")
    table.add_row("optimizer steps", f"{metrics[-1]['step']}")
    table.add_row("rollouts", f"{counted['rollouts']:,} ({counted['failed']:,} failed)")
    table.add_row("tokens", f"{counted['tokens']:,} ({counted['sampled tokens']:,} sampled by the policy)")
    phases = Counter(start_up)
    for row in metrics:
        for name, value in row.items():
            prefix, _, phase = name.partition("seconds/")
            if phase and value is not None:
                phases["evaluation" if prefix else phase.replace("_", " ")] += value
    for phase, seconds in phases.items():
        table.add_row(f"seconds: {phase}", f"{seconds:.1f}")
    table.add_row("seconds: total", f"{sum(phases.values()):.1f}")
    return table
