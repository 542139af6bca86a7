"""Chats for `templates.py`, and what a policy samples in them: in its template's words, in tokens of any kind."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tests.policy_server.middleware.templates import Answer, Json, Template


def _tool(name: str, description: str, key: str, kind: str) -> Json:
    parameters = {"type": "object", "properties": {key: {"type": kind, "description": key}}, "required": [key]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [_tool("echo", "Says it again.", "text", "string"), _tool("count", "Counts.", "number", "integer")]


@dataclass(frozen=True)
class Sampled:
    """One turn of the policy, and the messages that come after it.

    Attributes:
        text: Its content; empty for none.
        thought: Its thinking; empty for none.
        calls: Number of parallel tool calls.
        cut: Where the token limit ended it: a share of its tokens, 1.0 for just before the turn end, None for nowhere.
        other_end: Whether it was ended by the tokenizer's `eos_token` where the template writes another token.
        resent: How the agent sends the thinking back: as a field, inside of the content, or not at all.
        then: Role and text of each following message; a tool message answers the next unanswered call.
        seed: Of the way in which the text is tokenized; None for one token per byte.
    """

    text: str = "fine"
    thought: str = ""
    calls: int = 0
    cut: float | None = None
    other_end: bool = False
    resent: Literal["field", "inline", "dropped"] = "field"
    then: tuple[tuple[str, str], ...] = (("user", "go on"),)
    seed: int | None = None


@dataclass(frozen=True)
class Chat:
    system: str | None = None
    user: str = "hello"
    tools: bool = False
    turns: tuple[Sampled, ...] = (Sampled(),)


def with_other_history(chat: Chat) -> Chat:
    """A chat with as many messages and the same last turn, but tool calls where there were none, and no others."""
    *earlier, last = chat.turns
    return replace(chat, turns=(*map(_turned, earlier), last))


def _turned(turn: Sampled) -> Sampled:
    if turn.calls:
        return replace(turn, calls=0, text="as it was", then=tuple(("user", text) for _, text in turn.then))
    return replace(turn, calls=len(turn.then), cut=None, then=tuple(("tool", text) for _, text in turn.then))


def sample(template: Template, messages: list[Json], tools: list[Json] | None, turn: Sampled) -> Answer:
    """The turn as this template's policy would write it, in tokens of no particular tokenization."""
    said = _said(turn, len(messages))
    body, end = _written(template, messages, tools, turn, said)
    ids = _fragments(template, body, turn.seed)
    if turn.cut is None:
        end = template.family.eos if turn.other_end else end
        end_id = template.special_ids[end]
        # vLLM names the stop token unless it is the tokenizer's `eos_token`.
        return Answer([*ids, end_id], said, stop_reason=None if end == template.family.eos else end_id)
    kept = ids[: max(1, int(len(ids) * turn.cut))] or [template.byte_ids[ord("x")]]
    if len(kept) < len(ids):
        said = _parsed(template, messages, tools, template.decode(kept))
    return Answer(kept, said, is_cut=True, is_whole=len(kept) == len(ids))


def _said(turn: Sampled, number: int) -> Json:
    said: Json = {"content": turn.text or (None if turn.calls else "")}
    if turn.thought:
        said["reasoning"] = turn.thought
    if turn.calls:
        # The first ones count, the last one echoes: its text is the last thing that the policy writes.
        functions = [("count", {"number": index}) for index in range(turn.calls - 1)] + [("echo", {"text": turn.text})]
        said["tool_calls"] = [
            {
                "id": f"call{number:03}{index:02}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for index, (name, arguments) in enumerate(functions)
        ]
    return said


def _written(
    template: Template, messages: list[Json], tools: list[Json] | None, turn: Sampled, said: Json
) -> tuple[str, str]:
    """The turn's text, and what ends it."""
    if turn.calls and turn.text and _writes_text_last(template, messages, tools, said):
        written, end = _written(template, messages, tools, replace(turn, text=""), {**said, "content": None})
        return turn.text + written, end
    prompt = template.text(messages, tools)
    whole = template.text([*messages, {"role": "assistant", **said}], tools, add_generation_prompt=False)
    written = whole[len(common_start([prompt, whole])) :]
    if turn.calls and "echo" not in written and "count" not in written:
        # The template leaves calls out: the policy writes them into its text, where some parser finds them.
        text = f"{turn.text}<tool_call>{json.dumps(said['tool_calls'][-1]['function'])}</tool_call>"
        return _written(template, messages, tools, replace(turn, calls=0), {**said, "content": text, "tool_calls": []})
    family = template.family
    place, end = max((written.rfind(end), end) for end in family.ends)
    if place >= 0:
        written = written[:place]
    else:
        end = family.tool_end if turn.calls and family.tool_end else family.ends[0]
    if turn.thought and turn.thought not in written:
        written = _thought(template, prompt, turn.thought) + written
    return written, end


def _writes_text_last(template: Template, messages: list[Json], tools: list[Json] | None, said: Json) -> bool:
    """Whether this template writes the text of a turn behind its calls (Gemma 4); policies write it in front."""
    whole = template.text([*messages, {"role": "assistant", **said, "content": "Usaid"}], tools)
    return whole.rfind("Usaid") > whole.rfind("echo")


def _thought(template: Template, prompt: str, thought: str) -> str:
    if template.name.startswith("gptoss"):
        return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
    if "<|channel>" in template.source:
        return f"<|channel>thought\n{thought}\n<channel|>"
    if "<think>" in template.source:
        opening = "" if prompt.endswith("<think>\n") else "<think>\n"
        return f"{opening}{thought}\n</think>\n\n"
    return ""


def _parsed(template: Template, messages: list[Json], tools: list[Json] | None, text: str) -> Json:
    """What a reasoning parser makes of a turn that was cut off; no tool parser takes an open call."""
    thinks = text.startswith("<think>") or template.text(messages, tools).endswith("<think>\n")
    thought, closed, content = text.removeprefix("<think>").rpartition("</think>") if thinks else ("", "", text)
    if thinks and not closed:
        return {"content": None, "reasoning": content.strip()}
    for special in template.specials:
        content = content.replace(special, "")
    return {"content": content.strip("\n"), **({"reasoning": thought.strip()} if thought.strip() else {})}


def _fragments(template: Template, text: str, seed: int | None) -> list[int]:
    """Tokens that decode to `text`: its special tokens as they are, all else in bytes or in pieces of any length."""
    rng = random.Random(seed)
    pattern = "|".join(re.escape(special) for special in sorted(template.specials, key=len, reverse=True))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        if piece in template.special_ids:
            ids.append(template.special_ids[piece])
            continue
        style = "bytes" if seed is None else rng.choice(("bytes", "pieces", "pieces", "canonical"))
        if style == "bytes":
            ids += [template.byte_ids[byte] for byte in piece.encode()]
        else:
            length = len(piece) or 1
            for chunk in _chunks(piece, rng, 5 if style == "pieces" else length):
                ids += template.ids(chunk)
    return ids


def _chunks(text: str, rng: random.Random, longest: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = start + rng.randint(1, longest) if longest < len(text) else len(text)
        yield text[start:stop]
        start = stop


def common_start(texts: list[str]) -> str:
    shortest = min(texts, key=len)
    differ = (i for i, char in enumerate(shortest) if any(text[i] != char for text in texts))
    return shortest[: next(differ, len(shortest))]
