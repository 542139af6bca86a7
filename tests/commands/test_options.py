from __future__ import annotations

from pathlib import Path

import pytest

from trl_gym.cli import main
from trl_gym.commands.options import CollectOptions, NamedFile, named_file
from trl_gym.errors import ConfigError


def options(tmp_path: Path, **changes: object) -> CollectOptions:
    (tmp_path / "a.jsonl").touch()
    given: dict[str, object] = {
        "mode": "rollout",
        "datasets": [NamedFile("a", tmp_path / "a.jsonl")],
        "output_dir": tmp_path / "out",
        "base_url": "http://127.0.0.1:1/v1",
        "model": "policy",
        "config_paths": ["gym.yaml"],
    }
    return CollectOptions(**(given | changes))


def test_a_file_is_called_by_its_stem_or_as_it_is_named(tmp_path: Path) -> None:
    assert named_file("data/easy.jsonl") == NamedFile("easy", Path("data/easy.jsonl"))
    assert named_file("hard=data/easy.jsonl") == NamedFile("hard", Path("data/easy.jsonl"))
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    assert named_file(str(odd)) == NamedFile("a=b", odd)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        options(
            tmp_path,
            datasets=[NamedFile("x", tmp_path / "none.jsonl"), NamedFile("x", tmp_path / "a.jsonl")],
            base_url="localhost:8000",
            config_paths=[],
            num_generations=0,
            deadline_s=0,
            top_p=1.5,
            temperature=-1,
            retries=-1,
        )
    text = str(caught.value)
    assert text.startswith("9 problem(s)")
    for part in (
        "none.jsonl: no such file",
        "two datasets are called 'x'",
        "--gym_config_paths",
        "--base_url is 'localhost:8000'",
        "--num_generations is 0",
        "--deadline is 0",
        "--top_p is 1.5",
        "--temperature is -1",
        "--retries is -1",
    ):
        assert part in text


@pytest.mark.parametrize("command", ["rollout", "eval"])
def test_the_command_line_has_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in (
        "dataset", "gym_config_paths", "base_url", "model", "output_dir", "num_generations", "deadline",
        "max_inflight", "agent", "gym_python", "gym_head_url", "api_key", "temperature", "top_p",
        "max_tokens", "limit", "overrides",
    ):  # fmt: skip
        assert f"--{name} " in shown, name


def test_a_wrong_option_is_one_message_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "none.jsonl", "--base_url", "http://x/v1", "--model", "m", "--output_dir", str(tmp_path)]
    assert main(["rollout", *arguments, "--gym_config_paths", "gym.yaml"]) == 1
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
