"""Render chats as vLLM's server does for the same request, and read answers, with transformers alone.

What decides the tokens of a prompt is the chat template and what it is given. vLLM gives it messages in a form of its
own, and so does this file:

    content          text, or `{"type": "text", "text": …}` parts where the template loops over the parts of a message
    tool calls       arguments as objects; what is no JSON object becomes an empty one; an empty list is left out
    thinking         as `reasoning` and as `reasoning_content`
    tools            `name`, `description`, `parameters` (null where they are missing), and nothing that is not vLLM's
    developer        a system message, joined with the others at the front, where the template does not know the role

`tests/policy_server/transformers_engine/test_rendering.py` compares both for every template that TRL ships.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from trl_gym.policy_server.transformers_engine.answers import AnswerReader
from trl_gym.untrusted import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]

_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_MEDIA = re.compile(r"image|audio|video")
# A template that loops over the parts of a message's content wants parts.
_LOOPS_OVER_PARTS = re.compile(r"""\bfor\s+\w+\s+in\s+(?:\w+(?:\.|\[['"]))?content\b(?!\s*\()""")
# Parameters of `apply_chat_template` that are not the template's.
_OURS = ("conversation", "tools", "tokenize", "chat_template")
_PLUMBING = frozenset(
    {
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


class RenderError(ValueError):
    """A prompt cannot be made of a request; the text is for the client."""


class ChatRenderer:
    """The texts of a policy: chats to prompts, and answers to messages.

    Args:
        tokenizer: The policy's, with its chat template. It is copied: fast tokenizers are not safe to share between
            threads.
        response_template: What reads answers (`answers.choose`); None gives the text alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, response_template: Json | None = None) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._reader = AnswerReader(self._tokenizer, response_template)

    @property
    def chat_template(self) -> str | None:
        """The source of the only chat template; None if there is none, or if there are several."""
        source = self._tokenizer.chat_template
        return source if isinstance(source, str) else None

    @cached_property
    def longest_token(self) -> int:
        """The number of characters of the longest token, as the vocabulary spells it."""
        return max(map(len, self._tokenizer.get_vocab()))

    def render(self, body: Mapping[str, Any], check: Callable[[str], None] = lambda _text: None) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            body: Of `POST /tokenize` or of a chat completion: `prompt`, a text, or `messages` with `tools`,
                `documents`, `reasoning_effort`, `chat_template_kwargs`, `add_generation_prompt`,
                `continue_final_message` and `add_special_tokens`.
            check: Called with the text before it is tokenized; may raise.

        Raises:
            RenderError: There is no template, it refuses the chat, or the request has another form.
        """
        prompt = body.get("prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise RenderError("`prompt` must be a text")
        text = self._rendered(body) if prompt is None else prompt
        check(text)
        special = bool(body.get("add_special_tokens", prompt is not None))
        try:
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        except (TypeError, UnicodeError) as error:  # the first is what the tokenizer makes of half a surrogate
            raise RenderError(f"a text cannot be tokenized ({error})") from error

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token as the vocabulary spells it. Raises `RenderError` for ids that it does not have."""
        strings = self._tokenizer.convert_ids_to_tokens(self._known(ids))
        return [string or "" for string in strings]  # gaps of the vocabulary have none

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens. Raises `RenderError` for ids that the vocabulary does not have."""
        return str(self._tokenizer.decode(self._known(ids), skip_special_tokens=skip_special_tokens))

    def sampled_text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of sampled tokens. Models have ids beyond those of their tokenizers, which have no text."""
        known = [token for token in ids if token < self._size]
        return str(self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens))

    def parse(self, ids: Sequence[int], prompt_ids: Sequence[int], body: Mapping[str, Any]) -> Json:
        """Return the assistant's message of an answer; see `AnswerReader.read`.

        Args:
            ids: Sampled token ids, with the one that ended the turn.
            body: The chat completion request: `tools`, `tool_choice` and `stop_token_ids` count.
        """
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        stop_ids = self._reader.special_ids | {*(body.get("stop_token_ids") or ())}
        return self._reader.read(ids, prompt_ids, tools=tools or (), is_stopped=bool(ids) and ids[-1] in stop_ids)

    def _known(self, ids: Sequence[int]) -> list[int]:
        if not all(isinstance(token, int) and 0 <= token < self._size for token in ids):
            raise RenderError(f"token ids must be integers from 0 to {self._size - 1}")
        return list(ids)

    @cached_property
    def _size(self) -> int:
        return max(len(self._tokenizer), *self._tokenizer.get_vocab().values()) + 1

    def _rendered(self, body: Mapping[str, Any]) -> str:
        options = _template_options(body)
        tools = _tools(body.get("tools"))
        try:
            template = self._tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise RenderError(f"the policy's tokenizer has no chat template for this request ({error})") from error
        messages = _messages(body.get("messages"), wants_parts=bool(_LOOPS_OVER_PARTS.search(template)))
        if not re.search(r"""["']developer["']""", template) and any(one["role"] == "developer" for one in messages):
            messages = _with_one_system(messages)
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, **options
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise RenderError(_reason(error)) from error


def _template_options(body: Mapping[str, Any]) -> Json:
    """Return what the template is given besides messages and tools; the request's own fields win, as in vLLM."""
    given = {} if body.get("chat_template_kwargs") is None else body["chat_template_kwargs"]
    if not isinstance(given, Mapping):
        raise RenderError("`chat_template_kwargs` must be an object")
    if body.get("chat_template") is not None or given.get("chat_template") is not None:
        raise RenderError("a chat template in a request is not trusted: the server renders with the policy's own")
    if refused := sorted({*_OURS} & given.keys()):
        raise RenderError(f"`chat_template_kwargs` must not have {', '.join(refused)}")
    own: Json = {
        "add_generation_prompt": bool(body.get("add_generation_prompt", True)),
        "continue_final_message": bool(body.get("continue_final_message", False)),
        **{name: body[name] for name in ("documents", "reasoning_effort") if body.get(name) is not None},
    }
    if "reasoning_effort" in own and "enable_thinking" not in given:
        own["enable_thinking"] = own["reasoning_effort"] != "none"
    return {**{name: value for name, value in given.items() if name not in _PLUMBING}, **own}


def _reason(error: BaseException) -> str:
    """Return a template's own words, which may be the cause of another error."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, jinja2.TemplateError):
        seen = seen.__cause__ or seen.__context__
    return str(seen or error)


def _tools(tools: Any) -> list[Json] | None:
    """Return the tools as a template gets them from vLLM; an empty list stays one."""
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(_is_tool(tool) for tool in tools):
        raise RenderError('`tools` must be a list of {"type": "function", "function": {"name": …}}')
    return [{"type": "function", "function": _function(tool["function"])} for tool in tools]


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _function(function: Json) -> Json:
    optional = {name: function[name] for name in ("strict", "defer_loading") if function.get(name) is not None}
    return {
        "name": function["name"],
        "description": function.get("description"),
        "parameters": function.get("parameters"),
        **optional,
    }


def _messages(messages: Any, *, wants_parts: bool) -> list[Json]:
    if not isinstance(messages, list) or not messages:
        raise RenderError("`messages` must be a list of at least one message")
    return [_message(message, wants_parts=wants_parts) for message in messages]


def _message(message: Any, *, wants_parts: bool) -> Json:
    """Return a message with what a template may ask of it, and nothing else."""
    if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
        raise RenderError("each message must be an object with a `role`")
    if role != "assistant" and message.get("content", "") is None:
        raise RenderError(f"a message of role {role!r} has no `content`")
    texts = [text for text in _texts(message.get("content")) if text or wants_parts]
    if wants_parts and role != "tool":
        made: Json = {"role": role, "content": [{"type": "text", "text": text} for text in texts]}
    else:
        made = {"role": role, "content": "\n".join(texts)}
    if role == "assistant":
        if calls := message.get("tool_calls"):
            made["tool_calls"] = [_call(call) for call in calls]
        thought = message.get("reasoning")
        thought = message.get("reasoning_content") if thought is None else thought
        if thought is not None:
            made |= {"reasoning": thought, "reasoning_content": thought}
    if role == "tool" and "tool_call_id" in message:
        made["tool_call_id"] = message["tool_call_id"]
    made |= {name: message[name] for name in ("name", "task") if isinstance(message.get(name), str)}
    return made | ({"tools": message.get("tools")} if role == "developer" else {})


def _texts(content: Any) -> Iterable[str]:
    if content is None:
        return
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise RenderError("`content` must be a text or a list of parts")
    for part in content:
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and _MEDIA.search(kind):
            raise RenderError(f"At most 0 {kind} parts may be in a prompt: the policy is a text model.")
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise RenderError(f"Unsupported chat content part type: {kind!r}.")
        if (text := part.get(_TEXT_PARTS[kind])) is not None:
            if not isinstance(text, str):
                raise RenderError(f"a part of type {kind!r} has no text")
            yield text


def _call(call: Any) -> Json:
    function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
    if not isinstance(function, dict):
        raise RenderError("tool calls of messages must be of type 'function'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError:  # said by the policy itself: refusing it would end every later turn
            arguments = None
    function = {"arguments": arguments if isinstance(arguments, dict) else {}, "name": function.get("name")}
    return {"id": call.get("id"), "function": function, "type": "function"}


def _with_one_system(messages: Iterable[Json]) -> list[Json]:
    """Make the messages of developers those of the system; several of these become one, at the front."""
    renamed = [
        {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}
        if message["role"] == "developer"
        else message
        for message in messages
    ]
    places = [place for place, message in enumerate(renamed) if message["role"] == "system"]
    if places in ([], [0]):
        return renamed
    texts = [_joined(renamed[place]["content"]) for place in places]
    system = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [system, *(message for message in renamed if message["role"] != "system")]


def _joined(content: str | list[Json]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
