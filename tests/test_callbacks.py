from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from trl_gym.callbacks import MetricsCallback, ProgressCallback, WeightSyncCallback
from trl_gym.errors import RolloutError
from trl_gym.progress import LineProgress


def state(step: int, max_steps: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=True)


@pytest.mark.parametrize(
    ("step", "generates", "evaluates", "pushed"),
    [(3, False, False, []), (3, True, False, [3]), (3, False, True, [3]), (10, False, False, [10])],
)
def test_weights_are_pushed_only_if_something_will_be_sampled(
    step: int, generates: bool, evaluates: bool, pushed: list[int]
) -> None:
    versions: list[int] = []
    callback = WeightSyncCallback(lambda: versions.append(step), lambda: generates)
    callback.on_step_end(None, state(step), TrainerControl(should_evaluate=evaluates))
    assert versions == pushed


def test_metrics_have_one_object_per_step_with_the_evaluation_in_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    callback = MetricsCallback(path)

    def log(step: int, **logs: Any) -> None:
        callback.on_log(None, state(step), TrainerControl(), logs=logs)

    callback.on_train_begin(None, state(0), TrainerControl())
    log(0, eval_reward=0.4)
    log(1, reward=0.5, loss=math.nan, note="text")
    log(2, reward=0.6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]  # on disk at once
    log(2, eval_reward=0.7)
    log(2, train_runtime=1.0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "eval_reward": 0.4},
        {"step": 1, "reward": 0.5, "loss": None},
        {"step": 2, "reward": 0.6, "eval_reward": 0.7},
    ]


def test_a_resumed_run_keeps_the_steps_it_has_and_drops_those_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    callback = MetricsCallback(path)
    callback.on_train_begin(None, state(2), TrainerControl())
    callback.on_log(None, state(3), TrainerControl(), logs={"reward": 1.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "reward": 1.0},
    ]
    callback.on_train_begin(None, state(0), TrainerControl())
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ['{"step": 3, "rew', '{"step": 3}\n"eval_reward": 1}\n', '{"step": 3}\nnull'])
@pytest.mark.parametrize("resumes", [True, False])
def test_a_line_that_a_full_disk_tore_is_cut_off(
    tmp_path: Path, torn: str, resumes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    callback = MetricsCallback(path)
    if resumes:
        callback.on_train_begin(None, state(3), TrainerControl())
    callback.on_log(None, state(4), TrainerControl(), logs={"reward": 1.0})
    whole = [3] if torn.startswith('{"step": 3}') else []
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, *whole, 4]
    assert "torn by a crash or a full disk" in caplog.text
    assert sorted(tmp_path.iterdir()) == [path]


def test_metrics_that_cannot_be_written_say_where(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    callback = MetricsCallback(tmp_path / "file" / "metrics.jsonl")
    with pytest.raises(
        RolloutError, match=r"metrics cannot be written to .*file: File exists\. Checkpoints and journal"
    ):
        callback.on_train_begin(None, state(0), TrainerControl())


def test_every_evaluation_set_is_shown_by_its_name() -> None:
    out = io.StringIO()
    callback = ProgressCallback(LineProgress(Console(file=out, width=100)))
    callback.on_log(None, state(3), TrainerControl(), logs={"eval_runtime": 1.0, "eval_reward": 0.5})
    named = {"eval_hard_sums_runtime": 1.0, "eval_hard_sums_reward": 0.25, "eval_hard_sums_success": 0.0, "epoch": 1}
    callback.on_log(None, state(3), TrainerControl(), logs=named)
    assert out.getvalue().splitlines() == [
        "evaluation at step 3: reward 0.500, 1.0 s",
        "evaluation of hard_sums at step 3: reward 0.250, success 0.000, 1.0 s",
    ]
