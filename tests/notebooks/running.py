"""Runs notebooks in a real kernel, in a folder of their own, and compares what comes out with what is stored in git.

Outputs are stored for readers. With STORE_OUTPUTS=1 in the environment `tests/e2e/test_notebooks.py` writes them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("01_first_rollouts", "02_train_and_compare", "03_write_an_environment", "04_debug_a_run")
CELL_TIMEOUT_S = 240
STORES = bool(os.environ.get("STORE_OUTPUTS"))
_BARS = re.compile(r"(?:\s*[\w ]+: +\d+%\|[^\r\n]*)*\s*")  # of transformers
_FRAME = "<i>Here is the viewer, in a frame, when the cell is run.</i>"


def workspace(folder: Path) -> Path:
    """A folder for notebooks, outside of the checkout."""
    (folder / "notebooks").mkdir(parents=True)
    return folder


class RunningNotebook:
    """A notebook with its kernel.

    Args:
        name: Without the ending.
        folder: See `workspace`.
        parameters: Assignments that take the place of the cell tagged `parameters`.
    """

    def __init__(self, name: str, folder: Path, parameters: Mapping[str, Any] | None = None) -> None:
        self.name, self.folder = name, folder
        self.notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        cells = [cell for cell in self.notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        for cell in cells if parameters is not None else []:
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        path = {"metadata": {"path": str(folder / "notebooks")}}
        self.client = NotebookClient(self.notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources=path)

    @contextlib.contextmanager
    def kernel(self, **how: Any) -> Iterator[RunningNotebook]:
        """A kernel of its own, shut down at the end as Jupyter does it."""
        with self.client.setup_kernel(**how):
            yield self

    def take_kernel(self, other: RunningNotebook) -> None:
        """Run in the kernel of another one, which has imported much and forgets its names."""
        self.client.km, self.client.kc = other.client.km, other.client.kc
        self.execute("%reset -f")

    def execute(self, source: str) -> Any:
        """Execute what is in none of its cells; return the outputs."""
        cell = nbformat.v4.new_code_cell(source)
        self.notebook.cells.append(cell)
        self.client.execute_cell(cell, len(self.notebook.cells) - 1)
        return self.notebook.cells.pop().outputs

    def run(self, *, last: bool = False) -> None:
        """Execute the cells in order: all but those tagged `stop`, or with `last` those only."""
        for index, cell in enumerate(self.notebook.cells):
            if cell.cell_type == "code" and ("stop" in cell.metadata.get("tags", [])) == last:
                self.client.execute_cell(cell, index)

    def evaluate(self, expression: str) -> str:
        """The text of a value in the kernel."""
        outputs = self.execute(f"print({expression})")
        return "".join(output.text for output in outputs if output.get("name") == "stdout").strip()

    def check_stored(self) -> None:
        """Compare what the cells put out with what git has, by shape; with `STORES`, store it."""
        stored = nbformat.read(NOTEBOOKS / f"{self.name}.ipynb", as_version=4)
        fresh = [kept(cell, self.folder) for cell in self.notebook.cells[: len(stored.cells)]]
        if STORES:
            for cell, outputs in zip(stored.cells, fresh, strict=True):
                if cell.cell_type == "code":
                    cell.outputs = [nbformat.from_dict(output) for output in outputs]
            nbformat.write(stored, NOTEBOOKS / f"{self.name}.ipynb")
        for cell, outputs in zip(stored.cells, fresh, strict=True):
            assert shapes(cell.get("outputs", [])) == shapes(outputs), cell.id

    @property
    def text(self) -> str:
        """Everything that the cells printed or returned as text."""
        return "\n".join("".join(map(_text_of, cell.get("outputs", []))) for cell in self.notebook.cells)

    def outputs(self, kind: str) -> list[str]:
        """Displayed values of a MIME type, in order."""
        return [
            output["data"][kind]
            for cell in self.notebook.cells
            for output in cell.get("outputs", [])
            if kind in output.get("data", {})
        ]


def _text_of(output: Any) -> str:
    """One print may come in several parts."""
    if output.output_type == "stream":
        return output.text
    return "\n" + output.get("data", {}).get("text/plain", "") + "\n"


def kept(cell: nbformat.NotebookNode, folder: Path) -> list[dict[str, Any]]:
    """What is stored of a cell's outputs: no counts, no second form of what is HTML or a picture, no bars, no paths of
    this machine, and a sentence for the viewer, which is large."""
    found: list[dict[str, Any]] = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            if found and found[-1].get("name") == output.name:
                found[-1]["text"] += output.text
            else:
                found.append({"output_type": "stream", "name": output.name, "text": output.text})
            continue
        data = dict(output.data)
        if len(data) > 1:
            del data["text/plain"]
        if "<iframe" in data.get("text/html", ""):
            data["text/html"] = _FRAME
        counted = {"execution_count": None} if output.output_type == "execute_result" else {}
        found.append({"output_type": output.output_type, "data": data, "metadata": {}, **counted})
    found = [output for output in found if output.get("name") != "stderr" or not _BARS.fullmatch(output["text"])]
    for output in found:
        for holder in (output, output.get("data", {})):
            for kind in {"text", "text/plain", "text/html"} & holder.keys():
                holder[kind] = re.sub(re.escape(str(folder)) + "/?", "", holder[kind])
    return found


def shapes(outputs: list[Any]) -> list[Any]:
    """What two executions have in common: kinds of outputs, lines with numbers masked, tags of HTML."""
    return [
        [output["output_type"], masked(output["text"])]
        if output["output_type"] == "stream"
        else [output["output_type"], {kind: _shape(kind, value) for kind, value in output["data"].items()}]
        for output in outputs
    ]


def _shape(kind: str, value: str) -> list[str]:
    if kind == "text/html":
        return sorted(set(re.findall(r"<(\w+)", value)))
    return masked(value) if kind.startswith("text/") else []


def masked(text: str) -> list[str]:
    """Lines without numbers; several of one kind in a row, such as those of progress, are one."""
    lines = [re.sub(r"-?[\d.]*\d(?:e[+-]\d+)?", "#", line) for line in text.splitlines()]
    lines = [re.sub(r"^rollouts #/#.*", "rollouts #/#", line) for line in lines]
    lines = [re.sub(r'_text": .*', '_text": …', line) for line in lines]  # what the policy said
    return [line for line, before in zip(lines, [None, *lines], strict=False) if line != before]
