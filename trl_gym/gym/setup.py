"""Make the virtual environment that NeMo Gym runs in: find a Python, install, import, leave a stamp.

The standard library alone, and any Python from 3.8 on: `trl-gym setup-gym` imports this file, and `scripts/setup.py`
loads it by its path, before anything could import trl_gym.

NeMo Gym needs Python 3.12 and pins packages that conflict with vLLM's. From 0.5 on it asks for Python >= 3.13.14
although it runs on every 3.13 (packaging only): there it is resolved as if for 3.13.14.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

GYM_BY_PYTHON = (("3.12", "0.4.0"), ("3.13", "0.7.0"))  # tested together; the first Python that is found is taken
GYM_EXTRAS = ["httptools"]  # with which Gym's servers parse HTTP; nemo-gym asks for it from 0.7 on
GYM_GIB = 2.0  # disk that the environment takes, and its installation for a while
_FLOOR = "3.13.14"  # what nemo-gym >= 0.5 declares; see above
# It proves that the packages fit together, and compiles the bytecode of what a start imports.
_IMPORTS = (
    "import nemo_gym.rollout_collection, responses_api_agents.simple_agent.app, responses_api_models.vllm_model.app"
)
_STAMP = "trl-gym-setup.json"
_STARTED = "started"  # stands in the stamp while the environment is made
_PROBE_TIMEOUT_S = 30.0
_OFFLINE = ("failed to fetch", "dns error", "connection", "could not connect", "timed out", "name resolution")
_NO_MATCH = ("no matching distribution", "no solution found", "unsatisfiable", "resolutionimpossible")


class SetupError(Exception):
    """Something that set-up needs is missing, or a command of it has failed.

    Args:
        problem: What is wrong: whole sentences.
        remedy: What to do; begins with a verb. To run it again afterwards goes without saying.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy


class Tools:
    """Runs the commands of set-up, with their output in a log, and knows what installs packages.

    Args:
        log: File to append to; its folder is made.
        uv: Path of uv, which is used where there is one; None for `venv` and pip.
        links: Folders and pages with wheels; uv does not read pip's configuration.
    """

    def __init__(self, log: Path, uv: str | None, links: Sequence[str] = ()) -> None:
        self.log, self.uv, self.links = Path(log), uv, tuple(links)

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a command; return its exit code and what it wrote to stdout and stderr."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        whole = {**os.environ, **(env or {})}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=whole)
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n{done.stdout}")
        return done.returncode, done.stdout

    def check(self, command: Sequence[str], what: str, env: Mapping[str, str] | None = None) -> None:
        """Run a command that must succeed.

        Args:
            what: What it does, as in `"installing nemo-gym"`.
            env: Variables that are set for it.

        Raises:
            SetupError: It does not; says why, as far as its output tells.
        """
        code, output = self.run(command, {"UV_PYTHON_DOWNLOADS": "never", **(env or {})})
        if code == 0:
            return
        reason, remedy = _reason(output)
        tail = "\n".join(f"    {line}" for line in output.strip().splitlines()[-8:])
        raise SetupError(f"Set-up stopped while {what}: {reason}.\n{tail}\n  Whole log: {self.log}\n ", remedy)

    def install(self, python: str, packages: Sequence[str], extra: Sequence[str] = ()) -> None:
        """Install packages into the environment of an interpreter. Raises `SetupError`: they cannot be installed."""
        command = [self.uv, "pip", "install", "--python", python] if self.uv else [python, "-m", "pip", "install"]
        for link in self.links:
            command += ["--find-links", link]
        self.check([*command, *extra, *packages], f"installing {' '.join(packages)}")

    def find_python(self, minor: str) -> str | None:
        """Return the path of an interpreter of a minor version (`"3.12"`): on PATH, in pyenv, or among uv's own."""
        pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
        installed = glob.glob(os.path.join(pyenv, "versions", minor + ".*", "bin", "python"))
        newest_first = sorted(installed, key=lambda path: [int(n) for n in re.findall(r"\d+", path)], reverse=True)
        for candidate in [shutil.which("python" + minor), *newest_first, sys.executable, shutil.which("python3")]:
            if candidate and (python_version(candidate) or "").startswith(minor + "."):
                return os.path.realpath(candidate)
        if self.uv:
            code, output = self.run([self.uv, "python", "find", "--no-python-downloads", minor])
            if code == 0 and os.path.exists(output.strip().splitlines()[-1]):
                return output.strip().splitlines()[-1]
        return None

    def choose_python(self, minors: Sequence[str], what: str) -> str:
        """Return the first of these minor versions that is there; where none is, uv may download the first one. Raises
        `SetupError`: there is none."""
        for minor in minors:
            found = self.find_python(minor)
            if found:
                return found
        if self.uv and os.environ.get("UV_PYTHON_DOWNLOADS") != "never":
            self.run([self.uv, "python", "install", minors[0]])
            found = self.find_python(minors[0])
            if found:
                return found
        raise SetupError(
            f"No Python {' or '.join(minors)} was found for {what}: none on PATH (python{minors[0]} and the like), in "
            "pyenv, or among uv's interpreters.",
            f"Install one, for example `uv python install {minors[0]}` (`pip install uv` brings uv), `pyenv install "
            f"{minors[0]}`, or your system's package.",
        )


class Environment:
    """A virtual environment with a stamp that says what is in it, from before there is anything else in it."""

    def __init__(self, path: Path | str, needed_gib: float = GYM_GIB) -> None:
        self.path = os.path.realpath(path)  # a link to a bigger disk stays one
        self.needed_gib = needed_gib
        self.python = os.path.join(self.path, "bin", "python")
        self.stamp = os.path.join(self.path, _STAMP)
        self.aside = self.path + ".before"  # where what is replaced waits until its successor is whole

    def is_current(self, mark: str) -> bool:
        """Tell whether the set-up of this mark has been finished here."""
        return self._stamped() == mark and os.path.exists(self.python)

    def refuse_foreign(self) -> None:
        """Make sure that nothing is in the way but what set-up has made, whole or half, and empty folders. Raises
        `SetupError`: something is: it may be anyone's, and stays as it is."""
        for path in (self.path, self.aside):
            try:
                ours = os.path.isfile(os.path.join(path, _STAMP)) or (os.path.isdir(path) and not os.listdir(path))
            except OSError as error:
                raise self._unwritable(error) from error
            if os.path.lexists(path) and not ours:
                raise SetupError(
                    f"{path} exists and was not made by set-up (or by an earlier version, which did not finish): "
                    "it is left alone.",
                    "Choose another folder, or move this one away.",
                )

    @contextlib.contextmanager
    def made(self, interpreter: str, tools: Tools, fresh: bool = False) -> Iterator[None]:
        """Make the folder, for a block that installs and calls `finish`; what it replaces comes back if that fails.

        One with an interpreter of the same version stays, unless it is to be `fresh`. A virtual environment works at
        its own path only: the old one is renamed while its successor is made.

        Raises:
            SetupError: The disk is too full, the folder holds something else, or it cannot be made.
        """
        try:
            self.refuse_foreign()
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            keep = not fresh and python_version(self.python) == python_version(interpreter)
            if not keep:
                self._clear()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if not keep:
                self._check_disk()
            self._start()
            if not keep:
                self._make(interpreter, tools)
            yield
        except BaseException as error:
            if os.path.isdir(self.aside):
                _remove(self.path)
                os.rename(self.aside, self.path)
                if isinstance(error, SetupError):
                    error.problem += f" {self.path} is what it was before.\n "
            raise
        _remove(self.aside)

    def problem(self, imports: str, tools: Tools) -> str | None:
        """Import modules in the environment; return the last line of the error, None where all is well."""
        code, output = tools.run([self.python, "-W", "ignore", "-c", imports], {"PYTHONDONTWRITEBYTECODE": ""})
        return None if code == 0 else (output.strip().splitlines() or [f"exit code {code}"])[-1]

    def finish(self, mark: str, imports: str, tools: Tools) -> None:
        """Import what was installed, then write the stamp. Raises `SetupError`: it cannot be imported."""
        command = [self.python, "-W", "ignore", "-c", imports]
        tools.check(command, f"importing what was installed into {self.path}", {"PYTHONDONTWRITEBYTECODE": ""})
        self._write_stamp(mark)

    def _clear(self) -> None:
        """Move what is there aside. What is half made is removed, and what it was to replace still waits."""
        if self._stamped() == _STARTED:
            _remove(self.path)
        elif os.path.isdir(self.path) and os.listdir(self.path):
            _remove(self.aside)  # left by one that was killed after it had finished
            os.rename(self.path, self.aside)

    def _check_disk(self) -> None:
        free = shutil.disk_usage(os.path.dirname(self.path)).free / 2**30
        if free < self.needed_gib:
            raise SetupError(
                f"{self.path} needs about {self.needed_gib:g} GiB, and its disk has {free:.1f} GiB free.",
                "Free some space, or choose a folder on a bigger disk.",
            )

    def _start(self) -> None:
        """Mark the folder as half made: from now on set-up may remove it."""
        try:
            os.makedirs(self.path, exist_ok=True)
            self._write_stamp(_STARTED)
        except OSError as error:
            raise self._unwritable(error) from error

    def _make(self, interpreter: str, tools: Tools) -> None:
        command = [interpreter, "-m", "venv", self.path]
        if tools.uv and os.path.exists(tools.uv):  # one that the old environment held is aside
            command = [tools.uv, "venv", "--python", interpreter, self.path, "--allow-existing"]  # with a stamp in it
        tools.check(command, f"creating {self.path}")

    def _unwritable(self, error: OSError) -> SetupError:
        return SetupError(
            f"{self.path} cannot be written to: {error.strerror or error}.",
            "Make it writable, or choose another folder.",
        )

    def _write_stamp(self, mark: str) -> None:
        with open(self.stamp, "w") as stamp:
            json.dump({"fingerprint": mark}, stamp)

    def _stamped(self) -> str | None:
        """Return the mark in the stamp; None where there is none."""
        try:
            with open(self.stamp) as stamp:
                return str(json.load(stamp)["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


class GymEnvironment(Environment):
    """That of NeMo Gym.

    Args:
        packages: What is installed beside nemo-gym.
    """

    def __init__(self, path: Path | str, packages: Sequence[str] = ()) -> None:
        super().__init__(path)
        self.packages = tuple(packages)

    def mark(self, gym: str) -> str:
        """Identify what `set_up` installs."""
        return hashlib.sha256(repr((gym, GYM_EXTRAS, self.packages, _IMPORTS)).encode()).hexdigest()

    def set_up(self, interpreter: str, gym: str, tools: Tools, fresh: bool = False) -> None:
        """Make the environment, install nemo-gym and import it; a stamp at the end says that it is whole. Raises
        `SetupError`: a step of it fails."""
        with self.made(interpreter, tools, fresh):
            extra = []
            version = python_version(self.python) or ""
            if version.startswith("3.13.") and _numbers(version) < _numbers(_FLOOR):
                extra = ["--python-version", _FLOOR] if tools.uv else ["--ignore-requires-python"]
            tools.install(self.python, [f"nemo-gym=={gym}", *GYM_EXTRAS, *self.packages], extra)
            self.finish(self.mark(gym), _IMPORTS, tools)

    def why_not_usable(self, gym: str, tools: Tools) -> str | None:
        """Say why this environment has to be made again; None where nothing has to be done."""
        if not os.path.exists(self.path):
            return "not there yet"
        if python_version(self.python) is None:
            return f"{self.python} is missing or does not run"
        if not self.is_current(self.mark(gym)):
            return "half made, or made for other versions"
        return self.problem(_IMPORTS, tools)


def tested_gym(version: str) -> str:
    """Return the version of nemo-gym that goes with a version of Python (`"3.12.1"`, or `"3.12"`). Raises
    `SetupError`: none does."""
    for minor, gym in GYM_BY_PYTHON:
        if f"{version}.".startswith(f"{minor}."):
            return gym
    known = " and ".join(f"{minor} (nemo-gym {gym})" for minor, gym in GYM_BY_PYTHON)
    raise SetupError(f"NeMo Gym is not tested with Python {version}, but with {known}.", "Choose one of these.")


def python_version(path: str) -> str | None:
    """Return `"3.12.1"` when `path` is a working interpreter (a pyenv shim may exist and refuse), else None."""
    code = "import sys, venv; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        done = subprocess.run(
            [path, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=_PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_links() -> list[str]:
    """Return the folders and pages that pip was told to look into."""
    text = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if not text:
        command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        text = done.stdout if done.returncode == 0 else ""
    return [part for part in re.split(r"[\s,]+", text.strip()) if os.path.isdir(part) or "://" in part]


def _remove(folder: str) -> None:
    """Remove a folder of ours, if it is there: the stamp last, so that the rest of it is ours still."""
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _STAMP:
            os.remove(entry.path)
    shutil.rmtree(folder)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _reason(output: str) -> tuple[str, str]:
    """Return why a command has failed, as far as its output says, and the remedy."""
    lowered = output.lower()
    if "no space left" in lowered:
        return "the disk is full", "Free some space."
    if "ensurepip" in lowered:
        return "this Python cannot make environments", "Install uv (`pip install uv`), or your system's python3-venv."
    if "permission denied" in lowered or "read-only file system" in lowered:
        return "a folder is not writable", "Make it writable, or choose another one."
    if any(sign in lowered for sign in _OFFLINE):
        return (
            "a package index could not be reached",
            "Check the network or proxy (HTTPS_PROXY), or name a folder of wheels in PIP_FIND_LINKS.",
        )
    if any(sign in lowered for sign in _NO_MATCH):
        return "the packages do not fit together on this Python", "Read the conflict in the log."
    return "the command failed", "Read the log."
