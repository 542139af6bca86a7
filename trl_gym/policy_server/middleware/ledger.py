"""Keep what the server knows about the model calls of rollouts: tokens, versions, histories, cancellation.

The ledger is the source of the tokens that are trained. Per rollout it has the calls in the order of their answers:

    prompt      the tokens in front of the sampled ones, as parent + what follows the parent's tokens
    sampled     ids and log-probabilities, as the engine reported them
    history     a digest of the messages that the call answered
    said        digests of what the answer says, by which Gym's answer shows that it contains it

`POST /trl_gym/rollouts/take` hands a rollout that has ended to the trainer and forgets it. A client gets a handle
instead of the tokens: one negative number, as `prompt_token_ids` and `generation_token_ids` of the message. Sent back
with the message, it says which call the conversation goes on from. A message that comes back without it is recognized
by what it says and by the messages in front of it.

Token ids say what the policy saw, messages say what the agent means it to see. An agent that compacts or edits its
history may still send the newest answer with its handle, and putting its tokens back would silently undo the edit:
the digest of the messages in front of it tells.

A policy may sample nothing but its turn end. Gym does not send such a message back, so the next prompt would lack
sampled tokens: `RolloutCalls.recognize` puts these empty turns back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import msgspec

from trl_gym.policy_server.middleware.completions import Texts
from trl_gym.policy_server.middleware.http import Reply
from trl_gym.policy_server.middleware.turn import Turn, handle_in
from trl_gym.responses import said_in_message

_MAX_ANSWERS = 65_536  # to clients without a tag; about 200 bytes each
_MAX_SAME = 64  # of them, those with the same tokens
_MAX_ROLLOUTS = 16_384
_MAX_BYTES = 2 << 30  # of token ids and log-probabilities, over all rollouts
_MAX_ENDED = 65_536  # names of rollouts whose calls are refused
_MAX_TAKEN = 256  # rollouts that are kept once more, for a trainer that did not get the answer
_HANDLE_BITS = 52  # an integer that every JSON parser keeps exactly
_ids = msgspec.json.Decoder(list[int])
_NOTHING: dict[str, Any] = {"role": "assistant", "content": ""}


class DriftCause(StrEnum):
    """Cause of a prompt that does not start with the tokens already seen."""

    RETOKENIZED = "retokenized"
    """The same text in other tokens: the sampled ids were not put back."""

    RETEMPLATED = "retemplated"
    """The chat template writes a sampled turn differently from how it was sampled (tool call markup, thinking)."""

    HISTORY_REWRITTEN = "history_rewritten"
    """The agent sent other earlier messages, or other tools, than it had sent before."""

    MESSAGE_WITHOUT_IDS = "message_without_ids"
    """The agent sent a sampled turn back in a form that is not recognized."""

    NO_BOUNDARY = "no_boundary"
    """The template does not show where the sampled turn ends; see the text."""


# -- what a trainer gets ----------------------------------------------------------------------------------------------


class CallDrift(msgspec.Struct, frozen=True):
    """The cause why a call was not answered on the exact prompt."""

    cause: DriftCause
    text: str


class CallTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of an answered call; `token_ids` and `sampled_ids` read them."""

    handle: int  # what the client got in their place; negative
    parent: int | None  # index of the call of this rollout with whose tokens its prompt starts; None without one
    prompt: bytes  # int32 ids of what follows the parent's tokens; of the whole prompt without a parent
    sampled: bytes  # int32 ids, `[T]`
    logprobs: bytes  # float64, `[T]`: log-probability of each sampled token, in nats
    said: tuple[bytes, ...]  # digests of what the answer says, see `responses.said_in_message`


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One model call of a rollout.

    Seconds are None if the server does not measure them (`--enable-per-request-metrics`), tokens from the prefix cache
    if it does not report them (`--enable-prompt-tokens-details`).
    """

    status: int  # HTTP status of the answer
    prompt: Literal["rendered", "exact"]  # by the chat template, or as the tokens seen plus what is new
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    weight_version: str | None = None  # of its first token
    last_version: str | None = None  # of its last token, where weights changed in between
    seconds: float  # in the middleware, in total
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    drift: CallDrift | None = None
    error: str | None = None  # the server's words, when the status is not 200
    caller: str | None = None  # the NeMo Gym server that made the call, where it is known
    own_sampling: tuple[str, ...] = ()  # fields that asked for another distribution, see `sampling.py`
    tokens: CallTokens | None = None  # None for a call that failed


class Taken(msgspec.Struct, frozen=True):
    """The answer to `POST /trl_gym/rollouts/take`, as MessagePack."""

    instance: str  # the server's process
    rollouts: dict[str, list[CallRecord] | None]  # by id; None where the server had no room for all of its tokens


def sampled_ids(tokens: CallTokens) -> list[int]:
    return array("i", tokens.sampled).tolist()


def token_ids(records: Sequence[CallRecord], index: int) -> list[int]:
    """Return the prompt of a call and what it sampled.

    Args:
        records: The calls of its rollout.
        index: One that was answered.
    """
    parts: list[bytes] = []
    place: int | None = index
    while place is not None:
        tokens = records[place].tokens
        assert tokens is not None, "a parent was answered"
        parts += (tokens.sampled, tokens.prompt)
        place = tokens.parent
    return array("i", b"".join(reversed(parts))).tolist()


def record_of(
    reply: Reply,
    answer: dict[str, Any] | None,
    *,
    exact: bool,
    seconds: float,
    last_version: str | None = None,
    drift: CallDrift | None = None,
    tokens: CallTokens | None = None,
    caller: str | None = None,
    own_sampling: tuple[str, ...] = (),
) -> CallRecord:
    """Make the record of a call.

    Args:
        answer: The chat completion in it; None after an error.
        exact: Whether the prompt was forced.
        last_version: Weight version of its last token.
        drift: The cause why the prompt is not exact, if it should have been.
        tokens: Its tokens.
        caller: The NeMo Gym server that made it, where it is known.
        own_sampling: Fields of it that asked for another distribution.
    """
    answer = answer or {}
    usage, metrics = answer.get("usage") or {}, answer.get("metrics") or {}
    return CallRecord(
        status=reply.status,
        prompt="exact" if exact else "rendered",
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        finish_reason=(answer.get("choices") or [{}])[0].get("finish_reason"),
        weight_version=(version := answer.get("weight_version")),
        last_version=None if last_version is None or str(last_version) == version else str(last_version),
        seconds=round(seconds, 6),
        queue_s=_seconds(metrics.get("queue_time_ms")),
        prefill_s=_seconds(metrics.get("time_to_first_token_ms")),
        decode_s=_seconds(metrics.get("generation_time_ms")),
        drift=drift,
        error=None if reply.ok else reply.error_text(),
        caller=caller,
        own_sampling=own_sampling,
        tokens=tokens,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds / 1000, 6)


# -- the calls of one rollout -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Digest:
    """Hashes of the request of a model call."""

    messages: bytes  # hash of all messages
    before_answer: bytes  # hash without assistant messages at the end: agents merge what they get into the last one
    tools: bytes  # hash of tools and template options

    def difference(self, now: Digest) -> str | None:
        """Tell what the agent has changed; `now` is of the messages in front of the answer, as it sends them now."""
        if self.tools != now.tools:
            return "the agent changed the tools or the template options after this turn"
        if now.messages not in (self.messages, self.before_answer):
            return "the agent changed messages in front of this turn"
        return None


@dataclass(slots=True)
class RolloutCalls:
    """The calls of one rollout."""

    records: list[CallRecord] = field(default_factory=list)  # records of answered calls, in the order of their answers
    num_first_prompt: int | None = None  # tokens of the first prompt; None before the first answer
    newest: int | None = None  # index of the newest answer with tokens
    num_bytes: int = 0  # of all tokens
    is_whole: bool = True  # False when tokens were dropped to make room
    # One event per running call; setting it hangs up on the engine.
    aborts: list[asyncio.Event] = field(default_factory=list)
    texts: Texts = field(default_factory=Texts)  # of its completions
    _digests: dict[int, Digest] = field(default_factory=dict)  # by index: the request that the call answered
    _by_handle: dict[int, int] = field(default_factory=dict)
    _by_front: dict[bytes, list[int]] = field(default_factory=dict)  # by the messages in front of the answer
    _empty: dict[bytes, int] = field(default_factory=dict)  # answers that say nothing, by the messages in front

    def has_lost(self, turn: Turn) -> bool:
        """Tell whether a request without a recognized message has one that was sampled: by a handle that is not known
        here, or because its assistant messages stand behind messages that this rollout has sampled behind."""
        if any(ids is not None and handle_in(ids) is not None for ids in turn.sampled):
            return True
        roles = [message.get("role") for message in turn.messages]
        return "assistant" in roles and turn.digests[roles.index("assistant")] in self._by_front

    def recognize(self, turn: Turn) -> None:
        """Find the calls that sampled the assistant messages of a request, and put empty turns back that it dropped.

        Args:
            turn: The request; changed in place. If a message is recognized (by its handle, its token ids, or what it
                says), `newest`, `seen`, `call` and `num_first_prompt` are set.
        """
        digests = _Digests()
        turn.digests = digests.found
        for place in _places(turn):
            self._put_back(turn, place)
            if place == len(turn.messages):
                break
            index = self._find(turn, place)
            if index is not None:
                self._continue(turn, place, index)
            said = None if index is None else self._tokens(index).said
            digests.add(turn.messages[place], turn.sampled[place], said)
        if turn.call is not None:
            self.go_on(turn, turn.call)

    def go_on(self, turn: Turn, call: int | None) -> None:
        """Let a request go on from a call: set `seen`, `call` and `num_first_prompt`. None: it begins a conversation,
        with a prompt of token ids."""
        turn.call = call
        turn.seen = None if call is None else token_ids(self.records, call)
        turn.num_first_prompt = len(turn.prompt or ()) if call is None else self._num_first_prompt(call)

    def difference(self, turn: Turn) -> str | None:
        """Tell what the agent has changed in front of the newest recognized message; None if nothing."""
        if turn.call is None or turn.newest is None:
            return None
        return self._digests[turn.call].difference(digest_of(turn, turn.newest))

    def tokens_of(self, turn: Turn, message: dict[str, Any], prompt: list[int]) -> CallTokens:
        """Return the tokens of an answer under a new handle; `append` their record next.

        Args:
            message: The answer's message, with its token bundle.
        """
        parent: int | None = None
        if turn.call is not None and self.is_whole and prompt[: len(turn.seen or ())] == turn.seen:
            parent = turn.call
        elif self.is_whole:
            parent = self.parent(prompt)
        start = 0 if parent is None else len(token_ids(self.records, parent))
        return CallTokens(
            handle=-secrets.randbelow(1 << _HANDLE_BITS) - 1,
            parent=parent,
            prompt=array("i", prompt[start:]).tobytes(),
            sampled=array("i", message["generation_token_ids"]).tobytes(),
            logprobs=array("d", message["generation_log_probs"]).tobytes(),
            said=said_in_message(message),
        )

    def append(self, turn: Turn, record: CallRecord) -> int:
        """Add the record of a call. Returns the bytes of its tokens."""
        if not self.is_whole:  # its tokens were dropped while it ran
            return 0
        index, tokens = len(self.records), record.tokens
        self.records.append(record)
        if tokens is None:
            return 0
        self.newest = index
        if self.num_first_prompt is None:
            self.num_first_prompt = record.prompt_tokens
        digest = self._digests[index] = digest_of(turn, len(turn.messages))
        self._by_handle[tokens.handle] = index
        for front in {digest.messages, digest.before_answer}:
            self._by_front.setdefault(front, []).append(index)
        if isinstance(turn.prompt, str):
            self.texts.add(index, turn.prompt, turn.said)
        elif not tokens.said:
            self._empty[digest.messages] = index
        num_bytes = len(tokens.prompt) + len(tokens.sampled) + len(tokens.logprobs)
        self.num_bytes += num_bytes
        return num_bytes

    def drop_tokens(self) -> None:
        """Make room: what was recorded is lost, and the rollout with it."""
        self.records.clear()
        for known in (self._digests, self._by_handle, self._by_front, self._empty, self.texts):
            known.clear()
        self.newest, self.num_bytes, self.is_whole = None, 0, False

    def _find(self, turn: Turn, place: int) -> int | None:
        message, ids = turn.messages[place], turn.sampled[place]
        if ids is not None and (handle := handle_in(ids)) is not None:
            return self._by_handle.get(handle)
        if ids is not None:
            sampled = _packed(ids)
            index = self._likeliest(turn, lambda tokens: tokens.sampled == sampled)
            if index is None and place == turn.newest and turn.seen is not None:  # `Turn` has parsed the newest ids
                index = self.parent(turn.seen)
                return index if index is not None and token_ids(self.records, index) == turn.seen else None
            return index
        if message.get("role") != "assistant":
            return None
        said = said_in_message(message)
        return self._likeliest(turn, lambda tokens: tokens.said == said)

    def _likeliest(self, turn: Turn, is_it: Callable[[CallTokens], bool]) -> int | None:
        """Return the call that is meant behind the same messages: of several, one that continues the call before, and
        of these the newest, since a client that asks again has not got the older answer."""
        found = [index for index in self._by_front.get(turn.digests[-1], ()) if is_it(self._tokens(index))]
        return max(found, key=lambda index: (self._tokens(index).parent == turn.call, index), default=None)

    def _continue(self, turn: Turn, place: int, index: int) -> None:
        """Let the request go on from a recognized message, unless it goes on from a later one with ids of its own."""
        if turn.newest is not None and turn.newest > place:
            return
        turn.newest, turn.call = place, index

    def _num_first_prompt(self, index: int) -> int | None:
        """Return the length of the prompt with which the conversation of a call began."""
        while (tokens := self.records[index].tokens) is not None and tokens.parent is not None:
            index = tokens.parent
        return self.records[index].prompt_tokens

    def _put_back(self, turn: Turn, place: int) -> None:
        """Put an empty turn back in front of `place`, if that is where it was and it is not there."""
        index = self._empty.get(turn.digests[-1])
        if index is None:
            return
        is_there = place < len(turn.messages) and turn.messages[place].get("role") == "assistant"
        if is_there and (turn.sampled[place] is not None or not is_empty(turn.messages[place])):
            return
        if not is_there:
            turn.messages.insert(place, dict(_NOTHING))
            turn.sampled.insert(place, None)
            if turn.newest is not None and turn.newest >= place:
                turn.newest += 1
        turn.sampled[place] = b"[%d]" % self._tokens(index).handle

    def parent(self, prompt: list[int]) -> int | None:
        """Return the call with most tokens of those with whose tokens a prompt starts."""
        best, length = None, 0
        for index, record in enumerate(self.records):
            if record.tokens is None or record.prompt_tokens is None:
                continue
            ids = sampled_ids(record.tokens)
            end = record.prompt_tokens + len(ids)
            is_candidate = length < end <= len(prompt) and prompt[record.prompt_tokens : end] == ids  # cheap
            if is_candidate and prompt[:end] == token_ids(self.records, index):
                best, length = index, end
        return best

    def _tokens(self, index: int) -> CallTokens:
        tokens = self.records[index].tokens
        assert tokens is not None, "only answered calls are recognized"
        return tokens


def _places(turn: Turn) -> Iterator[int]:
    """Yield the places of a request whose messages become more meanwhile, the one behind the last included."""
    place = 0
    while place <= len(turn.messages):
        yield place
        place += 1


def is_empty(message: dict[str, Any]) -> bool:
    """Tell whether a message holds nothing that an agent would keep."""
    return not any(message.get(key) for key in ("content", "tool_calls", "reasoning", "reasoning_content"))


# -- histories --------------------------------------------------------------------------------------------------------


def _packed(ids: bytes) -> bytes | None:
    """Return a JSON list of token ids as `CallTokens.sampled` has it; None for what is none."""
    try:
        return array("i", _ids.decode(ids)).tobytes()
    except (msgspec.MsgspecError, OverflowError):
        return None


def key_of(seen: Sequence[int]) -> bytes:
    """Return the key of an answer: a hash of its prompt plus the sampled tokens."""
    return hashlib.blake2b(array("q", seen).tobytes(), digest_size=16).digest()


def digest_of(turn: Turn, end: int) -> Digest:
    """Return the digest of a request's first `end` messages, as its agent means them, and of its render options."""
    if not turn.digests:
        digests = _Digests()
        for message, ids in zip(turn.messages, turn.sampled, strict=True):
            digests.add(message, ids)
        turn.digests = digests.found
    before = end
    while before and turn.messages[before - 1].get("role") == "assistant":
        before -= 1
    return Digest(turn.digests[end], turn.digests[before], turn.options_key)


class _Digests:
    """Hashes of the first 0, 1, 2, … messages of a conversation: `found`, which grows."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)
        self._numbers: dict[str, int] = {}  # of tool calls, whose ids agents and converters make again
        self.found = [self._state.digest()]

    def add(self, message: dict[str, Any], sampled: bytes | None, said: tuple[bytes, ...] | None = None) -> None:
        """Add a message.

        Args:
            sampled: See `Turn.sampled`.
            said: What the call said that the message is recognized as, in whatever form it came back; else None.
        """
        answered = self._answered(message)
        part = _part(message, sampled, answered) if said is None else b"".join([b"said", *said])
        self._state.update(part)
        self.found.append(self._state.digest())

    def _answered(self, message: dict[str, Any]) -> int | str | None:
        """Return which call a message answers, and number the calls that it makes."""
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                self._numbers[str(call.get("id"))] = len(self._numbers)
        answered = message.get("tool_call_id")
        return None if answered is None else self._numbers.get(str(answered), str(answered))


def _part(message: dict[str, Any], sampled: bytes | None, answered: int | str | None) -> bytes:
    """Return what of a message counts: what was sampled if that is known (ids or handle), else role, text and calls.
    Thinking, which agents drop, and the form of the message do not."""
    if sampled is not None:
        return b"sampled" + sampled
    said = [digest.hex() for digest in said_in_message(message)]
    content = message.get("content")
    media = [part for part in content if not _is_text(part)] if isinstance(content, list) else []
    return json.dumps([message.get("role"), said, media, answered]).encode()


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))


class Histories:
    """Digests of the newest answers to clients without a tag, which send full token ids back."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, list[Digest]] = OrderedDict()

    def remember(self, seen: Sequence[int], digest: Digest) -> None:
        """Keep the digest of an answer's request; `seen` is prompt plus sampled tokens."""
        known = self._digests.setdefault(key_of(seen), [])
        others = [one for one in known if one != digest]  # conversations may have the same tokens
        known[:] = [*others[1 - _MAX_SAME :], digest]
        if len(self._digests) > _MAX_ANSWERS:
            self._digests.popitem(last=False)

    def difference(self, turn: Turn) -> str | None:
        """Tell what the agent has changed in the request that led to the newest answer with token ids. Returns one
        sentence, or None if nothing changed or the answer is unknown: another server gave it, or so many conversations
        have these tokens that some are forgotten."""
        if turn.seen is None or turn.newest is None:
            return None
        now = digest_of(turn, turn.newest)
        found = [digest.difference(now) for digest in self._digests.get(key_of(turn.seen), ())]
        return None if None in found or len(found) in (0, _MAX_SAME) else found[-1]


# -- the calls of all rollouts ----------------------------------------------------------------------------------------


class RolloutBook:
    """Calls by rollout, and rollouts that have ended. Bounded: the oldest rollouts are dropped first."""

    def __init__(self) -> None:
        self._rollouts: OrderedDict[str, RolloutCalls] = OrderedDict()
        self._taken: OrderedDict[str, list[CallRecord] | None] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._num_bytes = 0

    def calls(self, rollout: str) -> RolloutCalls:
        """Return the calls of a rollout, known or new."""
        calls = self._rollouts.setdefault(rollout, RolloutCalls())
        self._rollouts.move_to_end(rollout)
        if len(self._rollouts) > _MAX_ROLLOUTS:
            self._num_bytes -= self._rollouts.popitem(last=False)[1].num_bytes
        return calls

    def append(self, calls: RolloutCalls, turn: Turn, record: CallRecord) -> None:
        """Add the record of a tagged call to its rollout's calls, as they were when it began: the rollout may have
        ended since. Tokens of the oldest rollouts are dropped where there is no room."""
        num_bytes = calls.append(turn, record)
        if turn.rollout is None or self._rollouts.get(turn.rollout) is not calls:
            return
        self._num_bytes += num_bytes
        for oldest in self._rollouts.values():
            if self._num_bytes <= _MAX_BYTES:
                return
            self._num_bytes -= oldest.num_bytes
            if oldest.num_bytes:
                oldest.drop_tokens()

    def has_ended(self, rollout: str) -> bool:
        """Tell whether a rollout was cancelled, or taken: nobody waits for its calls any more."""
        return rollout in self._ended

    @contextmanager
    def running(self, rollout: str) -> Iterator[asyncio.Event]:
        """Register a running call of this rollout; yields an event that `cancel` sets."""
        calls, abort = self.calls(rollout), asyncio.Event()
        calls.aborts.append(abort)
        try:
            yield abort
        finally:
            calls.aborts.remove(abort)

    def cancel(self, rollouts: Sequence[str]) -> int:
        """Refuse all later calls of these rollouts and abort running ones. Returns how many were running."""
        aborts = [abort for name in rollouts if name in self._rollouts for abort in self._rollouts[name].aborts]
        for name in rollouts:
            self._ended[name] = None
            self._ended.move_to_end(name)
        while len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)
        for abort in aborts:
            abort.set()
        return len(aborts)

    def take(self, rollouts: Sequence[str]) -> dict[str, list[CallRecord] | None]:
        """Return the records of rollouts that have ended, empty for one that has made no call here, and forget them.

        A trainer that did not get the answer asks again: the newest are kept for that.
        """
        self.cancel(rollouts)
        for name in rollouts:
            calls = self._rollouts.pop(name, None)
            if calls is not None:
                self._num_bytes -= calls.num_bytes
                self._taken[name] = calls.records if calls.is_whole else None
        found = {name: self._taken.get(name, []) for name in rollouts}
        while len(self._taken) > _MAX_TAKEN:
            self._taken.popitem(last=False)
        return found

    def records(self, rollouts: Sequence[str]) -> dict[str, list[CallRecord]]:
        """Return the records so far of rollouts that have not ended."""
        return {name: self._rollouts[name].records if name in self._rollouts else [] for name in rollouts}

    def num_running(self, rollouts: Sequence[str]) -> dict[str, int]:
        """Return how many calls of each rollout are being answered."""
        return {name: len(self._rollouts[name].aborts) if name in self._rollouts else 0 for name in rollouts}
