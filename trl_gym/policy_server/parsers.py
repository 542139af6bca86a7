"""Which of vLLM's parsers turn the policy's text into tool calls and thinking: as told, or guessed from the model.

A model writes a tool call as its chat template shows it calls, so the template decides. Its family (`model_type` in
config.json) tells apart formats that share a marker, and speaks alone for models that have no template. The tables
below say what is evidence of what; a test holds them against vLLM's parsers. The transformers engine has a response
template in their place (`transformers_engine/answers.py`), which is guessed from the same evidence.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trl_gym.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

TOOL_FLAG, REASONING_FLAG = "--tool-call-parser", "--reasoning-parser"
NONE = "none"  # value of either flag: no parser, and no guess
_REMEDY = (
    "Set `gym_vllm_args` to {'tool-call-parser': NAME} (`trl-gym serve MODEL --tool-call-parser NAME`); vLLM's "
    "documentation of tool calling has the parser of each model, and the chat template that some of them need."
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A parser, and what speaks for it: all that is said here must hold."""

    parser: str
    marker: str = ""  # text in the chat template
    families: tuple[str, ...] = ()  # beginnings of `model_type`
    also: str = ""  # another text in the chat template
    mistral_files: bool = False  # tekken.json or params.json, with which vLLM renders chats without a template


# The first rule that holds is used: a marker of one format stands in front of those that may be a part of it.
TOOL_RULES = (
    Rule("functiongemma", "<start_function_call>"),
    Rule("gemma4", "<|tool_call>"),
    Rule("minimax_m2", "<minimax:tool_call>"),
    Rule("seed_oss", "<seed:tool_call>"),
    Rule("longcat", "<longcat_tool_call>"),
    Rule("muse_glimmer", "<atem:function_calls>"),
    Rule("dots", "<dots_function_call>"),
    Rule("k2_horizon", "<ifm|tool_call>"),
    Rule("inkling", "<|content_invoke_tool_json|>"),
    Rule("apertus", "<|tools_prefix|>"),
    Rule("internlm", "<|action_start|>"),
    Rule("lfm2", "<|tool_call_start|>"),
    Rule("kimi_k2", "<|tool_calls_section_begin|>"),
    Rule("step3", "<｜tool_calls_begin｜>"),
    Rule("deepseek_v3", "<｜tool▁calls▁begin｜>", also="```json"),
    Rule("deepseek_v31", "<｜tool▁calls▁begin｜>"),
    Rule("cohere_command4", "<|START_ACTION|>", also="<|START_TEXT|>"),
    Rule("cohere_command3", "<|START_ACTION|>"),
    Rule("mistral", "[TOOL_CALLS]"),
    Rule("openai", "<|channel|>", ("gpt_oss",)),
    Rule("olmo3", "<function_calls>", ("olmo",)),
    Rule("jamba", "<tool_calls>", ("jamba",)),
    Rule("hunyuan_a13b", "<tool_calls>", ("hunyuan",)),
    Rule("ling3", "<arg_key>", ("bailing",)),
    Rule("glm45", "<arg_key>"),
    Rule("step3p5", "<function=", ("step3p5",)),
    Rule("qwen3_coder", "<function="),
    Rule("ernie45", "<tool_call>", ("ernie",)),
    Rule("granite4", "<tool_call>", ("granite",)),
    Rule("hermes", "<tool_call>", also="arguments"),
    Rule("granite", "<|tool_call|>", ("granite",)),
    Rule("phi4_mini_json", "functools["),
    Rule("llama4_json", '"parameters": ', ("llama4",)),
    Rule("llama4_pythonic", "<|python_start|>", ("llama4",)),
    Rule("llama3_json", '"parameters": ', ("llama", "mllama")),
    Rule("lfm2", "<|tool_list_start|>", ("lfm2",)),
    # Without a chat template: vLLM renders the chats of these by itself.
    Rule("mistral", families=("mistral",), mistral_files=True),
    Rule("deepseek_v32", families=("deepseek_v32",)),
    Rule("deepseek_v4", families=("deepseek_v4",)),
)
# As above. Most of these parsers take text without the end of a thought for a thought that was cut off: a model that
# may not think at all must have none.
REASONING_RULES = (
    Rule("seed_oss", "<seed:think>"),
    Rule("mistral", "[THINK]"),
    Rule("gemma4", "<|channel>"),
    Rule("openai_gptoss", "<|channel|>", ("gpt_oss",)),
    Rule("cohere_command4", "<|START_THINKING|>", also="<|START_TEXT|>"),
    Rule("cohere_command3", "<|START_THINKING|>"),
    Rule("minimax_m2", "<think>", also="<minimax:tool_call>"),
    Rule("kimi_k2", "<think>", also="<|tool_calls_section_begin|>"),
    Rule("nemotron_v3", "<think>", ("nemotron",)),
    Rule("mimo", "<think>", ("mimo",)),
    Rule("ling3", "<think>", ("bailing",)),
    Rule("glm45", "<think>", ("glm4_moe",)),
    Rule("ernie45", "<think>", ("ernie",)),
    Rule("hunyuan_a13b", "<think>", ("hunyuan",)),
    Rule("granite_thinking_parser", "<think>", ("granite",)),
    Rule("olmo3", "<think>", ("olmo3",)),
    Rule("step3p5", "<think>", ("step3p5",)),
    Rule("step3", "<think>", ("step3",)),
    Rule("qwen3", "<think>", ("qwen3",), also="enable_thinking"),
    Rule("deepseek_v3", "<think>", ("deepseek",), also="thinking"),
)
NAMED = "named by the options"
_LEFT = "left to the server's own configuration"
_UNREAD = "the model's config.json and chat template cannot be read from here"
_CLOSED_THOUGHT = re.compile(r"<think>\s*</think>\s*$")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tag, which writes nothing
_SHOWS_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a guess is made from."""

    family: str = ""  # `model_type`; empty where it is not known
    template: str = ""  # chat template, with those for chats with tools; empty where there is none
    mistral_files: bool = False  # see `Rule`

    @property
    def shows_tools(self) -> bool:
        """Whether chats that are rendered have the tools in them."""
        return not self.template or bool(_SHOWS_TOOLS.search(self.template))


@dataclass(frozen=True, slots=True)
class Parser:
    """A parser of vLLM or a response template, or none, and why."""

    name: str | None
    why: str

    @property
    def is_guessed(self) -> bool:
        return self.name is not None and self.why != NAMED

    def __str__(self) -> str:
        return f"`{self.name}` ({self.why})" if self.name else f"none ({self.why})"


@dataclass(frozen=True, slots=True)
class Kind:
    """How messages name what reads an answer, and say how to choose another one."""

    noun: str
    tool_option: str
    reasoning_option: str
    remedy: str


VLLM = Kind(
    "vLLM's parser",
    f"`{TOOL_FLAG[2:]}` in `gym_vllm_args` (`trl-gym serve … {TOOL_FLAG}`)",
    f"`{REASONING_FLAG[2:]}` in `gym_vllm_args` (`trl-gym serve … {REASONING_FLAG}`)",
    _REMEDY,
)


@dataclass(frozen=True, slots=True)
class Parsers:
    """What reads the text of a policy server's model."""

    tool: Parser
    reasoning: Parser
    kind: Kind = VLLM

    def lines(self) -> list[str]:
        """Return a line for each guess, which says what overrides it; none for what was told or is not there."""
        told = {
            "tool calls": (self.tool, self.kind.tool_option),
            "thinking": (self.reasoning, self.kind.reasoning_option),
        }
        return [
            f"{what}: read by {self.kind.noun} {parser}; {option} overrides that"
            for what, (parser, option) in told.items()
            if parser.is_guessed
        ]

    def problem(self, agent: str) -> Problem | None:
        """Say that tools cannot be used; None where they can, or where that is not known.

        Args:
            agent: Agent of a row with tools.
        """
        if self.tool.name is not None or self.tool.why in (_UNREAD, _LEFT):
            return None
        return Problem(
            f"Rows of `{agent}` have tools, and the policy server would have no parser for tool calls: "
            f"{self.tool.why}.",
            self.kind.remedy,
        )


def choose(model: str | Path, flags: Sequence[str]) -> tuple[Parsers, list[str]]:
    """Return the parsers that a server has, and its flags with those that are guessed.

    A flag that names a parser is kept as it is; `none` means no parser.

    Args:
        model: Model folder, or name on the model hub, of which configuration and chat template are fetched.
        flags: Flags of `vllm serve`.

    Raises:
        ConfigError: See `read_evidence`.
    """
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    given = {name.replace("_", "-"): value for name, value in pairwise([*words, ""]) if name.startswith("--")}
    told = {flag: given.get(flag) for flag in (TOOL_FLAG, REASONING_FLAG)}
    if "--no-enable-auto-tool-choice" in given:
        told[TOOL_FLAG] = NONE
    # A file of vLLM's options may name them, and the command line would win over it.
    evidence = None if "--config" in given or None not in told.values() else read_evidence(model, given)
    parsers = Parsers(
        _told(told[TOOL_FLAG]) or guess_tool_parser(evidence),
        _told(told[REASONING_FLAG]) or guess_reasoning_parser(evidence),
    )
    kept = _without_none(flags)
    for flag, parser in ((TOOL_FLAG, parsers.tool), (REASONING_FLAG, parsers.reasoning)):
        if parser.is_guessed and parser.name:
            kept += [flag, parser.name]
    return parsers, kept


def guess_tool_parser(evidence: Evidence | None) -> Parser:
    """Return the parser of the calls that a model writes; None leaves it to vLLM's `--config`."""
    if evidence is None:
        return Parser(None, _LEFT)
    if evidence == Evidence():
        return Parser(None, _UNREAD)
    if not evidence.shows_tools:
        return Parser(None, "the model's chat template does not show tools to it")
    return _guess(TOOL_RULES, evidence) or Parser(None, f"none is known for {_described(evidence)}")


def guess_reasoning_parser(evidence: Evidence | None) -> Parser:
    """Return the parser of a model's thinking; none where its chat template has no thoughts, or prompts without them
    unless it is asked to. None leaves it to vLLM's `--config`."""
    if evidence is None:
        return Parser(None, _LEFT)
    prompt = _generation_prompt(evidence.template)
    if _CLOSED_THOUGHT.search(prompt):
        return Parser(None, "the model's chat template turns thinking off by default")
    if (guess := _guess(REASONING_RULES, evidence)) is not None:
        return guess
    if prompt.rstrip().endswith("<think>"):  # as of DeepSeek-R1, its distillates, and QwQ
        return Parser("deepseek_r1", "guessed from prompts that end with `<think>`")
    return Parser(None, "no thinking is known in the model's chat template")


def _generation_prompt(template: str) -> str:
    """Return the prompt of a short chat; empty where the template has none, or cannot be rendered like that."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["strftime_now"] = lambda form: ""
    chat = {"messages": [{"role": "user", "content": "1"}], "add_generation_prompt": True}
    try:
        return environment.from_string(_GENERATION.sub("", template)).render(chat, bos_token="", eos_token="")
    except Exception as error:  # a template is a program: it raises what it likes, and vLLM will say so
        logger.info("the parser of thinking is guessed without a prompt, which cannot be rendered here: %r", error)
        return ""


def _guess(rules: Sequence[Rule], evidence: Evidence) -> Parser | None:
    for rule in rules:
        texts = [text for text in (rule.marker, rule.also) if text]
        if not texts and evidence.template:  # a family alone, of a model that has a template after all
            continue
        if rule.mistral_files and not evidence.mistral_files:
            continue
        in_family = not rule.families or evidence.family.startswith(rule.families)
        if in_family and all(text in evidence.template for text in texts):
            seen = [f"`{text}` in the chat template" for text in texts[:1]]
            seen += [f"model type {evidence.family}"] if rule.families else []
            return Parser(rule.parser, f"guessed from {' and '.join(seen)}")
    return None


def _described(evidence: Evidence) -> str:
    family = f"model type {evidence.family}" if evidence.family else "a model of unknown type"
    return f"{family} with this chat template" if evidence.template else f"{family} without a chat template"


def _told(value: str | None) -> Parser | None:
    if value in (NONE, ""):
        return Parser(None, "as the options say")
    return None if value is None else Parser(value, NAMED)


def _without_none(flags: Sequence[str]) -> list[str]:
    """Leave out parser flags with the value `none`, which vLLM does not know."""
    kept: list[str] = []
    for word in flags:
        name, equals, value = word.partition("=")
        if kept and word in (NONE, "") and kept[-1].replace("_", "-") in (TOOL_FLAG, REASONING_FLAG):
            kept.pop()
        elif not (equals and value in (NONE, "") and name.replace("_", "-") in (TOOL_FLAG, REASONING_FLAG)):
            kept.append(word)
    return kept


# -- what is read of a model ------------------------------------------------------------------------------------------


def read_evidence(model: str | Path, flags: dict[str, str] | None = None) -> Evidence:
    """Read family and chat template of a model; what is not there, or cannot be fetched, stays empty.

    Args:
        model: Model folder, or name on the model hub.
        flags: Flags of `vllm serve` by name: `--chat-template`, `--tokenizer` and `--revision` count.

    Raises:
        ConfigError: A chat template is not UTF-8, or a file that does not exist.
    """
    flags = flags or {}
    revision = flags.get("--revision")
    family = _object(_file(model, "config.json", revision)).get("model_type")
    if not family and _file(model, "params.json", revision) is not None:  # Mistral's own format
        family = "mistral"
    if not family and not Path(model).is_dir():  # the hub does not have it, or cannot be reached
        return Evidence()
    if given := flags.get("--chat-template"):
        return Evidence(str(family or ""), _given_template(given))
    tokenizer, of_tokenizer = flags.get("--tokenizer", model), flags.get("--tokenizer-revision", revision)
    if template := "\n".join(_templates(tokenizer, of_tokenizer)):
        return Evidence(str(family or ""), template)
    if _lacks_tokenizer(Path(tokenizer)):  # as loading it will say
        return Evidence()
    has_files = any(_file(tokenizer, name, of_tokenizer) is not None for name in ("tekken.json", "params.json"))
    return Evidence(str(family or ""), mistral_files=has_files)


def read_own_response_template(model: str | Path) -> dict[str, object] | None:
    """Return the response template that a model's tokenizer brings; None without one."""
    own = _object(_file(model, "tokenizer_config.json", None)).get("response_template")
    return own if isinstance(own, dict) else None


def _given_template(given: str) -> str:
    """Return the template that `--chat-template` gives: a file, one of vLLM's own by name, or the text itself."""
    path = Path(given)
    if any(sign in given for sign in "{}\n"):  # by which vLLM, too, tells a text
        return given
    if path.is_file():
        return _text(path)
    vllm = importlib.util.find_spec("vllm")
    if vllm is not None and vllm.origin is not None:
        own = Path(vllm.origin).parent / "transformers_utils" / "chat_templates" / given
        if own.is_file():
            return _text(own)
    raise ConfigError(
        f"`chat-template` is {given!r}, and there is no such file.",
        "Set `gym_vllm_args` to {'chat-template': FILE} (`trl-gym serve MODEL --chat-template FILE`), a path from the "
        "working directory, or give the text of a template.",
    )


def _lacks_tokenizer(folder: Path) -> bool:
    signs = ("*token*", "vocab*", "*.model", "tekken.json", "params.json")  # the last two: Mistral's own format
    return folder.is_dir() and not any(next(folder.glob(name), None) for name in signs)


def _templates(tokenizer: str | Path, revision: str | None) -> Iterator[str]:
    """Yield the templates that vLLM would choose among: the default one, and one for chats with tools."""
    own = _file(tokenizer, "chat_template.jinja", revision)
    if own is not None:
        yield _text(own)
    # transformers looks at these only without that file: a model that was saved again may keep its former template.
    for name in ("tokenizer_config.json", "chat_template.json") if own is None else ():
        told = _object(_file(tokenizer, name, revision)).get("chat_template")
        if isinstance(told, str):
            yield told
        for one in told if isinstance(told, list) else ():  # {"name": …, "template": …}
            if isinstance(one, dict) and one.get("name") in ("default", "tool_use"):
                yield str(one.get("template", ""))
    if (path := _file(tokenizer, "additional_chat_templates/tool_use.jinja", revision)) is not None:
        yield _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"The chat template {str(path)!r} is not UTF-8 ({error}).", "Save it as UTF-8.") from error


def _object(path: Path | None) -> dict[str, object]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # vLLM will say what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def _file(model: str | Path, name: str, revision: str | None) -> Path | None:
    """Return a file of a model, fetched from the hub or its cache where the model is no folder; None without it."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(model), name, revision=revision))
    except (EntryNotFoundError, OSError, ValueError):  # not there; hub or name cannot be used, as loading will say
        return None
