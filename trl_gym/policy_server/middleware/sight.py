"""Prove what a chat template can see of a text, from its source; abbreviate texts so that it sees the same.

A template renders the whole chat, and what it writes last may depend on all that is in front: it counts rounds, looks
for the last question, or opens the first tool output unlike later ones. A chat with long texts cut short renders the
same ending if the template takes the same branches. It does so if

    every message and its role, names, ids, tool calls and argument keys are kept, and
    whatever the template searches texts for (`'</think>' in content`) occurs in the same places of the short texts,
    they are empty where the long ones are, and begin and end with the same white space.

`searched_texts` proves that a template asks a text for nothing else. It infers for each expression whether its value
is the same for both chats (`FIXED`), a text or something with texts in it (`TEXT`), or the length of a text, of which
only "zero or not" is known to be the same (`COUNT`). What it does not know (a slice of a text, a filter of the future)
is no proof. A variable has the worst kind of all values that it is ever given; conditions on texts have the same
outcome for both chats, so they need not be followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

KEPT_KEYS = frozenset({"role", "name", "id", "tool_call_id", "type"})
"""Keys of a message, at any depth, whose values are never abbreviated."""

_LIST_KEYS = frozenset({"tool_calls", "tool_responses"})  # the second is Gemma's
_SHAPES = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "true", "false"}
)
_PURE_FILTERS = frozenset({"trim", "string", "safe", "default", "d", "tojson", "items", "dictsort"})
_GLOBALS = frozenset({"raise_exception", "strftime_now", "range"})
_MIN_SAVED = 16  # characters


class UnprovenError(Exception):
    """The template does something with texts whose outcome may depend on more than what is kept of them."""


class Kind(IntEnum):
    FIXED = 0
    TEXT = 1
    COUNT = 2


# -- abbreviating -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sight:
    """What one template can see of a text: whether these strings occur in it."""

    searched: tuple[str, ...]
    _pattern: re.Pattern[str] = field(init=False, repr=False)
    # Where two texts are joined, their edges may form a searched string: such edges are kept.
    _beginnings: tuple[str, ...] = field(init=False, repr=False)
    _ends: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.searched, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        beginnings = {text[:stop] for text in self.searched for stop in range(1, len(text))}
        ends = {text[start:] for text in self.searched for start in range(1, len(text))}
        object.__setattr__(self, "_pattern", re.compile(f"({pattern})"))
        object.__setattr__(self, "_beginnings", tuple(sorted(beginnings, key=len, reverse=True)))
        object.__setattr__(self, "_ends", tuple(sorted(ends, key=len, reverse=True)))

    def abbreviate(self, messages: Sequence[dict[str, Any]], filler: str) -> list[dict[str, Any]]:
        """Return the messages with `filler` for the parts of their texts that the template cannot see.

        Args:
            filler: A word of ASCII letters and digits. A render that has it repeats a text that was abbreviated.
        """
        return [self._value(message, filler) for message in messages]

    def text(self, text: str, filler: str) -> str:
        """Return the text with `filler` for the parts that the template cannot see.

        Example:
            >>> Sight(("</think>",)).text("let me think about it </think> the answer is forty-two", "zqx1")
            'zqx1 </think> zqx1'
        """
        if len(text) < _MIN_SAVED:
            return text
        is_searched = any(searched in text for searched in self.searched)
        pieces = self._pattern.split(text) if is_searched else [text]
        short = "".join(piece if index % 2 else self._piece(piece, filler) for index, piece in enumerate(pieces))
        return short if self._pattern.findall(short) == pieces[1::2] else text

    def _piece(self, piece: str, filler: str) -> str:
        core = piece.strip()
        start = len(_longest(core, self._ends, str.startswith))
        stop = len(core) - len(_longest(core, self._beginnings, str.endswith))
        if stop - start < _MIN_SAVED:
            return piece
        offset = len(piece) - len(piece.lstrip())
        return piece[: offset + start] + filler + piece[offset + stop :]

    def _value(self, value: Any, filler: str) -> Any:
        if isinstance(value, str):
            return self.text(value, filler)
        if isinstance(value, list):
            return [self._value(item, filler) for item in value]
        if not isinstance(value, dict):
            return value
        return {key: self._field(key, item, filler) for key, item in value.items()}

    def _field(self, key: str, value: Any, filler: str) -> Any:
        if key in KEPT_KEYS or (key in _LIST_KEYS and not isinstance(value, list)):
            return value
        if key == "arguments" and isinstance(value, str):
            try:
                parsed = json.loads(value)
                return json.dumps(self._value(parsed, filler), ensure_ascii=False)
            except (ValueError, RecursionError):
                return value  # the server refuses it or takes it for a text: nothing is known
        return self._value(value, filler)


def _longest(text: str, edges: tuple[str, ...], fits: Callable[[str, Any], bool]) -> str:
    if not edges or not fits(text, edges):
        return ""
    return next(edge for edge in edges if fits(text, edge))


# -- proving ----------------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """The block of Transformers that marks assistant turns; it renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=64)
def sight_of(source: str) -> Sight | None:
    """Return what a chat template can see of the texts of messages; None if that is not proven.

    Args:
        source: A jinja template, as Transformers renders it.

    Example:
        >>> sight_of("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}").searched
        ('</think>',)
        >>> sight_of("{% for m in messages %}{{ m.content[:9] }}{% endfor %}")  # the ninth letter is not kept
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    try:
        proof = _Proof(environment.parse(source))
        return Sight(tuple(sorted(proof.searched - {""})))
    except (UnprovenError, TemplateSyntaxError, RecursionError):
        return None


class _Proof:
    """Infers the kinds of all expressions of a template. Raises `UnprovenError`: see there."""

    def __init__(self, template: nodes.Template) -> None:
        self.searched: set[str] = set()
        # Names, and attributes of namespaces as "name.attribute". Macros are names, and their variables "macro/name".
        self._kinds: dict[str, Kind] = {"messages": Kind.TEXT}
        self._lists: dict[str, bool] = {"messages": True, "tools": True}
        self._namespaces = {
            assign.target.name
            for assign in template.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and _called(assign.node) == "namespace"
        }
        self._macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        self._own_names = {name: _assigned(macro) for name, macro in self._macros.items()}
        self._macro = ""  # the one in which the current statement is
        self._no_texts: frozenset[str] = frozenset()  # expressions that are no text here: an `if` has asked
        if all(name.name != "messages" for name in template.find_all(nodes.Name)):
            raise UnprovenError("no messages: it may be the name of another template")
        self._is_changed = True
        while self._is_changed:  # kinds only get worse, so this ends
            self._is_changed = False
            self._run(template.body)

    # -- statements

    def _run(self, statements: Iterable[nodes.Node]) -> None:
        for statement in statements:
            match statement:
                case nodes.Output():
                    for node in statement.nodes:
                        self._at_most(Kind.TEXT, node)
                case nodes.If():
                    self._branch(statement)
                case nodes.For():
                    self._loop(statement)
                case nodes.Assign():
                    self._assign(statement.target, statement.node)
                case nodes.AssignBlock() if statement.filter is None:
                    self._run(statement.body)
                    self._give(statement.target, self._written(statement.body), is_list=False)
                case nodes.Macro():
                    self._define(statement)
                case nodes.Scope():
                    self._run(statement.body)
                case nodes.Break() | nodes.Continue():
                    pass
                case _:
                    raise UnprovenError(type(statement).__name__)

    def _branch(self, branch: nodes.If) -> None:
        outside = known = self._no_texts
        for case in (branch, *branch.elif_):
            self._kind(case.test)
            self._no_texts = known | _no_texts(case.test, holds=True)
            self._run(case.body)
            known |= _no_texts(case.test, holds=False)
        self._no_texts = known
        self._run(branch.else_)
        self._no_texts = outside

    def _loop(self, loop: nodes.For) -> None:
        kind = self._kind(loop.iter)
        if kind is not Kind.FIXED and not self._is_countable(loop.iter):
            raise UnprovenError("a loop over a text")
        target = loop.target
        if isinstance(target, nodes.Tuple) and _is_of_pairs(loop.iter):
            self._give(target.items[0], Kind.FIXED, is_list=False)  # keys are kept
            target = target.items[1]
        self._give(target, kind, is_list=False)
        if loop.test is not None:
            self._kind(loop.test)
        self._run([*loop.body, *loop.else_])

    def _define(self, macro: nodes.Macro) -> None:
        outside = self._macro, self._no_texts
        self._macro, self._no_texts = macro.name, frozenset()
        for parameter, default in zip(reversed(macro.args), reversed(macro.defaults), strict=False):
            self._give(parameter, self._kind(default), self._is_list(default))
        self._run(macro.body)
        written = self._written(macro.body)
        self._macro, self._no_texts = outside
        self._set(macro.name, written, is_list=False)

    def _assign(self, target: nodes.Node, value: nodes.Node) -> None:
        if isinstance(target, nodes.Name) and target.name in self._namespaces:
            if not isinstance(value, nodes.Call) or _called(value) != "namespace" or value.args:
                raise UnprovenError("a namespace that is something else too")
            for keyword in value.kwargs:
                self._set(f"{target.name}.{keyword.key}", self._kind(keyword.value), self._is_list(keyword.value))
            return
        self._give(target, self._kind(value), self._is_list(value))

    def _give(self, target: nodes.Node, kind: Kind, is_list: bool) -> None:
        match target:
            case nodes.Name():
                self._set(self._key(target.name), kind, is_list)
            case nodes.NSRef():
                self._set(f"{target.name}.{target.attr}", kind, is_list)
            case nodes.Tuple():
                for item in target.items:
                    self._give(item, kind, is_list=False)
            case _:
                raise UnprovenError(type(target).__name__)

    def _set(self, name: str, kind: Kind, is_list: bool) -> None:
        if name.rpartition("/")[2] in self._namespaces:
            raise UnprovenError("a namespace that is something else too")
        before = self._kinds.get(name), self._lists.get(name)
        self._kinds[name] = max(kind, self._kinds.get(name, Kind.FIXED))
        self._lists[name] = is_list and self._lists.get(name, True)
        self._is_changed |= before != (self._kinds[name], self._lists[name])

    def _key(self, name: str) -> str:
        return f"{self._macro}/{name}" if name in self._own_names.get(self._macro, ()) else name

    def _written(self, body: Sequence[nodes.Node]) -> Kind:
        written = [node for statement in body for output in _outputs(statement) for node in output.nodes]
        return max(map(self._kind, written), default=Kind.FIXED)

    # -- expressions

    def _at_most(self, kind: Kind, *expressions: nodes.Node) -> Kind:
        kinds = [self._kind(expression) for expression in expressions]
        worst = max(kinds, default=Kind.FIXED)
        if worst > kind:
            raise UnprovenError(f"{worst.name} in {expressions}")
        return worst

    def _kind(self, node: nodes.Node) -> Kind:
        match node:
            case nodes.TemplateData() | nodes.Const():
                return Kind.FIXED
            case nodes.Name():
                if node.name in self._namespaces:
                    raise UnprovenError("a namespace under another name")
                return self._kinds.get(self._key(node.name), Kind.FIXED)
            case nodes.Getattr():
                return self._attribute(node.node, node.attr)
            case nodes.Getitem():
                return self._item(node)
            case nodes.List() | nodes.Tuple():
                return self._at_most(Kind.TEXT, *node.items)
            case nodes.Dict():
                return self._at_most(Kind.TEXT, *(part for pair in node.items for part in (pair.key, pair.value)))
            case nodes.And() | nodes.Or():
                return max(self._kind(node.left), self._kind(node.right))
            case nodes.Not():
                self._kind(node.node)
                return Kind.FIXED
            case nodes.CondExpr():
                self._kind(node.test)
                return max(self._kind(node.expr1), Kind.FIXED if node.expr2 is None else self._kind(node.expr2))
            case nodes.Add():
                return self._at_most(Kind.TEXT, node.left, node.right)
            case nodes.Concat():
                return self._at_most(Kind.TEXT, *node.nodes)
            case nodes.BinExpr():
                return self._at_most(Kind.FIXED, node.left, node.right)
            case nodes.Neg() | nodes.Pos():
                return self._at_most(Kind.FIXED, node.node)
            case nodes.Compare():
                return self._compare(node)
            case nodes.Test():
                return self._test(node)
            case nodes.Filter():
                return self._filter(node)
            case nodes.Call():
                return self._call(node)
        raise UnprovenError(type(node).__name__)

    def _attribute(self, node: nodes.Node, name: str) -> Kind:
        if isinstance(node, nodes.Name) and node.name in self._namespaces:
            return self._kinds.get(f"{node.name}.{name}", Kind.FIXED)
        if isinstance(node, nodes.Name) and node.name == "loop":
            return Kind.TEXT if name in ("previtem", "nextitem") else Kind.FIXED
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            node = node.node  # an item of a text has no attributes, only one of a list has
        return Kind.FIXED if self._at_most(Kind.TEXT, node) is Kind.FIXED or name in KEPT_KEYS else Kind.TEXT

    def _item(self, node: nodes.Getitem) -> Kind:
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._attribute(node.node, node.arg.value)
        kind = self._at_most(Kind.TEXT, node.node)
        parts = [node.arg.start, node.arg.stop, node.arg.step] if isinstance(node.arg, nodes.Slice) else [node.arg]
        where = self._at_most(Kind.TEXT, *(part for part in parts if part is not None))
        if kind is Kind.FIXED and where is Kind.FIXED:
            return Kind.FIXED
        if where is Kind.FIXED and self._is_countable(node.node):
            return Kind.TEXT
        raise UnprovenError("a part of a text by its place")

    def _compare(self, node: nodes.Compare) -> Kind:
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        kinds = list(map(self._kind, sides))
        if max(kinds) is Kind.FIXED:
            return Kind.FIXED
        if len(sides) > 2:
            raise UnprovenError("a chain of comparisons")
        (left, right), operator = sides, node.ops[0].op
        if max(kinds) is Kind.COUNT:
            if isinstance(right, nodes.Const) and right.value == 0:
                return Kind.FIXED
            raise UnprovenError("the length of a text")
        constants = _strings(left if kinds[0] is Kind.FIXED else right)
        if constants is None and isinstance(right, nodes.Const) and operator in ("eq", "ne"):
            return Kind.FIXED  # a number, or none
        one_of = operator in ("in", "notin") and kinds[1] is Kind.FIXED and isinstance(right, nodes.List | nodes.Tuple)
        if constants is None or not (operator in ("eq", "ne") or one_of or (operator in ("in", "notin") and kinds[1])):
            raise UnprovenError("a comparison of texts")
        self.searched.update(constants)
        return Kind.FIXED

    def _test(self, node: nodes.Test) -> Kind:
        if node.name not in _SHAPES:
            self._at_most(Kind.FIXED, node.node, *node.args)
        elif self._kind(node.node) is Kind.COUNT or node.args:
            raise UnprovenError(f"is {node.name}")
        return Kind.FIXED

    def _filter(self, node: nodes.Filter) -> Kind:
        if node.node is None:
            raise UnprovenError("a filter block")
        kind = self._at_most(Kind.TEXT, node.node)
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
        worst = max(kind, self._at_most(Kind.TEXT, *arguments))
        if worst is Kind.FIXED:
            return Kind.FIXED
        if node.name == "replace":
            return self._call_on_text("replace", [getattr(argument, "value", None) for argument in arguments])
        if node.name in ("length", "count"):
            return Kind.FIXED if self._is_list(node.node) else Kind.COUNT
        is_pure = node.name in _PURE_FILTERS and not (node.name in ("trim", "dictsort") and arguments)
        if is_pure or (node.name in ("join", "list", "first", "last") and self._is_list(node.node)):
            return Kind.TEXT
        raise UnprovenError(f"the filter {node.name}")

    def _call(self, node: nodes.Call) -> Kind:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise UnprovenError("a call with *arguments")
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
        kind = self._at_most(Kind.TEXT, *arguments)
        if isinstance(node.node, nodes.Name):
            return self._call_by_name(node, node.node.name, kind)
        if not isinstance(node.node, nodes.Getattr):
            raise UnprovenError("a call of a value")
        owner, method = node.node.node, node.node.attr
        worst = max(kind, self._at_most(Kind.TEXT, owner))
        if method == "get" and arguments and (key := _strings(arguments[0])):
            return max(self._attribute(owner, key[0]), *map(self._kind, arguments))
        if worst is Kind.FIXED:
            return Kind.FIXED
        return self._call_on_text(method, [getattr(argument, "value", None) for argument in arguments])

    def _call_by_name(self, node: nodes.Call, name: str, kind: Kind) -> Kind:
        if (macro := self._macros.get(name)) is None:
            if name not in _GLOBALS:
                raise UnprovenError(f"a call of {name}")
            return self._at_most(Kind.FIXED, *node.args) if name == "range" else kind
        given = {parameter.name: value for parameter, value in zip(macro.args, node.args, strict=False)}
        given |= {keyword.key: keyword.value for keyword in node.kwargs}
        if len(node.args) > len(macro.args) or not {parameter.name for parameter in macro.args}.issuperset(given):
            raise UnprovenError("a macro with *arguments")
        for parameter, value in given.items():
            self._set(f"{name}/{parameter}", self._kind(value), self._is_list(value))
        return max(kind, self._kinds.get(name, Kind.FIXED))

    def _call_on_text(self, method: str, constants: list[Any]) -> Kind:
        """Return the kind of `text.method(*constants)`."""
        match method, constants:
            case (("strip" | "lstrip" | "rstrip"), []):
                return Kind.TEXT
            case (("strip" | "lstrip" | "rstrip"), [str(letters)]) if not letters.strip():
                return Kind.TEXT
            case (("startswith" | "endswith"), [str(text)]):
                self.searched.add(text)
                return Kind.FIXED
            case "split", [str(text)] if text:
                self.searched.add(text)
                return Kind.TEXT
            case "replace", [str(text), str()] if text:
                self.searched.add(text)
                return Kind.TEXT
            case "items", []:
                return Kind.TEXT
        raise UnprovenError(f"the method {method}")

    def _is_countable(self, node: nodes.Node) -> bool:
        """Tell whether it has the same number of items in both chats: it is no text, or its template asks first."""
        is_split = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "split"
        return is_split or _is_of_pairs(node) or self._is_list(node) or _place(node) in self._no_texts

    def _is_list(self, node: nodes.Node | None) -> bool:
        match node:
            case nodes.List():
                return True
            case nodes.Name():
                return self._lists.get(self._key(node.name), False)
            case nodes.Getattr(node=nodes.Name(name=owner)) if owner in self._namespaces:
                return self._lists.get(f"{owner}.{node.attr}", False)
            case nodes.Getattr():
                return node.attr in _LIST_KEYS
            case nodes.Getitem(arg=nodes.Slice()):
                return self._is_list(node.node)
            case (
                nodes.Getitem(arg=nodes.Const(value=key))
                | nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value=key), *_])
            ):
                return key in _LIST_KEYS
            case nodes.Call():
                return _called(node) == "range"
            case nodes.Add() | nodes.Or():
                return self._is_list(node.left) and self._is_list(node.right)
            case nodes.CondExpr():
                return self._is_list(node.expr1) and self._is_list(node.expr2)
            case nodes.Filter():
                return node.name == "list" and self._is_list(node.node)
        return False


def _called(node: nodes.Node) -> str | None:
    return node.node.name if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) else None


def _is_of_pairs(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return node.node.attr == "items"
    return isinstance(node, nodes.Filter) and node.name in ("items", "dictsort")


def _no_texts(test: nodes.Node, *, holds: bool) -> frozenset[str]:
    """Return the expressions that are no text if the test of an `if` holds, or if it does not."""
    match test:
        case nodes.Not():
            return _no_texts(test.node, holds=not holds)
        case nodes.And() if holds:
            return _no_texts(test.left, holds=True) | _no_texts(test.right, holds=True)
        case nodes.Or() if not holds:
            return _no_texts(test.left, holds=False) | _no_texts(test.right, holds=False)
        case nodes.Test(name="mapping") if holds:
            return frozenset({_place(test.node)})
        case nodes.Test(name="string") if not holds:
            return frozenset({_place(test.node)})
    return frozenset()


def _place(node: nodes.Node) -> str:
    """Spell an expression; `message.content`, `message["content"]` and `message.get("content")` are spelled alike."""
    match node:
        case nodes.Name():
            return node.name
        case (
            nodes.Getattr(node=owner, attr=key)
            | nodes.Getitem(node=owner, arg=nodes.Const(value=key))
            | nodes.Call(node=nodes.Getattr(node=owner, attr="get"), args=[nodes.Const(value=key)])
        ):
            return f"{_place(owner)}.{key}"
    return repr(node)


def _assigned(macro: nodes.Macro) -> set[str]:
    return {name.name for name in macro.find_all(nodes.Name) if name.ctx in ("store", "param")}


def _outputs(statement: nodes.Node) -> Iterable[nodes.Output]:
    return [statement] if isinstance(statement, nodes.Output) else statement.find_all(nodes.Output)


def _strings(node: nodes.Node) -> list[str] | None:
    """Return the strings of a constant or of a list of constants; None for anything else."""
    items = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    constants = [item.value if isinstance(item, nodes.Const) else None for item in items]
    strings = [constant for constant in constants if isinstance(constant, str)]
    return strings if len(strings) == len(items) else None
