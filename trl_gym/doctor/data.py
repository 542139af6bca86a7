"""Datasets: rows that Gym understands, for agents that there are."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_gym.dataset import ROW_COLUMN, read_records
from trl_gym.doctor.checks import Finding, failed, ok, skipped, warning
from trl_gym.doctor.context import Subject

_MAX_REPORTED = 10
_SCRIPT_TIMEOUT_S = 600.0
FILE_KEY = "doctor_file"


def data_script(subject: Subject) -> Iterator[Finding]:
    """The script that makes the data is there and makes it; what it makes is examined with the other files."""
    script = subject.script.data_script
    if script is None:
        return
    if not Path(script).is_file():
        yield failed(
            f"`data_script` {script} does not exist", "Set it to the script's path from the working directory."
        )
        return
    folder = subject.work_dir() / "data"
    made = (folder / "train.jsonl", folder / "validation.jsonl")
    done = subprocess.run(
        [sys.executable, script, "--output_dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=_SCRIPT_TIMEOUT_S,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        yield failed(
            f"{script} ended with exit code {done.returncode}: {last[0]}", f"`python {script} --output_dir X`"
        )
        return
    missing = [path.name for path in made if not path.is_file()]
    if missing:
        yield failed(f"{script} does not write {' and '.join(missing)}", "Make it write both into `--output_dir`.")
        return
    subject.script.train_files.append(str(made[0]))
    subject.script.eval_files.append(str(made[1]))
    yield ok(f"{script} writes train.jsonl and validation.jsonl")


def rows(subject: Subject) -> Iterator[Finding]:
    """Every line of every file is a row that Gym understands."""
    script = subject.script
    if not script.train_files:
        yield failed(
            "no training data: `train_files` and `data_script` are not set", "Set `train_files` to Gym JSONL."
        )
    for file in dict.fromkeys([*script.train_files, *script.eval_files]):
        problems: list[str] = []
        found = [record | {FILE_KEY: file} for record in read_records(Path(file), script.agent, None, problems)]
        subject.train_rows += found
        name = shown(subject, file)
        for problem in problems[:_MAX_REPORTED]:
            remedy = "One JSON object per line, with `responses_create_params.input`; write the line anew."
            if "cannot be read" in problem:
                remedy = "Check the path (from the working directory), or make the file."
            yield failed(problem, remedy)
        if len(problems) > _MAX_REPORTED:
            yield failed(f"{name}: {len(problems) - _MAX_REPORTED} more lines like that", "Mend the first ones first.")
        if not found and not problems:
            yield failed(f"{name} has no rows", "A Gym dataset has one JSON object per line.")
        elif not problems:
            yield ok(f"{name}: {len(found)} rows")


def shown(subject: Subject, file: str) -> str:
    """A file as messages name it: one that the data script made is not there any more when they are read."""
    made = subject.script.data_script is not None and Path(file).parent == subject.work_dir() / "data"
    return f"{Path(file).name} of {subject.script.data_script}" if made else file


def agents(subject: Subject) -> Iterator[Finding]:
    """The agents that rows name are there, and rows that name none have a single one to go to."""
    known = subject.agents
    if not subject.serves:
        return
    if known is None or not subject.train_rows:
        yield skipped("needs " + ("agents (gym configs, gym head server)" if known is None else "dataset rows"))
        return
    named: dict[str | None, list[dict[str, Any]]] = {}
    for record in subject.train_rows:
        named.setdefault(record["agent"], []).append(record)
    wrong = False
    for name, records in named.items():
        if (name is None and len(known) == 1) or name in known:
            continue
        wrong = True
        yield _unknown_agent(name, records, known)
    for name in subject.args.gym_environments or {}:
        if name not in known:
            wrong = True
            yield failed(f"`gym_environments` names the unknown agent {name}", _choose(name, known))
    if not wrong:
        used = sorted({name or known[0] for name in named})
        yield ok(", ".join(used))
        unused = sorted(set(known) - set(used))
        if unused:
            yield warning(
                f"no row is for {', '.join(unused)}", "Leave their configs out, or add rows; they only cost start-up."
            )


def _unknown_agent(name: str | None, records: list[dict[str, Any]], known: tuple[str, ...]) -> Finding:
    first = records[0]
    where = f"{first[FILE_KEY]}, line {_line_of(first)}" + (
        f" and {len(records) - 1} more" if len(records) > 1 else ""
    )
    if name is None:
        return failed(
            f"{where}: the row names no agent and there are {', '.join(known)}",
            "Choose one with `--agent NAME`, or write `agent_ref` into the rows.",
        )
    return failed(f"{where}: the row is for agent {name}, which the configs do not define", _choose(name, known))


def _choose(name: str, known: tuple[str, ...]) -> str:
    closest = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {closest[0]}? " if closest else ""
    return f"{hint}There is {', '.join(known)}; add the config of another one to `gym_config_paths`."


def _line_of(record: dict[str, Any]) -> int:
    """A row whose agent was filled in is found by its request."""
    lines = Path(record[FILE_KEY]).read_text(encoding="utf-8").split("\n")
    if record[ROW_COLUMN] in lines:
        return lines.index(record[ROW_COLUMN]) + 1
    request = _request(record[ROW_COLUMN])
    return next(number for number, line in enumerate(lines, start=1) if _request(line) == request)


def _request(line: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # told by `dataset rows`
        return None
    return row.get("responses_create_params") if isinstance(row, dict) else None
