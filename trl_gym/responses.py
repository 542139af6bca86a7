"""Items of OpenAI's Responses API → text and chat messages. Pure functions on JSON.

A dataset row has items in `responses_create_params`, NeMo Gym's answer has them in `response.output`. Everyone who
shows, counts or scores what was said reads them here: the same item has the same text for a reward function, in a
table, in a notebook and in the viewer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from trl_gym.untrusted import parse_json, shape_problem

Item = Mapping[str, Any]

_SERVER_ERROR_TEXT = "Internal Server Error"
# Long lists of numbers in an item of the answer; nothing to read.
_TOKENS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs", "routed_experts")
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Said:
    """One item in the words of its author."""

    role: str  # `"system"`, `"user"`, `"assistant"`, `"tool"`, or what the item says
    kind: str  # `"message"`, `"reasoning"`, `"call"` of a tool, its `"result"`, or `"other"`
    text: str  # its text; the arguments of a call as the policy wrote them; JSON for another kind of item
    name: str = ""  # name of the called tool; the item's type for another kind of item
    id: str = ""  # tells which result is of which call


# -- the parts of an answer whose types the rest of the package relies on ---------------------------------------------

TokenId = Annotated[int, msgspec.Meta(ge=-(2**53), lt=2**31)]
"""A token id below 2³¹, or, negative and alone in its list, the handle that stands for the ids of a model call."""
LogProb = Annotated[float, msgspec.Meta(ge=-10_000.0, le=0.001)]
"""A log-probability in nats; vLLM writes -9999 for minus infinity."""


class _ItemShape(msgspec.Struct):
    type: str | None = None
    role: str | None = None
    name: str | None = None
    call_id: str | None = None
    prompt_token_ids: list[TokenId] | None = None
    generation_token_ids: list[TokenId] | None = None
    generation_log_probs: list[LogProb] | None = None


class _IncompleteShape(msgspec.Struct):
    reason: str | None = None


class _ResponseShape(msgspec.Struct):
    output: list[_ItemShape]
    incomplete_details: _IncompleteShape | None = None


class _AnswerShape(msgspec.Struct):
    response: _ResponseShape


def answer_problem(answer: Mapping[str, Any]) -> str | None:
    """Say why `response` of a parsed answer cannot be read, or not be trained on; None where it can.

    What this accepts, the functions below read without an exception: `output` is a list of objects whose token ids,
    log-probabilities and names have their types. It checks neither that ids are in the vocabulary nor that they were
    sampled.
    """
    if (problem := shape_problem({"response": answer.get("response")}, _AnswerShape)) is not None:
        return problem
    items = answer["response"]["output"]
    for index, item in enumerate(items):
        for name in _TOKENS[:2]:
            ids = item.get(name) or [0]
            if len(ids) > 1 and min(ids) < 0:
                return f"`{name}` of output item {index} has the negative token id {min(ids)}"
    if (media := media_in(items)) is not None:
        return f"the output has `{media}`, and images, audio, video and files cannot be trained on"
    return None


# Of parts, and of items. A `file_search_call` has text.
_MEDIA = re.compile(r"(?:(?:in|out)put_)?(?:image|audio|video|file(?!_search))\w*|computer_screenshot")


def media_in(items: Iterable[Any]) -> str | None:
    """Return the kind of the first image, audio, video or file in items, e.g. `"input_image"`; None without any."""
    for item in items:
        for part in _parts(item) if isinstance(item, Mapping) else ():
            kinds = [part["type"]] if part.get("type") else list(part)  # vLLM also reads parts without a type
            for kind in kinds:
                if isinstance(kind, str) and _MEDIA.fullmatch(kind):
                    return kind
    return None


def _parts(item: Item) -> Iterator[Mapping[str, Any]]:
    if item.get("type"):
        yield item
    for name in ("content", "output", "summary"):
        value = item.get(name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping):
                yield part


# -- what was said ----------------------------------------------------------------------------------------------------


def read_item(item: Item) -> Said:
    """Read one item; an item without a type is a message."""
    kind = item.get("type") or "message"
    if kind == "message":
        return Said(str(item.get("role") or "assistant"), "message", text_of(item.get("content")))
    if kind == "reasoning":
        return Said("assistant", "reasoning", text_of(item.get("summary") or item.get("content")))
    call_id = str(item.get("call_id") or "")
    if kind == "function_call":
        return Said("assistant", "call", text_of(item.get("arguments")), str(item.get("name")), call_id)
    if kind == "function_call_output":
        return Said("tool", "result", text_of(item.get("output")), id=call_id)
    rest = {key: value for key, value in item.items() if key not in _TOKENS}
    role = "assistant" if item.get("generation_token_ids") else str(item.get("role") or "tool")
    return Said(role, "other", json.dumps(rest, ensure_ascii=False, indent=1), str(kind))


def text_of(content: Any) -> str:
    """Return the text of a message's content; a part that is no text is named in brackets, `[input_image]`."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(_text_of_part, content))
    return json.dumps(content, ensure_ascii=False)


def input_items(row: Mapping[str, Any]) -> list[Item]:
    """Return the items that a dataset row sends: its instructions as a system message, then its input."""
    parameters = row.get("responses_create_params") or {}
    given, instructions = parameters.get("input") or [], parameters.get("instructions")
    items: list[Item] = [_message("system", instructions)] if instructions else []
    given = [_message("user", given)] if isinstance(given, str) else given
    return [*items, *(item if isinstance(item, Mapping) else _message("user", str(item)) for item in given)]


def output_items(answer: Mapping[str, Any] | None) -> Sequence[Item]:
    """Return the items of Gym's answer, or of a journal's line; none where there is no answer."""
    return ((answer or {}).get("response") or {}).get("output") or []


def prompt_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row's input as plain messages, for TRL's logs; what is sent to Gym is the row itself."""
    messages = []
    for item in input_items(row):
        said = read_item(item)
        role = str(item.get("role") or item.get("type") or "user")
        messages.append({"role": role, "content": f"{said.name}({said.text})" if said.kind == "call" else said.text})
    # Environments that make their own first observation ship rows without input; TRL needs one message to show.
    return messages or [{"role": "user", "content": ""}]


def completion_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return the output as chat messages, for reward functions and TRL's completions table.

    The table reads the arguments of every tool call as a JSON object and ends training where a policy wrote something
    else; that is put into one, as `{"unparsed": …}`.

    Returns:
        At least one message.
    """
    messages: list[dict[str, Any]] = []
    for said in map(read_item, items):
        if said.kind == "message":
            messages.append({"role": said.role, "content": said.text})
        elif said.kind == "reasoning":
            messages.append({"role": "assistant", "content": f"<think>{said.text}</think>"})
        elif said.kind == "call":
            function = {"name": said.name, "arguments": _object_text(said.text)}
            call = {"type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif said.kind == "result":
            messages.append({"role": "tool", "content": said.text})
    return messages or [{"role": "assistant", "content": ""}]


def model_call_indices(items: Sequence[Item]) -> list[int | None]:
    """Return for each item of an output the index of the model call that it came from; None for the environment's.

    Token ids are on the last item of each call. In an output without any, a call is what stands between two items of
    the environment.
    """
    has_ids = any(item.get("generation_token_ids") for item in items)
    indices: list[int | None] = []
    index, after_environment = 0, False
    for item in items:
        is_sampled = read_item(item).role == "assistant"
        if is_sampled and after_environment and not has_ids:
            index += 1
        indices.append(index if is_sampled else None)
        index += bool(item.get("generation_token_ids"))
        after_environment = not is_sampled
    return indices


def count_tool_calls(items: Sequence[Item]) -> tuple[int, int]:
    """Return the number of tool calls in an output, and how many of their results say that the call failed."""
    num_calls = sum(item.get("type") == "function_call" for item in items)
    results = (item.get("output") for item in items if item.get("type") == "function_call_output")
    return num_calls, sum(isinstance(result, str) and is_tool_error(result) for result in results)


def is_tool_error(text: str) -> bool:
    """Tell whether a tool result says that the call failed.

    NeMo Gym hands the body of any HTTP answer on as the result, so this reads the bodies: a JSON object with `error`
    or FastAPI's `detail`, or the text of an unhandled exception.
    """
    if text == _SERVER_ERROR_TEXT:
        return True
    if '"error"' not in text and '"detail"' not in text:
        return False  # the common case; a result may be large
    try:
        body = parse_json(text)
    except ValueError:
        return False
    return isinstance(body, dict) and (bool(body.get("error")) or set(body) == {"detail"})


def _message(role: str, content: Any) -> Item:
    return {"type": "message", "role": role, "content": content}


def _text_of_part(part: Any) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    text = part.get("text", part.get("refusal"))
    return text if isinstance(text, str) else f"[{part.get('type', 'part')}]"


def _object_text(arguments: str) -> str:
    """Return the arguments of a call as the text of a JSON object, whatever the policy wrote."""
    try:
        is_object = isinstance(parse_json(arguments), dict)
    except ValueError:
        is_object = False
    return arguments if is_object else json.dumps({"unparsed": arguments})


# -- what was said, compared ------------------------------------------------------------------------------------------


def said_in_message(message: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return a digest of the text of an assistant's chat message, if it has any, and one of each of its tool calls.

    Thinking, blanks around the text, the ids of calls and the spelling of their arguments do not count: agents and
    NeMo Gym's converters change them. The digests are equal to those of the same answer in `said_in_item`.
    """
    text = _text_said(text_of(message.get("content")))
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list | tuple) else []
    said = [_call_said(call.get("function")) for call in calls]
    return (*said,) if text is None else (text, *said)


def said_in_item(item: Item) -> bytes | None:
    """Return the digest of an item of Gym's answer that the assistant said; None for any other item, and for thinking
    and empty messages, which say nothing."""
    said = read_item(item)
    if said.role != "assistant" or said.kind not in ("message", "call"):
        return None
    return _text_said(said.text) if said.kind == "message" else _call_said(item)


def _text_said(text: str) -> bytes | None:
    text = _THINKING.sub("", text).strip()
    return _digest("text", text) if text else None


def _call_said(function: Any) -> bytes:
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments")
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        spelled = json.dumps(value, sort_keys=True)
    except (ValueError, TypeError, RecursionError):  # what a policy writes need not be JSON
        spelled = text_of(arguments)
    return _digest("call", str(function.get("name")), spelled)


def _digest(*parts: str) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    state.update(json.dumps(parts).encode())  # escapes lone surrogates
    return state.digest()
