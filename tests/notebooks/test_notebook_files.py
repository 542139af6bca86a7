"""What is in git: notebooks whose outputs are stored, whose code compiles and whose links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tests.notebooks.running import NAMES, NOTEBOOKS, shapes
from trl_gym import recipes

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_these_notebooks_are_there() -> None:
    assert [path.stem for path in ALL] == list(NAMES)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_outputs_are_stored_for_readers_and_small(path: Path) -> None:
    """Written by `STORE_OUTPUTS=1 pytest tests/e2e/test_notebooks.py`, which else compares them with fresh ones."""
    notebook = json.loads(path.read_text())
    nbformat.validate(notebook)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert len(outputs) > 5
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        assert "<iframe" not in output.get("data", {}).get("text/html", "")
    assert path.stat().st_size < 300_000
    assert all(cell.get("execution_count") is None for cell in notebook["cells"])
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert not re.search(r"/(?:home|root|work|Users|tmp)/", path.read_text())


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_the_first_cells_find_what_is_needed_from_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one installs where trl-gym is missing, and else does nothing. No folder is searched for."""
    install, setup = [
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
    ][:2]
    assert '"trl-gym[' in install
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names: dict[str, Any] = {"get_ipython": lambda: pytest.fail("it installs")}
    for source in (install, setup):
        exec(TransformerManager().transform_cell(source), names)
    assert Path.cwd() == tmp_path
    assert Path(names.get("small_policy", recipes.find(recipes.SMALL_POLICY)), "config.json").is_file()


def test_a_notebook_that_needs_another_says_so() -> None:
    heads = {path.stem: "".join(json.loads(path.read_text())["cells"][0]["source"]) for path in ALL}
    assert [name for name, head in heads.items() if "needs no" not in head and "needs none" not in head] == []
    assert "execute [02_train_and_compare](02_train_and_compare.ipynb) first" in heads["04_debug_a_run"]


def test_shapes_are_compared_not_numbers() -> None:
    def stream(text: str) -> dict[str, Any]:
        return {"output_type": "stream", "name": "stdout", "text": text}

    def page(text: str) -> dict[str, Any]:
        return {"output_type": "display_data", "data": {"text/html": text}}

    fresh = [stream("rollouts 3/16, slowest a 2 s\nrollouts 16/16\n1.5e-07 nats at 127.0.0.1:80\n")]
    assert shapes(fresh) == shapes([stream("rollouts 16/16\n2 nats at 127.0.0.1:8123\n")])
    assert shapes(fresh) != shapes([stream("rollouts 16/16\n2 nats off 127.0.0.1:8123\n")])
    assert shapes([page("<b>1</b>")]) == shapes([page("<b title='x'>2</b> <b>3</b>")]) != shapes([page("<i>1</i>")])
    assert shapes([stream("1")]) != shapes([page("1")])


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
