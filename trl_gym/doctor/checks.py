"""What a check is, and how all of them are run: each one says everything that it finds, and none is left out because
another one failed, unless it needs what that one could not find.
"""

from __future__ import annotations

import logging
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from trl_gym.errors import TrlGymError

if TYPE_CHECKING:
    from trl_gym.doctor.context import Subject


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "not checked"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found.

    Attributes:
        status: See `Status`.
        text: What, and where.
        remedy: What to do about it; a command where there is one.
    """

    status: Status
    text: str
    remedy: str = ""


def ok(text: str) -> Finding:
    return Finding(Status.OK, text)


def warning(text: str, remedy: str) -> Finding:
    return Finding(Status.WARNING, text, remedy)


def failed(text: str, remedy: str) -> Finding:
    return Finding(Status.FAILED, text, remedy)


def skipped(text: str, remedy: str = "") -> Finding:
    return Finding(Status.SKIPPED, text, remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: Unique.
        run: Finds things; an error of ours that it raises is a finding too. Nothing where there is nothing to check.
        needs: Checks whose failure makes this one impossible.
    """

    name: str
    run: Callable[[Subject], Iterable[Finding]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the list.

    Attributes:
        name: Of the check; one that found several things has several lines.
        status: See `Status`.
        text: What, and where.
        remedy: What to do about it.
        seconds: That the whole check took.
    """

    name: str
    status: Status
    text: str
    remedy: str
    seconds: float


def run_checks(
    checks: Sequence[Check], subject: Subject, begin: Callable[[str], None] = lambda name: None
) -> Iterator[Entry]:
    """Run all checks, in order; yields what each found as soon as it has ended.

    Args:
        checks: A check comes after those that it needs.
        subject: What is examined.
        begin: Told the name of each check before it runs.
    """
    not_passed: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name in not_passed]
        begin(check.name)
        started = time.monotonic()
        findings = [skipped(f"needs {', '.join(missing)}")] if missing else find(check, subject)
        seconds = round(time.monotonic() - started, 3)
        if any(finding.status in (Status.FAILED, Status.SKIPPED) for finding in findings):
            not_passed.add(check.name)
        for finding in findings:
            yield Entry(check.name, finding.status, finding.text, finding.remedy, seconds)


def find(check: Check, subject: Subject) -> list[Finding]:
    """What one check finds. An exception ends that check only: it is one of the things that it found, and so is what
    trl-gym logs as a warning."""
    findings: list[Finding] = []
    subject.logged = []
    handler = _Listener(subject.logged)
    logging.getLogger("trl_gym").addHandler(handler)
    try:
        findings.extend(check.run(subject))
    except TrlGymError as error:
        findings += from_error(error)
    except Exception as error:  # from libraries, about files and machines of every kind
        findings.append(
            failed(f"{type(error).__name__}: {error}", "The message is a library's, which a training run calls too.")
        )
    finally:
        logging.getLogger("trl_gym").removeHandler(handler)
    return [*findings, *(warning(*split_remedy(message)) for message in subject.logged)]


class _Listener(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def from_error(error: TrlGymError, remedy: str = "") -> list[Finding]:
    """An error as findings: one for each point of an error that lists several.

    Args:
        error: To be told.
        remedy: For messages that name none.
    """
    head, *points = str(error).split("\n  - ")
    if points and head.rstrip().endswith(":"):
        return [failed(*split_remedy(point, remedy)) for point in points]
    return [failed(*split_remedy(str(error), remedy))]


def split_remedy(message: str, remedy: str = "") -> tuple[str, str]:
    """What is wrong, and what to do: our messages say it in that order, behind a semicolon or in a last sentence.

    Args:
        message: Of an error. What follows its first line (ends of logs) stays with the text.
        remedy: Where the message names none.
    """
    first, line_end, rest = message.strip().partition("\n")
    for separator in ("; ", ". ", ": "):
        what, found, action = first.rpartition(separator)
        if found and action.split(" ")[0].strip("`").lower() in _IMPERATIVES:
            return what + line_end + rest, action[0].upper() + action[1:]
    return message.strip(), remedy


_IMPERATIVES = frozenset(
    {"add", "ask", "change", "check", "choose", "create", "free", "give", "install", "leave", "load", "lower", "make"}
    | {"name", "pass", "point", "put", "raise", "remove", "restart", "run", "save", "set", "start", "unset", "use"}
    | {"wait", "write"}
)


# --------------------------------------------------------------------------------------------------------------------
# Findings as lines that people read, and as JSON.

_WIDTH = 99
_NAME_WIDTH = 18
_MARKS = {Status.OK: "ok", Status.WARNING: "warning", Status.FAILED: "FAILED", Status.SKIPPED: "not checked"}
_MARK_WIDTH = max(map(len, _MARKS.values()))
_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red", Status.SKIPPED: "dim"}


def passed(entries: Sequence[Entry]) -> bool:
    """Whether nothing failed; what is only warned of, or could not be checked, does not count."""
    return all(entry.status is not Status.FAILED for entry in entries)


def as_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """`{"ok": …, "checks": [{"name", "status", "text", "remedy", "seconds"}, …]}`."""
    return {"ok": passed(entries), "checks": [asdict(entry) for entry in entries]}


def show(entry: Entry, console: Console) -> None:
    """One finding; coloured in a terminal."""
    for number, line in enumerate(lines(entry)):
        text = Text(line)
        if number == 0:
            text.stylize(_STYLES[entry.status], 0, _MARK_WIDTH)
        console.print(text, soft_wrap=True)


def lines(entry: Entry) -> list[str]:
    """A finding as plain lines of less than 100 columns, as far as its words allow."""
    head = f"{_MARKS[entry.status]:<{_MARK_WIDTH}}  {entry.name:<{_NAME_WIDTH}}  "
    paragraphs = entry.text.splitlines() or [""]
    shown = _wrapped(paragraphs[0], head)
    for paragraph in paragraphs[1:]:
        shown += _wrapped(paragraph, " " * len(head))
    if entry.remedy:
        shown += _wrapped(f"→ {entry.remedy}", " " * len(head), hanging=2)
    return shown


def summary(entries: Sequence[Entry]) -> str:
    """The last line."""
    counts = Counter(entry.status for entry in entries)
    named = ", ".join(f"{counts[status]} {name}" for status, name in _COUNTED.items() if counts[status])
    return f"{'nothing failed' if passed(entries) else 'not ready'}: {named}"


_COUNTED = {Status.FAILED: "failed", Status.WARNING: "warnings", Status.SKIPPED: "not checked", Status.OK: "ok"}


def _wrapped(text: str, head: str, hanging: int = 0) -> list[str]:
    indent = " " * (len(head) + hanging)
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]
