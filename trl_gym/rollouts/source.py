"""Training from a journal: rollouts are looked up instead of collected. Nothing is sampled, no server is needed.

    dataset row ── task hash ──► recorded groups of that task ── one per pass over the dataset ──► its members

A group is replayed whole: its members were sampled by the same weights, and their rewards are each other's baseline.
On its first pass over the dataset a run takes a task's first recorded group, on the next pass the next one, and starts
again after the last. The choice depends on the pass alone, so every rank makes the same one and a resumed run goes on
where it was.

The recorded log-probabilities are those of the weights that sampled. TRL's importance ratio is computed from them, so
what is trained is off policy and knows it; `rollouts/staleness` says by how many optimizer steps.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import ConfigError, FailureKind, RolloutError, RolloutFailure
from trl_gym.policy_server.middleware.calls import CallRecord
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.call_records import ledger_for, match_records
from trl_gym.rollouts.collection import RolloutResult
from trl_gym.rollouts.collector import RolloutCollector
from trl_gym.rollouts.journal import Line, Recorder, read_line, read_lines
from trl_gym.rollouts.request import RolloutRequest, task_hash
from trl_gym.rollouts.reuse import Recover, SurvivingCollector
from trl_gym.rollouts.rollout import Rollout, from_record, journal_record
from trl_gym.rollouts.trajectory import (
    Decode,
    Drift,
    DriftError,
    DriftPolicy,
    DriftReport,
    Trajectory,
    TrajectoryError,
    explain,
    model_calls,
)

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig
    from trl_gym.run.servers import RunServers


# --------------------------------------------------------------------------------------------------------------------
# What happens to each rollout as it ends: trajectory, explained drift, journal.


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


_NEEDED = ("task_hash", "member", "verify", "turn_ends")  # a journal of an earlier trl-gym has none of them


@dataclass(slots=True)
class _Group:
    """The rollouts of one recorded group: by member, where the line stands."""

    members: dict[int, Line] = field(default_factory=dict)


class ReplayCollector:
    """Answers requests with recorded rollouts. A `Collector`.

    Args:
        folder: A journal: of a training run, or of `trl-gym rollout`. Rollouts of evaluations in it are left out.
        pass_number: How often the dataset has been gone through, beginning with 0.

    Raises:
        ConfigError: There is nothing in it to train on, or an earlier version wrote it.
        ValueError: A line that is not the last of its file is not JSON.
    """

    def __init__(self, folder: str | Path, pass_number: Callable[[], int]) -> None:
        self.folder = Path(folder)
        self._pass_number = pass_number
        self._groups = _index(self.folder)

    def collect(self, requests: Sequence[RolloutRequest], finish: Any = None, progress: Any = None) -> list[Rollout]:
        """The recorded rollout of every request, failures included.

        Raises:
            ConfigError: There is none for a request; names the task and the member.
        """
        number = self._pass_number()
        return [self._replay(request, number) for request in requests]

    def replay(
        self, requests: Sequence[RolloutRequest], *, mode: str, step: int
    ) -> tuple[list[Rollout], dict[str, list[float]]]:
        """A batch at an optimizer step, and its metrics.

        Raises:
            RolloutError: The mode is not `"train"`.
            ConfigError: See `collect`.
        """
        if mode != "train":
            raise RolloutError("`gym_replay` has no rollouts of the current weights; nothing can be evaluated.")
        return self.collect(requests), staleness(step, self.weight_versions(requests))

    def weight_versions(self, requests: Sequence[RolloutRequest]) -> list[int]:
        """Versions that the recorded rollouts were sampled by, for those where they are optimizer steps."""
        number = self._pass_number()
        versions = (self._line(request, number).record["weight_versions"] for request in requests)
        return [int(own[0]) for own in versions if own and own[0].isdecimal()]

    def close(self) -> None:
        """Nothing to give up."""

    def _replay(self, request: RolloutRequest, number: int) -> Rollout:
        line = self._line(request, number)
        return from_record(read_line(line.path, line.offset, line.length), request)

    def _line(self, request: RolloutRequest, number: int) -> Line:
        groups = self._groups.get(task_hash(request.row))
        if groups is None:
            question = str(request.row.get("responses_create_params", {}).get("input"))[:200]
            raise ConfigError(
                f"`gym_replay` is {str(self.folder)!r}, and that journal has no rollout of the task with index "
                f"{request.task_index} ({question}). Train on the dataset that was rolled out, or roll this one out: "
                "`trl-gym rollout --dataset FILE …`."
            )
        members = groups[number % len(groups)].members
        if request.member not in members:
            largest = max(len(group.members) for group in groups)
            raise ConfigError(
                f"`gym_replay` is {str(self.folder)!r}, and its rollouts of the task with index {request.task_index} "
                f"are in groups of at most {largest}; `num_generations` must not be above the recorded one."
            )
        return members[request.member]


def check_replay(args: GymGRPOConfig, *, has_servers: bool) -> None:
    """Refuse what cannot be had without servers, all of it at once.

    Args:
        args: With `gym_replay`.
        has_servers: Whether a policy server or a NeMo Gym was passed to the trainer.

    Raises:
        ConfigError: Evaluation is asked for, the importance ratio is off, or servers would stand idle.
    """
    problems = []
    if args.eval_on_start or str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        problems.append("a journal has no rollouts of new weights to evaluate; set `eval_strategy` to 'no'.")
    if not args.vllm_importance_sampling_correction:
        problems.append(
            "recorded rollouts are off policy, and `vllm_importance_sampling_correction` is false; leave it at true."
        )
    if has_servers:
        problems.append("nothing is sampled; leave out `policy_server` and `gym_servers`.")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"`gym_replay` is {args.gym_replay!r} and other options do not go with it:\n{listed}")


def staleness(step: int, versions: Sequence[int]) -> dict[str, list[float]]:
    """Metrics of replayed rollouts: optimizer steps since the weights that sampled them. Below 0 where the journal is
    of a run that had come further."""
    return {"rollouts/staleness": [float(step - version) for version in versions]} if versions else {}


def _index(folder: Path) -> dict[str, list[_Group]]:
    """Groups by task, in the order in which they were recorded; of a rollout recorded twice, the better line.

    Groups of which members are missing (the run was interrupted) come last, so that they are used only where nothing
    else is there.
    """
    groups: defaultdict[str, dict[tuple[Any, ...], _Group]] = defaultdict(dict)
    num_lines = num_trainable = 0
    for line in read_lines(folder):
        record = line.record
        if record["mode"] not in ("train", "rollout") or record.get("retried") or _is_cancelled(record):
            continue
        if missing := [name for name in _NEEDED if name not in record]:
            raise ConfigError(
                f"`gym_replay`: {line.path} was written by an earlier version of trl-gym (no {', '.join(missing)}); "
                "it can be viewed and not trained on."
            )
        num_lines += 1
        num_trainable += bool(record["completion_ids"]) and record["failure"] is None
        group = groups[record["task_hash"]].setdefault(_group_key(record), _Group())
        _keep_better(group, line)
    if not num_trainable:
        why = "none of its rollouts has token ids and a reward" if num_lines else "it has no rollouts of training"
        raise ConfigError(
            f"`gym_replay` is {str(folder)!r} and there is nothing to train on: {why}. Token ids are recorded when "
            "the policy is served by trl-gym (`trl-gym serve` or `trl-gym gateway`)."
        )
    return {
        task: sorted(recorded.values(), key=lambda group: -len(group.members)) for task, recorded in groups.items()
    }


def _is_cancelled(record: Mapping[str, Any]) -> bool:
    """Whether it was given up with its batch, which was never trained on."""
    return record["failure"] is not None and record["failure"]["kind"] == FailureKind.CANCELLED


def _group_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record.get("run"), record.get("weights"), record["step"], record["group"], record.get("dataset")


def _keep_better(group: _Group, line: Line) -> None:
    """A later line replaces an earlier one, except that a failure does not replace a reward."""
    record = line.record
    before = group.members.get(record["member"])
    if before is None or before.record["reward"] is None or record["reward"] is not None:
        kept = {"reward": record["reward"], "weight_versions": record["weight_versions"]}
        group.members[record["member"]] = Line(line.path, line.offset, line.length, kept)


# --------------------------------------------------------------------------------------------------------------------
# The collector of a run: live rollouts on its NeMo Gym, that outlive the policy server.


def live_collector(
    args: GymGRPOConfig,
    servers: RunServers,
    recover: Recover,
    *,
    version: Callable[[], str],
    after: Callable[[], None],
) -> SurvivingCollector:
    """Put together what the configuration says about rollouts.

    Args:
        args: The trainer's configuration.
        servers: The run's, ready.
        recover: See `SurvivingCollector`.
        version: See `SurvivingCollector`.
        after: See `SurvivingCollector`.

    Raises:
        ConfigError: `gym_environments` names an agent that is not there.
    """
    policy, gym = servers.policy, servers.gym
    budgets = budgets_from_options(
        deadline_s=args.gym_deadline,
        max_inflight=args.gym_max_inflight,
        retries=args.gym_retries,
        launch_rate=args.gym_launch_rate,
        environments=args.gym_environments,
    )
    budgets.check_agents(gym.agents)
    live: RolloutCollector[Rollout] = RolloutCollector(
        gym.agent,
        budgets=budgets,
        check=servers.check,
        agents_down=gym.agents_down,
        on_environment_down=args.gym_on_environment_down,
        gym_log=gym.log_end,
        ledger=ledger_for(policy.base_url, policy.client.api_key) if policy.keeps_records else None,
        stall_timeout_s=args.gym_stall_timeout,
    )
    return SurvivingCollector(
        live,
        recover,
        version=version,
        before=servers.check_before_rollouts,
        after=after,
        cancel=policy.client.cancel_rollouts if policy.keeps_records else lambda rollout_ids: None,
    )
