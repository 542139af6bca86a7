"""What the end-to-end tests share. Servers are module-scoped: never two vLLM servers at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(path: Path) -> ModuleType:
    """Import a recipe by path; recipes are scripts, not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def calculator_data() -> ModuleType:
    """`recipes/environments/calculator/generate_data.py`."""
    return load(RECIPES / "environments" / "calculator" / "generate_data.py")


@pytest.fixture(scope="session")
def small_policy() -> Path:
    """The quickstart's policy, in the place where the quickstart keeps it; built once per checkout."""
    return load(RECIPES / "tiny_policy.py").build_tiny_policy(RECIPES.parent / "runs" / "small_policy", seed=0)
