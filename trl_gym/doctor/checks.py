"""All checks of the doctor, how they are run, and how what they found is shown.

Each check says everything that it finds, and none is left out because another one failed, unless it needs what that
one could not find.
"""

from __future__ import annotations

import logging
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from rich.console import Console
from rich.text import Text

from trl_gym.doctor import inputs, live, options, static
from trl_gym.doctor.context import Context, Finding, Status, failed, from_error, skipped, warning
from trl_gym.errors import TrlGymError


@dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    name: str  # unique
    # Finds things; an error of ours that it raises is a finding too. Nothing where there is nothing to check.
    run: Callable[[Context], Iterable[Finding]]
    needs: tuple[str, ...] = ()  # checks whose failure makes this one impossible
    when: Callable[[Context], bool] = lambda context: True  # whether a run has what is checked


_serves, _starts_policy, _starts_gym = map(attrgetter, ("serves", "starts_policy", "starts_gym"))
_attaches_policy, _attaches_gym = map(attrgetter, ("attaches_policy", "attaches_gym"))
_FILE = "options file"

CHECKS = (
    Check("python", static.python),
    Check("versions", static.versions),
    Check(_FILE, options.options_file),
    Check("options", options.options, (_FILE,)),
    Check("vllm", static.vllm_version, (_FILE,), _starts_policy),
    Check("processes", options.processes, (_FILE,)),
    Check("open files", options.open_files, (_FILE,), _serves),
    Check("devices", static.devices),
    Check("ports", static.ports, (_FILE,)),
    Check("gym interpreter", live.interpreter, (_FILE,), _starts_gym),
    Check("gym configs", live.configs, (_FILE, "gym interpreter"), _starts_gym),
    Check("gym head server", live.head_server, (_FILE,), _attaches_gym),
    Check("data script", inputs.data_script, (_FILE,)),
    Check("dataset rows", inputs.rows, (_FILE,)),
    Check("agents", inputs.agents, (_FILE,), _serves),
    Check("model", inputs.model, (_FILE,)),
    Check("tokenizer", inputs.tokenizer, (_FILE, "model")),
    Check("chat template", inputs.chat_template, (_FILE, "tokenizer")),
    Check("tool parser", inputs.tool_parser, (_FILE, "model"), _starts_policy),
    Check("context", inputs.context_length, (_FILE, "tokenizer")),
    Check("memory", static.memory_plan, (_FILE, "model"), _starts_policy),
    Check("shared memory", static.shared_memory, (_FILE, "model"), _serves),
    Check("vllm flags", live.flags, (_FILE, "model"), _starts_policy),
    Check("remote server", live.remote, (_FILE,), _attaches_policy),
    Check("folders", static.folders, (_FILE,)),
    Check("space", static.space, (_FILE, "model")),
    Check("reporting", static.reporting, (_FILE,)),
    Check("leftovers", static.leftovers, (_FILE,)),
    Check(
        "policy server", live.policy_server, ("options", "model", "tokenizer", "vllm flags", "remote server"), _serves
    ),
    Check("gym servers", live.gym_servers, ("options", "gym configs", "gym head server"), _serves),
    Check("token continuation", live.continuation, ("policy server", "gym servers"), _serves),
    Check("weight sync", live.weight_sync, ("token continuation",), _serves),
    Check("rollouts", live.rollouts, ("token continuation", "agents"), _serves),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the list: a finding with the name of its check and the seconds that the whole check took."""

    name: str
    status: Status
    text: str
    remedy: str
    seconds: float


def run_checks(
    checks: Sequence[Check], context: Context, begin: Callable[[str], None] = lambda name: None
) -> Iterator[Entry]:
    """Run all checks, in order; yield what each found as soon as it has ended.

    Args:
        checks: A check comes after those that it needs.
        context: The run that is examined.
        begin: Receives the name of each check before it runs.
    """
    not_passed: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name in not_passed]
        if not missing and not check.when(context):
            continue
        begin(check.name)
        started = time.monotonic()
        findings = [skipped(f"needs {', '.join(missing)}")] if missing else _find(check, context)
        seconds = round(time.monotonic() - started, 3)
        if any(finding.status in (Status.FAILED, Status.SKIPPED) for finding in findings):
            not_passed.add(check.name)
        for finding in findings:
            yield Entry(check.name, finding.status, finding.text, finding.remedy, seconds)


def _find(check: Check, context: Context) -> list[Finding]:
    """Run one check. An exception ends that check only and is one of its findings, and so is what trl-gym logs as a
    warning."""
    findings: list[Finding] = []
    context.logged = []
    handler = _Listener(context.logged)
    logging.getLogger("trl_gym").addHandler(handler)
    try:
        findings.extend(check.run(context))
    except TrlGymError as error:
        findings += from_error(error)
    except Exception as error:  # from libraries, about files and machines of every kind
        findings.append(
            failed(f"{type(error).__name__}: {error}", "The message is a library's, which a training run calls too.")
        )
    finally:
        logging.getLogger("trl_gym").removeHandler(handler)
    return [*findings, *map(warning, context.logged)]


class _Listener(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


# -- what people and programs read ------------------------------------------------------------------------------------

_WIDTH = 99
_NAME_WIDTH = 18
_MARKS = {Status.OK: "ok", Status.WARNING: "warning", Status.FAILED: "FAILED", Status.SKIPPED: "not checked"}
_MARK_WIDTH = max(map(len, _MARKS.values()))
_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red", Status.SKIPPED: "dim"}
_COUNTED = {Status.FAILED: "failed", Status.WARNING: "warnings", Status.SKIPPED: "not checked", Status.OK: "ok"}


def passed(entries: Sequence[Entry]) -> bool:
    """Return whether nothing failed; what is only warned of, or could not be checked, does not count."""
    return all(entry.status is not Status.FAILED for entry in entries)


def as_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return `{"ok": …, "checks": [{"name", "status", "text", "remedy", "seconds"}, …]}`."""
    return {"ok": passed(entries), "checks": [asdict(entry) for entry in entries]}


def show(entry: Entry, console: Console) -> None:
    """Print one finding; coloured in a terminal."""
    for number, line in enumerate(lines(entry)):
        text = Text(line)
        if number == 0:
            text.stylize(_STYLES[entry.status], 0, _MARK_WIDTH)
        console.print(text, soft_wrap=True)


def lines(entry: Entry) -> list[str]:
    """Return a finding as plain lines of less than 100 columns, as far as its words allow."""
    head = f"{_MARKS[entry.status]:<{_MARK_WIDTH}}  {entry.name:<{_NAME_WIDTH}}  "
    first, *others = entry.text.splitlines() or [""]
    shown = _wrapped(first, head)
    for paragraph in others:
        shown += _wrapped(paragraph, " " * len(head))
    if entry.remedy:
        shown += _wrapped(f"→ {entry.remedy}", " " * len(head), hanging=2)
    return shown


def summary(entries: Sequence[Entry]) -> str:
    """Return the last line."""
    counts = Counter(entry.status for entry in entries)
    named = ", ".join(f"{counts[status]} {name}" for status, name in _COUNTED.items() if counts[status])
    return f"{'nothing failed' if passed(entries) else 'not ready'}: {named}"


def _wrapped(text: str, head: str, hanging: int = 0) -> list[str]:
    indent = " " * (len(head) + hanging)
    wrapped = textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [head.rstrip()]
