"""How checks are run, how errors become findings, and how findings are shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.commands.doctor import CHECKS
from trl_gym.doctor.checks import (
    Check,
    Entry,
    Finding,
    Status,
    as_json,
    failed,
    from_error,
    lines,
    ok,
    passed,
    run_checks,
    split_remedy,
    summary,
)
from trl_gym.doctor.checks import skipped as not_checked
from trl_gym.doctor.context import Subject
from trl_gym.errors import ConfigError, PolicyServerError


def entries(*checks: Check) -> list[Entry]:
    return list(run_checks(checks, Subject(argv=[])))


def test_a_failure_stops_only_what_needs_it() -> None:
    found = entries(
        Check("a", lambda subject: [failed("broken", "mend it")]),
        Check("b", lambda subject: [ok("never asked")], ("a",)),
        Check("c", lambda subject: [ok("never asked")], ("b",)),
        Check("d", lambda subject: [ok("fine")]),
        Check("e", lambda subject: [], ()),
        Check("f", lambda subject: [ok("fine")], ("e",)),
    )
    assert [(one.name, one.status, one.text) for one in found] == [
        ("a", Status.FAILED, "broken"),
        ("b", Status.SKIPPED, "needs a"),
        ("c", Status.SKIPPED, "needs b"),
        ("d", Status.OK, "fine"),
        ("f", Status.OK, "fine"),
    ]


def test_what_was_found_before_an_exception_is_kept() -> None:
    def broken(subject: Subject) -> Iterator[Finding]:
        yield ok("the first part")
        raise OSError("disk on fire")

    found = entries(Check("a", broken))
    assert [(one.status, one.text) for one in found] == [
        (Status.OK, "the first part"),
        (Status.FAILED, "OSError: disk on fire"),
    ]


def test_warnings_that_are_logged_are_findings() -> None:
    def logs(subject: Subject) -> Iterator[Finding]:
        logging.getLogger("trl_gym.somewhere").warning("%s is odd; set it to 2", "`a`")
        yield ok("done" if subject.logged else "unheard")

    found = entries(Check("a", logs), Check("b", lambda subject: [ok("fine")]))
    assert [(one.name, one.status, one.text, one.remedy) for one in found] == [
        ("a", Status.OK, "done", ""),
        ("a", Status.WARNING, "`a` is odd", "Set it to 2"),
        ("b", Status.OK, "fine", ""),
    ]


def test_interruption_ends_the_examination() -> None:
    def interrupted(subject: Subject) -> Iterator[Finding]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        entries(Check("a", interrupted))


LOG = "died: exit code 1. Last lines of its log:\n\n    set x"


@pytest.mark.parametrize(
    ("message", "what", "remedy"),
    [
        ("`a` is 1; choose one of b, c.", "`a` is 1", "Choose one of b, c."),
        ("nothing answers. Start it with `x`", "nothing answers", "Start it with `x`"),
        ("it is odd; nobody knows why", "it is odd; nobody knows why", "default"),
        (LOG, LOG, "default"),
    ],
)
def test_messages_are_parted_into_what_and_remedy(message: str, what: str, remedy: str) -> None:
    assert split_remedy(message, "default") == (what, remedy)


@given(st.text(min_size=1).filter(str.strip))
def test_no_word_of_a_message_is_lost(message: str) -> None:
    what, remedy = split_remedy(message)
    assert set(
        message.strip().rstrip(".").lower().replace(";", " ").replace(".", " ").replace(":", " ").split()
    ) <= set(f"{what} {remedy}".lower().replace(";", " ").replace(".", " ").replace(":", " ").split())


def test_an_error_with_several_points_is_several_findings() -> None:
    error = ConfigError("2 problem(s) in the options:\n  - `a` is 1; set it to 2.\n  - `b` is there; remove it.")
    assert [(one.text, one.remedy) for one in from_error(error)] == [
        ("`a` is 1", "Set it to 2."),
        ("`b` is there", "Remove it."),
    ]
    assert [one.remedy for one in from_error(PolicyServerError("gone"), "Look.")] == ["Look."]


def test_a_check_comes_after_those_that_it_needs() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for index, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:index]), check.name


def test_lines_are_short_and_whole() -> None:
    entry = Entry(
        "dataset rows", Status.FAILED, "many words " * 30 + "\nan end of a log", "do this and that " * 12, 0.1
    )
    shown = lines(entry)
    assert all(len(line) < 100 for line in shown)
    assert shown[0].startswith("FAILED       dataset rows  ")
    assert " ".join(" ".join(shown).split()).endswith("do this and that")
    assert any(line.strip() == "an end of a log" for line in shown)


def test_warnings_and_unchecked_things_are_no_failures() -> None:
    some = entries(Check("a", lambda s: [Finding(Status.WARNING, "w", "r"), not_checked("no")]))
    assert passed(some) and as_json(some)["ok"] is True
    assert summary(some) == "nothing failed: 1 warnings, 1 not checked"
    some += entries(Check("b", lambda s: [failed("x", "y")]))
    assert not passed(some) and summary(some).startswith("not ready: 1 failed")
    assert as_json(some)["checks"][-1] == {
        "name": "b",
        "status": "failed",
        "text": "x",
        "remedy": "y",
        "seconds": some[-1].seconds,
    }
