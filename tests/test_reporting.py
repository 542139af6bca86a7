"""What `report_to` gets: every metric goes through `Trainer.log`, so the same names arrive wherever a run is reported.

TensorBoard is real (its event file is read back); W&B and Trackio are their callbacks of transformers with the client
library's `log` recorded, since the libraries are large and want an account.
"""

from __future__ import annotations

import json
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from transformers import TrainerCallback
from transformers.integrations import TrackioCallback, WandbCallback

from tests.test_model_card import make_trainer, recorded
from trl_gym import GymGRPOTrainer

__all__ = ["recorded"]  # a fixture

EVALUATION = {"eval_reward": 0.5, "eval_gym/recorded/reward": 0.5, "eval_runtime": 1.0}


class Recorder(TrainerCallback):
    """What a user's own callback is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def names_in_event_files(folder: Path) -> set[str]:
    """Tags of all scalars. A record of the file: length (8 bytes), checksum (4), an `Event`, checksum (4)."""
    names = set()
    for path in folder.rglob("events.out.*"):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            names |= {value.tag for value in event.summary.value if value.HasField("simple_value")}
            start += 12 + length + 4
    return names


def reported(logs: list[dict[str, Any]]) -> set[str]:
    """Names of numbers as transformers' callbacks report them: `train/<name>` and `eval/<name>`."""
    names = {name for log in logs for name, value in log.items() if isinstance(value, int | float)}
    return {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}" for name in names}


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Stand-ins for the modules `wandb` and `trackio`; what they were told to log, by name."""
    told: dict[str, list[dict[str, Any]]] = {"wandb": [], "trackio": []}
    for name, logged in told.items():
        module = types.ModuleType(name)
        module.log = lambda values, logged=logged, **_: logged.append(dict(values))  # type: ignore[attr-defined]
        module.run = types.SimpleNamespace(summary={})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    yield told


class Reported(TrainerCallback):
    """The `on_log` of transformers' callback for a client library; its set-up would look for the library."""

    def __init__(self, kind: type[TrainerCallback], name: str) -> None:
        self._on_log = kind.on_log
        self._own = types.SimpleNamespace(**{f"_{name}": sys.modules[name]}, _initialized=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._on_log(self._own, args, state, control, logs=logs)


class Evaluates(TrainerCallback):
    """Logs an evaluation after each step. A journal cannot be evaluated on; what an evaluation logs goes this way."""

    def __init__(self, trainer: GymGRPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.log(dict(EVALUATION))


def run(recorded: Path, output_dir: Path, callbacks: list[TrainerCallback], **changes: Any) -> None:
    trainer = make_trainer(recorded, output_dir, callbacks, **changes)
    trainer.add_callback(Evaluates(trainer))
    trainer.train()


def test_tensorboard_wandb_trackio_and_callbacks_get_the_same_names(
    recorded: Path, tmp_path: Path, clients: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    recorder = Recorder()
    callbacks = [recorder, Reported(WandbCallback, "wandb"), Reported(TrackioCallback, "trackio")]
    run(recorded, tmp_path / "out", callbacks, report_to=["tensorboard"])

    # The last log of a training is its summary, which W&B and Trackio keep elsewhere.
    expected = reported([logs for logs in recorder.logs if "train_runtime" not in logs])
    for name in ("train/reward", "train/gym/recorded/reward", "train/rollouts/count", "train/seconds/update"):
        assert name in expected
    assert {"eval/reward", "eval/gym/recorded/reward"} <= expected
    assert expected - names_in_event_files(tmp_path / "events") == set()
    for client, logs in clients.items():
        assert logs, client
        assert expected - {name for log in logs for name in log} == set(), client


def test_metrics_on_disk_have_the_names_that_are_reported(recorded: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    run(recorded, tmp_path, [recorder])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = {name for log in recorder.logs if "train_runtime" not in log for name in log}
    assert told | {"step"} == {name for line in lines for name in line}
