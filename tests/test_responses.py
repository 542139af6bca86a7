"""Items of the Responses API have one text, for reward functions, tables, notebooks and the viewer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.notebook import messages_of
from trl_gym.report.bodies import Shared, conversation_body
from trl_gym.responses import (
    completion_messages,
    count_tool_calls,
    input_items,
    is_tool_error,
    model_call_indices,
    prompt_messages,
    read_item,
    text_of,
)

CALL = {"type": "function_call", "name": "add", "arguments": '{"a": 1, "b": 2}', "call_id": "c1"}
RESULT = {"type": "function_call_output", "output": "3", "call_id": "c1"}
ANSWER = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is 3."}]}
THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}

parts = st.sampled_from(["", "x", "<b>"]).map(lambda text: {"type": "output_text", "text": text}) | st.sampled_from(
    [{"type": "refusal", "refusal": "no"}, {"type": "input_image"}, {"text": None}, "plain"]
)
contents = st.none() | st.text(max_size=5) | st.lists(parts, max_size=3)
items = st.one_of(
    contents.map(lambda content: {"type": "message", "role": "assistant", "content": content}),
    contents.map(lambda content: {"type": "function_call_output", "call_id": "c", "output": content}),
    contents.map(lambda content: {"type": "reasoning", "summary": content}),
)


def test_the_conversation_is_what_happened() -> None:
    thought, call, result, answer = completion_messages([THOUGHT, CALL, RESULT, ANSWER])
    assert thought == {"role": "assistant", "content": "<think>hm</think>"}
    assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    assert (call["content"], result, answer["content"]) == ("", {"role": "tool", "content": "3"}, "It is 3.")
    assert completion_messages([]) == [{"role": "assistant", "content": ""}]
    assert completion_messages([{"type": "web_search", "query": "q"}]) == [{"role": "assistant", "content": ""}]


@pytest.mark.parametrize("arguments", ["not json", "[1]", "", None])
def test_arguments_that_are_no_object_can_be_shown(arguments: str | None) -> None:
    """TRL's table reads them as a JSON object, and would end training."""
    [first] = completion_messages([{"type": "function_call", "name": "add", "arguments": arguments}])
    assert json.loads(first["tool_calls"][0]["function"]["arguments"]) == {"unparsed": arguments or ""}


@given(output=st.lists(items, max_size=5))
def test_everyone_reads_the_same_text(output: list[dict[str, Any]]) -> None:
    record = {"row": {}, "response": {"output": output}}
    texts = [read_item(item).text for item in output]
    assert [text for _, text in messages_of(record)] == texts
    assert [item["text"] for item in conversation_body(record, Shared())["output"]] == texts
    if output:
        said = [message["content"] for message in completion_messages(output)]
        assert [text.removeprefix("<think>").removesuffix("</think>") for text in said] == texts


def test_a_prompt_may_be_a_text_or_items_with_instructions() -> None:
    row = {
        "responses_create_params": {"instructions": "be brief", "input": [{"role": "user", "content": "1 + 2?"}, CALL]}
    }
    assert prompt_messages(row) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1 + 2?"},
        {"role": "function_call", "content": 'add({"a": 1, "b": 2})'},
    ]
    assert prompt_messages({"responses_create_params": {"input": "hi"}}) == [{"role": "user", "content": "hi"}]
    assert prompt_messages({}) == [{"role": "user", "content": ""}]
    assert input_items({"responses_create_params": {"input": ["odd"]}})[0]["content"] == "odd"


def test_what_is_no_text_is_named_or_written_as_json() -> None:
    assert text_of([{"type": "input_text", "text": "a"}, {"type": "input_image"}, 3]) == "a[input_image]3"
    assert text_of({"ä": [1]}) == '{"ä": [1]}'


def test_model_calls_end_with_the_item_that_has_token_ids_or_stand_between_results() -> None:
    with_ids = [THOUGHT, CALL | {"generation_token_ids": [1]}, RESULT, ANSWER | {"generation_token_ids": [2]}]
    assert model_call_indices(with_ids) == [0, 0, None, 1]
    assert model_call_indices([THOUGHT, CALL, RESULT, ANSWER, ANSWER]) == [0, 0, None, 1, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Internal Server Error", True),
        ('{"error": "no such city"}', True),
        ('{"detail": [{"msg": "field required"}]}', True),
        ('{"error": null, "value": 3}', False),
        ('{"detail": "a word", "value": 3}', False),
        ("an error occurred to me", False),
        ("3", False),
        ('["error"]', False),
    ],
)
def test_tool_errors_are_told_by_the_body(text: str, expected: bool) -> None:
    assert is_tool_error(text) is expected
    assert count_tool_calls([CALL, RESULT | {"output": text}]) == (1, int(expected))
