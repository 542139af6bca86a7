"""Order, version threading, verification and failure of a sync, with a server that is only a recorder."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from tests.weight_sync.test_source import model
from trl_gym.errors import PolicyServerError, PolicyServerLostError, WeightMismatchError, WeightSyncError
from trl_gym.policy_server.engine.worker import value_sum
from trl_gym.weight_sync import sync as sync_module
from trl_gym.weight_sync.protocol import WeightStream
from trl_gym.weight_sync.sums import fingerprint
from trl_gym.weight_sync.sync import SyncOptions, WeightSync, compare, probe_batch, trainer_logprobs
from trl_gym.weight_sync.transports.file import FileTransport


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

    def patient(self, timeout_s: float) -> RecordingServer:
        self.timeout_s = timeout_s
        return self

    def reset_caches(self, *, running: bool) -> None:
        self.calls.append("reset_caches(running)" if running else "reset_caches")
        if self._fail_in == "reset_caches":
            raise PolicyServerError("reset_caches answered 500")

    def weight_version(self) -> str:
        return self.version

    def collective_rpc(self, method: str, args: list[str]) -> list[dict[str, Any]]:
        sums = {name: value_sum(tensor) for name, tensor in self.held.named_parameters()}
        return [{"packed": {}, "sharded": {}, "whole": sums, "unseen": []}]

    def prompt_logprobs(self, token_ids: list[list[int]]) -> list[list[float]]:
        return trainer_logprobs(self.held, token_ids)


def sync_with(server: RecordingServer, folder: Path, **options: Any) -> WeightSync:
    return WeightSync(
        Accelerator(cpu=True), SimpleNamespace(client=server), FileTransport(folder), SyncOptions(**options)
    )


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
    first = sync.push(policy, 0)
    assert server.calls == [
        "ask_engines", "init_weight_transfer", "pause", "start_weight_update", "update_weights",
        "finish_weight_update", "reset_caches", "resume",
    ]  # fmt: skip
    assert first.version == "0" and first.num_bytes > 0
    assert first.probe.mean_gap < 1e-5
    server.calls.clear()
    second = sync.push(policy, 1)
    assert "init_weight_transfer" not in server.calls
    assert second.probe is None
    assert server.version == "1"
    assert list(tmp_path.iterdir()) == []  # nothing of the model's size stays in shared memory between syncs


def test_weights_that_do_not_arrive_are_noticed(tmp_path: Path) -> None:
    policy = other_policy()
    policy.model.norm.load_state_dict(RecordingServer().held.model.norm.state_dict())
    with pytest.raises(WeightMismatchError, match=r"differ from the trainer's by \d") as caught:
        sync_with(RecordingServer(deaf=True), tmp_path).push(policy, 0)
    assert "Not what was sent" in caught.value.problems[0].text
    assert "model.embed_tokens.weight" in str(caught.value)
    assert "model.norm.weight" not in str(caught.value)  # that one is what was sent


def test_another_version_is_noticed_and_the_server_stays_paused(tmp_path: Path) -> None:
    server = RecordingServer(wrong_version=True)
    with pytest.raises(WeightSyncError, match="'other'"):
        sync_with(server, tmp_path).push(other_policy(), 0)
    assert "resume" not in server.calls


@pytest.mark.parametrize("step", ["pause", "start_weight_update", "reset_caches"])
def test_a_failed_sync_never_resumes_the_server(tmp_path: Path, step: str) -> None:
    server = RecordingServer(fail_in=step)
    with pytest.raises(PolicyServerError, match=step):
        sync_with(server, tmp_path).push(other_policy(), 0)
    assert "resume" not in server.calls


def test_an_update_that_ctrl_c_cut_short_is_ended_by_the_next_push(tmp_path: Path) -> None:
    server = RecordingServer()
    sync = sync_with(server, tmp_path)
    sync.push(other_policy(), 0)

    def interrupted(info: dict[str, str]) -> None:
        raise KeyboardInterrupt

    server.update_weights = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sync.push(other_policy(), 1)
    del server.update_weights
    server.calls.clear()
    sync.push(other_policy(), 2)
    assert server.calls[1:4] == ["abandon_weight_update", "pause", "start_weight_update"]
    server.calls.clear()
    sync.push(other_policy(), 3)
    assert "abandon_weight_update" not in server.calls and server.version == "3"


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_calls_that_do_not_end_in_time_are_named(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(self: RecordingServer, mode: str) -> None:
        raise PolicyServerLostError("POST /pause: no answer within 600 s.")

    monkeypatch.setattr(RecordingServer, "pause", pause, raising=False)
    with pytest.raises(PolicyServerLostError, match="within 600 s") as caught:
        sync_with(RecordingServer(), tmp_path, pause_mode=mode).push(other_policy(), 0)
    assert ("`gym_pause_mode` is 'wait'" in str(caught.value)) == (mode == "wait")


def test_a_server_that_hangs_is_named_with_the_part_of_the_sync_and_the_transport(tmp_path: Path) -> None:
    """Before it, where its engine has less time to answer; in it, where it is not asked once more."""
    server = RecordingServer()
    sync = sync_with(server, tmp_path, timeout_s=600.0, hang_timeout_s=7.0)
    sync.push(other_policy(), 0)
    hangs = PolicyServerLostError("POST /update_weights: no answer within 600 s.")
    hangs.__cause__ = requests.ReadTimeout()

    def hang(info: dict[str, str]) -> None:
        raise hangs

    server.update_weights = hang  # type: ignore[method-assign]
    with pytest.raises(PolicyServerLostError) as caught:
        sync.push(other_policy(), 1)
    assert caught.value.silent_s == 600.0
    assert "sync of version 1 was lost in the transfer (transport `file`): POST /update_weights" in str(caught.value)
    given: list[float] = []

    def ask_engines() -> None:
        given.append(server.timeout_s)
        raise PolicyServerLostError("its engine does not answer")

    server.ask_engines = ask_engines  # type: ignore[attr-defined]
    server.calls.clear()
    with pytest.raises(PolicyServerLostError, match="its engine does not answer"):
        sync.push(other_policy(), 2)
    assert (given, server.calls) == ([7.0], [])


def test_weights_are_written_in_the_servers_precision(tmp_path: Path) -> None:
    server = RecordingServer()
    sync_with(server, tmp_path, dtype=torch.bfloat16, probe_tolerance=1.0).push(other_policy(), 0)
    assert server.dtypes == {torch.bfloat16}


def test_probes_come_first_then_every_so_many_steps_and_after_a_restart(tmp_path: Path) -> None:
    sync = sync_with(RecordingServer(), tmp_path, verify_every=4)
    probed = {step for step in (0, 1, 3, 4, 5, 7, 8) if sync.push(other_policy(), step).probe is not None}
    assert probed == {0, 4, 8}
    sync.disconnect()
    assert sync.push(other_policy(), 9).probe is not None


def test_without_a_number_of_steps_only_the_first_sync_is_probed(tmp_path: Path) -> None:
    sync = sync_with(RecordingServer(), tmp_path, verify_every=0)
    assert [sync.push(other_policy(), step).probe is not None for step in (3, 400)] == [True, False]


def test_a_sync_connects_again_after_a_disconnect(tmp_path: Path) -> None:
    server = RecordingServer()
    sync = sync_with(server, tmp_path)
    sync.push(other_policy(), 0)
    sync.disconnect()
    sync.push(other_policy(), 1)
    assert server.calls.count("init_weight_transfer") == 2


def test_frozen_requests_forget_their_cache_too(tmp_path: Path) -> None:
    server = RecordingServer()
    sync_with(server, tmp_path, pause_mode="keep").push(other_policy(), 0)
    assert "reset_caches(running)" in server.calls


def test_every_call_has_the_syncs_timeout(tmp_path: Path) -> None:
    server = RecordingServer()
    sync_with(server, tmp_path, timeout_s=7.0).push(other_policy(), 0)
    assert server.timeout_s == 7.0


def test_no_second_of_a_sync_is_missing_from_its_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by one whenever it is read: where phases touch, they last as often as it is read."""
    sync, now = sync_with(RecordingServer(), tmp_path), count()
    monkeypatch.setattr(sync_module, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    first = sync.push(other_policy(), 0)
    assert first.seconds == dict.fromkeys(
        ["plan", "connect", "pause", "transfer", "finish", "probe", "fingerprint"], 1.0
    )
    later = sync.push(other_policy(), 1)
    assert later.seconds == dict.fromkeys(["plan", "pause", "transfer", "finish", "fingerprint"], 1.0)


def test_the_fingerprint_tells_the_weights_that_were_sent(tmp_path: Path) -> None:
    sync, policies = sync_with(RecordingServer(), tmp_path), (other_policy(), model())
    first, second, again = (sync.push(policies[place], step).fingerprint for step, place in enumerate((0, 1, 0)))
    assert first == again == fingerprint(policies[0], Accelerator(cpu=True))
    assert first != second


class PartTransport(FileTransport):
    """A transport for which a part of the parameters is enough; remembers what it was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sent: list[set[str]] = []

    def send(self, weights: WeightStream, client: Any, version: str) -> int:
        self.sent.append({meta.name for meta in weights.metadata()})
        return super().send(weights, client, version)


def test_only_what_is_trained_is_sent_but_never_before_everything_was(tmp_path: Path) -> None:
    policy = other_policy()
    policy.requires_grad_(False)
    policy.model.norm.weight.requires_grad_(True)
    transport = PartTransport(tmp_path)
    sync = WeightSync(
        Accelerator(cpu=True),
        SimpleNamespace(client=RecordingServer()),
        transport,
        SyncOptions(only_trainable=True),
    )
    for step in range(2):
        sync.push(policy, step)
    sync.disconnect()
    sync.push(policy, 2)
    everything = {name for name, _ in policy.named_parameters()}
    assert transport.sent == [everything, {"model.norm.weight"}, everything]


class SideTransport:
    """One that puts a version into service by itself."""

    name, replaces = "side", False

    def connect(self, client: Any) -> None:
        client.calls.append("connect")

    def send(self, weights: WeightStream, client: Any, version: str) -> int:
        client.calls.append("send")
        client.version = version
        client.held.load_state_dict(dict(weights), strict=False)
        return 1

    def release(self) -> None: ...


def test_weights_beside_those_in_service_need_no_pause() -> None:
    server = RecordingServer()
    sync = WeightSync(Accelerator(cpu=True), SimpleNamespace(client=server), SideTransport())
    assert sync.push(other_policy(), 5).version == "5"
    assert server.calls == ["ask_engines", "connect", "send"]


def test_a_probe_leaves_every_submodule_in_the_mode_that_it_found(tmp_path: Path) -> None:
    policy = other_policy().train()
    policy.model.layers[0].eval()  # frozen layers whose dropout the user has switched off
    policy.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in policy.named_modules()}
    assert set(before.values()) == {True, False}
    assert sync_with(RecordingServer(), tmp_path).push(policy, 0).probe is not None
    assert {name: module.training for name, module in policy.named_modules()} == before


def test_a_probe_finds_what_twelve_times_as_many_tokens_find() -> None:
    """Whichever parameter differs: the mean gap of its few tokens is of the size of that of many."""
    policy, changed = other_policy(), other_policy()
    few, many = probe_batch(32), [row for seed in range(12) for row in probe_batch(32, seed=100 + seed)]
    expected = [trainer_logprobs(policy, batch) for batch in (few, many)]
    for name, parameter in changed.named_parameters():
        changed.load_state_dict(policy.state_dict())
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter))
        found, true = (
            compare(before, trainer_logprobs(changed, batch)).mean_gap
            for before, batch in zip(expected, (few, many), strict=True)
        )
        assert 1 / 3 < found / true < 3, name


def test_the_probe_is_the_same_every_time() -> None:
    batch = probe_batch(32)
    assert batch == probe_batch(32)
    assert len({len(row) for row in batch}) == 1
    assert all(0 <= token < 32 for row in batch for token in row)


def test_compare_measures_mean_and_max() -> None:
    report = compare([[-1.0, -2.0]], [[-1.5, -2.0]])
    assert (report.mean_gap, report.max_gap, report.num_tokens) == (0.25, 0.5, 2)
