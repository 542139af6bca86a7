"""What the journal costs: CPU microseconds per rollout, and its share of an optimizer step.

    .venv/bin/python benchmarks/journal.py [--run runs/quickstart] [--folder DIR]

Real rollouts are taken from a run's journal (`make quickstart` writes one) and written again, with what `append` does
to each: redaction, JSON, one write. The share is of the time that the run's own steps took, as in its metrics. Long
rollouts are made from short ones: twenty turns, each with the whole prompt before it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


NUM_TURNS = 20  # of the long rollouts


def lengthened(record: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """A rollout of so many tokens in `NUM_TURNS` turns, each of which carries the whole prompt before it."""
    longer = copy.deepcopy(record)
    sampled = next(item for item in record["response"]["output"] if item.get("generation_token_ids"))
    size = num_tokens // NUM_TURNS
    output, completion = [], []
    for _ in range(NUM_TURNS):
        ids = (sampled["generation_token_ids"] * size)[:size]
        logprobs = (sampled["generation_log_probs"] * size)[:size]
        prompt = [*record["prompt_ids"], *completion]
        bundle = {"prompt_token_ids": prompt, "generation_token_ids": ids, "generation_log_probs": logprobs}
        output.append({**copy.deepcopy(sampled), **bundle})
        completion += ids
    longer["response"]["output"] = output
    ones, logprobs = [1] * len(completion), [lp for item in output for lp in item["generation_log_probs"]]
    return longer | {"completion_ids": completion, "env_mask": ones, "logprobs": logprobs}


def seconds_each(work: Callable[[dict[str, Any]], Any], records: list[dict[str, Any]], repeats: int = 5) -> float:
    """Median over repeats of the mean CPU seconds over records."""
    means = []
    for _ in range(repeats):
        started = time.process_time()
        for record in records:
            work(record)
        means.append((time.process_time() - started) / len(records))
    return statistics.median(means)


def step_seconds(run: Path) -> float:
    """Mean seconds of an optimizer step, of all phases."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [sum(value for name, value in line.items() if name.startswith("seconds/")) for line in lines]
    return statistics.mean(steps)


def measure(records: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """CPU microseconds per rollout; of wall time per batch for the fsync."""
    from trl_gym.rollouts.journal import Journal, make_redactor, secrets_of
    from trl_gym.rollouts.request import request_hash, task_hash

    redact = make_redactor(secrets_of(os.environ))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        journal = Journal(place)
        append = seconds_each(journal.append, records)
        commits = []
        for _ in range(5):
            for record in records:
                journal.append(record)
            started = time.perf_counter()
            journal.commit()
            commits.append(time.perf_counter() - started)
        size = sum(path.stat().st_size for path in Path(place).iterdir()) / (10 * len(records))
        journal.close()
    return {
        "append": 1e6 * append,
        "of that redaction": 1e6 * seconds_each(redact, records),
        "of that JSON": 1e6 * seconds_each(lambda one: json.dumps(one, ensure_ascii=False, allow_nan=False), records),
        "hashes": 1e6 * seconds_each(lambda one: (task_hash(one["row"]), request_hash(one["row"])), records),
        "fsync per batch": 1e6 * statistics.median(commits),
        "bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart", help="folder of a training run")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: beside the run")
    args = parser.parse_args()
    from trl_gym.rollouts.journal import read_lines

    all_records = [line.record for line in read_lines(args.run / "rollouts", mode="train")]
    steps = {record["step"] for record in all_records}
    records = all_records[:128]
    per_step = len(all_records) / len(steps)
    folder = args.folder or args.run
    seconds = step_seconds(args.run)
    for num_tokens in (0, 4_000, 32_000):
        tried = records if not num_tokens else [lengthened(record, num_tokens) for record in records[:8]]
        result = measure(tried, folder)
        turns = statistics.mean(sum("generation_token_ids" in i for i in r["response"]["output"]) for r in tried)
        print(f"rollouts of {turns:.0f} turns, {result['bytes'] / 1000:.1f} kB a line")
        for name in ("append", "of that redaction", "of that JSON", "hashes"):
            print(f"{result[name]:12.1f} µs per rollout  {name}")
        print(f"{result['fsync per batch'] / 1000:12.1f} ms per batch    fsync of {len(tried)} rollouts")
        if not num_tokens:
            spent = per_step * (result["append"] + result["hashes"]) / 1e6 + result["fsync per batch"] / 1e6
            print(f"{100 * spent / seconds:12.2f} % of a step ({per_step:.0f} rollouts, {seconds:.2f} s)")


if __name__ == "__main__":
    main()
