"""Exact prompts from token ids: pure functions on lists of ints, no I/O.

The words used here and in `on_policy.py`:

    seen     every token of the rollout so far: the prompt of the newest sampled turn plus what was sampled
    before   the chat template's render of the messages up to and including that turn, no generation prompt
    full     the chat template's render of all messages, as the next prompt would be on a stock server
    closing  what the template writes after the content of an assistant turn, e.g. `[<|im_end|>, "\\n"]`;
             its first token is the turn end

`before` and `full` are only used to find out where the *new* messages start; the tokens of the old ones are `seen`.
"""

from __future__ import annotations

from collections.abc import Sequence


class NoBoundaryError(Exception):
    """The end of the newest sampled turn cannot be found in the render of all messages. The text says why."""


def find_closing(render_a: Sequence[int], render_b: Sequence[int]) -> list[int]:
    """What a chat template writes after an assistant turn: the longest common suffix of two renders.

    Args:
        render_a: A conversation that ends in an assistant turn, without generation prompt.
        render_b: The same conversation with other content in that turn; the contents must end differently.

    Returns:
        The closing tokens, turn end first; empty if the template writes nothing after an assistant turn.

    Example:
        >>> find_closing([1, 7, 8, 2, 9], [1, 7, 5, 2, 9])  # 2 = <|im_end|>, 9 = newline
        [2, 9]
    """
    length = 0
    for a, b in zip(reversed(render_a), reversed(render_b), strict=False):
        if a != b:
            break
        length += 1
    return list(render_a[len(render_a) - length :])


def splice(seen: Sequence[int], before: Sequence[int], full: Sequence[int], closing: Sequence[int]) -> list[int]:
    """The next prompt: all tokens seen, then the template's tokens for the messages that are new.

    The turn end that closes the newest turn is the n-th one in `full`, n being their number in `before`. Counting (and
    not the position) is what makes this right when the template drops the thinking of earlier turns. If the policy
    sampled the turn end it is not doubled; if it was cut off at its token limit, the template's closes the turn.

    Args:
        seen: Prompt and sampled ids of the newest turn.
        before: Render up to and including that turn, without generation prompt.
        full: Render of all messages.
        closing: From `find_closing`.

    Returns:
        A prompt that starts with `seen`.

    Raises:
        NoBoundaryError: If the cut would be a guess: the template closes no turn, closes this one differently, or
            writes the old messages differently once new ones follow (beyond leaving something out).

    Example:
        >>> splice([11, 12, 99, 55, 2], [11, 12, 88, 56, 2], [11, 12, 56, 2, 70, 71, 2, 40], [2])
        [11, 12, 99, 55, 2, 70, 71, 2, 40]
    """
    if not seen:
        return list(full)
    if not closing:
        raise NoBoundaryError("the chat template writes nothing after an assistant turn")
    if list(before[-len(closing) :]) != list(closing):
        raise NoBoundaryError("the chat template does not close this turn as it closes other assistant turns")
    turn_end = closing[0]
    end_in_before = len(before) - len(closing)
    end_in_full = _nth_index(full, turn_end, _count(before[: end_in_before + 1], turn_end))
    if end_in_full is None:
        raise NoBoundaryError("the render of all messages has fewer turn ends than that of the earlier ones")
    if not _is_subsequence(full[:end_in_full], before[:end_in_before]):
        raise NoBoundaryError("the chat template writes earlier messages differently once new messages follow")
    kept = seen[:-1] if seen[-1] == turn_end else seen
    return [*kept, *full[end_in_full:]]


def continue_turn(seen: Sequence[int], closing: Sequence[int]) -> list[int]:
    """The prompt for `continue_final_message` on the newest sampled turn: `seen`, open-ended.

    Raises:
        NoBoundaryError: If the policy has closed the turn itself; dropping its turn end would unsample a token.

    Example:
        >>> continue_turn([11, 12, 99], [2])
        [11, 12, 99]
    """
    if closing and seen[-1] == closing[0]:
        raise NoBoundaryError("the turn to be continued was closed by the policy")
    return list(seen)


def room(
    num_prompt: int, *, max_model_len: int, completion_budget: int | None = None, num_first_prompt: int | None = None
) -> int:
    """How many tokens may still be sampled; zero or less means that the rollout is over.

    Args:
        num_prompt: Tokens of this call's prompt.
        max_model_len: Tokens that the server accepts for prompt and completion together.
        completion_budget: Tokens that the rollout's completion may have, tool outputs and later prompts included.
        num_first_prompt: Tokens of the rollout's first prompt, which do not count; this prompt's when not given.

    Example:
        >>> room(120, max_model_len=512, completion_budget=100, num_first_prompt=50)  # 70 of 100 are used
        30
    """
    left = max_model_len - num_prompt
    if completion_budget is None:
        return left
    used = num_prompt - (num_prompt if num_first_prompt is None else num_first_prompt)
    return min(left, completion_budget - used)


def _count(ids: Sequence[int], token: int) -> int:
    return sum(1 for other in ids if other == token)


def _nth_index(ids: Sequence[int], token: int, n: int) -> int | None:
    """Index of the n-th `token` (n >= 1), or `None`."""
    for index, other in enumerate(ids):
        if other == token:
            n -= 1
            if n == 0:
                return index
    return None


def _is_subsequence(short: Sequence[int], long: Sequence[int]) -> bool:
    """Whether `short` is `long` with nothing but removals."""
    if list(short) == list(long):
        return True
    rest = iter(long)
    return all(token in rest for token in short)
