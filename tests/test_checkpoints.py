"""A checkpoint that was cut is found out, named, and never stands in the way of a job that is started again."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as shards
from safetensors.torch import save_file

from trl_gym.checkpoints import best_of, checkpoint_to_resume, damage, last_whole_checkpoint, lost_best, lost_state
from trl_gym.errors import ConfigError

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trl_gym_state.rank-0.pt")
TEXTS = ("trainer_state.json", "config.json", "trl_gym_made_with.json")


def write(folder: Path, step: int) -> Path:
    """What transformers and we write, in its form."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_file({"a": torch.zeros(40), "b": torch.zeros(3, dtype=torch.bfloat16)}, checkpoint / FILES[0])
    for name in FILES[1:]:
        torch.save({"step": step, "state": torch.zeros(300)}, checkpoint / name)
    (checkpoint / "config.json").write_text('{"model_type": "qwen3"}')
    (checkpoint / "trl_gym_made_with.json").write_text('{"schema": 1, "made_with": {}}')
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, 9), write(tmp_path, 10)


@pytest.mark.parametrize("name", [*FILES, *TEXTS])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_a_file_that_is_cut_is_named_and_the_checkpoint_before_is_taken(
    two: tuple[Path, Path], name: str, part: float, caplog: pytest.LogCaptureFixture
) -> None:
    before, torn = two
    content = (torn / name).read_bytes()
    (torn / name).write_bytes(content[: min(int(len(content) * part), len(content) - 1)])
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(True, torn.parent) == str(before)
    assert f"{torn} is not whole, and is passed over as it is: {name} is " in caplog.text
    assert (torn / name).exists()
    with pytest.raises(ConfigError, match=rf"checkpoint-10, which .* is not whole: {name} is .* Resume from {before}"):
        checkpoint_to_resume(str(torn), torn.parent)
    shutil.rmtree(before)
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(True, torn.parent) is None
    assert "the run starts from the beginning" in caplog.text
    with pytest.raises(ConfigError, match="Leave `resume_from_checkpoint` out to start again"):
        checkpoint_to_resume(str(torn), torn.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_zeros_is_named(two: tuple[Path, Path], name: str) -> None:
    """As a machine that lost power leaves it."""
    (two[1] / name).write_bytes(bytes((two[1] / name).stat().st_size))
    assert [found.split()[0] for found in damage(two[1])] == [name]


def test_a_whole_one_is_taken(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    (two[0].parent / "checkpoint-best").mkdir()
    assert checkpoint_to_resume("true", two[0].parent) == checkpoint_to_resume(str(two[1]), "x") == str(two[1])
    assert checkpoint_to_resume(None, two[0].parent) is checkpoint_to_resume(False, two[0].parent) is None
    assert not caplog.records


def test_one_that_was_interrupted_is_passed_over(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    (two[1] / "checkpoint-is-incomplete.txt").touch()  # written again on SIGTERM, and not to the end
    (two[1].with_name("checkpoint-20")).mkdir()
    torn = write(two[0].parent, 30)
    (torn / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(two[0].parent) == str(two[0])
    assert "checkpoint-10 is not whole, and is passed over as it is: it was interrupted" in caplog.text
    assert "trainer_state.json, which is written last, is missing; it has no weights" in caplog.text  # 20
    assert "checkpoint-30 is not whole, and is passed over as it is: trainer_state.json, which" in caplog.text


def test_where_there_is_none(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    with pytest.raises(ConfigError, match=r"`resume_from_checkpoint` is true, and .* has no checkpoint"):
        checkpoint_to_resume(True, tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint-7, which .* is not whole: there is no such folder"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-7"), tmp_path)


@pytest.mark.parametrize("text", ["5", "null", "[" * 100_000, '"global_step"', "{}"])
def test_an_odd_state_is_no_checkpoint(two: tuple[Path, Path], text: str) -> None:
    (two[1] / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(two[1].parent) == str(two[0])


def test_a_shard_that_is_missing_is_named(two: tuple[Path, Path]) -> None:
    (two[1] / "model.safetensors").rename(two[1] / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (two[1] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    [found] = damage(two[1])
    assert found == "model.safetensors.index.json names files that are missing: model-00002-of-00002.safetensors"
    save_file({"b": torch.zeros(1)}, two[1] / "model-00002-of-00002.safetensors")
    assert not list(damage(two[1]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_of_fsdp(two: tuple[Path, Path]) -> None:
    whole = two[1]
    (whole / "model.safetensors").unlink()
    (whole / "optimizer.pt").unlink()
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        shards.save({"a": torch.arange(5000), "n": 3}, checkpoint_id=whole / folder, no_dist=True)
    assert not list(damage(whole)) and lost_state(whole, 0, 1) == []
    [shard] = (whole / "optimizer_0").glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    [found] = damage(whole)
    assert found.startswith(f"optimizer_0 is not whole: {shard.name} has ")
    shard.unlink()
    (whole / "pytorch_model_fsdp_0" / ".metadata").unlink()
    assert list(damage(whole)) == [
        f"optimizer_0 is not whole: {shard.name} is missing",
        "pytorch_model_fsdp_0 is not whole: its .metadata is missing",
    ]


@pytest.mark.parametrize("place", [".", "a"])
def test_an_adapter_alone_is_a_checkpoint(two: tuple[Path, Path], place: str) -> None:
    (two[1] / place).mkdir(exist_ok=True)
    weights = (two[1] / "model.safetensors").rename(two[1] / place / "adapter_model.safetensors")
    assert not list(damage(two[1]))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert len(list(damage(two[1]))) == 1


def test_files_of_deepspeed_and_of_old_torch(two: tuple[Path, Path]) -> None:
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (two[1] / name).unlink()
    assert list(damage(two[1])) == ["it has no weights"]
    states = two[1] / "global_step10" / "mp_rank_00_model_states.pt"
    states.parent.mkdir()
    torch.save({"a": torch.zeros(9)}, states, _use_new_zipfile_serialization=False)
    assert not list(damage(two[1])) and lost_state(two[1], 0, 1) == []


def test_a_rank_looks_at_its_own_files(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """They may lie on its host alone; what one of them finds counts for all."""
    for rank in range(2):
        torch.save({"a": torch.zeros(9)}, two[1] / f"rng_state_{rank}.pth")
    (two[1] / "rng_state_1.pth").write_bytes(b"")
    (two[1] / "trl_gym_state.rank-1.pt").write_bytes(b"PK")
    assert not list(damage(two[1], rank=0))
    assert [found.split()[0] for found in damage(two[1], rank=1)] == ["rng_state_1.pth", "trl_gym_state.rank-1.pt"]
    seen: list[Any] = []

    def gather(items: list[Any]) -> list[Any]:
        """Of two ranks: the other one finds a file of the newest checkpoint cut."""
        seen.append(items[0])
        return [*items, "" if len(seen) > 2 else "rng_state_1.pth is empty" if len(seen) == 2 else items[0]]

    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(two[0].parent, 0, gather) == str(two[0])
    assert "rng_state_1.pth is empty" in caplog.text and len(seen) == 3


def test_what_the_state_of_training_lacks(two: tuple[Path, Path]) -> None:
    assert lost_state(two[1], 0, 1) == []
    assert lost_state(two[1], 1, 2) == ["rng_state_1.pth"]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (two[1] / name).unlink()
    assert lost_state(two[1], 0, 1) == ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    assert not list(damage(two[1]))


def test_the_best_checkpoint_is_looked_at(two: tuple[Path, Path]) -> None:
    assert lost_best(two[1]) is None
    state = {"global_step": 10, "best_model_checkpoint": str(two[0])}
    (two[1] / "trainer_state.json").write_text(json.dumps(state))
    assert lost_best(two[1]) is None
    (two[0] / "model.safetensors").write_bytes(b"")
    assert "the best checkpoint so far (`load_best_model_at_end`), is not whole: model.saf" in (
        lost_best(two[1]) or ""
    )


def test_the_best_checkpoint_of_a_folder_that_was_moved_lies_beside(two: tuple[Path, Path], tmp_path: Path) -> None:
    assert best_of(two[1]) is None
    (two[1] / "trainer_state.json").write_text(json.dumps({"global_step": 10, "best_model_checkpoint": str(two[0])}))
    assert best_of(two[1]) == two[0]
    copy = Path(shutil.copytree(two[1], tmp_path / "copy" / two[1].name))
    shutil.copytree(two[0], copy.with_name(two[0].name))
    assert best_of(copy) == two[0], "where it always was, as transformers takes it"
    shutil.rmtree(two[0])
    assert best_of(copy) == copy.with_name(two[0].name) and lost_best(copy) is None
    assert "there is no such folder" in (lost_best(two[1]) or "")
