"""Recipes are scripts, not a package: import them by path, under names that clash with nothing."""

import asyncio
import importlib.util
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No timed assertions: the machine may be busy, and the first example of a run builds hypothesis' character tables.
settings.register_profile("trl-gym", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trl-gym")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores SIGINT, and so would every child that the tests send one to.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(condition: Callable[[], Any], what: str = "", *, timeout_s: float = 60.0) -> Any:
    """Return what the condition gives once it holds. Asked a hundred times per second: tests wait for nothing else."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out after {timeout_s:g} s: {what}"
        time.sleep(0.01)
    return found


async def until(condition: Callable[[], Any], what: str = "", *, timeout_s: float = 60.0) -> Any:
    """Do the same in an event loop."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out after {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)
    return found


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
