"""Recorded rollouts for tests: requests as the trainer makes them, and the journal's lines for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.rollouts.sampled import calls_in
from trl_gym.errors import RolloutFailure
from trl_gym.rollouts.journal import Journal
from trl_gym.rollouts.queue import TaskGroup
from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.rollout import Rollout, journal_record
from trl_gym.rollouts.trajectory import from_calls

POLICY = Policy(run="run", version=3, weights="abc")


def request(
    task: int = 0,
    member: int = 0,
    group: int | None = None,
    sampling: Sampling | None = None,
    rollout_id: str = "x",
    agent: str = "calculator",
) -> RolloutRequest:
    """Of the task with the question `f"{task} + 1?"`, for the step after that of `POLICY`."""
    row = {"responses_create_params": {"input": f"{task} + 1?"}, "expected": task + 1}
    identity: dict[str, Any] = {"rollout_id": rollout_id, "task_index": task, "member": member}
    stamped = stamp(row, **identity, sampling=sampling or Sampling(), completion_budget=64)
    group = task if group is None else group
    return RolloutRequest(**identity, step=POLICY.version + 1, group=group, attempt=0, agent=agent, row=stamped)


def grouped(requests: Sequence[RolloutRequest], begun: Policy | None = None) -> list[TaskGroup]:
    """As the trainer hands requests over: by batch and group."""
    parts = itertools.groupby(requests, key=lambda one: (one.batch, one.group))
    return [
        TaskGroup(
            batch=batch,
            index=group,
            example={"task_index": own[0].task_index},
            requests=own,
            num_wanted=len(own),
            begun=begun,
        )
        for (batch, group), own in ((place, tuple(found)) for place, found in parts)
    ]


def rollout(asked: RolloutRequest, reward: float = 1.0, failure: RolloutFailure | None = None) -> Rollout:
    """One model call: prompt `[1, task]`, sampled `[7, 8 + member]`."""
    item = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "2"}],
        "prompt_token_ids": [1, asked.task_index],
        "generation_token_ids": [7, 8 + asked.member],
        "generation_log_probs": [-0.25, -0.5],
    }
    answer = {"response": {"output": [item]}, "reward": reward, "success": reward > 0, "note": "fine"}
    return Rollout(
        request=asked,
        answer=None if failure else answer,
        failure=failure,
        trajectories=[] if failure else from_calls(calls_in(answer)),
        seconds=0.5,
    )


def write(folder: Path, rollouts: list[Rollout], policy: Policy = POLICY, rank: int = 0, **changes: Any) -> None:
    """As the trainer does."""
    journal = Journal(folder, rank=rank)
    for one in rollouts:
        line = journal_record(one, mode="train", weight_version=str(policy.version))
        journal.append({**line, "step": policy.version + 1, **policy.tags(), **changes})
    journal.close()
