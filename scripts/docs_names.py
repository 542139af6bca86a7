"""What the code can say and log, and whether a page of docs/ explains it. No import of trl_gym: the source is read.

Messages: the text of every error of ours that is made anywhere (`PolicyServerError(f"…")`), of every recorded failure
of a rollout, and of every problem that is listed in a longer error. Where a value is filled in, a message has `…`.
docs/reference/failures.md has tables whose first cell is a part of a message in backticks; such a part explains every
message that contains it.

Metrics: names under which something is logged. docs/reference/metrics.md has tables whose first cell holds names in
backticks, with `<agent>` and the like for what varies.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FAILURES = "docs/reference/failures.md"
METRICS = "docs/reference/metrics.md"
GAP = "…"

# Errors that are no `TrlGymError` and whose words reach people all the same: in a failure of a rollout, in the log of
# a server, or in the list of problems of an error of ours.
_WORDS_THAT_ARE_SHOWN = {
    "AdapterError",
    "BundleError",
    "DishonestAnswerError",
    "HostError",
    "InvalidTurnError",
    "NoBoundaryError",
    "Problem",
    "RefusedError",
    "RolloutFailure",
    "SetupError",
    "SystemExit",
    "TrajectoryError",
    "_UnusableError",
}
_PROBLEM = ("problem", "text")  # arguments that say what is wrong
_SHORTEST = 12  # characters of fixed text below which a message says nothing that could be looked up
_IN_WORDS = re.compile(r"[A-Za-z`'] [A-Za-z`'…]")  # two words or more
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_METRIC = re.compile(r"(?:logprob_gap|memory|policy_server|refill|rollouts|seconds|weight_sync)/[\w@…/]*[a-z0-9…]")


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """One message: where it is made, and its text with `…` for what is filled in."""

    where: str
    text: str


def sources(root: Path) -> list[Path]:
    return sorted((root / "trl_gym").rglob("*.py"))


@cache
def messages(root: Path) -> tuple[Message, ...]:
    """Every message that the package can show, sorted by where it is made."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(root)}
    shown = _our_errors(trees.values()) | _WORDS_THAT_ARE_SHOWN
    found: dict[tuple[Path, str], Message] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _called(node.func) in shown:
                if path.parent.name == "doctor" and _called(node.func) == "Problem":
                    continue  # shown by the doctor alone, beside its remedy
                # The first argument is what is wrong. The second, the remedy, is told beside it and needs no row.
                texts = _texts([*node.args[:1], *(word.value for word in node.keywords if word.arg in _PROBLEM)])
            elif isinstance(node, ast.FunctionDef) and ("problems" in node.name or path.stem == "config"):
                texts = _texts(_listed(node))
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "problems":
                texts = _texts(node.value.elts if isinstance(node.value, ast.List) else [])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("problems.append", "Reply.error"):
                texts = _texts(node.args)
            else:
                continue
            for text in filter(_says_something, texts):  # of a list's line and of its function, the line
                found[path, text] = Message(f"{path.relative_to(root)}:{node.lineno}", text)
    return tuple(sorted(found.values()))


def explained(root: Path) -> list[str]:
    """The parts of messages that the failure reference has a row for."""
    return [cell for cells in _first_cells(root / FAILURES) for cell in cells]


def unexplained_messages(root: Path) -> list[Message]:
    fragments = explained(root)
    return [message for message in messages(root) if not any(fragment in message.text for fragment in fragments)]


def stale_fragments(root: Path) -> list[str]:
    """Rows of the failure reference for messages that no longer exist."""
    texts = [message.text for message in messages(root)]
    return [fragment for fragment in explained(root) if not any(fragment in text for text in texts)]


def metric_names(root: Path) -> set[str]:
    """Names of metrics that are written out somewhere (`f"weight_sync/seconds/{phase}"`), `…` for what varies.

    Those that are put together from parts cannot be read off; the tests make them.
    """
    names = set()
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                names |= {text for text in _text(node) if _METRIC.fullmatch(text)}
    return names


def undocumented_metrics(names: Iterable[str], root: Path, *, any_field: bool = True) -> list[str]:
    """Names that no row of the metrics reference covers, sorted.

    Args:
        names: As logged; `eval_` and `eval_<set>_` in front are looked past.
        root: Of the checkout.
        any_field: Whether `gym/<agent>/<field>` covers what it can. False asks for a row of its own.
    """
    patterns = [cell for cells in _first_cells(root / METRICS) for cell in cells]
    known = [_pattern(cell) for cell in patterns if any_field or not cell.endswith("<field>")]
    known += [_pattern(cell.rpartition("/")[0]) for cell in patterns]  # a part that others are put behind
    return sorted(
        name
        for name in set(names)
        if not any(pattern.fullmatch(form) for pattern in known for form in _forms(name))
        and not (GAP in name and any(_pattern(name).fullmatch(cell) for cell in patterns))
    )


def _forms(name: str) -> list[str]:
    """A name, and what it is without `eval_` or `eval_<set>_`, whatever the set is called."""
    first, slash, rest = name.partition("/")
    words = first.split("_")
    starts = range(1, len(words)) if words[0] == "eval" else ()
    return [name, *("_".join(words[start:]) + slash + rest for start in starts)]


def _our_errors(trees: Iterable[ast.Module]) -> set[str]:
    """Names of all classes that descend from `TrlGymError`."""
    bases = {
        node.name: {_called(base) for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    ours = {"TrlGymError"}
    while more := {name for name, parents in bases.items() if parents & ours} - ours:
        ours |= more
    return ours


def _called(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _listed(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a function that collects problems puts into its list, yields or returns."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _called(node.func) == "append":
            yield from node.args
        elif isinstance(node, ast.List):
            yield from node.elts
        elif isinstance(node, ast.ListComp):
            yield node.elt
        elif isinstance(node, ast.Yield) and node.value is not None:
            yield node.value


def _texts(nodes: Iterable[ast.expr]) -> list[str]:
    return [text for node in nodes for text in _text(node)]


def _text(node: ast.expr) -> list[str]:
    """The texts that an expression can be, as far as they are written there."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
        return ["".join(map(str, parts))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left) or [GAP], _text(node.right) or [GAP]
        return [a + b for a in left for b in right]
    if isinstance(node, ast.IfExp):
        return [*_text(node.body), *_text(node.orelse)]
    return []


def _says_something(text: str) -> bool:
    return len(text.replace(GAP, "").strip()) >= _SHORTEST and bool(_IN_WORDS.search(text))


def _first_cells(page: Path) -> Iterator[list[str]]:
    """Code spans of the first cell of each table row."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            cell = line[2:].partition(" | ")[0]
            spans = [text for _, text in _CODE.findall(cell)]
            if spans:  # CommonMark takes one space off each end, so that a span can begin with a backtick
                yield [text[1:-1] if text.startswith(" ") and text.endswith(" ") else text for text in spans]


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"(<\w+>|…)", name)
    return re.compile("".join("[^/]+" if part.startswith(("<", GAP)) else re.escape(part) for part in parts))
