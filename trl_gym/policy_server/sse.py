"""A whole chat completion as the stream that the client asked for.

A turn of a rollout is answered whole: only then are its tokens complete. Clients that stream get it as server-sent
events all the same, in one piece, with the token bundle on the delta.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

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
