"""Decide which model calls of a rollout count: those that Gym's answer contains. Pure functions.

The policy server's ledger knows which tokens were sampled, Gym's answer knows what the agent made of them. The items
of the answer that the assistant said are divided into calls:

    an item with a handle, or with token ids   ends, or begins, the call of that handle, or one of exactly these tokens
    items without                              are a call that said just this

An item of the environment parts two calls, unless it is the result of a tool call and a further one of the same model
call follows: some agents write the result of each of several tool calls behind it.

Every item must be part of a call, each call is there once, and behind those that it continues. These must be there
too, except for calls that said nothing, which count with the one that continues them (NeMo Gym drops an answer that
is empty). An answer that fails this is dishonest or broken, and nothing of it is trained.

Without handles several divisions may be possible: calls that say the same stand for each other. They are searched in
the order of what is likely, which finds the one that is there at once if the texts differ.

Calls that the answer does not contain are none of its turns: a retry whose answer was lost, a sample that the agent
discarded, a sub-agent's own calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from trl_gym.policy_server.middleware.turn import TOKEN_KEYS
from trl_gym.responses import output_items, read_item, said_in_item
from trl_gym.rollouts.trajectory import ModelCall

_NUM_CHARACTERS = 80  # of a quoted item
_MAX_DEAD_ENDS = 2_000  # of a search, which only many equal texts lead astray; about a second


class DishonestAnswerError(ValueError):
    """Gym's answer contradicts the policy server's ledger; the text says how. Becomes an `environment` failure."""


def counted_calls(
    answer: Mapping[str, Any], calls: Sequence[ModelCall], *, may_leave_out: bool = False
) -> list[ModelCall]:
    """Return the calls that an answer contains, each behind those that it continues.

    Args:
        calls: All calls of the rollout that were answered, in the order of their answers.
        may_leave_out: Whether a call that is in the answer may continue one that is not.

    Raises:
        DishonestAnswerError: The answer has a turn that nobody sampled, has one twice or in another order, leaves one
            out, or has other tokens than were sampled.
    """
    by_index = {call.index: call for call in calls}
    found = _Search(by_index, _parts(output_items(answer), by_index), may_leave_out).run()
    if not found and not any(call.said for call in calls):
        found = list(by_index)[-1:]  # they said nothing, and so does the answer
    return _joined(_with_empty_turns(found, by_index), by_index)


# -- what the answer says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """An item of the answer, or all those of a call that one of them names."""

    name: str  # of the item, for an error
    said: tuple[bytes, ...]  # digests of what it says
    calls: frozenset[int] | None  # those that it may be, by its handle or token ids; None without these
    tool_call: str = ""  # id, if it is a tool call
    results: tuple[str, ...] = ()  # in front of it: ids of the tool calls; "" for another item of the environment


def _parts(items: Sequence[Mapping[str, Any]], calls: Mapping[int, ModelCall]) -> list[_Part]:
    single = list(_single_parts(items, calls.values()))
    parts: list[_Part] = []
    num_done = 0
    for place, part in enumerate(single):
        if part.calls is None:
            continue
        index = min(part.calls)  # others have the same tokens, and so say the same
        said = calls[index].said
        num = max(len(said) + (not part.said), 1)
        for start in (place + 1 - num, place):  # the last of its items has the handle, or the first
            if start >= num_done and _is_call(single[start : start + num], said, part):
                break
        else:
            raise DishonestAnswerError(
                f"{part.name} says something else than model call {index} sampled, whose handle or token ids it has; "
                "an agent that broke off may have put an error there"
            )
        parts += single[num_done:start]
        parts.append(_Part(part.name, said, part.calls, results=single[start].results))
        num_done = start + num
    return parts + single[num_done:]


def _single_parts(items: Sequence[Mapping[str, Any]], calls: Collection[ModelCall]) -> Iterator[_Part]:
    results: list[str] = []
    for place, item in enumerate(items):
        said, read = said_in_item(item), read_item(item)
        is_placeholder = all(item.get(key) == [0] for key in TOKEN_KEYS)  # of agents that got no answer
        has_ids = bool(item.get("generation_token_ids")) and not is_placeholder
        if said is None and not has_ids:
            if read.role != "assistant":
                results.append(read.id if read.kind == "result" else "")
            continue
        name = f"output item {place} ({_quoted(item)})"
        named = _named(name, item, calls) if has_ids else None
        yield _Part(name, () if said is None else (said,), named, read.id, tuple(results))
        results = []


def _is_call(parts: Sequence[_Part], said: tuple[bytes, ...], named: _Part | None = None) -> bool:
    """Tell whether parts are a call that said this, and that none of them names but `named`.

    Between them there may only be results of the tool calls in front, and a further tool call behind these.
    """
    if tuple(word for part in parts if part.calls is None or part is named for word in part.said) != said:
        return False
    ids: set[str] = set()
    for part in parts:
        if part is not parts[0] and part.results and not (part.tool_call and ids.issuperset(part.results)):
            return False
        ids |= {part.tool_call} - {""}
    return True


def _named(name: str, item: Mapping[str, Any], calls: Collection[ModelCall]) -> frozenset[int]:
    """Return the calls that an item names by its handle, or by their exact tokens; several may have the same."""
    ids = list(item["generation_token_ids"])
    prompt, logprobs = list(item.get("prompt_token_ids") or []), list(item.get("generation_log_probs") or [])
    if len(ids) == 1 and ids[0] < 0:
        by_handle = frozenset(call.index for call in calls if call.handle == ids[0])
        if not by_handle:
            raise DishonestAnswerError(f"{name} has the handle of another rollout's call")
        if prompt not in ([], ids) or logprobs not in ([], [0.0]):
            (index,) = by_handle
            raise DishonestAnswerError(
                f"{name} has the handle of model call {index}, and its prompt or log-probabilities were edited"
            )
        return by_handle
    sampled = ids, prompt, logprobs
    same = (call.index for call in calls if sampled == (call.generation_ids, call.prompt_ids, call.logprobs))
    if not (by_ids := frozenset(same)):
        raise DishonestAnswerError(
            f"{name} has {len(ids)} token ids that no model call of the rollout sampled with this prompt and these "
            "log-probabilities"
        )
    return by_ids


def _quoted(item: Mapping[str, Any]) -> str:
    said = read_item(item)
    text = f"{said.name}({said.text})" if said.kind == "call" else said.text
    return repr(text if len(text) <= _NUM_CHARACTERS else f"{text[:_NUM_CHARACTERS]}…")


# -- which calls these are --------------------------------------------------------------------------------------------


class _Search:
    """Divides the parts of an answer into calls: in depth, the likely calls first.

    Args:
        calls: By index.
        parts: Of the answer.
    """

    def __init__(self, calls: Mapping[int, ModelCall], parts: Sequence[_Part], may_leave_out: bool) -> None:
        self._calls, self._parts, self._may_leave_out = calls, parts, may_leave_out
        self._speaker_before = {index: _speaker_before(index, calls) for index in calls}
        self._first_try = _first_tries(calls)
        self._by_first: dict[bytes, list[int]] = {}  # calls by the first thing that they say
        for call in calls.values():
            if call.said:
                self._by_first.setdefault(call.said[0], []).append(call.index)
        self._named: frozenset[int] = frozenset().union(*(part.calls or () for part in parts))
        self._found: list[int] = []
        self._missed: list[list[int]] = []  # calls that each one continues and that were not found in front of it
        self._num_behind = Counter[int]()  # these, counted: they may not follow any more

    def run(self) -> list[int]:
        """Return the indices of the calls, in the order of the answer."""
        self._refuse_what_nobody_said()
        frames = [(0, self._ways(0))]  # one more than calls found
        dead: set[tuple[int, frozenset[int]]] = set()  # places from which these calls found lead nowhere
        farthest, found_there = 0, list(self._found)
        while frames and len(dead) < _MAX_DEAD_ENDS:
            place, ways = frames[-1]
            if place == len(self._parts):
                return self._found
            index, end = next(ways, (None, place))
            if index is None:
                dead.add((place, frozenset(self._found)))
                frames.pop()
                if frames:
                    self._pop()
                continue
            self._push(index)
            if end > farthest:
                farthest, found_there = end, list(self._found)
            if dead and (end, frozenset(self._found)) in dead:
                self._pop()
            else:
                frames.append((end, self._ways(end)))
        self._refuse(farthest, found_there)

    def _ways(self, place: int) -> Iterator[tuple[int, int]]:
        """Yield the calls that may be at a place behind those found, and where they end, the likely ones first.

        Of several one without a result between its tool calls, then the longest, then one that continues the call
        before. Of tries with the same prompt the newest, from which the conversation went on, and else the oldest.
        """
        ways = []
        for index, end in self._fits(place):
            before = self._speaker_before[index]
            is_behind = self._may_leave_out or before is None or self._continues(index, before, self._found)
            if index not in self._found and not self._num_behind[index] and is_behind:
                is_whole = not any(part.results for part in self._parts[place + 1 : end])
                ways.append((is_whole, end, before == self._last(), -self._first_try[index], index))
        ways.sort(reverse=True)
        yield from ((index, end) for _, end, _, _, index in ways)

    def _fits(self, place: int) -> Iterator[tuple[int, int]]:
        """Yield the calls that say what is said at a place, and where each ends."""
        part = self._parts[place]
        if part.calls is not None:
            yield from ((index, place + 1) for index in part.calls)
            return
        for index in self._by_first.get(part.said[0], ()):
            end = place + len(self._calls[index].said)
            if index not in self._named and _is_call(self._parts[place:end], self._calls[index].said):
                yield index, end

    def _continues(self, index: int, before: int, found: Sequence[int]) -> bool:
        """Tell whether the call that a call continues was found, or another one that it may as well continue."""
        return before in found or _stand_in(self._calls[index], before, found, self._calls) is not None

    def _last(self) -> int | None:
        """Return the newest call found that said something."""
        if not self._found:
            return None
        last = self._found[-1]
        return last if self._calls[last].said else self._speaker_before[last]

    def _push(self, index: int) -> None:
        missed = []
        for before in _before(index, self._calls):
            if self._continues(index, before, self._found):
                break
            missed.append(before)
        self._found.append(index)
        self._missed.append(missed)
        self._num_behind.update(missed)

    def _pop(self) -> None:
        self._found.pop()
        self._num_behind.subtract(self._missed.pop())

    # -- why there is no division -------------------------------------------------------------------------------------

    def _refuse_what_nobody_said(self) -> None:
        left = Counter(said for call in self._calls.values() for said in call.said)
        for part in self._parts:
            left.subtract(part.said)
            if part.calls is None and left[part.said[0]] < 0:
                self._refuse_turn(part)

    def _refuse(self, place: int, found: list[int]) -> NoReturn:
        """Say what is wrong at a place behind calls that were found."""
        part = self._parts[place]
        fits = [index for index, _ in self._fits(place)]
        for index in fits:
            before = self._speaker_before[index]
            if index in found or before is None or self._continues(index, before, found):
                continue
            if any(before == one for later in range(place + 1, len(self._parts)) for one, _ in self._fits(later)):
                raise DishonestAnswerError(f"model call {before} comes behind model call {index}, which continues it")
            raise DishonestAnswerError(
                f"the answer leaves out model call {before}, which model call {index} continues. An agent that "
                "returns a part of its turns can be trained with `gym_train_calls` 'all' and `gym_drift` 'split'"
            )
        if any(index in found for index in fits):
            raise DishonestAnswerError(f"{part.name} is model call {next(i for i in fits if i in found)} once more")
        if fits:
            raise DishonestAnswerError(f"model call {fits[0]} comes behind model calls that continue it")
        self._refuse_turn(part)

    def _refuse_turn(self, part: _Part) -> NoReturn:
        raise DishonestAnswerError(
            f"{part.name} is a turn that nobody sampled: none of the rollout's {len(self._calls)} model calls says "
            "this, or it is in the answer already"
        )


def _before(index: int, calls: Mapping[int, ModelCall]) -> Iterator[int]:
    """Yield the calls that a call continues, the newest first."""
    while (parent := calls[index].parent) is not None and parent in calls:
        yield parent
        index = parent


def _speaker_before(index: int, calls: Mapping[int, ModelCall]) -> int | None:
    """Return the newest call that a call continues and that said something."""
    return next((before for before in _before(index, calls) if calls[before].said), None)


def _first_tries(calls: Mapping[int, ModelCall]) -> dict[int, int]:
    """Return for each call the first one that says the same and has the same prompt."""
    num = Counter(call.said for call in calls.values())
    first: dict[tuple[int, ...], int] = {}
    return {
        index: index if num[call.said] == 1 else first.setdefault(tuple(call.prompt_ids), index)
        for index, call in calls.items()
    }


def _stand_in(call: ModelCall, before: int, found: Iterable[int], calls: Mapping[int, ModelCall]) -> int | None:
    """Return a call that says the same as `before`, and with whose tokens the prompt of `call` starts too.

    The policy server cannot tell two answers apart that say the same, where an agent sends one back without handle.
    """
    for index in found:
        other = calls[index]
        if index != before and other.said == calls[before].said:
            seen = other.prompt_ids + other.generation_ids
            if call.prompt_ids[: len(seen)] == seen:
                return index
    return None


def _with_empty_turns(found: Sequence[int], calls: Mapping[int, ModelCall]) -> list[int]:
    """Return calls in their order, with those that they continue and that said nothing in front of them."""
    counted: list[int] = []
    for index in found:
        missing = [index]
        for before in _before(index, calls):
            there = [*counted, *found]
            if calls[before].said or before in there or _stand_in(calls[index], before, there, calls) is not None:
                break
            missing.append(before)
        counted += reversed(missing)
    return counted


def _joined(counted: Sequence[int], calls: Mapping[int, ModelCall]) -> list[ModelCall]:
    """Return the calls that count, each as the continuation of one that counts, if there is one."""

    def parent(call: ModelCall) -> int | None:
        if call.parent not in calls or call.parent in counted or call.parent is None:
            return call.parent
        stand_in = _stand_in(call, call.parent, counted, calls)
        return call.parent if stand_in is None else stand_in

    return [replace(calls[index], parent=parent(calls[index])) for index in counted]
