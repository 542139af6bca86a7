"""Compute exact prompts from token ids: pure functions on lists, no I/O.

The words used here and in `templates.py`:

    seen      all tokens of the rollout so far: the prompt of the newest sampled turn plus the sampled tokens
    tail      tokens that the chat template writes after that turn's text: its end, new messages, generation prompt
    closing   the start of a tail that ends a turn, the same for every turn of its kind, e.g. `[<|im_end|>, "\\n"]`
    turn end  the one token of a closing that says that the turn is over, e.g. `<|im_end|>`

The next prompt is `seen` plus the tail, minus the part of the closing that the policy has sampled itself. The template
only decides what comes *after* the sampled turn; how it would write that turn or earlier ones does not matter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate


class NoBoundaryError(Exception):
    """The end of the newest sampled turn cannot be found in the template's render. The text says why."""


class NoMarkerError(NoBoundaryError):
    """The template does not write the text that was put in place of the turn's."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids with their strings, as a tokenizer's vocabulary spells them."""

    ids: list[int]  # `[T]`
    strings: list[str]  # `[T]`; byte-level alphabets and sentencepiece underscores are fine

    def after(self, marker: str) -> Rendered:
        """Return what follows the last occurrence of a text.

        Args:
            marker: ASCII letters and digits, which every tokenizer spells as they are.

        Raises:
            NoMarkerError: If the text does not occur.
            NoBoundaryError: If a token spans its end.
        """
        start = "".join(self.strings).rfind(marker)
        if start < 0:
            raise NoMarkerError("the chat template does not write the turn's text as it is given")
        ends = list(accumulate(map(len, self.strings)))
        last = bisect_left(ends, start + len(marker))  # the token in which the marker ends
        if ends[last] != start + len(marker):
            raise NoBoundaryError("a token spans the end of the turn's text and what the chat template writes next")
        return Rendered(self.ids[last + 1 :], self.strings[last + 1 :])


@dataclass(frozen=True, slots=True)
class Closing:
    """Tokens that the template writes between the text of an assistant turn and what comes next."""

    ids: list[int]  # `[C]`; empty if the template writes nothing (GLM: the next turn's opening token ends this one)
    end: int | None  # index of the turn end in `ids`; None if no token can be one
    begin: int = 0  # index of the first token that is not white space, `<= end` (Cohere ends a turn with two tokens)
    # Whether it starts with the end of a tool call, which the policy has sampled in its own tokens.
    has_markup: bool = False

    @property
    def turn_end(self) -> int | None:
        return None if self.end is None else self.ids[self.end]


def plain_closing(rendered: Rendered, stop_ids: Collection[int]) -> Closing:
    """Return the closing of a turn of plain text.

    Args:
        rendered: Tokens between a turn's text and the generation prompt; `closing_of` finds where that begins.
        stop_ids: Tokens at which generation is known to stop.

    Example:
        >>> plain_closing(Rendered([5, 2, 9], ["Ġ", "</s>", "Ċ"]), ())  # blanks end no turn
        Closing(ids=[5, 2, 9], end=1, begin=1, has_markup=False)
    """
    begin = next((i for i, string in enumerate(rendered.strings) if not _is_blank(string)), None)
    end = next((i for i, token in enumerate(rendered.ids) if token in stop_ids), begin)
    return Closing(rendered.ids, end, 0 if begin is None or end is None else min(begin, end))


def tool_closing(rendered: Rendered, plain: Closing, stop_ids: Collection[int]) -> Closing:
    """Return the closing of a turn that ends in a tool call: the rest of the call's markup, then the turn end.

    Args:
        rendered: Tokens after the last argument of the call.
        plain: The closing of a plain turn, whose turn end counts too.
        stop_ids: Tokens at which generation is known to stop.

    Example:
        >>> tool_closing(Rendered([7, 8, 2, 9], ['"}', "</tool_call>", "<|im_end|>", "Ċ"]), Closing([2, 9], 0), ())
        Closing(ids=[7, 8, 2, 9], end=2, begin=2, has_markup=True)
    """
    ends = {*stop_ids, *([] if plain.turn_end is None else [plain.turn_end])}
    end = next((i for i, token in enumerate(rendered.ids) if token in ends), None)
    return Closing(rendered.ids, end, end or 0, has_markup=True)


def closing_of(tail: Sequence[int], generation_prompt: Sequence[int]) -> int | None:
    """Return the length of the closing in a tail that ends with the generation prompt; None if it does not.

    Example:
        >>> closing_of([2, 9, 40, 41], [40, 41])
        2
    """
    length = len(tail) - len(generation_prompt)
    return length if length >= 0 and list(tail[length:]) == list(generation_prompt) else None


def splice(seen: Sequence[int], tail: Sequence[int], closing: Closing, stop_ids: Collection[int]) -> list[int]:
    """Return the next prompt: all tokens seen, then the template's tokens for what is new.

    The last token seen says whether the policy has closed its turn. A turn end that it sampled is not doubled; one
    that stops generation and that the template writes differently in history (gpt-oss: `<|return|>` for `<|end|>`)
    replaces the template's; if the turn was cut off, the template closes it.

    Args:
        seen: Prompt and sampled ids of the newest turn.
        tail: Tokens that the template writes after that turn's text.
        closing: The template's closing of turns of this kind.
        stop_ids: Tokens at which generation is known to stop.

    Returns:
        A prompt that starts with `seen`.

    Raises:
        NoBoundaryError: If the cut would be a guess.

    Example:
        >>> splice([11, 99, 2], [2, 9, 70, 40], Closing([2, 9], 0), ())  # closed by the policy
        [11, 99, 2, 9, 70, 40]
        >>> splice([11, 99], [2, 9, 70, 40], Closing([2, 9], 0), ())  # cut off at its token limit
        [11, 99, 2, 9, 70, 40]
    """
    last = seen[-1]
    end = _find_end(tail, closing)
    if end is None:
        return [*seen, *tail[_length_sampled(last, tail, closing, stop_ids) :]]
    if last == tail[end] or last in stop_ids:
        return [*seen, *tail[end + 1 :]]
    if closing.has_markup:
        return [*seen, *tail[_num_markup(last, tail, end) :]]
    for cut in range(end, closing.begin, -1):  # cut off in the middle of a closing of several tokens
        if list(seen[closing.begin - cut :]) == list(tail[closing.begin : cut]):
            return [*seen, *tail[cut:]]
    return [*seen, *tail]


def continue_turn(seen: Sequence[int], closing: Closing, stop_ids: Collection[int]) -> list[int]:
    """Return the prompt for `continue_final_message` on the newest sampled turn: `seen`, open-ended.

    Raises:
        NoBoundaryError: If the policy has closed the turn itself; dropping its turn end would unsample a token.

    Example:
        >>> continue_turn([11, 12, 99], Closing([2], 0), ())
        [11, 12, 99]
    """
    if seen[-1] == closing.turn_end or seen[-1] in stop_ids:
        raise NoBoundaryError("the turn to be continued was closed by the policy")
    return list(seen)


def room(
    num_prompt: int, *, max_model_len: int, completion_budget: int | None = None, num_first_prompt: int | None = None
) -> int:
    """Return how many tokens may still be sampled; zero or less means that the rollout is over.

    Args:
        max_model_len: Tokens that the server accepts for prompt and completion together.
        completion_budget: Tokens that a conversation may have after its first prompt, with tool outputs and later
            prompts.
        num_first_prompt: Tokens of that first prompt, which do not count; default: `num_prompt`.

    Example:
        >>> room(120, max_model_len=512, completion_budget=100, num_first_prompt=50)  # 70 of 100 are used
        30
    """
    left = max_model_len - num_prompt
    if completion_budget is None:
        return left
    used = num_prompt - (num_prompt if num_first_prompt is None else num_first_prompt)
    return min(left, completion_budget - used)


def num_common(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the longest common prefix: the first index at which two sequences differ.

    Example:
        >>> num_common([1, 2, 3], [1, 2, 4])
        2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _find_end(tail: Sequence[int], closing: Closing) -> int | None:
    """Return the index of the turn end in `tail`; None if this template writes none."""
    if closing.end is None:
        return None
    through = closing.end + 1
    if list(tail[:through]) == closing.ids[:through]:
        return closing.end
    if closing.has_markup and closing.turn_end is not None and closing.turn_end in tail:
        return list(tail).index(closing.turn_end)  # call ids in the markup differ; they contain no turn end
    raise NoBoundaryError("the chat template does not close this turn as it closes other assistant turns")


def _num_markup(last: int, tail: Sequence[int], end: int) -> int:
    """Return how much of a call's markup was sampled before it was cut off: up to and with the last token."""
    return next((index + 1 for index in reversed(range(end)) if tail[index] == last), end)


def _length_sampled(last: int, tail: Sequence[int], closing: Closing, stop_ids: Collection[int]) -> int:
    """Return how much of a tail without turn end was sampled: a call's markup, the next turn's opening."""
    own = 0
    if closing.has_markup:
        if last not in stop_ids:
            raise NoBoundaryError("the turn was cut off behind a tool call, and it is not known how such a turn ends")
        if list(tail[: len(closing.ids)]) != closing.ids:
            raise NoBoundaryError("the chat template writes no turn end after this tool call")
        own = len(closing.ids)
    opened = last in stop_ids and own < len(tail) and tail[own] == last
    return own + opened


def _is_blank(string: str) -> bool:
    """Tell whether a token is white space, as byte-level (Ġ, Ċ, …) or sentencepiece (▁) vocabularies spell it."""
    return not string.strip(" \n\r\tĠĊĉč▁")
