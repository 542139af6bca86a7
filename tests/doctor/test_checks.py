"""How checks are run, and how errors become findings."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from trl_gym.doctor.checks import CHECKS, Check, run_checks
from trl_gym.doctor.context import LEFT_OUT, Context, Finding, Status, failed, from_error, ok
from trl_gym.doctor.outcome import Entry
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
    assert [one.because for one in found] == [(), ("a",), ("a",), (), ()]  # the root, not the check before


def test_what_quick_leaves_out_is_told_apart_from_what_failed() -> None:
    found = entries(
        Check("server", lambda context: [LEFT_OUT]),
        Check("model", lambda context: [failed("gone", "get it")]),
        Check("sync", lambda context: [], ("server",)),
        Check("rollouts", lambda context: [], ("sync", "model")),
    )
    assert [one.because for one in found] == [("--quick",), (), ("--quick",), ("--quick", "model")]


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
