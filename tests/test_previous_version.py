"""What version 0.1.0.dev0 wrote and took still works: its options, flags, journals and checkpoints.

`fixtures/0.1.0.dev0` was written by that version: `training` by a run of the quickstart (one group of its journal) and
a resumed run (the checkpoint), `collected` by `trl-gym rollout` in an environment with a failing tool.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from trl import ModelConfig, TrlParser

from tests.rollouts.recorded import grouped
from trl_gym.checkpoints import last_whole_checkpoint
from trl_gym.cli import main, parse_args
from trl_gym.commands.collect import all_jobs, claim, done, load_tasks, missing
from trl_gym.commands.rollout_flags import CollectOptions, NamedFile
from trl_gym.commands.rollout_flags import parse as parse_options
from trl_gym.commands.summary import outcomes, summarize
from trl_gym.config import GymGRPOConfig
from trl_gym.made_with import require_same
from trl_gym.report.source import open_run, read_trained
from trl_gym.resume import load_state
from trl_gym.rollout_options import RolloutOptions, Sampling
from trl_gym.rollouts.journal import read_journal
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.source import BatchInfo, JournalSource
from trl_gym.train import ScriptArguments

OLD = Path(__file__).parent / "fixtures" / "0.1.0.dev0"
COMMANDS: dict[str, list[str]] = json.loads((OLD / "commands.json").read_text())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy: commands write beside what they read."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_its_options_file_is_read() -> None:
    parser = TrlParser((ScriptArguments, GymGRPOConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config(["--config", str(OLD / "run.yaml")])
    assert (script.train_files, script.resume, model.model_name_or_path) == (
        ["data/train.jsonl"], True, "Qwen/Qwen3-0.6B",
    )  # fmt: skip
    assert args.gym_retries == {"infrastructure": 1}
    assert args.gym_environments["calculator_simple_agent"]["retries"] == {"infrastructure": 3}
    assert (args.gym_mode, args.gym_pause_mode, args.gym_launch_rate) == ("upstream", "keep", 20)
    assert args.gym_drift == "split"


@pytest.mark.parametrize("command", COMMANDS)
def test_its_flags_are_taken(command: str) -> None:
    assert parse_args([command, *COMMANDS[command]]).run


def test_the_doctor_gets_its_flags_and_those_of_the_run() -> None:
    options = parse_args(["doctor", *COMMANDS["doctor"]])
    assert (options.config, options.accelerate_config) == ("run.yaml", "ddp.yaml")
    assert options.run_options == ["--gym_deadline", "7", "--num_generations=4"]


def test_its_flags_mean_what_they_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.jsonl").touch()
    options = parse_options(parse_args(["rollout", *COMMANDS["rollout"]]), "rollout")
    assert options.datasets == [
        NamedFile("easy", Path("data/validation.jsonl")), NamedFile("train", Path("data/train.jsonl")),
    ]  # fmt: skip
    assert (options.output_dir, options.api_key, options.limit) == (Path("runs/collected"), "key", 3)
    assert options.rollouts == RolloutOptions(
        sampling=Sampling(temperature=0.5, top_p=0.9), max_completion_length=256, deadline=60, max_inflight=8,
        retries={"infrastructure": 1},
    )  # fmt: skip
    assert (options.config_paths, options.gym_python, options.overrides) == (["gym.yaml"], "python", {"a": 1})
    evaluated = parse_options(parse_args(["eval", *COMMANDS["eval"]]), "eval")
    assert (evaluated.output_dir, evaluated.head_url) == (Path("runs/evaluated"), "http://127.0.0.1:11000")


def test_its_collection_is_summarized_and_continued(old: Path) -> None:
    records = list(read_journal(old / "collected" / "rollouts"))
    dataset = old / "validation.jsonl"
    rows = {record["task_index"]: record["row"] for record in records}
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    options = CollectOptions(
        mode="rollout", datasets=[NamedFile("validation", dataset)], output_dir=old / "collected",
        base_url="http://127.0.0.1:1/v1", model="policy", config_paths=["gym.yaml"], num_generations=2,
        rollouts=RolloutOptions(max_completion_length=256),
    )  # fmt: skip
    claim(options)  # the same model and sampling
    jobs = all_jobs(load_tasks(options.datasets, agent=None, limit=None), 2)
    assert len(missing(jobs, done(records))) == 2  # those that failed
    [summary] = summarize(outcomes(records, jobs)).values()
    assert (summary.rollouts, summary.failed, summary.reward_mean) == (6, {"environment": 2}, 0.8)


@pytest.mark.parametrize("run", ["training", "collected"])
def test_its_runs_are_shown(old: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(old / run)]) == 0
    num_lines = sum(1 for _ in read_journal(old / run / "rollouts"))
    assert f"view.html: {num_lines} rollouts" in capsys.readouterr().out


def test_its_steps_are_counted_as_today(old: Path) -> None:
    lines = list(read_journal(old / "training" / "rollouts"))
    assert {(line["step"], line["version"], *line["weight_versions"]) for line in lines} == {(1, 0, "0")}
    assert {line["step"] for line in read_journal(old / "collected" / "rollouts")} == {0}
    logprobs = (old / "training" / "training_logprobs" / "step-0.rank-0.jsonl").read_text().splitlines()
    named = [json.dumps(json.loads(line) | {"step": 0}) for line in logprobs[:1]]  # as the next version did
    (old / "training" / "training_logprobs" / "step-0.rank-1.jsonl").write_text(named[0] + "\n")
    assert [one.step for one in read_trained(open_run(old / "training"))] == [None] * len(logprobs) + [1]


def test_its_journal_is_replayed() -> None:
    folder = OLD / "training" / "rollouts"
    records = sorted(read_journal(folder), key=lambda record: record["member"])
    requests = [request_of(record) for record in records]
    batch = BatchInfo(run="new", step=1, mode="train")
    groups = grouped(requests)
    replayed = [
        one for group in JournalSource(folder).collect(groups, len(groups), batch).groups for one in group.rollouts
    ]
    assert [rollout.reward for rollout in replayed] == [record["reward"] for record in records]
    for rollout, record in zip(replayed, records, strict=True):
        [trajectory] = rollout.trajectories
        assert trajectory.prompt_ids + trajectory.completion_ids == record["prompt_ids"] + record["completion_ids"]
        assert (trajectory.env_mask, trajectory.logprobs) == (record["env_mask"], record["logprobs"])


def request_of(record: dict[str, Any]) -> RolloutRequest:
    names = ("rollout_id", "task_index", "group", "member", "attempt", "agent", "row")
    return RolloutRequest(**{name: record[name] for name in names})


def test_its_checkpoint_is_found_and_read(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": torch.zeros(1)}, old / "training" / "checkpoint-3" / "model.safetensors")  # too large to be kept
    with caplog.at_level(logging.WARNING):
        checkpoint = last_whole_checkpoint(old / "training")
        assert checkpoint == str(old / "training" / "checkpoint-3") and not caplog.records
        assert require_same(checkpoint, {"seed": 1}, [], is_allowed=False)
    assert "does not say what it was made with" in caplog.text
    state = load_state(checkpoint, rank=0)
    assert state is not None
    assert (state.run, state.num_micro_steps, state.num_ranks) == ("97184885", 6, 1)
    assert state.buffered is not None and len(state.buffered) == 2
    assert all(entry["completion_ids"].shape == (2, 6) for entry in state.buffered)
