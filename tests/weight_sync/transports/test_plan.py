"""Which transport is chosen, and what a refusal says; no server and no GPU is needed for that."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.policy_server.tiny_model import build_random_policy
from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, UnsupportedVersionError
from trl_gym.run.servers import server_flags
from trl_gym.weight_sync.transports import (
    FileTransport,
    IpcTransport,
    NcclTransport,
    TransportOptions,
    choose_transport,
    environment_for,
    planned_backend,
)
from trl_gym.weight_sync.transports.plan import is_this_host

HERE, THERE = "http://127.0.0.1:8000/v1", "http://192.0.2.7:8000/v1"  # the second one is nobody's
ADAPTER: Any = SimpleNamespace(name="adapter")


def server(*accepted: str, url: str = HERE, placement: str = "colocate", pickle: bool = True) -> Any:
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": pickle}
    return SimpleNamespace(
        base_url=url,
        placement=placement,
        weight_transports=accepted,
        client=SimpleNamespace(server_environment=lambda: environment),
    )


@pytest.mark.parametrize(
    ("wanted", "on_cuda", "shares_devices", "expected"),
    [
        ("auto", False, True, "file"),
        ("auto", False, False, "file"),
        ("auto", True, True, "ipc"),
        ("auto", True, False, "nccl"),
        ("adapter", True, True, "ipc"),
        ("adapter", False, True, "file"),
        ("file", True, True, "file"),
        ("ipc", True, True, "ipc"),
        ("nccl", True, False, "nccl"),
    ],
)
def test_the_backend_of_a_server_that_we_start(
    wanted: str, on_cuda: bool, shares_devices: bool, expected: str
) -> None:
    assert planned_backend(wanted, on_cuda=on_cuda, shares_devices=shares_devices) == expected


@pytest.mark.parametrize(
    ("wanted", "on_cuda", "shares_devices", "remedy"),
    [
        ("ipc", False, True, "use 'file'"),
        ("nccl", False, False, "use 'file'"),
        ("ipc", True, False, "use 'nccl'"),
        ("nccl", True, True, "use 'ipc'"),
    ],
)
def test_a_wish_that_cannot_work_is_refused_before_a_server_is_started(
    wanted: str, on_cuda: bool, shares_devices: bool, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=f"`gym_weight_transport` is '{wanted}'.*{remedy}"):
        planned_backend(wanted, on_cuda=on_cuda, shares_devices=shares_devices)


def test_a_server_that_we_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = GymGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, gym_config_paths=["env.yaml"], max_completion_length=16, report_to=[]
    )
    model = str(build_random_policy(tmp_path / "policy"))
    assert json.loads(server_flags(args, model)["weight-transfer-config"]) == {"backend": "file"}
    args.gym_weight_transport = "ipc"
    with pytest.raises(ConfigError, match="`gym_weight_transport` is 'ipc'"):
        server_flags(args, model)


def test_only_ipc_lets_the_server_unpickle() -> None:
    assert environment_for("ipc") == {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    assert environment_for("nccl") == environment_for("file") == {}


@pytest.mark.parametrize(
    ("accepted", "on_cuda", "expected"),
    [("file", False, FileTransport), ("ipc", True, IpcTransport), ("nccl", True, NcclTransport)],
)
def test_the_server_decides(accepted: str, on_cuda: bool, expected: type) -> None:
    for wanted in ("auto", accepted):
        assert isinstance(choose_transport(server(accepted), TransportOptions(wanted, on_cuda=on_cuda)), expected)


def test_another_wish_than_the_server_was_started_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'nccl', and the policy server at .* was started for file"):
        choose_transport(server("file"), TransportOptions("nccl", on_cuda=True))
    with pytest.raises(ConfigError, match="takes weights by sparse_nccl only"):
        choose_transport(server("sparse_nccl"), TransportOptions())
    with pytest.raises(ConfigError, match="takes weights by nothing only"):
        choose_transport(server(), TransportOptions())


@pytest.mark.parametrize("name", ["ipc", "nccl"])
def test_cuda_is_needed_on_our_side_too(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`.*does not compute on CUDA devices"):
        choose_transport(server(name), TransportOptions())


@pytest.mark.parametrize("name", ["ipc", "nccl"])
def test_vllm_is_needed_on_our_side_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_gym.compat.installed_version", lambda package: None)
    with pytest.raises(UnsupportedVersionError, match="vllm is not installed"):
        choose_transport(server(name), TransportOptions(on_cuda=True))


def test_a_server_on_another_host_needs_a_shared_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"192.0.2.7 is another host.*`gym_weight_dir`"):
        choose_transport(server("file", url=THERE), TransportOptions())
    with pytest.raises(ConfigError, match=r"192.0.2.7 is another host"):
        choose_transport(server("file", url=f"{HERE},{THERE}"), TransportOptions())  # several servers
    chosen = choose_transport(server("file", url=THERE), TransportOptions(folder=str(tmp_path)))
    assert isinstance(chosen, FileTransport)


def test_ipc_is_for_loopback_and_for_servers_that_may_unpickle() -> None:
    options = TransportOptions(on_cuda=True)
    with pytest.raises(ConfigError, match=r"192.0.2.7 is not a loopback address"):
        choose_transport(server("ipc", url=THERE), options)
    with pytest.raises(ConfigError, match="started without VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
        choose_transport(server("ipc", placement="server", pickle=False), options)
    assert isinstance(choose_transport(server("ipc", placement="server"), options), IpcTransport)


def test_an_adapter_is_sent_when_asked_for_or_when_nothing_else_can_be() -> None:
    quantized = "the base is quantized"
    for options in (
        TransportOptions("adapter", adapter=ADAPTER),
        TransportOptions("auto", adapter=ADAPTER, merged_problem=quantized),
    ):
        assert choose_transport(server("file", "adapter"), options) is ADAPTER
    assert isinstance(choose_transport(server("file", "adapter"), TransportOptions(adapter=ADAPTER)), FileTransport)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TransportOptions("adapter"), "'adapter', and no LoRA adapter is trained"),
        (TransportOptions("adapter", adapter=ADAPTER, adapter_problem="it uses DoRA"), "'adapter', and it uses DoRA"),
        (TransportOptions(merged_problem="it is quantized", adapter_problem="DoRA"), "it is quantized; but DoRA"),
        (TransportOptions("file", merged_problem="it is quantized"), "it is quantized; use 'adapter'"),
    ],
)
def test_what_an_adapter_cannot_do_is_said(options: TransportOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_transport(server("file", "adapter"), options)


def test_which_hosts_are_this_one() -> None:
    assert is_this_host("localhost") and is_this_host("127.0.0.1") and is_this_host("::1")
    assert not is_this_host("192.0.2.7")
    assert not is_this_host("no-such-host.invalid")
