"""The model calls of a rollout → the token sequences that are trained on. Pure functions on lists; no I/O, no torch.

The calls are the policy server's (`ledger.CallRecord`), in order. With `seen` = all tokens up to here,

    prompt of the next call == seen + what the environment added (mask 0)
    sampled tokens          == what the policy sampled           (mask 1)

must hold. Where a prompt does not start with `seen`, the history was rewritten, or another conversation began: that is
*drift*, and the tokens after it were sampled in a context other than the one that would be trained. It is never
repaired by guessing. Either the rest is left out, or a further row begins, whose prompt is the whole new prompt.

Drift is reported with its cause. The policy server knows why it could not put the sampled tokens back
(`ledger.CallDrift`). Where it says nothing the tokens themselves are asked:

    the seen text is all there               retokenized         nobody put the sampled ids back
    first other text is in sampled tokens    retemplated         the template writes that turn differently
    … is in tokens that were put there       history_rewritten   the agent changed an earlier message
"""

from __future__ import annotations

import bisect
import functools
import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, overload

from trl_gym.policy_server.middleware.ledger import CallDrift, CallRecord, DriftCause, sampled_ids
from trl_gym.policy_server.middleware.splice import num_common

DriftPolicy = Literal["split", "truncate", "exclude", "error"]


class TrajectoryError(ValueError):
    """A rollout has no trainable tokens. Becomes a `policy` failure."""


class DriftError(TrajectoryError):
    """A prompt does not start with the tokens already seen, and the drift policy is `exclude` or `error`.

    Attributes:
        drift: Where and how.
    """

    def __init__(self, drift: Drift) -> None:
        super().__init__(describe(drift))
        self.drift = drift


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """One answered model call, with its tokens."""

    prompt_ids: list[int]  # `[P]`, the exact prompt
    generation_ids: list[int]  # `[T]`, the sampled tokens
    # `[T]`, log-probability of each sampled token under the distribution it was drawn from, in nats.
    logprobs: list[float]
    index: int = 0  # among all calls of the rollout, in the order of their answers
    # Index of the call with whose tokens (prompt and sampled) the prompt starts; None where a conversation begins.
    parent: int | None = None
    handle: int = 0  # what the agent got in place of the tokens; negative
    said: tuple[bytes, ...] = ()  # digests of what the answer says, see `responses.said_in_message`
    drift: CallDrift | None = None  # why the prompt is not exact, where the policy server knows


@dataclass(frozen=True, slots=True)
class Drift:
    """The first place where a rollout's history was rewritten."""

    turn: int  # index of the model call (0-based) whose prompt does not continue what was seen
    position: int  # first index at which prompt and seen tokens differ; below `S`
    seen: list[int]  # `[S]`, prompt and sampled ids of the model call before
    sampled: list[int]  # `[S]`, 1 where the policy sampled the token, 0 where it was put there
    prompt: list[int]  # `[P]`, the prompt of that model call
    known: CallDrift | None = None  # the cause, where the policy server knows it


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


class Trajectories(Sequence[Trajectory]):
    """Trajectories at rest, as long as a batch lives: numbers of one to eight bytes instead of Python's objects.

    Each look at one makes its lists. Its `drift`, which holds whole prompts, is left out.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trajectories: Iterable[Trajectory]) -> None:
        self._packed = [
            (array("i", one.prompt_ids), array("i", one.completion_ids), array("b", one.env_mask),
             compact_floats(one.logprobs), one.num_turns, tuple(one.turn_ends))
            for one in trajectories
        ]  # fmt: skip

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...

    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        prompt, completion, mask, logprobs, num_turns, turn_ends = self._packed[index]
        return Trajectory(
            prompt_ids=prompt.tolist(),
            completion_ids=completion.tolist(),
            env_mask=mask.tolist(),
            logprobs=logprobs.tolist(),
            num_turns=num_turns,
            turn_ends=list(turn_ends),
        )

    def __len__(self) -> int:
        return len(self._packed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def compact_floats(values: Sequence[float]) -> array[float]:
    """Return numbers as `float32` where that is exact for all of them, which it is for an engine's, else `float64`."""
    narrow = array("f", values)
    return narrow if narrow.tolist() == values else array("d", values)


def model_calls(records: Sequence[CallRecord]) -> list[ModelCall]:
    """Return the calls that sampled something, in the order of their answers.

    Args:
        records: The policy server's, of one rollout.
    """
    calls = []
    parents: dict[int | None, int | None] = {None: None}  # of a call that sampled nothing: the one that it continues
    seen: dict[int | None, list[int]] = {None: []}  # the numbers themselves are shared, which a rollout has many of
    for index, record in enumerate(records):
        tokens = record.tokens
        if tokens is None:
            continue
        ids = sampled_ids(tokens)
        prompt = seen[tokens.parent] + array("i", tokens.prompt).tolist()
        seen[index], parents[index] = prompt + ids, index if ids else parents[tokens.parent]
        if not ids:
            continue
        calls.append(
            ModelCall(
                prompt_ids=prompt,
                generation_ids=ids,
                logprobs=array("d", tokens.logprobs).tolist(),
                index=index,
                parent=parents[tokens.parent],
                handle=tokens.handle,
                said=tokens.said,
                drift=record.drift,
            )
        )
    return calls


def from_calls(calls: Sequence[ModelCall], drift: DriftPolicy = "truncate") -> list[Trajectory]:
    """Turn the model calls that count into trajectories, which share the rollout's reward.

    Args:
        calls: In order, each behind the one that it continues.
        drift: The policy for a prompt that does not start with the tokens already seen: `"split"` begins a further
            trajectory, `"truncate"` leaves out what follows.

    Returns:
        At least one trajectory. Every sampled token of `calls` has mask 1 in one of them at most, and with `"split"`
        in exactly one.

    Raises:
        TrajectoryError: There is no call.
        DriftError: There is drift and the policy is `"exclude"` or `"error"`.

    Example: two calls with prompts `[1, 2]` and `[1, 2, 3, 4, 5]`, generations `[3]` and `[6]` give
    `prompt_ids=[1, 2]`, `completion_ids=[3, 4, 5, 6]`, `env_mask=[1, 0, 0, 1]`.
    """
    if not calls:
        raise TrajectoryError("no trainable token: no model call of the rollout sampled any")
    if drift == "split":
        return [replace(_joined(row), drift=_drift_after(row[-1], calls)) for row in _rows(calls)]
    head = contiguous_head(calls)
    if head.drift is not None and drift in ("exclude", "error"):
        raise DriftError(head.drift)
    return [head]


def contiguous_head(calls: Sequence[ModelCall]) -> Trajectory:
    """Join model calls up to the first one whose prompt does not start with the tokens already seen."""
    for turn, (before, call) in enumerate(itertools.pairwise(calls), start=1):
        if call.parent == before.index:
            continue  # its prompt was made of these tokens
        seen = before.prompt_ids + before.generation_ids
        if call.prompt_ids[: len(seen)] != seen:
            head = _joined(calls[:turn])
            return replace(head, drift=_drift(turn, head, call))
    return _joined(calls)


def _drift(turn: int, before: Trajectory, call: ModelCall) -> Drift:
    seen = before.prompt_ids + before.completion_ids
    sampled = [0] * len(before.prompt_ids) + before.env_mask
    return Drift(turn, num_common(seen, call.prompt_ids), seen, sampled, call.prompt_ids, call.drift)


def _drift_after(last: ModelCall, calls: Sequence[ModelCall]) -> Drift | None:
    """Return how the history was rewritten after the last call of a row; None where another conversation goes on."""
    turn = calls.index(last) + 1
    if turn == len(calls) or calls[turn].drift is None:
        return None
    drift = _drift(turn, _joined([last]), calls[turn])
    return drift if drift.position < len(drift.seen) else None


def _rows(calls: Sequence[ModelCall]) -> list[list[ModelCall]]:
    """Return chains of calls: each continues the one before it, and each call is in one of them.

    A call that two others continue is in the chain of the first; the second begins a chain of its own.
    """
    rows: list[list[ModelCall]] = []
    for call in calls:
        row = next((row for row in reversed(rows) if row[-1].index == call.parent), None)
        if row is None or call.parent is None:
            rows.append([call])
        else:
            row.append(call)
    return rows


def _joined(calls: Sequence[ModelCall]) -> Trajectory:
    """Join calls of which each continues the one before it."""
    first = calls[0]
    completion: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    turn_ends: list[int] = []
    for call in calls:
        added = call.prompt_ids[len(first.prompt_ids) + len(completion) :]
        completion += added + call.generation_ids
        mask += [0] * len(added) + [1] * len(call.generation_ids)
        logprobs += [0.0] * len(added) + call.logprobs
        turn_ends.append(len(completion))
    return Trajectory(
        prompt_ids=list(first.prompt_ids),
        completion_ids=completion,
        env_mask=mask,
        logprobs=logprobs,
        num_turns=len(turn_ends),
        turn_ends=turn_ends,
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


def report_drift(drift: Drift, decode: Decode) -> DriftReport:
    """Say why a prompt does not start with the tokens already seen.

    Args:
        decode: A function from token ids to text, see `make_decoder`.
    """
    known = drift.known
    cause = known.cause if known else classify(drift, decode)
    reason = known.text if known else _GLOSSES[cause]
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
