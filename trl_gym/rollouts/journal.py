"""Append-only record of every rollout: what was asked, what came back, which tokens are trained.

One JSON object per line in `<output_dir>/rollouts/step-<k>.rank-<r>.jsonl` (`eval-step-<k>.…` for evaluation,
`rollout-step-0.…` for `trl-gym rollout`), where k is the optimizer step that the rollout was sampled for, counted from
1; an evaluation has the number of steps made before it. A file that has grown too large goes on in
`step-<k>.rank-<r>.part-1.jsonl`. Viewer, debugging, resume and offline training read the same files.

    append(record)   redacted, one line, in the operating system's hands when it returns: a process that is killed
                     afterwards loses nothing. In the thread where rollouts end, without waiting for the disk.
    commit()         fsync of everything since the last one, in the trainer's thread, before the rollouts are trained
                     on: a machine that fails afterwards loses nothing that was trained on.

Nobody opens a file that exists for writing. A run that is resumed or restarted, and a second process by mistake, each
get parts of their own, so no line is torn by another writer or merged with a torn one. A line that a crash tore can
only be the last of its file; readers leave it out and say so.

JSON has no NaN and no infinity. Where an environment or a dataset has one, the line has null, and a warning names the
place. Secrets are redacted (`redaction.py`).

Log-probabilities are packed in the file, as base64 of little-endian numbers: `"logprobs": {"float32": "…"}`, or
`float64` where a number is no `float32`. As decimal digits they would be half of a line of many tokens, and most of
the work of writing it. Whoever reads a line with the functions of this module gets a list of the same numbers, to the
bit. Lines of schema 1 have lists.

Until schema 2, training's `step` and the k of its files were the number of steps made before, and no `version` was
recorded, which was the same number. Whoever reads with the functions of this module sees what schema 3 says.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from trl_gym.errors import ConfigError, FailureKind
from trl_gym.redaction import Redactor, secrets_of
from trl_gym.rollouts.trajectory import compact_floats
from trl_gym.storage import writing
from trl_gym.untrusted import MAX_NUMBER, parse_json, shape_problem
from trl_gym.untrusted import number as as_number

logger = logging.getLogger(__name__)

SCHEMA = 3
_COUNTS_FROM_1 = 3  # first schema that counts training's steps from 1
TRAINING_LOGPROBS = "training_logprobs"  # folder beside the journal's, see `rollouts.logprobs`
TOKENIZER = "tokenizer"  # folder beside the journal's with the tokenizer of its token ids, written when a run begins
_MAX_BYTES = 512 * 10**6
_NAME = re.compile(r"(?:(?P<mode>\w+)-)?step-(?P<step>\d+)\.rank-(?P<rank>\d+)(?:\.part-(?P<part>\d+))?\.jsonl")
_BEGIN = re.compile(rb'\{"schema": ?(\d+)[,}]')  # of a line
_MAX_OPEN = 8  # files: rollouts of a few steps end in turns with `gym_max_staleness`, beside those of an evaluation
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
        max_bytes: Size at which a file is continued in a new one.
        secrets: Values to keep out of the journal, beside those that the environment's variables give away.
    """

    def __init__(
        self, folder: str | Path, rank: int = 0, *, max_bytes: float = _MAX_BYTES, secrets: tuple[str, ...] = ()
    ) -> None:
        self.folder = Path(folder)
        self.rank = rank
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._redactor = Redactor([*secrets_of(os.environ), *secrets])
        self._warned_of: set[tuple[str, str]] = set()  # environment, place in the line
        self._lock = threading.Lock()
        self._parts: dict[tuple[str, int], _Part] = {}  # by mode and step, the one written to last at the end
        self._ended: list[_Part] = []  # full, or not written to for long: closed by the next commit
        self._has_new_file = False

    def path(self, step: int, mode: str, part: int = 0) -> Path:
        prefix = "step" if mode == "train" else f"{mode}-step"
        suffix = f".part-{part}" if part else ""
        return self.folder / f"{prefix}-{step}.rank-{self.rank}{suffix}.jsonl"

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one rollout; it is safe from a crash of this process at once, and from one of the machine after
        `commit`. Raises `RolloutError`: see `storage.writing`. Lines written before are intact, this one is not
        there."""
        # Tokens are most of a line, and no text: they are not walked.
        redacted, is_finite = self._redactor.look({name: record[name] for name in record if name not in _TOKENS})
        stamped = {"schema": SCHEMA, "rank": self.rank, "time": round(time.time(), 3), **record, **redacted}
        line = self._encode(stamped, is_finite)
        with self._lock:
            part = self._part(record["mode"], record["step"], len(line))
            with _writing(part.path):
                try:
                    _write_all(part.descriptor, line)
                except OSError:
                    self._abandon(part)
                    raise
            part.size += len(line)

    def commit(self) -> None:
        """Put what was appended on the disk (fsync), before it is trained on; from one thread only. Raises
        `RolloutError`: the disk refused."""
        with self._lock:  # not while the disk works: `append` may be waited for by an event loop
            ended, self._ended = self._ended, []
            open_parts = list(self._parts.values())
            has_new_file, self._has_new_file = self._has_new_file, False
        try:
            for part in (*ended, *open_parts):
                with _writing(part.path):
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

    def _encode(self, record: dict[str, Any], is_finite: bool) -> bytes:
        packed = _with_logprobs(record, _packed)
        if is_finite and all(isinstance(row["logprobs"], dict) for row in _rows(packed) if row.get("logprobs")):
            with contextlib.suppress(UnicodeEncodeError):  # half a surrogate
                return msgspec.json.encode(packed) + b"\n"
        places: list[str] = []
        finite = without_non_finite(packed, "", places)
        self._warn_of_non_finite(record, places)
        text = json.dumps(finite, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
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
        part = self._parts.pop(key, None)
        if part is not None and part.size and part.size + num_bytes > self._max_bytes:
            self._ended.append(part)
            part = None
        self._parts[key] = part or self._new_part(mode, step)
        while len(self._parts) > _MAX_OPEN:
            self._ended.append(self._parts.pop(next(iter(self._parts))))
        return self._parts[key]

    def _new_part(self, mode: str, step: int) -> _Part:
        number = 0
        while True:
            path = self.path(step, mode, number)
            with _writing(path), contextlib.suppress(FileExistsError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                self._has_new_file = True
                return _Part(path, descriptor)
            number += 1

    def _abandon(self, part: _Part) -> None:
        """After a write that failed halfway: cut the torn line off, and write no more to this file."""
        self._parts = {key: other for key, other in self._parts.items() if other is not part}
        self._ended.append(part)
        with contextlib.suppress(OSError):  # then the torn line stays, as the last of its file
            os.ftruncate(part.descriptor, part.size)

    def _sync_folder(self) -> None:
        with _writing(self.folder):
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Explain what is refused, see `storage.writing`."""
    return writing(
        "The journal",
        path,
        safe="What was recorded before is intact, and nothing is trained on that is not recorded.",
        also="and resume from the newest checkpoint",
    )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


_TOKENS = ("prompt_ids", "completion_ids", "env_mask", "logprobs", "turn_ends", "further_rows")
_ARRAYS = {"float32": "f", "float64": "d"}  # type codes by name in a line
_NAMES = {code: name for name, code in _ARRAYS.items()}


def _with_logprobs(record: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a line with other log-probabilities in each of its rows."""
    changed = dict(record)
    if isinstance(further := record.get("further_rows"), list):
        changed["further_rows"] = [dict(row) if isinstance(row, Mapping) else row for row in further]
    for row in _rows(changed):
        if "logprobs" in row:
            row["logprobs"] = change(row["logprobs"])
    return changed


def _rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of a line that have tokens, itself first."""
    further = record.get("further_rows")
    return [record, *(row for row in further if isinstance(row, dict))] if isinstance(further, list) else [record]


def _packed(values: Any) -> Any:
    """Pack a list of finite floats, see the module; anything else stays as it is."""
    try:
        if not values or not math.isfinite(sum(values)):
            return values
        numbers = compact_floats(values)
    except (TypeError, OverflowError):
        return values  # which is refused when it is read
    return {_NAMES[numbers.typecode]: base64.b64encode(_little_endian(numbers).tobytes()).decode()}


def _unpacked(values: Any) -> Any:
    """Return what `_packed` was given. Raises `ValueError` for what it does not write."""
    if not isinstance(values, dict):
        return values
    try:
        [(name, text)] = values.items()
        numbers: array[float] = array(_ARRAYS[name], base64.b64decode(text, validate=True))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`logprobs` cannot be unpacked ({error!r})") from None
    return _little_endian(numbers).tolist()


def _little_endian(numbers: array[float]) -> array[float]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


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
    """Return all lines of a journal, by mode, step, rank and part; see `lines_of`."""
    return (line.record for line in read_lines(folder))


def read_lines(folder: str | Path, on_damaged: Callable[[str], None] | None = None) -> Iterator[Line]:
    """Return all lines of a journal, by mode, step, rank and part; see `lines_of`."""
    return (line for path in journal_files(folder) for line in lines_of(path, on_damaged))


def lines_of(path: Path, on_damaged: Callable[[str], None] | None = None) -> Iterator[Line]:
    """Yield the lines of a journal's file, without holding it in memory.

    Args:
        on_damaged: Is told of lines that cannot be read, which are left out.

    Raises:
        ConfigError: A line cannot be read, and there is no `on_damaged`: it is not JSON, or has fields of other types
            than the journal writes. The last one may have been torn by a crash; then it is left out, and logged.
    """
    with open(path, "rb") as file:
        offset = 0
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                record = _parse(raw, path, number, on_damaged)
                if record is not None:
                    yield Line(path, offset, len(raw.rstrip(b"\n")), record)
            offset += len(raw)


def read_line(path: Path, offset: int, length: int) -> dict[str, Any]:
    """Read one line again, from where `read_lines` found it."""
    with open(path, "rb") as file:
        file.seek(offset)
        return as_of_today(_with_logprobs(parse_json(file.read(length)), _unpacked))


def as_of_today(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line, of the journal or of `training_logprobs`, with the `step` and `version` of this schema; see the
    module. The line itself is changed."""
    step, schema = line.get("step"), line.get("schema", 1)
    if step is not None and schema < _COUNTS_FROM_1:
        line |= {"step": _step_of_today(step, line.get("mode") or "train", schema), "version": step}
    return line


def _step_of_today(step: int, mode: str, schema: int) -> int:
    return step + 1 if mode == "train" and schema < _COUNTS_FROM_1 else step


def read_objects(path: Path, shape: Any = dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the lines of a file beside the journal, with None for NaN and infinities.

    Lines that were torn (a full disk, a run that goes on), or that are something else, are left out, and logged.

    Args:
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


def journal_files(folder: str | Path) -> list[Path]:
    """Return the files of a journal in the order in which they are read: by mode, step, rank, part."""
    return [path for _, path in sorted(_files(folder))]


def training_files(folder: str | Path) -> dict[int, list[Path]]:
    """Return the files of training by the step of their lines, as `as_of_today` counts it."""
    found: defaultdict[int, list[Path]] = defaultdict(list)
    for (mode, step, *_), path in sorted(_files(folder)):
        if mode == "train":
            found[step].append(path)
    return dict(found)


def _files(folder: str | Path) -> Iterator[tuple[tuple[str, int, int, int, int], Path]]:
    """Yield mode, step, rank, schema and part of each file, and the file. One file is of one schema."""
    for path in Path(folder).expanduser().glob("*.jsonl"):
        if (match := _NAME.fullmatch(path.name)) is not None:
            mode, schema = match["mode"] or "train", _schema_of(path)
            step = _step_of_today(int(match["step"]), mode, schema)
            yield (mode, step, int(match["rank"]), schema, int(match["part"] or 0)), path


def _schema_of(path: Path) -> int:
    with open(path, "rb") as file:
        begin = file.read(64)
    match = _BEGIN.match(begin)
    return SCHEMA if not begin else 1 if match is None else int(match[1])


def _parse(raw: bytes, path: Path, number: int, on_damaged: Callable[[str], None] | None) -> dict[str, Any] | None:
    try:
        record = parse_json(raw)
    except ValueError as error:  # also a character of which only the first bytes are there
        if not raw.endswith(b"\n"):
            (on_damaged or logger.warning)(f"{path}, line {number}: torn by a crash after {len(raw)} bytes; left out")
            return None
        problem: str | None = f"not JSON ({error})"
    else:
        try:
            record = _with_logprobs(record, _unpacked) if isinstance(record, dict) else record
            problem = shape_problem(record, _RecordShape) or _contradiction(record)
            record = record if problem else as_of_today(record)
        except ValueError as error:
            problem = str(error)
    if problem is not None and on_damaged is not None:
        on_damaged(f"the journal is damaged: {path}, line {number}: {problem}; left out")
        return None
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
    version: _Size | None = None
    schema: int = SCHEMA
    mode: str = "train"
    rollout_id: str = ""
    agent: str = ""
    dataset: str | None = None
    run: str | None = None
    weights: str | None = None
    task_hash: str = ""
    request_hash: str = ""
    batch: int | None = None
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
    """Ended early: its group had enough rewards or had become too stale, or its batch was given up."""

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
