"""`trl-gym setup-gym` with real virtual environments and a uv that installs a NeMo Gym of a few lines."""

from __future__ import annotations

import ast
import os
import shutil
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_gym.cli import main
from trl_gym.commands import setup_gym
from trl_gym.errors import ConfigError
from trl_gym.gym import install, setup
from trl_gym.gym.install import TESTED_GYM, find_installation
from trl_gym.gym.setup import Environment, SetupError, Tools

ROOT = Path(__file__).resolve().parents[2]
# Takes `venv --python INTERPRETER FOLDER`, and `pip install --python INTERPRETER … nemo-gym==VERSION …`.
UV = """#!/bin/sh
echo "$@" >> "$0.calls"
[ -e "$0.fails" ] && [ "$(cat "$0.fails_at" 2>/dev/null || echo "$1")" = "$1" ] && { cat "$0.fails"; exit 1; }
if [ "$1" = venv ]; then exec "$3" -m venv --without-pip "$4"; fi
site=$("$4" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
for word in "$@"; do case $word in nemo-gym==*) version=${word#nemo-gym==};; esac; done
for file in nemo_gym/rollout_collection responses_api_agents/simple_agent/app responses_api_models/vllm_model/app; do
    mkdir -p "$site/$(dirname $file)"; touch "$site/$file.py"
done
touch "$site/nemo_gym/__init__.py"
info="$site/nemo_gym-$version.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\\nName: nemo-gym\\nVersion: %s\\n' "$version" > "$info/METADATA"
"""


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter that NeMo Gym is tested with: the one of this checkout's."""
    return str(find_installation().python)


@pytest.fixture
def uv(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No other one on PATH, an empty home, and no NeMo Gym that would be found otherwise."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "uv").write_text(UV)
    (folder / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TRL_GYM_PYTHON", raising=False)
    monkeypatch.setattr(install, "__file__", str(tmp_path / "elsewhere" / "trl_gym" / "gym" / "install.py"))
    monkeypatch.chdir(tmp_path)
    return folder / "uv"


def calls(uv: Path) -> int:
    path = uv.with_name("uv.calls")
    count = len(path.read_text().splitlines()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


def test_it_is_made_remembered_checked_and_repaired(
    uv: Path, python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "data/trl-gym/gym-env"
    assert main(["setup-gym", "--python", python]) == 0
    told = capsys.readouterr().out
    assert "installing nemo-gym" in told and "is ready" in told and "next: trl-gym quickstart" in told
    found = find_installation()
    assert found.python == made / "bin/python" and found.root.is_relative_to(made)
    assert found.version == setup.tested_gym(str(setup.python_version(python)))
    assert calls(uv) == 2

    assert main(["setup-gym"]) == 0  # whole: nothing is installed
    assert "is whole" in capsys.readouterr().out and calls(uv) == 0

    [module] = made.glob("lib/*/site-packages/nemo_gym/rollout_collection.py")
    breakages = {
        "ModuleNotFoundError: No module named 'nemo_gym.rollout_collection'": module.unlink,
        "half made": lambda: (made / "trl-gym-setup.json").write_text('{"fingerprint": "started"}'),
        "is missing or does not run": (made / "bin/python").unlink,
    }
    for said, breakage in breakages.items():
        breakage()
        assert main(["setup-gym", "--python", python]) == 0
        told = capsys.readouterr().out
        assert said in told and "has to be made again" in told and "is ready" in told
        assert calls(uv) == 2 and module.is_file() and find_installation().python == made / "bin/python"

    shutil.rmtree(made)
    with pytest.raises(ConfigError, match=r"which does not exist\. Run `trl-gym setup-gym`"):
        find_installation()


def test_another_folder_and_one_that_comes_first(
    uv: Path, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["setup-gym", "--python", python, "--dir", "mine"]) == 0
    assert find_installation().python == tmp_path / "mine/bin/python"
    monkeypatch.setenv("TRL_GYM_PYTHON", python)
    capsys.readouterr()
    assert main(["setup-gym", "--python", python, "--dir", "mine"]) == 0
    assert f"note: in this folder {python} comes first" in capsys.readouterr().out

    monkeypatch.setenv("TRL_GYM_PYTHON", "/nope")  # what was made is whole, and cannot be the remedy
    assert main(["setup-gym", "--python", python, "--dir", "mine"]) == 1
    told = capsys.readouterr()
    assert "is whole" in told.out and "It is found" not in told.out
    assert f"comes before what was made ({tmp_path}/mine/bin/python): The environment variable TRL_GYM" in told.err
    assert "which does not exist. Unset TRL_GYM_PYTHON, or name" in told.err and "`trl-gym setup" not in told.err
    assert main(["setup-gym", "--print-python"]) == 1
    monkeypatch.delenv("TRL_GYM_PYTHON")
    capsys.readouterr()
    assert main(["setup-gym", "--print-python"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/mine/bin/python\n"
    (tmp_path / ".gym-venv/bin").mkdir(parents=True)
    (tmp_path / ".gym-venv/bin/python").symlink_to("/bin/sh")
    assert main(["setup-gym", "--python", python, "--dir", "mine"]) == 1
    assert f"Repair or remove {tmp_path}/.gym-venv, or set TRL_GYM_PYTHON" in capsys.readouterr().err


def test_an_upgrade_that_fails_leaves_what_worked(
    uv: Path, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "data/trl-gym/gym-env"
    assert main(["setup-gym", "--python", python]) == 0
    works = find_installation()
    (made / "trl-gym-setup.json").write_text('{"fingerprint": "of an earlier version"}')
    (made / "old").touch()
    uv.with_name("uv.fails").write_text("error: Failed to fetch: `https://…`")
    for fails_at in ("venv", "pip"):
        uv.with_name("uv.fails_at").write_text(fails_at)
        assert main(["setup-gym", "--python", python]) == 1
        assert f"{made} is what it was before.\n  Check the network" in capsys.readouterr().err
        assert find_installation() == works and (made / "old").exists()

    tools = Tools(tmp_path / "log", str(uv))
    with pytest.raises(KeyboardInterrupt), Environment(made).made(python, tools, True):
        assert (made / "bin/python").exists() and not (made / "old").exists()
        raise KeyboardInterrupt
    assert find_installation() == works and (made / "old").exists()

    made.rename(tmp_path / "data/trl-gym/gym-env.before")  # one was killed, and the next fails
    made.mkdir()
    (made / "trl-gym-setup.json").write_text('{"fingerprint": "started"}')
    assert main(["setup-gym", "--python", python]) == 1
    assert find_installation() == works and (made / "old").exists()

    uv.with_name("uv.fails").unlink()
    assert main(["setup-gym", "--python", python]) == 0
    assert find_installation() == works and not (made / "old").exists()
    assert {path.name for path in made.parent.iterdir()} == {"gym-env", "gym-python", "setup-gym.log"}


def test_folders_with_other_things_are_left_alone(
    uv: Path, python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    (tmp_path / "file").touch()
    venv.create(tmp_path / "own")
    for name in ("bin", "lib", "include"):
        (tmp_path / "parts" / name).mkdir(parents=True)
    (tmp_path / "trainer/bin").mkdir(parents=True)  # as that of a checkout
    for name in ("bin/trl-gym", "trl-gym-setup.json"):
        (tmp_path / "trainer" / name).touch()
    before = sorted(tmp_path.rglob("*"))
    for name in ("photos", "file", "own", "parts"):
        assert main(["setup-gym", "--python", python, "--dir", name]) == 1
        told = capsys.readouterr().err
        assert f"{name} exists and was not made by set-up" in told and "Choose another folder, or move" in told
    assert main(["setup-gym", "--python", python, "--dir", "trainer"]) == 1
    assert "trainer is an environment that trl-gym runs in. Choose another folder" in capsys.readouterr().err
    with pytest.raises(SetupError, match="is left alone"), Environment(tmp_path / "own").made(python, Tools(uv, None)):
        pytest.fail("a checkout's .venv of the same Python was taken")
    assert sorted(path for path in tmp_path.rglob("*") if "data" not in path.parts) == before and calls(uv) == 0
    assert main(["setup-gym", "--python", python, "--dir", "file/below"]) == 1
    assert "cannot be written to: File exists. Make it writable" in capsys.readouterr().err
    assert not (tmp_path / "data/trl-gym/gym-python").exists()  # nothing to remember


def test_a_home_that_cannot_be_written_to(
    uv: Path, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for home, said in (
        (str(tmp_path / "file"), "Set XDG_DATA_HOME to another folder"),
        ("~x", "Set HOME or XDG_DATA"),
    ):
        monkeypatch.setenv("XDG_DATA_HOME", home)
        assert main(["setup-gym", "--python", python, "--dir", "mine"]) == 1
        assert said in capsys.readouterr().err


def test_a_full_disk_is_said_before_anything_is_made(
    uv: Path, python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    assert main(["setup-gym", "--python", python]) == 1
    assert "needs about 2 GiB, and its disk has 0.5 GiB free. Free some space" in capsys.readouterr().err
    assert calls(uv) == 0


@pytest.mark.parametrize(
    ("output", "reason", "remedy"),
    [
        ("error: Failed to fetch: `https://…`\n  dns error: failed to lookup", "could not be reached", "HTTPS_PROXY"),
        ("Could not fetch URL: Max retries exceeded … NewConnectionError", "could not be reached", "PIP_FIND_LINKS"),
        ("OSError: [Errno 28] No space left on device", "the disk is full", "Free some space."),
        ("error: failed to create directory: Permission denied (os error 13)", "not writable", "choose another"),
        ("The virtual environment was not created because ensurepip is not available", "cannot make", "python3-venv"),
        ("  × No solution found when resolving dependencies", "do not fit together", "the conflict in the log"),
        ("Segmentation fault", "the command failed", "Read the log"),
    ],
)
def test_a_command_that_fails_says_why(
    uv: Path, python: str, output: str, reason: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uv.with_name("uv.fails").write_text(output)
    assert main(["setup-gym", "--python", python]) == 1
    told = capsys.readouterr().err
    assert "Set-up stopped while creating" in told and reason in told and remedy in told
    assert output.splitlines()[-1] in told and "Then run `trl-gym setup-gym` again." in told


def test_a_python_on_path_is_found_and_one_that_does_not_fit_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = Tools(tmp_path / "log", None)
    with pytest.raises(
        SetupError, match=r"is not tested with Python 3\.14, but with 3\.12 \(nemo-gym 0\.4\.0\) and 3\.13"
    ):
        setup_gym.choose("3.14", tools)
    with pytest.raises(SetupError, match="`--python` /nowhere/python does not run"):
        setup_gym.choose("/nowhere/python", tools)
    name = next(Path(sys.executable).parent.glob("python3.*")).name
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert setup_gym.choose(name, tools) == str(Path(sys.executable).with_name(name))
    with pytest.raises(SetupError, match=r"`--python` python3\.99 does not run"):
        setup_gym.choose("python3.99", tools)
    with pytest.raises(SetupError, match=r"No Python 3\.99 was found for NeMo Gym") as error:
        tools.choose_python(["3.99"], "NeMo Gym")
    assert "uv python install 3.99" in error.value.remedy


def test_the_versions_that_are_installed_are_supported() -> None:
    from packaging.specifiers import SpecifierSet

    assert all(SpecifierSet(TESTED_GYM).contains(gym) for _, gym in setup.GYM_BY_PYTHON)


def test_old_interpreters_can_read_what_sets_a_checkout_up() -> None:
    for path in (ROOT / "scripts" / "setup.py", ROOT / "trl_gym" / "gym" / "setup.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(str(module).startswith("trl_gym") for module in modules)


def test_no_message_tells_those_without_a_checkout_to_run_make() -> None:
    sources = (ROOT / "trl_gym").rglob("*.py")
    assert [str(path.relative_to(ROOT)) for path in sources if "`make " in path.read_text(encoding="utf-8")] == []
