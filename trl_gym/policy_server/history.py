"""Has the agent sent the history that it had sent before? Digests of messages, kept per answer.

Token ids say what the policy saw, the messages say what the agent means it to see. An agent that compacts or edits its
history still sends the newest answer with its ids, and putting them back would silently undo the edit. So every answer
leaves a digest of the messages in front of it, found again by the tokens that the answer made.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_gym.policy_server.middleware.turn import Turn

_MAX_ANSWERS = 65_536  # about 200 bytes each


@dataclass(frozen=True, slots=True)
class Digest:
    """What a model call was asked with.

    Attributes:
        messages: All of them.
        before_answer: Without assistant messages at the end: agents merge what they get into the last one.
        tools: Tools and template options.
    """

    messages: bytes
    before_answer: bytes
    tools: bytes


class Histories:
    """The newest answers of a server, whoever asked."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, Digest] = OrderedDict()

    @staticmethod
    def key(seen: Sequence[int]) -> bytes:
        """What an answer is known by: a hash of its prompt plus what was sampled."""
        return hashlib.blake2b(array("q", seen).tobytes(), digest_size=16).digest()

    def remember(self, seen: Sequence[int], digest: Digest) -> bytes:
        """An answer was given: `seen` is its prompt plus what was sampled. Returns its key."""
        key = self.key(seen)
        self._digests[key] = digest
        if len(self._digests) > _MAX_ANSWERS:
            self._digests.popitem(last=False)
        return key

    def difference(self, seen: Sequence[int], before: Digest) -> str | None:
        """What the agent has changed of what it had sent before the answer with these tokens.

        Args:
            seen: The newest answer's prompt plus what was sampled.
            before: Of the messages in front of that answer, as they are sent now.

        Returns:
            One sentence, or None if nothing was changed, or if the answer is not known here (another server gave it).
        """
        then = self._digests.get(self.key(seen))
        if then is None:
            return None
        if then.tools != before.tools:
            return "the agent changed the tools or the template options after this turn"
        if before.messages not in (then.messages, then.before_answer):
            return "the agent changed messages in front of this turn"
        return None


def digest(messages: Sequence[dict[str, Any]], sampled: Sequence[bytes | None], options: bytes) -> Digest:
    """Digest of messages as an agent means them.

    Args:
        messages: Without token ids.
        sampled: Per message, its sampled ids as JSON if it has any: these count then, and not the text.
        options: Hash of tools and template options.
    """
    end = len(messages)
    while end and messages[end - 1].get("role") == "assistant":
        end -= 1
    state, before = hashlib.blake2b(digest_size=16), b""
    for index, (message, ids) in enumerate(zip(messages, sampled, strict=True)):
        if index == end:
            before = state.digest()
        parts = ["ids", ids.decode()] if ids is not None else list(_meaning(message))
        state.update(json.dumps(parts).encode())
    whole = state.digest()
    return Digest(whole, before if end < len(messages) else whole, options)


def digest_of(turn: Turn, end: int) -> Digest:
    """Of a request's first `end` messages, and of all that else decides their render."""
    return digest(turn.messages[:end], turn.sampled[:end], turn.options_key)


def _meaning(message: dict[str, Any]) -> Iterable[Any]:
    """Role, text, calls: not thinking, which agents drop, nor the form in which they write it."""
    yield message.get("role")
    content = message.get("content")
    if isinstance(content, list):
        texts: list[Any] = [
            part.get("text") if isinstance(part, dict) and "text" in part else part for part in content
        ]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else texts
    yield content or ""
    yield message.get("tool_call_id")
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {} if isinstance(call, dict) else {}
        yield [function.get("name"), function.get("arguments")]
