"""`trl-gym new-environment`: what is refused, what is made, and that it works with both versions of NeMo Gym."""

from __future__ import annotations

import json
import keyword
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.cli import main
from trl_gym.commands.new_environment import _GYM_KEYS, NewEnvironment, check_name, create
from trl_gym.errors import ConfigError
from trl_gym.gym.config import resolve_configs

ROOT = Path(__file__).resolve().parents[2]
GYM_VENVS = (".gym-venv", ".gym-venv-0.7")
PLACEHOLDERS = ("my_environment", "MyEnvironment", "ENVIRONMENT_DIR", "COMMANDS", ".template")


def make(directory: Path, name: str = "lamp_room") -> Path:
    create(NewEnvironment(name, directory / name, "gym-python"))
    return directory / name


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("Lamp-Room", "`lamp_room`"),
        ("lampRoom2", "`lamp_room_2`"),
        ("2lamps", "`lamps`"),
        ("lamp__room", "`lamp_room`"),
        ("_", "`my_environment`"),
        ("../lamp", "`lamp`"),
        ("größe", "`gr_e`"),
        ("", "`my_environment`"),
        ("class", "a keyword of Python.*`class_environment`"),
        ("match", "a keyword of Python"),
        ("yes", "no text to YAML"),
        ("policy_model", "a meaning of its own"),
        ("telemetry", "a meaning of its own"),
        ("train", "another file"),
    ],
)
def test_names_that_would_break_something_are_refused(name: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)NAME is {name!r}.*{remedy}"):
        make(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@given(st.text(alphabet=st.sampled_from("aZ_9- ü.")))
def test_a_suggested_name_is_a_good_one(name: str) -> None:
    try:
        check_name(name)
    except ConfigError as error:
        check_name(str(error).rsplit("`", 2)[1])
    else:
        assert name.isidentifier() and not keyword.iskeyword(name) and yaml.safe_load(name) == name


@pytest.mark.parametrize("venv", GYM_VENVS)
def test_every_key_that_gym_reserves_is_known(venv: str) -> None:
    code = "import json, nemo_gym.global_config as g; print(json.dumps(list(g.NEMO_GYM_RESERVED_TOP_LEVEL_KEYS)))"
    done = subprocess.run([ROOT / venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    public = {key for key in json.loads(done.stdout.splitlines()[-1]) if not key.startswith("_")}
    assert public - _GYM_KEYS == set()


def test_a_folder_in_the_way_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lamp_room").mkdir()
    (tmp_path / "lamp_room" / "mine").write_text("mine")
    assert main(["new-environment", "lamp_room", "--directory", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "lamp_room exists already. Remove it, or choose another NAME or `--directory`." in shown.err
    assert [path.name for path in (tmp_path / "lamp_room").iterdir()] == ["mine"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"`--directory` .*file cannot be written to"):
        make(tmp_path / "file")


def test_all_files_carry_the_name_and_nothing_of_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make(Path())
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {
        "README.md",
        "generate_data.py",
        "lamp_room.yaml",
        "resources_servers/lamp_room/app.py",
        "resources_servers/lamp_room/lamp_room_rules.py",
        "resources_servers/lamp_room/requirements.txt",
        "test_lamp_room.py",
        "train.yaml",
    }
    for path in files.values():
        assert not [word for word in PLACEHOLDERS if word in path.read_text()], path
    assert "class LampRoomServer(" in files["resources_servers/lamp_room/app.py"].read_text()
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "T20,I", folder], check=True)
    subprocess.run([*ruff, "format", "--config", str(ROOT / "pyproject.toml"), "--check", folder], check=True)


def test_a_name_that_is_a_word_of_the_template(tmp_path: Path) -> None:
    folder = make(tmp_path, "my_environment")
    assert f"{folder}/train.yaml" in (folder / "README.md").read_text()


def test_the_configurations_name_what_is_there(tmp_path: Path) -> None:
    folder = make(tmp_path / "with [odd], characters: #1")
    config = yaml.safe_load((folder / "lamp_room.yaml").read_text())
    assert list(config) == ["lamp_room", "lamp_room_simple_agent"]
    assert resolve_configs([folder / "lamp_room.yaml"], ROOT).search_roots[0] == folder
    training = yaml.safe_load((folder / "train.yaml").read_text())
    assert training["gym_config_paths"] == [str(folder / "lamp_room.yaml")]
    assert training["train_files"] == [str(folder / "data" / "train.jsonl")]


def test_its_own_tests_pass(tmp_path: Path) -> None:
    """With the newer NeMo Gym; `test_what_is_printed_can_be_run` runs them with the older one."""
    folder = make(tmp_path)
    python = ROOT / ".gym-venv-0.7" / "bin" / "python"
    done = subprocess.run([python, folder / "test_lamp_room.py"], cwd="/", capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "Ran 7 tests" in done.stderr


def test_its_own_tests_notice_a_broken_verifier(tmp_path: Path) -> None:
    folder = make(tmp_path)
    rules = folder / "resources_servers" / "lamp_room" / "lamp_room_rules.py"
    rules.write_text(rules.read_text().replace("numbers_in(answer) == [expected]", "True"))
    python = ROOT / ".gym-venv" / "bin" / "python"
    done = subprocess.run([python, folder / "test_lamp_room.py"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 1 and "test_parts_of_the_reward" in done.stderr


def test_what_is_printed_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_GYM_PYTHON", str(ROOT / ".gym-venv" / "bin" / "python"))
    assert main(["new-environment", "lamp_room", "--directory", "my environments"]) == 0
    shown = capsys.readouterr().out
    printed = shown.partition("\n\n")[2].replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in printed if line and not line.startswith(("#", "export "))]
    assert [command[0] for command in commands[1:]] == ["python", "trl-gym", "trl-gym", "trl-gym"]
    ran = [
        subprocess.run([sys.executable if first == "python" else first, *rest], capture_output=True, text=True)
        for first, *rest in commands[:2]
    ]
    assert [done.returncode for done in ran] == [0, 0], ran
    assert any("Ran 7 tests" in done.stderr for done in ran)
    lines = Path("my environments/lamp_room/data/train.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2000
    for command in commands[3:]:
        given = [word for word in command if word.startswith("my environments")]
        assert given and all(os.path.exists(path) for path in given)
    readme = Path("my environments/lamp_room/README.md").read_text()
    assert shown.partition("\n\n")[2].strip() in readme


def test_without_nemo_gym_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRL_GYM_PYTHON", str(tmp_path / "none"))
    assert main(["new-environment", "lamp_room", "--directory", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert f"GYM_PYTHON {tmp_path}/lamp_room/test_lamp_room.py" in shown.out
    assert "the tests need NeMo Gym" in shown.err and str(tmp_path / "none") in shown.err


def test_the_wheel_takes_the_templates_along() -> None:
    """hatchling takes every file of a package that git does not ignore."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["trl_gym"]
    templates = [str(path) for path in (ROOT / "trl_gym" / "scaffold").rglob("*.template")]
    assert len(templates) == 8
    assert subprocess.run(["git", "check-ignore", *templates], cwd=ROOT, capture_output=True).returncode == 1


def test_the_tutorial_quotes_what_is_printed() -> None:
    tutorial = (ROOT / "docs" / "tutorial_environment.md").read_text()
    environment = NewEnvironment("counter", Path("counter"), "gym-python")
    listed = "\n".join(f"counter/{path}" for path in environment.files())
    assert f"$ trl-gym new-environment counter\n{listed}\n```" in tutorial
    data = environment.commands.partition("# write its tasks\n")[2].partition("\n")[0]
    rollout = environment.commands.partition("\ntrl-gym rollout")[2].partition("\n\n")[0]
    assert f"$ {data}\n" in tutorial
    assert f"$ trl-gym rollout{rollout}\n" in tutorial
