"""Metrics of rollouts, computed from the facts of every rollout on every rank since the last log, not from averages of
ranks or batches: the same on one rank and on many, every rollout with the same weight. Pure but for `MetricsBuffer`,
which keeps facts until they are logged.

Over all rollouts as `rollouts/<name>`, and for each environment as `gym/<agent>/rollouts/<name>` or, marked with *,
as `gym/<agent>/<name>`, beside the numbers of its verify response:

| name | meaning |
|---|---|
| `count` | rollouts since the last log |
| `failed_fraction`, `failed/<kind>`* | of them, the ones that failed; by kind, 0 included |
| `untrained_fraction` | of them, the ones not trained: failed, no reward, or their group was left out or replaced |
| `retried_fraction` | of them, the ones that were run more than once |
| `own_sampling_calls` | model calls that asked for another distribution; missing where there are none |
| `drift_fraction`* | of those with tokens, the ones that drifted; also those excluded for it |
| `reward`*, `reward_std`* | the environment's reward |
| `truncated_fraction` | cut, as Gym reports it |
| `turns`, `tokens_in`, `tokens_out` | model calls; tokens that were put there (prompts included) and sampled |
| `rows` | token sequences per rollout, see `rows.py` |
| `dropped_rows_fraction` | of the rows, the ones that `gym_max_rows_factor` has no room for |
| `tool_calls`, `tool_errors` | per rollout, see `responses.is_tool_error` |
| `seconds`, `seconds_p50`, `seconds_p95` | wall time |
| `model_seconds_p50`, `…_p95`, `queue_seconds_…` | per rollout in model calls, and of that in the engine's queue |
| `groups/size` | trained rollouts per group that is trained |
| `groups/zero_variance_fraction` | of the groups that are trained, the ones whose rewards are all the same |
| `groups/dropped_fraction` | of all groups, the ones left out as too small, or replaced |
| `staleness/mean`, `staleness/max` | of the rollouts that are trained, the staleness of each one's oldest call |
| `staleness/token_mean` | the same over their sampled tokens |
| `spans_versions` | of these rollouts, the fraction that weights of several versions sampled |
| `dropped_stale` | rollouts that `gym_on_stale: drop` cancelled; missing where there are none |

From `reward` on, rollouts that did not fail. From `groups/…` on only in training: groups by the environment's reward,
the rest as `rollouts/<name>` alone. The **staleness** of a token is the number of optimizer steps made between the
weights of the call that sampled it and the step that trains it: k - 1 - v for step k and version v. Besides:

| name | meaning |
|---|---|
| `success`, `gym/<agent>/success` | see `Rollout.success` |
| `gym/<agent>/<field>` | mean of each number of the verify response, where none of the above has its name |
| `gym/<agent>/reward_components/<name>` | mean of each number of its `reward_components` |
| `gym/<agent>/reward_components_gap` | mean of how far their sum is from the reward |
| `gym/<agent>/drift/<cause>` | fraction of the rollouts with tokens that drifted for this cause |
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from trl_gym.errors import FailureKind
from trl_gym.rollouts.rollout import Rollout, RolloutFacts

NEWEST = 65_536  # rollouts of training between two logs; about a kilobyte each, on every rank
_PERCENTILES = (50, 95)
_RATIO = "sampling/importance_sampling_ratio"


class MetricsBuffer:
    """The facts of training or of one evaluation, kept from one log to the next.

    Args:
        newest: Keep so many of them at most, for a training that logs rarely or never; None for all.
    """

    def __init__(self, newest: int | None = None) -> None:
        self._facts: deque[RolloutFacts] = deque(maxlen=newest)
        self._gaps: deque[Mapping[str, ValueSum]] = deque(maxlen=newest)

    def add(self, facts: Sequence[RolloutFacts]) -> None:
        """Add the facts of one batch, of all ranks."""
        self._facts += facts

    def add_gaps(self, gaps: Sequence[Mapping[str, ValueSum]]) -> None:
        """Add the values of `logprobs.batch_gaps` on each rank."""
        self._gaps += gaps

    def take(self, summarize: Callable[[Sequence[RolloutFacts]], dict[str, float]]) -> dict[str, float]:
        """Return the metrics since the last call.

        Args:
            summarize: Computes metrics from facts; not called when there are none.
        """
        metrics = merge_gaps(self._gaps) | (summarize(list(self._facts)) if self._facts else {})
        self._facts.clear()
        self._gaps.clear()
        return metrics


def training_metrics(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    """Return `rollout_metrics`, and the metrics of groups and of staleness."""
    metrics = rollout_metrics(facts) | _prefixed("rollouts/groups", _group_metrics(facts))
    metrics |= _prefixed("rollouts", _staleness(facts))
    # Nothing else cancels a member of a group: what was lost with a server runs again.
    if num_dropped := sum(fact.failure == FailureKind.CANCELLED for fact in facts):
        metrics["rollouts/dropped_stale"] = float(num_dropped)
    for agent, own in by_agent(facts).items():
        metrics |= _prefixed(f"gym/{agent}/rollouts/groups", _group_metrics(own))
    return metrics


def rollout_metrics(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    """Return the metrics of the tables above that are not of training alone; one that no rollout has is left out.

    Args:
        facts: At least one.
    """
    metrics = _prefixed("rollouts", _counts(facts) | _outcomes(facts) | _lengths(facts))
    _put(metrics, "success", mean(fact.success for fact in facts))
    for agent, own in by_agent(facts).items():
        metrics |= _prefixed(f"gym/{agent}/rollouts", _counts(own) | _lengths(own))
        metrics |= _prefixed(f"gym/{agent}", _fields(own) | _outcomes(own) | _causes_of_drift(own))
        _put(metrics, f"gym/{agent}/success", mean(fact.success for fact in own))
    return metrics


def completion_metrics(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    """Return TRL's `completions/…` over rollouts with a reward, with truncation as Gym reports it.

    Args:
        facts: Facts of one batch, of all ranks.

    Returns:
        NaN for what there is no rollout for, which TRL leaves out of its means; 0 for lengths of complete rollouts
        when all were truncated, as TRL has it.
    """
    trained = [fact for fact in facts if fact.is_valid]
    lengths = [fact.sampled_tokens for fact in trained]
    complete = [fact.sampled_tokens for fact in trained if not fact.is_truncated] or ([0] if trained else [])
    metrics = {"completions/clipped_ratio": mean(fact.is_truncated for fact in trained)}
    for name, values in (("length", lengths), ("terminated_length", complete)):
        metrics |= {
            f"completions/mean_{name}": mean(values),
            f"completions/min_{name}": float(min(values)) if values else None,
            f"completions/max_{name}": float(max(values)) if values else None,
        }
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def by_agent(facts: Sequence[RolloutFacts]) -> dict[str, list[RolloutFacts]]:
    """Return the facts of each environment, by name."""
    agents: defaultdict[str, list[RolloutFacts]] = defaultdict(list)
    for fact in facts:
        agents[fact.agent].append(fact)
    return dict(sorted(agents.items()))


def _counts(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    return {
        "count": float(len(facts)),
        "failed_fraction": _fraction(facts, lambda fact: fact.failure is not None),
        "untrained_fraction": _fraction(facts, lambda fact: not fact.is_valid),
        "retried_fraction": _fraction(facts, lambda fact: fact.attempts > 1),
        **({"own_sampling_calls": float(own)} if (own := sum(fact.own_sampling_calls for fact in facts)) else {}),
    }


def _outcomes(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    metrics = {f"failed/{kind}": sum(fact.failure == str(kind) for fact in facts) / len(facts) for kind in FailureKind}
    if with_tokens := [fact for fact in facts if fact.has_tokens]:
        metrics["drift_fraction"] = _fraction(with_tokens, lambda fact: fact.drift is not None)
    rewards = [fact.reward for fact in facts if fact.reward is not None]
    if rewards:
        metrics["reward"] = fmean(rewards)
    if len(rewards) > 1:
        metrics["reward_std"] = stdev(rewards)
    return metrics


def _lengths(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    """Sizes and times of the rollouts that did not fail."""
    done = [fact for fact in facts if fact.failure is None]
    if not done:
        return {}
    return {
        "truncated_fraction": _fraction(done, lambda fact: fact.is_truncated),
        "turns": fmean(fact.turns for fact in done),
        "tokens_in": fmean(fact.prompt_tokens + fact.environment_tokens for fact in done),
        "tokens_out": fmean(fact.sampled_tokens for fact in done),
        "rows": fmean(len(fact.row_tokens) for fact in done),
        "dropped_rows_fraction": sum(f.dropped_rows for f in done) / max(sum(len(f.row_tokens) for f in done), 1),
        "tool_calls": fmean(fact.tool_calls for fact in done),
        "tool_errors": fmean(fact.tool_errors for fact in done),
        "seconds": fmean(fact.seconds for fact in done),
        **_times(done),
    }


def _causes_of_drift(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    with_tokens = [fact for fact in facts if fact.has_tokens]
    causes = sorted({fact.drift for fact in with_tokens if fact.drift is not None})
    return {f"drift/{cause}": sum(f.drift == cause for f in with_tokens) / len(with_tokens) for cause in causes}


def _times(done: Sequence[RolloutFacts]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in ("seconds", "model_seconds", "queue_seconds"):
        values = [value for fact in done if (value := getattr(fact, name)) is not None]
        for percent in _PERCENTILES:
            _put(metrics, f"{name}_p{percent}", percentile(values, percent))
    return metrics


def _fields(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for fact in facts:
        for name, value in fact.fields.items():
            values[name].append(value)
        for name, value in fact.components.items():
            values[f"reward_components/{name}"].append(value)
        if fact.components and fact.reward is not None:
            values["reward_components_gap"].append(abs(math.fsum(fact.components.values()) - fact.reward))
    return {name: fmean(own) for name, own in values.items()}


def _group_metrics(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for fact in facts:
        members = groups[fact.group]
        if fact.is_valid and fact.trained_reward is not None:
            members.append(fact.trained_reward)
    trained = [members for members in groups.values() if members]
    metrics = {"dropped_fraction": 1 - len(trained) / len(groups)}
    if trained:
        metrics["size"] = sum(map(len, trained)) / len(trained)
        metrics["zero_variance_fraction"] = sum(min(own) == max(own) for own in trained) / len(trained)
    return metrics


def _staleness(facts: Sequence[RolloutFacts]) -> dict[str, float]:
    """Return how stale trained rollouts are whose versions are optimizer steps."""
    known = [fact for fact in facts if fact.is_valid and fact.staleness]
    if not known:
        return {}
    oldest = [max(fact.staleness) for fact in known]
    by_token = [(steps, count) for fact in known for steps, count in fact.staleness.items()]
    return {
        "staleness/mean": fmean(oldest),
        "staleness/max": float(max(oldest)),
        "staleness/token_mean": sum(steps * count for steps, count in by_token) / sum(count for _, count in by_token),
        "spans_versions": _fraction(known, lambda fact: fact.spans_versions),
    }


def _fraction(facts: Sequence[RolloutFacts], holds: Callable[[RolloutFacts], bool]) -> float:
    return sum(map(holds, facts)) / len(facts)


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _put(metrics: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        metrics[name] = value


# -- over-sampled groups ----------------------------------------------------------------------------------------------


def oversample_metrics(groups: Iterable[tuple[Sequence[Rollout], Sequence[Rollout]]]) -> dict[str, list[float]]:
    """Return values whose means say what `gym_oversample` costs, and which rollouts it favours.

    A rollout that was cancelled has the tokens and turns of the model calls that the policy server had answered, and
    the seconds until then: what it would have had is not known, and is more. Rollouts that ended beside those that
    made the group count as cancelled, with their reward; those that failed by themselves would not have been trained.

    Args:
        groups: Of one rank, whole: the rollouts that make each, and those that it has no use for.

    Returns:
        `oversample/…` by rollout, and by group for the tokens that are wasted; nothing where there are no values.
    """
    found: defaultdict[str, list[float]] = defaultdict(list)
    for kept, surplus in groups:
        kept_tokens = _add_sizes(found, "kept", [one for one in kept if one.failure is None])
        cancelled = [one for one in surplus if one.failure is None or one.failure.kind is FailureKind.CANCELLED]
        lost_tokens = _add_sizes(found, "cancelled", cancelled)
        num_failed, num_all = len(surplus) - len(cancelled), len(kept) + len(surplus)
        found["oversample/cancelled_fraction"] += [1.0] * len(cancelled) + [0.0] * (num_all - len(cancelled))
        found["oversample/failed_fraction"] += [1.0] * num_failed + [0.0] * (num_all - num_failed)
        if kept_tokens + lost_tokens:
            found["oversample/wasted_tokens_fraction"].append(lost_tokens / (kept_tokens + lost_tokens))
    return {name: values for name, values in found.items() if values}


def _add_sizes(found: Mapping[str, list[float]], which: str, rollouts: Sequence[Rollout]) -> int:
    """Add the sizes of rollouts that were kept, or not. Return the tokens that they sampled."""
    sizes = [one.sampled for one in rollouts]
    found[f"oversample/{which}/turns_mean"].extend(float(turns) for turns, _ in sizes)
    found[f"oversample/{which}/tokens_mean"].extend(float(tokens) for _, tokens in sizes)
    found[f"oversample/{which}/seconds_mean"].extend(one.seconds for one in rollouts)
    found[f"oversample/{which}/reward_mean"].extend(one.reward for one in rollouts if one.reward is not None)
    return sum(tokens for _, tokens in sizes)


# -- sums over the tokens of ranks ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ValueSum:
    """Values of tokens or sequences (gaps in nats, importance ratios), summed up so that ranks can be added."""

    total: float  # their sum
    count: int  # how many
    smallest: float  # the smallest; infinite when there is none
    largest: float  # the largest; minus infinite when there is none


def merge_gaps(ranks: Sequence[Mapping[str, ValueSum]]) -> dict[str, float]:
    """Return the gap over all ranks, every token with the same weight: `logprob_gap/mean`, `logprob_gap/max`, and the
    mean for each turn and agent.

    Args:
        ranks: The values of `logprobs.batch_gaps` on each.
    """
    by_name: defaultdict[str, list[ValueSum]] = defaultdict(list)
    for sums in ranks:
        for name, gap in sums.items():
            by_name[name].append(gap)
    metrics = {name: sum(gap.total for gap in gaps) / sum(gap.count for gap in gaps) for name, gaps in by_name.items()}
    if (overall := metrics.pop("logprob_gap", None)) is None:
        return {}
    largest = [gap.largest for gap in by_name["logprob_gap"]]
    highest = math.nan if any(map(math.isnan, largest)) else max(largest)  # `max` alone may lose a NaN
    return {"logprob_gap/mean": overall, "logprob_gap/max": highest, **metrics}


def merge_cut(ranks: Sequence[ValueSum | None]) -> dict[str, float]:
    """Return `sampling/importance_sampling_ratio/fraction_cut` over the trained tokens of all ranks; empty where there
    are none.

    Args:
        ranks: The values of `logprobs.cut_tokens` on each.
    """
    sums = [own for own in ranks if own is not None and own.count]
    count = sum(own.count for own in sums)
    return {f"{_RATIO}/fraction_cut": sum(own.total for own in sums) / count} if count else {}


def merge_ratios(ranks: Sequence[ValueSum | None]) -> dict[str, float]:
    """Return TRL's `sampling/importance_sampling_ratio/…` over the rollouts that are trained, on all ranks.

    Every token or sequence has the same weight. TRL takes means of ranks' means, and counts rows that are not trained.

    Returns:
        NaN when nothing is trained, which TRL leaves out; empty when there are no ratios.
    """
    sums = [own for own in ranks if own is not None]
    if not sums:
        return {}
    count = sum(own.count for own in sums)
    return {
        f"{_RATIO}/min": min(own.smallest for own in sums) if count else math.nan,
        f"{_RATIO}/mean": sum(own.total for own in sums) / count if count else math.nan,
        f"{_RATIO}/max": max(own.largest for own in sums) if count else math.nan,
    }


# -- numbers ----------------------------------------------------------------------------------------------------------


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None when there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Return a percentile by linear interpolation between closest ranks, NumPy's default; None without values.

    Args:
        percent: 0 to 100.
    """
    ordered = sorted(values)
    if not ordered:
        return None
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
