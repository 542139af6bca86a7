"""A generation batch of finished rollouts → what TRL trains on and shows, what is said when it failed. Pure."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from trl_gym.rollouts.facts import is_truncated
from trl_gym.rollouts.rollout import Rollout, conversation
from trl_gym.rollouts.trajectory import Trajectory, finish_reason

_NUM_CAUSES = 20  # that a rank tells the others; a cause may be 600 characters long


def training_rows(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    *,
    pad_id: int,
    eos_id: int,
    mask_truncated: bool = False,
    with_logprobs: bool = True,
) -> dict[str, list[Any]]:
    """The columns that TRL's `rollout_func` returns, one entry per rollout.

    A rollout without a reward gets a single masked token: TRL needs one, and it trains nothing (`groups`).

    Args:
        rollouts: `[B]`.
        rewards: `[B]`; None takes a rollout out.
        pad_id: Stands for the prompt of a rollout without a reward.
        eos_id: Stands for its completion.
        mask_truncated: Mask the tokens of rollouts that Gym reports as cut. As in TRL, their rewards stay in the
            baseline and their rows in what the loss divides by.
        with_logprobs: Otherwise the log-probabilities are None, which TRL reads as unknown: those of evaluation, when
            it samples from another distribution than the one that is trained, are no measure of anything.

    Returns:
        `prompt_ids` `[B][P]`, `completion_ids`, `logprobs` and `env_mask` `[B][T]`, and for the reward functions
        `gym_reward` `[B]` and `gym_result` `[B]`.
    """
    nothing = Trajectory(prompt_ids=[pad_id], completion_ids=[eos_id], env_mask=[0], logprobs=[0.0], num_turns=0)
    trained = [
        rollout.trajectories[0] if rollout.trajectories and reward is not None else nothing
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]
    masked = [mask_truncated and is_truncated(rollout) for rollout in rollouts]
    return {
        "prompt_ids": [trajectory.prompt_ids for trajectory in trained],
        "completion_ids": [trajectory.completion_ids for trajectory in trained],
        "logprobs": [t.logprobs if with_logprobs else [None] * len(t.logprobs) for t in trained],
        "env_mask": [[0] * len(t.env_mask) if cut else t.env_mask for t, cut in zip(trained, masked, strict=True)],
        "gym_reward": list(rewards),
        "gym_result": [rollout.answer for rollout in rollouts],
    }


def completion(rollout: Rollout) -> list[dict[str, Any]]:
    """The conversation, for reward functions and TRL's completions table.

    The table reads the arguments of every tool call as a JSON object and ends training where a policy wrote something
    else; that is put into one, as `{"unparsed": …}`.
    """
    return [_with_readable_arguments(message) for message in conversation(rollout)]


def table_columns(rollouts: Sequence[Rollout]) -> dict[str, list[str]]:
    """Columns for TRL's completions table, `[B]` each."""
    return {
        "environment": [rollout.request.agent for rollout in rollouts],
        "rollout_id": [rollout.request.rollout_id for rollout in rollouts],
        "finish_reason": [
            f"{rollout.failure.kind} failure" if rollout.failure is not None else finish_reason(rollout.answer or {})
            for rollout in rollouts
        ],
    }


def failure_causes(rollouts: Sequence[Rollout]) -> Counter[str]:
    """The most frequent causes of failure, with their numbers."""
    causes = Counter(
        f"{rollout.failure.kind} ({rollout.failure.where}): {rollout.failure.text[:600]}"
        for rollout in rollouts
        if rollout.failure is not None
    )
    return Counter(dict(causes.most_common(_NUM_CAUSES)))


def describe_causes(causes: Counter[str], *, num_shown: int = 5) -> str:
    """One line each: `  12 × environment (my_agent /run): …`."""
    return "\n".join(f"  {count} × {cause}" for cause, count in causes.most_common(num_shown))


def describe_failures(rollouts: Sequence[Rollout], *, num_shown: int = 5) -> str:
    """The most frequent causes of failure, one line each."""
    return describe_causes(failure_causes(rollouts), num_shown=num_shown)


def describe_drift(rollouts: Sequence[Rollout]) -> list[str]:
    """One line per agent and cause, most frequent first: how many rollouts drifted, and the first of them."""
    examples: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.drift is not None:
            example = f"In {rollout.request.rollout_id}, {rollout.drift.text}"
            examples[rollout.request.agent, rollout.drift.cause].append(example)
    return [
        f"{len(drifted)} of {sum(rollout.request.agent == agent for rollout in rollouts)} rollouts of {agent} drifted "
        f"({cause}). {drifted[0]}"
        for (agent, cause), drifted in sorted(examples.items(), key=lambda item: -len(item[1]))
    ]


def _with_readable_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return dict(message) if not calls else {**message, "tool_calls": [_readable(call) for call in calls]}


def _readable(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (TypeError, ValueError):
        is_object = False
    text = arguments if is_object else json.dumps({"unparsed": arguments})
    return {**call, "function": {**call["function"], "arguments": text}}
