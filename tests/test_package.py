"""Importing is cheap, and the public names are the ones that are promised."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trl_gym
from tests.fork_ranks import run

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up: folders and files of the package. One imports at run time only from those in lines above its own.
ROOMS = (
    ("redaction", "untrusted", "upstream"),
    ("errors", "supervisor"),
    ("compat", "given", "hub", "processes", "responses", "rollout_options", "storage", "trl_options", "threads"),
    ("engines",),
    ("config_checks",),
    ("config", "dataset", "recipes"),
    ("gym", "policy_server", "ranks"),
    ("folder_owner", "memory", "rollouts", "weight_sync"),
    ("run",),
    ("accounting", "checkpoints", "model_card", "progress"),
    ("made_with",),
    ("resume",),
    ("batches", "callbacks"),
    ("trainer",),
    ("train",),
    ("doctor", "report"),
    ("commands",),
    ("cli", "notebook"),
)
HEAVY = ("torch", "vllm", "transformers", "trl", "datasets", "aiohttp")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import trl_gym, trl_gym.errors") == set()


@pytest.mark.parametrize(
    "module", ["trl_gym.policy_server.server", "trl_gym.gym.servers", "trl_gym.rollouts.trajectory", "trl_gym.cli"]
)
def test_servers_and_command_line_need_neither_torch_nor_vllm(module: str) -> None:
    assert not {"torch", "vllm", "transformers"} & loaded_after(f"import {module}")


def say_what_is_loaded() -> None:
    from trl_gym import GymGRPOConfig, GymGRPOTrainer, load_gym_dataset, train  # noqa: F401

    sys.stdout.write(" ".join(name for name in HEAVY if name in sys.modules))


def test_config_dataset_and_trainer_do_not_load_vllm() -> None:
    """Where `run` forks, the configuration was imported first, as in every script."""
    done = run(say_what_is_loaded)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and "vllm" not in done.stdout


def test_what_is_imported_is_declared() -> None:
    """A package that happens to come with vLLM is missing where a trainer, or a gateway, runs without it."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["peft"], *extras["deepspeed"], *extras["plot"]]
    declared = {re.split(r"[<>=\[ ]", requirement)[0].replace("pyyaml", "yaml") for requirement in wanted}
    declared |= {
        "torch",
        "numpy",
        "yarl",
        "tokenizers",
        "huggingface_hub",
        "IPython",
    }  # transformers, accelerate and aiohttp are nothing without them; IPython is imported where it runs us
    # These run in vLLM's processes or in NeMo Gym's; `vllm_transfer.py` where the trainer is found to have vLLM too.
    elsewhere = {"entry.py", "forking.py", "plugin.py", "file_engine.py", "vllm_transfer.py"}
    elsewhere |= {"carrier.py", "host.py", "local_calls.py"}
    files = [path for path in (ROOT / "trl_gym").rglob("*.py") if path.name not in elsewhere]
    imported = {name for path in files for name in third_party(ast.parse(path.read_text()))}
    assert "msgspec" in imported
    assert imported - declared == set()


def third_party(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in (full.partition(".")[0] for full in names):
            if name != "trl_gym" and name not in sys.stdlib_module_names:
                yield name


def test_public_names() -> None:
    assert sorted(trl_gym.__all__) == [
        "ForkServer",
        "GymGRPOConfig",
        "GymGRPOTrainer",
        "GymServers",
        "PolicyServer",
        "TrlGymError",
        "__version__",
        "load_gym_dataset",
        "mix_gym_datasets",
    ]
    for name in trl_gym.__all__:
        assert getattr(trl_gym, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = trl_gym.nonsense


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "trl_gym").rglob("*.py")}


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, those in functions too, without what is for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from (other, *at_run_time(other))
        else:
            yield from (child, *at_run_time(child))


def imported_by(path: Path) -> set[str]:
    """Modules of the package that a file imports at run time."""
    names = set()
    for node in at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: imported_by(path) for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports, functions included: {' → '.join(error.args[1])}")


def test_a_room_imports_from_rooms_below_it() -> None:
    level = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    rooms = {room_of(module) for module in MODULES} - {"__init__"}
    assert rooms == level.keys()  # a new one has its place
    upward = [
        f"{module} imports {other}"
        for module, path in sorted(MODULES.items())
        for other in sorted(imported_by(path))
        if room_of(module) != "__init__" and room_of(other) not in ("__init__", room_of(module))
        if level[room_of(other)] >= level[room_of(module)]
    ]
    assert upward == []
