"""Findings as lines that people read, and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from trl_gym.doctor.checks import Entry, Status

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
