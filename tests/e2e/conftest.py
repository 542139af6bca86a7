"""What the end-to-end tests share. Servers are module-scoped: never two vLLM servers at once."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

RUNS = Path(__file__).resolve().parents[2] / "runs"


@pytest.fixture(scope="session")
def small_policy(tiny_policy: ModuleType) -> Path:
    """The quickstart's policy, in the place where the quickstart keeps it; built once per checkout."""
    return tiny_policy.build_tiny_policy(RUNS / "small_policy", seed=0)
