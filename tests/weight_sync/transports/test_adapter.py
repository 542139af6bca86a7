"""Adapters on disk: what is written, announced to the server, and deleted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.policy_server.tiny_model import build_model, build_tokenizer
from trl_gym.errors import ConfigError, PolicyServerError, WeightSyncError
from trl_gym.policy_server.adapter_files import read_adapter
from trl_gym.weight_sync.source import AdapterSource
from trl_gym.weight_sync.transports.adapter import AdapterTransport

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"]}


class Server:
    """Keeps as many adapters as it is told to, and notes whose folders are there when it hears of a new one."""

    root_url = "http://server"
    timeout_s = 3.0

    def __init__(self, *, keeps: int = 1) -> None:
        self.keeps, self.paused, self.version = keeps, False, "default"
        self.fails = False
        self.held: list[str] = []
        self.read: list[dict[str, torch.Tensor]] = []
        self.asked: list[tuple[str, str, int, float]] = []

    def is_paused(self) -> bool:
        return self.paused

    def clear_adapters(self) -> None:
        self.held = []

    def weight_version(self) -> str:
        return self.version

    def load_adapter(self, name: str, path: str, version: str, *, max_adapters: int, wait_s: float) -> Sequence[str]:
        if self.fails:
            raise PolicyServerError("answered 409")
        assert all(Path(held).is_dir() for held in self.held)
        read_adapter(path)
        self.read.append(load_file(Path(path) / "adapter_model.safetensors"))
        self.asked.append((name, version, max_adapters, wait_s))
        self.held = [*self.held, path][-self.keeps :]
        return self.held


def adapted(**lora: Any) -> PeftModel:
    model = get_peft_model(build_model(build_tokenizer(), tie=True, seed=0), LoraConfig(**{**LORA, **lora}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted()


def folders(tmp_path: Path) -> list[str]:
    return sorted(folder.name.rpartition("-")[0] for folder in next(tmp_path.iterdir()).iterdir())


def test_a_version_is_written_as_peft_would(tmp_path: Path, model: PeftModel) -> None:
    transport, server = AdapterTransport(tmp_path, max_adapters=3), Server()
    transport.connect(server)
    num_bytes = transport.send(AdapterSource(model), server, "12")
    transport.release()
    assert server.asked == [("policy@12", "12", 3, 3.0)]
    expected = get_peft_model_state_dict(model)
    assert server.read[0].keys() == expected.keys()
    assert all(torch.equal(server.read[0][name], tensor) for name, tensor in expected.items())
    written = Path(server.held[0])
    assert num_bytes == sum(file.stat().st_size for file in written.iterdir())
    assert json.loads((written / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "up_proj"]
    assert AdapterSource(model).metadata()[0].num_bytes > 0


def test_folders_live_as_long_as_the_server_may_read_them(tmp_path: Path, model: PeftModel) -> None:
    transport, server = AdapterTransport(tmp_path), Server(keeps=2)
    transport.connect(server)
    for version in range(5):
        transport.send(AdapterSource(model), server, str(version))
        transport.release()
    assert folders(tmp_path) == ["policy@2", "policy@3", "policy@4"]  # 2 was unlisted by the last sync only
    transport.disconnect()
    assert len(folders(tmp_path)) == 3  # the server may be there still
    transport.connect(server)
    assert folders(tmp_path) == []


def test_a_version_that_is_sent_again_overwrites_nothing(tmp_path: Path, model: PeftModel) -> None:
    transport, server = AdapterTransport(tmp_path), Server(keeps=2)
    for _ in range(2):
        transport.send(AdapterSource(model), server, "7")
    assert folders(tmp_path) == ["policy@7", "policy@7"]


def test_what_was_not_loaded_is_deleted(tmp_path: Path, model: PeftModel) -> None:
    transport, server = AdapterTransport(tmp_path), Server()
    transport.send(AdapterSource(model), server, "0")
    transport.release()
    server.fails = True
    with pytest.raises(PolicyServerError):
        transport.send(AdapterSource(model), server, "1")
    transport.release()
    assert folders(tmp_path) == ["policy@0"]


def test_nothing_is_left_when_the_transport_goes(tmp_path: Path, model: PeftModel) -> None:
    transport = AdapterTransport(tmp_path)
    transport.send(AdapterSource(model), Server(), "0")
    del transport
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_take_part_and_write_nothing(tmp_path: Path) -> None:
    class Stream:
        walked = 0

        def __iter__(self) -> Any:
            for _ in range(3):
                yield "name", torch.zeros(1)
                self.walked += 1

    stream = Stream()
    assert AdapterTransport(tmp_path).send(stream, None, "0") == 0
    assert stream.walked == 3 and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_after_the_stream_was_walked(
    tmp_path: Path, model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WeightSyncError, match=r"No space left.*gym_weight_dir"):
        AdapterTransport(tmp_path).send(AdapterSource(model), Server(), "0")
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_servers_whose_own_weights_are_not_the_checkpoints_are_refused(tmp_path: Path) -> None:
    server = Server()
    server.version = "14"
    with pytest.raises(WeightSyncError, match=r"version '14'.*Restart"):
        AdapterTransport(tmp_path).connect(server)
    server.paused = True
    with pytest.raises(WeightSyncError, match="is paused"):
        AdapterTransport(tmp_path).connect(server)
    with pytest.raises(ConfigError, match="gym_weight_dir"):
        AdapterTransport(tmp_path / "missing")
