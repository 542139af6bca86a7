"""What is counted about one rollout: a small record that every rank gets of every rollout of a batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.trajectory import finish_reason

_SERVER_ERROR_TEXT = "Internal Server Error"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFacts:
    """One rollout in numbers.

    Attributes:
        agent: Name of the Gym agent.
        group: Its group, unique over all batches: `"<batch>-g<index>"`.
        task: Index of the dataset row.
        is_valid: Whether it is trained: it has a reward to train on, and its group was not left out.
        trained_reward: The reward to train on, see `GymGRPOTrainer.compute_rewards`; None when there is none.
        reward: The environment's; None when the rollout failed.
        success: 0 to 1; None when it failed.
        failure: Kind of failure; None when it did not fail.
        drift: Cause of drift; None when it did not drift.
        has_tokens: Whether its model calls are known, so that drift would have been seen.
        attempts: How often it was run.
        seconds: Wall time.
        model_seconds: In model calls, waiting included; None when the policy server keeps no records.
        queue_seconds: Of these, waiting in the engine's queue; None where the server does not measure it.
        turns: Model calls that are trained.
        prompt_tokens: Of the first prompt.
        environment_tokens: That the environment put after it.
        sampled_tokens: That the policy sampled.
        tool_calls: In Gym's answer.
        tool_errors: Tool results that say that the call failed.
        is_truncated: Gym reports that the rollout was cut.
        fields: Numbers of the verify response by name.
        components: Numbers of its `reward_components` by name.
    """

    agent: str
    group: str
    task: int
    is_valid: bool
    trained_reward: float | None
    reward: float | None
    success: float | None
    failure: str | None
    drift: str | None
    has_tokens: bool
    attempts: int
    seconds: float
    model_seconds: float | None = None
    queue_seconds: float | None = None
    turns: int = 0
    prompt_tokens: int = 0
    environment_tokens: int = 0
    sampled_tokens: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    is_truncated: bool = False
    fields: dict[str, float] = field(default_factory=dict)
    components: dict[str, float] = field(default_factory=dict)


def facts_of(rollout: Rollout, reward: float | None, batch: str) -> RolloutFacts:
    """The facts of a rollout, whose group is not left out so far.

    Args:
        rollout: Has ended.
        reward: The one to train on; None for a rollout that is not trained.
        batch: Name of its generation batch, the same on every rank.
    """
    answer = rollout.answer if rollout.failure is None else None
    trained = rollout.trajectories[0] if rollout.trajectories else None
    calls, errors = _tool_calls(answer)
    return RolloutFacts(
        agent=rollout.request.agent,
        group=f"{batch}-g{rollout.request.group}",
        task=rollout.request.task_index,
        is_valid=reward is not None,
        trained_reward=reward,
        reward=rollout.reward,
        success=_finite(rollout.success),
        failure=None if rollout.failure is None else str(rollout.failure.kind),
        drift=None if rollout.drift is None else str(rollout.drift.cause),
        has_tokens=rollout.failure is None or rollout.drift is not None,
        attempts=rollout.request.attempt + 1,
        seconds=rollout.seconds,
        model_seconds=_total(rollout, "seconds"),
        queue_seconds=_total(rollout, "queue_s"),
        turns=sum(trajectory.num_turns for trajectory in rollout.trajectories),
        prompt_tokens=len(trained.prompt_ids) if trained else 0,
        environment_tokens=trained.env_mask.count(0) if trained else 0,
        sampled_tokens=trained.env_mask.count(1) if trained else 0,
        tool_calls=calls,
        tool_errors=errors,
        is_truncated=is_truncated(rollout),
        fields=rollout.metrics(),
        components=_numbers((answer or {}).get("reward_components")),
    )


def is_truncated(rollout: Rollout) -> bool:
    """Whether Gym reports that the rollout was cut (`incomplete_details`). The last token does not tell: a rollout may
    end on a tool result, or be cut by its budget right after the end of a turn."""
    return rollout.failure is None and rollout.answer is not None and finish_reason(rollout.answer) != "stop"


def is_tool_error(text: str) -> bool:
    """Whether a tool result says that the call failed. NeMo Gym hands the body of any HTTP answer on as the result, so
    this reads the bodies: a JSON object with `error` or FastAPI's `detail`, or the text of an unhandled exception."""
    if text == _SERVER_ERROR_TEXT:
        return True
    if '"error"' not in text and '"detail"' not in text:
        return False  # the common case; a result may be large
    try:
        body = json.loads(text)
    except ValueError:
        return False
    return isinstance(body, dict) and (bool(body.get("error")) or set(body) == {"detail"})


def _tool_calls(answer: Mapping[str, Any] | None) -> tuple[int, int]:
    """Tool calls and how many of them failed."""
    output: Sequence[Mapping[str, Any]] = ((answer or {}).get("response") or {}).get("output") or []
    results = [item.get("output") for item in output if item.get("type") == "function_call_output"]
    num_calls = sum(item.get("type") == "function_call" for item in output)
    return num_calls, sum(isinstance(result, str) and is_tool_error(result) for result in results)


def _total(rollout: Rollout, name: str) -> float | None:
    records: Sequence[Mapping[str, Any]] = rollout.records or []
    values = [record[name] for record in records if record[name] is not None]
    return sum(values) if values else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, bool | int | float) and math.isfinite(value)
    }
