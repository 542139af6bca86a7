"""What a checkpoint was made with is compared with the run that resumes it; whole runs are in test_resume_order.py."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from trl_gym import GymGRPOConfig, made_with
from trl_gym.errors import ConfigError
from trl_gym.made_with import CONSEQUENCES, Change, Consequence, changes, facts, lost_files, of_model, require_same

DATA = Dataset.from_dict({"gym_row": [json.dumps({"n": n}) for n in range(6)], "task_index": list(range(6))})


def config(folder: Path, **options: Any) -> GymGRPOConfig:
    return GymGRPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], **options)


def test_a_value_of_every_option_is_kept_and_compared(tmp_path: Path) -> None:
    """As JSON; and an option that a subclass adds is told."""
    own = facts(config(tmp_path), DATA, 2)
    loud = {name for name, consequence in CONSEQUENCES.items() if consequence is not Consequence.SILENT}
    assert own.keys() == loud - {"adapter", "model", "sharding", "reward_funcs"}
    made_with.write(tmp_path, own)
    assert made_with.read(tmp_path) == json.loads(json.dumps(own)) == own

    @dataclass
    class Mine(GymGRPOConfig):
        mine: int = 3

    then, now = (facts(Mine(output_dir=str(tmp_path), use_cpu=True, mine=n), DATA, 2) for n in (3, 4))
    assert [(str(change), change.consequence) for change in changes(then, now)] == [
        ("`mine` was 3 and is 4", Consequence.TOLD)
    ]


def test_nothing_is_changed_in_another_folder_with_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-0123456789")
    secret = {"policy_api_key": "hidden-value", "x": {"url": "http://h/sk-0123456789"}}
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "gym.yaml").write_text("calculator: {}\n")
    then = facts(config(tmp_path, hub_token="t", gym_config_paths=[str(tmp_path / "gym.yaml"), "in/gym"]), DATA, 1)
    assert changes(then, facts(config(tmp_path / "a", gym_config_paths=[str(tmp_path / "a/gym.yaml"), "in/gym"],
                                      logging_first_step=True), DATA, 1)) == []  # fmt: skip
    kept = json.dumps(facts(config(tmp_path, gym_overrides=secret), DATA, 1))
    assert "hidden-value" not in kept and "sk-0123456789" not in kept and "hub_token" not in kept
    (tmp_path / "gym.yaml").write_text("calculator: {other: 1}\n")
    now = facts(config(tmp_path, gym_config_paths=[str(tmp_path / "gym.yaml"), "in/gym"]), DATA, 1)
    assert [change.name for change in changes(then, now)] == ["gym_config_paths"]


OTHERS = (
    DATA.select(range(5)),
    DATA.select([1, 0, 2, 3, 4, 5]),
    DATA.map(lambda row: {"gym_row": row["gym_row"] + " "}),
)


@pytest.mark.parametrize("rows", OTHERS)
def test_other_data_is_found_by_its_content(tmp_path: Path, rows: Dataset) -> None:
    then, now = facts(config(tmp_path), DATA, 1), facts(config(tmp_path), rows, 1)
    [change] = changes(then, now)
    assert change.name == "train_dataset" and change.consequence is Consequence.REFUSED
    again = Dataset.from_list(DATA.to_list()).add_column("mine", [0] * 6)
    assert changes(then, facts(config(tmp_path), again, 1)) == []
    assert changes(then, facts(config(tmp_path), list(DATA), 1)) == []
    assert facts(config(tmp_path), DATA.to_iterable_dataset(), 1)["train_dataset"] is None
    made = DATA.remove_columns("gym_row").with_transform(lambda rows: pytest.fail("a row is made"))
    assert facts(config(tmp_path), made, 1)["train_dataset"] == {"tasks": 6}


def test_an_adapter_is_compared_by_what_it_is() -> None:
    def adapted(base: str, **options: Any) -> dict[str, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3))
        model.config = type("Config", (), {"_name_or_path": base})()
        made = get_peft_model(model, LoraConfig(target_modules=["0"], **options))
        return json.loads(json.dumps(of_model(Accelerator(cpu=True), made, ["gym"]), default=made_with._plain))

    then = adapted("base", lora_alpha=8)
    assert changes(then, adapted("base", lora_alpha=8)) == []
    [other] = changes(then, adapted("base", lora_alpha=16))
    assert str(other) == '`adapter` was {"default": {"lora_alpha": 8}} and is {"default": {"lora_alpha": 16}}'
    assert other.consequence is Consequence.REFUSED
    own = of_model(Accelerator(cpu=True), torch.nn.Linear(1, 1), ["gym"])
    assert own == {"model": "", "adapter": None, "sharding": None, "reward_funcs": ["gym"]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-4"
    made_with.write(folder, THEN)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trl_gym_state.rank-0.pt"):
        torch.save({}, folder / name)
    return folder


THEN = {"seed": 1, "num_generations": 4, "temperature": 1.0, "learning_rate": 1e-3, "save_steps": 2, "world_size": 1}
NOW = {"seed": 2, "num_generations": 8, "temperature": 0.7, "learning_rate": 1e-4, "save_steps": 5, "world_size": 1}


def test_what_breaks_exactness_is_refused_in_one_error(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "trl_gym_state.rank-0.pt").unlink()
    with pytest.raises(ConfigError) as caught:
        require_same(checkpoint, NOW, lost_files(checkpoint, 0, 1), is_allowed=False)
    assert [problem.text for problem in caught.value.problems] == [
        "`seed` was 1 and is 2.",
        "`num_generations` was 4 and is 8.",
        "optimizer.pt is missing, and with it a part of the state of training.",
        "trl_gym_state.rank-0.pt is missing, and with it a part of the state of training.",
    ]
    assert "`gym_resume_changed` to 'allow'" in caught.value.remedy and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert not require_same(checkpoint, NOW, lost_files(checkpoint, 0, 1), is_allowed=True)
    [told] = caplog.messages
    for text in ("`seed` was 1 and is 2;", "optimizer.pt is missing", "`temperature` was 1.0 and is 0.7;"):
        assert text in told
    assert "learning_rate" not in told, "it is that of the run, whose optimizer begins again"


def test_what_changes_training_is_told(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert require_same(checkpoint, THEN, lost_files(checkpoint, 0, 1), is_allowed=False)
        assert not caplog.records
        now = NOW | {"seed": 1, "num_generations": 4}
        assert require_same(checkpoint, now, [], is_allowed=False, is_told=False)
        assert not caplog.records
        assert require_same(checkpoint, now, [], is_allowed=False)
    [told] = caplog.messages
    assert told.endswith(
        "`temperature` was 1.0 and is 0.7; `learning_rate` stays 0.001, which the checkpoint puts back (0.0001 has no "
        "effect); `save_steps` stays 2, which the checkpoint puts back (5 has no effect)"
    )


def test_another_number_of_ranks_is_named_once(checkpoint: Path) -> None:
    """Not also by every file that the new ranks do not have."""
    lost = [name for rank in range(2) for name in lost_files(checkpoint, rank, 2)]
    with pytest.raises(ConfigError) as caught:
        require_same(checkpoint, THEN | {"world_size": 2}, lost, is_allowed=False)
    assert [problem.text for problem in caught.value.problems] == ["`world_size` was 1 and is 2."]


def test_a_best_checkpoint_that_is_cut_is_refused(checkpoint: Path) -> None:
    state = {"global_step": 4, "best_model_checkpoint": str(checkpoint.with_name("checkpoint-2"))}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert require_same(checkpoint, THEN, [], is_allowed=False)
    with pytest.raises(ConfigError, match=r"checkpoint-2, the best .* is not whole: there is no such folder"):
        require_same(checkpoint, THEN | {"load_best_model_at_end": True}, [], is_allowed=False)


def test_what_another_version_wrote_is_refused(checkpoint: Path) -> None:
    for text, match in (('{"schema": 9}', "has schema 9"), ("{", "cannot be read"), ("[]", "has schema None")):
        (checkpoint / "trl_gym_made_with.json").write_text(text)
        with pytest.raises(ConfigError, match=match):
            require_same(checkpoint, THEN, [], is_allowed=False)


def test_long_values_are_shown_by_what_differs() -> None:
    then = {"a": {"x": "y" * 500, "n": 1}, "same": 1}
    assert str(Change("gym_overrides", then, then | {"a": {**then["a"], "n": 2}})) == (
        '`gym_overrides` was {"a": {"n": 1}} and is {"a": {"n": 2}}'
    )
    assert len(str(Change("gym_overrides", then, None))) < 300


def test_a_file_of_deepspeed_is_known_by_what_it_says(tmp_path: Path) -> None:
    def made_by(path: Path, text: str) -> dict[str, Any]:
        path.write_text(text)
        args = config(tmp_path)
        args.deepspeed = str(path)  # not as an option, which reads it
        return facts(args, DATA, 1)

    (tmp_path / "moved").mkdir()
    then = made_by(tmp_path / "ds.json", "{}")
    assert changes(then, made_by(tmp_path / "moved" / "ds.json", "{}")) == []
    assert [change.name for change in changes(then, made_by(tmp_path / "ds.json", '{"a": 1}'))] == ["deepspeed"]


def test_fields_that_another_version_of_peft_has_are_no_change() -> None:
    then, now = {"default": {"r": 8, "old": 1}}, {"default": {"r": 8, "new": 2}}
    assert changes({"adapter": then}, {"adapter": now}) == []
    for other in ({"default": {"r": 16}}, {"other": {"r": 8}}, None):
        assert [change.name for change in changes({"adapter": then}, {"adapter": other})] == ["adapter"]
