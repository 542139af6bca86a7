"""Find names of other packages that trl-gym uses and an installed version lacks. Reads sources; imports nothing.

What is used is taken from trl-gym's own sources, so it cannot fall behind them: modules that are imported from a
package and names that are taken from them; methods of TRL's trainer that ours overrides and calls, with their
parameters; private attributes of it that ours reads. docs/architecture.md has the reasons. `compat` asks for versions
that are newer than the tested ones, for which this is all that is known.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_OURS = Path(__file__).parent
_LAZY = re.compile(r"_LazyModule|^def __getattr__|^\s*from \S+ import \*", re.MULTILINE)


class Sources:
    """Modules of an installed package, as files.

    Args:
        folder: Folder of the package, e.g. `site-packages/vllm`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, module: str) -> Path | None:
        """Return the file of a module; None where it has none. A compiled module is a file that is not Python."""
        path = self._folder.joinpath(*module.split(".")[1:])
        names = (path / "__init__.py", path.with_suffix(".py"), *path.parent.glob(f"{path.name}.*.so"))
        return next((name for name in names if name.is_file()), path if path.is_dir() else None)

    def has(self, module: str, name: str = "") -> bool:
        """Tell whether there is a module, and a name in it; true where only importing it could tell."""
        file = self.file(module)
        if file is None or not name:
            return file is not None
        if file.suffix != ".py" or self.file(f"{module}.{name}") is not None:
            return True
        source = file.read_text(encoding="utf-8")
        if _LAZY.search(source) or not re.search(rf"\b{re.escape(name)}\b", source):
            return bool(_LAZY.search(source))
        return name in _defined(ast.parse(source))


def _defined(tree: ast.AST) -> set[str]:
    """Names that a module has when it was imported, with those of functions' insides: too many rather than too few."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                found.add(node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case ast.alias():
                found.add((node.asname or node.name).partition(".")[0])
    return found


class Imports(ast.NodeVisitor):
    """What a file must be able to import, as alternatives of which one has to be there.

    `try: from a.new import x` with `except ImportError: from a.old import x` is one need with two ways to meet it; a
    handler that imports nothing and does not raise makes it none. What only type checkers import is left out.
    """

    def __init__(self, tree: ast.AST, package: str) -> None:
        self._package = package
        self.needs: list[list[list[tuple[str, str]]]] = []  # needs → ways → (module, name)
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        self._add([(alias.name, "") for alias in node.names])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module is not None:
            self._add([(node.module, alias.name) for alias in node.names])

    def visit_If(self, node: ast.If) -> None:
        for child in node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else (*node.body, *node.orelse):
            self.visit(child)

    def visit_Try(self, node: ast.Try) -> None:
        handlers = [one for one in node.handlers if one.type is None or "ImportError" in ast.unparse(one.type)]
        if not handlers:
            self.generic_visit(node)
            return
        ways = [self._of(node.body), *(way for one in handlers if (way := self._of(one.body)))]
        raises = any(isinstance(inner, ast.Raise) for one in handlers for inner in ast.walk(one))
        if ways[0] and (len(ways) > 1 or raises):
            self.needs.append(ways)
        for child in (*node.orelse, *node.finalbody):
            self.visit(child)

    def _of(self, body: Iterable[ast.stmt]) -> list[tuple[str, str]]:
        inner = Imports(ast.Module(list(body), []), self._package)
        return [wanted for ways in inner.needs for wanted in ways[0]]

    def _add(self, wanted: list[tuple[str, str]]) -> None:
        own = [one for one in wanted if one[0].partition(".")[0] == self._package]
        if own:
            self.needs.append([own])


def missing(package: str, folder: Path | None = None) -> list[str]:
    """List what trl-gym uses of a package and the installed version lacks.

    Args:
        package: Its module, e.g. `"vllm"`.
        folder: Folder of the package; by default where this interpreter would import it from.

    Returns:
        Names and where they are used, e.g. `["vllm.entrypoints.cli_args (policy_server/engine/entry.py)"]`; sorted.
    """
    theirs = _installed(package) if folder is None else Sources(folder)
    if theirs is None:
        return []
    found = set(_lacks_of_trainer(theirs)) if package == "trl" else set()
    for path in sorted(_OURS.rglob("*.py")):
        source, file = path.read_text(encoding="utf-8"), path.relative_to(_OURS)
        if not re.search(rf"\b(?:from|import) {package}\b", source):
            continue
        for ways in Imports(ast.parse(source), package).needs:
            lacks = [[_told(*one) for one in way if not theirs.has(*one)] for way in ways]
            if all(lacks):
                found |= {f"{name} ({file})" for name in lacks[0]}
    return sorted(found)


def _told(module: str, name: str) -> str:
    return f"{module}.{name}" if name else module


# -- TRL's trainer ----------------------------------------------------------------------------------------------------

# Where the methods and attributes of TRL's trainer are, the one that overrides the others last.
_BASES = ("transformers.trainer", "trl.trainer.base_trainer", "trl.trainer.grpo_trainer")
# What ours sets, or overrides without calling it: nothing in our source tells whose it is.
_SET = (
    *("_buffered_inputs", "_get_per_token_logps_and_entropies", "_last_loaded_step", "_logs", "_step", "_tag_names"),
    *("beta", "mask_truncated_completions"),
)


def trainer_needs(source: str) -> tuple[dict[str, list[str]], set[str]]:
    """Return what our trainer takes from those it is derived from.

    Args:
        source: Of `trainer.py`.

    Returns:
        Methods that call the one they replace, with the parameters that it must take in the same places; attributes.
    """
    tree = ast.parse(source)
    ours = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GymGRPOTrainer")
    methods = {node.name: node for node in ours.body if isinstance(node, ast.FunctionDef)}
    overridden = {
        name: [one.arg for one in node.args.args]
        for name, node in methods.items()
        if name != "__init__" and f"super().{name}(" in ast.unparse(node)
    }
    own = [node for node in ast.walk(ours) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"]
    stored = {node.attr for node in own if isinstance(node.ctx, ast.Store)} | set(methods)
    read = {node.attr for node in own if isinstance(node.ctx, ast.Load)} - stored
    return overridden, {name for name in read if name.startswith("_")}.union(_SET)


def _lacks_of_trainer(trl: Sources) -> Iterator[str]:
    """Name what TRL's trainer, of which ours is a subclass, has no more or takes otherwise."""
    transformers = _installed("transformers")
    files = [(trl if module.startswith("trl.") else transformers or trl).file(module) for module in _BASES]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file is not None)
    defined = {
        node.name: [one.arg for one in node.args.args]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }
    overridden, attributes = trainer_needs((_OURS / "trainer.py").read_text(encoding="utf-8"))
    for name, parameters in overridden.items():
        if defined.get(name, [])[: len(parameters)] != parameters:
            yield f"trl.GRPOTrainer.{name}({', '.join(parameters[1:])}) (trainer.py)"
    for name in attributes - set(defined):
        if not re.search(rf"\b{name}\b", text):
            yield f"trl.GRPOTrainer.{name} (trainer.py)"


def _installed(package: str) -> Sources | None:
    spec = importlib.util.find_spec(package)
    places = None if spec is None else spec.submodule_search_locations
    return Sources(Path(next(iter(places)))) if places else None
