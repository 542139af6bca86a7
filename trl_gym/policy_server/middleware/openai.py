"""Attach the token bundle to a chat completion, and write a whole completion as the stream that a client asked for.

The bundle is put on `choices[i].message`: `prompt_token_ids`, `generation_token_ids` and `generation_log_probs` (one
finite number per sampled id). It is never a guess: a bundle that cannot be built exactly is an error. A turn of a
rollout gets a handle in its place; the ledger keeps the tokens.

A turn of a rollout is answered whole, since only then are its tokens complete. A client that streams gets the answer
as server-sent events in one piece, with the bundle on the delta.

An answer is long because of its token ids and because each token has an object with its text and bytes in `logprobs`.
Of these objects the one number that counts is read, and they are passed on as they came (`msgspec.Raw`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, NotRequired, TypedDict, cast

import msgspec

from trl_gym.policy_server.middleware.http import Reply
from trl_gym.policy_server.middleware.splice import num_common
from trl_gym.untrusted import MAX_NUMBER, check_depth, check_portable, require_shape, without_halves

CONTENT_TYPE = b"text/event-stream; charset=utf-8"
_MISSING_LOGPROB = -9999.0  # vLLM writes this if it has none, and if the probability is zero
_MAX_LOGPROB = 1e-3  # 0, and what rounding adds; a logit is larger

_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)] | None
_Milliseconds = Annotated[float, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)] | None


class _Message(TypedDict):
    tool_calls: NotRequired[list[dict[str, Any]] | None]


class _Choice(TypedDict):
    message: _Message
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


class _Span(TypedDict):
    version: str


class _Completion(TypedDict):
    """What is read of a chat completion, but for token ids and logprobs."""

    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: NotRequired[_Usage | None]
    metrics: NotRequired[_Metrics | None]
    weight_version: NotRequired[str | int | None]
    weight_versions: NotRequired[list[_Span] | None]


class _Entry(msgspec.Struct, gc=False):
    logprob: float | None = None


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Entry] | None = None


_Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(_Fields)
_choices = msgspec.json.Decoder(list[_Fields])
_ids = msgspec.json.Decoder(list[_Token] | None)
_entries = msgspec.json.Decoder(_Logprobs | None)
_any = msgspec.json.Decoder()
_LONG = ("prompt_token_ids", "token_ids", "logprobs")  # fields that no walk over an answer looks into


def read_completion(body: bytes) -> dict[str, Any]:
    """Parse a chat completion; half of a surrogate in it, which a policy can write into arguments, is plain text.
    Returns the answer; `logprobs` of its choices are JSON (`msgspec.Raw`), which `msgspec.json.encode` writes as it
    is. Raises `ValueError`: it is no JSON, or none of a chat completion."""
    try:
        return _read_completion(body)
    except ValueError:
        if (escaped := without_halves(body)) == body:
            raise
        return _read_completion(escaped)


def _read_completion(body: bytes) -> dict[str, Any]:
    try:
        fields = _fields.decode(body)
        choices = [_object(choice) for choice in _choices.decode(fields.get("choices", b"[]"))]
        answer = _object({name: value for name, value in fields.items() if name != "choices"}) | {"choices": choices}
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None
    short = {**_short(answer), "choices": [_short(choice) for choice in choices]}
    check_depth(short)
    require_shape(short, _Completion)
    return answer


def _object(fields: _Fields) -> dict[str, Any]:
    decoders = {"prompt_token_ids": _ids, "token_ids": _ids}
    return {
        name: value if name == "logprobs" else decoders.get(name, _any).decode(value) for name, value in fields.items()
    }


def _short(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _LONG}


# What servers say of an answer that they have sampled and cannot read or send.
_UNREADABLE = re.compile(r"surrogates not allowed|integer string conversion|recursion depth|\AInternal Server Error\Z")


def is_unreadable(reply: Reply) -> bool:
    """Tell whether an error is about what the policy wrote: vLLM's and SGLang's parsers of tool calls read JSON that
    they cannot write."""
    return reply.status in (400, 500) and _UNREADABLE.search(reply.error_text()) is not None


def has_odd_call(message: Mapping[str, Any]) -> bool:
    """Tell whether a message has a call whose arguments not everyone can read: no JSON, or see `check_portable`. The
    agent would fail with it, as would what it calls, and the rollout be no one's fault."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        try:
            if isinstance(arguments, str) and arguments:
                check_portable(arguments)
        except ValueError:
            return True
    return False


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


def slim(answer: dict[str, Any], handle: int, *, with_logprobs: bool) -> None:
    """Put a handle in the place of the bundle of a completion with one choice.

    It has the form of a bundle: NeMo Gym checks that these are lists of numbers of the same length, and sends them
    back with the message.

    Args:
        answer: The completion; changed in place.
        handle: A negative number, which no token id is.
        with_logprobs: Whether `logprobs`, which are most of an answer, stay where they are.
    """
    choice = answer["choices"][0]
    choice["message"] |= {
        "prompt_token_ids": [handle],
        "generation_token_ids": [handle],
        "generation_log_probs": [0.0],
    }
    answer["prompt_token_ids"] = choice["token_ids"] = None
    if not with_logprobs:
        choice["logprobs"] = None


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
    try:
        logprobs = _entries.decode(choice.get("logprobs", b"null"))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BundleError(f"the server returned other things than logprobs ({error})") from None
    content = (logprobs and logprobs.content) or []
    if len(content) != num_ids:
        raise BundleError(f"the server returned {len(content)} logprobs for {num_ids} sampled tokens")
    found = [entry.logprob for entry in content]
    for place, logprob in enumerate(found):
        if logprob is None or not _MISSING_LOGPROB < logprob <= _MAX_LOGPROB:
            raise BundleError(f"the logprob of sampled token {place} is {logprob!r}, which is none of a probability")
    return cast(list[float], found)


def events(answer: dict[str, Any], *, include_usage: bool) -> bytes:
    """Return the body of the stream.

    Args:
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
    return b"".join(b"data: " + data + b"\n\n" for data in [*map(msgspec.json.encode, chunks), b"[DONE]"])
