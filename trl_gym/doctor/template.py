"""Can a sampled turn be continued exactly with the model's chat template? Asked as the policy server's middleware
does, of the template itself, with short chats; `docs/token_fidelity.md` has what comes out for well-known models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trl_gym.doctor.checks import Finding, failed, ok, warning
from trl_gym.doctor.context import Subject
from trl_gym.policy_server.marking import Chat
from trl_gym.policy_server.middleware.splice import NoBoundaryError
from trl_gym.policy_server.middleware.templates import RenderRefusedError, Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_USER: Message = {"role": "user", "content": "What is 2 + 3?"}
_CALL: Message = {"id": "callabcd0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
_TOOL: Message = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
# What follows the policy's turn; the turn itself; tools.
_CASES: dict[str, tuple[Message, list[Message], list[Message]]] = {
    "a question after an answer": (
        {"role": "assistant", "content": "It is 5."},
        [{"role": "user", "content": "And 4 + 4?"}],
        [],
    ),
    "a result after a tool call": (
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        [{"role": "tool", "tool_call_id": "callabcd0", "name": "add", "content": "5"}],
        [_TOOL],
    ),
    "a system message after an answer": (
        {"role": "assistant", "content": "It is 5."},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And 4 + 4?"}],
        [],
    ),
}
_RARE = "a system message after an answer"
_REMEDY = (
    "Rollouts of several turns drift there; `gym_drift` decides what becomes of them. Use a model, or a "
    "`chat-template` in `gym_vllm_args`, that docs/token_fidelity.md lists as exact."
)


def chat_template(subject: Subject) -> Iterator[Finding]:
    """What the middleware will make of this template."""
    outcomes = classify(subject.tokenizer, subject.args.chat_template_kwargs or {})
    wrong = {case: reason for case, reason in outcomes.items() if reason is not None}
    is_fatal = subject.args.gym_drift == "error"
    for case, reason in wrong.items():
        say = failed if is_fatal and case != _RARE else warning
        yield say(f"{case} cannot be continued exactly: {reason}", _REMEDY)
    exact = [case for case in outcomes if case not in wrong]
    if exact:
        yield ok(f"exact: {', '.join(exact)}")


def classify(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> dict[str, str | None]:
    """By case, why the next prompt cannot be made without a guess; None where it can.

    Args:
        tokenizer: With a chat template.
        options: `chat_template_kwargs`.
    """
    return asyncio.run(_classify(_Renderer(tokenizer), options))


class _Renderer:
    """`POST /tokenize`, as vLLM answers it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text_of(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    async def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            text = self._tokenizer.apply_chat_template(
                [_with_parsed_calls(message) for message in body["messages"]],
                tools=body.get("tools"),
                add_generation_prompt=body["add_generation_prompt"],
                continue_final_message=body.get("continue_final_message", False),
                tokenize=False,
                **body.get("chat_template_kwargs", {}),
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise RenderRefusedError(f"{type(error).__name__}: {error}") from error
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"tokens": ids, "token_strs": self._tokenizer.convert_ids_to_tokens(ids)}


def _problem(prompt: list[int], seen: list[int], tail: str, following: list[Message]) -> str | None:
    if prompt[: len(seen)] != seen:
        return "the prompt does not start with the tokens seen"
    if any(message["content"] not in tail for message in following):
        return "the template does not write what follows a turn behind it"
    return None


def _with_parsed_calls(message: Message) -> Message:
    """vLLM hands a template the arguments of a call as an object."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


async def _classify(renderer: _Renderer, options: dict[str, Any]) -> dict[str, str | None]:
    templates, outcomes = Templates(), dict[str, str | None]()
    for case, (turn, following, tools) in _CASES.items():
        chat_options: dict[str, Any] = {"chat_template_kwargs": options} if options else {}
        if tools:
            chat_options["tools"] = tools
        ending = {"add_generation_prompt": True, "continue_final_message": False}
        chat = Chat([_USER, turn, *following], 1, chat_options, ending, json.dumps(chat_options).encode())
        try:
            first = await renderer({**chat_options, "messages": [_USER], **ending})
            seen = [*first["tokens"], *first["tokens"][-4:][::-1]]  # no tokenizer would write the turn like that
            prompt = await templates.next_prompt(renderer, chat, seen)
        except NoBoundaryError as error:
            outcomes[case] = str(error)
        except RenderRefusedError as error:
            outcomes[case] = f"the template refuses it ({error})"
        else:
            outcomes[case] = _problem(prompt, seen, renderer.text_of(prompt[len(seen) :]), following)
    return outcomes
