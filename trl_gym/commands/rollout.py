"""`trl-gym rollout`: collect rollouts without training."""

from __future__ import annotations

import argparse

DESCRIPTION = (
    "Roll datasets out against an OpenAI endpoint and record every rollout in OUTPUT_DIR/rollouts, in the format of "
    "training's journal: to look at, or to train on later with `gym_replay`. NeMo Gym is started, the policy is not. "
    "The same command again runs only what is missing or has failed. Ctrl-C loses nothing that has ended."
)


def run(options: argparse.Namespace) -> int:
    """Return the exit status: 0 when every rollout has a reward or a recorded failure, 130 after Ctrl-C."""
    from rich.console import Console

    from trl_gym.commands.collect import run_collection, write_json
    from trl_gym.commands.options import parse
    from trl_gym.commands.summary import as_json, outcomes, show_summary, summarize
    from trl_gym.rollouts.journal import read_journal

    collect_options = parse(options, "rollout")
    console, errors = Console(), Console(stderr=True)
    collected = run_collection(collect_options, errors)
    if collected is None:
        return 130
    summaries = summarize(outcomes(read_journal(collect_options.journal_dir), collected.jobs))
    path = collect_options.output_dir / "summary.json"
    write_json(
        path,
        {
            "schema": 1,
            "model": collect_options.model,
            "planned": len(collected.jobs),
            "found": collected.num_found,
            "environments": as_json(summaries),
        },
    )
    show_summary(summaries, console)
    console.print(f"summary: {path}", highlight=False, soft_wrap=True, markup=False)
    return 0
