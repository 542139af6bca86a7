"""Turns of rollouts at `POST /v1/completions`, where NeMo Gym's model server sends texts (`use_completions_api`).

A turn is served as one of a chat: its sampling is pinned, its tokens are limited, recorded and given back by a handle.
What differs is here: the answer has another form, and the prompt is a text, which nobody but its sender has rendered.
A prompt goes on from a call of its rollout if it begins with the prompt of that call and its text. What follows is
tokenized and put behind the tokens of the call: its prompt and what it sampled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import msgspec

from trl_gym.policy_server.middleware import openai
from trl_gym.untrusted import parse_json, require_shape

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_MAX_STOP_TOKENS = 16  # of a stop string, which is sampled and not in the text


# -- which call a prompt goes on from ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Continued:
    """A prompt that begins with that of an earlier call, and is longer."""

    call: int | None = None  # index of the call whose text it goes on with; None if it goes on otherwise
    rest: str = ""  # what follows that text


@dataclass(frozen=True, slots=True)
class _Text:
    call: int
    num_chars: int  # of its prompt
    digest: bytes  # of its prompt
    said: str


@dataclass(slots=True)
class Texts:
    """The texts of a rollout's completions."""

    _known: list[_Text] = field(default_factory=list)

    def add(self, call: int, prompt: str, said: str) -> None:
        """Add a call: its index, its prompt and the text of its answer."""
        self._known.append(_Text(call, len(prompt), _digest(prompt), said))

    def clear(self) -> None:
        self._known.clear()

    def continued(self, prompt: str) -> Continued | None:
        """Return what a prompt goes on from: of several calls the longest, of these the newest. None if it begins with
        the prompt of no call: then it begins a conversation."""
        lengths = {text.num_chars for text in self._known if text.num_chars < len(prompt)}
        digests = {length: _digest(prompt[:length]) for length in lengths}
        behind = [text for text in self._known if digests.get(text.num_chars) == text.digest]
        if not behind:
            return None
        found = [(text, rest) for text in behind if (rest := _rest(prompt[text.num_chars :], text.said)) is not None]
        if not found:
            return Continued()
        text, rest = max(found, key=lambda one: (-len(one[1]), one[0].call))
        return Continued(text.call, rest)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _rest(text: str, said: str) -> str | None:
    """Return what follows in `text` behind what was said; None if it does not begin with that. Templates trim answers
    and leave thinking out."""
    if text.startswith(said):
        return text[len(said) :]
    text = text.lstrip()
    for trimmed in (said.strip(), _THINKING.sub("", said).strip()):
        if trimmed and text.startswith(trimmed):
            return text[len(trimmed) :]
    return None


def joined(seen: Sequence[int], tail: Sequence[int], *, stopped: bool) -> list[int]:
    """Return the tokens seen and those that follow, what was sampled and is not in the text (a turn end, a stop
    string) not twice.

    Args:
        seen: The prompt and the sampled ids of a call.
        tail: Tokens of what follows its text.
        stopped: Whether its answer ended with such a token.

    Example:
        >>> joined([11, 99, 2], [2, 9, 70], stopped=True)
        [11, 99, 2, 9, 70]
        >>> joined([11, 99], [2, 9, 70], stopped=False)
        [11, 99, 2, 9, 70]
    """
    most = min(len(seen), len(tail), _MAX_STOP_TOKENS) if stopped else 0
    twice = next((n for n in range(most, 0, -1) if list(seen[-n:]) == list(tail[:n])), 0)
    return [*seen, *tail[twice:]]


# -- the form of an answer --------------------------------------------------------------------------------------------


class _Logprobs(TypedDict):
    token_logprobs: list[float | None]


class _Choice(TypedDict):
    text: str
    token_ids: NotRequired[list[int] | None]
    prompt_token_ids: NotRequired[list[int] | None]
    logprobs: NotRequired[_Logprobs | None]


class _Completion(TypedDict):
    choices: list[_Choice]


def as_chat(body: bytes) -> dict[str, Any]:
    """Parse a completion; return it as a chat completion that says the same, see `openai.read_completion`. Raises
    `ValueError`: it is no JSON, or none of a completion."""
    answer = require_shape(parse_json(body), _Completion)
    choices = [_chat_choice(choice) for choice in answer["choices"]]
    prompt = answer["choices"][0].get("prompt_token_ids") if choices else None
    return openai.read_completion(msgspec.json.encode({**answer, "choices": choices, "prompt_token_ids": prompt}))


def _chat_choice(choice: dict[str, Any]) -> dict[str, Any]:
    logprobs = choice.get("logprobs")
    content = [{"logprob": one} for one in logprobs["token_logprobs"]] if logprobs else None
    return {
        **{key: value for key, value in choice.items() if key not in ("text", "prompt_token_ids")},
        "message": {"role": "assistant", "content": choice["text"]},
        "logprobs": {"content": content},
        "text_logprobs": logprobs,
    }


def as_text(answer: dict[str, Any], *, with_logprobs: bool) -> dict[str, Any]:
    """Return a turn's answer, with its handle on the message, as a completion.

    The handle stands where NeMo Gym's model server looks for tokens: `prompt_token_ids`, `token_ids` and `logprobs` of
    the choice.

    Args:
        with_logprobs: Whether the client wants the `logprobs` themselves.
    """
    [choice] = answer["choices"]
    message, logprobs = choice["message"], choice["text_logprobs"]
    if not with_logprobs:
        names = [f"token_id:{handle}" for handle in message["generation_token_ids"]]
        logprobs = {"tokens": names, "token_logprobs": message["generation_log_probs"]}
        logprobs |= {"top_logprobs": None, "text_offset": [0] * len(names)}
    text = {
        **{key: value for key, value in choice.items() if key not in ("message", "text_logprobs")},
        "text": message["content"],
        "logprobs": logprobs,
        "prompt_token_ids": message["prompt_token_ids"],
        "token_ids": message["generation_token_ids"],
    }
    return {**{key: value for key, value in answer.items() if key != "prompt_token_ids"}, "choices": [text]}


def events(answer: dict[str, Any], *, include_usage: bool) -> bytes:
    """Return the body of the stream of a completion, in one piece."""
    return b"".join(b"data: " + data + b"\n\n" for data in (*_chunks(answer, include_usage=include_usage), b"[DONE]"))


def _chunks(answer: dict[str, Any], *, include_usage: bool) -> Iterator[bytes]:
    usage = answer.get("usage")
    yield msgspec.json.encode({key: value for key, value in answer.items() if key not in ("usage", "metrics")})
    if include_usage:
        yield msgspec.json.encode({**answer, "choices": [], "usage": usage})
