"""Recipes are scripts, not a package: import them by path, under names that clash with nothing."""

import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

# No timed assertions: the machine may be busy, and the first example of a run builds hypothesis' character tables.
settings.register_profile("trl-gym", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trl-gym")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores SIGINT, and so would every child that the tests send one to.
    signal.signal(signal.SIGINT, signal.default_int_handler)


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CALCULATOR = RECIPES / "environments" / "calculator"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def calculator_dir() -> Path:
    return CALCULATOR


@pytest.fixture(scope="session")
def calculator_data() -> ModuleType:
    return load("recipe_calculator_data", CALCULATOR / "generate_data.py")


@pytest.fixture(scope="session")
def calculator_scoring() -> ModuleType:
    path = CALCULATOR / "resources_servers" / "calculator" / "calculator_scoring.py"
    return load("recipe_calculator_scoring", path)


@pytest.fixture(scope="session")
def tiny_policy() -> ModuleType:
    return load("recipe_tiny_policy", RECIPES / "tiny_policy.py")
