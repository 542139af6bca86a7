"""The transport that is chosen, and what a refusal says; neither a server nor a GPU is needed for that."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.policy_server.tiny_model import build_model, build_random_policy, build_tokenizer
from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, UnsupportedVersionError
from trl_gym.run.servers import server_options
from trl_gym.weight_sync import sglang_transfer
from trl_gym.weight_sync.source import quantization_of
from trl_gym.weight_sync.transports.adapter import AdapterTransport
from trl_gym.weight_sync.transports.file import FileTransport
from trl_gym.weight_sync.transports.ipc import IpcTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport
from trl_gym.weight_sync.transports.plan import (
    AdapterPlan,
    TransportPlan,
    is_this_host,
    lora_flags,
    plan_adapter,
    plan_transport,
    server_problem,
)
from trl_gym.weight_sync.transports.shared import SharedTransport

HERE, THERE = "http://127.0.0.1:8000/v1", "http://192.0.2.7:8000/v1"  # the second one is no one's
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
SERVED = {
    "lora_config": {"max_lora_rank": 8, "target_modules": ["q_proj", "up_proj"]},
    "parallel_config": {"data_parallel_external_lb": False, "data_parallel_hybrid_lb": False},
}
QUANTIZATION = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def server(*accepted: str, url: str = HERE, pickle: bool = True, engine: str = "vllm", **config: Any) -> Any:
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": pickle}
    return SimpleNamespace(
        base_urls=tuple(url.split(",")),
        weight_transports=accepted,
        client=SimpleNamespace(
            server_environment=lambda: environment,
            server_config=lambda: SERVED | config,
            info=lambda: {"engine": engine},
        ),
    )


def args(**options: Any) -> GymGRPOConfig:
    return GymGRPOConfig("unused", use_cpu=True, gym_head_url="http://x", **options)


def plan(wanted: str = "auto", model: Any = None, *, on_cuda: bool = False, **options: Any) -> TransportPlan:
    model = nn.Linear(1, 1) if model is None else model
    return plan_transport(args(gym_weight_transport=wanted, **options), model, on_cuda=on_cuda)


def adapted(**lora: Any) -> PeftModel:
    return get_peft_model(build_model(build_tokenizer(), tie=True, seed=0), LoraConfig(**{**LORA, **lora}))


@pytest.fixture(scope="module")
def lora() -> PeftModel:
    return adapted()


def quantized(**lora: Any) -> PeftModel:
    """As far as our checks look: what transformers says of a model that bitsandbytes has quantized."""
    model = adapted(**lora)
    model.get_base_model().is_quantized = True
    model.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


# -- before a server is started ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "on_cuda", "devices", "expected"),
    [
        ("auto", False, None, "file"),
        ("auto", False, "6,7", "file"),
        ("auto", True, None, "ipc"),
        ("auto", True, "6,7", "nccl"),
        ("file", True, None, "file"),
        ("ipc", True, None, "ipc"),
        ("nccl", True, "6,7", "nccl"),
    ],
)
def test_a_server_that_we_start_gets_a_backend_and_its_environment(
    wanted: str, on_cuda: bool, devices: str | None, expected: str
) -> None:
    chosen = plan(wanted, on_cuda=on_cuda, gym_server_devices=devices)
    assert chosen.backend == expected
    assert json.loads(chosen.server_flags()["weight-transfer-config"]) == {"backend": expected}
    unpickles = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if expected == "ipc" else {}
    assert chosen.server_environment() == unpickles


@pytest.mark.parametrize(
    ("wanted", "on_cuda", "devices", "remedy"),
    [
        ("ipc", False, None, "Use 'file'"),
        ("nccl", False, "6,7", "Use 'file'"),
        ("ipc", True, "6,7", "Use 'nccl'"),
        ("nccl", True, None, "Use 'ipc'"),
    ],
)
def test_a_wish_that_cannot_work_is_refused_before_a_server_is_started(
    wanted: str, on_cuda: bool, devices: str | None, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=f"`gym_weight_transport` is '{wanted}'") as caught:
        plan(wanted, on_cuda=on_cuda, gym_server_devices=devices).server_flags()
    assert caught.value.remedy.startswith(remedy)


def test_a_server_that_we_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = str(build_random_policy(tmp_path / "policy"))
    flags, environment = server_options(args(), model)
    assert (json.loads(flags["weight-transfer-config"]), environment) == ({"backend": "file"}, {})
    with pytest.raises(ConfigError, match="`gym_weight_transport` is 'ipc'"):
        server_options(args(gym_weight_transport="ipc"), model)


def test_the_flags_of_a_server_for_adapters(tmp_path: Path) -> None:
    def flags(model: Any, lora: LoraConfig | None, **options: Any) -> dict[str, Any]:
        told = plan_transport(args(gym_max_adapters=3, **options), model, lora, on_cuda=False).server_flags()
        assert json.loads(told.pop("weight-transfer-config")) == {"backend": "file"}
        return told

    folder = str(build_random_policy(tmp_path / "policy"))
    asked = {"gym_weight_transport": "adapter"}
    assert flags(folder, LoraConfig(**LORA)) == {}
    assert flags(folder, LoraConfig(**LORA), **asked, gym_max_staleness=2)["max-loras"] == 3
    with pytest.raises(ConfigError, match="`gym_max_adapters` is 3 and `gym_max_staleness` 3") as caught:
        flags(folder, LoraConfig(**LORA), **asked, gym_max_staleness=3)
    assert caught.value.remedy == "Set `gym_max_adapters` to 4 or more."
    assert flags(folder, LoraConfig(**LORA), gym_max_staleness=3) == {}
    assert flags(folder, LoraConfig(**LORA), model_init_kwargs=QUANTIZATION)["enable-lora"]
    assert flags(quantized(), None)["enable-lora"]
    with pytest.raises(ConfigError, match="no LoRA adapter is trained"):
        flags(folder, None, **asked)
    with pytest.raises(ConfigError, match=r"quantized, bitsandbytes\), and use_dora"):
        flags(folder, LoraConfig(**LORA, use_dora=True), model_init_kwargs=QUANTIZATION)
    stored = tmp_path / "policy" / "config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | QUANTIZATION))
    with pytest.raises(ConfigError, match=r"vLLM has no bitsandbytes since 0\.31"):
        flags(folder, LoraConfig(**LORA))


def test_before_and_after_loading_the_plan_is_the_same(tmp_path: Path) -> None:
    folder = str(build_random_policy(tmp_path / "policy"))
    for wanted in ("auto", "file", "adapter"):
        for init in ({}, QUANTIZATION):
            if wanted == "file" and init:
                continue
            options = args(gym_weight_transport=wanted, model_init_kwargs=init)
            before = plan_transport(options, folder, LoraConfig(**LORA), on_cuda=False)
            after = plan_transport(options, quantized() if init else adapted(), on_cuda=False)
            assert (before.sends_adapter, before.quantized) == (after.sends_adapter, after.quantized)
            assert before.server_flags() == after.server_flags()


# -- with a server that is ready --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "on_cuda", "expected"),
    [("file", False, FileTransport), ("ipc", True, IpcTransport), ("nccl", True, NcclTransport)],
)
def test_the_server_decides(accepted: str, on_cuda: bool, expected: type) -> None:
    for wanted in ("auto", accepted):
        assert isinstance(plan(wanted, on_cuda=on_cuda).connect(server(accepted)), expected)


def test_another_wish_than_the_server_was_started_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'nccl', and the policy server at .* was started for file"):
        plan("nccl", on_cuda=True).connect(server("file"))
    with pytest.raises(ConfigError, match="takes weights by sparse_nccl only"):
        plan().connect(server("sparse_nccl"))
    with pytest.raises(ConfigError, match="takes weights by nothing only"):
        plan().connect(server())


@pytest.mark.parametrize("name", ["ipc", "nccl"])
def test_cuda_is_needed_on_our_side_too(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`.*does not compute on CUDA devices"):
        plan().connect(server(name))


@pytest.mark.parametrize("name", ["ipc", "nccl"])
def test_vllm_is_needed_on_our_side_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_gym.compat.installed_version", lambda package: None)
    with pytest.raises(UnsupportedVersionError, match="vllm is not installed"):
        plan(on_cuda=True).connect(server(name))


def test_an_adapter_for_sglang(lora: PeftModel) -> None:
    told = plan("adapter", lora, on_cuda=True, gym_max_adapters=4).sglang_flags()
    assert (told["max-lora-rank"], told["max-loaded-loras"], told["max-loras-per-batch"]) == (LORA["r"], 5, 5)
    assert told["lora-target-modules"] == sorted(LORA["target_modules"])
    with pytest.raises(ConfigError, match="SGLang serves adapters with a GPU only"):
        plan("adapter", lora).sglang_flags()
    assert plan("auto", on_cuda=True).sglang_flags() == {}


def test_a_broadcast_to_sglang_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_gym.compat.installed_version", lambda package: None)
    chosen = plan("nccl", on_cuda=True).connect(server("file", "nccl", engine="sglang"))
    assert isinstance(chosen, NcclTransport) and chosen._transfer is sglang_transfer
    assert isinstance(plan(on_cuda=True).connect(server("file", "nccl", engine="sglang")), FileTransport)


def test_a_server_on_another_host_needs_a_shared_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"192.0.2.7 is another host.*`gym_weight_dir`"):
        plan().connect(server("file", url=THERE))
    with pytest.raises(ConfigError, match=r"192.0.2.7 is another host"):
        plan().connect(server("file", url=f"{HERE},{THERE}"))  # several servers
    assert isinstance(plan(gym_weight_dir=str(tmp_path)).connect(server("file", url=THERE)), FileTransport)


def test_ipc_is_for_loopback_and_for_servers_that_may_unpickle() -> None:
    with pytest.raises(ConfigError, match=r"192.0.2.7 is not a loopback address"):
        plan(on_cuda=True).connect(server("ipc", url=THERE))
    with pytest.raises(ConfigError, match=r"192.0.2.7 is not a loopback address"):
        plan(on_cuda=True).connect(server("ipc", url=f"{HERE},{THERE}"))  # several servers
    with pytest.raises(ConfigError, match="started without VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
        plan(on_cuda=True).connect(server("ipc", pickle=False))
    assert isinstance(plan(on_cuda=True).connect(server("ipc")), IpcTransport)


def test_which_hosts_are_this_one() -> None:
    assert is_this_host("localhost") and is_this_host("127.0.0.1") and is_this_host("::1")
    assert not is_this_host("192.0.2.7")
    assert not is_this_host("no-such-host.invalid")


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_sent_when_asked_for_or_when_nothing_else_can_be(
    lora: PeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    ready, without = server("file", "adapter"), server("file")
    assert isinstance(plan("adapter", lora).connect(ready), AdapterTransport)
    assert isinstance(plan("auto", quantized()).connect(ready), AdapterTransport)
    assert isinstance(plan("auto", lora).connect(ready), AdapterTransport)  # wrapped layers take no whole weights
    caplog.set_level("INFO", logger="trl_gym.weight_sync.transports.plan")
    assert isinstance(plan("auto", lora.get_base_model()).connect(without), FileTransport)
    assert isinstance(plan("auto", lora).connect(without), FileTransport)
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == ["'adapter' would send it alone"]
    assert isinstance(plan("auto", adapted(use_dora=True)).connect(without), FileTransport)
    assert "it cannot be sent alone: use_dora" in caplog.records[-1].getMessage()


def test_what_an_adapter_cannot_do_is_said(lora: PeftModel) -> None:
    with pytest.raises(ConfigError, match=r"'adapter'\), and no LoRA adapter is trained"):
        plan("adapter", lora.get_base_model())
    with pytest.raises(ConfigError, match=r"'adapter'\), and use_dora"):
        plan("adapter", adapted(use_dora=True))
    with pytest.raises(ConfigError, match=r"base is quantized, bitsandbytes\), and use_dora"):
        plan("auto", quantized(use_dora=True))
    with pytest.raises(ConfigError, match=r"'file', and the base is quantized.*Set it to 'adapter'"):
        plan("file", quantized())
    with pytest.raises(ConfigError, match=r"'file', and the policy server was started with --enable-lora"):
        plan("file", lora).connect(server("file", "adapter"))
    with pytest.raises(ConfigError, match=r"started with --enable-lora\), and no LoRA adapter is trained"):
        plan("auto", lora.get_base_model()).connect(server("file", "adapter"))
    with pytest.raises(ConfigError, match=r"without --enable-lora.*Start it with --enable-lora"):
        plan("adapter", lora).connect(server("file", lora_config=None))


def test_quantized_bases_are_known(lora: PeftModel) -> None:
    assert quantization_of(lora.get_base_model()) is None and quantization_of(nn.Linear(1, 1)) is None
    assert quantization_of(quantized().get_base_model()) == "bitsandbytes"
    packed = nn.Linear(1, 1)
    packed.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.uint8), requires_grad=False)
    assert quantization_of(packed) == "unknown"


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
    found = plan_adapter(str(folder), config)
    assert tuple(name.removesuffix("_proj") for name in found.targets) == tuple(
        name.removesuffix("_proj") for name in targets
    )
    assert (found.rank, found.problem) == (lora.get("r", 4), None)
    assert config.target_modules == LoraConfig(**{**LORA, **lora}).target_modules  # not changed by asking
    assert plan_adapter(build_model(build_tokenizer(), tie=True, seed=0), config) == found
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
    assert text in plan_adapter(adapted(**lora)).problem


def test_two_active_adapters_or_none(lora: PeftModel) -> None:
    assert plan_adapter(lora).problem is None
    assert plan_adapter(lora.get_base_model()) is None
    two = adapted()
    two.add_adapter("second", LoraConfig(**LORA))
    two.base_model.set_adapter(["default", "second"])
    assert "2 adapters are active" in plan_adapter(two).problem


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"lora_config": None}, "without --enable-lora. Start it with --enable-lora --max-loras 2 --max-lora-rank 8"),
        ({"lora_config": {"max_lora_rank": 1, "target_modules": None}}, "--max-lora-rank 1"),
        ({"lora_config": {"max_lora_rank": 8, "target_modules": None}}, "without --lora-target-modules"),
        ({"lora_config": {"max_lora_rank": 8, "target_modules": ["q_proj"]}}, "lacks up_proj"),
        ({"parallel_config": {"data_parallel_external_lb": True}}, "reaches only some"),
    ],
)
def test_servers_that_cannot_serve_it(lora: PeftModel, config: dict[str, Any], text: str) -> None:
    assert server_problem(plan_adapter(lora), SERVED) is None
    assert text in str(server_problem(plan_adapter(lora), SERVED | config))


# -- an engine in the trainer's process -------------------------------------------------------------------------------


def test_an_engine_in_this_process_shares_the_weights_whatever_they_are(lora: PeftModel) -> None:
    for model in (nn.Linear(1, 1), lora, quantized()):
        shared = plan_transport(args(), model, on_cuda=True, shares_weights=True)
        assert isinstance(shared.connect(server("shared")), SharedTransport) and shared.adapter is None


def test_a_server_of_its_own_does_not(lora: PeftModel) -> None:
    with pytest.raises(ConfigError, match="has a process of its own"):
        plan("shared", lora)


def test_nothing_is_walked_and_nothing_sent() -> None:
    class Untouched:
        def metadata(self) -> Any:
            raise AssertionError("no name is asked for")

        def __iter__(self) -> Any:
            raise AssertionError("no tensor is gathered")

    transport = SharedTransport()
    assert transport.replaces and transport.name == "shared"
    assert transport.send(Untouched(), None, "3") == 0
