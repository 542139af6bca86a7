from __future__ import annotations

from pathlib import Path

import pytest

from trl_gym.cli import main, parse_args
from trl_gym.commands.rollout_flags import CollectOptions, NamedFile, named_file, parse
from trl_gym.errors import ConfigError
from trl_gym.rollout_options import RolloutOptions, Sampling


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
            processes=0,
            rollouts=RolloutOptions(
                sampling=Sampling(temperature=-1, top_p=1.5), deadline=0, retries={"infrastructure": -1}
            ),
        )
    text = str(caught.value)
    assert text.startswith("10 problem(s)")
    for part in (
        "none.jsonl does not exist",
        "Two datasets are called 'x'",
        "--gym-config-paths",
        "`--base-url` is 'localhost:8000'",
        "`--num-generations` is 0",
        "`--gym-processes` is 0",
        "`--deadline` is 0",
        "`--top-p` is 1.5",
        "`--temperature` is -1",
        "`--retries['infrastructure']` is -1",
    ):
        assert part in text


def test_the_processes_of_a_gym_that_runs_already_are_its_own(tmp_path: Path) -> None:
    running = {"config_paths": [], "head_url": "http://127.0.0.1:1,http://127.0.0.1:2"}
    assert options(tmp_path, **running, processes=1).head_url == running["head_url"]
    with pytest.raises(ConfigError, match="`--gym-processes` is 2 and `--gym-head-url` names a Gym that runs"):
        options(tmp_path, **running, processes=2)


@pytest.mark.parametrize("command", ["rollout", "eval"])
def test_the_command_line_has_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in (
        "dataset", "gym-config-paths", "base-url", "model", "output-dir", "num-generations", "deadline",
        "max-inflight", "retries", "agent", "gym-python", "gym-head-url", "api-key", "temperature", "top-p",
        "max-completion-length", "limit", "gym-overrides", "gym-processes",
    ):  # fmt: skip
        assert f"--{name} " in shown, name


def test_a_wrong_option_is_one_message_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "none.jsonl", "--base_url", "http://x/v1", "--model", "m", "--output_dir", str(tmp_path)]
    assert main(["rollout", *arguments, "--gym_config_paths", "gym.yaml"]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_flags_are_taken_with_either_separator_and_by_the_names_of_training() -> None:
    needed = ["--dataset=a_b.jsonl", "--base-url", "http://x_y/v1", "--model", "my_model", "--output_dir", "out_put"]
    options = parse_args(
        ["rollout", *needed, "--gym_deadline=5", "--max_tokens", "7", "--gym-overrides", '{"a_b": 1}']
    )
    assert (options.dataset, options.model, options.output_dir) == (["a_b.jsonl"], "my_model", "out_put")
    assert (options.deadline, options.max_completion_length, options.gym_overrides) == (5, 7, {"a_b": 1})
    options = parse_args(["train", "--config", "a_b.yaml", "--gym-deadline", "5", "--output-dir=a-b", "--top_k", "-1"])
    assert options.run_options == ["--gym_deadline", "5", "--output_dir=a-b", "--top_k", "-1"]
    served = parse_args(["serve", "a_b", "--max_model_len", "512", "--compilation-config.x_y", "1"])
    assert served.flags == ["--max_model_len", "512", "--compilation-config.x_y", "1"]


def test_a_flag_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["view", "run", "--no-such-flag"])
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_flags_arrive_and_the_key_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from the environment")
    (tmp_path / "a.jsonl").touch()
    command = ["rollout", "--dataset", str(tmp_path / "a.jsonl"), "--base-url", "http://x/v1", "--model", "m"]
    command += ["--output-dir", str(tmp_path / "out"), "--gym-config-paths", "gym.yaml"]
    assert parse(parse_args(command), "rollout").api_key == "from the environment"
    assert parse(parse_args([*command, "--api-key", "given"]), "rollout").api_key == "given"
    assert parse(parse_args([*command, "--gym-processes", "3"]), "eval").processes == 3
