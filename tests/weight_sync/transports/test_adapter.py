"""What is written where, told to whom and deleted when; and which adapters may go this way at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tests.policy_server.tiny_model import build_model, build_random_policy, build_tokenizer
from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, PolicyServerError, WeightSyncError
from trl_gym.policy_server.adapter_files import read_adapter
from trl_gym.weight_sync.transports.adapter import AdapterSource, AdapterTransport, adapter_options
from trl_gym.weight_sync.transports.plan import (
    AdapterPlan,
    adapter_problem,
    lora_flags,
    managed_flags,
    merged_problem,
    plan_adapter,
)

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
SERVER = {
    "lora_config": {"max_lora_rank": 8, "target_modules": ["q_proj", "up_proj"]},
    "parallel_config": {"data_parallel_external_lb": False, "data_parallel_hybrid_lb": False},
}


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

    def server_config(self) -> dict[str, Any]:
        return SERVER

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


# -- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "targets"),
    [
        ({"target_modules": None}, ("q_proj", "v_proj")),  # PEFT's own choice for this architecture
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, ("down_proj", "up_proj")),
        ({"target_modules": "all-linear", "r": 20}, tuple(sorted(["down", "gate", "k", "o", "q", "up", "v"]))),
    ],
)
def test_a_plan_is_made_before_the_model_is_loaded(tmp_path: Path, lora: dict[str, Any], targets: tuple) -> None:
    folder = build_random_policy(tmp_path)
    config = LoraConfig(**{**LORA, **lora})
    plan = plan_adapter(str(folder), config)
    assert tuple(name.removesuffix("_proj") for name in plan.targets) == tuple(
        name.removesuffix("_proj") for name in targets
    )
    assert (plan.rank, plan.problem) == (lora.get("r", 4), None)
    assert config.target_modules == LoraConfig(**{**LORA, **lora}).target_modules  # not changed by asking
    assert plan_adapter(build_model(build_tokenizer(), tie=True, seed=0), config) == plan
    assert plan_adapter(str(folder)) is None


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (4, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_ranks_are_those_that_vllm_has(rank: int, served: int) -> None:
    flags = lora_flags(AdapterPlan(rank, ("q_proj",), None), 3)
    assert (flags["max-lora-rank"], flags["max-loras"], flags["lora-target-modules"]) == (served, 3, ["q_proj"])


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens has an adapter"),
        ({"r": 513}, "its rank is 513"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_adapters_that_vllm_would_serve_wrongly(lora: dict[str, Any], text: str) -> None:
    assert text in adapter_problem(adapted(**lora))


def test_two_active_adapters_or_none(model: PeftModel) -> None:
    assert adapter_problem(model) is None
    assert "no LoRA adapter" in adapter_problem(model.get_base_model())
    two = adapted()
    two.add_adapter("second", LoraConfig(**LORA))
    two.base_model.set_adapter(["default", "second"])
    assert "2 adapters are active" in adapter_problem(two)


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ({"lora_config": None}, "without --enable-lora; start it with --enable-lora --max-loras 2 --max-lora-rank 8"),
        ({"lora_config": {"max_lora_rank": 1, "target_modules": None}}, "--max-lora-rank 1"),
        ({"lora_config": {"max_lora_rank": 8, "target_modules": None}}, "without --lora-target-modules"),
        ({"lora_config": {"max_lora_rank": 8, "target_modules": ["q_proj"]}}, "lacks up_proj"),
        ({"parallel_config": {"data_parallel_external_lb": True}}, "reaches only some"),
    ],
)
def test_servers_that_cannot_serve_it(model: PeftModel, server: dict[str, Any], text: str) -> None:
    assert adapter_problem(model, SERVER) is None
    assert text in adapter_problem(model, SERVER | server)


def quantized() -> PeftModel:
    """As far as our checks look: what transformers says of a model that bitsandbytes has quantized."""
    model = adapted()
    model.get_base_model().is_quantized = True
    model.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def test_quantized_bases_are_not_merged_into(model: PeftModel) -> None:
    assert merged_problem(model) is None
    assert merged_problem(nn.Linear(1, 1)) is None
    assert "quantized (bitsandbytes)" in merged_problem(quantized())


def test_the_options_of_a_run(tmp_path: Path, model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    def options(model: nn.Module, accepted: tuple[str, ...] = ("file",), **changes: Any) -> dict[str, Any]:
        args = GymGRPOConfig(
            str(tmp_path), use_cpu=True, gym_head_url="http://x", gym_weight_dir=str(tmp_path), **changes
        )
        return adapter_options(args, model, SimpleNamespace(client=Server(), weight_transports=accepted))

    caplog.set_level("INFO", logger="trl_gym.weight_sync.transports.adapter")
    assert options(model.get_base_model()) == options(model) == {"merged_problem": None}
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == ["'adapter' would send it alone"]
    assert options(adapted(use_dora=True)) == {"merged_problem": None}
    assert "it cannot be sent alone: use_dora" in caplog.records[-1].getMessage()
    assert isinstance(options(model, gym_weight_transport="adapter")["adapter"], AdapterTransport)
    assert isinstance(options(quantized())["adapter"], AdapterTransport)
    merged = options(model, ("file", "adapter"))  # whole weights cannot be replaced there
    assert isinstance(merged["adapter"], AdapterTransport) and "--enable-lora" in merged["merged_problem"]
    assert "use_dora" in options(adapted(use_dora=True), gym_weight_transport="adapter")["adapter_problem"]


def test_the_flags_of_a_server_that_we_start(tmp_path: Path, model: PeftModel) -> None:
    def flags(model: Any, lora: LoraConfig | None, **changes: Any) -> dict[str, Any]:
        args = GymGRPOConfig(str(tmp_path), use_cpu=True, gym_head_url="http://x", gym_max_adapters=3, **changes)
        return managed_flags(args, model, lora)

    folder = str(build_random_policy(tmp_path / "policy"))
    asked = {"gym_weight_transport": "adapter"}
    assert flags(folder, LoraConfig(**LORA)) == {}
    assert flags(folder, LoraConfig(**LORA), **asked)["max-loras"] == 3
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert flags(folder, LoraConfig(**LORA), model_init_kwargs=quantization)["enable-lora"]
    assert flags(quantized(), None)["enable-lora"]
    with pytest.raises(ConfigError, match="no LoRA adapter is trained"):
        flags(folder, None, **asked)
    with pytest.raises(ConfigError, match=r"quantized: bitsandbytes\), and use_dora"):
        flags(folder, LoraConfig(**LORA, use_dora=True), model_init_kwargs=quantization)
    stored = tmp_path / "policy" / "config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | quantization))
    with pytest.raises(ConfigError, match=r"vLLM has no bitsandbytes since 0\.31"):
        flags(folder, LoraConfig(**LORA))
