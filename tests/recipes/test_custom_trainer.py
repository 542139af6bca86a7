"""`recipes/custom_trainer.py`: each override by itself. `tests/e2e/test_custom_trainer.py` trains with all of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import RECIPES, load, page_code
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


# The script up to the trainer, which is tested below: in a process of its own, since it sets logging up.
SCRIPT = """
import contextlib, sys
sys.path.insert(0, "recipes")
import custom_trainer

class Stand(contextlib.nullcontext):
    def __init__(self, model, reward_funcs, args, train_dataset, eval_dataset, peft_config):
        super().__init__(self)
        print(args.easy_steps, args.turn_tokens, args.reward_weights, args.num_generations, end=" ")
        print(len(train_dataset), len(eval_dataset))

    def train(self, resume_from_checkpoint):
        print("trained")

custom_trainer.CustomTrainer = Stand
custom_trainer.main()
"""


def test_the_script_reads_the_quickstarts_configuration(tmp_path: Path) -> None:
    options = ["--config", "recipes/quickstart.yaml", "--output_dir", str(tmp_path), "--model_name_or_path", "none"]
    command = [sys.executable, "-c", SCRIPT, *options, "--turn_tokens", "20", "--use_cpu", "true"]
    done = subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["8 20 [1.0, 0.1] 8 4000 256", "trained"]
