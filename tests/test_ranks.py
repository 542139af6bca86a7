"""What fails on one rank is raised on all of them, and the loss of a rank is told in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import wait_for
from tests.test_processes import alive
from trl_gym.errors import (
    ConfigError,
    GymServerError,
    GymServerLostError,
    PolicyServerError,
    PolicyServerLostError,
    Problem,
    RankLostError,
    RolloutError,
    ServerError,
    TrlGymError,
    WeightMismatchError,
    WeightSyncError,
)
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.ranks import agree, agree_on_loss, explained, is_launcher, on_all, on_main


class Ranks:
    """A `gather_object` for threads that play ranks."""

    def __init__(self, number: int) -> None:
        self._barrier = threading.Barrier(number)
        self._given: dict[int, list[Any]] = {}
        self.number = number

    def gather(self, rank: int) -> Any:
        def gather(values: list[Any]) -> list[Any]:
            self._given[rank] = values
            self._barrier.wait(60)
            gathered = [value for place in range(self.number) for value in self._given[place]]
            self._barrier.wait(60)  # the next call must not come between
            return gathered

        return gather


def on_ranks(number: int, call: Callable[[int, Any], Any]) -> list[Any]:
    """What every rank returns, or raises. A collective that not all ranks reach breaks the barrier."""
    ranks = Ranks(number)

    def play(rank: int) -> Any:
        try:
            return call(rank, ranks.gather(rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(play, range(number)))


def outcomes(errors: list[Exception | None]) -> list[Any]:
    """What every rank ends with when they agree on these."""
    return on_ranks(len(errors), lambda rank, gather: agree(errors[rank], rank, gather) and None)


def test_nothing_happens_when_nothing_went_wrong() -> None:
    assert outcomes([None, None, None]) == [None, None, None]


@pytest.mark.parametrize("kind", [PolicyServerError, WeightSyncError, WeightMismatchError, ServerError])
def test_every_rank_raises_the_same_kind(kind: type[TrlGymError]) -> None:
    own = kind("it is gone")
    first, second, third = outcomes([None, own, None])
    assert second is own
    assert type(first) is type(third) is kind
    assert str(first) == "rank 1: it is gone"


def test_a_subclass_that_cannot_be_sent_is_raised_as_what_it_is_kind_of() -> None:
    class Refused(PolicyServerError):
        def __init__(self, status: int, detail: str) -> None:
            super().__init__(f"{status}: {detail}")

    first, second = outcomes([Refused(500, "no"), None])
    assert isinstance(first, Refused)
    assert type(second) is PolicyServerError and str(second) == "rank 0: 500: no"


def test_an_error_of_another_kind_reaches_the_others_too() -> None:
    first, second = outcomes([ZeroDivisionError(), None])
    assert isinstance(first, ZeroDivisionError)
    assert type(second) is TrlGymError and "ZeroDivisionError" in str(second)


def test_of_several_failures_each_rank_raises_its_own_and_others_the_first() -> None:
    own = [PolicyServerError("a"), None, WeightSyncError("b")]
    ended = outcomes(own)
    assert ended[0] is own[0] and ended[2] is own[2]
    assert str(ended[1]) == "rank 0: a"


def test_problem_remedy_and_parts_reach_the_other_ranks() -> None:
    own = ConfigError("`x` is 3.", "Set it to 4.", [Problem("One.", "Fix it."), Problem("Two.")])
    _, other = outcomes([own, None])
    assert (other.problem, other.remedy, other.problems) == ("rank 0: `x` is 3.", own.remedy, own.problems)


def test_a_lost_server_stays_lost_on_the_other_ranks() -> None:
    _, other = outcomes([PolicyServerLostError("It died.", "Start it."), None])
    assert type(other) is PolicyServerLostError and other.remedy == "Start it."
    _, other = outcomes([PolicyResponseError("HTTP 500.", 500), None])
    assert type(other) is PolicyServerError


# What a server's answer, a file or a bug may raise where one of our own errors was expected.
UNEXPECTED = [OSError("No space left on device"), KeyError("head_url"), AssertionError(), TypeError("'NoneType'")]


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", [on_main, on_all])
def test_work_that_fails_unexpectedly_on_one_rank_ends_on_all(error: Exception, where: Any) -> None:
    def work(rank: int) -> int:
        if rank == 0:
            raise error
        return rank

    first, second, third = on_ranks(
        3, lambda rank, gather: where(SimpleNamespace(process_index=rank), lambda: work(rank), gather)
    )
    assert first is error
    assert type(second) is type(third) is TrlGymError and str(second).startswith(f"rank 0: {type(error).__name__}")


def test_what_rank_0_returns_is_known_to_all_and_what_each_returns_to_itself() -> None:
    called: list[int] = []

    def play(rank: int, gather: Any) -> Any:
        process = SimpleNamespace(process_index=rank)
        address = on_main(process, lambda: called.append(rank) or f"address of {rank}", gather)
        return address, on_all(process, lambda: rank, gather)

    assert on_ranks(3, play) == [("address of 0", rank) for rank in range(3)]
    assert called == [0]


LOSS = PolicyServerLostError("POST /trl_gym/rollouts/records: connection refused", "Start it again.")
LOSS.silent_s = 7.0  # seconds that count where the server is looked at
GYM_LOSS = GymServerLostError("NeMo Gym died")
LOSSES = (LOSS, GYM_LOSS)
kinds = st.sampled_from([None, *LOSSES, GymServerError("not ours"), RolloutError("drift"), KeyError("reward")])


@given(st.lists(kinds, min_size=1, max_size=4))
def test_all_ranks_hear_of_a_loss_alike(errors: list[Exception | None]) -> None:
    got = on_ranks(
        len(errors), lambda rank, gather: agree_on_loss(SimpleNamespace(process_index=rank), errors[rank], gather)
    )
    others = [error for error in errors if error is not None and error not in LOSSES]
    for own, heard in zip(errors, got, strict=True):
        if others:
            kind = type(others[0]) if isinstance(others[0], TrlGymError) else TrlGymError
            assert heard is own if own in others else type(heard) is kind
        elif LOSS in errors:
            assert isinstance(heard, PolicyServerLostError) and str(heard) == str(LOSS)
            assert heard.silent_s == LOSS.silent_s > 0
        elif GYM_LOSS in errors:
            assert isinstance(heard, GymServerLostError) and str(heard) == str(GYM_LOSS)
        else:
            assert heard is None


# -- a rank that is gone ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        WeightSyncError(GLOO),
        KeyError("a"),
        ConnectionResetError("Connection reset by peer"),
    ],
)
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
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == -signal.SIGTERM
    assert words in done.stderr


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /venv/bin/accelerate launch -m trl_gym.train", True),
        ("python -u -m torch.distributed.run --nproc-per-node 2 grpo.py", True),
        ("/venv/bin/torchrun grpo.py", True),
        ("-bash", False),  # whose end `nohup` survives
        ("python wrapper.py --config x.yaml accelerate", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_command_line(command: str, expected: bool) -> None:
    assert is_launcher(command.split(" ")) is expected


# As `accelerate launch` starts one process: it does not pass SIGTERM on.
LAUNCHER = """
import subprocess, sys
child = "import time; from trl_gym import ranks; ranks.end_with_launcher(); print(1, flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child]).wait()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_training_ends_when_its_launcher_does(tmp_path: Path, how: signal.Signals) -> None:
    launcher = tmp_path / "accelerate"
    launcher.write_text(LAUNCHER)
    with subprocess.Popen([sys.executable, launcher], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == b"1\n"
        [child] = psutil.Process(run.pid).children()
        run.send_signal(how)
        wait_for(lambda: not alive(child.pid))


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from trl_gym import ranks
ranks.end_with_launcher()
launcher = os.getppid()
try:
    print(1, flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    while os.getppid() == launcher:  # it ends first
        time.sleep(0.01)
    Path(sys.argv[1]).write_text("saved")
"""


def test_what_ctrl_c_begins_is_not_cut_by_the_end_of_the_launcher(tmp_path: Path) -> None:
    launcher, saved = tmp_path / "accelerate", tmp_path / "saved"
    launcher.write_text(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {INTERRUPTED!r}, {str(saved)!r}]).wait()\n"
    )
    command = [sys.executable, launcher]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as run:
        assert run.stdout is not None and run.stdout.readline() == b"1\n"
        os.killpg(run.pid, signal.SIGINT)
        wait_for(saved.exists, "the interrupted process to finish what it does at its end")
