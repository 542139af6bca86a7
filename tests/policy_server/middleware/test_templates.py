"""Probing chat templates for turn ends, with small templates of known shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gym.policy_server.middleware.sight import sight_of
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
    return Chat(list(messages), newest, {"model": "policy"}, ENDING)


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


# -- templates with memory: what they write last depends on what is in front ------------------------------------------

_CALLS = "{% for c in m.tool_calls or [] %}"
_COUNT = "{% set ns.n = ns.n + 1 %}{% endif %}"


def remembering(in_front: str, first: str = "") -> str:
    """A template that writes `in_front` of each message `m`, with a namespace `ns`, of which `first` is said first."""
    return (
        "{% set ns = namespace(n=0, seen=false, last=0, all='') %}"
        + (f"{{% for m in messages %}}{first}{{% endfor %}}" if first else "")
        + "{% for m in messages %}{% set said = m.content or '' %}"
        + in_front
        + f"{{{{ m.role[0] ~ said }}}}{_CALLS}<{{{{ c.function.name ~ c.function.arguments }}}}>{{% endfor %}}"
        + f"{END}\n{{% endfor %}}{{% if add_generation_prompt %}}a{{% endif %}}"
    )


_LAST_USER = "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
PROVEN = {
    "no memory": remembering(""),
    "numbered rounds": remembering("{{ loop.index }}"),
    "rounds from the end": remembering("{{ loop.revindex }}{{ messages|length }}"),
    "first tool output": remembering("{% if m.role == 'tool' and not ns.seen %}({% set ns.seen = true %}{% endif %}"),
    "last question": remembering(
        "{% if loop.index0 > ns.last %}!{% endif %}",
        "{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}"
        "{% set ns.last = loop.index0 %}{% endif %}",
    ),
    "tools at the last user message": remembering(
        "{% if loop.index0 == ns.last %}{{ tools|tojson }}{% endif %}", _LAST_USER
    ),
    "the first message again": remembering(
        "{% if loop.index0 == ns.last %}{{ messages[0].content }}{% endif %}", _LAST_USER
    ),
    "calls of a name": remembering(_CALLS + "{% if c.function.name == 'add' %}" + _COUNT + "{% endfor %}{{ ns.n }}"),
    "arguments": remembering(
        _CALLS
        + "{% for k, v in c.function.arguments.items() %}{% if v is string and '?' in v %}"
        + _COUNT
        + "{% endfor %}{% endfor %}{{ ns.n }}"
    ),
    "thinking somewhere": remembering("{% if '</think>' in said %}" + _COUNT + "{{ ns.n }}"),
    "questions": remembering("{% if (said|trim).endswith('?') %}" + _COUNT + "{{ ns.n }}"),
    "a word across messages": remembering("{% set ns.all = ns.all ~ said %}{% if '</think>' in ns.all %}!{% endif %}"),
    "an empty answer": remembering("{% if not said.split('</think>')[-1].strip() %}" + _COUNT + "{{ ns.n }}"),
    "a whole text": remembering("{% if said|trim in ['stop', 'end'] %}" + _COUNT + "{{ ns.n }}"),
}
UNPROVEN = {
    "text so far": remembering("{% set ns.n = ns.n + said|length %}{{ ns.n }}"),
    "a letter": remembering("{% set ns.all = ns.all ~ said[20:21] %}{{ ns.all }}"),
}

_PIECES = [
    "</think>",
    "<tool_response>",
    "stop",
    "?",
    "</th",
    "ink>",
    "<tool_resp",
    "end",
    "hello world",
    "zqx1",
    "漢字",
]
_pieces = st.sampled_from([*_PIECES, *(text * 30 for text in "a?é"), "it was a long day. " * 3, " ", "\n", "  \n" * 9])
texts = st.lists(_pieces, max_size=5).map("".join)
calls = st.lists(
    st.builds(
        lambda name, text: {
            "id": "callabcd0",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps({"text": text})},
        },
        st.sampled_from(["add", "echo"]),
        texts,
    ),
    max_size=2,
)


@st.composite
def conversations(draw: st.DrawFn) -> Chat:
    message = st.builds(said, st.sampled_from(["user", "assistant", "tool", "system"]), texts) | st.builds(
        lambda content, calls: said("assistant", content, tool_calls=calls), st.none() | texts, calls
    )
    front = draw(st.lists(message, max_size=8))
    turn = draw(st.builds(said, st.just("assistant"), texts, tool_calls=calls))
    new = draw(st.lists(message, min_size=1, max_size=3))
    tools = {"tools": [{"name": draw(texts)}]} if draw(st.booleans()) else {}
    return Chat([*front, turn, *new], len(front), {"model": "policy", **tools}, ENDING)


def rendering(source: str) -> Callable[[Json], Awaitable[Json]]:
    template = jinja2.Environment().from_string(source)

    async def tokenize(body: Json) -> Json:
        messages = json.loads(json.dumps(body["messages"]))
        for called in (call for message in messages for call in message.get("tool_calls") or []):
            called["function"]["arguments"] = json.loads(called["function"]["arguments"])
        text = template.render(
            messages=messages, tools=body.get("tools"), add_generation_prompt=body["add_generation_prompt"]
        )
        return {"tokens": ids(text), "token_strs": list(text)}

    return tokenize


async def outcome(templates: Templates, tokenize: Callable[[Json], Awaitable[Json]], chat: Chat) -> list[int] | str:
    try:
        return await templates.next_prompt(tokenize, chat, ids("seen" + END))
    except NoBoundaryError as error:
        return str(error)


@pytest.mark.parametrize("name", [*PROVEN, *UNPROVEN])
@given(chats=st.lists(conversations(), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_whatever_was_asked_before_a_prompt_is_that_of_the_whole_chat(name: str, chats: list[Chat]) -> None:
    source = {**PROVEN, **UNPROVEN}[name]
    tokenize, server = rendering(source), Templates()

    async def compare() -> None:
        for chat in chats:
            told = replace(chat, source=source)
            assert await outcome(server, tokenize, told) == await outcome(Templates(), tokenize, chat)

    asyncio.run(compare())
    assert (sight_of(source) is not None) == (name in PROVEN)


async def test_the_cost_of_a_turn_is_that_of_what_is_new() -> None:
    templates, sizes = Templates(), []
    source, asked = PROVEN["first tool output"], said("user", "tell me a long story " * 40)
    tokenize = rendering(source)

    async def measured(body: Json) -> Json:
        answer = await tokenize(body)
        sizes.append(len(answer["tokens"]))
        return answer

    for num_turns in (1, 1, 30):
        sizes.clear()
        messages = [asked, said("assistant", "once upon a time " * 40)] * num_turns
        story = Chat([*messages, asked], 2 * num_turns - 1, {"model": "policy"}, ENDING, source)
        await templates.next_prompt(measured, story, ids("seen" + END))
    assert len(sizes) == 1 and sizes[0] < len(asked["content"]) + 60 * 10
    assert (templates.num_whole, templates.num_abbreviated) == (1, 2)


async def test_now_and_then_the_abbreviated_chat_is_compared_with_the_whole() -> None:
    templates, source, late = Templates(), PROVEN["no memory"], False
    tokenize = rendering(source)

    async def changes_its_mind(body: Json) -> Json:
        answer = await tokenize(body)
        extra = list(str(len(answer["tokens"]))) if late else []
        return {"tokens": answer["tokens"] + ids("".join(extra)), "token_strs": answer["token_strs"] + extra}

    asked = Chat([said("user", "a text of many letters"), ANSWERED, MORE], 1, {"model": "policy"}, ENDING, source)
    for _ in range(64):
        await templates.next_prompt(changes_its_mind, asked, ids("uhi|awell"))
    assert (templates.num_whole, templates.num_abbreviated) == (1, 63)
    late = True
    for _ in range(4):
        await templates.next_prompt(changes_its_mind, asked, ids("uhi|awell"))
    assert (templates.num_whole, templates.num_abbreviated) == (5, 63)


def test_the_marker_is_not_in_the_new_messages() -> None:
    assert new_marker([said("user", "zqx0 and zqx1")]) == "zqx2"
    assert new_marker([], unlike="zqx0") == "zqx1"
    assert json.dumps(new_marker([])) == '"zqx0"'
