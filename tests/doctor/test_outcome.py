"""What was found is shown, counted, judged and written as JSON; what was not checked is never taken for well."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trl_gym import compat
from trl_gym.doctor.context import Status
from trl_gym.doctor.outcome import Entry, Verdict, as_json, lines, not_importable, show, summary, verdict
from trl_gym.errors import Problem


def entry(name: str, status: Status, *because: str, essential: bool = True, text: str = "text") -> Entry:
    return Entry(name, status, text, "Do it." if status is Status.FAILED else "", 0.1, essential, because)


OK, WARNING = entry("python", Status.OK), entry("space", Status.WARNING)
FAILED, SKIPPED = entry("model", Status.FAILED), entry("agents", Status.SKIPPED)
UNIMPORTANT = entry("reporting", Status.SKIPPED, essential=False)


def test_lines_are_short_and_whole() -> None:
    told = Entry("rows", Status.FAILED, "many words " * 30 + "\nan end of a log", "do this and that " * 12, 0.1)
    for width in (99, 79):
        shown = lines(told, width)
        assert all(len(line) <= width for line in shown)
        assert shown[0].startswith("FAILED       rows  ")
        assert " ".join(" ".join(shown).split()).endswith("do this and that")
        assert any(line.strip() == "an end of a log" for line in shown)


@given(st.lists(st.sampled_from((OK, WARNING, FAILED, SKIPPED, UNIMPORTANT))))
def test_only_a_run_that_was_examined_whole_is_ready(entries: list[Entry]) -> None:
    judged = verdict(entries)
    assert (judged is Verdict.FAILED) == (FAILED in entries)
    assert (judged is Verdict.READY) == (FAILED not in entries and SKIPPED not in entries)
    assert (int(judged) == 0) == (judged is Verdict.READY) == as_json(entries)["ok"]
    for name in {one.name for one in entries if one.status in (Status.FAILED, Status.SKIPPED)}:
        assert name in " ".join(summary(entries))


def test_the_last_lines_count_and_name() -> None:
    assert summary([OK, WARNING, UNIMPORTANT], 200) == [
        "ready: nothing failed, and everything that the run needs was checked (1 not checked, 1 warning, 1 ok)",
        "  not checked: reporting",
    ]
    assert summary([OK, SKIPPED], 200)[0].startswith("not known to be ready: nothing failed, and not everything")
    needs_model = [entry(name, Status.SKIPPED, "model") for name in ("tokenizer", "context")]
    left_out = [entry("gym servers", Status.SKIPPED, "--quick")]
    assert summary([OK, FAILED, *needs_model, SKIPPED, *left_out], 200) == [
        "not ready (1 failed, 4 not checked, 1 ok)",
        "  failed: model",
        "  not checked: tokenizer, context (because of model); agents; gym servers (because of --quick)",
    ]
    several = [OK, entry("python", Status.WARNING)]  # a check that found two things is one check
    assert "(1 warning, 0 ok)" in summary(several)[0]


def test_what_another_check_kept_from_being_made_has_no_line() -> None:
    console = Console(file=io.StringIO(), width=200)
    for one in (OK, SKIPPED, entry("context", Status.SKIPPED, "model")):
        show(one, console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().split() == ["ok", "python", "text", "not", "checked", "agents", "text"]


def test_json_has_everything() -> None:
    assert as_json([FAILED, SKIPPED]) == {
        "ok": False,
        "verdict": "failed",
        "not_checked": ["agents"],
        "checks": [
            {"name": "model", "status": "failed", "text": "text", "remedy": "Do it.", "seconds": 0.1},
            {"name": "agents", "status": "not checked", "text": "text", "remedy": "", "seconds": 0.1},
        ],
    }


def test_packages_that_keep_the_checks_from_being_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream says `cannot import name 'is_kubeflow_available'`, or any other one."""
    error = ModuleNotFoundError("Could not import module 'PreTrainedModel'")
    first, last = not_importable(error)
    assert "Could not import module" in first.text and first.remedy  # nothing that we know of: the library's words
    assert last.status is Status.SKIPPED
    trap = Problem("torchvision 0.28.0+cu130 is installed beside torch 2.13.0+cpu.", "Run `pip uninstall …`.")
    monkeypatch.setattr(compat, "torchvision_problem", lambda: trap)
    first, _ = told = not_importable(error)
    assert (first.text, first.remedy) == (trap.text, trap.remedy) and verdict(told) is Verdict.FAILED
