"""Find what the chat template writes after a sampled turn, by asking the server that renders, never a copy here.

The turn's text is replaced by a marker, the chat is rendered, and what follows the marker is the tail. What the
template does with earlier turns (dropping their thinking, moving the tools) happens in front of it.

    [system, user, assistant, tool, assistant*, tool, user]      the whole chat; * is the turn with the marker
    [system, us…,  assist…,   to…,  assistant*, tool, user]      texts in front of it are abbreviated

A render of the whole chat grows with its texts, the other only with the number of its messages. Both end alike if the
template's source proves it (`sight.py`). A chat is rendered whole if there is no such proof, if the server does not
tell its template (`GET /tokenizer_info`), or if an abbreviated text turns up in the tail. Whether the server renders
with the template that it told is checked in the first use of a template, and now and then afterwards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trl_gym.policy_server.middleware import splice
from trl_gym.policy_server.middleware.sight import Sight, sight_of
from trl_gym.policy_server.middleware.splice import Closing, NoBoundaryError, NoMarkerError, Rendered

logger = logging.getLogger(__name__)

_INSTRUCTING = ("system", "developer")
_CHECK_EVERY = 64  # abbreviated chats from one comparison with the whole chat to the next
_MAX_TEMPLATES = 64

Place = Literal["text", "calls"]
"""Place of the marker: a turn's text, or the arguments of its tool calls, which templates write after the text."""

Tokenize = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""`POST /tokenize`: body → answer. Raises `RenderRefusedError` if the template refuses the chat."""


class RenderRefusedError(Exception):
    """The server answered a render with an error; the text is the server's."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat whose message `newest` is the sampled turn to be continued."""

    messages: list[dict[str, Any]]  # messages without token ids
    newest: int  # index of the sampled turn
    # Other fields of `/tokenize` that decide the render: tools, template, its arguments, model.
    options: dict[str, Any]
    ending: dict[str, bool]  # `add_generation_prompt` and `continue_final_message`
    source: str | None = None  # the server's own chat template; None if it does not tell

    @property
    def turn(self) -> dict[str, Any]:
        return self.messages[self.newest]

    @property
    def new_messages(self) -> list[dict[str, Any]]:
        return self.messages[self.newest + 1 :]

    @property
    def num_instructions(self) -> int:
        """Number of system messages among the new ones; some templates write them at the very front."""
        return sum(message.get("role") in _INSTRUCTING for message in self.new_messages)

    def marked(self, mark: str, place: Place) -> Chat:
        """Return the chat with `mark` in place of the sampled text."""
        turn = marked_text(self.turn, mark) if place == "text" else marked_calls(self.turn, mark)
        return replace(self, messages=[*self.messages[: self.newest], turn, *self.new_messages])

    def with_instructions(self, text: str) -> Chat:
        """Return the chat with `text` as content of every new system message."""
        new = [
            {**message, "content": text} if message.get("role") in _INSTRUCTING else message
            for message in self.new_messages
        ]
        return replace(self, messages=[*self.messages[: self.newest + 1], *new])

    def abbreviated(self, sight: Sight, filler: str) -> Chat:
        """Return the same chat with short texts in front of the newest turn."""
        front = sight.abbreviate(self.messages[: self.newest], filler)
        return replace(self, messages=[*front, *self.messages[self.newest :]])


@dataclass(slots=True)
class _Probes:
    """Closings of one template with one set of arguments; `tool` is None if it does not write tool calls."""

    plain: Rendered
    tool: Rendered | None


@dataclass(slots=True)
class _Proof:
    """What is known of one template's source."""

    sight: Sight | None  # None if the template has to render whole chats
    num_used: int = 0


@dataclass(slots=True)
class Templates:
    """The chat templates that were asked for so far."""

    stop_ids: set[int] = field(default_factory=set)  # tokens at which generation has stopped; the middleware adds them
    num_whole: int = 0  # number of chats that were rendered whole
    num_abbreviated: int = 0  # number of chats that were rendered with abbreviated texts only
    _probes: dict[str, _Probes] = field(default_factory=dict)
    _proofs: dict[str, _Proof] = field(default_factory=dict)

    async def next_prompt(self, tokenize: Tokenize, chat: Chat, seen: list[int]) -> list[int]:
        """Return the exact prompt: `seen`, then what the template writes for the rest of the chat. Raises
        `NoBoundaryError` if the prompt would be a guess; `RenderRefusedError` if the template refuses even the
        shortest chat."""
        plain = await self.closing(tokenize, chat.options)
        if chat.ending["continue_final_message"] and chat.newest == len(chat.messages) - 1:
            return splice.continue_turn(seen, plain, self.stop_ids)
        calling = await self._call_closing(tokenize, chat.options, plain) if chat.turn.get("tool_calls") else None
        if calling is not None:
            try:
                tail = await self._tail(tokenize, chat, "calls")
            except NoMarkerError:
                pass  # the template leaves the calls of such a turn out and writes its text
            else:
                return splice.splice(seen, tail, calling, self.stop_ids)
        return splice.splice(seen, await self._tail(tokenize, chat, "text"), plain, self.stop_ids)

    async def closing(self, tokenize: Tokenize, options: dict[str, Any]) -> Closing:
        """Return the template's closing of an assistant turn of plain text.

        Args:
            options: See `Chat`.

        Raises:
            NoBoundaryError: If the template does not show it.
            RenderRefusedError: If the template refuses the shortest chat.
        """
        return splice.plain_closing((await self._probed(tokenize, options)).plain, self.stop_ids)

    async def _call_closing(self, tokenize: Tokenize, options: dict[str, Any], plain: Closing) -> Closing | None:
        """Return the closing of a turn that ends in a tool call; None if the template does not write calls."""
        tool = (await self._probed(tokenize, options)).tool
        return None if tool is None else splice.tool_closing(tool, plain, self.stop_ids)

    async def _probed(self, tokenize: Tokenize, options: dict[str, Any]) -> _Probes:
        options = {key: value for key, value in options.items() if key != "tools"}
        key = json.dumps(options, sort_keys=True)
        if key not in self._probes:
            probes = await _probe(tokenize, options)
            if len(self._probes) >= _MAX_TEMPLATES:
                self._probes.clear()
            self._probes[key] = probes
        return self._probes[key]

    async def _tail(self, tokenize: Tokenize, chat: Chat, place: Place) -> list[int]:
        """Return the tokens that the template writes after the newest turn."""
        proof = self._proof(chat)
        abbreviated = None if proof.sight is None else await _abbreviated_tail(tokenize, chat, place, proof.sight)
        if abbreviated is None:
            self.num_whole += 1
            return (await _checked_tail(tokenize, chat, place)).ids
        proof.num_used += 1
        if proof.num_used % _CHECK_EVERY != 1:
            self.num_abbreviated += 1
            return abbreviated.ids
        self.num_whole += 1
        whole = (await _checked_tail(tokenize, chat, place)).ids
        if abbreviated.ids != whole:
            logger.warning("the server renders with another chat template than it says; chats are rendered whole")
            proof.sight = None
        return whole

    def _proof(self, chat: Chat) -> _Proof:
        source = chat.options.get("chat_template") or chat.source or ""
        if source not in self._proofs:
            if len(self._proofs) >= _MAX_TEMPLATES:
                self._proofs.clear()
            self._proofs[source] = _Proof(sight_of(source))
        return self._proofs[source]


async def _probe(tokenize: Tokenize, options: dict[str, Any]) -> _Probes:
    """Find the closings of a template in the shortest chats that have one."""
    user, mark = {"role": "user", "content": "0"}, new_marker([])
    closed = await _render(tokenize, options, [user], add_generation_prompt=False)
    opened = await _render(tokenize, options, [user], add_generation_prompt=True)
    # Some templates end a finished chat with EOS (Phi 3): the common part of both renders is the user's turn.
    prompt = opened.ids[splice.num_common(closed.ids, opened.ids) :]
    call = {"id": "callabcd0", "type": "function", "function": {"name": "f", "arguments": "{}"}}  # Mistral wants 9
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    plain = await _closing(tokenize, options, [user, {"role": "assistant", "content": mark}], mark, prompt)
    try:
        tool = await _closing(tokenize, options, [user, marked_calls(turn, mark)], mark, prompt)
    except (NoBoundaryError, RenderRefusedError):
        tool = None  # this template does not write calls
    return _Probes(plain, tool)


async def _closing(
    tokenize: Tokenize, options: dict[str, Any], messages: list[Any], mark: str, prompt: list[int]
) -> Rendered:
    """Return what is between the marker and the generation prompt, or the end of the chat if it has no such prompt."""
    tail = (await _render(tokenize, options, messages, add_generation_prompt=True)).after(mark)
    length = splice.closing_of(tail.ids, prompt)
    if length is not None:
        return Rendered(tail.ids[:length], tail.strings[:length])
    return (await _render(tokenize, options, messages, add_generation_prompt=False)).after(mark)


async def _rendered_tail(tokenize: Tokenize, chat: Chat, place: Place) -> Rendered:
    mark = new_marker(chat.new_messages)
    try:
        rendered = await _render(tokenize, chat.options, chat.marked(mark, place).messages, **chat.ending)
    except RenderRefusedError as error:
        raise NoBoundaryError(f"the chat template refuses the chat with a marker for the turn: {error}") from error
    return rendered.after(mark)


async def _abbreviated_tail(tokenize: Tokenize, chat: Chat, place: Place, sight: Sight) -> Rendered | None:
    """Return the tail with abbreviated texts in front; None if only the whole chat can tell."""
    filler = new_marker(chat.new_messages, unlike=new_marker(chat.new_messages))
    try:
        tail = await _checked_tail(tokenize, chat.abbreviated(sight, filler), place)
    except NoMarkerError:
        raise
    except NoBoundaryError:
        return None
    return None if filler in "".join(tail.strings) else tail


async def _checked_tail(tokenize: Tokenize, chat: Chat, place: Place) -> Rendered:
    """Return the tail; raise `NoBoundaryError` if a new system message is written anywhere else: the tail lacks it."""
    if chat.num_instructions:
        text = new_marker(chat.new_messages, unlike=new_marker(chat.new_messages))
        tail = "".join((await _rendered_tail(tokenize, chat.with_instructions(text), place)).strings)
        if tail.count(text) != chat.num_instructions:
            raise NoBoundaryError("the chat template writes a later system message in front of the turn")
    return await _rendered_tail(tokenize, chat, place)


async def _render(tokenize: Tokenize, options: dict[str, Any], messages: list[Any], **ending: bool) -> Rendered:
    answer = await tokenize({**options, "messages": messages, **ending, "return_token_strs": True})
    return Rendered(answer["tokens"], answer["token_strs"])


def marked_text(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """Return a turn whose text is the marker; its calls stay, for the tool messages that refer to them."""
    marked = {"role": message.get("role"), "content": mark}
    return marked | ({"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {})


def marked_calls(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """Return a turn without text whose calls have the marker as their only argument.

    The text is dropped because some templates write it after the calls, or even after their results.
    """
    return {
        "role": message.get("role"),
        "content": None if message.get("content") is None else "",
        "tool_calls": [
            {**call, "function": {**call.get("function", {}), "arguments": json.dumps({"q": mark})}}
            for call in message["tool_calls"]
        ],
    }


def new_marker(new_messages: Sequence[dict[str, Any]], *, unlike: str = "") -> str:
    """Return a word that the new messages lack. It ends in a digit, which no tokenizer joins with punctuation."""
    text, number = json.dumps(new_messages), 0
    while (mark := f"zqx{number}") in text or mark == unlike:
        number += 1
    return mark
