"""The rule of threads, whose OMP_NUM_THREADS it is, and what launchers really do to it."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.threads import (
    NUM_THREADS,
    SMALL_BYTES,
    WAIT_POLICY,
    Threads,
    choose_threads,
    num_cores,
    num_that_run,
    wait_without_spinning,
    wanted_threads,
)

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
SAY = """
import json, os
from trl_gym.threads import NUM_THREADS, server_environment, use_threads

threads = str(use_threads(None, on_gpu=False))
import torch

print(json.dumps([os.environ[NUM_THREADS], threads, server_environment(), torch.get_num_threads()]))
"""


@given(cores=st.integers(1, 512), ranks=st.integers(1, 16), on_gpu=st.booleans())
def test_ranks_share_the_cores_and_the_engine_takes_its_turn_on_all(cores: int, ranks: int, on_gpu: bool) -> None:
    threads = choose_threads(cores, ranks, on_gpu=on_gpu)
    assert threads.trainer >= 1
    assert threads.trainer * ranks <= max(cores, ranks)
    assert cores - threads.trainer * ranks < ranks  # no core is left that a rank could have
    assert threads.policy_server == (None if on_gpu else cores)
    assert threads.gym == 1


def test_a_small_model_is_served_with_one_thread() -> None:
    assert choose_threads(8, 1, weight_bytes=SMALL_BYTES - 1) == Threads(trainer=8, policy_server=1, gym=1)
    assert choose_threads(8, 1, weight_bytes=SMALL_BYTES).policy_server == 8


@given(cores=st.integers(1, 512), ranks=st.integers(1, 16), wanted=st.integers(1, 64))
def test_what_the_user_has_set_counts_everywhere(cores: int, ranks: int, wanted: int) -> None:
    threads = choose_threads(cores, ranks, wanted)
    assert {threads.trainer, threads.policy_server, threads.gym} == {wanted}
    assert str(wanted) in str(threads)


@pytest.mark.parametrize(
    ("environment", "launcher", "command", "wanted"),
    [
        ({}, {}, [], None),
        ({NUM_THREADS: "3"}, {}, [], 3),
        ({NUM_THREADS: "1"}, None, [], 1),  # no launcher: nobody else can have set it
        ({NUM_THREADS: "4,2"}, {}, [], 4),
        ({NUM_THREADS: "many"}, {}, [], None),
        ({NUM_THREADS: "0"}, {}, [], None),
        ({NUM_THREADS: "1", **LAUNCHED}, {}, [], None),
        ({NUM_THREADS: "8", **LAUNCHED}, {}, [], None),  # accelerate on CPUs: physical cores / processes
        ({NUM_THREADS: "1", **LAUNCHED}, {NUM_THREADS: "1"}, [], 1),
        ({NUM_THREADS: "6", **LAUNCHED}, {}, ["accelerate", "launch", "--num_cpu_threads_per_process", "6"], 6),
        ({NUM_THREADS: "6", **LAUNCHED}, {}, ["accelerate", "launch", "--num-cpu-threads-per-process=6"], 6),
        ({NUM_THREADS: "1", "TORCHELASTIC_RUN_ID": "x"}, {}, [], None),
        ({NUM_THREADS: "1", **LAUNCHED}, None, [], None),  # the launcher cannot be looked at
        ({NUM_THREADS: "2", **LAUNCHED}, None, [], 2),
    ],
)
def test_whose_choice_it_is(
    environment: dict[str, str], launcher: dict[str, str] | None, command: list[str], wanted: int | None
) -> None:
    assert wanted_threads(environment, launcher, command) == wanted


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_accelerates_own_value_is_told_from_the_users(tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text(SAY)
    environment = {key: value for key, value in os.environ.items() if key != NUM_THREADS}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    done = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads = choose_threads(num_cores(), 1)
    assert json.loads(done.stdout) == ["1", str(threads), {NUM_THREADS: None}, threads.trainer]


def test_threads_sleep_while_they_wait_unless_the_user_wants_them_to_spin() -> None:
    for before, then in (({}, "PASSIVE"), ({WAIT_POLICY: "ACTIVE"}, "ACTIVE")):
        wait_without_spinning(environment := dict(before))
        assert environment[WAIT_POLICY] == then


def test_threads_of_libraries_count_too() -> None:
    """One that Python was not told about stands for them."""
    before, lock = num_that_run(), _thread.allocate_lock()
    with lock:
        _thread.start_new_thread(lock.acquire, ())
        assert num_that_run() == before + 1
