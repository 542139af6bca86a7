"""`recipes/custom_trainer.py`: each override by itself. `tests/e2e/test_custom_trainer.py` trains with all of them."""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import RECIPES, load, page_code
from tests.fork_ranks import run
from trl_gym.rollouts.trajectory import Trajectory


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load("recipe_custom_trainer", RECIPES / "custom_trainer.py")


def functions(code: str) -> set[tuple[str, ...]]:
    """Name, arguments and statements of a script's functions, without docstrings and annotations."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found.add((node.name, *(arg.arg for arg in node.args.args), *map(ast.unparse, body)))
    return found


def test_the_page_has_the_functions_of_the_recipe() -> None:
    """`tests/e2e/test_custom_trainer.py` trains with those of the page."""
    recipe = functions((RECIPES / "custom_trainer.py").read_text())
    assert len(recipe) == 9 and recipe - functions(page_code("custom_trainer.md")) == set()


def trajectory() -> Trajectory:
    """Two turns, of two tokens and of one, with two tokens of a tool between them."""
    return Trajectory(
        prompt_ids=[1, 2],
        completion_ids=[3, 4, 5, 6, 7],
        env_mask=[1, 1, 0, 0, 1],
        logprobs=[-0.1, -0.2, 0.0, 0.0, -0.3],
        num_turns=2,
        turn_ends=[2, 5],
    )


def test_turns_that_are_not_trained_stay_as_context(recipe: ModuleType) -> None:
    first = recipe.train_turns(trajectory(), 1)
    assert (first.env_mask, first.logprobs) == ([1, 1, 0, 0, 0], [-0.1, -0.2, 0.0, 0.0, 0.0])
    assert (first.prompt_ids, first.completion_ids) == (trajectory().prompt_ids, trajectory().completion_ids)
    assert recipe.train_turns(trajectory(), 2) == recipe.train_turns(trajectory(), 9) == trajectory()


def test_only_the_policys_own_number_is_a_bare_answer(recipe: ModuleType) -> None:
    ends = [("assistant", " 83\n"), ("assistant", "It is 83."), ("assistant", ""), ("tool", "83"), ("assistant", "-4")]
    completions = [[{"role": role, "content": content}] for role, content in ends]
    assert recipe.bare_answer(completions=completions, gym_reward=[]) == [1.0, 0.0, 0.0, 0.0, 1.0]


class Stand(contextlib.nullcontext[Any]):
    def __init__(self, model: Any, reward_funcs: Any, args: Any, peft_config: Any, **datasets: Any) -> None:
        super().__init__(self)
        sizes = [len(datasets[f"{name}_dataset"]) for name in ("train", "eval")]
        found = (args.easy_steps, args.turn_tokens, args.reward_weights, args.num_generations, *sizes)
        sys.stdout.write(f"{found}\n")

    def train(self, resume_from_checkpoint: str | None) -> None:
        sys.stdout.write("trained\n")


def script(*options: str) -> None:
    """The script up to the trainer: in a process of its own, since it sets logging up."""
    recipe = load("recipe_custom_trainer", RECIPES / "custom_trainer.py")
    recipe.CustomTrainer = Stand  # type: ignore[attr-defined]
    sys.argv[1:] = options
    os.chdir(RECIPES.parent)
    recipe.main()


def test_the_script_reads_the_quickstarts_configuration(tmp_path: Path) -> None:
    options = ["--config", "recipes/quickstart.yaml", "--output_dir", str(tmp_path), "--model_name_or_path", "none"]
    done = run(script, *options, "--turn_tokens", "20", "--use_cpu", "true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["(8, 20, [1.0, 0.1], 8, 4000, 256)", "trained"]
