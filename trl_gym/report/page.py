"""One HTML file with everything in it: style, program, data. Nothing is loaded from anywhere else.

    <head>    a Content-Security-Policy that allows this program and this style, by their hashes, and nothing more
    <body>    what is seen before the program runs
    data      gzip, base64, in script elements that do not run:
                  c0, t0, c1, t1, …   conversations and tokens of some rollouts each; unpacked when they are looked at
                  pieces              text of tokens by id
                  metrics             metrics.jsonl
                  others              numbers per step and metrics.jsonl of the runs beside this one
                  index               one row per rollout, numbers per step: unpacked at once
    program   trl_gym/report/assets/*.js

The journal holds text of strangers. It is in the page as base64 alone, and the program puts it into text nodes, never
into markup.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import html
import importlib.resources
import io
import json
import math
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from trl_gym.errors import ConfigError
from trl_gym.given import home_path
from trl_gym.report.bodies import Pieces, Shared, conversation_body, token_bodies
from trl_gym.report.index import advantages, causes, ordered, previews, sample, states, step_stats
from trl_gym.report.rows import Row, row_of
from trl_gym.report.source import RecordedRun, open_run, read_metrics, read_trained
from trl_gym.rollouts.journal import Line, LineState, read_line, read_lines, without_non_finite

SCHEMA = 1
_CHUNK_BYTES = 4 * 10**6  # of the journal's lines; what is unpacked at a time
_CHUNK_ROLLOUTS = 128
_NUM_CAUSES = 200
_CAUSE_CHARACTERS = 2000
_BLOB = b'<script type="application/octet-stream" id="%s">'
_SCRIPTS = (
    *("dom.js", "data.js", "format.js", "filter.js", "charts.js", "list.js", "overview.js", "steps.js"),
    *("groups.js", "rollouts.js", "rollout.js", "answers.js", "conversation.js", "tokens.js", "timing.js"),
    *("failures.js", "compare.js", "main.js"),
)
_STYLES = ("base.css", "views.css", "rollout.css")
# Columns of the index that hold one of few texts: as numbers into a list.
_NAMED = ("mode", "dataset", "agent", "failure", "drift", "finish", "version")
_PLAIN = (
    *("rollout_id", "step", "batch", "group", "member", "attempt", "time", "reward", "success", "turns", "rows"),
    *("prompt_tokens", "environment_tokens", "sampled_tokens", "tool_calls", "tool_errors", "seconds"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """Limits of the page's content."""

    # Rollouts whose conversation and tokens are in the page; None for all. Curves, steps and failures are of all in
    # any case.
    max_rollouts: int | None = None
    with_tokens: bool = True  # whether token ids and log-probabilities are in it; the page is smaller without
    reload_s: float = 0.0  # seconds after which the page reads its file again; 0 for never
    on_damaged: Callable[[str], None] | None = None  # told of journal lines that are left out; else they are an error


class NothingRecordedError(ConfigError):
    """A journal holds no rollout that can be shown."""


@dataclass(frozen=True, slots=True)
class WrittenPage:
    """A page that was written."""

    path: Path  # the file
    size: int  # its size in bytes
    recorded: int  # lines in the journal
    shown: int  # those of them that are in the page


def write_page(
    run: RecordedRun, path: str | Path, options: PageOptions | None = None, others: Sequence[RecordedRun] = ()
) -> WrittenPage:
    """Write the page, whole or not at all.

    Args:
        run: The run whose rollouts are in the page.
        options: Limits of its content.
        others: Runs whose curves stand beside that one's.

    Raises:
        ConfigError: The journal holds no rollout, or a line that is not the last of its file is damaged.
        OSError: The file cannot be written.
    """
    target = Path(home_path(path))
    with _whole(target) as file:
        recorded, shown = render(run, file, options or PageOptions(), others)
    return WrittenPage(target, target.stat().st_size, recorded, shown)


def end_reload(path: Path) -> None:
    """Make a page read its file no more, when what it shows cannot be read again.

    Args:
        path: A page that was written with `reload_s`.

    Raises:
        OSError: The file cannot be read or written.
    """
    before, start, rest = path.read_bytes().partition(_BLOB % b"index")
    data, end, after = rest.partition(b"<")
    index = json.loads(gzip.decompress(base64.b64decode(data))) | {"reload_s": 0}
    with _whole(path) as file:
        file.write(before + start + _packed(index) + end + after)


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of another one when it is written, or not at all."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def render(
    run: RecordedRun, file: IO[bytes], options: PageOptions, others: Sequence[RecordedRun] = ()
) -> tuple[int, int]:
    """Write the page to a binary file. One line of the journal is in memory at a time. Returns how many lines the
    journal has, and how many of them are in the page. Raises `ConfigError`: see `write_page`."""
    lines, rows = _read(run, options.on_damaged)
    found = states(rows)
    shown = sample(rows, ordered(rows), options.max_rollouts)
    pieces = Pieces(run.tokenizer if options.with_tokens else None)
    style, script = _asset(*_STYLES), _asset(*_SCRIPTS)
    head, tail = _asset("page.html").split("{{data}}")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = head.replace("{{title}}", html.escape(run.name)).replace("{{policy}}", policy).replace("{{style}}", style)
    file.write(head.encode())
    trained = _trained(run, {rows[i].rollout_id for i in shown}, options.with_tokens)
    places = _write_chunks(file, [lines[i] for i in shown], pieces, trained, options.with_tokens)
    _write_blob(file, "pieces", {"text": pieces.text, "special": pieces.special()})
    _write_blob(file, "metrics", read_metrics(run))
    if others:
        _write_blob(file, "others", [_other(other, options.on_damaged) for other in others])
    index = _index(run, rows, found, shown, places)
    index |= {"tokenizer": pieces.is_known, "reload_s": options.reload_s, "others": len(others)}
    own = [trained.get(rows[i].rollout_id) for i in shown]
    index["columns"]["trained"] = [one and one.step for one in own]
    recorded = [one and one.advantage for one in own]
    # Where some are recorded, a rollout without was not trained, or is not yet.
    is_recorded = any(value is not None for value in recorded)
    computed = [] if is_recorded else advantages(rows, found)
    index["columns"]["advantage"] = recorded if is_recorded else [computed[i] for i in shown]
    index["advantages"] = "recorded" if is_recorded else "computed"
    _write_blob(file, "index", index)
    file.write(tail.replace("{{script}}", script).encode())
    return len(rows), len(shown)


def _read(run: RecordedRun, on_damaged: Callable[[str], None] | None) -> tuple[list[Line], list[Row]]:
    """Return where each line stands, and its row."""
    lines, rows = [], []
    texts: dict[str, str] = {}  # one copy of the task that many rollouts have
    for line in read_lines(run.journal, on_damaged):
        row = row_of(line.record)
        rows.append(replace(row, text=texts.setdefault(row.text, row.text)))
        lines.append(Line(line.path, line.offset, line.length, {}))
    if not rows:
        raise NothingRecordedError(
            f"The journal {str(run.journal)!r} holds no finished rollout yet. A line is written when a rollout ends.",
            "Try again then if the run goes on, else look into its `logs`.",
        )
    return lines, rows


@dataclass(frozen=True, slots=True)
class _Trained:
    step: int | None
    advantage: float | None
    logprobs: list[array[float]]  # of each row; NaN where they are not finite


def _trained(run: RecordedRun, wanted: set[str], with_logprobs: bool) -> dict[str, _Trained]:
    """Return what the trainer recorded of rollouts in the page, by rollout id."""
    return {
        one.rollout_id: _Trained(
            one.step,
            one.advantage,
            [array("d", (math.nan if value is None else value for value in row)) for row in one.logprobs]
            if with_logprobs
            else [],
        )
        for one in read_trained(run)
        if one.rollout_id in wanted
    }


def _other(run: RecordedRun, on_damaged: Callable[[str], None] | None) -> dict[str, Any]:
    _, rows = _read(run, on_damaged)
    stats = [asdict(own) for own in step_stats(rows, states(rows))]
    agents = sorted({row.agent for row in rows})
    return {"run": run.name, "agents": agents, "steps": stats, "metrics": read_metrics(run)}


def _write_chunks(
    file: IO[bytes], lines: Sequence[Line], pieces: Pieces, trained: dict[str, _Trained], with_tokens: bool
) -> list[tuple[int, int]]:
    """Write conversations and tokens; return for each rollout the number of its chunk and its place in it."""
    places: list[tuple[int, int]] = []
    for number, own in enumerate(_chunks(lines)):
        conversations, tokens = Shared(), Shared()
        said: list[Any] = []
        tokenized: list[Any] = []
        for line in own:
            record = read_line(line.path, line.offset, line.length)
            said.append(conversation_body(record, conversations))
            if with_tokens:
                own_trained = trained.get(str(record.get("rollout_id")))
                tokenized.append(token_bodies(record, tokens, pieces, own_trained.logprobs if own_trained else ()))
            places.append((number, len(said) - 1))
        _write_blob(file, f"c{number}", {"shared": conversations.values, "rollouts": said})
        if with_tokens:
            _write_blob(file, f"t{number}", {"shared": tokens.values, "rollouts": tokenized})
    return places


def _chunks(lines: Sequence[Line]) -> Iterator[list[Line]]:
    own: list[Line] = []
    size = 0
    for line in lines:
        if own and (size + line.length > _CHUNK_BYTES or len(own) >= _CHUNK_ROLLOUTS):
            yield own
            own, size = [], 0
        own.append(line)
        size += line.length
    if own:
        yield own


def _index(
    run: RecordedRun,
    rows: Sequence[Row],
    found: Sequence[LineState],
    shown: Sequence[int],
    places: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    own, listed = [rows[i] for i in shown], previews(rows)
    tasks: dict[tuple[Any, ...], str] = {}  # of each group, in the order of the groups' numbers
    for row in own:
        tasks.setdefault(row.group_key, listed[row.agent, row.text])
    group_ids = {key: index for index, key in enumerate(tasks)}
    columns = {name: [getattr(row, name) for row in own] for name in _PLAIN}
    names: dict[str, list[str | None]] = {}
    for name in _NAMED:
        names[name], columns[name] = _numbered([getattr(row, name) for row in own])
    names["state"], columns["state"] = _numbered([str(found[i]) for i in shown])
    columns |= {"group_id": [group_ids[row.group_key] for row in own]}
    columns |= {"chunk": [chunk for chunk, _ in places], "place": [at for _, at in places]}
    return {
        "schema": SCHEMA,
        "run": run.name,
        "written": round(time.time()),
        "recorded": len(rows),
        "columns": columns,
        "names": names,
        "previews": list(tasks.values()),
        "steps": [asdict(stats) for stats in step_stats(rows, found)],
        "causes": _causes(rows, found),
        "drift": _drift_counts(rows, found),
    }


def _causes(rows: Sequence[Row], found: Sequence[LineState]) -> dict[str, Any]:
    listed = causes(rows, found)
    top = [asdict(cause) | {"text": cause.text[:_CAUSE_CHARACTERS]} for cause in listed[:_NUM_CAUSES]]
    return {"listed": top, "left_out": len(listed) - len(top)}


def _drift_counts(rows: Sequence[Row], found: Sequence[LineState]) -> list[dict[str, Any]]:
    """Count the counted rollouts that drifted, by environment and cause."""
    counts = Counter(
        (row.agent, row.drift)
        for row, state in zip(rows, found, strict=True)
        if row.drift is not None and state is LineState.COUNTED
    )
    return [{"agent": agent, "cause": cause, "count": count} for (agent, cause), count in sorted(counts.items())]


def _numbered(values: Sequence[str | None]) -> tuple[list[str | None], list[int]]:
    """Return the different values, sorted with None first, and for each value its place among them."""
    names = sorted(set(values), key=lambda name: (name is not None, name or ""))
    place = {name: index for index, name in enumerate(names)}
    return names, [place[name] for name in values]


def _write_blob(file: IO[bytes], name: str, value: Any) -> None:
    file.write(_BLOB % name.encode() + _packed(value) + b"</script>\n")


def _packed(value: Any) -> bytes:
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:  # JSON has no infinity; 1e999 is one
        text = json.dumps(without_non_finite(value, "", []), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0))


def _asset(*names: str) -> str:
    folder = importlib.resources.files("trl_gym.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# -- in a notebook: the page in a frame that cannot reach the notebook ------------------------------------------------

DEFAULT_MAX_ROLLOUTS = 500  # a notebook keeps its outputs, and so every megabyte of this one


@dataclass(frozen=True, slots=True)
class NotebookPage:
    """The value of `show`. A notebook displays it as the last value of a cell."""

    document: str  # the page
    height: int  # height of the frame in pixels

    def _repr_html_(self) -> str:
        # Scripts only: with an origin of its own the frame can read nothing of the notebook, nor start anything in it.
        return (
            f'<iframe srcdoc="{html.escape(self.document)}" sandbox="allow-scripts" title="trl-gym view" '
            f'style="width:100%;height:{self.height}px;border:1px solid #8884;border-radius:6px"></iframe>'
        )

    def __repr__(self) -> str:
        return f"NotebookPage({len(self.document) / 1e6:.1f} MB; shown by a notebook, or write it with `trl-gym view`)"


def show(
    run: str | Path,
    *,
    max_rollouts: int | None = DEFAULT_MAX_ROLLOUTS,
    tokenizer: str | Path | None = None,
    height: int = 720,
) -> NotebookPage:
    """Show a run's page in a notebook.

    Args:
        max_rollouts: See `PageOptions`. The notebook's file grows with it.
        tokenizer: A `tokenizer.json` or the folder of one; None takes the run's own.

    Raises:
        ConfigError: The run does not exist, or has no finished rollout yet.
    """
    buffer = io.BytesIO()
    render(open_run(run, tokenizer), buffer, PageOptions(max_rollouts=max_rollouts))
    return NotebookPage(buffer.getvalue().decode(), height)
