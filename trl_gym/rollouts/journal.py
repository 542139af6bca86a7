"""Append-only record of every rollout: what was asked, what came back, which tokens are trained.

One JSON object per line in `<output_dir>/rollouts/step-<k>.rank-<r>.jsonl` (`eval-step-<k>.…` for evaluation,
`rollout-step-0.…` for `trl-gym rollout`), where k is the optimizer step whose weights sampled it. A file that has
grown too large goes on in `step-<k>.rank-<r>.part-1.jsonl`. Viewer, debugging, resume and offline training read the
same files.

    append(record)   redacted, one line, in the operating system's hands when it returns: a process that is killed
                     afterwards loses nothing. In the thread where rollouts end, without waiting for the disk.
    commit()         fsync of everything since the last one, in the trainer's thread, before the rollouts are trained
                     on: a machine that fails afterwards loses nothing that was trained on.

Nobody opens a file that exists for writing. A run that is resumed or restarted, and a second process by mistake, each
get parts of their own, so no line is torn by another writer or merged with a torn one. A line that a crash tore can
only be the last of its file; readers leave it out and say so.

JSON has no NaN and no infinity. Where an environment or a dataset has one, the line has null, and a warning names the
place. Secrets are redacted: values under keys that say so (`api_key`, `Authorization`, …), and the exact values that
this process knows as secrets. No other text is altered: it is what reward functions get of a recalled or replayed
rollout. Token ids are left alone; they tell whoever has the tokenizer what the text said.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from trl_gym.errors import ConfigError, FailureKind, RolloutError
from trl_gym.policy_server.middleware.identity import KEY_PATTERN
from trl_gym.untrusted import MAX_NUMBER, parse_json, shape_problem
from trl_gym.untrusted import number as as_number

logger = logging.getLogger(__name__)

SCHEMA = 1
TRAINING_LOGPROBS = "training_logprobs"  # folder beside the journal's, see `rollouts.logprobs`
REDACTED = "[redacted]"
_MAX_BYTES = 512 * 10**6
_NAME = re.compile(r"(?:(?P<mode>\w+)-)?step-(?P<step>\d+)\.rank-(?P<rank>\d+)(?:\.part-(?P<part>\d+))?\.jsonl")
_MAX_NAMED = 8  # places of numbers that are not finite, in one warning


# -- writing ----------------------------------------------------------------------------------------------------------


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
        self._warned_of: set[tuple[str, str]] = set()  # environment, place in the line
        self._lock = threading.Lock()
        self._parts: dict[tuple[str, int], _Part] = {}
        self._ended: list[_Part] = []  # full, or of an earlier step: closed by the next commit
        self._has_new_file = False

    def path(self, step: int, mode: str, part: int = 0) -> Path:
        prefix = "step" if mode == "train" else f"{mode}-step"
        suffix = f".part-{part}" if part else ""
        return self.folder / f"{prefix}-{step}.rank-{self.rank}{suffix}.jsonl"

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one rollout; it is safe from a crash of this process at once, and from one of the machine after
        `commit`.

        Raises:
            RolloutError: The disk is full or gone. Lines written before are intact, this one is not there.
        """
        stamped = {"schema": SCHEMA, "rank": self.rank, "time": round(time.time(), 3), **self._redact(record)}
        line = self._encode(stamped)
        with self._lock:
            part = self._part(record["mode"], record["step"], len(line))
            try:
                _write_all(part.descriptor, line)
            except OSError as error:
                self._abandon(part)
                raise self._failure(part.path, error) from error
            part.size += len(line)

    def commit(self) -> None:
        """Put what was appended on the disk (fsync), before it is trained on; from one thread only.

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

    def _encode(self, record: dict[str, Any]) -> bytes:
        try:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:
            places: list[str] = []
            text = json.dumps(without_non_finite(record, "", places), ensure_ascii=False, allow_nan=False)
            self._warn_of_non_finite(record, places)
        return f"{text}\n".encode("utf-8", "backslashreplace")

    def _warn_of_non_finite(self, record: Mapping[str, Any], places: list[str]) -> None:
        """Name each place once per environment: thousands of rollouts may have the same."""
        agent = str(record.get("agent"))
        new = [place for place in dict.fromkeys(places) if (agent, place) not in self._warned_of]
        self._warned_of.update((agent, place) for place in new)
        if new:
            listed = ", ".join(f"`{place}`" for place in new[:_MAX_NAMED]) + (
                " and others" if new[_MAX_NAMED:] else ""
            )
            logger.warning(
                "%s, a rollout of %s: NaN or infinity in %s; the journal has null there. Rewards are not affected.",
                record.get("rollout_id"),
                agent,
                listed,
            )

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
            "intact and nothing is trained on that is not recorded.",
            "Make room, or choose another `output_dir`, and resume from the last checkpoint.",
        )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def without_non_finite(value: Any, place: str, places: list[str]) -> Any:
    """Return a copy of a JSON value with None for NaN and infinities; their places (`row.expected`) go to `places`."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        places.append(place.lstrip("."))
        return None
    if isinstance(value, dict):
        return {key: without_non_finite(item, f"{place}.{key}", places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item, f"{place}[]", places) for item in value]
    return value


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a journal, and where it stands."""

    path: Path  # the file
    offset: int  # place of its first byte in the file
    length: int  # number of its bytes, without the newline
    record: dict[str, Any]  # the parsed line


def read_journal(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Return all lines of a journal, by mode, step, rank and part; see `read_lines`."""
    return (line.record for line in read_lines(folder))


def read_lines(folder: str | Path, *, mode: str | None = None, step: int | None = None) -> Iterator[Line]:
    """Yield the lines of a journal, without holding a file in memory.

    Args:
        folder: The journal's folder.
        mode: The mode to read; None for all.
        step: The step to read; None for all.

    Raises:
        ConfigError: A line cannot be read: it is not JSON, or has fields of other types than the journal writes. The
            last of a file may have been torn by a crash; then it is left out, and logged.
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
    """Read one line again, from where `read_lines` found it."""
    with open(path, "rb") as file:
        file.seek(offset)
        return parse_json(file.read(length))


def read_objects(path: Path, shape: Any = dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the lines of a file beside the journal, with None for NaN and infinities.

    Lines that were torn (a full disk, a run that goes on), or that are something else, are left out, and logged.

    Args:
        path: The file.
        shape: Type of the objects, see `untrusted.shape_problem`.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = parse_json(line, lambda _: None)
            except ValueError as error:
                logger.warning("%s, line %d is torn and left out: %s", path, number, error)
                continue
            if (problem := shape_problem(value, shape)) is not None:
                logger.warning("%s, line %d is something else and left out: %s", path, number, problem)
                continue
            yield value


def journal_files(folder: str | Path, *, mode: str | None = None, step: int | None = None) -> list[Path]:
    """Return the files of a journal in the order in which they are read: by mode, step, rank, part."""
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
    """Return the optimizer step in the name of a journal's file."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a journal's file")
    return int(match["step"])


def _parse(raw: bytes, path: Path, number: int) -> dict[str, Any] | None:
    try:
        record = parse_json(raw)
    except ValueError as error:  # also a character of which only the first bytes are there
        if not raw.endswith(b"\n"):
            logger.warning("%s, line %d: torn by a crash after %d bytes; left out", path, number, len(raw))
            return None
        problem: str | None = f"not JSON ({error})"
    else:
        problem = shape_problem(record, _RecordShape) or _contradiction(record)
    if problem is not None:
        raise ConfigError(
            f"The journal is damaged: {path}, line {number}: {problem}. Only the last line of a file may be torn.",
            "Delete that line; the others are intact.",
        )
    return record


# What the readers of a line rely on. Lines of earlier versions lack what came later.

_Size = Annotated[int, msgspec.Meta(ge=0)]
_Number = Annotated[float, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]


class _TokensShape(msgspec.Struct):
    prompt_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]] = []
    completion_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]] = []
    env_mask: list[Annotated[int, msgspec.Meta(ge=0, le=1)]] = []
    logprobs: list[_Number] = []
    turn_ends: list[_Size] = []


class _NamedShape(msgspec.Struct):
    kind: str = ""
    text: str = ""
    where: str = ""
    cause: str = ""


class _ParametersShape(msgspec.Struct):
    input: str | list[Any] | None = None


class _RowShape(msgspec.Struct):
    responses_create_params: _ParametersShape | None = None


class _IncompleteShape(msgspec.Struct):
    reason: str | None = None


class _ResponseShape(msgspec.Struct):
    output: list[dict[str, Any]] | None = None
    incomplete_details: _IncompleteShape | None = None


class _RecordShape(_TokensShape, kw_only=True):
    step: _Size
    mode: str = "train"
    rollout_id: str = ""
    agent: str = ""
    dataset: str | None = None
    run: str | None = None
    weights: str | None = None
    task_hash: str = ""
    request_hash: str = ""
    group: int | None = None
    member: int = 0
    attempt: int = 0
    time: _Number = 0.0
    seconds: _Number | None = None
    reward: _Number | None = None
    reward_components: dict[str, Any] = {}
    weight_versions: list[str] = []
    failure: _NamedShape | None = None
    drift: _NamedShape | None = None
    finish_reason: str | None = None
    further_rows: list[_TokensShape] = []
    turns: list[_NamedShape] = []
    row: _RowShape | None = None
    response: _ResponseShape | None = None
    verify: dict[str, Any] | None = None


_PER_TOKEN = ("completion_ids", "env_mask", "logprobs")


def _contradiction(record: dict[str, Any]) -> str | None:
    for tokens in (record, *record.get("further_rows", ())):
        if len({len(tokens[name]) for name in _PER_TOKEN if name in tokens}) > 1:
            return f"{', '.join(_PER_TOKEN)} have different lengths"
    if "verify" in record and record.get("failure") is None:
        rewards = record.get("reward"), (record["verify"] or {}).get("reward")
        if any(as_number(reward) is None for reward in rewards):
            return "it has neither a failure nor a reward, or `verify` has none"
    return None


# -- which lines count ------------------------------------------------------------------------------------------------


class LineState(StrEnum):
    """The part that a line of the journal plays among the attempts at its rollout."""

    COUNTED = "counted"
    """The last word about a rollout: its reward, or the failure that it ended with."""

    RETRIED = "retried"
    """A failed attempt that is followed by another."""

    LOST = "lost"
    """An attempt with an answer that came as the policy server was lost: it is run again, or never counts."""

    CANCELLED = "cancelled"
    """Given up with its batch, which was never trained on."""

    SUPERSEDED = "superseded"
    """Another line about the same rollout counts."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The part of a line that decides whether it counts."""

    rollout: Hashable  # equal for all attempts at one rollout, those of later processes included
    failure: str | None  # kind of failure; None for an attempt with a reward
    is_retried: bool  # the line says that another attempt follows

    @classmethod
    def of(cls, record: Mapping[str, Any], rollout: Hashable = None) -> Attempt:
        """Read a line of the journal, also of an earlier version."""
        failure = record.get("failure")
        return cls(rollout, None if failure is None else str(failure.get("kind")), bool(record.get("retried")))

    @property
    def state(self) -> LineState:
        """Return the state as far as the line alone tells; only a `COUNTED` one may yet be superseded."""
        if self.failure == FailureKind.CANCELLED:
            return LineState.CANCELLED
        if self.is_retried:
            return LineState.LOST if self.failure is None else LineState.RETRIED
        return LineState.COUNTED

    @property
    def has_reward(self) -> bool:
        """Tell whether the rollout ended here with a reward, so that it need not be run again."""
        return self.failure is None and self.state is LineState.COUNTED


def line_states(
    attempts: Iterable[Attempt], num_counted: Callable[[Any], int | None] = lambda rollout: 1
) -> list[LineState]:
    """Decide which lines of a journal count.

    Of the attempts at one rollout that were neither retried, lost nor cancelled, a reward counts before a failure, and
    a later line before an earlier one.

    Args:
        attempts: `[N]`, in the order of the journal.
        num_counted: How many lines count for what `Attempt.rollout` names: more than one where rollouts that nothing
            tells apart share a name (a dataset with the same row twice). None counts every reward, and without any
            the last failure.

    Returns:
        `[N]`.
    """
    listed = list(attempts)
    found = [attempt.state for attempt in listed]
    candidates: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, attempt in enumerate(listed):
        if found[index] is LineState.COUNTED:
            candidates[attempt.rollout].append(index)
    for rollout, indices in candidates.items():
        best_first = sorted(indices, key=lambda index: (listed[index].failure is not None, -index))
        limit = num_counted(rollout)
        if limit is None:
            limit = max(sum(listed[index].has_reward for index in indices), 1)
        for index in best_first[limit:]:
            found[index] = LineState.SUPERSEDED
    return found


# -- secrets ----------------------------------------------------------------------------------------------------------

_MIN_SECRET_CHARS = 8

# Long lists of numbers, and most of a journal line: not walked.
_NUMBERS = (
    *("prompt_ids", "completion_ids", "env_mask", "logprobs"),
    *("prompt_token_ids", "generation_token_ids", "generation_log_probs"),
)
_SECRET_KEYS = (
    *("api_key", "apikey", "access_token", "auth_token", "bearer_token", "refresh_token", "authorization"),
    *("client_secret", "secret_key", "secret_access_key", "private_key", "password"),
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)


def make_redactor(secrets: Iterable[str] = ()) -> Callable[[Any], Any]:
    """Return a function that takes secrets out of a JSON value.

    A value is redacted whole where its key says that it is a secret (`{"policy_api_key": …}`). Everywhere else, keys
    included, only what is in `secrets` is, wherever it stands in a text, and every rollout key.

    Args:
        secrets: Secret values; short ones (below 8 characters) are ignored, since they would take ordinary words
            along.

    Returns:
        A function from a JSON value to one without secrets: the value itself where there are none, else a copy.
        Applying it twice changes nothing more.
    """
    known = sorted({secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS}, key=len, reverse=True)

    def redact(value: Any) -> Any:
        # Almost always there is nothing to find: one look at all the text is cheaper than a look at every string.
        texts: list[str] = []
        has_secret_key = _collect_texts(value, texts)
        text = "\n".join(texts)
        if has_secret_key or any(secret in text for secret in known) or KEY_PATTERN.search(text):
            return _redact(value, known)
        return value

    return redact


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return values of environment variables that are named like keys (`OPENAI_API_KEY`, …) and could be one."""
    return [
        value
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _MIN_SECRET_CHARS and not any(c.isspace() for c in value)
    ]


def secrets_in(options: Any) -> list[str]:
    """Return the values under secret-named keys of nested options, e.g. of NeMo Gym's configuration."""
    if isinstance(options, Mapping):
        own = [item for key, item in options.items() if isinstance(item, str) and _is_secret_key(key)]
        return [*own, *(secret for item in options.values() for secret in secrets_in(item))]
    if isinstance(options, list | tuple):
        return [secret for item in options for secret in secrets_in(item)]
    return []


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, dict):
        return {
            _redact_text(key, known) if isinstance(key, str) else key: _redact_item(key, item, known)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_redact(item, known) for item in value]
    return value


def _redact_item(key: Any, item: Any, known: list[str]) -> Any:
    if _is_numbers(key, item):
        return item
    if isinstance(item, str) and item and _is_secret_key(key):
        return REDACTED
    return _redact(item, known)


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    return KEY_PATTERN.sub(REDACTED, text)


def _collect_texts(value: Any, texts: list[str]) -> bool:
    """Add every string in a JSON value, keys included, to `texts`; return whether a key is named like a secret."""
    found = False
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _is_numbers(key, item):
                texts.append(str(key))
                found |= _is_secret_key(key) | _collect_texts(item, texts)
    elif isinstance(value, list):
        for item in value:
            found |= _collect_texts(item, texts)
    return found


def _is_numbers(key: Any, item: Any) -> bool:
    return key in _NUMBERS and isinstance(item, list) and not (item and isinstance(item[0], str))


@functools.lru_cache(maxsize=4096)
def _is_secret_key(key: Any) -> bool:
    return isinstance(key, str) and key.lower().replace("-", "_").endswith(_SECRET_KEYS)
