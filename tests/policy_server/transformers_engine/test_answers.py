"""Answers read by response templates: which one, what vLLM's parser makes of the same text, and what is no call."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import chat_template_utils

from tests.policy_server.middleware.template_chats import TOOLS, Sampled, sample
from tests.policy_server.middleware.templates import Template, load_template
from tests.policy_server.test_parsers import MESSAGES, TEMPLATES, evidence_of
from tests.policy_server.tiny_model import CHAT_TEMPLATE, build_tokenizer
from trl_gym.errors import ConfigError
from trl_gym.policy_server.parsers import Evidence
from trl_gym.policy_server.transformers_engine.answers import NAMES, AnswerReader, choose, chosen
from trl_gym.policy_server.transformers_engine.rendering import ChatRenderer

Json = dict[str, Any]
RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def said(message: Json) -> tuple[str, list[tuple[str, Any]]]:
    """Content, and names and arguments of calls."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return message["content"] or "", [(call["name"], json.loads(call["arguments"])) for call in calls]


# -- which template ---------------------------------------------------------------------------------------------------


def of_trl(template: Template) -> Json | None:
    """What TRL itself takes for a chat template that it ships."""
    tokenizer = copy.copy(template.tokenizer)
    tokenizer.chat_template, tokenizer.response_template = template.source, None
    try:
        return chat_template_utils.add_response_schema(tokenizer).response_template
    except ValueError:
        return None


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_template_of_a_shipped_chat_template_is_the_one_that_trl_takes(path: Path) -> None:
    template = load_template(path)
    choice, theirs = chosen(evidence_of(template)), of_trl(template)
    if choice.template is None or theirs is None:
        assert theirs is None, choice.parsers
        return
    fields = choice.template["fields"]
    assert {**choice.template, "fields": None} == {**theirs, "fields": None}
    assert fields == {name: field for name, field in theirs["fields"].items() if name in fields}
    assert choice.parsers.tool.name is None or "tool_calls" in fields


CHATML = Evidence("qwen3", CHAT_TEMPLATE)


def test_the_option_wins_over_the_tokenizer_and_that_over_the_guess(tmp_path: Path) -> None:
    own = {**chat_template_utils.llama3_template, "defaults": {"role": "assistant", "own": 1}}
    guess = chosen(CHATML)
    assert guess.parsers.tool.name == "qwen3" and "guessed from `<tool_call>`" in guess.parsers.tool.why
    assert [line[:35] for line in guess.parsers.lines()] == ["tool calls: read by the response te"]
    assert "`gym_response_template`" in guess.parsers.lines()[0]
    assert guess.parsers.reasoning.name is None and "reasoning_content" not in guess.template["fields"]
    assert chosen(CHATML, None, own).template == own
    assert chosen(CHATML, "qwen3_5", own).template == chat_template_utils.qwen3_5_template
    assert chosen(CHATML, "qwen3_5", own).parsers.lines() == []
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own))
    assert chosen(CHATML, str(file)).template == own
    assert chosen(CHATML, "none", own).template is None


def test_a_model_folder_is_enough(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert choose(tmp_path).parsers.tool.name == "qwen3"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own = {"start_anchor": "a", "fields": {"content": {}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "response_template": own}))
    choice = choose(tmp_path)
    assert choice.template == own
    problem = choice.parsers.problem("tool_agent")
    assert "Rows of `tool_agent` have tools" in problem.text and "no field for that" in problem.text
    assert "gym_response_template" in problem.remedy
    assert choose(RECIPES / "small_policy").parsers.tool.name == "qwen3"


def test_a_model_that_no_template_fits_answers_in_text_and_rows_with_tools_are_refused() -> None:
    choice = chosen(Evidence("other", "{% for tool in tools %}[TOOL_CALLS]{% endfor %}"))
    assert choice.template is None
    assert "no response template for what vLLM's parser `mistral` reads" in choice.parsers.problem("agent").text


@pytest.mark.parametrize(
    ("text", "words"), [(None, "no name of TRL's"), ("{", "no file of JSON"), ("[]", "without a JSON object")]
)
def test_an_option_that_names_nothing_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "template.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        chosen(CHATML, str(file))


@pytest.mark.parametrize(
    "template",
    [{}, {"fields": {}}, {"fields": {"content": {}}}, {"start_anchor": "a", "fields": {"content": {"content": "x"}}}],
)
def test_a_template_that_transformers_refuses_is_refused(template: Json) -> None:
    with pytest.raises(ConfigError, match="cannot read answers with this response template"):
        AnswerReader(build_tokenizer(), template)


def test_all_names_are_templates_of_trl() -> None:
    found = {name for name in vars(chat_template_utils) if name.endswith("_template")}
    found = {name for name in found if isinstance(getattr(chat_template_utils, name), dict)}
    assert found == {f"{name}_template" for name in NAMES}


# -- against vLLM -----------------------------------------------------------------------------------------------------

# vLLM reads tokens of gpt-oss, in a format of its own, and LFM2's first template leaves calls out.
NOT_COMPARED = ("gptoss", "lfm2")


@cache
def reader_of(path: Path) -> tuple[Template, AnswerReader, str | None]:
    template = load_template(path)
    choice = chosen(evidence_of(template))
    return template, AnswerReader(template.tokenizer, choice.template), choice.parsers.tool.name


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_answer_as_a_shipped_template_writes_it_is_read(path: Path, calls: int) -> None:
    template, reader, tool = reader_of(path)
    if template.name in NOT_COMPARED or tool is None or (calls == 2 and tool == "llama3"):
        return
    turn = Sampled(text="" if tool == "llama3" and calls else "so", calls=calls)
    tools = TOOLS if calls else None
    answer = sample(template, MESSAGES, tools, turn)
    prompt = template.ids(template.text(MESSAGES, tools))
    message = reader.read(answer.ids, prompt, tools=tools or (), is_stopped=True)
    wanted = [("count", {"number": 0}), ("echo", {"text": turn.text})][2 - calls :]
    content, called = said(message)
    assert (content.strip(), called) == (turn.text, wanted), template.decode(answer.ids)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_thought_as_a_shipped_template_writes_it_is_read(path: Path) -> None:
    template, reader, _ = reader_of(path)
    if chosen(evidence_of(template)).parsers.reasoning.name is None:
        return
    answer = sample(template, MESSAGES, None, Sampled(text="fine", thought="hm"))
    message = reader.read(answer.ids, template.ids(template.text(MESSAGES)), is_stopped=True)
    assert (message["reasoning"], message["content"].strip()) == ("hm", "fine"), template.decode(answer.ids)


def of_vllm(template: Template, text: str, parser: str) -> Json:
    """Content and calls that vLLM's server gives for a text."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    request = ChatCompletionRequest(model="m", messages=MESSAGES, tools=TOOLS, tool_choice="auto")
    made = ParserManager.get_parser(parser, enable_auto_tools=True)(template.tokenizer, request.tools)
    _, content, calls = made.parse(text, request, enable_auto_tools=True)
    return {
        "content": content,
        "tool_calls": [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls or []],
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from([1.5, "7", -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
a_call = st.builds(
    lambda name, given, indent: (
        "<tool_call>" + json.dumps({"name": name, "arguments": given}, indent=indent) + "</tool_call>"
    ),
    st.sampled_from(["echo", "count", "no_such_tool"]),
    st.dictionaries(st.text(max_size=3), json_values, max_size=3),
    st.sampled_from([None, 1]),
)
around = st.sampled_from(
    ["", "so", "\n", "  two  ", "<tool_call>", "</tool_call>", "<tool", '{"name": 1}', "{", "<think>x</think>", "漢字"]
)
answers = st.lists(st.one_of(around, a_call), max_size=5).map("".join)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(text=answers)
def test_answers_of_the_small_policy_are_read_as_by_vllms_parser(text: str) -> None:
    template, reader = small_policy()
    ids, prompt = template.ids(text), template.ids("<|im_start|>assistant\n")
    ours = reader.read([*ids, template.ids("<|im_end|>")[0]], prompt, tools=TOOLS, is_stopped=True)
    assert said(ours) == said(of_vllm(template, text, "hermes"))


@cache
def small_policy() -> tuple[Template, AnswerReader]:
    from transformers import AutoTokenizer

    folder = RECIPES / "small_policy"
    template = Template(folder / "chat_template.jinja")
    vars(template)["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    return template, AnswerReader(template.tokenizer, choose(folder).template)


def call(arguments: str, name: str = '"echo"') -> str:
    return f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'


def read(text: str, *, prompt: str = "<|im_start|>assistant\n", tools: bool = True, is_cut: bool = False) -> Json:
    template, reader = small_policy()
    ids = template.ids(text) + ([] if is_cut else template.ids("<|im_end|>"))
    return reader.read(ids, template.ids(prompt), tools=TOOLS if tools else (), is_stopped=not is_cut)


@pytest.mark.parametrize(
    "text",
    [
        call('{"a": }'),
        call('{"a": 1}', "5"),
        call("[" * 100_000),
        call('{"a": ' + "9" * 5000 + "}"),
        '<tool_call>{"name": "echo"}</tool_call>',
        call("{}") + call("{"),
        # vLLM reads these as calls, with arguments that are no JSON, or that no server can send.
        call('{"a": NaN}'),
        call('{"a": 1e400}'),
        call('{"a": "\\ud800"}'),
        call("[" * 400 + "]" * 400),
        call("{}", '""'),
    ],
)
def test_an_answer_whose_calls_cannot_be_read_is_text(text: str) -> None:
    message = read(text)
    assert message == {"role": "assistant", "content": text, "reasoning": None}
    json.dumps(message, ensure_ascii=False).encode()


def test_arguments_are_what_was_sampled() -> None:
    for sampled in ('{"a":1,  "a": 1.10}', '{"number": "7"}', '{"text": "\\u6f22\\n"}', "5", "null"):
        assert read(call(sampled))["tool_calls"][0]["function"] == {"name": "echo", "arguments": sampled}
    assert len({read(call("{}"))["tool_calls"][0]["id"] for _ in range(3)}) == 3


def test_without_tools_nothing_is_a_call_and_special_tokens_are_no_text() -> None:
    assert read("so" + call("{}") + "<|im_start|>", tools=False)["content"] == "so" + call("{}")
    assert read("so<|im_start|>" + call("{}"))["content"] == "so<|im_start|>"


def test_a_turn_that_the_prompt_has_begun_is_not_said_again() -> None:
    history = "<|im_start|>assistant\n" + call('{"a": 1}') + "<|im_end|>\n<|im_start|>assistant\n"
    message = read(" more", prompt=history + "the answer", is_cut=True)
    assert message == {"role": "assistant", "content": " more", "reasoning": None}
    assert read("so", prompt=call("{}"))["content"] == "so"  # a prompt without the template's beginning of a turn


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n"])
def test_a_thought_is_read_whoever_opened_it(prompt: str) -> None:
    template, _ = small_policy()
    reader = AnswerReader(template.tokenizer, chat_template_utils.qwen3_template)
    opened = "" if "think" in prompt else "<think>"
    ids = template.ids(f"{opened}hm</think>\n\nso{call('{}')}")
    message = reader.read(ids, template.ids(prompt), tools=TOOLS)
    assert (message["reasoning"], said(message)) == ("hm", ("so", [("echo", {})]))
    cut = reader.read(template.ids(f"{opened}hm"), template.ids(prompt), tools=TOOLS)
    assert (cut["reasoning"], cut["content"]) == ("hm", "")


def test_the_renderer_reads_with_the_tools_that_a_request_has() -> None:
    tokenizer = build_tokenizer()
    renderer = ChatRenderer(tokenizer, response_template=chosen(CHATML).template)
    prompt = renderer.render({"messages": MESSAGES, "tools": TOOLS})
    ids = tokenizer(call("{}") + "<|im_end|>")["input_ids"]
    assert said(renderer.parse(ids, prompt, {"tools": TOOLS})) == ("", [("echo", {})])
    for body in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        assert renderer.parse(ids, prompt, body)["content"] == call("{}")
    assert ChatRenderer(tokenizer).parse(ids, prompt, {"tools": TOOLS})["content"] == call("{}")
    assert renderer.parse([*ids[:-1], ids[0]], prompt, {"stop_token_ids": [ids[0]]})["content"] == call("{}")
