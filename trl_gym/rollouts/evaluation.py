"""Evaluation: estimators over several attempts at a task, which rollouts count, and a training state left as it was.

With `n` attempts at a task of which `c` are successful, the chance that at least one of `k` attempts is, without bias:

    pass@k = 1 - C(n - c, k) / C(n, k)        for n >= k

`mean@k` is the mean success of a task's attempts, averaged over tasks. Its expectation does not depend on k, so it is
given for the number of attempts that were asked for only. A failed rollout is no attempt: it is not in `n`. A task
with fewer than k attempts left says nothing unbiased about pass@k and is not in that mean; `pass@k/tasks` says how
many are.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import RolloutError, as_problems

if TYPE_CHECKING:
    from trl_gym.rollouts.batch import SharedBatch
    from trl_gym.rollouts.rollout import RolloutFacts


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate without bias the chance that at least one of `k` attempts at a task succeeds.

    Args:
        num_samples: Attempts that were made; at least `k`.
        k: At least 1.

    Raises:
        ValueError: The numbers contradict each other, or there are too few attempts to tell.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@{k} cannot be estimated from {num_correct} successes in {num_samples} attempts: it takes at least "
            f"{max(k, 1)} attempts, and no more successes than attempts."
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def ks(num_generations: int) -> list[int]:
    """Return the reported `k`: powers of two below the number of attempts, and that number. 6 → `[1, 2, 4, 6]`."""
    return [*(1 << power for power in range((num_generations - 1).bit_length())), num_generations]


def attempt_metrics(tasks: Iterable[Sequence[float]], num_generations: int) -> dict[str, float]:
    """Compute `pass@k`, `pass@k/tasks` and `mean@k` over tasks.

    Args:
        tasks: For each task the success (0 to 1) of every attempt that did not fail; an attempt succeeds at 1.
        num_generations: Attempts that were asked for.

    Returns:
        Nothing for a `k` that no task has enough attempts for.
    """
    counted = [successes for successes in tasks if successes]
    metrics: dict[str, float] = {}
    for k in ks(num_generations):
        enough = [successes for successes in counted if len(successes) >= k]
        if enough:
            estimates = [pass_at_k(len(own), sum(success >= 1.0 for success in own), k) for own in enough]
            metrics[f"pass@{k}"] = sum(estimates) / len(enough)
            metrics[f"pass@{k}/tasks"] = float(len(enough))
    if counted:
        metrics[f"mean@{num_generations}"] = sum(sum(own) / len(own) for own in counted) / len(counted)
    return metrics


def evaluation_metrics(facts: Sequence[RolloutFacts], num_generations: int) -> dict[str, float]:
    """Compute `attempt_metrics` over all tasks, and by environment as `gym/<agent>/…`.

    Args:
        facts: Facts of one evaluation, of all ranks. The attempts at a task are the rollouts of one group.
        num_generations: Attempts that were asked for.
    """
    tasks: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for fact in facts:
        if fact.success is not None:
            tasks[fact.agent, fact.group].append(fact.success)
    metrics = attempt_metrics(tasks.values(), num_generations)
    for agent in sorted({agent for agent, _ in tasks}):
        own = [successes for (name, _), successes in tasks.items() if name == agent]
        metrics |= {f"gym/{agent}/{name}": value for name, value in attempt_metrics(own, num_generations).items()}
    return metrics


@dataclass(slots=True)
class EvaluationProgress:
    """The counts of one call of `evaluate` on one dataset."""

    name: str  # name of the evaluation set; empty when there is one without a name
    num_rollouts: int | None  # rollouts that the dataset asks for; None when it does not tell its length
    num_seen: int = 0  # rows that came by so far, on all ranks
    num_valid: int = 0  # rollouts that count and have a reward
    num_counted: int = 0  # rollouts that count
    causes: Counter[str] = field(default_factory=Counter)  # causes of failures, with their numbers

    def counted(self, batch: SharedBatch) -> list[RolloutFacts]:
        """Return the rollouts of one batch that count.

        With several ranks, accelerate fills the last batch up with rows from the beginning: rolling these out a second
        time must not weigh them twice.
        """
        facts = batch.facts
        left = len(facts) if self.num_rollouts is None else max(self.num_rollouts - self.num_seen, 0)
        self.num_seen += len(facts)
        kept = facts[:left]
        self.causes += batch.causes
        self.num_counted += len(kept)
        self.num_valid += sum(fact.is_valid for fact in kept)
        return kept

    def check(self, min_valid_fraction: float) -> None:
        """
        Raises:
            RolloutError: Too few of its rollouts have a reward for its metrics to mean anything.
        """
        if self.num_counted and (not self.num_valid or self.num_valid / self.num_counted < min_valid_fraction):
            of = f" of {self.name!r}" if self.name else ""
            raise RolloutError(
                f"Only {self.num_valid} of the {self.num_counted} rollouts of the evaluation{of} have a reward, and "
                f"`gym_min_valid_fraction` is {min_valid_fraction:g}.",
                "Fix what made them fail, or lower `gym_min_valid_fraction`.",
                as_problems(self.causes),
            )


@contextlib.contextmanager
def table_beside(output_dir: str | Path, step: int, name: str) -> Iterator[None]:
    """Let TRL write its completions table of a step again: the new one becomes `eval_<step>.parquet`
    (`eval_<name>_<step>.parquet`), and the one that training wrote for the step stays.

    Args:
        name: Name of the evaluation set; may be empty.
    """
    table = Path(output_dir) / "completions" / f"completions_{step:05d}.parquet"
    aside = table.with_suffix(".train")
    if table.exists():
        table.rename(aside)
    try:
        yield
    finally:
        if table.exists():
            table.rename(table.with_name(f"eval_{name + '_' if name else ''}{step:05d}.parquet"))
        if aside.exists():
            aside.rename(table)


def emptied(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return TRL's `_logs` (deques, and mappings to deques) without the rows: those of a completions table."""
    return {
        name: defaultdict(rows.default_factory) if isinstance(rows, defaultdict) else deque(maxlen=rows.maxlen)
        for name, rows in logs.items()
    }


def set_name(metric_key_prefix: str) -> str:
    """Return the name of the evaluation set in transformers' prefix: `"eval_easy"` → `"easy"`, `"eval"` → `""`."""
    return metric_key_prefix.removeprefix("eval").lstrip("_")


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (CPU and the current CUDA device) back at the end.

    An evaluation draws from them (a data loader its seed, for one): with it, training would shuffle and drop out
    differently from without it.
    """
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
