"""Recipes are found wherever trl-gym is, and a copy of one has all that it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import RECIPES
from trl_gym import recipes
from trl_gym.cli import main
from trl_gym.errors import ConfigError
from trl_gym.train import ScriptArguments, with_config_found

TRAINING = [name for name in recipes.names() if not Path(name).suffix]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as the wheel has it, elsewhere, with one recipe."""
    package = here / "site-packages" / "trl_gym"
    (package / "shipped" / "recipes").mkdir(parents=True)
    (package / "shipped" / "recipes" / "quickstart.yaml").write_text("# Trains   a little: nothing.\n")
    (here / "site-packages" / "recipes").mkdir()  # another project's
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    return package / "shipped"


def test_a_checkout_and_a_wheel_are_told_apart(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipes.root() == installed
    assert (recipes.names(), recipes.summary("quickstart")) == (["quickstart"], "a little")
    monkeypatch.undo()
    assert recipes.root() == RECIPES.parent


def test_the_working_directory_comes_first(here: Path) -> None:
    shipped = str(RECIPES / "quickstart.yaml")
    assert recipes.find("recipes/quickstart.yaml") == recipes.find("./recipes/quickstart.yaml") == shipped
    (here / "recipes").mkdir()
    assert recipes.find("recipes/quickstart.yaml") == shipped  # file by file
    (here / "recipes" / "quickstart.yaml").touch()
    assert recipes.find("recipes/quickstart.yaml") == "recipes/quickstart.yaml"


@pytest.mark.parametrize(
    "path",
    ["recipes/none.yaml", "quickstart.yaml", "docs/index.md", "Qwen/Qwen3-0.6B", "recipes/../README.md", "", "/"],
)
def test_no_other_path_is_touched(here: Path, path: str) -> None:
    assert recipes.find(path) == path


def test_options_find_recipes(here: Path) -> None:
    options = ScriptArguments(
        train_files=["recipes/environments/calculator/data/example.jsonl", "data/train.jsonl"],
        data_script="recipes/environments/calculator/generate_data.py",
        small_policy_dir=recipes.SMALL_POLICY,
    )
    assert options.train_files == [str(RECIPES / "environments/calculator/data/example.jsonl"), "data/train.jsonl"]
    assert options.data_script == str(RECIPES / "environments/calculator/generate_data.py")
    assert options.small_policy_dir == str(RECIPES / "small_policy")
    found = str(RECIPES / "math.yaml")
    assert with_config_found(["--config", "recipes/math.yaml", "--seed", "1"]) == ["--config", found, "--seed", "1"]
    assert with_config_found(["--config=recipes/math.yaml", "--config"]) == ["--config", found, "--config"]


def named_files(value: object) -> list[str]:
    if isinstance(value, dict | list):
        return [
            name for inner in (value.values() if isinstance(value, dict) else value) for name in named_files(inner)
        ]
    return [value] if isinstance(value, str) and value.startswith("recipes/") else []


@pytest.mark.parametrize("name", TRAINING)
def test_a_copy_has_what_its_options_and_its_command_name(
    here: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "copy", name, "--to", "mine"]) == 0
    told = capsys.readouterr().out
    text = (here / "mine" / "recipes" / f"{name}.yaml").read_text()
    assert f"cd mine && trl-gym train --config recipes/{name}.yaml" in told
    words = [word for line in text.splitlines() if line.startswith("#") for word in line.split()]
    commanded = [word for word in words if word.startswith("recipes/")]
    assert [n for n in (*commanded, *named_files(yaml.safe_load(text))) if not (here / "mine" / n).exists()] == []
    copied = [str(path) for path in Path("mine").rglob("*") if path.is_file()]
    assert {line for line in told.splitlines() if line.startswith("mine/")} == set(copied)


def test_the_copied_quickstart_holds_its_environment_and_its_model(here: Path) -> None:
    recipes.copy("quickstart", here)
    assert {path.name for path in (here / "recipes").iterdir()} == {"quickstart.yaml", "environments", "small_policy"}
    for copied in (path for path in (here / "recipes").rglob("*") if path.is_file()):
        assert copied.read_bytes() == (RECIPES / copied.relative_to(here / "recipes")).read_bytes()
    script = here / "recipes/environments/calculator/generate_data.py"
    subprocess.run([sys.executable, script, "--output_dir", "data"], cwd=here, check=True, capture_output=True)
    assert (here / "data" / "train.jsonl").is_file()


def test_a_copy_can_lie_below_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    assert recipes.copy("math", Path("~/x"))[0].is_relative_to(here / "home" / "x")
    assert not (here / "~").exists()


def test_a_copy_replaces_nothing_that_was_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", "math"]) == 0
    assert main(["recipes", "copy", "math"]) == 0  # what is there already is the same
    assert "are in recipes already" in capsys.readouterr().out
    (here / "recipes" / "grpo.py").write_text("mine")
    assert main(["recipes", "copy", "lora_24gb"]) == 1
    assert "in the way: recipes/grpo.py. Choose another folder" in capsys.readouterr().err
    assert not (here / "recipes" / "lora_24gb.yaml").exists()  # nothing, then
    assert (here / "recipes" / "grpo.py").read_text() == "mine"
    (here / "file").touch()
    with pytest.raises(ConfigError, match="`--to` file cannot be written to: Not a directory"):
        recipes.copy("math", Path("file"))


@pytest.mark.parametrize("name", ["nonsense", "../pyproject.toml", "", "small_policy/config.json", "environments"])
def test_another_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no recipe .* Choose one of .*quickstart"):
        recipes.recipe(name)


def test_show_and_copy_need_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy"]) == 1
    assert "`trl-gym recipes copy` needs the NAME of a recipe. Choose one of" in capsys.readouterr().err


def test_the_list_says_what_each_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in recipes.names()) and "a policy of half a million parameters" in told
    assert set(TRAINING) == {path.stem for path in RECIPES.glob("*.yaml")}
    assert all(recipes.recipe(name) == recipes.recipe(f"recipes/{name}") for name in recipes.names())
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert main(["recipes", "show", name]) == 0
        assert capsys.readouterr().out == (RECIPES / "quickstart.yaml").read_text()
