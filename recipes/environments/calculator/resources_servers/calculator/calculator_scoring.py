# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""What the calculator's tools compute and how an episode is scored: pure functions, standard library only.

They never raise on anything a model can produce. The name carries the environment's, because a Gym host may load
several environments into one process and a module called `scoring` would belong to whichever came first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Far beyond any task, far below Python's 4,300-digit limit of int <-> str conversion, which would raise in a server.
MAX_ABS_OPERAND = 10**12


@dataclass(frozen=True)
class Score:
    """`reward` is what is trained on; the other two say where it comes from."""

    reward: float  # 1.0 solved | 0.5 right call, wrong answer | 0.0
    call_correct: float  # 1.0 when the only tool call is the expected one, else 0.0
    success: float  # 1.0 when the answer is right too, else 0.0


def is_operand(value: Any) -> bool:
    """Whether `value` is a whole number of sensible size. `True`, `"47"` and `47.0` are not."""
    return type(value) is int and abs(value) <= MAX_ABS_OPERAND


def run_tool(tool: str, arguments: Any) -> int | dict[str, str]:
    """Answer one call of `add` or `subtract`: the number, or a short error that the model reads."""
    if not isinstance(arguments, Mapping) or not all(is_operand(arguments.get(name)) for name in ("a", "b")):
        return {"error": "a and b must be integers"}
    a, b = arguments["a"], arguments["b"]
    return a + b if tool == "add" else a - b


def parse_arguments(text: Any) -> Any:
    """Decode a call's JSON arguments; None for anything that is not JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):  # ValueError: bad JSON, or an integer beyond the digit limit
        return None


def is_expected_call(call: Mapping[str, Any], tool: str, arguments: Mapping[str, int]) -> bool:
    """Whether a `function_call` item names `tool` and has exactly `arguments`, as integers."""
    given = parse_arguments(call.get("arguments"))
    return (
        call.get("name") == tool
        and isinstance(given, dict)
        and all(is_operand(value) for value in given.values())
        and given == dict(arguments)
    )


def message_text(item: Mapping[str, Any]) -> str:
    """Text of an output message, its parts joined; parts without text (a refusal, say) count as empty."""
    content = item.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def score(
    output: Sequence[Mapping[str, Any]],
    expected_tool: str,
    expected_arguments: Mapping[str, int],
    expected_answer: str,
) -> Score:
    """Score one episode.

    Args:
        output: Items of the Responses API answer as plain dicts, in order, for example
            `[{"type": "function_call", "name": "add", "arguments": '{"a": 47, "b": 36}'}, {"type":
            "function_call_output", "output": "83"}, {"type": "message", "role": "assistant", "content": [{"type":
            "output_text", "text": "83"}]}]`.
        expected_tool: `"add"` or `"subtract"`.
        expected_arguments: `{"a": 47, "b": 36}`.
        expected_answer: `"83"`; compared with the last item's text, surrounding white space ignored.
    """
    calls = [index for index, item in enumerate(output) if item.get("type") == "function_call"]
    if len(calls) != 1 or not is_expected_call(output[calls[0]], expected_tool, expected_arguments):
        return Score(reward=0.0, call_correct=0.0, success=0.0)

    # The answer must come after the tool's result: a lucky guess in front of the call earns nothing.
    results = [index for index, item in enumerate(output) if item.get("type") == "function_call_output"]
    last = output[-1]
    answered = (
        bool(results)
        and results[-1] < len(output) - 1
        and last.get("type") == "message"
        and last.get("role") == "assistant"
        and message_text(last).strip() == expected_answer
    )
    return Score(reward=1.0 if answered else 0.5, call_correct=1.0, success=float(answered))
