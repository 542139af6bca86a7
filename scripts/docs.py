"""Writes what docs/ takes from the code: options, commands, supported versions, settings of a managed server,
the contract of a policy server, and what `gpu_check.py` found on a GPU.

    .venv/bin/python scripts/docs.py             # write the generated blocks of the pages again
    .venv/bin/python scripts/docs.py --check     # write nothing; fail when one is not current
    .venv/bin/python scripts/docs.py --missing   # messages and metrics that no page explains
    .venv/bin/python scripts/docs.py --undocumented-metrics run/metrics.jsonl

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of a page is written by hand. What the
failure and the metrics reference must mention is found by `docs_names.py`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONTRACT = ROOT / "tests" / "e2e" / "contract"
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import docs_names  # noqa: E402
import gpu_check  # noqa: E402

_BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_GROUP = re.compile(r"^\s*> Parameters that control (?P<title>.+)$")
_OPTION = re.compile(r"^(?P<indent> +)(?P<name>\w+) \((?P<facts>`.*)\):$")
_DEFAULT = re.compile(r"defaults to `(?P<default>.*)`$")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of `GymGRPOConfig` as its docstring describes it.

    Attributes:
        group: What it belongs to, e.g. `"rollouts"`.
        name: Of the field.
        types: As written, e.g. `` "`int` or `dict`" ``.
        default: As written, e.g. `'"host"'`; None when the docstring gives none, which means `None`.
        text: What it does, in Markdown.
        choices: Values that it may have; empty when it is free.
    """

    group: str
    name: str
    types: str
    default: str | None
    text: str
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        # Pages use it as `reference/configuration.md#gym_mode`.
        facts = [f"*Type:* {self.types}", f"*Default:* `{self.default or 'None'}`"]
        if self.choices:
            facts.append("*One of:* " + ", ".join(f'`"{choice}"`' for choice in self.choices))
        return f"### {self.name} {{: #{self.name} }}\n\n{' · '.join(facts)}\n\n{self.text}\n"


def options() -> list[Option]:
    """Every option that `GymGRPOConfig` adds to TRL's, in the order of its docstring."""
    from trl_gym.config import GymGRPOConfig

    choices = {field.name: tuple(field.metadata.get("choices", ())) for field in dataclasses.fields(GymGRPOConfig)}
    found: list[Option] = []
    lines = inspect.getdoc(GymGRPOConfig).splitlines()
    group = ""
    for number, line in enumerate(lines):
        if title := _GROUP.match(line):
            group = title["title"]
        elif option := _OPTION.match(line):
            default = _DEFAULT.search(option["facts"])
            types = option["facts"].partition(", *optional*")[0]
            found.append(
                Option(
                    group=group,
                    name=option["name"],
                    types=types,
                    default=default["default"] if default else None,
                    text=" ".join(_text_below(lines[number + 1 :], len(option["indent"]))),
                    choices=choices.get(option["name"], ()),
                )
            )
    return found


def _text_below(lines: list[str], indent: int) -> Iterator[str]:
    for line in lines:
        if not line.strip() or len(line) - len(line.lstrip()) <= indent:
            return
        yield line.strip()


def configuration() -> str:
    """All options of `GymGRPOConfig`, in groups."""
    parts: list[str] = []
    group = None
    for option in options():
        if option.group != group:
            group = option.group
            parts.append(f"## {group[0].upper()}{group[1:]}\n")
        parts.append(str(option))
    return "\n".join(parts)


def trl_options() -> str:
    """The options of TRL that mean something of their own here, those that are refused, and the others."""
    from trl_gym.trl_options import HERE, INHERITED, OF_TRANSFORMERS, REFUSED

    def named(names: Sequence[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    here = [(named(names), text) for names, text in HERE.items()]
    refused = [
        (f"`{name}`" + (f" with `vllm_mode: {one.mode}`" if one.mode else ""), one.reason, one.remedy)
        for name, one in REFUSED.items()
    ]
    parts = [_table(("option", "here"), here)]
    parts.append("Refused where they differ from TRL's default, since they would have no effect on rollouts:")
    parts.append(_table(("option", "why", "instead"), refused))
    parts.append(f"As in TRL: {named(INHERITED)}.")
    parts.append(f"As in TRL and transformers, some of which TRL's GRPO does not look at: {named(OF_TRANSFORMERS)}.")
    return "\n\n".join(parts)


def server_flags() -> str:
    """Flags of `vllm serve` that `gym_vllm_args` refuses."""
    from trl_gym.config_checks import OWNED_VLLM_FLAGS

    return _table(("flag", "why, or what to use"), [(f"`--{f}`", why) for f, why in OWNED_VLLM_FLAGS.items()])


def versions() -> str:
    """`compat.TESTED` with the versions that ran, and the Python versions of pyproject.toml."""
    import tomllib

    from trl_gym import compat

    checked = dict(re.findall(r"^\| (\S+) +\| \S+ +\| (.+?) +\|$", compat.__doc__ or "", re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = [("Python of the trainer", f"`{project['requires-python']}`", "3.11")]
    rows += [(f"`{name}`", f"`{allowed}`", checked[name]) for name, allowed in compat.TESTED.items()]
    ran = "5.16.1, 5.17.0, 5.18.0, 5.24.0"
    rows.append(("`transformers` with `gym_engine: transformers`", f"`{compat.ENGINE}`", ran))
    return _table(("package", "tested", "run with"), rows)


def commands() -> str:
    """Every subcommand of `trl-gym` with its options."""
    from trl_gym.cli import build_parser

    parser = build_parser()
    parts = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                parts.append(_command(name, subparser))
    return "\n".join(parts)


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    parts = [f"## trl-gym {name} {{: #{name} }}\n"]
    if parser.description:
        parts.append(_escaped(parser.description) + "\n")
    for group in parser._action_groups:
        rows = [_argument(parser, action) for action in group._group_actions if action.help != argparse.SUPPRESS]
        rows = [row for row in rows if row[0] != "`-h, --help`"]
        if rows:
            if group.title not in ("options", "positional arguments"):
                parts.append(f"**{group.title}**\n")
            parts.append(_table(("argument", "meaning"), rows) + "\n")
    return "\n".join(parts)


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar
        names += f" {value or action.dest.upper()}" + (" …" if action.nargs in ("+", "*") else "")
    needed = " (required)" if action.required and action.option_strings else ""
    return f"`{names}`", _escaped(parser._get_formatter()._expand_help(action)) + needed


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def contract() -> str:
    """The contract of a policy server: the docstrings of its tests, by section, and which engine refuses what."""
    parts, cases = [], []
    for path in sorted(CONTRACT.glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        told = {_case(node.name): inspect.cleandoc(ast.get_docstring(node) or "") for node in _tests(source)}
        for letter, title in re.findall(r"^# -- ([A-Z]): (.+?) -+$", source, re.MULTILINE):
            parts.append(f"### {letter}: {title}\n")
            for case in (case for case in told if case[0] == letter):
                first, *rest = told[case].split("\n\n")
                parts += [f"**{case}. {' '.join(first.split())}**", *(" ".join(text.split()) for text in rest), ""]
        cases += told
    source = ast.parse((CONTRACT / "engines.py").read_text(encoding="utf-8"))
    told = {node.target.id: node.value for node in source.body if isinstance(node, ast.AnnAssign)}
    refused, untested = (ast.literal_eval(told[name]) for name in ("REFUSED", "UNTESTED"))
    rows = [
        (case, *(_cell(case, names, untested.get(engine, ())) for engine, names in refused.items())) for case in cases
    ]
    return "\n".join([*parts, "### Who refuses what\n", _table(("case", *refused), rows)])


def _tests(source: str) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def _case(name: str) -> str:
    return name.split("_")[1].upper()


def _cell(case: str, refused: Sequence[str], untested: Sequence[str]) -> str:
    """What an engine refuses of a case, and what was not tested; a tick where that is nothing."""
    texts = []
    for words, names in (("refuses", refused), ("not in the stand-in:", untested)):
        if found := [f"`{name.split()[1]}`" for name in names if name.split()[0].upper() == case]:
            texts.append(f"{words} {', '.join(found)}")
    return "; ".join(texts) or "✓"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpu_parts() -> str:
    """The parts of `scripts/gpu_check.py`, with what they need."""
    return _table(("part", "what it shows", "needs beside the trainer's packages", "minutes"), gpu_check.needed())


def gpu_tested() -> str:
    """What ran on a GPU: the JSON of `scripts/gpu_check.py`, where there is one."""
    said, rows = gpu_check.tested()
    return f"{said}\n\n{_table(('part', 'what it shows', 'result', 'measured'), rows)}"


BLOCKS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "trl-options": trl_options,
    "server-flags": server_flags,
    "versions": versions,
    "commands": commands,
    "contract": contract,
    "gpu-parts": gpu_parts,
    "gpu-tested": gpu_tested,
}


def current(page: str) -> str:
    """A page with its generated blocks written again.

    Raises:
        KeyError: It has a block of a name that is not in `BLOCKS`.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block['name']]().rstrip()}\n{block[3]}", page)


def pages_with_blocks() -> list[Path]:
    return [path for path in sorted(DOCS.rglob("*.md")) if _BLOCK.search(path.read_text(encoding="utf-8"))]


def stale_pages() -> dict[Path, str]:
    """Pages whose generated blocks are not what the code says, and what they should be."""
    texts = {path: path.read_text(encoding="utf-8") for path in pages_with_blocks()}
    return {path: new for path, text in texts.items() if (new := current(text)) != text}


def _print_missing() -> int:
    messages = docs_names.unexplained_messages(ROOT)
    for message in messages:
        print(f"{message.where}\n    {message.text}")
    stale = docs_names.stale_fragments(ROOT)
    for fragment in stale:
        print(f"no such message any more: {fragment}")
    metrics = docs_names.undocumented_metrics(docs_names.metric_names(ROOT), ROOT)
    for name in metrics:
        print(f"metric without an entry: {name}")
    return int(bool(messages or stale or metrics))


def _print_undocumented(files: list[str]) -> int:
    lines = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    unknown = docs_names.undocumented_metrics({name for line in lines for name in line}, ROOT)
    print("\n".join(unknown))
    return int(bool(unknown))


def main() -> int:
    parser = argparse.ArgumentParser(description=typing.cast(str, __doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not current")
    parser.add_argument("--missing", action="store_true", help="list messages and metrics that no page explains")
    parser.add_argument("--undocumented-metrics", nargs="+", metavar="FILE", help="metrics.jsonl files to compare")
    args = parser.parse_args()
    if args.undocumented_metrics:
        return _print_undocumented(args.undocumented_metrics)
    if args.missing:
        return _print_missing()
    stale = stale_pages()
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} is not current" if args.check else f"{path.relative_to(ROOT)} written")
        if not args.check:
            path.write_text(text, encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
