"""Runs notebooks in a real kernel, in a folder of their own that looks like the checkout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("01_first_rollouts", "02_train_and_compare", "03_write_an_environment", "04_debug_a_run")
CELL_TIMEOUT_S = 240


def workspace(folder: Path) -> Path:
    """A folder in which notebooks find recipes and the small policy, and write below it."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "runs").mkdir()
    (folder / "recipes").symlink_to(ROOT / "recipes")
    if (ROOT / "runs" / "small_policy").is_dir():
        (folder / "runs" / "small_policy").symlink_to(ROOT / "runs" / "small_policy")
    return folder


class RunningNotebook:
    """A notebook with its kernel.

    Args:
        name: Without the ending.
        folder: See `workspace`.
        parameters: Assignments that take the place of the cell tagged `parameters`.
    """

    def __init__(self, name: str, folder: Path, parameters: Mapping[str, Any] | None = None) -> None:
        self.notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        cells = [cell for cell in self.notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        for cell in cells if parameters is not None else []:
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        path = {"metadata": {"path": str(folder / "notebooks")}}
        self.client = NotebookClient(self.notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources=path)

    @contextlib.contextmanager
    def kernel(self) -> Iterator[RunningNotebook]:
        """The kernel is shut down at the end as Jupyter does it."""
        with self.client.setup_kernel():
            yield self

    def run(self, *, last: bool = False) -> None:
        """Execute the cells in order: all but those tagged `stop`, or with `last` those only."""
        for index, cell in enumerate(self.notebook.cells):
            if cell.cell_type == "code" and ("stop" in cell.metadata.get("tags", [])) == last:
                self.client.execute_cell(cell, index)

    def evaluate(self, expression: str) -> str:
        """The text of a value in the kernel."""
        cell = nbformat.v4.new_code_cell(f"print({expression})")
        self.notebook.cells.append(cell)
        self.client.execute_cell(cell, len(self.notebook.cells) - 1)
        return "".join(output.text for output in cell.outputs if output.get("name") == "stdout").strip()

    @property
    def text(self) -> str:
        """Everything that the cells printed or returned as text."""
        return "\n".join(
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for cell in self.notebook.cells
            for output in cell.get("outputs", [])
        )

    def outputs(self, kind: str) -> list[str]:
        """Displayed values of a MIME type, in order."""
        return [
            output["data"][kind]
            for cell in self.notebook.cells
            for output in cell.get("outputs", [])
            if kind in output.get("data", {})
        ]
