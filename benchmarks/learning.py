"""Does overlap learn as well? The quickstart with several seeds, synchronous and overlapped, curves side by side.

    .venv/bin/python benchmarks/learning.py FOLDER [--staleness 0 1] [--seeds 0 1 2] [--steps 36] [--plot FILE.png]

A run whose metrics are in FOLDER already is not repeated, so that seeds can be added. Printed are, for each staleness,
the mean reward of the last six steps and the success of the last evaluation by seed, the staleness of what was
trained, and the largest fraction of tokens whose importance ratio was cut in a step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from measure import ROOT, machine

sys.path.insert(0, str(ROOT / "recipes"))

from tiny_policy import build_tiny_policy

LAST = 6  # steps whose rewards are averaged
Metrics = list[dict[str, Any]]


def run(folder: Path, *, staleness: int, seed: int, steps: int, options: Sequence[str]) -> Metrics:
    """Return the lines of a run's `metrics.jsonl`; train it if they are not there."""
    own = folder / f"staleness-{staleness}-seed-{seed}-steps-{steps}"
    own_options = {"output_dir": own, "gym_max_staleness": staleness, "seed": seed, "max_steps": steps}
    own_options |= {"save_strategy": "no", "eval_steps": max(steps // 3, 1)}
    if seed:  # each begins with a policy of its own
        own_options["small_policy_dir"] = build_tiny_policy(folder / f"policy-seed-{seed}", seed=seed)
    flags = [word for name, value in own_options.items() for word in (f"--{name}", str(value))]
    if not (metrics := read(own)) or metrics[-1]["step"] < steps:
        own.mkdir(parents=True, exist_ok=True)
        with (own / "output.log").open("w") as log:
            command = [
                sys.executable,
                "recipes/grpo.py",
                "--config",
                "recipes/quickstart.yaml",
                "--gym_engine",
                "vllm",
                *flags,
                *options,
            ]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
        metrics = read(own)
    return metrics


def read(own: Path) -> Metrics:
    path = own / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def values(metrics: Metrics, name: str) -> list[float]:
    return [line[name] for line in metrics if line.get(name) is not None]


def show(runs: dict[int, list[Metrics]]) -> None:
    rewards = f"reward, last {LAST} steps"
    print(f"{'staleness':>9}  {rewards:24} {'success, evaluated':24} mean stale  cut at most")
    for staleness, metrics in runs.items():
        rewards = [mean(values(own, "reward")[-LAST:]) for own in metrics]
        evaluated = [values(own, "eval_success")[-1] for own in metrics]
        stale = mean(value for own in metrics for value in values(own, "rollouts/staleness/mean"))
        name = "sampling/importance_sampling_ratio/fraction_cut"
        cut = max(value for own in metrics for value in values(own, name))
        by_seed = [" ".join(f"{value:.3f}" for value in found) for found in (rewards, evaluated)]
        print(f"{staleness:>9}  {by_seed[0]:24} {by_seed[1]:24} {stale:10.2f}  {cut:.5f}")


def plot(runs: dict[int, list[Metrics]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.2), sharey=True, squeeze=False)
    for axes, (staleness, metrics) in zip(all_axes[0], runs.items(), strict=True):
        for seed, own in enumerate(metrics):
            axes.plot(values(own, "reward"), label=f"run {seed + 1}", linewidth=1.2)
        axes.set(title=f"gym_max_staleness {staleness}", xlabel="optimizer step", ylim=(0, 1))
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("reward")
    all_axes[0][0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--options", nargs="*", default=[], help="further options of training, without their dashes")
    parser.add_argument("--plot", type=Path, help="file for the curves")
    args = parser.parse_args()
    options = [f"--{one}" for one in args.options]
    print(machine())
    runs: dict[int, list[Metrics]] = {staleness: [] for staleness in args.staleness}
    for seed in args.seeds:  # the arms take turns
        for staleness, found in runs.items():
            found.append(run(args.folder.resolve(), staleness=staleness, seed=seed, steps=args.steps, options=options))
    show(runs)
    if args.plot is not None:
        plot(runs, args.plot)
        print(f"curves: {args.plot}")


if __name__ == "__main__":
    main()
