"""Append-only record of every rollout: what was asked, what came back, which tokens are trained.

One JSON object per line in `<output_dir>/rollouts/step-<k>.rank-<r>.jsonl` (`eval-step-<k>.…` for evaluation,
`rollout-step-0.…` for `trl-gym rollout`), where k is the optimizer step whose weights sampled it. A file that has
grown too large goes on in `step-<k>.rank-<r>.part-1.jsonl`. Viewer, debugging, resume and offline training read the
same files.

    append(record)   redacted, one line, in the operating system's hands when it returns: a process that is killed
                     afterwards loses nothing. In the thread where rollouts end, without waiting for the disk.
    commit()         fsync of everything since the last one, in the trainer's thread, before the rollouts are trained
                     on: a machine that fails afterwards loses nothing that was trained on.

Nobody ever opens a file that exists for writing. A run that is resumed or started anew, and a second process by
mistake, each get parts of their own, so no line is torn by another writer or merged with a torn one. A line that a
crash tore can only be the last of its file; readers leave it out and say so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trl_gym.errors import RolloutError

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------------------
# Secrets are taken out of what is written to the journal. Pure functions.
#
# Three nets, coarse to fine:
#
#     a value whose key says that it is a secret       {"policy_api_key": …}, {"Authorization": …}
#     a value that this process got as a secret        environment variables named like keys, the policy server's key
#     a text that looks like a secret                  `Bearer …`, `sk-…`, `hf_…`, `api_key="…"`, `https://user:…@host`
#
# Token ids are left alone: they are what is trained on, and tell whoever has the tokenizer what the text said.

REDACTED = "[redacted]"
_MIN_SECRET_CHARS = 8

# Long lists of numbers, and most of a journal line: not walked.
_NUMBERS = frozenset(
    (
        "prompt_ids",
        "completion_ids",
        "env_mask",
        "logprobs",
        "prompt_token_ids",
        "generation_token_ids",
        "generation_log_probs",
    )
)
_SECRET_KEYS = (
    "api_key",
    "apikey",
    "access_token",
    "auth_token",
    "bearer_token",
    "refresh_token",
    "authorization",
    "client_secret",
    "secret_key",
    "secret_access_key",
    "private_key",
    "password",
)
_PAIRS = (
    ("api", "key"),
    ("access", "token"),
    ("auth", "token"),
    ("bearer", "token"),
    ("refresh", "token"),
    ("client", "secret"),
    ("secret", "key"),
    ("access", "key"),
    ("private", "key"),
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)

_PREFIXED = re.compile(
    r"\b(?:sk-|sk_live_|sk_test_|pk-|hf_|nvapi-|gsk_|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|eyJ)[A-Za-z0-9_.\-]{12,}"
)
_BEARER = re.compile(r"\b(bearer\s+)[A-Za-z0-9_.~+/=\-]{8,}", re.IGNORECASE)
_NAMED = re.compile(
    r"((?:api[_-]?key|access[_-]?token|auth[_-]?token|client[_-]?secret|secret[_-]?key|password)"
    r"\\*[\"']?\s*[:=]\s*\\*[\"']?)[^\s\"'\\,;&(){}\[\]]{8,}",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(://[^\s/:@]{1,256}:)[^\s/@]{1,256}(?=@)")
# Lower-cased text that holds none of these holds nothing for a key or a pattern above to match.
_MARKS = (
    *(
        "sk-",
        "sk_live_",
        "sk_test_",
        "pk-",
        "hf_",
        "nvapi-",
        "gsk_",
        "ghp_",
        "gho_",
        "ghs_",
        "github_pat_",
        "glpat-",
        "xox",
        "akia",
    ),
    *("aiza", "eyj", "bearer", "://", "password", "authorization"),
    *(f"{first}{between}{last}" for first, last in _PAIRS for between in ("_", "-", "")),
)


def make_redactor(secrets: Iterable[str] = ()) -> Callable[[Any], Any]:
    """What takes secrets out of a JSON value.

    Args:
        secrets: Values to take out wherever they stand; short ones (below 8 characters) are ignored, since they
            would take ordinary words along.

    Returns:
        A function from a JSON value to one without secrets: the value itself where nothing could be one, else a copy.
        Applying it twice changes nothing more.
    """
    known = sorted({secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS}, key=len, reverse=True)

    def redact(value: Any) -> Any:
        # Almost always there is nothing to find: one look at all the text is cheaper than a look at every string.
        text = "\n".join(_texts(value, []))
        lowered = text.lower()
        if any(secret in text for secret in known) or any(mark in lowered for mark in _MARKS):
            return _redact(value, known)
        return value

    return redact


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of environment variables that are named like keys (`OPENAI_API_KEY`, `HF_TOKEN`, …) and could be one."""
    return [
        value
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _MIN_SECRET_CHARS and not any(c.isspace() for c in value)
    ]


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, dict):
        return {key: _redact_item(key, item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, known) for item in value]
    return value


def _redact_item(key: Any, item: Any, known: list[str]) -> Any:
    if _is_numbers(key, item):
        return item
    if isinstance(item, str) and item and _is_secret_key(key):
        return REDACTED
    return _redact(item, known)


def _texts(value: Any, found: list[str]) -> list[str]:
    """Every string in a JSON value, keys included, added to `found`."""
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _is_numbers(key, item):
                found.append(str(key))
                _texts(item, found)
    elif isinstance(value, list):
        for item in value:
            _texts(item, found)
    return found


def _is_numbers(key: Any, item: Any) -> bool:
    return key in _NUMBERS and isinstance(item, list) and not (item and isinstance(item[0], str))


def _is_secret_key(key: Any) -> bool:
    return isinstance(key, str) and key.lower().replace("-", "_").endswith(_SECRET_KEYS)


def _redact_text(text: str, known: list[str]) -> str:
    if len(text) < _MIN_SECRET_CHARS:
        return text
    for secret in known:
        if secret in text:
            text = text.replace(secret, REDACTED)
    text = _PREFIXED.sub(REDACTED, text)
    text = _BEARER.sub(rf"\g<1>{REDACTED}", text)
    text = _NAMED.sub(rf"\g<1>{REDACTED}", text)
    if "://" in text:
        text = _IN_URL.sub(rf"\g<1>{REDACTED}", text)
    return text


SCHEMA = 1
_MAX_BYTES = 512 * 10**6
_NAME = re.compile(r"(?:(?P<mode>\w+)-)?step-(?P<step>\d+)\.rank-(?P<rank>\d+)(?:\.part-(?P<part>\d+))?\.jsonl")


class Recorder(Protocol):
    """Where a finished rollout is recorded."""

    def append(self, record: Mapping[str, Any]) -> None: ...


@dataclass(slots=True)
class _Part:
    """A file that is being written: `size` bytes of whole lines."""

    path: Path
    descriptor: int
    size: int = 0


class Journal:
    """Writes the rollouts of one rank.

    `append` may be called from the collector's thread while `commit` is called from the trainer's.

    Args:
        folder: `<output_dir>/rollouts`; made when missing.
        rank: This process's rank.
        max_bytes: Size at which a file is continued in a new one.
        secrets: Values to keep out of the journal, beside those that the environment's variables give away.
    """

    def __init__(
        self, folder: str | Path, rank: int = 0, *, max_bytes: float = _MAX_BYTES, secrets: tuple[str, ...] = ()
    ) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._redact: Callable[[Any], Any] = make_redactor([*secrets_of(os.environ), *secrets])
        self._lock = threading.Lock()
        self._parts: dict[tuple[str, int], _Part] = {}
        self._ended: list[_Part] = []  # full, or of an earlier step: closed by the next commit
        self._has_new_file = False

    def path(self, step: int, mode: str, part: int = 0) -> Path:
        prefix = "step" if mode == "train" else f"{mode}-step"
        suffix = f".part-{part}" if part else ""
        return self.folder / f"{prefix}-{step}.rank-{self.rank}{suffix}.jsonl"

    def tagged(self, **fields: Any) -> Recorder:
        """A recorder that adds these fields to every line."""
        return _Tagged(self, fields)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one rollout; it is safe from a crash of this process at once, and from one of the machine after
        `commit`.

        Raises:
            RolloutError: The disk is full or gone. Lines written before are intact, this one is not there.
            ValueError: The record holds NaN or infinity.
        """
        stamped = {"schema": SCHEMA, "rank": self.rank, "time": round(time.time(), 3), **self._redact(record)}
        line = (json.dumps(stamped, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            part = self._part(record["mode"], record["step"], len(line))
            try:
                _write_all(part.descriptor, line)
            except OSError as error:
                self._abandon(part)
                raise self._failure(part.path, error) from error
            part.size += len(line)

    def commit(self) -> None:
        """fsync what was appended. Call it before anything is trained on, and from one thread only.

        Raises:
            RolloutError: The disk refused.
        """
        with self._lock:  # not while the disk works: `append` may be waited for by an event loop
            ended, self._ended = self._ended, []
            open_parts = list(self._parts.values())
            has_new_file, self._has_new_file = self._has_new_file, False
        try:
            for part in (*ended, *open_parts):
                with self._explained(part.path):
                    os.fsync(part.descriptor)
            if has_new_file:
                self._sync_folder()
        finally:
            for part in ended:
                os.close(part.descriptor)

    def close(self) -> None:
        """Commit and close; idempotent. What is appended afterwards goes to new parts."""
        with self._lock:
            self._ended += self._parts.values()
            self._parts.clear()
        self.commit()

    def _part(self, mode: str, step: int, num_bytes: int) -> _Part:
        key = (mode, step)
        part = self._parts.get(key)
        if part is not None and (part.size == 0 or part.size + num_bytes <= self._max_bytes):
            return part
        self._ended += self._parts.values()
        self._parts = {key: self._new_part(mode, step)}
        return self._parts[key]

    def _new_part(self, mode: str, step: int) -> _Part:
        number = 0
        while True:
            path = self.path(step, mode, number)
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            except FileExistsError:
                number += 1
                continue
            except OSError as error:
                raise self._failure(path, error) from error
            self._has_new_file = True
            return _Part(path, descriptor)

    def _abandon(self, part: _Part) -> None:
        """After a write that failed halfway: cut the torn line off, and write no more to this file."""
        self._parts = {key: other for key, other in self._parts.items() if other is not part}
        self._ended.append(part)
        with contextlib.suppress(OSError):  # then the torn line stays, as the last of its file
            os.ftruncate(part.descriptor, part.size)

    def _sync_folder(self) -> None:
        with self._explained(self.folder):
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failure(path, error) from error

    def _failure(self, path: Path, error: OSError) -> RolloutError:
        try:
            usage = shutil.disk_usage(self.folder)
            space = f"{usage.free / 1e6:.1f} MB of {usage.total / 1e6:.0f} MB are free there"
        except OSError as unknown:
            space = f"free space unknown: {unknown.strerror}"
        return RolloutError(
            f"The journal {path} cannot be written: {error.strerror or error} ({space}). What was recorded before is "
            "intact and nothing is trained on that is not recorded. Make room, or choose another `output_dir`, and "
            "resume from the last checkpoint."
        )


@dataclass(frozen=True, slots=True)
class _Tagged:
    journal: Journal
    fields: dict[str, Any] = field(default_factory=dict)

    def append(self, record: Mapping[str, Any]) -> None:
        self.journal.append({**record, **self.fields})


@dataclass(frozen=True, slots=True)
class Line:
    """One rollout of a journal, and where it stands.

    Attributes:
        path: The file.
        offset: Of the line's first byte.
        length: In bytes, without the newline.
        record: The line, parsed.
    """

    path: Path
    offset: int
    length: int
    record: dict[str, Any]


def read_journal(folder: str | Path) -> Iterator[dict[str, Any]]:
    """All rollouts of a run, by mode, step, rank and part. See `read_lines`."""
    return (line.record for line in read_lines(folder))


def read_lines(folder: str | Path, *, mode: str | None = None, step: int | None = None) -> Iterator[Line]:
    """The lines of a journal, without holding a file in memory.

    Args:
        folder: The journal's.
        mode: Only this one; all when None.
        step: Only this one; all when None.

    Raises:
        ValueError: A line that is not the last of its file is not JSON. The last one may have been torn by a crash;
            then it is left out, and logged.
    """
    for path in journal_files(folder, mode=mode, step=step):
        with open(path, "rb") as file:
            offset = 0
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    record = _parse(raw, path, number)
                    if record is not None:
                        yield Line(path, offset, len(raw.rstrip(b"\n")), record)
                offset += len(raw)


def read_line(path: Path, offset: int, length: int) -> dict[str, Any]:
    """One rollout again, from where `read_lines` found it."""
    with open(path, "rb") as file:
        file.seek(offset)
        return json.loads(file.read(length))


def journal_files(folder: str | Path, *, mode: str | None = None, step: int | None = None) -> list[Path]:
    """The files of a journal, in the order in which they are read: by mode, step, rank, part."""
    found = []
    for path in Path(folder).glob("*.jsonl"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        its_mode, its_step = match["mode"] or "train", int(match["step"])
        if mode in (None, its_mode) and step in (None, its_step):
            found.append(((its_mode, its_step, int(match["rank"]), int(match["part"] or 0)), path))
    return [path for _, path in sorted(found)]


def step_of(path: Path) -> int:
    """The optimizer step in the name of a journal's file."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a journal's file")
    return int(match["step"])


def _parse(raw: bytes, path: Path, number: int) -> dict[str, Any] | None:
    try:
        return json.loads(raw)
    except ValueError as error:  # also a character of which only the first bytes are there
        if not raw.endswith(b"\n"):
            logger.warning("%s, line %d: torn by a crash after %d bytes; left out", path, number, len(raw))
            return None
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from error


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
