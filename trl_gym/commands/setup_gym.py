"""`trl-gym setup-gym`: make NeMo Gym's interpreter, or check and repair the one that was made."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from trl_gym.errors import ConfigError, TrlGymError
from trl_gym.gym import setup
from trl_gym.gym.install import PYTHON_VARIABLE, data_home, find_installation, remember
from trl_gym.gym.setup import GymEnvironment, SetupError, Tools, python_version

DESCRIPTION = (
    "Make the interpreter that NeMo Gym runs in, and remember it for all projects of this user: NeMo Gym needs Python "
    "3.12 or 3.13 and pins packages that conflict with vLLM's. Uses uv where there is one, else venv and pip. Takes "
    "minutes and about 1.2 GB, once. Run again, it checks what is there, and makes it again when it is broken."
)
_MINORS = [minor for minor, _ in setup.GYM_BY_PYTHON]
_AGAIN = "Then run `trl-gym setup-gym` again."

Busy = Callable[[str], AbstractContextManager[object]]  # shows what is done while it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `trl-gym setup-gym`."""
    parser.add_argument(
        "--python",
        metavar="PYTHON",
        help=f"what to make it of: a path, a name on PATH, or a version ({' or '.join(_MINORS)}; default: the first "
        "that is there)",
    )
    parser.add_argument(
        "--dir",
        metavar="DIR",
        help="the environment's folder (default: $XDG_DATA_HOME/trl-gym/gym-env, in ~/.local/share)",
    )
    parser.add_argument(
        "--print-python",
        action="store_true",
        help="print the path of the interpreter that is used in this folder, and make nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Make it or check it; return exit status 0. Raises `ConfigError`: there is no fitting Python, no network, no
    space, the folder cannot be written to, or what was made is not used, since something that does not work comes
    before it."""
    from rich.console import Console

    if options.print_python:
        _say(str(find_installation().python))
        return 0
    home = data_home()
    if not home.is_absolute():
        raise ConfigError(
            f"There is no folder for what trl-gym keeps: {home} is relative.", "Set HOME or XDG_DATA_HOME."
        )
    path = Path(os.path.abspath(os.path.expanduser(options.dir))) if options.dir else home / "gym-env"
    tools = Tools(home / "setup-gym.log", find_uv(), setup.find_links())
    started = time.monotonic()
    try:
        said = set_up(GymEnvironment(path), options.python, tools, Console(stderr=True).status)
        place = remember(path / "bin" / "python")
    except SetupError as error:
        raise ConfigError(error.problem, f"{error.remedy} {_AGAIN}") from error
    except OSError as error:  # the log, or what is remembered
        raise ConfigError(
            f"{home} cannot be written to: {error.strerror or error}.",
            f"Set XDG_DATA_HOME to another folder. {_AGAIN}",
        ) from error
    _say(f"{said} ({time.monotonic() - started:.0f} s)")
    _say_what_is_used(path / "bin" / "python", place)
    _say("next: trl-gym quickstart")
    return 0


def _say_what_is_used(made: Path, place: Path) -> None:
    try:
        found = find_installation().python
    except TrlGymError as error:
        raise ConfigError(
            f"In this folder something else comes before what was made ({made}): {error.problem}", error.remedy
        ) from error
    if found == made:
        _say(f"It is found from any folder from now on: see {place}")
    else:
        _say(f"note: in this folder {found} comes first ({PYTHON_VARIABLE}, or a folder .gym-venv)")


def set_up(environment: GymEnvironment, python: str | None, tools: Tools, busy: Busy) -> str:
    """Make an environment, unless it is whole.

    Args:
        python: As `--python`.

    Returns:
        A sentence about what there is now.

    Raises:
        SetupError: See `GymEnvironment.set_up`; or the folder is an environment of trl-gym's own.
    """
    environment.refuse_foreign()
    if os.path.exists(os.path.join(environment.path, "bin", "trl-gym")):  # a checkout's .venv has a stamp too
        raise SetupError(f"{environment.path} is an environment that trl-gym runs in.", "Choose another folder.")
    installed = python_version(environment.python) or ""
    interpreter = choose(python, tools)
    version = python_version(interpreter) or ""
    if python is None and installed.startswith(tuple(f"{minor}." for minor in _MINORS)):
        version = installed  # whichever it was made of
    gym = setup.tested_gym(version)
    if os.path.exists(environment.path):
        with busy(f"checking {environment.path}"):
            problem = environment.why_not_usable(gym, tools)
        if problem is None and installed != version:
            problem = f"Python {version} is asked for"
        if problem is None:
            return f"nemo-gym {gym} on Python {version} is whole, in {environment.path}"
        _say(f"{environment.path} has to be made again: {problem}")
    _say(f"NeMo Gym gets an interpreter of its own: Python {version} ({interpreter})")
    _say(f"  {environment.path}, made with {'uv' if tools.uv else 'venv and pip'}; every command is in {tools.log}")
    takes = (
        "a minute or two"
        if tools.uv
        else "five minutes or more; with uv, which `pip install uv` brings, a minute or two"
    )
    _say(f"  installing nemo-gym {gym} and what it needs: about 1 GB, {takes}")
    with busy("installing"):
        environment.set_up(interpreter, gym, tools, fresh=True)
    return f"nemo-gym {gym} on Python {version} is ready"


def choose(python: str | None, tools: Tools) -> str:
    """Return the interpreter that `--python` means, or the first that fits. Raises `SetupError`: there is none, or it
    does not work."""
    if python is None:
        return tools.choose_python(_MINORS, "NeMo Gym")
    if os.sep in python or not python[:1].isdigit():
        path = shutil.which(os.path.expanduser(python))
        if path is None or python_version(path) is None:
            raise SetupError(
                f"`--python` {python} does not run, or lacks the module venv.", "Name a working interpreter."
            )
        return os.path.abspath(path)
    setup.tested_gym(python)
    return tools.choose_python([".".join(python.split(".")[:2])], "`--python`")


def find_uv() -> str | None:
    """Return the path of uv: on PATH, or beside the interpreter that runs this, where `pip install uv` puts it."""
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if os.access(beside, os.X_OK) else None)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
