"""What starts SGLang's server behind our gateway: the interpreter that has it, its flags, and the command.

    PolicyServer ──► python -m trl_gym.policy_server.sglang MODEL …   (`__main__.py`: the gateway; owns the port)
                         └──► PYTHON -m sglang.launch_server …        (on a port of its own, with a key of its own)

SGLang pins packages that conflict with ours, so its interpreter may be another one: `find_python` has the order.
`PolicyServer` knows one process, with the life that vLLM's has; the second ends with the first, and the first with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trl_gym.errors import ConfigError
from trl_gym.given import home_words
from trl_gym.policy_server.command import flag_words, model_problems, reach_problems
from trl_gym.policy_server.parsers import (
    NONE,
    REASONING_FLAG,
    TOOL_FLAG,
    Kind,
    Parser,
    Parsers,
    guess_reasoning_parser,
    guess_tool_parser,
    read_evidence,
)

PYTHON_VARIABLE = "TRL_GYM_SGLANG_PYTHON"
_REMEDY = (
    "Install it there (`pip install sglang`, in an environment of its own), or name the interpreter that "
    f"has it: `gym_sglang_python`, or the environment variable {PYTHON_VARIABLE}."
)
_PROBE = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
_PROBE_TIMEOUT_S = 60.0  # a cold disk makes even `importlib.metadata` slow

# Flags that we set unless the user does.
DEFAULT_FLAGS: Mapping[str, object] = MappingProxyType(
    {
        "sampling-defaults": "openai",  # no top_k, top_p of generation_config.json behind the trainer's back
        "enable-metrics": True,
        "enable-cache-report": True,  # tokens from the prefix cache, for the call records
        "skip-server-warmup": True,  # the gateway's questions warm it up
        "log-level-http": "warning",
    }
)
# Where there is no GPU. SGLang's own kernels for CPUs need AMX; torch's compute the same everywhere.
CPU_FLAGS: Mapping[str, object] = MappingProxyType(
    {
        "device": "cpu",
        "attention-backend": "torch_native",
        "sampling-backend": "pytorch",
        "disable-cuda-graph": True,
        "disable-overlap-schedule": True,
    }
)
CPU_ENVIRONMENT: Mapping[str, str] = MappingProxyType({"SGLANG_USE_CPU_ENGINE": "1"})

# Flags that are ours; each says what sets it, or why it cannot be set.
OWNED_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("host", "port"), "SGLang listens behind the gateway"),
        **dict.fromkeys(("model-path", "model"), "it is the policy"),
        "served-model-name": "NeMo Gym is told the same name",
        **dict.fromkeys(("api-key", "admin-api-key", "config"), "SGLang gets a key of its own, in a file"),
        "skip-tokenizer-init": "exact prompts need the tokenizer",
        "weight-version": "a sync names the weights",
    }
)

# SGLang's parser (`ToolCallParserEnum` in function_call_parser.py, `DetectorMap` in reasoning_parser.py, 0.5.23) for
# what vLLM's reads. For others SGLang looks into the chat template itself ("auto"), which knows fewer of them.
_AUTO = "auto"
_SAME_TOOLS = (
    *("cohere_command4", "dots", "gemma4", "glm45", "hermes", "inkling", "k2_horizon", "kimi_k2", "lfm2", "ling3"),
    *("mistral", "qwen3_coder", "step3", "step3p5"),
)
TOOL_PARSERS: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in _SAME_TOOLS},
        "deepseek_v3": "deepseekv3",
        "deepseek_v31": "deepseekv31",
        "deepseek_v32": "deepseekv32",
        "deepseek_v4": "deepseekv4",
        "minimax_m2": "minimax-m2",
        "muse_glimmer": "muse",
        "openai": "gpt-oss",
        "apertus": "apertus2509",
        "internlm": "interns1",
        "hunyuan_a13b": "hunyuan",
        "llama3_json": "llama3",
        "llama4_pythonic": "pythonic",
        "olmo3": "pythonic",
    }
)
_SAME_THOUGHTS = (
    *("cohere_command4", "gemma4", "glm45", "granite_thinking_parser", "kimi_k2", "ling3", "mimo", "mistral", "qwen3"),
    *("step3", "step3p5"),
)
REASONING_PARSERS: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in _SAME_THOUGHTS},
        "deepseek_r1": "deepseek-r1",
        "deepseek_v3": "deepseek-v3",
        "hunyuan_a13b": "hunyuan",
        "minimax_m2": "minimax",
        "nemotron_v3": "nemotron_3",
        "openai_gptoss": "gpt-oss",
    }
)
_KIND = Kind(
    "SGLang's parser",
    f"`{TOOL_FLAG[2:]}` in `gym_sglang_args`",
    f"`{REASONING_FLAG[2:]}` in `gym_sglang_args`",
    "Set `gym_sglang_args` to {'tool-call-parser': NAME}; SGLang's documentation has the parser of each model.",
)


@dataclass(frozen=True)
class SglangCommand:
    """SGLang's server behind our gateway. A `command.ServeCommand`."""

    model: str | Path
    flags: list[str]  # of `flags_from`
    python: str  # interpreter that has SGLang, of `find_python`
    environment: Mapping[str, str] = field(default_factory=dict)  # variables of both processes

    @cached_property
    def parsers(self) -> Parsers:
        """What reads the model's answers: as the flags say, or guessed. One without a name may still be found by
        SGLang."""
        told = {flag for flag in (TOOL_FLAG, REASONING_FLAG) if self._names(flag)}
        evidence = None if len(told) == 2 else read_evidence(self.model)
        tool = guess_tool_parser(None if TOOL_FLAG in told else evidence)
        thought = guess_reasoning_parser(None if REASONING_FLAG in told else evidence)
        return Parsers(_known(tool, TOOL_PARSERS), _known(thought, REASONING_PARSERS), _KIND)

    def _names(self, flag: str) -> bool:
        return any(word.partition("=")[0].replace("_", "-") == flag for word in self.flags)

    def _parser_flags(self) -> list[str]:
        chosen = {TOOL_FLAG: self.parsers.tool.name, REASONING_FLAG: self.parsers.reasoning.name}
        return [word for flag, name in chosen.items() if not self._names(flag) for word in (flag, name or _AUTO)]

    def check(self, host: str, api_key: str | None, environment: Mapping[str, str]) -> None:
        """Raises `ConfigError`: lists what would fail only after seconds of loading."""
        problems = [*model_problems(self.model, self.flags), *reach_problems(host, api_key)]
        if problems:
            raise ConfigError("The policy server cannot be started:", problems=problems)
        sglang_version(self.python)

    def words(self, *, host: str, port: int, listen_fd: int, name: str) -> list[str]:
        return [
            *(sys.executable, "-m", "trl_gym.policy_server.sglang", str(self.model)),
            *("--listen-fd", str(listen_fd), "--host", host, "--port", str(port)),
            *("--served-model-name", name, "--sglang-python", self.python),
            *_without_parser([*self._parser_flags(), *self.flags]),
        ]


def flags_from(sglang_args: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Return command line flags of `sglang.launch_server`, our defaults included.

    Args:
        sglang_args: Flag names (dashes or underscores, no leading dashes) → values: `True` is the bare flag, `False`
            and `None` leave it out, a list is several values, a dict is JSON. Or flags that are already a command
            line.

    Raises:
        ConfigError: A flag is ours to set; says why.

    Example:
        >>> flags_from({"context_length": 512, "disable-radix-cache": True})[-3:]
        ['--context-length', '512', '--disable-radix-cache']
    """
    if isinstance(sglang_args, Mapping):
        given = {name.lstrip("-").replace("_", "-"): value for name, value in sglang_args.items()}
        words = [word for name, value in given.items() if value is not False for word in flag_words(name, value)]
        names = set(given)
    else:
        words = home_words([str(word) for word in sglang_args or ()])
        names = {word[2:].partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    if problems := owned_flag_problems(names):
        raise ConfigError(f"These flags of SGLang are not to be given: {'; '.join(problems)}.", "Leave them out.")
    defaults = [word for name, value in DEFAULT_FLAGS.items() if name not in names for word in flag_words(name, value)]
    return [*defaults, *words]


def owned_flag_problems(names: set[str]) -> list[str]:
    """Say of each of these flags (without leading dashes) that is ours why it is."""
    return [f"{name} ({OWNED_FLAGS[name]})" for name in sorted(names & set(OWNED_FLAGS))]


def _known(guess: Parser, names: Mapping[str, str]) -> Parser:
    """Return SGLang's parser for a guess; none, of which nothing is said, where only SGLang may know one."""
    if guess.name is not None and guess.name in names:
        return Parser(names[guess.name], guess.why)
    return guess_tool_parser(None)


def _without_parser(words: list[str]) -> list[str]:
    """Leave parsers out that are named "none": SGLang has none where none is named."""
    kept = [word for word in words if word not in (f"{TOOL_FLAG}={NONE}", f"{REASONING_FLAG}={NONE}")]
    for flag in (TOOL_FLAG, REASONING_FLAG):
        if flag in kept and kept[kept.index(flag) + 1 :][:1] == [NONE]:
            del kept[kept.index(flag) : kept.index(flag) + 2]
    return kept


def find_python(given: str | None = None) -> str:
    """Return the interpreter that has SGLang: the one given, that of `TRL_GYM_SGLANG_PYTHON`, or our own. Raises
    `ConfigError`: it does not exist, or cannot be executed."""
    named = given or os.environ.get(PYTHON_VARIABLE)
    if not named:
        return sys.executable
    path = Path(os.path.abspath(Path(named).expanduser()))  # not resolved: the link selects a virtual environment
    source = "`gym_sglang_python`" if given else f"The environment variable {PYTHON_VARIABLE}"
    if not path.is_file():
        raise ConfigError(f"{source} names {path}, which does not exist.", "Name an interpreter that has SGLang.")
    if not os.access(path, os.X_OK):
        raise ConfigError(f"{source} names {path}, which is not executable.", "Name an interpreter that has SGLang.")
    return str(path)


def sglang_version(python: str) -> str:
    """Return the version of SGLang that an interpreter has, without importing it. Raises `ConfigError`: it has none,
    or cannot be run."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} cannot be run: {error}.", _REMEDY) from error
    if done.returncode != 0:
        raise ConfigError(f"{python} has no SGLang.", _REMEDY)
    return done.stdout.strip()
