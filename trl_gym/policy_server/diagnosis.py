"""Why a server process ended, from its log: the line that says it, and what to do about it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

_MAX_LOG_BYTES = 512 * 1024  # from the end; the cause is followed by a few hundred lines of consequences

# An exception as a traceback ends, argparse's last word, or one of our own refusals; vLLM puts "(EngineCore pid=7)
# ERROR 11-22 12:00:00 [core.py:1] " in front.
_PREFIX = re.compile(r"^(?:\((?:\w+)(?: \w+)* pid=\d+\) )?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]+\] )?")
_CAUSE = re.compile(r"^(?:[\w.]*(?:Error|Exception)(?:: .+|$)|(?:[\w. -]+: )?error: .+)")
_PYDANTIC = re.compile(r"validation errors? for \w+$")  # the reason is on the next line

# Said by processes that only notice that another one failed.
_CONSEQUENCES = ("Engine core initialization failed", "Engine core proc", "WorkerProc initialization failed")

_HINTS: list[tuple[str, str]] = [
    (r"Repo id must be in the form", "a path that was given does not exist on this machine"),
    (
        r"greater than the derived max_model_len",
        "max-model-len is more than the model was made for (max_position_embeddings in its config.json)",
    ),
    (
        r"unrecognized arguments",
        "this vLLM does not know that flag; `vllm serve --help=all` lists those that it knows",
    ),
    (
        r"[Ii]nvalid tool call parser",
        "the message lists the names that vLLM knows; see also --tool-parser-plugin",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache|KV cache is needed|"
        r"(?:estimated maximum model length|max seq len)",
        "the KV cache is too small: lower max-model-len, or give it more memory (gpu-memory-utilization; on CPU "
        "kv-cache-memory-bytes or the environment variable VLLM_CPU_KVCACHE_SPACE, in GiB)",
    ),
    (
        r"out of memory|OutOfMemoryError|Free memory on device|Cannot allocate memory|MemoryError",
        "out of memory: lower gpu-memory-utilization or max-model-len, or end what else uses this device",
    ),
    (
        r"are not supported for now|architectures .* failed to be inspected|does not recognize this architecture|"
        r"no vLLM implementation",
        "this version of vLLM cannot serve the architecture named in the model's config.json",
    ),
    (r"chat template", "give --chat-template FILE, or save the tokenizer with its chat_template"),
    (r"[Aa]ddress already in use|cannot listen on", "the port is taken; choose another or leave it at 0"),
    (
        r"tokenizer",
        "the model folder's tokenizer cannot be loaded; save it again with tokenizer.save_pretrained(folder)",
    ),
    (
        r"weight transfer backend",
        "the plugin of trl-gym was not loaded by vLLM; VLLM_PLUGINS, if set, must contain `trl_gym`",
    ),
]

# Causes that lie in the configuration: flags, files and names do not change by trying again, memory and ports may.
_LASTING = (
    r"Repo id must be in the form|greater than the derived max_model_len|unrecognized arguments|"
    r"[Ii]nvalid tool call parser|are not supported for now|architectures .* failed to be inspected|"
    r"does not recognize this architecture|no vLLM implementation|weight transfer backend|"
    r"^FileNotFoundError|is not supported: |: error: argument "
)


def find_cause(log: str) -> str | None:
    """The line that names the cause, without vLLM's prefixes; `None` if no line looks like one.

    The *first* exception that is not a consequence counts: what comes later was raised while handling it, or by a
    process that only noticed. Of lines that repeat it, none adds anything.
    """
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    causes = [_whole(line, following) for line, following in pairwise([*lines, ""]) if _CAUSE.match(line)]
    primary = [line for line in causes if not any(phrase in line for phrase in _CONSEQUENCES)]
    if not (primary or causes):
        return None
    cause = (primary or causes)[0]
    return cause if len(cause) <= 1000 else f"{cause[:1000]} …"


def hint_for(cause: str) -> str | None:
    """What to do about it, for the causes that are known."""
    return next((hint for pattern, hint in _HINTS if re.search(pattern, cause)), None)


def explain(log_path: Path) -> str:
    """`"<cause>\\nHint: <hint>"` as far as known, else an empty string."""
    cause = _cause_in(log_path)
    if cause is None:
        return ""
    hint = hint_for(cause)
    return f"{cause}\nHint: {hint}" if hint else cause


def would_die_again(log_path: Path) -> bool:
    """Whether a server that ended while it started did so for a reason that another start does not change."""
    cause = _cause_in(log_path)
    return cause is not None and re.search(_LASTING, cause) is not None


def _cause_in(log_path: Path) -> str | None:
    with open(log_path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _MAX_LOG_BYTES))
        return find_cause(file.read().decode(errors="replace"))


def _whole(line: str, following: str) -> str:
    if _PYDANTIC.search(line):
        line = f"{line}: {following.strip().partition(' [type=')[0]}"
    return line.strip()
