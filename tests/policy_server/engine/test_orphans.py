"""A child ends when its parent was killed, whatever it is doing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import psutil

from trl_gym.policy_server.engine.plugin import end_with_parent

# Spawns a child that calls it twice and then holds a lock for ever, and says the child's pid.
PARENT = """
import multiprocessing, time
from tests.policy_server.engine.test_orphans import child
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=child)
    process.start()
    time.sleep(600)
"""


def child() -> None:
    end_with_parent()
    end_with_parent()
    watching = [thread for thread in threading.enumerate() if thread.name == "trl-gym-parent"]
    sys.stdout.write(f"{os.getpid()} {len(watching)}\n")
    sys.stdout.flush()
    time.sleep(600)


def outlives(method: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(method=method)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid, num_threads = map(int, parent.stdout.readline().split())
        assert num_threads == 1
        orphan = psutil.Process(pid)
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs([orphan], timeout=20)
    assert not alive


def test_a_forked_child() -> None:
    outlives("fork")


def test_a_spawned_child() -> None:
    outlives("spawn")


def test_a_process_of_its_own_is_left_alone() -> None:
    assert multiprocessing.parent_process() is None
    before = threading.active_count()
    end_with_parent()
    assert threading.active_count() == before
