"""Say in words why a file of a run could not be written, what is safe, and what to do.

A full disk, a quota, a file system that is read-only, rights, and limits of this process reach us as `OSError`, or as
what libraries make of it: safetensors and tokenizers put the number into their text, torch says where its writer
failed and not why. Whoever writes a file does it inside of `writing`; `told` is for code that writes many, ours and
others'.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from trl_gym.errors import Problem, RolloutError, StorageError, TrlGymError

_NUMBER = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)  # of Rust's libraries, of Arrow
_WRITERS = ("PytorchStreamWriter", "inline_container", "iostream error")  # torch's, which lose the number
_FULL_BYTES = 2**20  # a disk with less is full, where nobody says why a write failed
_REFUSALS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE),
        *(errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
    }
)


def refusal(error: BaseException, path: str | os.PathLike[str]) -> Problem | None:
    """Return why the operating system did not let a file be written, and what to do; None for any other error.

    Args:
        path: The file, or a folder above it.
    """
    number = _number_of(error, path)
    return None if number is None else _words(number, path)


@contextlib.contextmanager
def writing(
    what: str, path: str | os.PathLike[str], *, safe: str, kind: type[TrlGymError] = RolloutError, also: str = ""
) -> Iterator[None]:
    """Explain, while open, why something could not be written.

    Args:
        what: Begins the message, e.g. `"The metrics"`.
        path: The file, or its folder.
        safe: Sentence about what is not lost.
        also: How to go on when the cause is gone; ends the remedy.

    Raises:
        TrlGymError: Of the `kind`, for an `OSError` and for what libraries make of one.
    """
    try:
        yield
    except TrlGymError:
        raise
    except Exception as error:
        path = _path_of(error, path)
        if (found := refusal(error, path)) is None:
            if not isinstance(error, OSError):
                raise
            found = Problem(str(error.strerror or error), "Make it writable")
        raise kind(
            f"{what} cannot be written to {os.fspath(path)}: {found.text}. {safe}".rstrip(),
            f"{found.remedy}{f', {also}' if also else ''}.",
        ) from error


@contextlib.contextmanager
def told(where: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise `StorageError` for what is refused while open and nobody closer has explained. Other errors pass.

    Args:
        where: What went on, e.g. `"Training"`.
        folder: Where files go that the error does not name.
    """
    try:
        yield
    except TrlGymError:
        raise
    except Exception as error:
        path = _path_of(error, folder)
        if (found := refusal(error, path)) is None:
            raise
        raise StorageError(
            f"{where} ended, since {os.fspath(path)} could not be used: {found.text}. Whole checkpoints and what the "
            "journal has are safe.",
            f"{found.remedy}, and resume from the newest checkpoint.",
        ) from error


def _path_of(error: BaseException, known: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the path that an error names, which may be none: `os.truncate` of a descriptor names its number."""
    named = getattr(error, "filename", None)
    return named if named and isinstance(named, str | os.PathLike) else known


def _number_of(error: BaseException, path: str | os.PathLike[str]) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
    elif match := _NUMBER.search(str(error)):
        number = int(match[1])
    elif os.strerror(errno.ENOSPC) in str(error):
        number = errno.ENOSPC
    elif any(sign in str(error) for sign in _WRITERS):
        number = errno.ENOSPC if _free(path)[0] < _FULL_BYTES else errno.EIO
    else:
        return None
    return number if number in _REFUSALS else None


def _words(number: int, path: str | os.PathLike[str]) -> Problem:
    """Return cause and remedy, without the ends of their sentences."""
    named = os.strerror(number)
    if number == errno.ENOSPC:
        free, total = _free(path)
        space = f"{free / 1e6:.1f} MB of {total / 1e6:.0f} MB are free" if total else "how much is free is not known"
        return Problem(f"the disk is full ({named}; {space})", "Make room there, or choose another folder")
    if number == errno.EDQUOT:
        return Problem(f"this user's quota is used up ({named})", "Make room there, or have the quota raised")
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return Problem(f"files may have {limit} bytes at most ({named})", "Raise that limit (`ulimit -f`)")
    if number == errno.EROFS:
        return Problem(f"the file system is read-only ({named})", "Mount it writable, or choose another folder")
    if number in (errno.EACCES, errno.EPERM):
        return Problem(
            f"user {os.geteuid()} may not write there ({named})", "Give that right, or choose another folder"
        )
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return Problem(
            f"this process has {limit} files open, as many as it may ({named})", "Raise that limit (`ulimit -n`)"
        )
    if number == errno.ENFILE:
        return Problem(f"this machine has too many files open ({named})", "Raise `fs.file-max`, or end what has them")
    if number in (errno.EIO, errno.ESTALE):
        return Problem(
            f"the disk, or the server that it is mounted from, failed ({named})",
            "Look for the cause in the kernel's log, or choose another folder",
        )
    return Problem(f"the name cannot be one of a file there ({named})", "Choose another folder")


def _free(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return free and all bytes of the disk of a path, or of what exists of it; zeros where that is not known."""
    for folder in (Path(path), *Path(path).parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            return usage.free, usage.total
    return 0, 0
