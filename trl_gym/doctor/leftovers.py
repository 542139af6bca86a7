"""What earlier runs left behind: files in shared memory and servers whose owner is gone. Named, never removed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trl_gym.doctor.checks import Finding, ok, warning
from trl_gym.doctor.context import Subject
from trl_gym.doctor.static import SHARED_MEMORY

_SERVER = re.compile(r"-m trl_gym\.policy_server .*--listen-fd|trl_gym/gym/host\.py ")
_ENGINE = re.compile(r"^VLLM::")
_SUPERVISOR = "trl_gym/supervisor.py"
_INIT = 1  # adopts processes whose parent has ended
_ADAPTERS = re.compile(r"trl-gym-adapters-(\d+)-")


@dataclass(frozen=True, slots=True)
class Process:
    """A line of the process table."""

    pid: int
    parent: int
    command: str


def leftovers(subject: Subject) -> Iterator[Finding]:
    """Files and servers that no living run owns."""
    table = processes()
    found = False
    places = [SHARED_MEMORY, *([Path(subject.args.gym_weight_dir)] if subject.args.gym_weight_dir else [])]
    for place in places:
        if left := left_files(place, table):
            found = True
            yield warning(
                f"{len(left)} file(s) in {place} that no process of this machine uses: their runs have ended",
                f"`rm -r {' '.join(map(str, left))}`",
            )
    for process in orphans(table):
        found = True
        name = "NeMo Gym" if "host.py" in process.command else f"a policy server ({process.command[:40].strip()})"
        yield warning(f"{name} runs without its trainer (process {process.pid})", f"`kill {process.pid}`")
    if not found:
        yield ok("none")


def processes(root: Path = Path("/proc")) -> dict[int, Process]:
    """The processes of this user, by pid."""
    table = {}
    for entry in root.iterdir():
        # Processes end while they are looked at.
        with contextlib.suppress(OSError, ValueError, IndexError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                table[int(entry.name)] = Process(int(entry.name), parent, command)
    return table


def orphans(table: Mapping[int, Process]) -> list[Process]:
    """Servers of which no ancestor is a supervisor: it ends with the trainer, and its servers with it; and engines of
    vLLM whose server is gone."""
    return [
        process
        for process in table.values()
        if (_ENGINE.search(process.command) and process.parent == _INIT)
        or (
            _SERVER.search(process.command)
            and _SUPERVISOR not in process.command
            and not any(_SUPERVISOR in ancestor.command for ancestor in _ancestors(process, table))
        )
    ]


def left_files(folder: Path, table: Mapping[int, Process]) -> list[Path]:
    """Weights and adapters that no living process owns: of adapters the name says whose they are, of other files that
    some process holds them open or mapped."""
    candidates = [path for path in sorted(folder.glob("trl-gym-*")) if path.stat().st_uid == os.getuid()]
    if not candidates:
        return []
    held = _held_paths(table)
    left = []
    for path in candidates:
        owner = _ADAPTERS.match(path.name)
        alive = int(owner[1]) in table if owner else str(path) in held
        if not alive:
            left.append(path)
    return left


def _ancestors(process: Process, table: Mapping[int, Process]) -> Iterator[Process]:
    while (parent := table.get(process.parent)) is not None and parent is not process:
        yield parent
        process = parent


def _held_paths(table: Mapping[int, Process]) -> set[str]:
    held = set[str]()
    for pid in table:
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look into
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(os.readlink(link))
            held |= {line.split(maxsplit=5)[5].strip() for line in _maps(pid) if len(line.split(maxsplit=5)) == 6}
    return held


def _maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
