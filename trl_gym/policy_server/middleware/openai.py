"""The token bundle of a chat completion: what was in front of the policy, what it sampled, and how likely that was.

On `choices[i].message`: `prompt_token_ids`, `generation_token_ids` and `generation_log_probs` (one finite number per
sampled id). Never a guess: a bundle that cannot be built exactly is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from typing import Any

_MISSING_LOGPROB = -9999.0  # vLLM writes this where it has none, and where the probability is zero


class BundleError(Exception):
    """The server's answer does not say exactly what was sampled. The text says in which way."""


def attach(answer: dict[str, Any], *, forced_prompt: list[int] | None) -> None:
    """Put the bundle on every choice of a chat completion that was asked for token ids and logprobs.

    Args:
        answer: The server's answer; changed in place.
        forced_prompt: Ids that must have been the prompt, or `None` if the server rendered it.

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
            f"{len(prompt)}, first difference at {_first_difference(prompt, forced_prompt)}): this version of vLLM "
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


def strip_unasked(answer: dict[str, Any], asked: Collection[str]) -> None:
    """Take out again what we asked for and the client did not.

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
    content = (choice.get("logprobs") or {}).get("content") or []
    if len(content) != num_ids:
        raise BundleError(f"the server returned {len(content)} logprobs for {num_ids} sampled tokens")
    logprobs = [entry.get("logprob") for entry in content]
    for place, logprob in enumerate(logprobs):
        if not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob <= _MISSING_LOGPROB:
            raise BundleError(f"the logprob of sampled token {place} is {logprob!r}, which is no finite number")
    return logprobs


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --------------------------------------------------------------------------------------------------------------------
# A whole chat completion as the stream that the client asked for.
#
# A turn of a rollout is answered whole: only then are its tokens complete. Clients that stream get it as server-sent
# events all the same, in one piece, with the token bundle on the delta.

CONTENT_TYPE = b"text/event-stream; charset=utf-8"


def events(answer: dict[str, Any], *, include_usage: bool) -> bytes:
    """The body of the stream.

    Args:
        answer: A chat completion with one choice.
        include_usage: What the request's `stream_options.include_usage` says.
    """
    return b"".join(b"data: " + data + b"\n\n" for data in _events(answer, include_usage))


def _events(answer: dict[str, Any], include_usage: bool) -> Iterator[bytes]:
    head = {key: answer.get(key) for key in ("id", "created", "model", "system_fingerprint")}
    head["object"] = "chat.completion.chunk"
    own: dict[str, Any] = {key: answer[key] for key in ("weight_version", "trl_gym") if key in answer}
    choice = answer["choices"][0]
    delta = {key: value for key, value in choice["message"].items() if value is not None}
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(delta["tool_calls"])]
    elif "tool_calls" in delta:
        del delta["tool_calls"]  # an empty list is no delta
    piece = {"index": 0, "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": None}
    last = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason")}
    if choice.get("stop_reason") is not None:
        last["stop_reason"] = choice["stop_reason"]
    yield _json({**head, **own, "choices": [piece]})
    yield _json({**head, "choices": [last]})
    if include_usage:
        yield _json({**head, "choices": [], "usage": answer.get("usage")})
    yield b"[DONE]"


def _json(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()
