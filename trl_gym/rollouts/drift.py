"""Why a prompt does not start with the tokens already seen, in words that help to mend it.

The policy server knows why it could not put the sampled tokens back (`calls.CallDrift`), and is believed where its
records match the rollout's model calls. Without a record the tokens themselves are asked:

    the seen text is all there               retokenized         nobody put the sampled ids back
    first other text is in sampled tokens    retemplated         the template writes that turn differently
    … is in tokens that were put there       history_rewritten   the agent changed an earlier message
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_gym.policy_server.middleware.calls import CallRecord, DriftCause
from trl_gym.rollouts.trajectory import Drift, first_difference

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
    """One explained drift.

    Attributes:
        turn: Index of the model call (0-based) whose prompt does not continue what was seen.
        position: First index at which prompt and seen tokens differ.
        cause: Why.
        seen_text: What was seen around `position`.
        prompt_text: What the prompt has around `position`.
        text: All of it in one sentence.
    """

    turn: int
    position: int
    cause: DriftCause
    seen_text: str
    prompt_text: str
    text: str

    def as_json(self) -> dict[str, Any]:
        return {
            "turn": self.turn,
            "position": self.position,
            "cause": str(self.cause),
            "seen_text": self.seen_text,
            "prompt_text": self.prompt_text,
            "text": self.text,
        }


def explain(drift: Drift, decode: Decode, record: CallRecord | None = None) -> DriftReport:
    """Say what happened.

    Args:
        drift: From a trajectory.
        decode: Text of token ids, see `make_decoder`.
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
    """The cause as far as tokens and their text show it: by the first difference in *text*, since tokens may differ
    before it that spell the same."""
    seen, prompt = decode(drift.seen), decode(drift.prompt)
    same = first_difference(seen, prompt)
    if same >= len(seen.rstrip(_FRAGMENT)):  # a turn that was cut inside a character has no text there to compare
        return DriftCause.RETOKENIZED
    is_sampled = drift.sampled[_token_at(same, drift, decode)]
    return DriftCause.RETEMPLATED if is_sampled else DriftCause.HISTORY_REWRITTEN


def make_decoder(tokenizer: Any) -> Decode:
    """A function from token ids to text that takes any ids.

    Ids that the tokenizer does not know (a model's vocabulary is often padded) are written as `<token 151999>`,
    special tokens as they are, and bytes that are no whole character as U+FFFD.

    Args:
        tokenizer: As from `transformers.AutoTokenizer`.
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
    """Text of `ids[start:end]`, without the broken characters that cutting them out makes at its ends."""
    start = max(start, 0)
    text = decode(ids[start:end])
    if start > 0:
        text = text.lstrip(_FRAGMENT)
    return text.rstrip(_FRAGMENT) if end < len(ids) else text


def _token_at(character: int, drift: Drift, decode: Decode) -> int:
    """Index of the seen token that writes a character of the seen text; never before the first different token."""
    ends = range(len(drift.seen) + 1)
    after = bisect.bisect_right(ends, character, lo=drift.position, key=lambda end: len(decode(drift.seen[:end])))
    return min(max(after - 1, drift.position), len(drift.seen) - 1)
