"""Attach the token bundle to a chat completion, and write a whole completion as the stream that a client asked for.

The bundle is put on `choices[i].message`: `prompt_token_ids`, `generation_token_ids` and `generation_log_probs` (one
finite number per sampled id). It is never a guess: a bundle that cannot be built exactly is an error. A turn of a
rollout gets a handle in its place; the ledger keeps the tokens.

A turn of a rollout is answered whole, since only then are its tokens complete. A client that streams gets the answer
as server-sent events in one piece, with the bundle on the delta.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from trl_gym.policy_server.middleware.http import compact_json
from trl_gym.policy_server.middleware.splice import num_common
from trl_gym.untrusted import MAX_NUMBER

CONTENT_TYPE = b"text/event-stream; charset=utf-8"
_MISSING_LOGPROB = -9999.0  # vLLM writes this if it has none, and if the probability is zero

_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)] | None
_Milliseconds = Annotated[float, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)] | None


class _Message(TypedDict):
    tool_calls: NotRequired[list[dict[str, Any]] | None]


class _Choice(TypedDict):  # `_logprobs` checks the log-probabilities
    message: _Message
    token_ids: NotRequired[list[_Token] | None]
    finish_reason: NotRequired[str | None]
    stop_reason: NotRequired[str | int | None]


class _CachedTokens(TypedDict):
    cached_tokens: NotRequired[_Count]


class _Usage(TypedDict):
    prompt_tokens: NotRequired[_Count]
    completion_tokens: NotRequired[_Count]
    prompt_tokens_details: NotRequired[_CachedTokens | None]


class _Metrics(TypedDict):
    queue_time_ms: NotRequired[_Milliseconds]
    time_to_first_token_ms: NotRequired[_Milliseconds]
    generation_time_ms: NotRequired[_Milliseconds]


class Completion(TypedDict):
    """What is read of a chat completion."""

    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    prompt_token_ids: NotRequired[list[_Token] | None]
    usage: NotRequired[_Usage | None]
    metrics: NotRequired[_Metrics | None]
    weight_version: NotRequired[str | int | None]


class BundleError(Exception):
    """The server's answer does not say exactly what was sampled; the text says why."""


def attach(answer: dict[str, Any], *, forced_prompt: list[int] | None) -> None:
    """Put the bundle on every choice of a chat completion that was requested with token ids and logprobs.

    Args:
        answer: The server's answer; changed in place.
        forced_prompt: Ids that the prompt must have had; None if the server rendered it.

    Raises:
        BundleError: If the server used another prompt, if ids or logprobs are missing or disagree in number, or if a
            logprob is not a finite number.
    """
    prompt = answer.get("prompt_token_ids")
    if not prompt:
        raise BundleError("the server did not return the prompt's token ids")
    if forced_prompt is not None and prompt != forced_prompt:
        raise BundleError(
            f"the server did not use the exact prompt that it was given ({len(forced_prompt)} tokens, used "
            f"{len(prompt)}, first difference at {num_common(prompt, forced_prompt)}): this version of vLLM "
            "does not accept prompts of token ids in chat completions"
        )
    for choice in answer["choices"]:
        ids = choice.get("token_ids")
        if ids is None:
            raise BundleError("the server did not return the sampled token ids")
        choice["message"] |= {
            "prompt_token_ids": prompt,
            "generation_token_ids": ids,
            "generation_log_probs": _logprobs(choice, len(ids)),
        }


def slim(answer: dict[str, Any], handle: int) -> None:
    """Put a handle in the place of the bundle of a completion with one choice.

    It has the form of a bundle: NeMo Gym checks that these are lists of numbers of the same length, and sends them
    back with the message.

    Args:
        answer: The completion; changed in place.
        handle: A negative number, which no token id is.
    """
    answer["choices"][0]["message"] |= {
        "prompt_token_ids": [handle],
        "generation_token_ids": [handle],
        "generation_log_probs": [0.0],
    }
    answer["prompt_token_ids"] = None
    answer["choices"][0]["token_ids"] = None


def strip_unasked(answer: dict[str, Any], asked: Collection[str]) -> None:
    """Remove what the middleware asked for and the client did not.

    Args:
        answer: The server's answer; changed in place.
        asked: Which of `"logprobs"` and `"return_token_ids"` the client asked for.
    """
    if "return_token_ids" not in asked and "prompt_token_ids" in answer:
        answer["prompt_token_ids"] = None
    for choice in answer["choices"]:
        if "logprobs" not in asked and "logprobs" in choice:
            choice["logprobs"] = None
        if "return_token_ids" not in asked and "token_ids" in choice:
            choice["token_ids"] = None


def _logprobs(choice: dict[str, Any], num_ids: int) -> list[float]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") or [] if isinstance(logprobs, dict) else []
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise BundleError("the server returned other things than logprobs")
    if len(content) != num_ids:
        raise BundleError(f"the server returned {len(content)} logprobs for {num_ids} sampled tokens")
    found = [entry.get("logprob") for entry in content]
    for place, logprob in enumerate(found):
        if not isinstance(logprob, int | float) or not _MISSING_LOGPROB < logprob <= MAX_NUMBER:
            raise BundleError(f"the logprob of sampled token {place} is {logprob!r}, which is not a finite number")
    return found


def events(answer: dict[str, Any], *, include_usage: bool) -> bytes:
    """Return the body of the stream.

    Args:
        answer: A chat completion with one choice.
        include_usage: The request's `stream_options.include_usage`.
    """
    head = {key: answer.get(key) for key in ("id", "created", "model", "system_fingerprint")}
    head["object"] = "chat.completion.chunk"
    own: dict[str, Any] = {key: answer[key] for key in ("weight_version", "trl_gym") if key in answer}
    choice = answer["choices"][0]
    delta = {key: value for key, value in choice["message"].items() if value is not None}
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(delta["tool_calls"])]
    elif "tool_calls" in delta:
        del delta["tool_calls"]  # a delta has no empty list
    piece = {"index": 0, "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": None}
    last = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason")}
    if choice.get("stop_reason") is not None:
        last["stop_reason"] = choice["stop_reason"]
    chunks = [{**head, **own, "choices": [piece]}, {**head, "choices": [last]}]
    if include_usage:
        chunks.append({**head, "choices": [], "usage": answer.get("usage")})
    return b"".join(b"data: " + data + b"\n\n" for data in [*map(compact_json, chunks), b"[DONE]"])
