"""An output folder has one owner at a time, and nothing has to be cleaned up for the next one."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import ConfigError
from trl_gym.folder_owner import LOCK, FolderOwner, describe, take_for

# Takes a folder, forks a child that lives on, as a worker of a DataLoader does, and waits.
OWNER = """
import os, sys, time
from trl_gym.folder_owner import FolderOwner
owner = FolderOwner(sys.argv[1], option="output_dir", what="a training run")
owner.take()
child = os.fork()
if child: print(child, flush=True)
time.sleep(600)
"""


def owner_of(folder: Path) -> FolderOwner:
    return FolderOwner(folder, option="output_dir", what="a test")


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        child = int(first.stdout.readline())
        second = owner_of(folder)
        who = rf"a training run \(process {first.pid} on host {socket.gethostname()}, since 2"
        with pytest.raises(ConfigError, match=rf"`output_dir` {folder} is in use: {who}.*Wait for its end"):
            second.take()
        first.kill()
    try:
        with second:  # at once, and although a child of the first one lives
            second.take()
            assert b"a test" in (folder / LOCK).read_bytes()
    finally:
        os.kill(child, signal.SIGKILL)
    assert (folder / LOCK).read_bytes() == b""


def test_two_owners_in_one_process_are_two(tmp_path: Path) -> None:
    first = owner_of(tmp_path)
    first.take()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on host"):
        owner_of(tmp_path).take()
    with owner_of(tmp_path / "other"):
        pass
    del first
    gc.collect()
    owner_of(tmp_path).take()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """The fault is injected."""

    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with owner_of(tmp_path), caplog.at_level(logging.WARNING):
        owner_of(tmp_path).take()
    assert f"{tmp_path} cannot be locked ({os.strerror(number)})" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`output_dir` cannot be written to .*file/run.*Nothing was started"):
        owner_of(tmp_path / "file" / "run").take()


@given(said=st.binary(max_size=40) | st.sampled_from([b"", b"[]", b'{"pid": 1}', b'{"pid": [], "since": 1e999}']))
def test_what_an_owner_says_may_be_anything(said: bytes) -> None:
    assert describe(said)


# -- trainers ---------------------------------------------------------------------------------------------------------


class Trainer:
    num_closed = 0
    owner: FolderOwner

    def close(self) -> None:
        self.num_closed += 1
        self.owner.release()

    def take(self, folder: str | Path) -> None:
        self.owner = take_for(self, folder)


def test_a_trainer_for_the_same_folder_replaces_the_one_before(tmp_path: Path) -> None:
    first, second, elsewhere = Trainer(), Trainer(), Trainer()
    first.take(tmp_path / "out")
    elsewhere.take(tmp_path / "other")
    second.take(f"{tmp_path}/other/../out")
    assert (first.num_closed, second.num_closed, elsewhere.num_closed) == (1, 0, 0)
    with pytest.raises(ConfigError, match="is in use: a training run"):
        owner_of(tmp_path / "out").take()


def test_one_that_is_gone_is_not_kept_alive(tmp_path: Path) -> None:
    first = Trainer()
    first.take(tmp_path)
    closed: list[str] = []
    first.close = lambda: closed.append("closed")  # type: ignore[method-assign]
    del first
    gc.collect()
    Trainer().take(tmp_path)
    assert closed == []
