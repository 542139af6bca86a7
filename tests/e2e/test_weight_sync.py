"""Weights reach a real vLLM server and it computes with them; where they cannot, the error is clear and nothing hangs.

`ipc` and `nccl` go as far as they do without a GPU: up to the first call of CUDA, on both sides. Their data path is in
`tests/weight_sync/transports/test_gpu.py`.
"""

from __future__ import annotations

import base64
import pickle
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from tests.e2e.servers import OneAtATime, random_like
from tests.policy_server.tiny_model import build_model, build_random_policy, build_tokenizer
from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, PolicyServerError, WeightSyncError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.server import PolicyServer
from trl_gym.weight_sync import vllm_transfer
from trl_gym.weight_sync.protocol import WeightTransport
from trl_gym.weight_sync.source import WeightSource
from trl_gym.weight_sync.sync import SyncOptions, WeightSync, compare, probe_batch, trainer_logprobs
from trl_gym.weight_sync.transports.file import FileTransport
from trl_gym.weight_sync.transports.ipc import ENVIRONMENT, IpcTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport
from trl_gym.weight_sync.transports.plan import plan_transport

pytestmark = pytest.mark.e2e

HELD_OUT = probe_batch(256, seed=1)  # ids below the size of the vocabulary
MAX_GAP = 1e-4  # nats, mean; both sides compute in float32


@contextmanager
def serving(folder: Path, *, backend: str) -> Iterator[PolicyServer]:
    model = build_random_policy(folder / "policy")
    flags = {
        "max-model-len": 512,
        "enforce-eager": True,
        "dtype": "float32",
        "weight-transfer-config": f'{{"backend": "{backend}"}}',
    }
    with PolicyServer(
        model,
        vllm_args=flags,
        env=ENVIRONMENT if backend == "ipc" else {},
        log_dir=folder / "logs",
        start_timeout_s=400.0,
    ) as server:
        yield server


def policy(seed: int) -> torch.nn.Module:
    return build_model(build_tokenizer(), tie=True, seed=seed)


def gap(client: PolicyClient, model: torch.nn.Module) -> float:
    return compare(trainer_logprobs(model, HELD_OUT), client.prompt_logprobs(HELD_OUT)).mean_gap


def sync_with(server: PolicyServer, **options: Any) -> WeightSync:
    return WeightSync(Accelerator(cpu=True), server, FileTransport(), SyncOptions(dtype=torch.float32, **options))


def transport_to(server: PolicyServer, *, on_cuda: bool = False, **options: Any) -> WeightTransport:
    args = GymGRPOConfig("unused", use_cpu=True, gym_head_url="http://x", **options)
    return plan_transport(args, policy(seed=0), on_cuda=on_cuda).connect(server)


# -- file -------------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A shared server that takes files, and the policy whose shapes it has."""

    server: PolicyServer
    model: Path

    @property
    def client(self) -> PolicyClient:
        return self.server.client

    def policy(self, seed: int) -> torch.nn.Module:
        return random_like(self.model, seed)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("tied", marks=pytest.mark.shares("random")),
        pytest.param("untied", marks=pytest.mark.shares("untied")),
    ],
)
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "tied":
        return Target(request.getfixturevalue("served").server, request.getfixturevalue("random_policy"))
    return Target(request.getfixturevalue("untied_pair").policy, request.getfixturevalue("untied_policy"))


def test_a_merged_adapter_arrives(target: Target) -> None:
    adapted = get_peft_model(target.policy(seed=20), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    base_gap = gap(target.client, adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    sync_with(target.server).push(adapted, 3)
    assert gap(target.client, adapted) < MAX_GAP
    with adapted.disable_adapter():
        assert gap(target.client, adapted) > 0.01  # it is the adapter that arrived, not its base
    assert base_gap > 0.1


def test_after_the_first_sync_a_part_is_enough(target: Target) -> None:
    model = target.policy(seed=30)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1.mlp.down_proj" in name or "layers.0.self_attn.k_proj" in name
    sync = sync_with(target.server, only_trainable=True)
    whole = sync.push(model, 4).num_bytes
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert gap(target.client, model) > 0.01
    assert sync.push(model, 5).num_bytes < 0.5 * whole
    assert gap(target.client, model) < MAX_GAP


def test_memory_that_is_full_leaves_the_server_as_it_was(target: Target) -> None:
    old, new = target.policy(seed=40), target.policy(seed=41)
    sync = sync_with(target.server)
    sync.push(old, 6)
    sync.disconnect()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # stands for a full /dev/shm
    try:
        with pytest.raises(WeightSyncError, match=r"/dev/shm: .*\(File too large\).* MB are needed.*Raise that limit"):
            sync.push(new, 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.client.is_paused()
    assert target.client.weight_version() == "6"
    target.client.resume()
    assert gap(target.client, old) < MAX_GAP
    sync.push(new, 7)
    assert gap(target.client, new) < MAX_GAP


def test_an_incomplete_update_is_refused_and_a_complete_one_mends_it(target: Target, tmp_path: Path) -> None:
    client, model = target.client, target.policy(seed=50)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    half = [name for name in weights if "layers.1." not in name]
    unpacked = ["model.layers.0.self_attn.q_proj.weight"]

    def update(names: list[str], *, partial: bool) -> None:
        save_file({name: weights[name].contiguous() for name in names}, tmp_path / "weights")
        client.start_weight_update()
        client.update_weights({"path": str(tmp_path / "weights"), "partial": partial})
        client.finish_weight_update("8")

    client.pause()
    for names, is_part, reason in (
        (half, False, "the update lacks"),
        (half, True, "only a complete one can follow"),
        (list(weights), False, None),
        (unpacked, True, "k_proj"),
        (list(weights), False, None),
    ):
        if reason is None:
            update(names, partial=is_part)
        else:
            with pytest.raises(PolicyServerError, match=reason):
                update(names, partial=is_part)
            client.abandon_weight_update()
    client.reset_caches()
    client.resume()
    assert gap(client, model) < MAX_GAP


def test_a_server_that_cannot_read_our_files_is_refused_before_anything_is_sent(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = FileTransport(tmp_path)
    elsewhere = target.client.patient(60.0)
    forward = elsewhere.init_weight_transfer
    monkeypatch.setattr(  # as on a host that has another disk under this path
        elsewhere, "init_weight_transfer", lambda info: forward({**info, "probe": f"{info['probe']}.elsewhere"})
    )
    with pytest.raises(WeightSyncError, match=r"cannot read what the trainer wrote.*No such file.*`gym_weight_dir`"):
        transport.connect(elsewhere)
    assert list(tmp_path.iterdir()) == []
    assert target.client.health()


# -- ipc and nccl, without a GPU --------------------------------------------------------------------------------------


class Walked:
    """A stream that says whether it was walked to its end."""

    def __init__(self, source: WeightSource) -> None:
        self.source, self.is_over = source, False
        self.metadata = source.metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.source
        self.is_over = True


def stream() -> Walked:
    return Walked(WeightSource(policy(seed=1)))


def samples_as_before(client: PolicyClient) -> bool:
    client.abandon_weight_update()
    client.start_weight_update()  # it takes another one
    client.abandon_weight_update()
    client.resume()
    return gap(client, policy(seed=0)) < MAX_GAP


@pytest.fixture(scope="module")
def nccl_server(warm: None, running: OneAtATime, tmp_path_factory: pytest.TempPathFactory) -> PolicyServer:
    return running.get("nccl", partial(serving, tmp_path_factory.mktemp("nccl"), backend="nccl"))


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The trainer's side of NCCL waits for a peer that never comes, as NCCL does."""
    event = threading.Event()
    monkeypatch.setattr(vllm_transfer, "join_nccl", lambda *_, **__: event.wait())
    monkeypatch.setattr(vllm_transfer, "broadcast", lambda *_, **__: event.wait())
    monkeypatch.setattr(vllm_transfer, "staged", lambda tensor, device: tensor.clone())
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    yield event
    event.set()


def test_a_server_for_nccl_is_refused_by_a_trainer_without_cuda(nccl_server: PolicyServer) -> None:
    assert nccl_server.weight_transports == ("nccl",)
    with pytest.raises(ConfigError, match=r"takes weights by `nccl`.*does not compute on CUDA devices"):
        transport_to(nccl_server)
    with pytest.raises(ConfigError, match=r"'file', and the policy server at .* was started for nccl"):
        transport_to(nccl_server, gym_weight_transport="file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_nccl_without_a_gpu_in_the_trainer(nccl_server: PolicyServer) -> None:
    with pytest.raises(WeightSyncError, match="needs a CUDA device in the trainer's process"):
        NcclTransport().connect(nccl_server.client)
    assert not nccl_server.client.is_paused()


@pytest.mark.usefixtures("stuck")
def test_nccl_servers_refusal_ends_a_rendezvous_that_hangs(nccl_server: PolicyServer) -> None:
    with pytest.raises(PolicyServerError, match=r"init_weight_transfer_engine: HTTP 500.*accelerator device"):
        NcclTransport().connect(nccl_server.client)
    assert nccl_server.client.health()


@pytest.mark.usefixtures("stuck")
def test_nccl_servers_refusal_ends_a_broadcast_that_hangs(nccl_server: PolicyServer) -> None:
    client, weights = nccl_server.client, stream()
    transport = NcclTransport()
    transport._link = vllm_transfer.NcclLink(communicator=None, device=0)
    client.pause()
    client.start_weight_update()
    with pytest.raises(PolicyServerError, match=r"update_weights: HTTP 500.*NCCL weight transfer not initialized"):
        transport.send(weights, client, "1")
    assert weights.is_over
    assert samples_as_before(client)


@pytest.fixture(scope="module")
def ipc_server(warm: None, running: OneAtATime, tmp_path_factory: pytest.TempPathFactory) -> PolicyServer:
    return running.get("ipc", partial(serving, tmp_path_factory.mktemp("ipc"), backend="ipc"))


def one_handle(parameters: Any, weights: Any, post: Callable[[dict[str, Any]], None], **_: Any) -> None:
    """What the trainer's side sends for a GPU that the server does not have."""
    handles = base64.b64encode(pickle.dumps({"GPU-4711": (None,) * 7})).decode()
    for name, tensor in weights:
        post(
            {
                "names": [name],
                "dtype_names": ["float32"],
                "shapes": [list(tensor.shape)],
                "tensor_sizes": [tensor.nbytes],
                "ipc_handles_pickled": handles,
            }
        )


def test_ipc_is_for_gpus(ipc_server: PolicyServer) -> None:
    assert ipc_server.weight_transports == ("ipc",)
    assert ipc_server.client.server_environment()["VLLM_ALLOW_INSECURE_SERIALIZATION"]
    with pytest.raises(ConfigError, match=r"takes weights by `ipc`.*does not compute on CUDA devices"):
        transport_to(ipc_server)
    assert isinstance(transport_to(ipc_server, on_cuda=True), IpcTransport)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_ipc_without_a_gpu_in_the_trainer(ipc_server: PolicyServer) -> None:
    client, weights, transport = ipc_server.client, stream(), IpcTransport()
    transport.connect(client)
    client.pause()
    client.start_weight_update()
    with pytest.raises(WeightSyncError, match="could not be sent by CUDA IPC"):
        transport.send(weights, client, "1")
    assert weights.is_over
    assert samples_as_before(client)


def test_ipc_servers_refusal_is_raised_when_every_rank_is_through(
    ipc_server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_transfer, "send_ipc", one_handle)
    client, weights, transport = ipc_server.client, stream(), IpcTransport()
    transport.connect(client)
    client.pause()
    client.start_weight_update()
    with pytest.raises(PolicyServerError, match="update_weights: HTTP 500"):
        transport.send(weights, client, "1")
    assert weights.is_over
    assert samples_as_before(client)
