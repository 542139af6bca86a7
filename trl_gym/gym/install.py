"""Find the Python that runs NeMo Gym, and check what is installed there.

Gym needs Python 3.12 and pins packages that conflict with vLLM: it has an environment of its own.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trl_gym import compat
from trl_gym.errors import ConfigError, UnsupportedVersionError

logger = logging.getLogger(__name__)

TESTED_GYM = compat.TESTED["nemo-gym"]
MIN_PYTHON = (3, 12)
PYTHON_VARIABLE = "TRL_GYM_PYTHON"
VENV_NAME = ".gym-venv"
_REMEMBERED = "gym-python"  # file in `data_home`, which holds a path
_SET_VARIABLE = f"set {PYTHON_VARIABLE}=/path/to/bin/python to an interpreter that has nemo-gym."
_REMEDY = f"Run `trl-gym setup-gym`, or {_SET_VARIABLE}"
_REMEDY_VARIABLE = f"Unset {PYTHON_VARIABLE}, or name an interpreter in it that has nemo-gym."

_PROBE_TIMEOUT_S = 60.0  # a cold disk makes even `importlib.metadata` slow
# Finds packages without importing them: nemo_gym itself takes seconds.
_PROBE = """
import importlib.metadata, importlib.util, json, os, sys
spec = importlib.util.find_spec("nemo_gym")
found = {"python": list(sys.version_info[:3]), "version": None, "root": None}
if spec is not None:
    found["root"] = os.path.dirname(os.path.dirname(os.path.abspath(spec.origin)))
    try:
        found["version"] = importlib.metadata.version("nemo-gym")
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class GymInstallation:
    """A usable NeMo Gym."""

    python: Path  # its interpreter, not resolved: the link in a virtual environment selects that environment
    version: str  # version of nemo-gym, e.g. `"0.4.0"`
    root: Path  # the folder that holds `nemo_gym/`, `resources_servers/`, `responses_api_models/`, …


def find_installation(python: str | Path | None = None) -> GymInstallation:
    """Find Gym's interpreter and check what it has.

    Args:
        python: The interpreter. Default: the environment variable `TRL_GYM_PYTHON`, then `.gym-venv/bin/python`
            in the current directory and its parents, then beside the checkout of trl_gym, then the one that
            `trl-gym setup-gym` has made.

    Raises:
        ConfigError: If the interpreter or its nemo-gym does not exist.
        UnsupportedVersionError: If Python or nemo-gym is too old, or a newer nemo-gym lacks what is used of it.
    """
    path, source, remedy = _find_python(python)
    return probe(_executable(path, source, remedy), remedy)


def _find_python(python: str | Path | None) -> tuple[Path, str, str]:
    """Return the interpreter to use, what names it, and the remedy if it cannot be used.

    `trl-gym setup-gym` is the remedy of none that comes before what this command makes.
    """
    if python is not None:
        return Path(python), "The argument `python`", "Name another one, or run `trl-gym setup-gym` and name none."
    if named := os.environ.get(PYTHON_VARIABLE):
        return Path(named), f"The environment variable {PYTHON_VARIABLE}", _REMEDY_VARIABLE
    candidates = default_candidates()
    for candidate in candidates:
        if candidate.is_file():
            remedy = f"Repair or remove {candidate.parents[1]}, or {_SET_VARIABLE}"
            return candidate, "The search for Gym's interpreter", remedy
    if made := remembered():
        return made, f"What `trl-gym setup-gym` has made ({data_home() / _REMEMBERED})", _REMEDY
    paths = ", ".join(map(str, candidates))
    raise ConfigError(
        f"No Python with NeMo Gym was found: {PYTHON_VARIABLE} is not set, `trl-gym setup-gym` has made none, and "
        f"none of these exists: {paths}.",
        _REMEDY,
    )


def data_home() -> Path:
    """Return the folder in which trl-gym keeps what is for all projects of a user."""
    home = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(home) / "trl-gym"


def remembered() -> Path | None:
    """Return the interpreter that `trl-gym setup-gym` has made last, None where it has made none."""
    try:
        text = (data_home() / _REMEMBERED).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return Path(text) if text else None


def remember(python: Path) -> Path:
    """Let `find_installation` find an interpreter, in every folder.

    Args:
        python: The interpreter, as an absolute path.

    Returns:
        The file that says so.

    Raises:
        OSError: It cannot be written.
    """
    path = data_home() / _REMEMBERED
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(f"{python}\n", encoding="utf-8")
    partial.replace(path)
    return path


def default_candidates() -> list[Path]:
    """Return the paths at which an interpreter is looked for when none is named, in order."""
    above = Path(__file__).resolve().parents[2]
    checkout = [] if above.name.endswith("-packages") else [above]
    folders = [Path.cwd(), *Path.cwd().parents, *checkout]
    return [folder / VENV_NAME / "bin" / "python" for folder in dict.fromkeys(folders)]


def _executable(path: Path, source: str, remedy: str) -> Path:
    path = Path(os.path.abspath(path.expanduser()))
    if not path.is_file():
        raise ConfigError(f"{source} names {path}, which does not exist.", remedy)
    if not os.access(path, os.X_OK):
        raise ConfigError(f"{source} names {path}, which is not executable.", remedy)
    return path


def probe(python: Path, remedy: str = _REMEDY) -> GymInstallation:
    """Ask an interpreter for its versions: run it once, without importing anything heavy.

    Args:
        remedy: That of an interpreter which cannot be used.

    Raises:
        ConfigError: If it cannot be run or has no nemo-gym.
        UnsupportedVersionError: See `find_installation`.
    """
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S)
        found = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} cannot be run: {error}.", remedy) from error
    except ValueError as error:
        raise ConfigError(f"{python} is not a working Python interpreter: {done.stderr.strip()}", remedy) from error
    python_version = ".".join(map(str, found["python"]))
    if found["root"] is None:
        raise ConfigError(f"{python} (Python {python_version}) has no nemo-gym installed.", remedy)
    if tuple(found["python"]) < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        raise UnsupportedVersionError(f"{python} is Python {python_version}; NeMo Gym needs {needed}.", remedy)
    version, root = found["version"], Path(found["root"])
    if version is not None and compat.is_newer("nemo-gym", version):
        if (problem := compat.newer_problem("nemo-gym", version, root / "nemo_gym")) is not None:
            raise UnsupportedVersionError(f"{python}: {problem.text}", remedy)
        logger.warning("%s: %s", python, compat.untested("nemo-gym", version).text)
    elif version is None or not compat.is_tested("nemo-gym", version):
        raise UnsupportedVersionError(f"{python} has nemo-gym {version}, but {TESTED_GYM} is needed.", remedy)
    return GymInstallation(python=python, version=version, root=root)
