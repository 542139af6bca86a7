"""The wheel and the sdist hold what they must, and the wheel's command works without torch, vLLM and TRL."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import trl_gym

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "vllm", "transformers", "trl", "datasets", "numpy")


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [built] = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    """Package data too: the viewer's assets and the files that `trl-gym new-environment` copies."""
    package = ROOT / "trl_gym"
    wanted = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert "trl_gym/py.typed" in packed
    assert wanted - packed == set()
    assert {name for name in packed if not name.startswith(("trl_gym/", "trl_gym-"))} == set()


def test_the_recipes_are_in_the_wheel(wheel: Path) -> None:
    files = [path for path in (ROOT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("trl_gym/shipped/")}
    assert packed == {f"trl_gym/shipped/{path.relative_to(ROOT)}" for path in files}


def test_the_wheel_declares_what_the_project_does(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        info = f"trl_gym-{trl_gym.__version__}.dist-info"
        metadata = email.message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["Version"] == trl_gym.__version__
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert "trl-gym = trl_gym.cli:main" in entry_points
    assert "trl_gym = trl_gym.policy_server.engine.plugin:register" in entry_points


def test_the_command_of_the_unpacked_wheel_loads_nothing_heavy(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys, trl_gym.cli\n"
        "try:\n    trl_gym.cli.main(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        f"print(trl_gym.__file__, *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.split() == [str(tmp_path / "trl_gym" / "__init__.py")]
    assert all(command in done.stdout for command in ("serve", "gateway", "rollout", "eval"))


def test_the_sdist_can_be_built_from_and_holds_no_environment(tmp_path: Path) -> None:
    sdist = build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "trl_gym/py.typed", "tests/test_packaging.py"} <= names
    assert {"recipes/quickstart.yaml", "recipes/small_policy/model.safetensors"} <= names
    assert not [name for name in names if name.startswith((".venv", ".gym-venv", ".setup", "runs", "site"))]
    assert sdist.stat().st_size < 5e6  # bytes; a forgotten build folder would be more
