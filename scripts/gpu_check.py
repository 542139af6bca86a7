"""Prove on one GPU what has only run on a CPU: one command, part by part, into one JSON.

    python scripts/gpu_check.py --json gpu_check.json              # all parts; within ten minutes on one GPU
    python scripts/gpu_check.py --wheels DIR --json gpu_check.json # without a network: packages from a folder
    python scripts/gpu_check.py --parts transformers,ipc           # some
    python scripts/gpu_check.py --dry-run                          # on a CPU: each part as far as it goes
    python scripts/gpu_check.py --write-docs gpu_check.json        # put the results into docs/

Each part is a process of its own with a limit of its own: one that fails, hangs or kills its process does not stop the
next. A part that cannot run says why. The parts are in `gpu_parts/`, in the order of what they are worth; what each
shows, needs and takes stands in `PARTS`, and in docs/howto/gpu_check.md.

This file needs nothing but the standard library: packages may come from the folder of wheels alone. `DIR/*.whl` go to
a virtual environment above this Python's packages, in which all parts run; `DIR/gym/*.whl` are NeMo Gym's, for another
one. Of what NeMo Gym imports and does not use here (ray and wandb, 130 MB) it gets stand-ins where it lacks them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECORD = DOCS / "gpu_check.json"  # of the run that docs/ tells about
BASE = ("torch", "transformers", "trl", "accelerate", "datasets", "msgspec", "uvicorn", "aiohttp", "rich")
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
_DRY_LIMIT_S = 600  # of a part on a CPU, which others may use as well
_STOP_S = 20.0  # for the servers of a part that was killed to end
_FACTS_S = 240.0  # for a first import of torch from a slow disk: without it nothing runs


@dataclass(frozen=True)
class Part:
    """One proof.

    Attributes:
        name: For `--parts`; also of its function, as `MODULE.NAME` in `gpu_parts/`.
        shows: What is known once it has passed; a cell of the table in docs/tested.md.
        needs: Modules beside `BASE`.
        gym: Whether it needs NeMo Gym.
        expected_s: Seconds on one GPU of the class of an H100: an estimate, for nothing of it has run on one.
        limit_s: Seconds after which it is killed.
    """

    name: str
    module: str
    shows: str
    expected_s: int
    limit_s: int
    needs: tuple[str, ...] = ()
    gym: bool = False


PARTS = (
    Part("transformers", "loops", "training with the engine in the trainer's process, in bfloat16 by autocast and in "
         "bfloat16 weights: the reward rises, what is trained has the probability with which it was sampled", 90, 150,
         gym=True),
    Part("fsdp2", "alone", "weights of FSDP2 (NCCL, one process), bit for bit those of the whole model, also after a "
         "step", 20, 60, ("peft",)),
    Part("offload", "alone", "the optimizer's state goes to the host and comes back bit for bit; the device's free "
         "memory grows by what was moved", 20, 60),
    Part("plan", "loops", "peak memory of a step against the plan's figure, of a model of 300 M parameters", 60, 120,
         gym=True),
    Part("ipc", "alone", "`ipc`: every byte in another process, beside a copy on the device", 40, 90, ("vllm",)),
    Part("sync", "server", "vLLM on the same GPU: weights by `ipc` with a probe after each", 60, 200, ("vllm",)),
    Part("sleep", "server", "vLLM sleeps and wakes, with weights kept (level 1) and dropped and sent again (level 2)",
         60, 150, ("vllm",)),
    Part("keep", "server", "a weight sync with `gym_pause_mode: keep` while rollouts are in flight", 50, 150,
         ("vllm",)),
    Part("quickstart", "loops", "five steps of the quickstart with vLLM on the same GPU, which sleeps during updates, "
         "and an optimizer that is offloaded during rollouts", 80, 200, ("vllm",), gym=True),
    Part("fsdp2_loop", "loops", "the same by `accelerate launch` with FSDP2, one process", 90, 200, ("vllm",),
         gym=True),
)  # fmt: skip
BUDGET_S = 600


@dataclass(frozen=True)
class Options:
    """What all parts are told."""

    dry: bool
    folder: Path  # in which each part has a folder of its own
    gym_python: str | None
    budget_s: float
    vllm_args: str = "{}"  # JSON
    python: str = sys.executable  # in which the parts run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="names with commas between (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, as far as each part goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install packages from this folder first")
    parser.add_argument("--gym-python", metavar="PYTHON", help="interpreter that has nemo-gym (default: as trl-gym)")
    parser.add_argument("--vllm-args", default="{}", metavar="JSON", help="further flags of vLLM's server")
    parser.add_argument("--minutes", type=float, default=BUDGET_S / 60, help="for all on a GPU (default: %(default)g)")
    parser.add_argument("--folder", type=Path, help="keep what the parts write: logs, models (default: removed)")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="put the results of a run into docs/")
    parser.add_argument("--run-part", help=argparse.SUPPRESS)  # in the process of a part
    options = parser.parse_args(argv)
    if options.write_docs is not None:
        return write_docs(options.write_docs)
    if options.run_part is not None:
        sys.path.insert(0, str(ROOT / "scripts"))
        from gpu_parts import run_part

        told = {"gym_python": options.gym_python, "vllm_args": json.loads(options.vllm_args)}
        return run_part(options.run_part, dry=options.dry_run, folder=options.folder, **told)
    try:
        chosen = choose(options.parts)
    except ValueError as error:
        parser.error(str(error))
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-check-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder, python, gym_python = folder.resolve(), sys.executable, options.gym_python
        if options.wheels is not None:
            python, gym_python = install(options.wheels, folder, gym_python)
        told = Options(options.dry_run, folder, gym_python, 60 * options.minutes, options.vllm_args, python)
        record = check(chosen, told)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))
    return int(any(part["result"] == FAILED for part in record["parts"]))


def choose(names: str | None) -> list[Part]:
    """Return the parts of these names, in the order of `PARTS`. Raises `ValueError` for a name that none has."""
    known = [part.name for part in PARTS]
    wanted = known if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--parts: there is no part {unknown[0]!r}; there are {', '.join(known)}")
    return [part for part in PARTS if part.name in wanted]


def check(parts: Sequence[Part], options: Options) -> dict[str, Any]:
    """Run parts one after another. Returns what a JSON holds: facts of the machine, and for each part its result."""
    started = time.monotonic()
    facts = run("facts", _FACTS_S, options)
    done = []
    for part in parts:
        left = options.budget_s - (time.monotonic() - started)
        problem = None if facts["result"] == PASSED else f"the machine could not be looked at: {facts['reason']}"
        if not options.dry and problem is None and not facts["measured"].get("gpu"):
            problem = "there is no CUDA device (`--dry-run` goes as far as a CPU does)"
        if not options.dry and left < part.expected_s / 2:
            problem = problem or f"{left:.0f} s of `--minutes` are left, and it takes about {part.expected_s}"
        say(f"{part.name} …")
        limit = _DRY_LIMIT_S if options.dry else min(part.limit_s, max(left, 1))
        one = _nothing(problem) if problem else run(part.name, limit, options)
        say(f"{part.name}: {one['result']}, {one['seconds']:.0f} s. {one['reason']}".strip())
        done.append({"name": part.name, "shows": part.shows, **one})
    seconds = round(time.monotonic() - started, 1)
    return {"dry": options.dry, "date": time.strftime("%Y-%m-%d"), "commit": commit(), "seconds": seconds,
            "facts": facts["measured"], "parts": done}  # fmt: skip


def run(name: str, limit_s: float, options: Options) -> dict[str, Any]:
    """Run one part in a process of its own, and kill it and its children when its time is up."""
    folder = options.folder / name
    folder.mkdir(exist_ok=True)
    command = [options.python, str(Path(__file__).resolve()), "--run-part", name, "--folder", str(folder)]
    command += ["--dry-run"] if options.dry else []
    command += ["--gym-python", options.gym_python] if options.gym_python else []
    command += ["--vllm-args", options.vllm_args]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # One: with several in sight, one process would train on all of them (torch's DataParallel).
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    result, output, started = folder / "result.json", folder / "output.log", time.monotonic()
    with output.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    seconds = round(time.monotonic() - started, 1)
    if code == 0 and result.exists():
        return {**json.loads(result.read_text()), "seconds": seconds}
    why = f"it was killed after {limit_s:.0f} s" if code is None else f"its process ended with {code}"
    tail = output.read_text(errors="replace")[-2000:]
    found = json.loads(result.read_text()) if result.exists() else {"measured": {}, "stops": []}
    return {**found, "result": FAILED, "reason": why, "seconds": seconds, "output": tail}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part with everything in its session; servers, in sessions of their own, end when it is gone."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)


def _nothing(reason: str) -> dict[str, Any]:
    return {"result": NOT_RUN, "reason": reason, "seconds": 0.0, "measured": {}, "stops": []}


def say(text: str) -> None:
    print(text, flush=True)


def commit() -> str | None:
    """Return the commit of this checkout, with a plus where files differ from it; None where it is none."""
    try:
        done = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return done[0] + ("+" if done[1] else "")


# -- packages from a folder -------------------------------------------------------------------------------------------

# Modules that NeMo Gym imports at the top, and uses neither of in one process: any name of theirs is a class.
_STAND_INS = {"ray": '__version__ = "0"\n', "wandb": "from wandb import util\n"}
_ANY_NAME = '''"""Stands for a package that is imported and not used."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


'''


def install(wheels: Path, folder: Path, gym_python: str | None) -> tuple[str, str | None]:
    """Unpack a folder of wheels. Returns the interpreter for the parts, and that for NeMo Gym.

    Each has an environment: by PYTHONPATH the packages of one would come before those of the other, which it starts.
    """
    site, gym_site, python = folder / "site", folder / "gym-site", sys.executable
    if unpack(wheels, site):
        python = new_environment(folder / "trainer", site)
    if gym_python is not None or not unpack(wheels / "gym", gym_site):
        return python, gym_python
    for name, more in _STAND_INS.items():
        if not (gym_site / name).is_dir():
            (gym_site / name).mkdir()
            (gym_site / name / "__init__.py").write_text(_ANY_NAME + more)
            (gym_site / name / "util.py").write_text("VALUE_BYTES_LIMIT = 0\n")
    return python, new_environment(folder / "gym", gym_site)


def new_environment(folder: Path, site: Path) -> str:
    """Make a virtual environment with these packages, before those that this Python has. Returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    own = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    folders = dict.fromkeys([str(site), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *own])
    # By `addsitedir`, which reads their `.pth` files: an editable installation is one.
    (packages / "packages.pth").write_text("".join(f"import site; site.addsitedir({one!r})\n" for one in folders))
    return str(folder / "bin" / "python")


def unpack(wheels: Path, target: Path) -> bool:
    """Unpack all wheels of a folder, which needs no pip. Returns whether there are any."""
    files = sorted(wheels.glob("*.whl"))
    if files:
        say(f"unpacking {len(files)} wheels of {wheels} …")
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            for entry in wheel.infolist():
                # `NAME.data/purelib/…` belongs beside the rest; scripts and headers are not needed.
                kept = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
                if entry.is_dir() or re.match(r"^[^/]+\.data/", kept):
                    continue
                path = target / kept
                path.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(entry) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                if entry.external_attr >> 16 & 0o111:  # programs, such as ptxas
                    path.chmod(0o755)
    return bool(files)


# -- what is told -----------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """Write the results for people."""
    facts = ", ".join(f"{name} {value}" for name, value in record["facts"].items())
    lines = [f"\n{'dry run, ' if record['dry'] else ''}{record['date']}, commit {record['commit']}: {facts}\n"]
    for part in record["parts"]:
        lines.append(f"{part['name']:<13} {part['result']:<8} {part['seconds']:>6.1f} s  {part['reason']}".rstrip())
        lines += [f"{'':<13}   {name}: {value}" for name, value in part["measured"].items()]
        lines += [f"{'':<13}   stops: {reason}" for reason in part["stops"]]
        if part.get("output"):
            lines += [f"{'':<13}   | {line}" for line in part["output"].splitlines()[-12:]]
    counts = {result: sum(p["result"] == result for p in record["parts"]) for result in (PASSED, FAILED, NOT_RUN)}
    return "\n".join([*lines, f"\n{record['seconds']:.0f} s: " + ", ".join(f"{n} {r}" for r, n in counts.items())])


def write_docs(file: Path) -> int:
    """Copy the JSON of a run on a GPU to docs/ and write the pages that tell of it."""
    record = json.loads(file.read_text())
    if record["dry"] or not record["facts"].get("gpu"):
        print(f"{file} is of a run without a GPU: docs/ tells of runs on one.", file=sys.stderr)
        return 1
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "docs.py")], cwd=ROOT).returncode


def tested() -> tuple[str, list[tuple[str, ...]]]:
    """What docs/ tells of the run in `RECORD`: a sentence, and for each part what it shows, its result and figures."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else None
    found = {} if record is None else {part["name"]: part for part in record["parts"]}
    rows = []
    for part in PARTS:
        one = found.get(part.name, _nothing(""))
        result = f"**{NOT_RUN}**" if one["result"] == NOT_RUN else one["result"]
        reason = f": {one['reason']}" if one["reason"] else ""
        figures = "; ".join(f"{name} {value}" for name, value in one["measured"].items())
        rows.append((f"`{part.name}`", part.shows, f"{result}{reason}".replace("|", "\\|"), figures))
    if record is None:
        return "No run on a GPU is recorded: nothing in this table has run on one.", rows
    facts = ", ".join(f"{name} {value}" for name, value in record["facts"].items() if name != "gpu")
    gpu, when = record["facts"]["gpu"], f"{record['date']}, commit {record['commit']}, {record['seconds']:.0f} s"
    return f"On one {gpu} on {when}: {facts}.", rows


def needed() -> list[tuple[str, ...]]:
    """Rows for docs/: each part with what it needs and the minutes that it is expected to take."""
    return [
        (
            f"`{part.name}`",
            part.shows,
            ", ".join((*(f"`{name}`" for name in part.needs), *(("NeMo Gym",) if part.gym else ()))) or "·",
            f"{part.expected_s / 60:.1f}",
        )
        for part in PARTS
    ]


if __name__ == "__main__":
    sys.exit(main())
