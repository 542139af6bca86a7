"""Recipes are scripts, not a package: import them by path, under names that clash with nothing."""

import asyncio
import atexit
import contextlib
import gc
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

# No timed assertions: the machine may be busy, and the first example of a run builds hypothesis' character tables.
settings.register_profile("trl-gym", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trl-gym")

gc.disable()  # until all tests are collected: to look again and again through what they import takes ten seconds

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores SIGINT, and so would every child that the tests send one to.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def server_below(child: Any) -> psutil.Process:
    """Return the server of a `ChildProcess`, which is below a guard and a supervisor."""
    [supervisor] = psutil.Process(child.pid).children()
    [server] = wait_for(supervisor.children)
    return server


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str] = "", *, timeout_s: float = 120.0) -> Any:
    """Return what the condition gives once it holds. Asked a hundred times per second: tests wait for nothing else."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"timed out after {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.01)
    return found


async def until(condition: Callable[[], Any], what: str = "", *, timeout_s: float = 120.0) -> Any:
    """Do the same in an event loop."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out after {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what starts real servers last: most mistakes show in the seconds before."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.enable()
    atexit.register(end, session, os.getpid())


def end(session: pytest.Session, pid: int) -> None:
    """Spare Python its last look through everything, which takes five seconds."""
    if os.getpid() == pid:  # a fork has a status of its own
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(session.exitstatus)


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays() -> None:
    """Keep garbage collections, with which every training ends, to what the tests of a file make."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_tests() -> Iterator[None]:
    """Fail the last test when a process that any of them started still runs."""
    yield
    stop_forkserver()
    wait_for(lambda: not children(), what=lambda: f"every child is gone: {children()}")


def children() -> list[list[str]]:
    """Return the command lines of what runs below this process; multiprocessing's tracker ends with it."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child.cmdline())
    return found


def stop_forkserver() -> None:
    """End what `multiprocessing` forks from, if there is one."""
    if "multiprocessing.forkserver" in sys.modules:
        sys.modules["multiprocessing.forkserver"]._forkserver._stop()


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CALCULATOR = RECIPES / "environments" / "calculator"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def page_code(name: str) -> str:
    """All Python blocks of a page of the documentation, in their order."""
    page = (RECIPES.parent / "docs" / name).read_text()
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))


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
