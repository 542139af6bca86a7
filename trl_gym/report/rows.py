"""A line of the journal → one small row for tables, curves and filters. Pure.

Lines of earlier versions lack keys that came later; a missing value counts as not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_gym.responses import count_tool_calls, input_items, model_call_indices, output_items, text_of
from trl_gym.rollouts.rollout import recorded_rows, success_of

_MEMBER = re.compile(r"-m(\d+)-a\d+$")
_TASK_CHARACTERS = 4000  # of a task; what tells it from others may stand behind a long introduction


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One attempt of a rollout.

    The others are those of `rollouts.rollout.RolloutFacts`.
    """

    rollout_id: str  # its name in links
    mode: str  # `"train"`, `"eval"` or `"rollout"`
    step: int  # number, from 1, of the optimizer step that it was sampled for; in an evaluation, the steps made before
    dataset: str  # name of the dataset; `""` where none is recorded
    agent: str  # name of the Gym agent, which is the environment
    begun: int  # version of the weights that it began with; the step where that is not recorded
    # Run and fingerprint of these weights; what another one of the same version sampled is of another try.
    sampler: tuple[str, str]
    task: str  # key of its task
    # Number of its generation batch in the run; None outside of training, and in lines of earlier versions, where the
    # step tells batches apart.
    batch: int | None
    # group, member: Its place in the batch.
    group: int
    member: int
    attempt: int  # 0 for the first try
    time: float  # seconds since 1970 when it ended; 0.0 where that is not recorded
    reward: float | None
    success: float | None
    failure: str | None
    cause: str | None  # the failure in words, or None
    where: str | None  # the stage at which it failed
    drift: str | None
    finish: str | None  # `"stop"`, or why Gym cut it; None when there is no answer
    is_retried: bool  # the line says that another attempt follows
    version: str  # the weights' version, or several with commas
    # turns, tool_calls, tool_errors: None where the answer is not recorded.
    turns: int | None
    rows: int  # token sequences that are trained of it; 0 without tokens
    # prompt_tokens, environment_tokens, sampled_tokens: None without tokens.
    prompt_tokens: int | None
    environment_tokens: int | None
    sampled_tokens: int | None
    tool_calls: int | None
    tool_errors: int | None
    seconds: float | None
    text: str  # the task's last user message, on one line, cut

    @property
    def is_truncated(self) -> bool:
        return self.failure is None and self.finish not in (None, "stop")

    @property
    def group_key(self) -> tuple[Any, ...]:
        """Key of its group, whose members may have begun with several weights."""
        sampler = self.sampler if self.batch is None else self.sampler[:1]
        return self.mode, self.dataset, *self._batch, sampler, self.group, self.agent, self.task

    @property
    def slot(self) -> tuple[Any, ...]:
        """Key of its rollout: the same for all attempts at it, tries by other weights included."""
        run = "" if self.batch is None else self.sampler[0]
        return self.mode, self.dataset, *self._batch, run, self.group, self.agent, self.task, self.member

    @property
    def _batch(self) -> tuple[int, int]:
        """What tells generation batches apart: their number, or the step."""
        return (-1, self.step) if self.batch is None else (self.batch, -1)


def row_of(record: Mapping[str, Any]) -> Row:
    """Read the row of a journal's line."""
    failure, drift = record.get("failure"), record.get("drift")
    reward = record.get("reward")
    rows = recorded_rows(record)
    masks = [row.get("env_mask") or [] for row in rows]
    calls, errors = (None, None) if record.get("response") is None else count_tool_calls(output_items(record))
    return Row(
        rollout_id=str(record.get("rollout_id")),
        mode=str(record.get("mode") or "train"),
        step=int(record["step"]),
        dataset=str(record.get("dataset") or ""),
        agent=str(record.get("agent")),
        begun=int(record["step"] if record.get("version") is None else record["version"]),
        sampler=(str(record.get("run") or ""), str(record.get("weights") or "")),
        task=str(record.get("task_hash") or record.get("task_index")),
        batch=record.get("batch") if record.get("mode") in (None, "train") else None,
        group=int(record.get("group") or 0),
        member=_member(record),
        attempt=int(record.get("attempt") or 0),
        time=float(record.get("time") or 0.0),
        reward=None if reward is None else float(reward),
        success=None if reward is None else success_of(record.get("verify") or {}, reward),
        failure=None if failure is None else str(failure.get("kind")),
        cause=None if failure is None else str(failure.get("text")),
        where=None if failure is None else str(failure.get("where") or ""),
        drift=None if drift is None else str(drift.get("cause")),
        finish=record.get("finish_reason"),
        is_retried=bool(record.get("retried")),
        version=", ".join(map(str, record.get("weight_versions") or [])),
        turns=_turns(record),
        rows=len(rows),
        prompt_tokens=sum(len(row.get("prompt_ids") or []) for row in rows) if rows else None,
        environment_tokens=sum(mask.count(0) for mask in masks) if rows else None,
        sampled_tokens=sum(mask.count(1) for mask in masks) if rows else None,
        tool_calls=calls,
        tool_errors=errors,
        seconds=record.get("seconds"),
        text=_text(record),
    )


def _member(record: Mapping[str, Any]) -> int:
    """Return its place in the group, which earlier versions recorded in the rollout's name alone."""
    named = _MEMBER.search(str(record.get("rollout_id")))
    return int(record.get("member", named[1] if named else 0))


def _turns(record: Mapping[str, Any]) -> int | None:
    """Return the number of model calls: the recorded ones; without, as the answer shows them; None without either."""
    recorded = sum(turn.get("kind") == "model" for turn in record.get("turns") or [])
    return recorded or len(set(model_call_indices(output_items(record))) - {None}) or None


def _text(record: Mapping[str, Any]) -> str:
    users = [item for item in input_items(record.get("row") or {}) if item.get("role") == "user"]
    text = text_of(users[-1].get("content")) if users else ""
    return " ".join(text[:_TASK_CHARACTERS].split())
