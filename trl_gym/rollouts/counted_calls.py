"""Decide which model calls of a rollout count: those that Gym's answer contains. Pure functions.

The policy server's ledger knows which tokens were sampled, Gym's answer knows what the agent made of them. Walking the
items of the answer that the assistant said,

    an item with a handle, or with token ids   ends the call of that handle, or of exactly these tokens
    items without                              are the next call that said just this

Every one of them must be found, and each call once. The calls that a counted call continues count as well if they said
nothing (NeMo Gym drops an answer that is empty); one that said something and is not in the answer was left out. An
answer that fails this is dishonest or broken, and nothing of it is trained.

Calls that the answer does not contain are none of its turns: a retry whose answer was lost, a sample that the agent
discarded, a sub-agent's own calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_gym.responses import output_items, read_item, said_in_item
from trl_gym.rollouts.trajectory import ModelCall

_NUM_CHARACTERS = 80  # of a quoted item


class DishonestAnswerError(ValueError):
    """Gym's answer contradicts the policy server's ledger; the text says how. Becomes an `environment` failure."""


def counted_calls(answer: Mapping[str, Any], calls: Sequence[ModelCall]) -> list[ModelCall]:
    """Return the calls that an answer contains, each behind those that it continues.

    Args:
        answer: Gym's answer to `/run`.
        calls: All calls of the rollout that were answered, in the order of their answers.

    Raises:
        DishonestAnswerError: The answer has a turn that nobody sampled, has one twice or in another order, leaves one
            out, or has other tokens than were sampled.
    """
    search = _Search({call.index: call for call in calls})
    items = output_items(answer)
    for place, item in enumerate(items):
        said = said_in_item(item)
        if said is not None:
            search.pending.append((place, said))
        if item.get("generation_token_ids"):
            search.end_with(place, item, items)
        elif read_item(item).role != "assistant":
            search.flush(items)
    search.flush(items)
    return search.in_order()


@dataclass(slots=True)
class _Search:
    """The state of a walk over an answer."""

    calls: dict[int, ModelCall]  # by index
    found: list[int] = field(default_factory=list)  # indices of the calls in the answer so far
    pending: list[tuple[int, bytes]] = field(default_factory=list)  # items said and not found yet, with their places

    def end_with(self, place: int, item: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
        """Find the call whose last item this is, by handle or token ids."""
        call = self._named(place, item)
        start = len(self.pending) - len(call.said)
        if start < 0 or tuple(said for _, said in self.pending[start:]) != call.said:
            raise DishonestAnswerError(
                f"output item {place} ({_quoted(item)}) says something else than model call {call.index} sampled"
            )
        del self.pending[start:]
        self.flush(items)
        self._count(call, place)

    def flush(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Find the calls of all items that came without handle or token ids."""
        while self.pending:
            place = self.pending[0][0]
            call = self._next_that_said([said for _, said in self.pending])
            if call is None:
                raise DishonestAnswerError(
                    f"output item {place} ({_quoted(items[place])}) is a turn that nobody sampled: none of the "
                    f"rollout's {len(self.calls)} model calls says this, or it is in the answer already"
                )
            del self.pending[: len(call.said)]
            self._count(call, place)

    def in_order(self) -> list[ModelCall]:
        """Return the calls found and those that said nothing in front of them."""
        counted: list[int] = []
        for index in self.found:
            missing = [index]
            while (parent := self.calls[missing[-1]].parent) is not None and parent not in counted:
                if parent in self.found:
                    raise DishonestAnswerError(
                        f"model call {parent} comes behind model call {missing[-1]}, which continues it"
                    )
                if parent not in self.calls or self.calls[parent].said:
                    raise DishonestAnswerError(
                        f"the answer leaves out model call {parent}, which model call {missing[-1]} continues. "
                        "An agent that returns a part of its turns can be trained with `gym_train_calls` 'all'"
                    )
                missing.append(parent)
            counted += reversed(missing)
        return [self.calls[index] for index in counted]

    def _named(self, place: int, item: Mapping[str, Any]) -> ModelCall:
        ids = list(item["generation_token_ids"])
        by_handle = [call for call in self.calls.values() if ids == [call.handle]]
        if by_handle:
            return by_handle[0]
        if len(ids) == 1 and ids[0] < 0:
            raise DishonestAnswerError(
                f"output item {place} ({_quoted(item)}) has the handle of another rollout's call"
            )
        sampled = ids, list(item.get("prompt_token_ids") or []), list(item.get("generation_log_probs") or [])
        for call in self.calls.values():
            if sampled == (call.generation_ids, call.prompt_ids, call.logprobs):
                return call
        raise DishonestAnswerError(
            f"output item {place} ({_quoted(item)}) has {len(ids)} token ids that no model call of the rollout "
            "sampled with this prompt and these log-probabilities"
        )

    def _next_that_said(self, said: Sequence[bytes]) -> ModelCall | None:
        """Return the call of the next items: of several the longest, and one that continues the call before. Of
        retries the newest, from which the conversation goes on; of calls that continue something else, the oldest."""
        fits = [
            call
            for call in self.calls.values()
            if call.said and call.index not in self.found and tuple(said[: len(call.said)]) == call.said
        ]
        before = self.found[-1] if self.found else None
        continued = {before, *self._empty_children(before)}

        def rank(call: ModelCall) -> tuple[int, bool, int]:
            is_next = call.parent in continued
            return len(call.said), is_next, call.index if is_next else -call.index

        return max(fits, key=rank, default=None)

    def _empty_children(self, index: int | None) -> set[int]:
        """Return the calls that said nothing behind a call, or at the beginning."""
        children: set[int] = set()
        for call in self.calls.values():  # in the order of their answers: parents first
            if not call.said and (call.parent == index or call.parent in children):
                children.add(call.index)
        return children

    def _count(self, call: ModelCall, place: int) -> None:
        if call.index in self.found:
            raise DishonestAnswerError(f"output item {place} is model call {call.index} once more")
        self.found.append(call.index)


def _quoted(item: Mapping[str, Any]) -> str:
    said = read_item(item)
    text = f"{said.name}({said.text})" if said.kind == "call" else said.text
    return repr(text if len(text) <= _NUM_CHARACTERS else f"{text[:_NUM_CHARACTERS]}…")
