"""What a person, a shell or a scheduler gives us: URLs, keys, paths, standard output, a folder for sockets.

Each is made usable or refused here, once, before anything is started: `ConfigError` names the option. What cannot work
does not work by waiting either, and a key that cannot be sent must not be shown by whoever finds that out later.
"""

from __future__ import annotations

import errno
import io
import ipaddress
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from trl_gym.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

T = TypeVar("T")

# -- paths ------------------------------------------------------------------------------------------------------------


_HOME = re.compile(r"(?P<option>(?:[\w.-]+=)?)(?P<path>~[^/=]*(?:/.*)?)", re.DOTALL)
_KEY = re.compile(r"(?:.*[-_])?key=?")


def home_path(path: str | Path) -> str:
    """Return a path with `~` spelled out, which no shell does in a YAML."""
    return os.path.expanduser(path)


def home_paths(value: T) -> T:
    """Spell `~` out in the value of an option: a path, or a list of them; anything else is returned as it is."""
    if isinstance(value, list):
        return [home_paths(one) for one in value]  # type: ignore[return-value]
    return home_path(value) if isinstance(value, str) else value  # type: ignore[return-value]


def home_words(argv: Sequence[str]) -> list[str]:
    """Spell `~` out at the beginning of a word and behind `=`, where no shell does it; not in what is a key."""
    words = []
    for before, word in pairwise(["", *argv]):
        found = _HOME.fullmatch(word)
        is_key = found is not None and (_KEY.fullmatch(before) or _KEY.fullmatch(found["option"]))
        words.append(word if found is None or is_key else found["option"] + home_path(found["path"]))
    return words


# -- URLs -------------------------------------------------------------------------------------------------------------

_URL_FORM = "one that looks like http://127.0.0.1:8000/v1"
_NO_URL_CHARACTER = re.compile(r"[\s\x00-\x1f\x7f\"<>\\^`{|}]")
_HOST_NAME = re.compile(r"\w[\w.-]*")
_NUMBERS_AND_DOTS = re.compile(r"[\d.]+")


def split_urls(given: str | Sequence[str]) -> list[str]:
    """Return the URLs of a list, which as one text is separated by commas."""
    parts = given.split(",") if isinstance(given, str) else given
    return [part.strip() for part in parts if part.strip()]


def url_problems(option: str, given: str | Sequence[str]) -> list[Problem]:
    """Say why what was given cannot be the URLs of HTTP servers.

    Args:
        given: As for `split_urls`.
    """
    urls = split_urls(given)
    if not urls:
        return [Problem(f"`{option}` is {given!r}, which names no URL.", f"Set it to {_URL_FORM}.")]
    return [problem for url in urls if (problem := _url_problem(option, url)) is not None]


def checked_urls(option: str, given: str | Sequence[str]) -> list[str]:
    """Return the URLs of HTTP servers.

    Args:
        given: As for `split_urls`.

    Raises:
        ConfigError: There is none, or one of them cannot be such a URL.
    """
    if len(problems := url_problems(option, given)) == 1:
        raise ConfigError(problems[0].text, problems[0].remedy)
    if problems:
        raise ConfigError(f"`{option}` has {len(problems)} URLs that cannot be used:", problems=problems)
    return split_urls(given)


def _url_problem(option: str, url: str) -> Problem | None:
    if "@" in url:  # which must not be shown
        return Problem(
            f"`{option}` has a user name or a password in its URL, which logs would show.",
            "Give a key instead (`--api-key`, `--upstream-api-key`, VLLM_API_KEY).",
        )
    try:
        why = _flaw(url)
    except ValueError as error:  # a bracket without the other one, a port beyond 65535
        why = f"is no URL ({error})"
    shown = re.split("[?#]", url)[0]  # what follows may be a key
    return None if why is None else Problem(f"`{option}` is {shown!r}, which {why}.", f"Set it to {_URL_FORM}.")


def _flaw(url: str) -> str | None:
    """Raises `ValueError` for what `urlsplit` cannot read."""
    parts = urlsplit(url)
    if (character := _NO_URL_CHARACTER.search(url)) is not None:
        return f"has the character {character.group()!r}"
    if parts.scheme not in ("http", "https") or not url[len(parts.scheme) :].startswith("://"):
        return "does not begin with http:// or https://"
    if parts.query or parts.fragment:
        return "has a query or a fragment"
    if not parts.hostname or parts.port == 0 or parts.netloc.endswith(":"):
        return "has no host, or no port behind its colon"
    return _host_flaw(parts.hostname, is_bracketed="[" in parts.netloc)


def _host_flaw(host: str, *, is_bracketed: bool) -> str | None:
    if is_bracketed or _NUMBERS_AND_DOTS.fullmatch(host):
        try:
            ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return f"has the host {host!r}, which is no address"
        return None
    try:
        is_name = _HOST_NAME.fullmatch(host) is not None and bool(host.encode("idna"))
    except UnicodeError:
        is_name = False
    return None if is_name else f"has the host {host!r}, which is no name"


# -- keys -------------------------------------------------------------------------------------------------------------


def usable_key(option: str, key: str | None) -> str | None:
    """Return a key as it can stand in a header of HTTP, without white space at its ends, as files of secrets have it.

    Only ASCII arrives as it was sent: what HTTP clients make of other letters differs. The key is in no message.

    Args:
        option: Option or variable that gives it, as its user spells it.
        key: The key; empty and None are none.

    Raises:
        ConfigError: It has a line end inside, or another character that no header can have.
    """
    if not key:
        return None
    stripped = key.strip()
    if stripped and stripped.isascii() and stripped.isprintable():
        return stripped
    what = (
        "nothing but white space"
        if not stripped
        else "a letter beyond ASCII"
        if not stripped.isascii()
        else "a line end, or another character that is not printed"
    )
    raise ConfigError(
        f"The key of `{option}` has {what}, and cannot be sent in a header of HTTP.",
        "Give the key alone, in letters, digits and signs of ASCII; it is not shown here.",
    )


# -- folders for Unix sockets, whose names are short ------------------------------------------------------------------

_MAX_SOCKET_CHARS = 107 if sys.platform == "linux" else 103
# Where else Ray and vLLM can put theirs: the places of the system's own temporary files.
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
RAY_SOCKETS = "Ray", "trl-gym-abcd1234/ray/session_2026-11-28_18-18-59_319181_4194304/sockets/plasma_store"
VLLM_SOCKETS = "vLLM", "trl-gym-abcd1234/12345678-1234-1234-1234-123456789012"
VLLM_SOCKET_VARIABLE = "VLLM_RPC_BASE_PATH"


def socket_folder(sockets: tuple[str, str], environment: Mapping[str, str] | None = None) -> str:
    """Return a folder in which a program can make its sockets: that of TMPDIR, or where that is too long a short one.

    Args:
        sockets: `RAY_SOCKETS` or `VLLM_SOCKETS`: whose, and the longest name of one below the folder.
        environment: Variables; default: those of this process.

    Raises:
        ConfigError: The name is too long, and no short folder can be written to, or a variable rules that out.
    """
    program, name = sockets
    environment = os.environ if environment is None else environment
    longest = _MAX_SOCKET_CHARS - len(name) - 1
    own = environment.get(VLLM_SOCKET_VARIABLE) if sockets == VLLM_SOCKETS else None
    variable = "TMPDIR" if own is None else VLLM_SOCKET_VARIABLE
    folder = own or tempfile.gettempdir()
    if len(os.fsencode(folder)) <= longest:
        return folder
    for short in _SHORT_FOLDERS if own is None else ():
        if len(short) <= longest and os.path.isdir(short) and os.access(short, os.W_OK | os.X_OK):
            logger.info("%s has its sockets below %s: TMPDIR %s is too long for their names", program, short, folder)
            return short
    raise ConfigError(
        f"{variable} is {folder!r}, {len(os.fsencode(folder))} characters: too long for the sockets of {program}, "
        f"whose names may have {_MAX_SOCKET_CHARS} in all.",
        f"Set {variable} to a folder whose name has at most {longest}, such as /tmp.",
    )


# -- standard output --------------------------------------------------------------------------------------------------


class _Output(io.FileIO):
    """A descriptor that takes everything, also when nobody reads it any more or the disk is full."""

    problem: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.problem = error
            return memoryview(data).nbytes


def with_output(run: Callable[[], int]) -> int:
    """Run a command whose work does not depend on who reads what it prints.

    Standard output may be closed (cron, systemd), a pipe whose reader has gone (`| head`), or a full disk. What a
    command was asked for is its work: that goes on, and only the text is lost.

    Args:
        run: The command; returns its exit status.

    Returns:
        The exit status: that of the command; 1 where it is 0 and text was lost that a reader may still want.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return run()  # a notebook's, or somebody else has taken them
    _fill_descriptors()
    sys.stderr, _ = _tolerant(sys.__stderr__, 2)
    sys.stdout, raw = _tolerant(sys.__stdout__, 1)
    try:
        status = run()
    except SystemExit as end:  # of argparse, which has printed its help
        if end.code not in (0, None) or not _lost(raw):
            raise
        status = 0
    lost = _lost(raw)
    return status or int(lost)


def _fill_descriptors() -> None:
    """Open what is closed of the descriptors 0 to 2: the next file would be standard output to everyone below us."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _tolerant(stream: object, descriptor: int) -> tuple[io.TextIOWrapper, _Output]:
    raw = _Output(descriptor, "wb", closefd=False)
    was = stream if isinstance(stream, io.TextIOWrapper) else None  # None where it was closed
    text = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=was.encoding if was else "utf-8",
        errors=was.errors if was else "replace",
        line_buffering=was.line_buffering if was else True,
        write_through=was.write_through if was else False,
    )
    return text, raw


def _lost(raw: _Output) -> bool:
    """Say, once, that text was lost for another reason than that its reader has gone."""
    sys.stdout.flush()
    if raw.problem is None or raw.problem.errno == errno.EPIPE:
        return False
    sys.stderr.write(f"standard output cannot be written to: {raw.problem.strerror}\n")
    return True
