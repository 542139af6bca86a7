"""Names of other packages that are private or move between releases: all are in the table of `docs/architecture.md`,
TRL's methods that we override have the signatures that we expect, and `trl_gym.upstream` finds what a version lacks.
mypy does not follow these packages."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import transformers
from trl import GRPOConfig, GRPOTrainer

from trl_gym import GymGRPOConfig, GymGRPOTrainer, upstream

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_gym"
# Documented packages of theirs; everything else below these distributions may move.
PUBLIC = {"accelerate.utils", "transformers.utils"}
DOCUMENTED = {"os._exit"}  # public, whatever it looks like
FOLLOWED = {"accelerate", "deepspeed", "nemo_gym", "peft", "transformers", "trl", "vllm"}
TRAINERS = (
    GRPOTrainer,
    *(kind for kind in GRPOTrainer.__mro__ if kind.__module__.startswith(("trl.", "transformers."))),
)


def table() -> set[tuple[str, str]]:
    """Name and file of every row."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| [^|]* \| `([\w/]+\.py)` \| [^|]+ \|$", page, flags=re.MULTILINE)
    return {(name, file) for names, file in rows for name in re.findall(r"`([^`]+)`", names)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def self_attributes(tree: ast.AST, *, stored: bool) -> set[str]:
    kinds = ast.Store if stored else (ast.Store, ast.Load)
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, kinds)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def upstream_names() -> set[str]:
    """Attributes and methods that TRL's and transformers' trainers have."""
    found = {name for name in dir(GRPOTrainer) if not name.startswith("__")}
    for kind in TRAINERS:
        found |= self_attributes(ast.parse(textwrap.dedent(inspect.getsource(kind))), stored=True)
    return found


def defined_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private attributes that are not defined in the same file, and those that are asked for by a text."""
    own = set(defined_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if ast.unparse(node) not in DOCUMENTED:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            asked = node.args[1]
            if isinstance(asked, ast.Constant) and is_private(asked.value):
                yield asked.value


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Modules that may move, and private names of any."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
        else:
            continue
        for module in modules:
            moves = module.split(".")[0] in FOLLOWED and "." in module and module not in PUBLIC
            if moves or module.split(".")[0] == "nemo_gym" or any(is_private(part) for part in module.split(".")):
                yield module


@cache
def used() -> frozenset[tuple[str, str]]:
    """Name and file of everything that the table has to have."""
    upstream, found = upstream_names(), set()
    for path in PACKAGE.rglob("*.py"):
        tree, file = ast.parse(path.read_text()), str(path.relative_to(PACKAGE))
        names = {*private_names(tree), *imported_modules(tree)}
        if file == "trainer.py":
            stored = self_attributes(tree, stored=True)
            read = {name for name in self_attributes(tree, stored=False) if is_private(name)}
            names |= upstream & (stored | read | set(vars(GymGRPOTrainer)))
        if file == "config.py":
            names |= {name for name, own in vars(GymGRPOConfig).items() if isinstance(own, property)} & set(
                dir(GRPOConfig)
            )
        found |= {(name, file) for name in names if not name.startswith("trl_gym")}
    return frozenset(found)


def test_every_private_or_moving_name_is_in_the_table_of_the_architecture_page() -> None:
    missing = sorted(used() - table())
    assert not missing, f"give each a row with its reason, or use a public name: {missing}"


def test_the_table_has_no_row_for_what_is_not_used() -> None:
    assert not sorted(table() - used())


def test_the_scan_sees_what_it_is_for() -> None:
    tree = ast.parse(
        "from a import _b\nimport c._d\nfrom vllm.x import y\nfrom accelerate.utils import z\n"
        "class K:\n    def _own(self): self._own(); other._theirs; getattr(other, '_asked')\n"
    )
    assert set(private_names(tree)) == {"_theirs", "_asked"}
    assert set(imported_modules(tree)) == {"a._b", "c._d", "vllm.x"}
    assert {"_step", "_buffered_inputs", "beta", "_save_checkpoint"} <= upstream_names()


OVERRIDDEN = sorted(
    name
    for name, value in vars(GymGRPOTrainer).items()
    if inspect.isfunction(value) and hasattr(GRPOTrainer, name) and name not in ("__init__", "__enter__", "__exit__")
)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_override_takes_what_the_method_of_the_installed_trl_takes(name: str) -> None:
    theirs = list(inspect.signature(getattr(GRPOTrainer, name)).parameters.values())
    own = list(inspect.signature(getattr(GymGRPOTrainer, name)).parameters.values())
    named = [parameter for parameter in own if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    takes_rest = {parameter.kind for parameter in own} >= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    # Same names in the same places, since callers may use either; the rest is passed on.
    assert [parameter.name for parameter in named] == [parameter.name for parameter in theirs][: len(named)]
    assert takes_rest or len(named) == len(theirs), [parameter.name for parameter in theirs]
    for expected, actual in zip(theirs, named, strict=False):
        assert (expected.default is expected.empty) == (actual.default is actual.empty), actual.name


def test_the_constructor_passes_on_what_the_installed_trl_takes() -> None:
    theirs = inspect.signature(GRPOTrainer.__init__).parameters
    own = list(inspect.signature(GymGRPOTrainer.__init__).parameters)
    positional = own[: own.index("policy_server")]
    assert positional == list(theirs)[: len(positional)]
    assert {"rollout_func", "processing_class", "peft_config", "quantization_config", "callbacks"} <= set(theirs)
    assert {"tools", "environment_factory"} <= set(theirs)  # refused


def test_generate_returns_completions_where_they_are_replaced() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(GRPOTrainer._generate))))
    [returned] = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    assert [name.id for name in returned.elts[:4]] == ["prompt_ids", "completion_ids", "tool_mask", "completions"]


def test_transformers_writes_jit_checkpoints_where_we_expect_it() -> None:
    """Resuming relies on the file that marks an unfinished one, and on the events at which it is written."""
    from transformers import trainer_jit_checkpoint as jit

    from trl_gym import checkpoints

    assert f'"{checkpoints.INCOMPLETE}"' in inspect.getsource(jit.CheckpointManager)
    assert "self.trainer._save_checkpoint" in inspect.getsource(jit.CheckpointManager)
    events = {name for name in vars(jit.JITCheckpointCallback) if name.startswith("on_")}
    assert events == {"on_pre_optimizer_step", "on_step_begin", "on_step_end", "on_epoch_end", "on_train_end"}
    assert transformers.__version__.startswith("5.")


# -- what an installed version lacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", sorted(FOLLOWED - {"deepspeed", "nemo_gym"}))
def test_the_installed_versions_have_every_name(package: str) -> None:
    assert upstream.missing(package) == []


def package_of(folder: Path, **modules: str) -> Path:
    """A package of the given sources; `__` in a name stands for a dot."""
    for name, source in modules.items():
        path = folder.joinpath("vllm", *name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "vllm"


def test_what_a_version_lacks_is_named_with_the_file_that_uses_it(tmp_path: Path) -> None:
    theirs = package_of(
        tmp_path,
        config="class VllmConfig: ...",
        engine__arg_utils="if True:\n    class AsyncEngineArgs: ...",
        entrypoints__launchers__launcher="word = 'validate_api_server_args'",
        reasoning="def __getattr__(name): ...",
        entrypoints__common__cli_args="from vllm.x import make_arg_parser, validate_parsed_serve_args",
        entrypoints__common__startup="cli_env_setup = print",
    )
    told = upstream.missing("vllm", theirs)
    lacks = {name.partition(" ")[0] for name in told if name.endswith(" (policy_server/engine/entry.py)")}
    assert "vllm.entrypoints.launchers.launcher.validate_api_server_args" in lacks
    assert "vllm.tool_parsers.ToolParserManager" in lacks
    there = ("config.", "engine.arg_utils", "reasoning", "entrypoints.common", "entrypoints.launchers.cli_args")
    assert not [name for name in lacks if name.startswith(tuple(f"vllm.{module}" for module in there))]
    assert told == sorted(told)


def test_alternatives_are_one_need_and_what_may_be_missing_is_none() -> None:
    tree = ast.parse(
        "import a.b, other\nfrom a.c import d, e\nfrom .a import f\n"
        "if TYPE_CHECKING:\n    from a.typed import g\nelse:\n    import a.run\n"
        "try:\n    from a.new import h\nexcept ImportError:\n    from a.old import h\n"
        "try:\n    import a.extra\nexcept (ImportError, OSError):\n    pass\n"
        "try:\n    import a.needed\nexcept ImportError as error:\n    raise RuntimeError from error\n"
        "def late():\n    try:\n        import a.later\n    except ValueError:\n        pass\n"
    )
    assert upstream.Imports(tree, "a").needs == [
        [[("a.b", "")]],
        [[("a.c", "d"), ("a.c", "e")]],
        [[("a.run", "")]],
        [[("a.new", "h")], [("a.old", "h")]],
        [[("a.needed", "")]],
        [[("a.later", "")]],
    ]


def test_a_method_of_trl_that_takes_something_else_is_named(tmp_path: Path) -> None:
    source = inspect.getsource(inspect.getmodule(GRPOTrainer))
    trainer = tmp_path / "trl" / "trainer" / "grpo_trainer.py"
    trainer.parent.mkdir(parents=True)
    trainer.write_text(source.replace("def _calculate_rewards(self, inputs,", "def _calculate_rewards(self, rows,"))
    lacks = [name for name in upstream.missing("trl", tmp_path / "trl") if "_calculate_rewards" in name]
    assert lacks == [
        "trl.GRPOTrainer._calculate_rewards(inputs, prompts, completions, completion_ids_list) (trainer.py)"
    ]
    trainer.write_text(source.replace("_buffered_inputs", "_kept"))
    assert "trl.GRPOTrainer._buffered_inputs (trainer.py)" in upstream.missing("trl", tmp_path / "trl")


def test_every_name_of_trl_in_the_table_is_looked_for() -> None:
    overridden, attributes = upstream.trainer_needs((PACKAGE / "trainer.py").read_text())
    assert {name for name, file in table() if file == "trainer.py"} <= {*overridden, *attributes}
