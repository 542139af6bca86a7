"""What the checks found, as people and programs read it: lines, the last words, one JSON object, the exit status.

A run is ready when everything that it needs was checked and nothing failed. What was not checked is never taken for
well: it is counted and named, with its reason, and a run of which something essential was not checked is not ready.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from rich.console import Console
from rich.text import Text

from trl_gym import compat
from trl_gym.doctor.context import Status, failed, warning
from trl_gym.redaction import without_secrets

MAX_WIDTH = 99  # columns
_NAME_WIDTH = 18
_MARKS = {Status.OK: "ok", Status.WARNING: "warning", Status.FAILED: "FAILED", Status.SKIPPED: "not checked"}
_MARK_WIDTH = max(map(len, _MARKS.values()))
_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red", Status.SKIPPED: "dim"}


class Verdict(IntEnum):
    """Whether a run may start; the number is the exit status of the command."""

    READY = 0
    FAILED = 1
    UNKNOWN = 3  # nothing failed, and something that the run needs was not checked; 2 is that of wrong arguments


_SAID = {
    Verdict.READY: "ready: nothing failed, and everything that the run needs was checked",
    Verdict.FAILED: "not ready",
    Verdict.UNKNOWN: "not known to be ready: nothing failed, and not everything that the run needs was checked",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the list: a finding with the name of its check and the seconds that the whole check took."""

    name: str
    status: Status
    text: str
    remedy: str
    seconds: float
    is_essential: bool = True  # whether a run can fail for what was not checked here
    because: tuple[str, ...] = ()  # checks whose failure, or option that, kept this one from being made

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", without_secrets(self.text))
        object.__setattr__(self, "remedy", without_secrets(self.remedy))

    def as_json(self) -> dict[str, Any]:
        names = ("name", "status", "text", "remedy", "seconds")
        return {name: getattr(self, name) for name in names}


def not_importable(error: Exception) -> list[Entry]:
    """Say why the checks cannot even be imported.

    Args:
        error: Of the import. Where packages do not fit together, what is wrong with them is told instead: upstream's
            words name whatever was asked for first.
    """
    wrong, newer = compat.version_problems()
    found = [failed(one.text, one.remedy) for one in wrong]
    if not wrong:
        text = f"{type(error).__name__}: {error}"
        found = [failed(text, "Install trl-gym into an empty environment, as its README says, and run this there.")]
    found += [warning(one.text, one.remedy) for one in newer]
    told = [Entry("versions", one.status, one.text, one.remedy, 0.0) for one in found]
    return [*told, Entry("all other checks", Status.SKIPPED, "they cannot be imported", "", 0.0)]


def verdict(entries: Iterable[Entry]) -> Verdict:
    """Judge a whole examination."""
    entries = list(entries)
    if any(entry.status is Status.FAILED for entry in entries):
        return Verdict.FAILED
    unchecked = any(entry.status is Status.SKIPPED and entry.is_essential for entry in entries)
    return Verdict.UNKNOWN if unchecked else Verdict.READY


def as_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return `{"ok", "verdict", "not_checked", "checks"}`; `ok` is true when the exit status is 0."""
    judged = verdict(entries)
    return {
        "ok": judged is Verdict.READY,
        "verdict": judged.name.lower(),
        "not_checked": names_of(entries, Status.SKIPPED),
        "checks": [entry.as_json() for entry in entries],
    }


def names_of(entries: Iterable[Entry], status: Status) -> list[str]:
    """Return the names of checks with a finding of this status, each once."""
    return list(dict.fromkeys(entry.name for entry in entries if entry.status is status))


# -- lines ------------------------------------------------------------------------------------------------------------


def show(entry: Entry, console: Console) -> None:
    """Print one finding; coloured in a terminal. What another check kept from being made is left to `summary`."""
    if entry.because:
        return
    for number, line in enumerate(lines(entry, _width(console))):
        text = Text(line)
        if number == 0:
            text.stylize(_STYLES[entry.status], 0, _MARK_WIDTH)
        console.print(text, soft_wrap=True)


def show_summary(entries: Sequence[Entry], console: Console) -> None:
    """Print the last lines; the first of them, the verdict, stands out in a terminal."""
    styles = {Verdict.READY: "bold green", Verdict.FAILED: "bold red", Verdict.UNKNOWN: "bold yellow"}
    first, *others = summary(entries, _width(console))
    console.print(Text(first, styles[verdict(entries)]), soft_wrap=True)
    for line in others:
        console.print(Text(line), soft_wrap=True)


def _width(console: Console) -> int:
    return min(MAX_WIDTH, console.width - 1) if console.is_terminal else MAX_WIDTH


def lines(entry: Entry, width: int = MAX_WIDTH) -> list[str]:
    """Return a finding as plain lines of at most so many columns, as far as its words allow."""
    head = f"{_MARKS[entry.status]:<{_MARK_WIDTH}}  {entry.name:<{_NAME_WIDTH}}  "
    first, *others = entry.text.splitlines() or [""]
    shown = _wrapped(first, head, width)
    for paragraph in others:
        shown += _wrapped(paragraph, " " * len(head), width)
    if entry.remedy:
        shown += _wrapped(f"→ {entry.remedy}", " " * len(head), width, hanging=2)
    return shown


def summary(entries: Sequence[Entry], width: int = MAX_WIDTH) -> list[str]:
    """Return the last lines: the verdict, what was counted, and the names of what failed and what was not checked."""
    failed, unchecked = names_of(entries, Status.FAILED), names_of(entries, Status.SKIPPED)
    counted = [
        f"{len(failed)} failed" if failed else "",
        f"{len(unchecked)} not checked" if unchecked else "",
        _several(len(names_of(entries, Status.WARNING)), "warning"),
        f"{len(_fine(entries))} ok",
    ]
    shown = _wrapped(f"{_SAID[verdict(entries)]} ({', '.join(filter(None, counted))})", "", width)
    if failed:
        shown += _wrapped(f"failed: {', '.join(failed)}", "  ", width)
    if unchecked:
        shown += _wrapped(f"not checked: {'; '.join(_reasons(entries))}", "  ", width)
    return shown


def _fine(entries: Sequence[Entry]) -> list[str]:
    others = {entry.name for entry in entries if entry.status is not Status.OK}
    return [name for name in names_of(entries, Status.OK) if name not in others]


def _reasons(entries: Sequence[Entry]) -> list[str]:
    """Group what was not checked by why; what has a line of its own says why there."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        if entry.status is Status.SKIPPED:
            names = groups.setdefault(entry.because, [])
            if entry.name not in names:
                names.append(entry.name)
    return [
        ", ".join(names) + (f" (because of {', '.join(because)})" if because else "")
        for because, names in groups.items()
    ]


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'s' if count > 1 else ''}" if count else ""


def _wrapped(text: str, head: str, width: int, hanging: int = 0) -> list[str]:
    indent = " " * (len(head) + hanging)
    wrapped = textwrap.wrap(
        text, width, initial_indent=head, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [head.rstrip()]
