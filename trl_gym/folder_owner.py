"""One run at a time writes to an output folder: a second one is refused, with the pid and the host of the first.

The kernel keeps the lock (`flock` on a file in the folder), not the file's existence, so nothing is left to be removed
when a process is killed, and the next one starts at once. The file says who has the lock, for the message, and means
nothing without it. All ranks of a run are one owner: rank 0 takes the lock.

On a file system that cannot lock (some network file systems, mounted without locks) a warning says so, and nobody is
refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from typing import IO, Any, Protocol

from trl_gym.errors import ConfigError
from trl_gym.ranks import on_main
from trl_gym.storage import writing
from trl_gym.untrusted import parse_json

logger = logging.getLogger(__name__)

LOCK = "_in_use.json"  # pushes to a model hub leave out what begins with "_"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_BYTES = 4096  # of what an owner says of itself


class FolderOwner:
    """Has an output folder from `take` to `release`, or until it is collected, or the process ends.

    Args:
        folder: The folder; made when missing.
        option: The option that names it, for messages.
        what: What writes to it, e.g. `"a training run"`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, option: str, what: str) -> None:
        self._path = Path(folder) / LOCK
        self._option, self._what = option, what
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Take the folder. Idempotent. Raises `ConfigError`: someone else has it, or it cannot be written to."""
        if self._file is not None:
            return
        with writing(f"`{self._option}`", self._path.parent, safe="Nothing was started.", kind=ConfigError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = file.read(_BYTES)
            file.close()
            if error.errno in _HELD:
                raise ConfigError(
                    f"`{self._option}` {self._path.parent} is in use: {describe(said)} writes to it.",
                    "Wait for its end, or end it; or choose another folder.",
                ) from error
            logger.warning(
                "%s cannot be locked (%s): see to it yourself that nothing else writes to this folder.",
                self._path.parent,
                error.strerror,
            )
            return
        self._file = file
        _held.add(self)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "what": self._what, "since": round(time.time())}
        with contextlib.suppress(OSError):  # a full disk, which says more where it matters; the lock is there
            file.truncate(0)
            file.write(json.dumps(own).encode())

    def release(self) -> None:
        """Let others have the folder. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.truncate(0)
            file.close()

    def __enter__(self) -> FolderOwner:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def leave_to_parent(self) -> None:
        """Close this process's copy of what the process that forked it holds."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


# A lock lives as long as any copy of its descriptor. A child that is forked and executes nothing (a worker of a
# DataLoader) would keep the folder of a trainer that was killed.
_held: weakref.WeakSet[FolderOwner] = weakref.WeakSet()


def _leave_all() -> None:
    for owner in list(_held):
        owner.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all)


def describe(said: bytes) -> str:
    """Return e.g. `"a training run (process 4711 on host gpu-7, since 2026-01-31 12:00)"`.

    Args:
        said: What the owner has written; empty, or a part of it, while it is written.
    """
    try:
        owner: Any = parse_json(said)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner["since"]))
        return f"{owner['what']} (process {int(owner['pid'])} on host {owner['host']}, since {since})"
    except (ValueError, LookupError, TypeError, OverflowError, OSError):
        return "another process, which has not said yet which one it is,"


# -- trainers ---------------------------------------------------------------------------------------------------------


class Closable(Protocol):
    """A trainer."""

    def close(self) -> None:
        """Stop what it started. Idempotent."""


# The newest trainer of this process by resolved output folder. Weak: it keeps no trainer alive.
_trainers: weakref.WeakValueDictionary[str, Closable] = weakref.WeakValueDictionary()


def take_for(trainer: Closable, output_dir: str | os.PathLike[str]) -> FolderOwner:
    """Take the folder of a run, before anything is started. Every rank calls it in step; rank 0 is the owner.

    A trainer that this process made for the folder before is closed: a notebook's cell that is run again makes a
    second one while the first, still named by `trainer`, holds the device with its policy server.

    Raises:
        ConfigError: On all ranks, when someone else has the folder, or it cannot be written to.
    """
    from accelerate import PartialState  # with it comes torch, which `trl-gym rollout` does not need

    key = str(Path(output_dir).resolve())
    previous = _trainers.get(key)
    if previous is not None and previous is not trainer:
        logger.info("closing the previous trainer for %s: a new one replaces it", key)
        previous.close()
    _trainers[key] = trainer
    owner = FolderOwner(output_dir, option="output_dir", what="a training run")
    on_main(PartialState(), owner.take)
    return owner
