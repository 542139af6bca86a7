"""A run in a notebook: the page of `trl-gym view` in a frame that cannot reach the notebook."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from pathlib import Path

from trl_gym.report.page import PageOptions, render
from trl_gym.report.source import open_run

DEFAULT_MAX_ROLLOUTS = 500  # a notebook keeps its outputs, and so every megabyte of this one


@dataclass(frozen=True, slots=True)
class RunView:
    """What `show` returns. A notebook displays it as the last value of a cell.

    Attributes:
        document: The page.
        height: Of the frame, in pixels.
    """

    document: str
    height: int

    def _repr_html_(self) -> str:
        # Scripts only: with an origin of its own the frame can read nothing of the notebook, nor start anything in it.
        return (
            f'<iframe srcdoc="{html.escape(self.document)}" sandbox="allow-scripts" title="trl-gym view" '
            f'style="width:100%;height:{self.height}px;border:1px solid #8884;border-radius:6px"></iframe>'
        )

    def __repr__(self) -> str:
        return f"RunView({len(self.document) / 1e6:.1f} MB; shown by a notebook, or write it with `trl-gym view`)"


def show(
    run: str | Path,
    *,
    max_rollouts: int | None = DEFAULT_MAX_ROLLOUTS,
    tokenizer: str | Path | None = None,
    height: int = 720,
) -> RunView:
    """The run's page, for a notebook.

    Args:
        run: Its output folder.
        max_rollouts: See `PageOptions`. The notebook's file grows with it.
        tokenizer: A `tokenizer.json` or the folder of one; None takes the run's own.
        height: In pixels.

    Raises:
        ConfigError: There is no such run, or nothing in it yet.
    """
    buffer = io.BytesIO()
    render(open_run(run, tokenizer), buffer, PageOptions(max_rollouts=max_rollouts))
    return RunView(buffer.getvalue().decode(), height)
