"""`trl-gym rollout` and `trl-gym eval`: collect rollouts without training, and say how they went."""

from __future__ import annotations

import argparse

DESCRIPTION = (
    "Roll datasets out against an OpenAI endpoint and record every rollout in OUTPUT_DIR/rollouts, in the format of "
    "training's journal: to look at, or to train on later with `gym_replay`. NeMo Gym is started, the policy is not. "
    "The same command again runs only what is missing or has failed. Ctrl-C loses nothing that has ended."
)
EVAL_DESCRIPTION = (
    "Evaluate a policy behind an OpenAI endpoint. Every set is rolled out NUM_GENERATIONS times per row and recorded "
    "as by `trl-gym rollout`; the table shows, per set, mean@k (mean success) and pass@k (the chance that one of k "
    "attempts succeeds, without bias). Failed rollouts are no attempts. The same command again runs what is missing."
)


def run(options: argparse.Namespace) -> int:
    """Return the exit status: 0 when every rollout has a reward or a recorded failure, 130 after Ctrl-C."""
    from rich.console import Console

    from trl_gym.commands.collect import run_collection, write_json
    from trl_gym.commands.rollout_flags import parse
    from trl_gym.commands.summary import as_json, evaluate, outcomes, show_summary, show_table, summarize, table
    from trl_gym.rollouts.journal import read_journal

    told, console = parse(options, options.mode), Console()
    collected = run_collection(told, Console(stderr=True))
    if collected is None:
        return 130
    ended = outcomes(read_journal(told.journal_dir), collected.jobs)
    if told.mode == "eval":
        results = evaluate([file.name for file in told.datasets], ended, told.num_generations)
        label, path = "results", told.output_dir / "eval.json"
        numbers = {"num_generations": told.num_generations, "sets": results}
        show_table(*table(results), console)
    else:
        summaries = summarize(ended)
        label, path = "summary", told.output_dir / "summary.json"
        numbers = {"planned": len(collected.jobs), "found": collected.num_found, "environments": as_json(summaries)}
        show_summary(summaries, console)
    write_json(path, {"schema": 1, "model": told.model, **numbers})
    console.print(f"{label}: {path}", highlight=False, soft_wrap=True, markup=False)
    return 0
