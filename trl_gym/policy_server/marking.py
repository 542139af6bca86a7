"""A chat with a marker in place of a sampled turn's text. Pure functions.

[system, user, assistant, tool, assistant*, tool, user]      the whole chat
[system "0", user "0",          assistant*, tool, user]      its extension: as little as possible in front
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

_INSTRUCTING = ("system", "developer")

Place = Literal["text", "calls"]
"""Where the marker goes: a turn's text, or the arguments of its tool calls, which templates write behind the text."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat whose message `newest` is the sampled turn to be continued.

    Attributes:
        messages: Without token ids.
        newest: Index of the sampled turn.
        options: What else decides the render, as `/tokenize` wants it: tools, template, its arguments, model.
        ending: `add_generation_prompt` and `continue_final_message`.
        options_key: Hash of the options; they may hold many tools, and are hashed once per turn.
    """

    messages: list[dict[str, Any]]
    newest: int
    options: dict[str, Any]
    ending: dict[str, bool]
    options_key: bytes

    @property
    def turn(self) -> dict[str, Any]:
        return self.messages[self.newest]

    @property
    def new_messages(self) -> list[dict[str, Any]]:
        return self.messages[self.newest + 1 :]

    @property
    def num_instructions(self) -> int:
        """System messages among the new ones; some templates write them at the very front."""
        return sum(message.get("role") in _INSTRUCTING for message in self.new_messages)

    def marked(self, mark: str, place: Place) -> Chat:
        """The chat with `mark` in place of what was sampled."""
        turn = marked_text(self.turn, mark) if place == "text" else marked_calls(self.turn, mark)
        return replace(self, messages=[*self.messages[: self.newest], turn, *self.new_messages])

    def with_instructions(self, text: str) -> Chat:
        """The chat with `text` as content of every new system message."""
        new = [
            {**message, "content": text} if message.get("role") in _INSTRUCTING else message
            for message in self.new_messages
        ]
        return replace(self, messages=[*self.messages[: self.newest + 1], *new])

    def extension(self) -> Chat:
        """The same chat with as little as possible in front of the newest turn."""
        roles = [message.get("role") for message in self.messages[: self.newest]]
        head = [{"role": roles[0], "content": "0"}] if roles and roles[0] in _INSTRUCTING else []
        if "user" in roles:
            head.append({"role": "user", "content": "0"})
        options = {key: value for key, value in self.options.items() if key != "tools"}
        return replace(self, messages=[*head, *self.messages[self.newest :]], newest=len(head), options=options)

    def shape_key(self, place: Place) -> bytes:
        """The options, and where the turn is, what it looks like and what follows it; not what is written in it."""
        roles = [str(message.get("role")) for message in self.messages]
        lead = [roles[0], "user" in roles[: self.newest]]
        kind = [bool(self.turn.get("content")), len(self.turn.get("tool_calls") or []), place]
        shape = [self.options_key.hex(), self.newest, lead, roles[self.newest :], kind, self.ending]
        return hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16).digest()


def marked_text(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """A turn whose text is the marker; its calls stay, for the tool messages that refer to them."""
    marked = {"role": message.get("role"), "content": mark}
    return marked | ({"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {})


def marked_calls(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """A turn without text whose calls have the marker as their only argument.

    The text goes because some templates write it behind the calls, or even behind their results.
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
    """A word that the new messages do not contain. It ends in a digit, which no tokenizer joins with punctuation."""
    text, number = json.dumps(new_messages), 0
    while (mark := f"zqx{number}") in text or mark == unlike:
        number += 1
    return mark
