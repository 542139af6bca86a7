"""Turn sampled tokens into the message of an answer (text, thinking, tool calls) by a response template.

A response template says where a model writes what
(https://huggingface.co/docs/transformers/main/en/chat_response_parsing); transformers reads with it. The one that is
used is

    1. that of `gym_response_template`: a name of TRL's (`trl.chat_template_utils`), or a JSON file
    2. the tokenizer's own
    3. TRL's for what the policy's chat template shows of tool calls, or else of thinking (`parsers.py` has the rules)

Otherwise answers are text. So is an answer whose calls cannot be read: broken JSON, an integer of thousands of digits,
half a surrogate. A reader never fails, and never repairs: the arguments of a call are the text that was sampled where
it is JSON. A tool that the request does not have is called all the same, as with vLLM; the environment answers it.

What transformers does and vLLM does not is switched off: arguments in JSON are not cast to the types of the tool's
schema, text is not stripped, a later text does not replace an earlier one, and a text that the prompt has begun
(`continue_final_message`) is not said again. As in vLLM, text behind a call is left out.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trl_gym.errors import ConfigError
from trl_gym.policy_server.parsers import (
    NAMED,
    NONE,
    Evidence,
    Kind,
    Parser,
    Parsers,
    guess_reasoning_parser,
    guess_tool_parser,
    read_evidence,
    read_own_response_template,
)
from trl_gym.untrusted import check_portable, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Json = dict[str, Any]

# What a parser of vLLM reads → TRL's response template for it.
_BY_TOOL_PARSER = {
    "hermes": "qwen3",
    "qwen3_coder": "qwen3_5",
    "glm45": "glm4moe",
    "llama3_json": "llama3",
    "openai": "gptoss",
    "lfm2": "lfm2_2_5",
    "gemma4": "gemma4",
}
_BY_REASONING_PARSER = {"qwen3": "qwen3", "deepseek_r1": "deepseek_r1_distill"}
NAMES = (*_BY_TOOL_PARSER.values(), "nemotron_3", "deepseek_r1_distill")
_SET = "`gym_response_template` (`trl-gym serve --engine transformers … --response-template`)"
KIND = Kind(
    "the response template",
    _SET,
    _SET,
    f"Set `gym_response_template` (`trl-gym serve --engine transformers MODEL --response-template NAME`) to one of "
    f"TRL's ({', '.join(NAMES)}) that fits the model, or to a JSON file with a response template of transformers.",
)
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Choice:
    """What reads the answers of a policy."""

    parsers: Parsers  # its name for tool calls and thinking, and why it was chosen
    template: Json | None  # the response template; None if answers are text


def choose(model: str | Path, told: str | None = None) -> Choice:
    """Choose what reads a model's answers from its files. Raises `ConfigError`: see `chosen`, `read_evidence`."""
    return chosen(read_evidence(model), told, read_own_response_template(model))


def chosen(evidence: Evidence, told: str | None = None, own: Json | None = None) -> Choice:
    """Choose what reads a policy's answers.

    Args:
        told: Value of `gym_response_template`; `none` means that answers are text.
        own: The tokenizer's `response_template`.

    Raises:
        ConfigError: `told` is no name and no file, or the file has no JSON object.
    """
    if told in (NONE, ""):
        nothing = Parser(None, "as the options say")
        return Choice(Parsers(nothing, nothing, KIND), None)
    if told is not None:
        return _whole(told, NAMED, _named(told))
    if own:
        return _whole("response_template", "the tokenizer's own", own)
    return _guessed(guess_tool_parser(evidence), guess_reasoning_parser(evidence))


def reader_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, told: str | None = None) -> Choice:
    """Choose what reads the answers of a model that is loaded.

    Args:
        tokenizer: Of the policy, with its chat template.
        told: Value of `gym_response_template`.

    Raises:
        ConfigError: See `chosen`.
    """
    templates = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else "\n".join(templates.values())
    return chosen(Evidence(config.model_type, text), told, getattr(tokenizer, "response_template", None))


def _whole(name: str, why: str, template: Json) -> Choice:
    fields = template["fields"] if isinstance(template.get("fields"), dict) else {}
    lacks = f"the response template {name!r} has no field for that"
    tool = Parser(name, why) if _CALLS in fields else Parser(None, lacks)
    reasoning = Parser(name, why) if any(one in fields for one in _THOUGHTS) else Parser(None, lacks)
    return Choice(Parsers(tool, reasoning, KIND), template)


def _guessed(tool: Parser, reasoning: Parser) -> Choice:
    name = _BY_TOOL_PARSER.get(tool.name or "") or _BY_REASONING_PARSER.get(reasoning.name or "")
    if name == "qwen3_5" and reasoning.name == "nemotron_v3":
        name = "nemotron_3"
    if name is None:
        return Choice(Parsers(_without(tool), _without(reasoning), KIND), None)
    template = _of_trl(name)
    has_calls = tool.name in _BY_TOOL_PARSER
    if reasoning.name is None:  # as for vLLM: such a model's `<think>` is text
        template = _lacking(template, _THOUGHTS)
    parsers = Parsers(
        Parser(name, tool.why) if has_calls else _without(tool),
        reasoning if reasoning.name is None else Parser(name, reasoning.why),
        KIND,
    )
    return Choice(parsers, template if has_calls else _lacking(template, (_CALLS,)))


def _without(parser: Parser) -> Parser:
    why = f"TRL has no response template for what vLLM's parser `{parser.name}` reads"
    return parser if parser.name is None else Parser(None, why)


def _named(told: str) -> Json:
    if told in NAMES:
        return _of_trl(told)
    path = Path(told).expanduser()
    remedy = f"Set it to one of {', '.join(NAMES)}, or to a JSON file with a response template of transformers."
    try:
        template = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`gym_response_template` is {told!r}, which is no name of TRL's, and no file of JSON ({error}).", remedy
        ) from error
    if not isinstance(template, dict):
        raise ConfigError(f"`gym_response_template` is {told!r}, a file without a JSON object.", remedy)
    return template


def _of_trl(name: str) -> Json:
    import trl.chat_template_utils as of_trl

    return dict(getattr(of_trl, f"{name}_template"))


def _lacking(template: Json, fields: Collection[str]) -> Json:
    kept = {name: field for name, field in template["fields"].items() if name not in fields}
    return {**template, "fields": kept}


# -- reading ----------------------------------------------------------------------------------------------------------


class UnreadableError(ValueError):
    """An answer is not what the response template says; it stays text."""


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


class AnswerReader:
    """Reads answers of one policy.

    Args:
        template: A response template; None leaves answers as text.

    Attributes:
        special_ids: Tokens that are no text.

    Raises:
        ConfigError: transformers refuses the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Json | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        added = {token for token, text in tokenizer.added_tokens_decoder.items() if text.special}
        self.special_ids = frozenset({*tokenizer.all_special_ids, *added})
        if template is None:
            return
        try:
            tokenizer.get_response_parser(template, prefix="")
            self._anchor = _anchor(template)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ConfigError(
                f"`gym_response_template`: transformers cannot read answers with this response template ({error}).",
                "Correct it: https://huggingface.co/docs/transformers/main/en/chat_response_parsing",
            ) from error
        self._with_calls = _with_raw_calls(template)
        self._without_calls = _lacking(template, (_CALLS,))
        marks = json.dumps(template["fields"], ensure_ascii=False).replace("\\", "")
        # Special tokens that the template looks for stay in the text, the others only where tools may be called: vLLM
        # keeps them there as well.
        self._marks = {token for token in self.special_ids if tokenizer.decode([token]) in marks}
        self._takes_tools = "tools" in inspect.signature(tokenizer.get_response_parser).parameters

    def read(
        self, ids: Sequence[int], prompt_ids: Sequence[int], *, tools: Sequence[Json] = (), is_stopped: bool = False
    ) -> Json:
        """Return the assistant's message; answers that cannot be read are text.

        Args:
            prompt_ids: Token ids of the prompt, which may have begun the turn.
            tools: Tools of the request. Without them nothing is a call.
            is_stopped: Whether the last token ended the turn, and so is no part of its text.
        """
        said = list(ids[:-1] if is_stopped else ids)
        if self._template is None:
            return _message(self._tokenizer.decode(said, skip_special_tokens=True))
        if not tools:
            said = self._without_specials(said)
        # Some formats end a call with the end of the turn, for others it must not be a part of the call.
        whole = [*said, ids[-1]] if is_stopped and ids[-1] in self._marks else None
        prefix = self._prefix(self._tokenizer.decode(list(prompt_ids)))
        for tokens in (whole, said):
            if tokens is None:
                continue
            try:
                return self._read(self._tokenizer.decode(tokens), prefix, tools)
            except Exception as error:  # the template's patterns and parsers raise what they like on what was sampled
                logger.debug("an answer stays text: %r", error)
        return _message(self._tokenizer.decode(said))

    def _without_specials(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._marks or token not in self.special_ids]

    def _prefix(self, prompt: str) -> str:
        """Return the prompt from the beginning of the assistant's turn; nothing where that is not found, since
        transformers would take the whole prompt, with the calls of earlier turns, for the turn."""
        assert self._template is not None
        literals = self._template.get("start_anchor")
        if literals is not None:
            starts = [prompt.rfind(literal) for literal in ([literals] if isinstance(literals, str) else literals)]
        else:
            starts = [
                found.start() for found in re.finditer(self._template["start_anchor_pattern"], prompt, re.DOTALL)
            ]
        start = max(starts, default=-1)
        return prompt[start:] if start >= 0 else ""

    def _read(self, text: str, prefix: str, tools: Sequence[Json]) -> Json:
        template = self._with_calls if tools else self._without_calls
        # JSON has types, which a tool's schema must not change.
        is_typed = template["fields"].get(_CALLS, {}).get("content", "text") in ("json", "text")
        typing = {"tools": list(tools)} if tools and self._takes_tools and not is_typed else {}
        parser = self._tokenizer.get_response_parser(template, prefix=prefix, **typing)
        events = [*parser.feed(text), *parser.finalize()[1]]
        content, thought, calls = [], [], []
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_close" and field == _CALLS:
                calls += [*_calls(event["value"])]
            elif kind == "region_chunk" and field == "content" and not calls:
                content.append(event["text"])
            elif kind == "region_chunk" and field in _THOUGHTS:
                thought.append(event["text"])
        return _message("".join(content), "".join(thought).strip(), calls)


def _anchor(template: Json) -> re.Pattern[str]:
    """Return the pattern of what the assistant's turn begins with."""
    if (literals := template.get("start_anchor")) is None:
        return re.compile(template["start_anchor_pattern"], re.DOTALL)
    return re.compile("|".join(map(re.escape, [literals] if isinstance(literals, str) else literals)))


def _message(content: str, thought: str = "", calls: Sequence[Json] = ()) -> Json:
    blank = calls and not content.strip()
    made: Json = {"role": "assistant", "content": None if blank else content, "reasoning": thought or None}
    return {**made, _CALLS: list(calls)} if calls else made


def _with_raw_calls(template: Json) -> Json:
    """Return the template with the JSON of calls left as text, so that arguments are what was sampled."""
    field = template["fields"].get(_CALLS)
    if field is None or field.get("content") != "json" or field.get("content_args") or field.get("transform_each"):
        return template
    if "{content." in json.dumps(field.get("transform")):  # it looks into the JSON itself
        return template
    return {**template, "fields": {**template["fields"], _CALLS: {**field, "content": "text"}}}


def _calls(value: Any) -> Iterator[Json]:
    for one in value if isinstance(value, list) else [value]:
        function = one.get("function", one) if isinstance(one, Mapping) else one
        name, arguments = _raw_call(function) if isinstance(function, str) else _named_call(function)
        if not name:
            raise UnreadableError("a call without a name")
        yield {
            "id": f"chatcmpl-tool-{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def _raw_call(text: str) -> tuple[str, str]:
    call = msgspec.json.decode(text, type=_Call)
    return call.name, _checked(bytes(call.arguments).decode())


def _named_call(function: Any) -> tuple[str, str]:
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
        raise UnreadableError("a call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return name, _checked(arguments.strip())
    return name, _checked(json.dumps({} if arguments is None else arguments, ensure_ascii=False))


def _checked(arguments: str) -> str:
    check_portable(arguments)
    return arguments
