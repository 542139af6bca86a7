"""Guessed parsers: against vLLM's registry, and against calls and thoughts as chat templates write them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy_server.middleware.template_chats import TOOLS, Sampled, sample
from tests.policy_server.middleware.templates import Template, load_template, template_paths
from trl_gym.errors import ConfigError
from trl_gym.policy_server import parsers
from trl_gym.policy_server.engine.plugin import answer_any_text
from trl_gym.policy_server.middleware.sampling import leave_out, own_sampling
from trl_gym.policy_server.parsers import (
    REASONING_RULES,
    TOOL_RULES,
    Evidence,
    choose,
    guess_reasoning_parser,
    guess_tool_parser,
    read_evidence,
)

MESSAGES = [{"role": "user", "content": "hello"}]
# Model types of TRL's templates, by the beginning of their name; the first that fits.
FAMILIES = {
    "deepseek_r1": "qwen2", "deepseekv3": "deepseek_v3", "glm4moe": "glm4_moe", "gptoss": "gpt_oss", "llama3": "llama",
    "nemotron": "nemotron_h", "qwen2": "qwen2", "qwen3_5": "qwen3_5", "qwen3_8": "qwen3_8", "qwen3": "qwen3",
}  # fmt: skip
# TRL's templates that show tools to a model, and what reads its calls.
READ_BY = {
    "diffusion_gemma": "gemma4", "gemma4": "gemma4", "glm4moe": "glm45", "gptoss": "openai", "lfm2": "lfm2",
    "llama3_1": "llama3_json", "llama3_2": "llama3_json", "muse_glimmer": "muse_glimmer", "nemotron": "qwen3_coder",
    "qwen2_5_vl": None, "qwen2_5": "hermes", "qwen3_5": "qwen3_coder", "qwen3_6": "qwen3_coder",
    "qwen3_8": "qwen3_coder", "qwen3": "hermes",
}  # fmt: skip
# TRL's templates in which a model thinks unless it is asked not to, as far as vLLM has a parser for it.
THINKING = {
    "deepseek": "deepseek_r1", "diffusion_gemma": "gemma4", "gemma4": "gemma4", "glm4moe": "glm45",
    "gptoss": "openai_gptoss", "nemotron": "nemotron_v3", "qwen3_5_nothink": None, "qwen3_5": "qwen3",
    "qwen3_6": "qwen3", "qwen3_8": "qwen3", "qwen3_instruct": None, "qwen3_vl": None, "qwen3": "qwen3",
}  # fmt: skip
TEMPLATES = [path for path in template_paths() if not path.stem.endswith("_training")]


def by_name(table: dict[str, Any], name: str, default: Any = None) -> Any:
    return next((value for start, value in table.items() if name.startswith(start)), default)


def evidence_of(template: Template) -> Evidence:
    return Evidence(by_name(FAMILIES, template.name, template.name), template.source)


# -- against vLLM -----------------------------------------------------------------------------------------------------


def test_vllm_has_every_parser_and_each_reads_the_marker_that_speaks_for_it() -> None:
    import vllm
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    shared = "".join(path.read_text() for path in (Path(vllm.__file__).parent / "parser").glob("*.py"))
    for rule in TOOL_RULES:
        module, _ = ToolParserManager.lazy_parsers[rule.parser]
        own = Path(importlib.util.find_spec(module).origin).read_text()
        for base in re.findall(r"^from (vllm\.tool_parsers\.\w+_tool_parser) import", own, re.MULTILINE):
            own += Path(importlib.util.find_spec(base).origin).read_text()
        marker = rule.marker.strip('": <>|｜[]').removesuffix("=")
        assert marker in own + shared or rule.marker == "<|tool_list_start|>", rule  # that one shows tools
    for rule in REASONING_RULES:
        assert rule.parser in ReasoningParserManager.lazy_parsers, rule


def read_call(template: Template, text: str, name: str) -> list[tuple[str, Any]]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    request = ChatCompletionRequest(model="m", messages=MESSAGES, tools=TOOLS, tool_choice="auto")
    if name == "llama3_json":  # the token is in Llama's vocabulary, and only some templates write it
        template.tokenizer.add_tokens(["<|python_tag|>"])
    found = ToolParserManager.get_tool_parser(name)(template.tokenizer, request.tools).extract_tool_calls(
        text, request
    )
    return [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_calls_as_a_shipped_template_writes_them_are_read(path: Path) -> None:
    template = load_template(path)
    guess = guess_tool_parser(evidence_of(template))
    assert guess.name == by_name(READ_BY, template.name), guess
    # gpt-oss is read by token, in vLLM's own format; the first template of LFM2 leaves calls out.
    if guess.name is None or template.name in ("gptoss", "lfm2"):
        return
    turn = Sampled(text="" if guess.name == "llama3_json" else "so", calls=1)
    answer = sample(template, MESSAGES, TOOLS, turn)
    text = template.decode(answer.ids[:-1])
    assert read_call(template, text, guess.name) == [("echo", {"text": turn.text})], text


@pytest.mark.parametrize("is_turn", [True, False])
def test_neither_strict_tools_nor_a_choice_of_tools_constrain_a_turn(is_turn: bool) -> None:
    """vLLM makes a grammar of both."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    for asked in ({"tools": strict, "tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": "required"}):
        body: dict[str, Any] = dict(asked)
        if is_turn:
            leave_out(body, own_sampling(body))
        request = ChatCompletionRequest(model="m", messages=MESSAGES, **body)
        made = ParserManager.get_parser("hermes", enable_auto_tools=True)(load_template(TEMPLATES[0]).tokenizer)
        assert (made.adjust_request(request).structured_outputs is None) == is_turn


def test_what_a_parser_reads_our_server_can_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's parsers read half of a surrogate, which JSON can write and UTF-8 cannot."""
    from starlette.responses import JSONResponse

    template = load_template(next(path for path in TEMPLATES if path.stem == "qwen3"))
    text = '<tool_call>\n{"name": "echo", "arguments": {"text": "\\udbea 😀"}}\n</tool_call>'
    [(_, arguments)] = read_call(template, text, "hermes")
    monkeypatch.setattr(JSONResponse, "render", JSONResponse.render)  # put back at the end
    with pytest.raises(UnicodeEncodeError):
        JSONResponse(arguments)
    answer_any_text()
    assert json.loads(JSONResponse(arguments).body) == arguments == {"text": "\udbea 😀"}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_thoughts_as_a_shipped_template_writes_them_are_read(path: Path) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    template = load_template(path)
    guess = guess_reasoning_parser(evidence_of(template))
    assert guess.name == by_name(THINKING, template.name), guess
    if guess.name in (None, "openai_gptoss"):
        return
    text = template.decode(sample(template, MESSAGES, None, Sampled(text="fine", thought="hm")).ids[:-1])
    request = ChatCompletionRequest(model="m", messages=MESSAGES)
    parser = ReasoningParserManager.get_reasoning_parser(guess.name)(template.tokenizer)
    thought, said = parser.extract_reasoning(text, request)
    assert (thought or "").strip() == "hm" and (said or "").strip() == "fine", text


# -- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "template", "tool", "reasoning"),
    [
        ("mistral", "{{ tools }}[TOOL_CALLS]", "mistral", None),
        ("mistral3", "{{ tools }}[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ("mistral", "", None, None),  # a base model
        ("llama", '{{ tools }}<tool_call>{"arguments": 1}', "hermes", None),  # Hermes of Llama
        ("llama", '{{ tools }}{"parameters": 1}', "llama3_json", None),
        ("llama4", '{{ tools }}<|python_start|>{"parameters": 1}', "llama4_json", None),
        ("llama4", "{{ tools }}<|python_start|>", "llama4_pythonic", None),
        ("deepseek_v3", "{{ tools }}<｜tool▁calls▁begin｜>```json", "deepseek_v3", None),
        ("deepseek_v3", "{{ tools }}<｜tool▁calls▁begin｜><think>{{ thinking }}", "deepseek_v31", "deepseek_v3"),
        ("deepseek_v32", "", "deepseek_v32", None),
        ("kimi_k2", "{{ tools }}<|tool_calls_section_begin|><think>", "kimi_k2", "kimi_k2"),
        ("minimax_m2", "{{ tools }}<minimax:tool_call><think>", "minimax_m2", "minimax_m2"),
        ("seed_oss", "{{ tools }}<seed:tool_call><function=<seed:think>", "seed_oss", "seed_oss"),
        ("granitemoehybrid", '{{ tools }}<tool_call>{"arguments": 1}', "granite4", None),
        ("granite", "{{ tools }}<|tool_call|>", "granite", None),
        ("phi3", "{{ tools }}functools[", "phi4_mini_json", None),
        ("qwen2", "{{ tools }}<tool_call>arguments<|im_start|>assistant\n<think>\n", "hermes", "deepseek_r1"),  # QwQ
        ("qwen2", "<|im_start|>", None, None),
        ("gpt2", "", None, None),
        ("", "", None, None),
        ("unknown", "{{ tools }}<call>{% not a template", None, None),
    ],
)
def test_what_speaks_for_a_parser(family: str, template: str, tool: str | None, reasoning: str | None) -> None:
    evidence = Evidence(family, template)
    found = guess_tool_parser(evidence), guess_reasoning_parser(evidence)
    assert [parser.name for parser in found] == [tool, reasoning]
    assert all(parser.why for parser in found)


def test_why_there_is_none_is_said() -> None:
    assert "does not show tools" in guess_tool_parser(Evidence("gemma2", "{{ messages }}<tool_call>arguments")).why
    assert guess_tool_parser(Evidence("gpt2")).why == "none is known for model type gpt2 without a chat template"
    off = "{{ tools }}{% if enable_thinking is true %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    assert "turns thinking off" in guess_reasoning_parser(Evidence("qwen3", off)).why


# -- flags ------------------------------------------------------------------------------------------------------------


def model_folder(folder: Path, template: str = "{{ tools }}<tool_call>arguments", **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_what_is_guessed_becomes_a_flag_and_is_said_in_one_line(tmp_path: Path) -> None:
    found, flags = choose(model_folder(tmp_path), ["--max-model-len", "512"])
    assert flags == ["--max-model-len", "512", "--tool-call-parser", "hermes"]
    [line] = found.lines()
    assert "`hermes`" in line and "`<tool_call>` in the chat template" in line and "--tool-call-parser" in line
    assert found.problem("agent") is None


@pytest.mark.parametrize(
    "flags",
    [["--tool-call-parser", "mine"], ["--tool-call-parser=mine"], ["--tool_call_parser", "mine"]],
)
def test_what_is_named_stays(flags: list[str], tmp_path: Path) -> None:
    found, kept = choose(model_folder(tmp_path), flags)
    assert (kept, found.tool.name, found.lines()) == (flags, "mine", [])
    assert found.problem("agent") is None
    with_reasoning = [*flags, "--reasoning-parser", "qwen3"]
    assert choose("not read", with_reasoning)[1] == with_reasoning


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--tool-call-parser", "none", "--seed", "1"], ["--seed", "1"]),
        (["--tool-call-parser=none"], []),
        (["--reasoning_parser", "none", "--tool-call-parser", "none"], []),
        (["--no-enable-auto-tool-choice"], ["--no-enable-auto-tool-choice"]),
        (["--config", "vllm.yaml"], ["--config", "vllm.yaml"]),
    ],
)
def test_nothing_is_guessed_where_none_is_wanted(flags: list[str], kept: list[str], tmp_path: Path) -> None:
    found, left = choose(model_folder(tmp_path), flags)
    assert left == kept and found.lines() == [] and found.tool.name is None
    assert (found.problem("my_agent") is None) == ("--config" in flags)


FLAGS = st.lists(
    st.sampled_from(
        [("--seed", "1"), ("--tool-call-parser", "none"), ("--tool-call-parser", "x"), ("--reasoning-parser", "none"),
         ("--chat-template", "none"), ("--enforce-eager",)]
    ),
    unique_by=lambda flag: flag[0],
)  # fmt: skip


@given(FLAGS)
def test_other_flags_keep_their_place(flags: list[tuple[str, ...]]) -> None:
    _, kept = choose("/nowhere", [word for flag in flags for word in flag])
    told = [flag for flag in flags if flag[0] not in ("--tool-call-parser", "--reasoning-parser") or flag[1] != "none"]
    assert kept == [word for flag in told for word in flag]


def test_tools_without_a_parser_are_a_problem_unless_the_model_could_not_be_read(tmp_path: Path) -> None:
    problem = choose(model_folder(tmp_path, "{{ messages }}"), [])[0].problem("my_agent")
    assert problem is not None and "`my_agent`" in problem.text and "does not show tools" in problem.text
    assert "`gym_vllm_args`" in problem.remedy
    assert choose(tmp_path / "nothing", [])[0].problem("my_agent") is None  # the server will say what is wrong


# -- what is read of a model ------------------------------------------------------------------------------------------


def test_templates_are_found_where_vllm_finds_them(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, {"name": "rag"}]
    folder = model_folder(tmp_path, "jinja", tokenizer_config={"chat_template": named}, chat_template={})
    for_tools = folder / "additional_chat_templates" / "tool_use.jinja"
    for_tools.parent.mkdir()
    for_tools.write_text("more")
    assert read_evidence(folder) == Evidence("qwen2", "jinja\nmore")  # as transformers: alone where there is one
    for_tools.unlink()
    (folder / "chat_template.jinja").unlink()
    assert read_evidence(folder) == Evidence("qwen2", "a\nb")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "text"}')
    assert read_evidence(folder) == Evidence("qwen2", "text")
    (folder / "tokenizer_config.json").write_text("{broken")
    assert read_evidence(folder) == Evidence("qwen2")


def test_flags_say_where_the_template_is(tmp_path: Path) -> None:
    folder, other = model_folder(tmp_path / "model"), model_folder(tmp_path / "tokenizer", "other")
    file = tmp_path / "given.jinja"
    file.write_text("given")
    assert read_evidence(folder, {"--tokenizer": str(other)}).template == "other"
    assert read_evidence(folder, {"--chat-template": str(file)}).template == "given"
    assert read_evidence(folder, {"--chat-template": "{{ text }}"}).template == "{{ text }}"
    assert "<|im_start|>" in read_evidence(folder, {"--chat-template": "template_chatml.jinja"}).template  # vLLM's


def test_a_template_that_is_no_file_or_not_text_is_refused(tmp_path: Path) -> None:
    folder, missing = model_folder(tmp_path), str(tmp_path / "nope.jinja")
    with pytest.raises(ConfigError, match=r"`chat-template` is '.*nope\.jinja', and there is no such file"):
        choose(folder, ["--chat-template", missing])
    (folder / "chat_template.jinja").write_bytes(b"{{ tools }}\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja' is not UTF-8 \(.*Save it as UTF-8"):
        choose(folder, [])


def test_mistrals_own_format_has_no_config(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert choose(tmp_path, [])[0].tool.name == "mistral"


@pytest.mark.parametrize(("file", "parser"), [("tokenizer.json", None), ("tekken.json", "mistral")])
def test_a_mistral_without_template_needs_the_files_that_vllm_renders_chats_with(
    file: str, parser: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / file).write_text("{}")
    found, _ = choose(tmp_path, [])
    assert found.tool.name == parser and (found.problem("my_agent") is None) == (parser is not None)


def test_a_model_of_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, asked = model_folder(tmp_path), []

    def download(name: str, file: str, *, revision: str | None) -> str:
        asked.append((name, revision))
        if not (folder / file).is_file():
            raise LocalEntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found, _ = choose("org/model", ["--revision", "v2"])
    assert found.tool.name == "hermes" and set(asked) == {("org/model", "v2")}
    (folder / "config.json").unlink()
    asked.clear()
    assert choose("org/model", [])[0].tool.why == parsers._UNREAD and len(asked) == 2
