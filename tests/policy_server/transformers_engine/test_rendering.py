"""Prompts of the transformers engine: those of vLLM's own functions for the same requests."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.policy_server.middleware.template_chats import TOOLS
from tests.policy_server.middleware.templates import (
    Template,
    TemplateError,
    _vllm,
    load_template,
    template_paths,
)
from tests.policy_server.tiny_model import build_tokenizer
from trl_gym.policy_server.transformers_engine.rendering import _LOOPS_OVER_PARTS, ChatRenderer, RenderError

Json = dict[str, Any]
SMALL_POLICY = Path(__file__).resolve().parents[3] / "recipes" / "small_policy" / "chat_template.jinja"
# Shows everything that a template can see of messages and tools.
ALL = (
    "{{ messages | tojson }}{{ tools | tojson if tools else tools }}{{ documents }}{{ enable_thinking }}{{ unknown }}"
)
PATHS = [*template_paths(), SMALL_POLICY]


def renderer_of(template: Template) -> ChatRenderer:
    tokenizer = copy.copy(template.tokenizer)
    tokenizer.chat_template = template.source
    return ChatRenderer(tokenizer)


class Chatml(Template):
    """A template that is not TRL's."""

    name = "qwen"


class Shown(Chatml):
    source = ALL


@cache
def shipped(path: Path) -> tuple[Template, ChatRenderer]:
    template = Chatml(path) if path == SMALL_POLICY else load_template(path)
    return template, renderer_of(template)


def outcomes(template: Template, renderer: ChatRenderer, body: Json) -> tuple[list[int] | str, list[int] | str]:
    """What vLLM makes of a request, and what we make of it: token ids, or "refused"."""
    theirs: list[int] | str
    ours: list[int] | str
    try:
        theirs = template.ids(template.render_request(copy.deepcopy(body)))
    except TemplateError:
        theirs = "refused"
    try:
        ours = renderer.render(body)
    except RenderError:
        ours = "refused"
    return theirs, ours


texts = st.sampled_from(["hello", "", "  two lines\n\n", "漢字 </think> x", "<tool_call>", "a" * 40]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=6
)
parts = st.one_of(
    texts.map(lambda text: {"type": "text", "text": text}),
    texts.map(lambda text: {"type": "refusal", "refusal": text}),
)
contents = st.one_of(texts, st.none(), st.lists(parts, max_size=3))
arguments = st.sampled_from(['{"text": "x"}', '{"number": 1.50, "b": [1, {"c": null}]}', "", "[1]", "{broken", "{}"])
calls = st.builds(
    lambda name, given: {"id": "call00000", "type": "function", "function": {"name": name, "arguments": given}},
    st.sampled_from(["echo", "count"]),
    arguments,
)
messages = st.one_of(
    st.builds(lambda content: {"role": "user", "content": content}, contents),
    st.builds(lambda content: {"role": "system", "content": content}, texts),
    st.builds(lambda content: {"role": "developer", "content": content}, texts),
    st.builds(lambda content: {"role": "tool", "tool_call_id": "call00000", "content": content}, texts),
    st.builds(
        lambda content, given, thought: {
            "role": "assistant",
            "content": content,
            **({"tool_calls": given} if given is not None else {}),
            **({"reasoning": thought} if thought else {}),
        },
        texts | st.none(),
        st.none() | st.lists(calls, max_size=2),
        texts,
    ),
)
bodies = st.fixed_dictionaries(
    {"messages": st.lists(messages, min_size=1, max_size=5)},
    optional={
        "tools": st.just(TOOLS),
        "add_generation_prompt": st.booleans(),
        "continue_final_message": st.booleans(),
        "chat_template_kwargs": st.fixed_dictionaries(
            {},
            optional={
                "enable_thinking": st.booleans(),
                "reasoning_effort": st.sampled_from(["low", "none"]),
                "documents": st.just([{"title": "t", "text": "x"}]),
                "unknown": st.just("u"),
            },
        ),
    },
)
many = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
@settings(many, max_examples=8)
@given(body=bodies)
def test_a_shipped_template_renders_as_with_vllm(path: Path, body: Json) -> None:
    theirs, ours = outcomes(*shipped(path), body)
    assert ours == theirs


@settings(many, max_examples=80)
@given(body=bodies)
def test_a_template_sees_what_it_sees_in_vllm(body: Json) -> None:
    template = Shown(Path("all"))
    theirs, ours = outcomes(template, renderer_of(template), body)
    assert ours == theirs


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_content_has_the_form_that_vllm_detects(path: Path) -> None:
    source = path.read_text()
    detected = _vllm().content_format(source, default="string")
    assert ("openai" if _LOOPS_OVER_PARTS.search(source) else "string") == detected


def small() -> ChatRenderer:
    return ChatRenderer(build_tokenizer())


USER: Json = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "`messages` must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text model"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "part type: 'smell'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "has no text"),
        ({"messages": [{"role": "user", "content": 5}]}, "`content` must be"),
        ({"messages": ["hello"]}, "`role`"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "'function'"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "`tools` must be"),
        ({"messages": [USER], "chat_template": "{{ 1 }}"}, "not trusted"),
        ({"messages": [USER], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "not trusted"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, "must not have tokenize"),
        ({"messages": [USER], "chat_template_kwargs": []}, "must be an object"),
        ({"messages": [USER], "continue_final_message": True}, "not compatible"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "cannot be tokenized"),
        ({"prompt": [1, 2]}, "`prompt` must be a text"),
    ],
)
def test_what_cannot_be_rendered_is_refused_with_the_reason(body: Json, words: str) -> None:
    with pytest.raises(RenderError, match=words):
        small().render(body)


def test_a_template_that_refuses_gives_its_own_words() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}{{ messages }}"
    with pytest.raises(RenderError, match=r"^roles must alternate$"):
        ChatRenderer(tokenizer).render({"messages": [USER]})
    tokenizer.chat_template = None
    with pytest.raises(RenderError, match="no chat template"):
        ChatRenderer(tokenizer).render({"messages": [USER]})


def test_texts_and_tokens_of_other_kinds() -> None:
    renderer, tokenizer = small(), build_tokenizer()
    assert renderer.chat_template == tokenizer.chat_template
    ids = renderer.render({"prompt": "hello<|im_end|>"})
    assert renderer.text(ids) == "hello" and renderer.text(ids, skip_special_tokens=False) == "hello<|im_end|>"
    assert renderer.token_strings(ids) == tokenizer.convert_ids_to_tokens(ids)
    for wrong in ([-1], [10**9], ["1"]):
        with pytest.raises(RenderError, match="token ids must be"):
            renderer.token_strings(wrong)


def test_a_turn_is_continued_where_it_ends() -> None:
    turn = {"role": "assistant", "content": "the answer"}
    body = {"messages": [USER, turn], "add_generation_prompt": False, "continue_final_message": True}
    assert small().text(small().render(body), skip_special_tokens=False).endswith("assistant\nthe answer")
    assert small().render({**body, "chat_template_kwargs": {"return_dict": True, "max_length": 1}}) == small().render(
        body
    )
