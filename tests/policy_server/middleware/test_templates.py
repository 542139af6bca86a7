"""Probing chat templates for turn ends, with small templates of known shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from trl_gym.policy_server.middleware.splice import NoBoundaryError
from trl_gym.policy_server.middleware.templates import Chat, RenderRefusedError, Templates, new_marker

END, RETURN, CALL, USER, OBSERVATION = (chr(code) for code in range(0xE001, 0xE006))  # special tokens
ENDING = {"add_generation_prompt": True, "continue_final_message": False}

Json = dict[str, Any]
Write = Callable[[list[Json], bool], str]


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


class Tokenizer:
    """Letters are tokens; `write` is the template."""

    def __init__(self, write: Write) -> None:
        self.write, self.chats = write, []

    async def __call__(self, body: Json) -> Json:
        self.chats.append(body["messages"])
        text = self.write(body["messages"], body["add_generation_prompt"])
        return {"tokens": ids(text), "token_strs": list(text)}


def chatml(messages: list[Json], add_generation_prompt: bool) -> str:
    text = ""
    for message in messages:
        calls = "".join(
            f"<{c['function']['name']} {c['function']['arguments']}>" for c in message.get("tool_calls", [])
        )
        text += message["role"][0] + (message["content"] or "") + calls + END + "\n"
    return text + "a" * add_generation_prompt


def gpt_oss(messages: list[Json], add_generation_prompt: bool) -> str:
    text = ""
    for index, message in enumerate(messages):
        last = index == len(messages) - 1 and not add_generation_prompt
        calls = "".join(c["function"]["arguments"] for c in message.get("tool_calls", []))
        end = CALL if calls else RETURN if last and message["role"] == "assistant" else END
        text += "^" + message["role"][0] + (message["content"] or "") + calls + end
    return text + "^a" * add_generation_prompt


def glm(messages: list[Json], add_generation_prompt: bool) -> str:
    openings = {"user": USER, "tool": OBSERVATION, "assistant": "A", "system": "S"}
    return "".join(openings[m["role"]] + (m["content"] or "") for m in messages) + "A" * add_generation_prompt


def hoisting(messages: list[Json], add_generation_prompt: bool) -> str:
    """DeepSeek and Cohere: all system messages in front."""
    system = [message for message in messages if message["role"] == "system"]
    return chatml([*system, *(m for m in messages if m["role"] != "system")], add_generation_prompt)


def call(arguments: str = '{"a": 1}') -> Json:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


def chat(*messages: Json, newest: int = 1) -> Chat:
    return Chat(list(messages), newest, {"model": "policy"}, ENDING, b"key")


def said(role: str, content: str | None, **more: Any) -> Json:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED, MORE = said("user", "hi"), said("assistant", "well"), said("user", "more")


async def prompt(write: Write, chat: Chat, seen: str, *, stops: str = "") -> str:
    templates = Templates(stop_ids=set(ids(stops)))
    result = "".join(map(chr, await templates.next_prompt(Tokenizer(write), chat, ids(seen))))
    assert result.startswith(seen)
    return result[len(seen) :]


@pytest.mark.parametrize(
    ("write", "sampled", "stops", "expected"),
    [
        (chatml, "anything" + END, "", "\numore" + END + "\na"),
        (chatml, "anything", "", END + "\numore" + END + "\na"),
        (gpt_oss, "anything" + RETURN, RETURN, "^umore" + END + "^a"),
        (gpt_oss, "anything", RETURN, END + "^umore" + END + "^a"),
        (glm, "anything" + USER, USER, "moreA"),
        (glm, "anything" + OBSERVATION, OBSERVATION, USER + "moreA"),
        (glm, "anything", "", USER + "moreA"),
    ],
)
async def test_plain_turns(write: Write, sampled: str, stops: str, expected: str) -> None:
    assert await prompt(write, chat(ASKED, ANSWERED, MORE), "uhi|a" + sampled, stops=stops) == expected


@pytest.mark.parametrize(
    ("write", "sampled", "stops", "expected"),
    [
        (chatml, "<add odd>" + END, "", "\ntfive" + END + "\na"),
        (chatml, "<add odd>", "", END + "\ntfive" + END + "\na"),
        (gpt_oss, "{}" + CALL, CALL, "^tfive" + END + "^a"),
        (glm, "add" + OBSERVATION, OBSERVATION, "fiveA"),  # writes no calls: the text is marked instead
    ],
)
async def test_tool_calls(write: Write, sampled: str, stops: str, expected: str) -> None:
    turn = said("assistant", None, tool_calls=[call(f"text with {END} in it")])
    asked = chat(ASKED, turn, said("tool", "five", tool_call_id="c1"))
    assert await prompt(write, asked, "uhi|a" + sampled, stops=stops) == expected


async def test_parallel_calls_and_several_new_messages() -> None:
    turn = said("assistant", "let me see", tool_calls=[call(), call()])
    asked = chat(ASKED, turn, said("tool", "1"), said("tool", "2"), said("assistant", "forced"), said("user", END))
    expected = f"\nt1{END}\nt2{END}\naforced{END}\nu{END}{END}\na"
    assert await prompt(chatml, asked, "uhi|a<add><add>" + END) == expected


async def test_a_system_message_that_the_template_writes_in_front_is_no_tail() -> None:
    asked = chat(ASKED, ANSWERED, said("system", "be brief"), MORE)
    assert "sbe brief" in await prompt(chatml, asked, "uhi|awell" + END)
    with pytest.raises(NoBoundaryError, match="in front of the turn"):
        await prompt(hoisting, asked, "uhi|awell" + END)


async def test_a_template_that_rewrites_the_turns_text_has_no_boundary() -> None:
    def censoring(messages: list[Json], add_generation_prompt: bool) -> str:
        return chatml([{**m, "content": "?"} for m in messages], add_generation_prompt)

    with pytest.raises(NoBoundaryError, match="as it is given"):
        await prompt(censoring, chat(ASKED, ANSWERED, MORE), "uhi|awell")


async def test_a_template_that_refuses() -> None:
    async def refuse(body: Json) -> Json:
        raise RenderRefusedError("roles must alternate")

    with pytest.raises(RenderRefusedError, match="alternate"):
        await Templates().next_prompt(refuse, chat(ASKED, ANSWERED, MORE), ids("uhi"))

    def refuses_two_users(messages: list[Json], add_generation_prompt: bool) -> str:
        if [m["role"] for m in messages[-2:]] == ["user", "user"]:
            raise RenderRefusedError("roles must alternate")
        return chatml(messages, add_generation_prompt)

    with pytest.raises(NoBoundaryError, match=r"refuses the chat .*alternate"):
        await prompt(refuses_two_users, chat(ASKED, ANSWERED, MORE, MORE), "uhi|awell" + END)


async def test_the_cost_of_a_turn_is_that_of_what_is_new() -> None:
    templates, tokenizer = Templates(), Tokenizer(chatml)
    messages, history = [ASKED, ANSWERED], "uhi|awell" + END
    for _ in range(3):  # three rollouts of four turns
        for turn in range(1, 5):
            longer = [*messages * turn, MORE]
            tokenizer.chats.clear()
            await templates.next_prompt(tokenizer, chat(*longer, newest=2 * turn - 1), ids(history))
    assert tokenizer.chats == [[said("user", "0"), said("assistant", "zqx0"), MORE]]
    assert (templates.num_whole, templates.num_extended) == (8, 4)


async def test_the_roles_in_front_of_a_turn_belong_to_its_shape() -> None:
    """DeepSeek V3 opens the first tool output of a chat unlike later ones."""

    def opening_the_first(messages: list[Json], add_generation_prompt: bool) -> str:
        return chatml(messages, add_generation_prompt).replace("t", "(t", 1)

    templates, tokenizer = Templates(), Tokenizer(opening_the_first)
    turn, output = said("assistant", None, tool_calls=[call()]), said("tool", "5")
    first = chat(ASKED, ANSWERED, MORE, turn, output, newest=3)
    later = chat(ASKED, turn, output, turn, output, newest=3)
    for _ in range(3):
        assert (await templates.next_prompt(tokenizer, first, ids("seen" + END)))[5:] == ids(f"\n(t5{END}\na")
    assert (await templates.next_prompt(tokenizer, later, ids("seen" + END)))[5:] == ids(f"\nt5{END}\na")


async def test_now_and_then_the_stub_is_checked_again() -> None:
    templates, late = Templates(), False

    def changes_its_mind(messages: list[Json], add_generation_prompt: bool) -> str:
        return chatml(messages, add_generation_prompt) + str(len(messages)) * late

    asked = chat(ASKED, ANSWERED, MORE, MORE, newest=1)
    for _ in range(63):
        await templates.next_prompt(Tokenizer(changes_its_mind), asked, ids("uhi|awell"))
    assert (templates.num_whole, templates.num_extended) == (2, 61)
    late = True
    longer = chat(*[ASKED, ANSWERED] * 2, MORE, newest=1)
    for _ in range(4):
        await templates.next_prompt(Tokenizer(changes_its_mind), longer, ids("uhi|awell"))
    assert templates.num_whole > 2


def test_the_marker_is_not_in_the_new_messages() -> None:
    assert new_marker([said("user", "zqx0 and zqx1")]) == "zqx2"
    assert new_marker([], unlike="zqx0") == "zqx1"
    assert json.dumps(new_marker([])) == '"zqx0"'
