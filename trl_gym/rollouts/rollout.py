"""A finished rollout: what was asked, what came back, what is trained. Pure.

Rollout ─ journal_record ─► a line of the journal ─ from_record ─► the same rollout
        ├ conversation ───► chat messages for reward functions and tables
        └ facts_of ───────► numbers that every rank gets of every rollout, for metrics
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.policy_server.middleware.ledger import CallRecord, DriftCause
from trl_gym.responses import completion_messages, count_tool_calls, model_call_indices, output_items
from trl_gym.rollouts.ledger import weight_versions
from trl_gym.rollouts.request import RolloutRequest, request_hash, task_hash
from trl_gym.rollouts.trajectory import DriftReport, Trajectories, Trajectory, finish_reason
from trl_gym.untrusted import number

# Fields of a verify response that are the protocol's, not measurements of the environment.
_NOT_METRICS = ("responses_create_params", "response", "reward", "agent_ref")
# Fields of Gym's answer that a journal's line has elsewhere, or can do without: the parameters are in the row.
_MEASURED = ("cached_tokens", "queue_s", "prefill_s", "decode_s", "weight_version")  # of a model call
_NOT_VERIFIED = ("responses_create_params", "response")
_STEP = re.compile(r"[0-9]{1,15}")  # a weight version that is an optimizer step


@dataclass(frozen=True, slots=True)
class VersionedCall:
    """What one model call sampled, and under which weights."""

    first: str  # weight version of its first token
    last: str  # of its last token: another one where weights were pushed in between
    num_tokens: int  # that it sampled

    @classmethod
    def of(cls, first: Any, last: Any, num_tokens: Any) -> VersionedCall | None:
        """Return the call; None where its version or its tokens are not known."""
        is_known = first is not None and isinstance(num_tokens, int) and num_tokens > 0
        return cls(str(first), str(last or first), num_tokens) if is_known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout that has ended, well or badly.

    Attributes:
        answer: Gym's answer; None when there is none.
        failure: Why it has no reward; None when it has one.
        trajectories: The tokens that are trained; empty for a failed rollout. They share the reward. Their lists are
            made at each look, see `Trajectories`.
        drift: Where its history was rewritten first, and why; also for a rollout that failed because of it.
        records: The policy server's records of its model calls, without their tokens; None when the server keeps none.
        counted: Indices, in `records`, of the model calls that count; of a failed rollout, of all that are known.
        recorded: What `sampled_calls` returns of a rollout that was read from the journal, which has no `records`.
    """

    request: RolloutRequest
    answer: dict[str, Any] | None
    failure: RolloutFailure | None
    trajectories: Sequence[Trajectory]
    seconds: float
    drift: DriftReport | None = None
    records: list[CallRecord] | None = None
    counted: tuple[int, ...] = ()
    recorded: tuple[VersionedCall, ...] = ()

    @property
    def sampled_calls(self) -> tuple[VersionedCall, ...]:
        """The model calls that count and that sampled tokens under a known version, in order."""
        if self.records is None:
            return self.recorded
        records = self.records
        found = (
            VersionedCall.of(one.weight_version, one.last_version, one.completion_tokens)
            for one in (records[index] for index in self.counted)
        )
        return tuple(filter(None, found))

    @property
    def sampled(self) -> tuple[int, int]:
        """The number of model calls that count, and of the tokens that these sampled; also of a failed rollout, as far
        as the policy server has told."""
        if self.records is None:
            rows = list(self.trajectories)
            return sum(row.num_turns for row in rows), sum(row.env_mask.count(1) for row in rows)
        return len(self.counted), sum(self.records[index].completion_tokens or 0 for index in self.counted)

    @property
    def reward(self) -> float | None:
        """The environment's reward; None for a failed rollout, which leaves loss and group baseline."""
        return None if self.failure is not None or self.answer is None else float(self.answer["reward"])

    @property
    def success(self) -> float | None:
        """0 to 1, see `success_of`; None for a failed rollout."""
        reward = self.reward
        return None if reward is None or self.answer is None else success_of(self.answer, reward)

    @property
    def is_truncated(self) -> bool:
        """Tell whether Gym reports that the rollout was cut (`incomplete_details`).

        The last token does not tell: a rollout may end on a tool result, or be cut by its budget right after the end
        of a turn.
        """
        return self.failure is None and self.answer is not None and finish_reason(self.answer) != "stop"

    def metrics(self) -> dict[str, float]:
        """Return every measurement (a finite number below 1e100) at the top level of the verify response, e.g.
        `{"success": 1.0}`."""
        if self.failure is not None or self.answer is None:
            return {}
        return {
            name: value
            for name, value in _numbers(self.answer).items()
            if name not in _NOT_METRICS
            and not name.startswith("_ng_")
            and name not in self.request.row  # echoed task fields: part of the question, not of the result
        }


def success_of(answer: Mapping[str, Any], reward: float) -> float:
    """Return the verifier's own `success` where it reports a finite number, else whether the reward reached 1.

    Args:
        answer: Gym's answer, or `verify` of a journal's line.
        reward: The reward of the same rollout.
    """
    reported = number(answer.get("success"))
    return float(reward >= 1.0) if reported is None else reported


def conversation(rollout: Rollout) -> list[dict[str, Any]]:
    """Return what happened after the prompt as chat messages; see `responses.completion_messages`."""
    return completion_messages(output_items(rollout.answer))


# -- the journal's line -----------------------------------------------------------------------------------------------


def journal_record(rollout: Rollout, *, mode: str, weight_version: str) -> dict[str, Any]:
    """Return the journal's line for a rollout, without what the journal adds (`schema`, `rank`, `time`).

    Args:
        mode: `"train"`, `"eval"` or `"rollout"`.
        weight_version: The version that the policy server held, for a rollout without records of its model calls.
    """
    request, answer = rollout.request, rollout.answer or {}
    first, *further = map(_tokens, rollout.trajectories or [_NOTHING])
    components = answer.get("reward_components")
    return {
        "step": request.step,
        "mode": mode,
        "task_index": request.task_index,
        "task_hash": task_hash(request.row),
        "request_hash": request_hash(request.row),
        "batch": request.batch,
        "group": request.group,
        "member": request.member,
        "rollout_id": request.rollout_id,
        "attempt": request.attempt,
        "agent": request.agent,
        "weight_versions": weight_versions(rollout.records or []) or [weight_version],
        "reward": rollout.reward,
        "reward_components": components if isinstance(components, dict) else {},
        "failure": rollout.failure.as_json() if rollout.failure else None,
        "drift": rollout.drift.as_json() if rollout.drift else None,
        "finish_reason": finish_reason(answer) if answer else None,
        **first,
        "further_rows": further,
        "turns": list(_turns(rollout)),
        "seconds": round(rollout.seconds, 4),
        "row": request.row,
        "response": answer.get("response"),
        "verify": {name: value for name, value in answer.items() if name not in _NOT_VERIFIED},
    }


_TOKENS = ("prompt_ids", "completion_ids", "env_mask", "logprobs", "turn_ends")
_NOTHING = Trajectory(prompt_ids=[], completion_ids=[], env_mask=[], logprobs=[], num_turns=0)


def _tokens(trajectory: Trajectory) -> dict[str, list[Any]]:
    return {name: getattr(trajectory, name) for name in _TOKENS}


def recorded_rows(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a line's rows, each with `prompt_ids`, `completion_ids`, `env_mask`, `logprobs` and `turn_ends`.

    Args:
        record: The journal's line; one from when a rollout had one row has no `further_rows`.
    """
    return [record, *(record.get("further_rows") or ())] if record.get("completion_ids") else []


def _trajectory_from(tokens: Mapping[str, Any]) -> Trajectory:
    return Trajectory(**{name: tokens[name] for name in _TOKENS}, num_turns=len(tokens["turn_ends"]))


def from_record(record: Mapping[str, Any], request: RolloutRequest) -> Rollout:
    """Return a recorded rollout as the answer to a request for the same task.

    The trajectories are the recorded ones, to the token. Of Gym's answer only `responses_create_params` is not
    recorded: it is taken from the row that was sent.

    Args:
        request: The request that it answers now.

    Raises:
        KeyError: The line was written before journals could be read back (it has no `verify`).
    """
    failure, drift, verify = record["failure"], record["drift"], record["verify"]
    answer = None
    if record["response"] is not None:
        parameters = record["row"].get("responses_create_params")
        answer = {"responses_create_params": parameters, **verify, "response": record["response"]}
    return Rollout(
        request=request,
        answer=answer,
        failure=None if failure is None else _failure_from(failure),
        trajectories=Trajectories(map(_trajectory_from, recorded_rows(record))),
        seconds=record["seconds"],
        drift=None if drift is None else DriftReport(**{**drift, "cause": DriftCause(drift["cause"])}),
        recorded=tuple(_recorded_calls(record)),
    )


def _recorded_calls(record: Mapping[str, Any]) -> Iterator[VersionedCall]:
    """Yield the calls of a line; one call that sampled everything where it does not tell them apart."""
    turns = [turn for turn in record.get("turns") or () if turn.get("kind") == "model"]
    names = ("weight_version", "last_version", "generation_tokens")
    found = [VersionedCall.of(*map(turn.get, names)) for turn in turns]
    if not any(found) and (versions := record.get("weight_versions")):
        num_tokens = sum(list(row["env_mask"]).count(1) for row in recorded_rows(record))
        found = [VersionedCall.of(versions[0], versions[-1], num_tokens)]
    yield from filter(None, found)


def _failure_from(failure: Mapping[str, Any]) -> RolloutFailure:
    known = {field.name for field in dataclasses.fields(RolloutFailure)}
    fields = {name: value for name, value in failure.items() if name in known}
    return RolloutFailure(**{**fields, "kind": FailureKind(failure["kind"])})


def _turns(rollout: Rollout) -> Iterator[dict[str, Any]]:
    """Yield model and tool calls in order; None stands where only the policy server would know."""
    records = rollout.records or []
    known = iter(records[index] for index in rollout.counted)
    items = output_items(rollout.answer)
    indices = model_call_indices(items)
    for place, (item, index) in enumerate(zip(items, indices, strict=True)):
        if index is not None and index not in indices[place + 1 :]:  # the last item of a model call
            yield _model_turn(next(known, None))
        if item.get("type") == "function_call":
            yield {"kind": "tool", "name": item.get("name"), "seconds": None, "error": None}
    for record in known:  # those that are not in the answer; all of a failed rollout
        yield _model_turn(record)


def _model_turn(record: CallRecord | None) -> dict[str, Any]:
    turn = {
        "kind": "model",
        "prompt_tokens": getattr(record, "prompt_tokens", None),
        "generation_tokens": getattr(record, "completion_tokens", None),
        **{name: getattr(record, name, None) for name in _MEASURED},
    }
    if record is not None and record.last_version is not None:
        turn["last_version"] = record.last_version  # weights changed while it ran
    if record is not None and record.own_sampling:
        turn["own_sampling"] = record.own_sampling
    return turn


# -- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFacts:
    """One rollout in numbers."""

    agent: str  # name of the Gym agent
    group: str  # its group, unique over all batches: `"<mode>-b<batch>-g<index>"`
    task: int  # index of the dataset row
    is_valid: bool  # whether it is trained: it has a reward to train on, and its group was not left out
    # The reward to train on, see `GymGRPOTrainer.compute_rewards`; None when there is none.
    trained_reward: float | None
    reward: float | None  # the environment's; None when the rollout failed
    success: float | None  # 0 to 1; None when it failed
    failure: str | None  # kind of failure; None when it did not fail
    drift: str | None  # cause of drift; None when it did not drift
    has_tokens: bool  # whether its model calls are known, so that drift would have been seen
    attempts: int  # number of times that it was run
    seconds: float  # wall time
    # Seconds in model calls, waiting included; None when the policy server keeps no records.
    model_seconds: float | None = None
    # Seconds of these in the engine's queue; None where the server does not measure it.
    queue_seconds: float | None = None
    own_sampling_calls: int = 0  # model calls that asked for another distribution than the run's
    turns: int = 0  # model calls that are trained
    prompt_tokens: int = 0  # tokens of the prompts, one of each row
    environment_tokens: int = 0  # tokens that the environment put after them
    sampled_tokens: int = 0  # tokens that the policy sampled
    row_tokens: tuple[int, ...] = ()  # of each row, tokens of its prompt and sampled ones
    dropped_rows: int = 0  # of these rows, the oldest ones, which are not trained because a rank has too many
    tool_calls: int = 0  # tool calls in Gym's answer
    tool_errors: int = 0  # tool results that say that the call failed
    is_truncated: bool = False  # whether Gym reports that the rollout was cut
    # Sampled tokens by staleness: optimizer steps made between the weights that sampled them and the step that trains
    # them; empty where versions are no steps. Below 0 with `gym_replay` of a run that had come further.
    staleness: dict[int, int] = field(default_factory=dict)
    spans_versions: bool = False  # whether its tokens were sampled under several versions
    fields: dict[str, float] = field(default_factory=dict)  # finite numbers of the verify response by name
    components: dict[str, float] = field(default_factory=dict)  # finite numbers of its `reward_components` by name


def facts_of(rollout: Rollout, reward: float | None, mode: str, step: int | None = None) -> RolloutFacts:
    """Return the numbers of a rollout whose group is not left out so far.

    Args:
        reward: The reward to train on; None for a rollout that is not trained.
        mode: `"train"` or `"eval"`.
        step: Number of the optimizer step that trains it, for staleness; None leaves it out.
    """
    answer = rollout.answer if rollout.failure is None else None
    trajectories = list(rollout.trajectories)
    prompts = [len(trajectory.prompt_ids) for trajectory in trajectories]
    sampled = [trajectory.env_mask.count(1) for trajectory in trajectories]
    calls, errors = count_tool_calls(output_items(answer))
    return RolloutFacts(
        agent=rollout.request.agent,
        group=f"{mode}-b{rollout.request.batch}-g{rollout.request.group}",
        task=rollout.request.task_index,
        is_valid=reward is not None,
        trained_reward=reward,
        reward=rollout.reward,
        success=rollout.success,
        failure=None if rollout.failure is None else str(rollout.failure.kind),
        drift=None if rollout.drift is None else str(rollout.drift.cause),
        has_tokens=rollout.failure is None or rollout.drift is not None,
        attempts=rollout.request.attempt + 1,
        seconds=rollout.seconds,
        model_seconds=_total(rollout, "seconds"),
        queue_seconds=_total(rollout, "queue_s"),
        own_sampling_calls=sum(bool(record.own_sampling) for record in rollout.records or ()),
        turns=sum(trajectory.num_turns for trajectory in trajectories),
        prompt_tokens=sum(prompts),
        environment_tokens=sum(trajectory.env_mask.count(0) for trajectory in trajectories),
        sampled_tokens=sum(sampled),
        row_tokens=tuple(map(sum, zip(prompts, sampled, strict=True))),
        tool_calls=calls,
        tool_errors=errors,
        is_truncated=rollout.is_truncated,
        staleness={} if step is None else _staleness(rollout.sampled_calls, step),
        spans_versions=len({version for call in rollout.sampled_calls for version in (call.first, call.last)}) > 1,
        fields=rollout.metrics(),
        components=components_of(answer),
    )


def _staleness(calls: Sequence[VersionedCall], step: int) -> dict[int, int]:
    """Count tokens by staleness: step k changes the weights of version k - 1. A call during which weights changed has
    that of its first token: where in it they changed is not known."""
    found: Counter[int] = Counter()
    for call in calls:
        if _STEP.fullmatch(call.first):
            found[step - 1 - int(call.first)] += call.num_tokens
    return dict(found)


def _total(rollout: Rollout, name: str) -> float | None:
    values = [value for record in rollout.records or () if (value := getattr(record, name)) is not None]
    return sum(values) if values else None


def components_of(answer: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the numbers of Gym's `reward_components` by name."""
    components = (answer or {}).get("reward_components")
    return _numbers(components if isinstance(components, dict) else {})


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return those values that are measurements, see `untrusted.number`."""
    found = ((str(name), number(value)) for name, value in values.items())
    return {name: value for name, value in found if value is not None}
