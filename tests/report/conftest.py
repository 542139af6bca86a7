"""One browser and one page of a made-up run for all tests of the viewer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.report.browser import Browser, browser
from tests.report.synthetic import write_run
from trl_gym.report import open_run, write_page


@dataclass(frozen=True, slots=True)
class Viewed:
    """A run and its page."""

    folder: Path
    records: list[dict[str, Any]]
    page: Path


@pytest.fixture(scope="package")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    folder = tmp_path_factory.mktemp("viewed") / "run <b>&amp;"  # a name that needs escaping
    records = write_run(folder)
    page = folder / "view.html"
    write_page(open_run(folder), page)
    return Viewed(folder, records, page)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    with browser() as own:
        own.resize(1280, 860)
        yield own
