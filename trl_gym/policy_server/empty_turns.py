"""Turns in which the policy said nothing, and which agents drop.

A policy may sample nothing but its turn end. NeMo Gym does not send such a message back, so the next prompt would lack
tokens that were sampled. The answer is known here, and is put back where it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_gym.policy_server.history import Histories, digest_of
from trl_gym.policy_server.middleware.turn import Turn

_NOTHING: dict[str, Any] = {"role": "assistant", "content": ""}


@dataclass(frozen=True, slots=True)
class EmptyTurn:
    """An answer without text or calls.

    Attributes:
        seen: Its prompt plus what was sampled.
        place: Index of the answer: how many messages were in front of it, earlier empty ones put back.
    """

    seen: list[int]
    place: int


def is_empty(message: dict[str, Any]) -> bool:
    """Whether there is nothing in a message that an agent would keep."""
    return not any(message.get(key) for key in ("content", "tool_calls", "reasoning", "reasoning_content"))


def restore(turn: Turn, empty: Sequence[EmptyTurn], histories: Histories) -> None:
    """Put empty turns back into a request that has dropped them.

    Args:
        turn: Changed in place.
        empty: Those of its rollout, oldest first.
        histories: Tells whether the messages in front of each are still those that it answered.
    """
    for answer in empty:
        if answer.place > len(turn.messages):
            return  # another conversation of the same rollout, or a shorter history
        if histories.difference(answer.seen, digest_of(turn, answer.place)) is not None:
            return
        _put_back(turn, answer)


def _put_back(turn: Turn, answer: EmptyTurn) -> None:
    place = answer.place
    is_there = place < len(turn.messages) and turn.messages[place].get("role") == "assistant"
    if is_there and (turn.sampled[place] is not None or not is_empty(turn.messages[place])):
        return
    if not is_there:
        turn.messages.insert(place, dict(_NOTHING))
        turn.sampled.insert(place, None)
        if turn.newest is not None and turn.newest >= place:
            turn.newest += 1
    turn.sampled[place] = b"[]"  # counts as sampled in a digest: its ids do, and they are none that anybody sends
    if turn.newest is None or turn.newest < place:
        turn.newest, turn.seen = place, list(answer.seen)
