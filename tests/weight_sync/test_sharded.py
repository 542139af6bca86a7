"""What leaves a wrapped model is, bit for bit, what leaves the bare one: two ranks over gloo, every wrapping for real.

DDP, FSDP1 and FSDP2 are torch's own. ZeRO is DeepSpeed's, which `make setup-test` installs beside the environment:
whatever imports accelerate would import it too, for seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.weight_sync.sharded import CASES, WRAPPINGS

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = ROOT / ".setup" / "deepspeed"
NUM_RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by wrapping and case."""
    assert DEEPSPEED.is_dir(), "DeepSpeed is missing: run `make setup-test`"
    folder = tmp_path_factory.mktemp("found")
    launch = [sys.executable, "-m", "tests.fork_ranks", str(NUM_RANKS), "tests.weight_sync.sharded", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(DEEPSPEED)}
    done = subprocess.run(launch, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_values_and_fingerprint_are_those_of_the_bare_model(
    found: list[dict[str, Any]], wrapping: str, case: str
) -> None:
    for rank in found:
        checked = rank[wrapping][case]
        assert len(checked) >= 6
        assert all(checked.values()), checked


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_optimizer_step_arrives(found: list[dict[str, Any]], wrapping: str) -> None:
    assert [rank[wrapping]["step"] for rank in found] == [True] * NUM_RANKS


@pytest.mark.parametrize("wrapping", [name for name in WRAPPINGS if name not in ("ddp", "zero2")])
def test_what_only_peft_can_merge_is_refused_where_parameters_are_sharded(
    found: list[dict[str, Any]], wrapping: str
) -> None:
    assert [rank[wrapping]["refusal"] for rank in found] == [True] * NUM_RANKS


@pytest.mark.parametrize("wrapping", ["fsdp1", "fsdp1_flat"])
def test_a_model_taken_out_of_fsdp1_is_refused(found: list[dict[str, Any]], wrapping: str) -> None:
    assert [rank[wrapping]["unwrapped"] for rank in found] == [True] * NUM_RANKS
