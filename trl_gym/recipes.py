"""Find the recipes: the folder `recipes/` of a checkout, which is also a part of every installed trl-gym.

Options name them as `recipes/quickstart.yaml`, wherever trl-gym is and whatever the working directory: `find` looks
there first, so that a recipe that was copied and changed wins over the one that was installed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from trl_gym.errors import ConfigError
from trl_gym.given import home_path

FOLDER = "recipes"
SMALL_POLICY = f"{FOLDER}/small_policy"  # the model of the quickstart
_ENVIRONMENTS = "environments"
_SUFFIXES = (".yaml", ".py", ".sh", ".sbatch")  # of what is listed and copied by name
# Folders that are copied whole, with what is mentioned of them.
_WHOLE = re.compile(rf"{FOLDER}/(?:{_ENVIRONMENTS}/[^/.]+|small_policy)(?=/|$)")
_MENTIONED = re.compile(rf"(?<![\w/.-]){FOLDER}/[\w./-]*\w")


def root() -> Path:
    """Return the folder that holds `recipes/`: one inside the installed package, else the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "shipped"  # where the wheel has it; see pyproject.toml
    return installed if installed.is_dir() else package.parent


def find(path: str) -> str:
    """Return where a path that an option names is.

    Args:
        path: Any path, or the name of a model. Relative paths below `recipes/` are looked up in the working
            directory, then in the recipes that came with trl-gym.

    Returns:
        The path as it was given, with `~` spelled out, unless only those recipes have it.
    """
    path = home_path(path)
    parts = Path(path).parts
    if parts[:1] != (FOLDER,) or ".." in parts or os.path.exists(path):
        return path
    shipped = root() / path
    return str(shipped) if shipped.exists() else path


def names() -> list[str]:
    """Return the names of all recipes: paths below `recipes/`, those of training runs (YAML) without their ending."""
    base = root() / FOLDER
    files = [path for pattern in ("*", "*/*") for path in base.glob(pattern) if path.suffix in _SUFFIXES]
    training = sorted(path.stem for path in files if path.parent == base and path.suffix == ".yaml")
    others = sorted(str(path.relative_to(base)) for path in files if path.parent != base or path.suffix != ".yaml")
    return [*training, *others]


def recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: As `names` gives it, or with `recipes/` before it and its ending behind it.

    Raises:
        ConfigError: There is none of this name.
    """
    base = root() / FOLDER
    for candidate in (name.removeprefix(f"{FOLDER}/"), f"{name.removeprefix(f'{FOLDER}/')}.yaml"):
        path = base / candidate
        if path.suffix in _SUFFIXES and ".." not in path.parts and path.is_file():
            return path
    raise ConfigError(f"There is no recipe {name!r}.", choose_one())


def choose_one() -> str:
    """Return the remedy for a name that is missing or wrong."""
    return f"Choose one of {', '.join(names())}."


def summary(name: str) -> str:
    """Return the first clause of a recipe's comment or docstring, without its label."""
    lines = recipe(name).read_text(encoding="utf-8").splitlines()
    text = [
        line.strip().lstrip("#").strip(' "') for line in lines if not line.startswith(("#!", "# Copyright", "# SPDX"))
    ]
    paragraph = " ".join(text[: text.index("")] if "" in text else text)
    return re.split(r"(?<=[\w)`])[.;:](?: |$)", re.sub(r"^Trains\s+", "", paragraph))[0]


def files_of(name: str) -> list[Path]:
    """Return the files that a recipe needs to run from a folder of its own, as paths below `root()`, sorted.

    They are the recipe and what is mentioned of `recipes/`, in options as well as in the commands of comments, by it
    and by the files so found; but scripts so found bring nothing else. Environments and models are whole folders.
    """
    own, base = recipe(name), root()
    found: set[Path] = set()
    queue = [own]
    while queue:
        file = queue.pop()
        found.add(file)
        if file.suffix not in _SUFFIXES or (file.suffix == ".py" and file != own):
            continue
        for mentioned in _MENTIONED.findall(file.read_text(encoding="utf-8")):
            whole = _WHOLE.match(mentioned)
            path = base / (whole.group() if whole else mentioned)
            if path.is_dir() and whole:
                found |= {
                    inside for inside in path.rglob("*") if inside.is_file() and "__pycache__" not in inside.parts
                }
            elif path.is_file() and path not in found:
                queue.append(path)
    return sorted(path.relative_to(base) for path in found)


def copy(name: str, to: str | Path) -> list[Path]:
    """Copy a recipe and what it needs below a folder, so that its commands work from there.

    Args:
        to: Folder, made if missing; the files come to lie in `to/recipes/`.

    Returns:
        The new files.

    Raises:
        ConfigError: There is no such recipe, one of the files exists and differs (nothing is written then), or the
            folder cannot be written to.
    """
    to, base = Path(home_path(to)), root()
    wanted = {to / path: base / path for path in files_of(name)}
    in_the_way = [path for path, source in wanted.items() if path.exists() and not _same(path, source)]
    if in_the_way:
        listed = ", ".join(map(str, in_the_way[:5]))
        raise ConfigError(
            f"Nothing was copied, since other files are in the way: {listed}.",
            "Choose another folder with `--to`, or move them away.",
        )
    new = [path for path in wanted if not path.exists()]
    try:
        for path in new:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(wanted[path], path)  # without the modes of a read-only installation
    except OSError as error:
        raise ConfigError(
            f"`--to` {to} cannot be written to: {error.strerror or error}.", "Choose another folder."
        ) from error
    return new


def _same(path: Path, source: Path) -> bool:
    return path.is_file() and path.read_bytes() == source.read_bytes()
