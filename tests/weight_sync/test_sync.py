"""Order, version threading, verification and failure of a sync, with a server that is only a recorder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from tests.weight_sync.test_source import model
from trl_gym.errors import ConfigError, PolicyServerError, WeightMismatchError, WeightSyncError
from trl_gym.weight_sync.probe import compare, probe_batch, trainer_logprobs
from trl_gym.weight_sync.sync import WeightSync
from trl_gym.weight_sync.transports import FileTransport, choose_transport


class RecordingServer:
    """Holds whatever was sent and computes with it; `fail_in` makes one call raise, `deaf` drops the weights."""

    def __init__(self, *, fail_in: str = "", deaf: bool = False, wrong_version: bool = False) -> None:
        self.calls: list[str] = []
        self.held: Qwen3ForCausalLM = model()
        self.version = "initial"
        self._fail_in, self._deaf, self._wrong_version = fail_in, deaf, wrong_version

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> None:
            self.calls.append(name)
            if name == self._fail_in:
                raise PolicyServerError(f"{name} answered 500")

        return call

    def update_weights(self, info: dict[str, str]) -> None:
        self.calls.append("update_weights")
        self.dtypes = {tensor.dtype for tensor in load_file(info["path"]).values()}
        if not self._deaf:
            self.held.load_state_dict({k: v.float() for k, v in load_file(info["path"]).items()}, strict=False)

    def finish_weight_update(self, version: str) -> None:
        self.calls.append("finish_weight_update")
        self.version = "other" if self._wrong_version else version

    def weight_version(self) -> str:
        return self.version

    def prompt_logprobs(self, token_ids: list[list[int]]) -> list[list[float]]:
        return trainer_logprobs(self.held, token_ids)


def sync_with(server: RecordingServer, tmp_path: Path, dtype: torch.dtype | None = None) -> WeightSync:
    backend = SimpleNamespace(client=server)
    return WeightSync(Accelerator(cpu=True), backend, FileTransport(tmp_path, dtype), probe_tolerance=0.02)


def other_policy() -> Qwen3ForCausalLM:
    policy = model()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    return policy


def test_a_push_pauses_transfers_finishes_resets_and_resumes(tmp_path: Path) -> None:
    server = RecordingServer()
    sync = sync_with(server, tmp_path)
    policy = other_policy()
    first = sync.push(policy, "0")
    assert server.calls == [
        "init_weight_transfer", "pause", "start_weight_update", "update_weights", "finish_weight_update",
        "reset_caches", "resume",
    ]  # fmt: skip
    assert first.version == "0" and first.num_bytes > 0
    assert first.probe.mean_gap < 1e-5
    server.calls.clear()
    second = sync.push(policy, "1")
    assert "init_weight_transfer" not in server.calls
    assert second.probe is None
    assert server.version == "1"
    assert list(tmp_path.iterdir()) == []  # nothing of the model's size stays in shared memory between syncs


def test_weights_that_do_not_arrive_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(WeightMismatchError, match=r"differ from the trainer's by \d"):
        sync_with(RecordingServer(deaf=True), tmp_path).push(other_policy(), "0")


def test_another_version_is_noticed_and_the_server_stays_paused(tmp_path: Path) -> None:
    server = RecordingServer(wrong_version=True)
    with pytest.raises(WeightSyncError, match="'other'"):
        sync_with(server, tmp_path).push(other_policy(), "0")
    assert "resume" not in server.calls


@pytest.mark.parametrize("step", ["pause", "start_weight_update", "reset_caches"])
def test_a_failed_sync_never_resumes_the_server(tmp_path: Path, step: str) -> None:
    server = RecordingServer(fail_in=step)
    with pytest.raises(PolicyServerError, match=step):
        sync_with(server, tmp_path).push(other_policy(), "0")
    assert "resume" not in server.calls


def test_weights_are_written_in_the_servers_precision(tmp_path: Path) -> None:
    server = RecordingServer()
    sync = WeightSync(
        Accelerator(cpu=True),
        SimpleNamespace(client=server),
        FileTransport(tmp_path, torch.bfloat16),
        probe_tolerance=1.0,
    )
    sync.push(other_policy(), "0")
    assert server.dtypes == {torch.bfloat16}


def test_a_folder_that_is_not_there_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gym_weight_dir"):
        FileTransport(tmp_path / "missing")
    with pytest.raises(ConfigError, match="file"):
        choose_transport(("nccl",), None, None)


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WeightSyncError, match="No space left"):
        sync_with(RecordingServer(), tmp_path).push(other_policy(), "0")
    assert list(tmp_path.iterdir()) == []


def test_the_probe_is_the_same_every_time_and_keeps_real_prompts() -> None:
    batch = probe_batch(32, prompts=[[1, 2, 3]])
    assert batch == probe_batch(32, prompts=[[1, 2, 3]])
    assert batch[0][:3] == [1, 2, 3]
    assert len({len(row) for row in batch}) == 1
    assert all(0 <= token < 32 for row in batch for token in row)


def test_compare_measures_mean_and_max() -> None:
    report = compare([[-1.0, -2.0]], [[-1.5, -2.0]])
    assert (report.mean_gap, report.max_gap, report.num_tokens) == (0.25, 0.5, 2)
