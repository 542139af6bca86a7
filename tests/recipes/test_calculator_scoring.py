# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
import json

import pytest

TASK = ("subtract", {"a": 47, "b": 36}, "11")


def call(name="subtract", arguments='{"a": 47, "b": 36}'):
    return {"type": "function_call", "name": name, "arguments": arguments, "call_id": "c"}


def tool_result(text="11"):
    return {"type": "function_call_output", "call_id": "c", "output": text}


def message(text="11", role="assistant"):
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": role, "content": content}


def test_right_call_and_right_answer(calculator_scoring):
    score = calculator_scoring.score([call(), tool_result(), message(" 11\n")], *TASK)
    assert (score.reward, score.call_correct, score.success) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "output",
    [
        pytest.param([call(), tool_result(), message("12")], id="wrong answer"),
        pytest.param([call(), tool_result(), message("The answer is 11")], id="not only the answer"),
        pytest.param([call(), tool_result()], id="no answer"),
        pytest.param([message("11"), call(), tool_result()], id="answer before the result"),
        pytest.param([call(), message("11")], id="no result"),
        pytest.param([call(), tool_result(), message("11", role="user")], id="not the assistant"),
        pytest.param([call(), tool_result(), {"type": "reasoning", "summary": []}], id="only reasoning"),
        pytest.param([call(), tool_result(), {"type": "message", "role": "assistant"}], id="no content"),
        pytest.param([call(), tool_result(), message(None)], id="text is None"),
        pytest.param(
            [
                call(),
                tool_result(),
                {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            ],
            id="refusal",
        ),
    ],
)
def test_right_call_alone_earns_half(calculator_scoring, output):
    score = calculator_scoring.score(output, *TASK)
    assert (score.reward, score.call_correct, score.success) == (0.5, 1.0, 0.0)


@pytest.mark.parametrize(
    "output",
    [
        pytest.param([], id="nothing"),
        pytest.param([message("11")], id="answer without a call"),
        pytest.param([call("add"), tool_result("83"), message("11")], id="wrong tool"),
        pytest.param([call(), call(), tool_result(), tool_result(), message("11")], id="two calls"),
        pytest.param([call(), tool_result(), call("add"), tool_result("83"), message("11")], id="second call"),
        pytest.param([{"type": "function_call"}, tool_result(), message("11")], id="empty call"),
        pytest.param([{}], id="empty item"),
    ],
)
def test_anything_but_the_one_right_call_earns_nothing(calculator_scoring, output):
    score = calculator_scoring.score(output, *TASK)
    assert (score.reward, score.call_correct, score.success) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": 36, "b": 47}',
        '{"a": 47}',
        '{"a": 47, "b": 36, "c": 1}',
        '{"a": 47.0, "b": 36}',
        '{"a": "47", "b": 36}',
        '{"a": true, "b": 36}',
        '{"a": null, "b": 36}',
        '{"a": NaN, "b": Infinity}',
        '{"a": [47], "b": {"b": 36}}',
        "[47, 36]",
        "47",
        "null",
        "",
        '{"a": 47, "b": 3',
        '{"a": 47, "b": ' + "9" * 5_000 + "}",  # beyond Python's int <-> str digit limit
        "[" * 100_000,  # deeper than the recursion limit
        None,
        47,
        {"a": 47, "b": 36},  # decoded already: not what Gym sends, and not a call that vLLM parsed
    ],
    ids=lambda value: repr(value)[:30],
)
def test_rubbish_arguments_never_raise(calculator_scoring, arguments):
    score = calculator_scoring.score([call(arguments=arguments), tool_result(), message("11")], *TASK)
    assert score.reward == 0.0


def test_argument_order_and_spacing_do_not_matter(calculator_scoring):
    assert calculator_scoring.score([call(arguments='{"b":36,"a":47}'), tool_result(), message()], *TASK).success == 1


@pytest.mark.parametrize(("tool", "expected"), [("add", 83), ("subtract", 11)])
def test_tools_compute(calculator_scoring, tool, expected):
    assert calculator_scoring.run_tool(tool, {"a": 47, "b": 36}) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        1,
        "47",
        [],
        {},
        {"a": 1},
        {"a": "1", "b": 2},
        {"a": 1.0, "b": 2},
        {"a": True, "b": 2},
        {"a": 10**13, "b": 0},
    ],
    ids=repr,
)
def test_tools_answer_rubbish_with_a_short_error(calculator_scoring, arguments):
    result = calculator_scoring.run_tool("add", arguments)
    assert set(result) == {"error"}
    assert len(json.dumps(result)) < 60


def test_huge_integers_stay_clear_of_the_digit_limit(calculator_scoring):
    assert set(calculator_scoring.run_tool("add", {"a": 10**5_000, "b": 1})) == {"error"}
