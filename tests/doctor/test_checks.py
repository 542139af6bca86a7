"""How checks are run, how errors become findings, and how findings are shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from trl_gym.doctor.checks import CHECKS, Check, Entry, as_json, lines, passed, run_checks, summary
from trl_gym.doctor.context import Context, Finding, Status, failed, from_error, ok
from trl_gym.doctor.context import skipped as not_checked
from trl_gym.errors import ConfigError, PolicyServerError, Problem


def entries(*checks: Check) -> list[Entry]:
    return list(run_checks(checks, Context(argv=[])))


def test_a_failure_stops_only_what_needs_it() -> None:
    found = entries(
        Check("a", lambda context: [failed("broken", "fix it")]),
        Check("b", lambda context: [ok("never asked")], ("a",)),
        Check("c", lambda context: [ok("never asked")], ("b",)),
        Check("d", lambda context: [ok("fine")]),
        Check("e", lambda context: [], ()),
        Check("f", lambda context: [ok("fine")], ("e",)),
    )
    assert [(one.name, one.status, one.text) for one in found] == [
        ("a", Status.FAILED, "broken"),
        ("b", Status.SKIPPED, "needs a"),
        ("c", Status.SKIPPED, "needs b"),
        ("d", Status.OK, "fine"),
        ("f", Status.OK, "fine"),
    ]


def test_what_was_found_before_an_exception_is_kept() -> None:
    def broken(context: Context) -> Iterator[Finding]:
        yield ok("the first part")
        raise OSError("disk on fire")

    found = entries(Check("a", broken))
    assert [(one.status, one.text) for one in found] == [
        (Status.OK, "the first part"),
        (Status.FAILED, "OSError: disk on fire"),
    ]


def test_warnings_that_are_logged_are_findings() -> None:
    def logs(context: Context) -> Iterator[Finding]:
        logging.getLogger("trl_gym.somewhere").warning("%s is odd; set it to 2", "`a`")
        yield ok("done" if context.logged else "unheard")

    found = entries(Check("a", logs), Check("b", lambda context: [ok("fine")]))
    assert [(one.name, one.status, one.text, one.remedy) for one in found] == [
        ("a", Status.OK, "done", ""),
        ("a", Status.WARNING, "`a` is odd; set it to 2", ""),
        ("b", Status.OK, "fine", ""),
    ]


def test_interruption_ends_the_examination() -> None:
    def interrupted(context: Context) -> Iterator[Finding]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        entries(Check("a", interrupted))


def test_an_error_is_one_finding_for_each_of_its_problems() -> None:
    error = ConfigError("2 problems:", problems=[Problem("`a` is 1.", "Set it to 2."), Problem("`b` is odd.")])
    assert [(one.status, one.text, one.remedy) for one in from_error(error, "Look.")] == [
        (Status.FAILED, "`a` is 1.", "Set it to 2."),
        (Status.FAILED, "`b` is odd.", "Look."),
    ]
    [gone] = from_error(PolicyServerError("It died; set x.\nThe end of its log", "Restart it."))
    assert (gone.text, gone.remedy) == ("It died; set x.\nThe end of its log", "Restart it.")


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
