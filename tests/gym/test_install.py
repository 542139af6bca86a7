"""One readable error, with what was looked for and the remedy, for every way of not having a Gym."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from trl_gym.errors import ConfigError, UnsupportedVersionError
from trl_gym.gym import install as interpreter
from trl_gym.gym.install import find_installation, remember


def fake_python(path: Path, answer: str) -> Path:
    """A program that answers the probe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def gym(version: str | None, python: str = "[3, 12, 1]", root: str = '"/site"') -> str:
    quoted = "null" if version is None else f'"{version}"'
    return f'{{"python": {python}, "version": {quoted}, "root": {root}}}'


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No interpreter in sight: an empty working directory, no variable, a checkout without an environment."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TRL_GYM_PYTHON", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(interpreter, "__file__", str(tmp_path / "checkout" / "trl_gym" / "gym" / "interpreter.py"))
    return tmp_path


def test_argument_beats_variable_beats_folders(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_python(nowhere / "made/bin/python", gym("0.4.1"))
    assert remember(made) == nowhere / "data/trl-gym/gym-python"
    assert find_installation().python == made
    beside = fake_python(nowhere / "checkout/.gym-venv/bin/python", gym("0.4.0"))
    assert find_installation().python == beside
    above = fake_python(nowhere / "a/.gym-venv/bin/python", gym("0.5.1"))
    assert find_installation().python == above
    variable = fake_python(nowhere / "v/python", gym("0.6.0"))
    monkeypatch.setenv("TRL_GYM_PYTHON", str(variable))
    assert find_installation().python == variable
    argument = fake_python(nowhere / "w/python", gym("0.7.0"))
    found = find_installation(argument)
    assert (found.python, found.version, found.root) == (argument, "0.7.0", Path("/site"))


def test_nothing_found_lists_places_and_remedy(nowhere: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_installation()
    text = str(error.value)
    assert str(nowhere / "a/b/.gym-venv/bin/python") in text and str(nowhere / "checkout/.gym-venv") in text
    assert "trl-gym setup-gym" in text and "TRL_GYM_PYTHON=" in text


def test_variable_that_names_nothing_is_not_silently_replaced(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(nowhere / "a/.gym-venv/bin/python", gym("0.5.1"))
    monkeypatch.setenv("TRL_GYM_PYTHON", "/nowhere/python")
    with pytest.raises(
        ConfigError, match=r"TRL_GYM_PYTHON names /nowhere/python, which does not exist\. Unset TRL_GYM_PYTHON"
    ):
        find_installation()


def test_nobody_looks_beside_an_installed_package(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "__file__", str(nowhere / "lib/site-packages/trl_gym/gym/install.py"))
    with pytest.raises(ConfigError) as error:
        find_installation()
    assert "site-packages" not in str(error.value)


def test_one_that_was_made_and_is_gone_is_said_to_be(nowhere: Path) -> None:
    remember(Path("/gone/bin/python"))
    with pytest.raises(ConfigError, match=r"`trl-gym setup-gym` has made .*names /gone/bin/python, which does not"):
        find_installation()


def test_not_executable(nowhere: Path) -> None:
    path = fake_python(nowhere / "python", gym("0.5.1"))
    path.chmod(0o644)
    if os.access(path, os.X_OK):
        pytest.fail("this test cannot run where every file is executable")
    with pytest.raises(ConfigError, match="not executable"):
        find_installation(path)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (gym(None, root="null"), "has no nemo-gym installed"),
        (gym("0.5.0", python="[3, 11, 9]"), r"is Python 3\.11\.9; NeMo Gym needs 3\.12"),
        (gym("0.3.1"), r"nemo-gym 0\.3\.1, but >=0\.4,<0\.8 is needed"),
        (gym("0.8.0"), r"nemo-gym 0\.8\.0 is installed, which is newer .* it lacks what trl-gym uses: nemo_gym"),
        ("no python at all", "not a working Python interpreter"),
    ],
)
def test_unusable_interpreters(nowhere: Path, answer: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        find_installation(fake_python(nowhere / "python", answer))
    assert "trl-gym setup-gym" in str(error.value)
    assert isinstance(error.value, UnsupportedVersionError) == ("Python 3.11" in str(error.value) or "<0.8" in
                                                               str(error.value))  # fmt: skip


def test_the_probe_runs_in_a_real_interpreter() -> None:
    with pytest.raises(ConfigError, match="has no nemo-gym installed"):
        find_installation(sys.executable)
