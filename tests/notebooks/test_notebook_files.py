"""What is in git: notebooks without outputs, whose code compiles and whose links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tests.notebooks.running import NAMES, NOTEBOOKS

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_these_notebooks_are_there() -> None:
    assert [path.stem for path in ALL] == list(NAMES)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_no_outputs_in_git(path: Path) -> None:
    """Outputs hold machine names and make every diff unreadable. Clear them: `jupyter nbconvert --clear-output`."""
    notebook = json.loads(path.read_text())
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None, cell["id"]
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert not re.search(r"/(?:home|root|work|Users|tmp)/", path.read_text())


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_cells_are_short_and_compile(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        assert max(map(len, source.splitlines())) <= 120, cell["id"]
        if cell["cell_type"] == "code":
            assert len(source.splitlines()) <= 60, cell["id"]
            compile(TransformerManager().transform_cell(source), cell["id"], "exec")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_what_they_import_of_ours_exists(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code = TransformerManager().transform_cell("\n".join("".join(cell["source"]) for cell in cells))
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, name.name) for node in imports for name in node.names if str(node.module)[:7] == "trl_gym"]
    assert ours
    assert [(module, name) for module, name in ours if not hasattr(importlib.import_module(module), name)] == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
    links = re.findall(r"\]\(([^)#]+)", "\n".join("".join(cell["source"]) for cell in cells))
    assert links
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link
