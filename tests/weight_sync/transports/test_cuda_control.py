"""Control flow of `ipc` and `nccl` with both ends replaced: order, failures, and that every rank walks its stream.

With a real server, up to the first call of CUDA: `tests/e2e/test_weight_sync.py`. The data path, on GPUs:
`test_transports_gpu.py`.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.weight_sync.streams import Stream
from trl_gym.errors import PolicyServerError, PolicyServerLostError, WeightSyncError
from trl_gym.weight_sync import vllm_transfer
from trl_gym.weight_sync.transports import nccl
from trl_gym.weight_sync.transports.ipc import IpcTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport, local_address

TENSORS = {"a": torch.ones(300_000), "b": torch.ones(()), "c": torch.ones(2, 3)}


class Server:
    """The server's side of one transfer; `fail` makes a call raise, `hang` makes it wait until the test is over."""

    def __init__(
        self, *, fail: str = "", hang: str = "", timeout_s: float = 60.0, error: PolicyServerError | None = None
    ) -> None:
        self.root_url, self.base_urls = "http://127.0.0.1:1", ("http://127.0.0.1:1/v1",)
        self.api_key, self.timeout_s = None, timeout_s
        self.over = threading.Event()
        self.calls: list[tuple[str, Any]] = []
        self._fail, self._hang, self._error = fail, hang, error

    def world_size(self) -> int:
        return 3

    def abandon_weight_update(self) -> bool:
        self.calls.append(("abandon_weight_update", None))
        return False

    def init_weight_transfer(self, info: dict[str, Any]) -> None:
        self._answer("init_weight_transfer", info)

    def update_weights(self, info: dict[str, Any]) -> None:
        self._answer("update_weights", info)

    def _answer(self, name: str, info: dict[str, Any]) -> None:
        self.calls.append((name, info))
        if name == self._hang:
            self.over.wait()
        if name == self._fail:
            raise self._error or PolicyServerError(f"{name} answered 500")


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """CUDA and NCCL, as far as the control flow sees them; `hang` makes one of the two block."""
    wire = SimpleNamespace(sent=[], hang="", over=threading.Event(), aborted=0, joined=None)

    def join_nccl(listener: socket.socket, **options: Any) -> Any:
        wire.joined = options
        listener.close()
        if wire.hang == "join":
            wire.over.wait()
        return SimpleNamespace(device=0, abort=lambda: setattr(wire, "aborted", wire.aborted + 1))

    def broadcast(link: Any, tensors: Any, buffer_bytes: int) -> None:
        if wire.hang == "broadcast":
            wire.over.wait()
        wire.sent += [name for name, _ in tensors]

    monkeypatch.setattr(vllm_transfer, "join_nccl", join_nccl)
    monkeypatch.setattr(vllm_transfer, "broadcast", broadcast)
    monkeypatch.setattr(vllm_transfer, "staged", lambda tensor, device: tensor.clone())
    monkeypatch.setattr(nccl, "_own_client", lambda client: client)
    monkeypatch.setattr(vllm_transfer, "own_device", lambda: 0)
    yield wire
    wire.over.set()


def test_a_broadcast_arrives_in_the_order_that_was_announced(wire: SimpleNamespace) -> None:
    server, transport = Server(), NcclTransport(buffer_mb=1)
    transport.connect(server)
    assert wire.joined["world_size"] == 4
    init = dict(server.calls)["init_weight_transfer"]
    assert (init["world_size"], init["rank_offset"], init["packed_buffer_size_bytes"]) == (4, 1, 10**6)
    assert transport.send(Stream(TENSORS), server, "1") == 4 * (300_000 + 1 + 6)
    update = dict(server.calls)["update_weights"]
    assert wire.sent == update["names"] == list(TENSORS)
    assert update["shapes"] == [[300_000], [1], [2, 3]]  # without dimensions it could not be packed
    assert set(update["dtype_names"]) == {"float32"}


@pytest.mark.parametrize("hang", ["", "join"])
def test_a_server_that_does_not_join_is_not_waited_for(wire: SimpleNamespace, hang: str) -> None:
    wire.hang = hang
    with pytest.raises(PolicyServerError, match="init_weight_transfer answered 500"):
        NcclTransport().connect(Server(fail="init_weight_transfer"))


@pytest.mark.parametrize("hang", ["", "broadcast"])
def test_a_server_that_refuses_ends_the_broadcast(wire: SimpleNamespace, hang: str) -> None:
    server, transport, stream = Server(fail="update_weights"), NcclTransport(buffer_mb=1), Stream(TENSORS)
    transport.connect(server)
    wire.hang = hang
    with pytest.raises(PolicyServerError, match="update_weights answered 500"):
        transport.send(stream, server, "1")
    assert stream.is_over
    transport.disconnect()
    transport.disconnect()
    assert wire.aborted == 1
    with pytest.raises(WeightSyncError, match="was given up"):
        transport.send(Stream(TENSORS), server, "2")


@pytest.mark.parametrize(("server_hangs", "wire_hangs"), [("update_weights", ""), ("", "broadcast")])
def test_whoever_hangs_the_timeout_ends_it(wire: SimpleNamespace, server_hangs: str, wire_hangs: str) -> None:
    server, transport, stream = Server(hang=server_hangs), NcclTransport(buffer_mb=1), Stream(TENSORS)
    transport.connect(server)
    server.timeout_s, wire.hang = 0.1, wire_hangs
    try:
        with pytest.raises(WeightSyncError, match=r"within 0.1 s; still waiting for.*`gym_sync_timeout`"):
            transport.send(stream, server, "1")
    finally:
        server.over.set()
    assert stream.is_over


def test_a_rendezvous_that_hangs_on_both_sides_ends(wire: SimpleNamespace) -> None:
    server = Server(hang="init_weight_transfer", timeout_s=0.1)
    wire.hang = "join"
    try:
        with pytest.raises(WeightSyncError, match="the server, to join the NCCL group, the trainer, to join"):
            NcclTransport().connect(server)
    finally:
        server.over.set()


def test_an_error_of_the_library_becomes_ours(wire: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(vllm_transfer, "join_nccl", fails)
    with pytest.raises(WeightSyncError, match=r"of 4 at 127.0.0.1:.*unhandled system error"):
        NcclTransport().connect(Server())


@pytest.mark.parametrize("transport", [NcclTransport(), IpcTransport()])
def test_other_ranks_walk_their_stream(
    transport: NcclTransport | IpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_transfer, "send_ipc", lambda parameters, weights, post, **_: list(weights))
    stream = Stream(TENSORS)
    assert transport.send(stream, None, "1") == 0
    assert stream.is_over


def test_the_address_is_that_of_the_way_to_the_server() -> None:
    assert local_address("http://127.0.0.1:8000") == "127.0.0.1"
    with pytest.raises(WeightSyncError, match="No way leads"):
        local_address("http://no-such-host.invalid:8000")


# -- ipc --------------------------------------------------------------------------------------------------------------


def chunks_of_one(parameters: Any, weights: Any, post: Any, *, is_sender: bool, buffer_bytes: int) -> None:
    for name, _ in weights:
        post({"names": [name], "buffer_bytes": buffer_bytes})


def test_the_buffer_grows_to_the_biggest_tensor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_transfer, "send_ipc", chunks_of_one)
    server = Server()
    with caplog.at_level(logging.WARNING):
        assert IpcTransport(buffer_mb=1).send(Stream(TENSORS), server, "1") == 4 * (300_000 + 1 + 6)
    assert [info["buffer_bytes"] for _, info in server.calls] == [1_200_000] * 3
    assert "a has 1 MB and `gym_weight_buffer_mb` is 1" in caplog.text


@pytest.mark.parametrize("error", [PolicyServerError("answered 500"), PolicyServerLostError("no answer within 600 s")])
def test_after_a_failure_nothing_more_is_posted_and_the_stream_is_walked(
    error: PolicyServerError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs is not asked for an end that it would not answer either."""
    monkeypatch.setattr(vllm_transfer, "send_ipc", chunks_of_one)
    server, stream = Server(fail="update_weights", error=error), Stream(TENSORS)
    with pytest.raises(type(error), match=error.problem):
        IpcTransport().send(stream, server, "1")
    ended = [] if isinstance(error, PolicyServerLostError) else ["abandon_weight_update"]
    assert [name for name, _ in server.calls] == ["update_weights", *ended]
    assert stream.is_over


def test_a_failure_before_the_first_tensor_walks_the_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm_transfer, "send_ipc", out_of_memory)
    stream = Stream(TENSORS)
    with pytest.raises(WeightSyncError, match="could not be sent by CUDA IPC: CUDA out of memory"):
        IpcTransport().send(stream, Server(), "1")
    assert stream.is_over


def test_handles_travel_pickled_as_vllm_takes_them() -> None:
    import base64
    import pickle

    handles = {"GPU-1": (b"handle", 3)}
    sent = vllm_transfer.as_json({"names": ["a"], "ipc_handles": handles, "ipc_handles_pickled": None})
    assert set(sent) == {"names", "ipc_handles_pickled"}
    assert pickle.loads(base64.b64decode(sent["ipc_handles_pickled"])) == handles
