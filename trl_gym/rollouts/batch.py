"""A generation batch of finished rollouts → what TRL trains on, what is logged, what is said when it failed. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.trajectory import Trajectory


def training_rows(
    rollouts: Sequence[Rollout], rewards: Sequence[float | None], *, pad_id: int, eos_id: int
) -> dict[str, list[Any]]:
    """The columns that TRL's `rollout_func` returns, one entry per rollout.

    A rollout without a reward gets a single masked token: TRL needs one, and it trains nothing.

    Args:
        rollouts: `[B]`.
        rewards: `[B]`; None takes a rollout out.
        pad_id: Stands for the prompt of a rollout without a reward.
        eos_id: Stands for its completion; an EOS, so that TRL does not count it as truncated.

    Returns:
        `prompt_ids` `[B][P]`, `completion_ids`, `logprobs` and `env_mask` `[B][T]`, and for the reward functions
        `gym_reward` `[B]` and `gym_result` `[B]`.
    """
    nothing = Trajectory(prompt_ids=[pad_id], completion_ids=[eos_id], env_mask=[0], logprobs=[0.0], num_turns=0)
    trained = [
        rollout.trajectories[0] if rollout.trajectories and reward is not None else nothing
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]
    return {
        "prompt_ids": [trajectory.prompt_ids for trajectory in trained],
        "completion_ids": [trajectory.completion_ids for trajectory in trained],
        "logprobs": [trajectory.logprobs for trajectory in trained],
        "env_mask": [trajectory.env_mask for trajectory in trained],
        "gym_reward": list(rewards),
        "gym_result": [rollout.answer for rollout in rollouts],
    }


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """Values by metric name, one per rollout that has one; whoever logs them averages them.

    | name | meaning |
    |---|---|
    | `success` | see `Rollout.success` |
    | `rollouts/failed_fraction` | rollouts without a reward |
    | `rollouts/drift_fraction` | rollouts that drifted, of those with tokens; also those excluded for it |
    | `gym/<agent>/drift_fraction` | the same of one agent |
    | `gym/<agent>/drift/<cause>` | 1.0 per rollout that drifted for this cause |
    | `rollouts/turns`, `rollouts/seconds` | model calls trained on, wall time |
    | `gym/<agent>/reward`, `gym/<agent>/<field>` | reward and every number of the verify response |
    | `gym/<agent>/failed/<kind>` | 1.0 per failed rollout |
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        agent = rollout.request.agent
        values["rollouts/failed_fraction"].append(float(rollout.failure is not None))
        if rollout.failure is None or rollout.drift is not None:
            values["rollouts/drift_fraction"].append(float(rollout.drift is not None))
            values[f"gym/{agent}/drift_fraction"].append(float(rollout.drift is not None))
        if rollout.drift is not None:
            values[f"gym/{agent}/drift/{rollout.drift.cause}"].append(1.0)
        if rollout.failure is not None:
            values[f"gym/{agent}/failed/{rollout.failure.kind}"].append(1.0)
            continue
        values["success"].append(rollout.success)
        values["rollouts/turns"].append(float(sum(t.num_turns for t in rollout.trajectories)))
        values["rollouts/seconds"].append(rollout.seconds)
        values[f"gym/{agent}/reward"].append(rollout.reward)
        for name, value in rollout.metrics().items():
            values[f"gym/{agent}/{name}"].append(value)
    return dict(values)


def describe_failures(rollouts: Sequence[Rollout], *, num_shown: int = 5) -> str:
    """The most frequent causes, one line each: `  12 × environment (my_agent /run): …`."""
    causes = Counter(
        f"{rollout.failure.kind} ({rollout.failure.where}): {rollout.failure.text[:600]}"
        for rollout in rollouts
        if rollout.failure is not None
    )
    return "\n".join(f"  {count} × {cause}" for cause, count in causes.most_common(num_shown))


def describe_drift(rollouts: Sequence[Rollout]) -> list[str]:
    """One line per agent and cause, most frequent first: how many rollouts drifted, and the first of them."""
    examples: defaultdict[tuple[str, str], list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.drift is not None:
            examples[rollout.request.agent, rollout.drift.cause].append(rollout)
    return [
        f"{len(drifted)} of {sum(rollout.request.agent == agent for rollout in rollouts)} rollouts of {agent} drifted "
        f"({cause}). In {drifted[0].request.rollout_id}, {drifted[0].drift.text}"
        for (agent, cause), drifted in sorted(examples.items(), key=lambda item: -len(item[1]))
    ]
