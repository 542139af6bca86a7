"""The source of a run's rollouts: the seam between the trainer and whatever makes them.

    dataset rows ──► groups of requests ──► RolloutSource.collect ──► groups of rollouts that have ended

`RolloutSource` is all that the trainer knows. `trl_gym.run.live.LiveSource` samples on a policy server and a NeMo Gym;
`JournalSource`, in this module, looks rollouts up that an earlier run has recorded, and needs no server.

A recorded group is replayed whole: its members were sampled by the same weights, and their rewards are each other's
baseline. On its first pass over the dataset a run takes a task's first recorded group, on the next pass the next one,
and starts again after the last. The choice depends on the pass alone, so every rank makes the same one and a resumed
run continues where it was. The recorded log-probabilities are those of the weights that sampled. TRL's importance
ratio is computed from them, so training is off policy and accounts for it; `rollouts/staleness/…` says by how many
optimizer steps.

`Finisher` turns an attempt that has ended into a rollout: trajectory, explained drift, a line in the journal.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from trl_gym.errors import ConfigError, FailureKind, Problem, RolloutError, RolloutFailure, naming
from trl_gym.policy_server.middleware.ledger import CallRecord
from trl_gym.rollouts.attempts import CollectionStatus, RolloutResult
from trl_gym.rollouts.counted_calls import DishonestAnswerError, counted_calls
from trl_gym.rollouts.journal import Attempt, Journal, Line, LineState, line_states, read_line, read_lines
from trl_gym.rollouts.queue import EndedGroup, TaskGroup
from trl_gym.rollouts.request import RolloutRequest, task_hash
from trl_gym.rollouts.rollout import Rollout, from_record, journal_record, recorded_rows
from trl_gym.rollouts.trajectory import (
    Decode,
    DriftError,
    DriftPolicy,
    ModelCall,
    Trajectories,
    Trajectory,
    TrajectoryError,
    finish_reason,
    model_calls,
    report_drift,
)

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig
    from trl_gym.gym.servers import GymServers
    from trl_gym.policy_server.server import PolicyBackend

Build = Callable[[dict[str, Any], RolloutRequest, Sequence[ModelCall]], list[Trajectory]]
"""Gym's answer, the request, the calls that count → trajectories. Raises `TrajectoryError` when there are none."""

TrainCalls = Literal["answer", "all"]
"""Which model calls are trained: those that Gym's answer contains, or all that the rollout made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInfo:
    """The generation batch that rollouts are for."""

    run: str  # id of the training run; a resumed run continues that of its checkpoint
    step: int  # number, from 1, of the optimizer step that trains it first; in an evaluation, the steps made before
    mode: str  # `"train"` or `"eval"`
    epoch: int = 0  # passes over the dataset made so far
    dataset: str = ""  # name of the evaluation set where there are several, else empty
    later_steps: tuple[int, ...] = ()  # of each generation batch to come for which rollouts may be in flight
    per_batch: int = 0  # groups of each of these on this rank
    # A batch is collected in several rounds where groups of it are replaced.
    is_first: bool = True  # nothing was collected for it before
    is_last: bool = True  # nothing will be


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerHooks:
    """Calls that a source may make to the trainer."""

    build: Build  # makes trajectories of Gym's answer
    tokenizer: Any  # the trainer's, of the policy
    push: Callable[[], None]  # sends the current weights to the policy server. Every rank calls it in step.
    progress: Callable[[CollectionStatus], None]  # told how far a batch is, from any thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Groups of one rank whose rollouts have ended."""

    groups: list[EndedGroup]  # as many as were asked for, by age
    # Values to log with this batch, by name; a name that several ranks have is averaged over all values. They are over
    # all rounds of the batch so far.
    metrics: dict[str, list[float]] = field(default_factory=dict)


class RolloutSource(Protocol):
    """A source of rollouts. Every rank has one and calls its methods in step: `start` once, `connect` once, then
    the others; `close` at any time.

    Attributes:
        policy_server: The policy server; None where nothing is sampled.
        gym_servers: NeMo Gym; None where nothing is sampled.
        folder: Where the rollouts are recorded.
    """

    @property
    def policy_server(self) -> PolicyBackend: ...

    @property
    def gym_servers(self) -> GymServers: ...

    @property
    def folder(self) -> Path: ...

    def start(self) -> None:
        """Start what takes long, without waiting for it; the model is loaded meanwhile."""

    def connect(self, accelerator: Accelerator, model: torch.nn.Module, hooks: TrainerHooks) -> None:
        """Wait until rollouts can be had.

        Args:
            model: The trainer's, wrapped.
            hooks: What the source may ask of the trainer.

        Raises:
            TrlGymError: Rollouts cannot be had; says why, on every rank.
        """

    def server_config(self) -> dict[str, Any]:
        """Return the policy server's resolved configuration, of which TRL reads `model_config.logprobs_mode`."""

    def agent_of(self, row: Mapping[str, Any]) -> str:
        """Return the name of the agent that a dataset row is for. Raises `ConfigError`: the row names none and there
        are several."""

    def push_weights(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        """Make the model's weights after an optimizer step those that are sampled with. Return metrics."""

    def take_optimizer(self, optimizer: Any) -> None:
        """Note the trainer's optimizer, which exists only when training begins."""

    def collect(self, groups: Sequence[TaskGroup], number: int, batch: BatchInfo) -> Collected:
        """Take further groups of this rank, and return some that have ended: of these, or of those taken before.

        Args:
            number: How many to return. What is left is in flight until it is asked for.

        Raises:
            TrlGymError: They cannot be had; on every rank.
        """

    @property
    def in_flight(self) -> list[TaskGroup]:
        """The groups of training that were taken and not returned, by age, with the policy that they began with."""

    def drain(self) -> None:
        """Wait until nothing samples any more."""

    def abandon(self) -> None:
        """Give up what is in flight: training has ended. Local."""

    def resumed(self) -> None:
        """Note that the run continues from a checkpoint: rollouts that were recorded after it count again."""

    def before_saving(self) -> None:
        """Make room for a checkpoint."""

    def describe(self) -> dict[str, str]:
        """Return what the model card says about it, by title."""

    def close(self) -> None:
        """Stop what was started. Idempotent."""


def check_build(build: Callable[..., Any]) -> None:
    """Refuse a trainer whose override of `build_trajectories` cannot be called as `Build`: that would end a batch.
    Raises `ConfigError`: it takes other arguments."""
    try:
        inspect.signature(build).bind({}, None, ())
    except TypeError as error:
        raise ConfigError(
            f"`build_trajectories` is overridden as {build.__qualname__}{inspect.signature(build)} and called with "
            f"(answer, request, calls): {error}.",
            "Add the parameter `calls`, the model calls that count with their tokens, and pass it on to `super()`.",
        ) from error


# -- recorded rollouts ------------------------------------------------------------------------------------------------

_NEEDED = (  # a journal of an earlier trl-gym lacks some of them
    *("task_hash", "group", "member", "verify", "response", "row", "failure", "drift", "seconds", "weight_versions"),
    *("prompt_ids", "completion_ids", "env_mask", "logprobs", "turn_ends"),
)


_Group = list[Line]  # where the lines of a recorded group stand that count, those with a reward first


class JournalSource:
    """Answers requests with recorded rollouts. A `RolloutSource`.

    Args:
        folder: A journal: of a training run, or of `trl-gym rollout`. Rollouts of evaluations in it are left out.

    Raises:
        ConfigError: There is nothing in it to train on, an earlier version wrote it, or a line of it cannot be read.
    """

    policy_server: Any = None
    gym_servers: Any = None

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._groups = _index(self.folder)

    def start(self) -> None:
        """Do nothing: no server is needed."""

    def connect(self, accelerator: Accelerator, model: torch.nn.Module, hooks: TrainerHooks) -> None:
        """Check that the model has the recorded tokens. Raises `ConfigError`: an id is not in its vocabulary, so
        another model sampled it."""
        config = accelerator.unwrap_model(model).config.get_text_config()
        largest = max(line.record["largest_id"] for groups in self._groups.values() for own in groups for line in own)
        if largest >= config.vocab_size:
            raise ConfigError(
                f"`gym_replay` is {str(self.folder)!r}, and a rollout in it has the token id {largest}, which is not "
                f"in the vocabulary of the model ({config.vocab_size} ids): another model sampled it.",
                "Train the model that was rolled out, or roll out with this one.",
            )

    def server_config(self) -> dict[str, Any]:
        """Say that recorded log-probabilities are those of the distribution that was drawn from."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def agent_of(self, row: Mapping[str, Any]) -> str:
        """Return the row's own agent, or `"recorded"`."""
        return (row.get("agent_ref") or {}).get("name") or "recorded"

    def push_weights(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        """Do nothing: nothing is sampled with them."""
        return {}

    def take_optimizer(self, optimizer: Any) -> None:
        """Do nothing: no device is shared."""

    @property
    def in_flight(self) -> list[TaskGroup]:
        """Nothing: rollouts are there at once."""
        return []

    def collect(self, groups: Sequence[TaskGroup], number: int, batch: BatchInfo) -> Collected:
        """Return the recorded rollouts of each group. Raises `RolloutError`: an evaluation was asked for;
        `ConfigError`: there is none for a request; names the task and the member."""
        if batch.mode != "train":
            raise RolloutError(
                "`gym_replay` has no rollouts of the current weights; nothing can be evaluated.",
                "Set `eval_strategy` to 'no', or train with servers.",
            )
        requests = [request for group in groups for request in group.requests]
        lines = [self._line(request, batch.epoch) for request in requests]
        found = iter(zip(lines, requests, strict=True))
        return Collected(
            groups=[
                EndedGroup(
                    task=group,
                    rollouts=[
                        from_record(read_line(line.path, line.offset, line.length), request)
                        for line, request in itertools.islice(found, len(group.requests))
                    ],
                    born=batch.step - 1,
                )
                for group in groups
            ]
        )

    def drain(self) -> None:
        """Do nothing: nothing is in flight."""

    def abandon(self) -> None:
        """Do nothing: nothing is in flight."""

    def resumed(self) -> None:
        """Do nothing: recorded rollouts are always used."""

    def before_saving(self) -> None:
        """Do nothing: no device is shared."""

    def describe(self) -> dict[str, str]:
        """Return the row of the model card."""
        return {"Rollouts": "recorded by an earlier run, not sampled"}

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _line(self, request: RolloutRequest, epoch: int) -> Line:
        groups = self._groups.get(task_hash(request.row))
        if groups is None:
            question = str(request.row.get("responses_create_params", {}).get("input"))[:200]
            raise ConfigError(
                f"`gym_replay` is {str(self.folder)!r}, and that journal has no rollout of the task with index "
                f"{request.task_index} ({question}).",
                "Train on the dataset that was rolled out, or roll this one out: `trl-gym rollout --dataset FILE …`.",
            )
        recorded = groups[epoch % len(groups)]
        if request.member >= len(recorded):  # by rank: of an over-sampled group members were cancelled, and others not
            largest = max(map(len, groups))
            raise ConfigError(
                f"`gym_replay` is {str(self.folder)!r}, and its rollouts of the task with index {request.task_index} "
                f"are in groups of at most {largest}; `num_generations` is above that.",
                f"Set `num_generations` to {largest} or less.",
            )
        return recorded[request.member]


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
        problems.append(
            Problem("A journal has no rollouts of new weights to evaluate.", "Set `eval_strategy` to 'no'.")
        )
    if not args.vllm_importance_sampling_correction:
        problems.append(
            Problem(
                "Recorded rollouts are off policy, and `vllm_importance_sampling_correction` is false.",
                "Leave it at true.",
            )
        )
    if has_servers:
        problems.append(Problem("Nothing is sampled.", "Leave out `policy_server` and `gym_servers`."))
    if problems:
        raise ConfigError(
            f"`gym_replay` is {args.gym_replay!r} and other options do not go with it:", problems=problems
        )


def _index(folder: Path) -> dict[str, list[_Group]]:
    """Index the lines that count by task and group, in the order of recording.

    Groups of which members are missing (the run was interrupted) come last, so that they are used only where nothing
    else is there.
    """
    found: defaultdict[str, dict[_Place, dict[int, Line]]] = defaultdict(dict)
    lines, attempts = [], []
    for line in read_lines(folder):
        record = line.record
        if record.get("mode") not in ("train", "rollout"):
            continue
        if missing := [name for name in _NEEDED if name not in record]:
            raise ConfigError(
                f"`gym_replay`: {line.path} was written by an earlier version of trl-gym (it has no "
                f"{', '.join(missing)}); it can be viewed and not trained on.",
                "Roll the tasks out again with this version.",
            )
        batch = record.get("run"), record.get("batch"), record["group"], record.get("dataset")
        place = record["task_hash"], (batch, (record.get("weights"), record.get("version"))), record["member"]
        attempts.append(Attempt.of(record, place))
        has_ids = bool(record["completion_ids"])
        kept = {"place": place, "has_ids": has_ids, "has_failed": record["failure"] is not None}
        kept["largest_id"] = max(
            (max((*row["prompt_ids"], *row["completion_ids"]), default=0) for row in recorded_rows(record)), default=0
        )
        lines.append(Line(line.path, line.offset, line.length, kept))
    states = line_states(attempts)
    if not any(line.record["has_ids"] and attempt.has_reward for line, attempt in zip(lines, attempts, strict=True)):
        why = "none of its rollouts has token ids and a reward" if lines else "it has no rollouts of training"
        raise ConfigError(
            f"`gym_replay` is {str(folder)!r} and there is nothing to train on: {why}. Token ids are recorded when "
            "the policy is served by trl-gym.",
            "Serve it with `trl-gym serve` or `trl-gym gateway` while you roll out.",
        )
    for line, state in zip(lines, states, strict=True):
        if state is LineState.COUNTED:
            task, group, member = line.record["place"]
            found[task].setdefault(group, {})[member] = line
    return {task: _ordered(_joined(recorded)) for task, recorded in found.items()}


_Place = tuple[tuple[Any, ...], tuple[Any, ...]]  # a group in a run, and the policy that it began with


def _joined(recorded: Mapping[_Place, dict[int, Line]]) -> list[dict[int, Line]]:
    """Join what began with several policies and is one group all the same: other members of it were lost with the
    policy server, and ran again when there were newer weights. A group that was sampled twice has a member twice."""
    by_group: defaultdict[Any, list[dict[int, Line]]] = defaultdict(list)
    for (batch, policy), members in recorded.items():
        others = by_group[batch, policy if batch[1] is None else None]  # earlier versions recorded no batch
        if others and others[-1].keys().isdisjoint(members):
            others[-1] |= members
        else:
            others.append(dict(members))
    return [members for own in by_group.values() for members in own]


def _ordered(groups: Sequence[Mapping[int, Line]]) -> list[_Group]:
    """Return the groups, the largest first, each by member and with its failures last."""
    return [
        [members[member] for member in sorted(members, key=lambda one: (members[one].record["has_failed"], one))]
        for members in sorted(groups, key=len, reverse=True)
    ]


# -- what happens to each rollout as it ends --------------------------------------------------------------------------


class OwnSampling:
    """Says once, for each agent and field, that model calls ask for another distribution than the run's.

    Args:
        policy_of: Returns what the policy server does with such calls of an agent (`gym_agent_sampling`).
    """

    def __init__(self, say: Callable[[str], None], policy_of: Callable[[str], str]) -> None:
        self._say, self._policy_of = say, policy_of
        self._told: set[tuple[str, str]] = set()

    def look(self, agent: str, records: Sequence[CallRecord]) -> None:
        """Look at the policy server's records of one rollout."""
        found = {(agent, name) for record in records for name in record.own_sampling} - self._told
        if not found:
            return
        self._told |= found
        names, policy = ", ".join(sorted(name for _, name in found)), self._policy_of(agent)
        what = {
            "strip": "that is left out, so that tokens are drawn from the distribution that is trained",
            "refuse": "such calls are refused",
            "allow": "they are sampled so, seeds and the run's own parameters excepted, while training computes the "
            "log-probabilities without it",
        }
        self._say(
            f"Model calls of {agent}, or its rows (`metadata.extra_body`), ask for sampling of their own ({names}): "
            f"{what[policy]}. `gym_agent_sampling` is {policy!r}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finisher:
    """Turns an attempt that has ended into a rollout. Called once per attempt, in the collector's thread."""

    build: Build  # makes trajectories of the model calls that count
    decode: Decode  # text of token ids
    journal: Journal  # gets a line per attempt
    train_calls: TrainCalls = "answer"  # which model calls count
    has_ledger: bool = True  # whether the policy server says which tokens it sampled
    drift_policy: DriftPolicy  # with `"error"`, drift raises
    mode: str  # `"train"` or `"eval"`
    weight_version: str  # the version that the policy server holds
    tags: Mapping[str, Any] = field(default_factory=dict)  # fields that are added to every line
    own_sampling: OwnSampling | None = None  # tells of sampling of an agent's own
    # Says why an answer with a reward cannot be trained on all the same.
    problem_of: Callable[[Mapping[str, Any]], str | None] | None = None

    def __call__(self, result: RolloutResult) -> Rollout:
        """Return the rollout, which is in the journal then. Raises `RolloutError`: the rollout drifted and the drift
        policy is `"error"`, `build` raised something else than `TrajectoryError`, or the journal cannot be written."""
        rollout = self._rollout(result)
        if self.own_sampling is not None:
            self.own_sampling.look(result.request.agent, result.records or ())
        record = journal_record(rollout, mode=self.mode, weight_version=self.weight_version)
        # The line of an attempt that is not the last says so: whoever counts rollouts leaves it out.
        failed_for = None if rollout.failure is None else rollout.failure.kind
        record["retried"] = result.was_lost or failed_for in result.retried_kinds
        self.journal.append({**record, **self.tags})
        if rollout.drift is not None and self.drift_policy == "error":
            raise RolloutError(
                f"Rollout {result.request.rollout_id} of {result.request.agent} drifted, and `gym_drift` is 'error': "
                f"{rollout.drift.text}.",
                "Set `gym_drift` to 'truncate' to train on the tokens before, or to 'exclude' to train on none of it.",
            )
        return rollout

    def _rollout(self, result: RolloutResult) -> Rollout:
        failure, trajectories, drift = result.failure, Trajectories(()), None
        calls: Sequence[ModelCall] = model_calls(result.records or ())
        agent = result.request.agent
        if failure is None and result.records is None and self.has_ledger:
            failure = RolloutFailure(
                kind=FailureKind.INFRASTRUCTURE,
                text="the policy server cannot say which tokens it sampled: it was lost, or had no room for them",
                where=agent,
            )
        elif failure is None and self.problem_of is not None and (problem := self.problem_of(result.answer or {})):
            text = f"the answer cannot be used: {problem}"
            failure = RolloutFailure(kind=FailureKind.ENVIRONMENT, text=text, where=agent)
        elif failure is None:
            assert result.answer is not None, "an attempt ends with an answer or a failure"
            try:
                if result.records is not None:
                    calls = self._counted(result.answer, calls, has_called=bool(result.records))
                with naming("build_trajectories", result.request.described, unless=TrajectoryError):
                    built = list(self.build(result.answer, result.request, calls))
                    trajectories = Trajectories(built)
                drift = next((one.drift for one in built if one.drift is not None), None)
            except DishonestAnswerError as error:
                text = f"the answer contradicts the policy server, which owns the tokens: {error}"
                failure = RolloutFailure(kind=FailureKind.ENVIRONMENT, text=text, where=agent)
            except TrajectoryError as error:
                drift = error.drift if isinstance(error, DriftError) else None
                cut = finish_reason(result.answer)
                text = str(error) if calls or cut == "stop" else f"{error}: the first one was already cut ({cut})"
                failure = RolloutFailure(kind=FailureKind.POLICY, text=text, where=agent)
        report = None if drift is None else report_drift(drift, self.decode)
        if failure is not None and failure is not result.failure:
            failure = failure.of(**result.request.identity, seconds=result.seconds)
            if report is not None:
                failure = dataclasses.replace(failure, text=f"excluded for drift: {report.text}")
        records = result.records
        return Rollout(
            request=result.request,
            answer=result.answer,
            failure=failure,
            trajectories=trajectories,
            seconds=result.seconds,
            drift=report,
            records=records and [msgspec.structs.replace(record, tokens=None) for record in records],
            counted=tuple(call.index for call in calls),
        )

    def _counted(
        self, answer: Mapping[str, Any], calls: Sequence[ModelCall], *, has_called: bool
    ) -> Sequence[ModelCall]:
        """Return the calls that are trained. An answer must not contradict the ledger, whichever they are."""
        counted = counted_calls(answer, calls, may_leave_out=self.train_calls == "all")
        if not has_called:
            raise DishonestAnswerError("no model call of this rollout has reached it")
        if self.train_calls == "all":
            return calls
        if calls and not counted:
            raise DishonestAnswerError(f"it contains none of the rollout's {len(calls)} model calls")
        return counted
