"""The wheel and the sdist hold what they must, and what the documentation says about installing works."""

from __future__ import annotations

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import partial
from pathlib import Path

import pytest

import trl_gym
from trl_gym import recipes
from trl_gym.gym.setup import find_links

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


def install_blocks() -> list[str]:
    """What the documentation tells people to type: pip with a GPU, without one, without vLLM; then uv the same."""
    page = (ROOT / "docs" / "getting_started.md").read_text()
    section = page[page.index("## Install") : page.index("### In a checkout")]
    return [block for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) if "pip" in block]


def test_pip_and_uv_install_the_same() -> None:
    pip_gpu, pip_cpu, pip_small, uv_gpu, uv_cpu, uv_small = install_blocks()
    index = " --extra-index-url https://download.pytorch.org/whl/cpu"
    as_uv = {"pip install": "uv pip install", "pip uninstall -y": "uv pip uninstall", index: " --torch-backend cpu"}
    for ours, theirs in as_uv.items():
        pip_gpu, pip_cpu, pip_small = (block.replace(ours, theirs) for block in (pip_gpu, pip_cpu, pip_small))
    assert (pip_gpu, pip_cpu, pip_small) == (uv_gpu, uv_cpu, uv_small)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment elsewhere, after the commands of the documentation: uv without a GPU, and the wheel for the name.

    On a machine that has torch's CPU wheel in a folder, that folder stands for PyTorch's index.
    """
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))  # set-up has brought one
    python = tmp_path_factory.mktemp("elsewhere") / ".venv" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, python.parents[1]], check=True)
    links = [link for link in find_links() if list(Path(link).glob("torch-*+cpu-*.whl"))]
    for line in install_blocks()[-2].splitlines():
        words = shlex.split(line.replace("trl-gym[", f"{wheel}["))
        if links and "--torch-backend" in words:
            words[words.index("--torch-backend") :] = [word for link in links for word in ("--find-links", link)]
        command = [uv, *words[1:], "--quiet", "--python", str(python)]
        if subprocess.run(command, cwd=python.parents[2]).returncode:
            subprocess.run([*command, "--offline"], cwd=python.parents[2], check=True)  # all of it is in uv's cache
    return python


def test_what_was_installed_works(installed: Path) -> None:
    """Its own copy runs, the commands load nothing heavy, and the trainer can be imported."""
    code = (
        "import sys, trl_gym.cli\n"
        "try:\n    trl_gym.cli.main(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "assert trl_gym.cli.main(['recipes', 'list']) == 0\n"
        f"print(trl_gym.__file__, *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        "import trl_gym.train, trl_gym.trainer, matplotlib\n"
    )
    folder = installed.parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = partial(subprocess.run, cwd=folder, env=environment, capture_output=True, text=True)
    done = run([installed, "-W", "ignore", "-c", code])
    assert done.returncode == 0, done.stderr
    [first, *_] = done.stderr.splitlines()
    [package] = installed.parents[1].glob("lib/*/site-packages/trl_gym/__init__.py")
    assert first.split() == [str(package)]
    commands = ("setup-gym", "quickstart", "train", "recipes", "serve", "gateway", "rollout", "eval", "doctor", "view")
    assert all(name in done.stdout for name in (*commands, *recipes.names()))
    copied = run([installed.with_name("trl-gym"), "recipes", "copy", "quickstart"], check=True).stdout.splitlines()
    assert (folder / "recipes/small_policy/model.safetensors").is_file() and "recipes/quickstart.yaml" in copied


def test_the_sdist_can_be_built_from_and_holds_no_environment(tmp_path: Path) -> None:
    sdist = build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "trl_gym/py.typed", "tests/test_packaging.py"} <= names
    assert {"recipes/quickstart.yaml", "recipes/small_policy/model.safetensors"} <= names
    assert not [name for name in names if name.startswith((".venv", ".gym-venv", ".setup", "runs", "site"))]
    assert sdist.stat().st_size < 5e6  # bytes; a forgotten build folder would be more
