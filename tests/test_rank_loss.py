"""The loss of another rank is told in words; whatever else is left as it is."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trl_gym.errors import RankLostError, WeightSyncError
from trl_gym.ranks import explained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """As it was: after an error ours stays, until the process has ended."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


GLOO = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"


def test_a_broken_collective_is_explained() -> None:
    with (
        pytest.raises(RankLostError, match=r"Rank 1 of 4 .* in step 3") as caught,
        explained(1, 4, lambda: "in step 3"),
    ):
        raise RuntimeError(GLOO)
    assert GLOO in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), WeightSyncError(GLOO), KeyError("a")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained(1, 4, lambda: ""):
        raise error
    assert caught.value is error


def test_a_single_process_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError) as caught, explained(0, 1, lambda: ""):
        assert signal.getsignal(signal.SIGTERM) is before
        raise RuntimeError(GLOO)
    assert not isinstance(caught.value, RankLostError)


def test_a_handler_of_somebody_else_stays_and_ours_is_taken_back() -> None:
    with explained(1, 2, lambda: ""):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt), explained(1, 2, lambda: ""):
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with explained(1, 2, lambda: ""):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


TOLD_TO_END = """
with explained(2, 4, lambda: 'in step 5'):
    os.kill(os.getpid(), signal.SIGTERM)
"""
TOLD_WHILE_IT_FAILS = f"""
try:
    with explained(2, 4, lambda: 'in step 5'):
        raise RuntimeError({GLOO!r})
finally:
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (TOLD_TO_END, "Rank 2 of 4 was told to end (SIGTERM) in step 5."),
        (TOLD_WHILE_IT_FAILS, "RankLostError: Rank 2 of 4 lost the connection to another rank in step 5"),
    ],
    ids=["told to end", "told while it fails"],
)
def test_a_process_that_is_told_to_end_says_why_and_ends_by_the_signal(code: str, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import os, signal\nfrom trl_gym.ranks import explained\n{code}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGTERM
    assert words in done.stderr
