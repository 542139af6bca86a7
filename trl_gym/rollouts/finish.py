"""What happens to each rollout as it ends: trajectory, explained drift, journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trl_gym.errors import FailureKind, RolloutError, RolloutFailure
from trl_gym.policy_server.middleware.calls import CallRecord
from trl_gym.rollouts.call_records import match_records
from trl_gym.rollouts.collection import RolloutResult
from trl_gym.rollouts.drift import Decode, DriftReport, explain
from trl_gym.rollouts.journal import Recorder
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout, journal_record
from trl_gym.rollouts.trajectory import Drift, DriftError, DriftPolicy, Trajectory, TrajectoryError, model_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Finisher:
    """Called once per attempt of a rollout, in the collector's thread.

    Attributes:
        build: Gym's answer and the request → trajectories; raises `TrajectoryError`.
        decode: Text of token ids.
        journal: Gets a line per attempt.
        drift_policy: With `"error"`, drift raises.
        step: Optimizer step whose weights sample this batch.
        mode: `"train"` or `"eval"`.
        weight_version: What the policy server holds.
    """

    build: Callable[[dict[str, Any], RolloutRequest], list[Trajectory]]
    decode: Decode
    journal: Recorder
    drift_policy: DriftPolicy
    step: int
    mode: str
    weight_version: str

    def __call__(self, result: RolloutResult) -> Rollout:
        """
        Raises:
            RolloutError: The rollout drifted and the drift policy is `"error"`; it is in the journal.
            OSError: The journal cannot be written.
        """
        rollout = self._rollout(result)
        record = journal_record(rollout, step=self.step, mode=self.mode, weight_version=self.weight_version)
        # The line of an attempt that is not the last says so: whoever counts rollouts leaves it out.
        failed_for = None if rollout.failure is None else rollout.failure.kind
        record["retried"] = result.was_lost or failed_for in result.retried_kinds
        self.journal.append(record)
        if rollout.drift is not None and self.drift_policy == "error":
            raise RolloutError(
                f"Rollout {result.request.rollout_id} of {result.request.agent} drifted, and `gym_drift` is 'error': "
                f"{rollout.drift.text}. With 'truncate' the tokens before are trained, with 'exclude' none of it."
            )
        return rollout

    def _rollout(self, result: RolloutResult) -> Rollout:
        failure, trajectories, drift = result.failure, [], None
        if failure is None:
            assert result.answer is not None, "an attempt ends with an answer or a failure"
            try:
                trajectories = self.build(result.answer, result.request)
                drift = next((t.drift for t in trajectories if t.drift is not None), None)
            except TrajectoryError as error:
                drift = error.drift if isinstance(error, DriftError) else None
                failure = RolloutFailure(kind=FailureKind.POLICY, text=str(error), where=result.request.agent)
                failure = failure.of(**result.request.identity, seconds=result.seconds)
        report = None if drift is None else self._explain(drift, result)
        if report is not None and failure is not None:
            failure = dataclasses.replace(failure, text=f"excluded for drift: {report.text}")
        return Rollout(
            request=result.request,
            answer=result.answer,
            failure=failure,
            trajectories=trajectories,
            seconds=result.seconds,
            drift=report,
            records=result.records,
        )

    def _explain(self, drift: Drift, result: RolloutResult) -> DriftReport:
        matched: list[CallRecord] | None = match_records(model_calls(result.answer or {}), result.records or [])
        return explain(drift, self.decode, matched[drift.turn] if matched else None)
