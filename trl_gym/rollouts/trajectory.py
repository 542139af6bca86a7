"""One Gym answer → the token sequence that is trained on. Pure functions on lists; no I/O, no torch.

NeMo Gym puts the token bundle (`prompt_token_ids`, `generation_token_ids`, `generation_log_probs`) of each model call
on the *last* output item of that call. Walking these items in order, with `seen` = all tokens up to here,

    prompt_token_ids of the next call == seen + what the environment added (mask 0)
    generation_token_ids              == what the policy sampled           (mask 1)

must hold. Where a prompt does not start with `seen`, the history was rewritten: that is *drift*, and the tokens after
it were sampled in a context other than the one that would be trained. It is never repaired by guessing.

Drift is reported with its cause. The policy server knows why it could not put the sampled tokens back
(`ledger.CallDrift`), and is believed where its records match the rollout's model calls. Without a record the tokens
themselves are asked:

    the seen text is all there               retokenized         nobody put the sampled ids back
    first other text is in sampled tokens    retemplated         the template writes that turn differently
    … is in tokens that were put there       history_rewritten   the agent changed an earlier message
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trl_gym.policy_server.middleware.ledger import CallRecord, DriftCause
from trl_gym.policy_server.middleware.splice import num_common
from trl_gym.responses import output_items

DriftPolicy = Literal["split", "truncate", "exclude", "error"]


class TrajectoryError(ValueError):
    """A Gym answer has no trainable tokens, or its token bundle contradicts itself. Becomes a `policy` failure."""


class DriftError(TrajectoryError):
    """A prompt does not start with the tokens already seen, and the drift policy is `exclude` or `error`.

    Attributes:
        drift: Where and how.
    """

    def __init__(self, drift: Drift) -> None:
        super().__init__(describe(drift))
        self.drift = drift


@dataclass(frozen=True, slots=True)
class ModelCall:
    """Token bundle of one model call."""

    prompt_ids: list[int]  # `[P]`, the exact prompt
    generation_ids: list[int]  # `[T]`, the sampled tokens
    # `[T]`, log-probability of each sampled token under the distribution it was drawn from, in nats.
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Drift:
    """The first place where a rollout's history was rewritten."""

    turn: int  # index of the model call (0-based) whose prompt does not continue what was seen
    position: int  # first index at which prompt and seen tokens differ; below `S`
    seen: list[int]  # `[S]`, prompt and sampled ids of the model call before
    sampled: list[int]  # `[S]`, 1 where the policy sampled the token, 0 where it was put there
    prompt: list[int]  # `[P]`, the prompt of that model call


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A contiguous token sequence of one rollout.

    Attributes:
        prompt_ids: `[P]`, prompt of the first model call.
        completion_ids: `[T]`, everything after it: sampled tokens and what the environment added.
        env_mask: `[T]`, 1 where the policy sampled the token, 0 where the environment put it.
        logprobs: `[T]`, sampling log-probability in nats; 0.0 where `env_mask` is 0.
        num_turns: Model calls in it.
        turn_ends: `[num_turns]`, index into `completion_ids` just after each call's last sampled token.
        drift: Where and how the history was rewritten after this trajectory; None when it was not.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    env_mask: list[int]
    logprobs: list[float]
    num_turns: int
    turn_ends: list[int] = field(default_factory=list)
    drift: Drift | None = None


def model_calls(result: Mapping[str, Any]) -> list[ModelCall]:
    """Return the token bundles in a Gym answer, in order.

    Raises:
        TrajectoryError: A bundle is incomplete, its lengths disagree, or a log-probability is not a finite number.
    """
    return list(_bundles(output_items(result)))


def from_gym(result: Mapping[str, Any], drift: DriftPolicy = "truncate") -> list[Trajectory]:
    """Turn one Gym answer into trajectories that share its reward (one today; several once `split` is complete).

    Args:
        result: Gym's answer to `/run`.
        drift: The policy for a prompt that does not start with the tokens already seen.

    Raises:
        TrajectoryError: There is no trainable token in it, or a bundle is broken.
        DriftError: There is drift and the policy is `exclude` or `error`.

    Example: two calls with prompts `[1, 2]` and `[1, 2, 3, 4, 5]`, generations `[3]` and `[6]` give
    `prompt_ids=[1, 2]`, `completion_ids=[3, 4, 5, 6]`, `env_mask=[1, 0, 0, 1]`.
    """
    calls = model_calls(result)
    if not calls:
        raise TrajectoryError(_why_empty(result))
    trajectory = contiguous_head(calls)
    if trajectory.drift is not None and drift in ("exclude", "error"):
        raise DriftError(trajectory.drift)
    return [trajectory]


def contiguous_head(calls: Sequence[ModelCall]) -> Trajectory:
    """Join model calls up to the first one whose prompt does not start with the tokens already seen."""
    first = calls[0]
    completion, mask, logprobs = list(first.generation_ids), [1] * len(first.generation_ids), list(first.logprobs)
    seen = first.prompt_ids + first.generation_ids
    turn_ends = [len(completion)]
    drift = None
    for turn, call in enumerate(calls[1:], start=1):
        if call.prompt_ids[: len(seen)] != seen:
            sampled = [0] * len(first.prompt_ids) + mask
            drift = Drift(turn, num_common(seen, call.prompt_ids), seen, sampled, call.prompt_ids)
            break
        added = call.prompt_ids[len(seen) :]
        completion += added + call.generation_ids
        mask += [0] * len(added) + [1] * len(call.generation_ids)
        logprobs += [0.0] * len(added) + call.logprobs
        seen = call.prompt_ids + call.generation_ids
        turn_ends.append(len(completion))
    return Trajectory(
        prompt_ids=list(first.prompt_ids),
        completion_ids=completion,
        env_mask=mask,
        logprobs=logprobs,
        num_turns=len(turn_ends),
        turn_ends=turn_ends,
        drift=drift,
    )


def describe(drift: Drift) -> str:
    """Say in one sentence, in ids, where a prompt differs."""
    shown = slice(drift.position, drift.position + 8)
    return (
        f"the prompt of model call {drift.turn} does not start with the tokens already seen: at token "
        f"{drift.position} it has {drift.prompt[shown]} where {drift.seen[shown]} was seen"
    )


def finish_reason(result: Mapping[str, Any]) -> str:
    """Return `"stop"`, or why Gym says that the rollout was cut (`"max_output_tokens"`, …)."""
    details = (result.get("response") or {}).get("incomplete_details") or {}
    return details.get("reason") or "stop"


def _bundles(output: Sequence[Mapping[str, Any]]) -> Iterator[ModelCall]:
    for index, item in enumerate(output):
        generation = item.get("generation_token_ids")
        if not generation:
            continue
        prompt, logprobs = item.get("prompt_token_ids"), item.get("generation_log_probs")
        if not prompt or logprobs is None:
            raise TrajectoryError(
                f"output item {index} has generated tokens without their prompt or log-probabilities"
            )
        if len(logprobs) != len(generation):
            raise TrajectoryError(
                f"output item {index} has {len(generation)} generated tokens and {len(logprobs)} log-probabilities"
            )
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
            raise TrajectoryError(f"output item {index} has a log-probability that is not a finite number")
        yield ModelCall(list(prompt), list(generation), [float(value) for value in logprobs])


def _why_empty(result: Mapping[str, Any]) -> str:
    kinds = [str(item.get("type")) for item in output_items(result)]
    if finish_reason(result) != "stop":
        return f"no trainable token: the first model call was already cut ({finish_reason(result)})"
    return (
        f"no trainable token: none of the output items {kinds} carries token ids. Does the environment's agent use "
        "`policy_model`, and does the policy server run the on-policy middleware?"
    )


# -- why a history was rewritten --------------------------------------------------------------------------------------

Decode = Callable[[Sequence[int]], str]

_WINDOW = 12  # tokens shown on either side of the first different one
_NUM_IDS = 6
_NUM_CHARACTERS = 80  # of each text in the sentence; one token may spell a whole line
_FRAGMENT = "\ufffd"  # how a decoder writes bytes that are no whole character

_GLOSSES = {
    DriftCause.RETOKENIZED: "the same text in other tokens",
    DriftCause.RETEMPLATED: "a sampled turn is written differently from how it was sampled",
    DriftCause.HISTORY_REWRITTEN: "an earlier message, or the tools, are not what they were",
    DriftCause.MESSAGE_WITHOUT_IDS: "a sampled turn came back without its token ids",
    DriftCause.NO_BOUNDARY: "the template does not show where the sampled turn ends",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """A drift and its cause, in words that help to fix it."""

    turn: int  # index of the model call (0-based) whose prompt does not continue what was seen
    position: int  # first index at which prompt and seen tokens differ
    cause: DriftCause  # the cause
    seen_text: str  # the seen text around `position`
    prompt_text: str  # the prompt's text around `position`
    text: str  # all of it in one sentence

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"cause": str(self.cause)}


def report_drift(drift: Drift, decode: Decode, record: CallRecord | None = None) -> DriftReport:
    """Say why a prompt does not start with the tokens already seen.

    Args:
        drift: The drift of a trajectory.
        decode: A function from token ids to text, see `make_decoder`.
        record: The policy server's record of the model call `drift.turn`; None when there is none that matches.
    """
    known = record["drift"] if record is not None else None
    cause = DriftCause(known["cause"]) if known else classify(drift, decode)
    reason = known["text"] if known else _GLOSSES[cause]
    at, end = drift.position, drift.position + _NUM_IDS
    before = _text(drift.seen, at - _WINDOW, at, decode)[-_NUM_CHARACTERS:]
    here, there = (_text(ids, at, at + _WINDOW, decode)[:_NUM_CHARACTERS] for ids in (drift.prompt, drift.seen))
    return DriftReport(
        turn=drift.turn,
        position=at,
        cause=cause,
        seen_text=_text(drift.seen, at - _WINDOW, at + _WINDOW, decode),
        prompt_text=_text(drift.prompt, at - _WINDOW, at + _WINDOW, decode),
        text=(
            f"the prompt of model call {drift.turn} does not start with the tokens already seen ({cause}: {reason}): "
            f"at token {at}, after {before!r}, it has {here!r} {drift.prompt[at:end]} where {there!r} "
            f"{drift.seen[at:end]} was seen"
        ),
    )


def classify(drift: Drift, decode: Decode) -> DriftCause:
    """Return the cause as far as tokens and their text show it: by the first difference in *text*, since tokens that
    spell the same may differ before it."""
    seen, prompt = decode(drift.seen), decode(drift.prompt)
    same = num_common(seen, prompt)
    if same >= len(seen.rstrip(_FRAGMENT)):  # a turn that was cut inside a character has no text there to compare
        return DriftCause.RETOKENIZED
    is_sampled = drift.sampled[_token_at(same, drift, decode)]
    return DriftCause.RETEMPLATED if is_sampled else DriftCause.HISTORY_REWRITTEN


def make_decoder(tokenizer: Any) -> Decode:
    """Return a function from token ids to text that takes any ids.

    Ids that the tokenizer does not know (a model's vocabulary is often padded) are written as `<token 151999>`,
    special tokens as they are, and bytes that are no whole character as U+FFFD.

    Args:
        tokenizer: A tokenizer of `transformers`.
    """

    @functools.cache
    def vocabulary() -> frozenset[int]:  # large, and needed only when something has drifted
        return frozenset(tokenizer.get_vocab().values())

    def decode(ids: Sequence[int]) -> str:
        return "".join(
            tokenizer.decode(list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if is_known
            else "".join(f"<token {token}>" for token in run)
            for is_known, run in itertools.groupby(ids, key=vocabulary().__contains__)
        )

    return decode


def _text(ids: Sequence[int], start: int, end: int, decode: Decode) -> str:
    """Return the text of `ids[start:end]`, without the broken characters that cutting them out makes at its ends."""
    start = max(start, 0)
    text = decode(ids[start:end])
    if start > 0:
        text = text.lstrip(_FRAGMENT)
    return text.rstrip(_FRAGMENT) if end < len(ids) else text


def _token_at(character: int, drift: Drift, decode: Decode) -> int:
    """Return the index of the seen token that writes a character of the seen text, from the first different one on."""
    ends = range(len(drift.seen) + 1)
    after = bisect.bisect_right(ends, character, lo=drift.position, key=lambda end: len(decode(drift.seen[:end])))
    return min(max(after - 1, drift.position), len(drift.seen) - 1)
