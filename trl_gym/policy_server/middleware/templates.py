"""What does the chat template write after a sampled turn? Asked of the server that renders, never of a copy here.

The text of the turn is replaced by a marker (`marking.py`) and the chat rendered; what follows the marker is the tail.
Whatever the template does with earlier turns (dropping their thinking, moving the tools) happens in front of it.

The whole chat grows with the rollout; its extension, a stub in front of the turn, grows with what is new. Most
templates write the same tail for both, and then only the second is rendered. That is not assumed: the two are compared
for each depth and shape of a chat until they have agreed twice, and now and then afterwards. A template for which they
once differ (tools in front of the last user message, numbered rounds) is rendered whole from then on.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from trl_gym.policy_server.marking import Chat, Place, marked_calls, new_marker
from trl_gym.policy_server.middleware import splice
from trl_gym.policy_server.middleware.splice import Closing, NoBoundaryError, NoMarkerError, Rendered

_NUM_AGREEMENTS = 2
_CHECK_EVERY = 64  # uses of an extension between two comparisons
_MAX_TEMPLATES = 64
_MAX_SHAPES = 4096

Tokenize = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""`POST /tokenize`: body → answer. Raises `RenderRefusedError` when the template refuses the chat."""


class RenderRefusedError(Exception):
    """The server answered the render with an error; the text is its own."""


@dataclass(slots=True)
class _Probes:
    """Facts about one template with one set of arguments."""

    plain: Rendered
    tool: Rendered | None


@dataclass(slots=True)
class _Trust:
    agreed: int = 0
    used: int = 0


@dataclass(slots=True)
class Templates:
    """Chat templates as far as they have been seen at work.

    Attributes:
        stop_ids: Tokens at which generation was seen to stop; the middleware adds them.
        num_whole: Chats that were rendered whole.
        num_extended: Chats of which only the new part was rendered.
    """

    stop_ids: set[int] = field(default_factory=set)
    num_whole: int = 0
    num_extended: int = 0
    _probes: dict[str, _Probes] = field(default_factory=dict)
    _trust: dict[bytes, _Trust] = field(default_factory=dict)
    _whole_only: set[bytes] = field(default_factory=set)

    async def next_prompt(self, tokenize: Tokenize, chat: Chat, seen: list[int]) -> list[int]:
        """The exact prompt: `seen`, then what the template writes for the rest of the chat.

        Raises:
            NoBoundaryError: It would be a guess.
            RenderRefusedError: The template refuses even the shortest chat.
        """
        plain = await self.closing(tokenize, chat.options)
        if chat.ending["continue_final_message"] and chat.newest == len(chat.messages) - 1:
            return splice.continue_turn(seen, plain, self.stop_ids)
        calling = await self._call_closing(tokenize, chat.options, plain) if chat.turn.get("tool_calls") else None
        if calling is not None:
            try:
                tail = await self._tail(tokenize, chat, "calls")
            except NoMarkerError:
                pass  # the template leaves the calls of such a turn out, and writes its text
            else:
                return splice.splice(seen, tail, calling, self.stop_ids)
        return splice.splice(seen, await self._tail(tokenize, chat, "text"), plain, self.stop_ids)

    async def closing(self, tokenize: Tokenize, options: dict[str, Any]) -> Closing:
        """How this template closes an assistant turn of plain text.

        Args:
            tokenize: Asks the server.
            options: See `Chat`.

        Raises:
            NoBoundaryError: The template does not show it.
            RenderRefusedError: The template refuses the shortest chat.
        """
        return splice.plain_closing((await self._probed(tokenize, options)).plain, self.stop_ids)

    async def _call_closing(self, tokenize: Tokenize, options: dict[str, Any], plain: Closing) -> Closing | None:
        """The same for a turn that ends in a tool call; None if the template does not write calls."""
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
        """What the template writes after the newest turn."""
        if chat.options_key not in self._whole_only:
            trust = self._trust_in(chat.shape_key(place))
            trust.used += 1
            if trust.agreed >= _NUM_AGREEMENTS and trust.used % _CHECK_EVERY:
                self.num_extended += 1
                return (await _rendered_tail(tokenize, chat.extension(), place)).ids
            return await self._compare(tokenize, chat, place, trust)
        return await self._whole(tokenize, chat, place)

    async def _compare(self, tokenize: Tokenize, chat: Chat, place: Place, trust: _Trust) -> list[int]:
        whole = await self._whole(tokenize, chat, place)
        try:
            extended = (await _rendered_tail(tokenize, chat.extension(), place)).ids
        except NoBoundaryError:
            extended = None
        if extended == whole:
            trust.agreed += 1
        else:
            self._whole_only.add(chat.options_key)
        return whole

    async def _whole(self, tokenize: Tokenize, chat: Chat, place: Place) -> list[int]:
        self.num_whole += 1
        if chat.num_instructions:
            await _check_instructions(tokenize, chat, place)
        return (await _rendered_tail(tokenize, chat, place)).ids

    def _trust_in(self, shape: bytes) -> _Trust:
        if shape not in self._trust and len(self._trust) >= _MAX_SHAPES:
            self._trust.clear()
        return self._trust.setdefault(shape, _Trust())


async def _probe(tokenize: Tokenize, options: dict[str, Any]) -> _Probes:
    """The closings of a template, from the shortest chats that have one."""
    user, mark = {"role": "user", "content": "0"}, new_marker([])
    closed = await _render(tokenize, options, [user], add_generation_prompt=False)
    opened = await _render(tokenize, options, [user], add_generation_prompt=True)
    # Some templates end a finished chat with EOS (Phi 3): what they have in common is the user's turn.
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
    """What comes between the marker and the generation prompt; where that does not come, up to the end of the chat."""
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


async def _check_instructions(tokenize: Tokenize, chat: Chat, place: Place) -> None:
    """Raise `NoBoundaryError` if a new system message is written anywhere but after the turn: the tail lacks it."""
    text = new_marker(chat.new_messages, unlike=new_marker(chat.new_messages))
    tail = "".join((await _rendered_tail(tokenize, chat.with_instructions(text), place)).strings)
    if tail.count(text) != chat.num_instructions:
        raise NoBoundaryError("the chat template writes a later system message in front of the turn")


async def _render(tokenize: Tokenize, options: dict[str, Any], messages: list[Any], **ending: bool) -> Rendered:
    answer = await tokenize({**options, "messages": messages, **ending, "return_token_strs": True})
    return Rendered(answer["tokens"], answer["token_strs"])
