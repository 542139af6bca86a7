"""What `file` writes is what safetensors reads; where it cannot write, it says so and leaves nothing behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tests.weight_sync.streams import LookingClient, Stream, same_bits
from trl_gym.errors import ConfigError, PolicyServerError, WeightSyncError
from trl_gym.weight_sync.transports.adapter import AdapterTransport
from trl_gym.weight_sync.transports.file import FileSink, FileTransport, MapSink, layout, write

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def tensors() -> st.SearchStrategy[dict[str, torch.Tensor]]:
    shape = st.lists(st.integers(0, 4), max_size=3)
    names = st.text("abc.ü_0", min_size=1, max_size=5)
    one = st.builds(
        lambda shape, dtype: torch.randn(shape).to(torch.uint8 if dtype is torch.bool else dtype).to(dtype),
        shape,
        st.sampled_from(DTYPES),
    )
    return st.dictionaries(names, one, min_size=1, max_size=6)


@pytest.fixture(params=["memory", "folder"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileTransport]:
    made = FileTransport(tmp_path if request.param == "folder" else None)
    yield made
    made.disconnect()


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Stands for a place that is full: the kernel refuses to make a file bigger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", [MapSink, FileSink])
@given(weights=tensors())
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    kind: type[MapSink | FileSink], weights: dict[str, torch.Tensor]
) -> None:
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        plan = layout(Stream(weights).metadata())
        write(kind(fd, plan.num_bytes), plan, weights.items())
        with safe_open(f"/proc/self/fd/{fd}", framework="pt") as file:
            assert set(file.keys()) == set(weights)
            assert all(same_bits(file.get_tensor(name), tensor) for name, tensor in weights.items())
    finally:
        os.close(fd)


def test_tensors_bigger_than_a_piece_and_not_contiguous_ones(transport: FileTransport) -> None:
    weights = {
        "big": torch.arange(FileSink.piece_bytes // 2, dtype=torch.float32),
        "transposed": torch.randn(300, 200).t(),
        "strided": torch.randn(64)[::2],
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    client = LookingClient()
    num_bytes = transport.send(Stream(weights), client, "1")
    assert all(same_bits(client.files[0][name], tensor.detach()) for name, tensor in weights.items())
    assert sum(tensor.nbytes for tensor in weights.values()) <= num_bytes


def test_a_tensor_is_cast_to_what_was_announced(transport: FileTransport) -> None:
    weights = {"w": torch.randn(FileSink.piece_bytes // 3)}
    client = LookingClient()
    transport.send(Stream(weights, announced={"w": weights["w"].bfloat16()}), client, "1")
    assert same_bits(client.files[0]["w"], weights["w"].bfloat16())


def test_a_tensor_may_be_overwritten_when_the_next_one_is_asked_for(transport: FileTransport) -> None:
    class Reused(Stream):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            buffer = torch.empty(4)
            for name, tensor in self.tensors.items():
                yield name, buffer.copy_(tensor)

    client = LookingClient()
    transport.send(Reused({"a": torch.zeros(4), "b": torch.ones(4)}), client, "1")
    assert client.files[0]["a"].tolist() == [0.0] * 4


def test_connecting_proves_that_the_server_reads_it(transport: FileTransport) -> None:
    client = LookingClient()
    transport.connect(client)
    transport.connect(client)
    assert len(set(client.probes)) == 2


def test_a_server_that_does_not_read_it_is_refused(tmp_path: Path) -> None:
    class Elsewhere(LookingClient):
        def init_weight_transfer(self, init_info: dict[str, str]) -> None:
            raise PolicyServerError("HTTP 500: No such file or directory")

    with pytest.raises(WeightSyncError, match=r"cannot read what the trainer wrote.*`gym_weight_dir`"):
        FileTransport(tmp_path).connect(Elsewhere())
    assert list(tmp_path.iterdir()) == []


def test_fewer_parameters_than_the_first_time_are_announced_as_a_part(transport: FileTransport) -> None:
    client = LookingClient()
    for weights in ({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2)}):
        transport.send(Stream(weights), client, "1")
    assert [update["partial"] for update in client.updates] == [False, True]
    transport.disconnect()  # another server has nothing yet
    transport.send(Stream({"a": torch.zeros(2)}), client, "1")
    assert client.updates[-1]["partial"] is False
    assert list(client.files[-1]) == ["a"]  # nothing of the bigger file is left in it


def test_other_ranks_walk_the_stream_and_write_nothing(tmp_path: Path) -> None:
    stream = Stream({"a": torch.ones(2), "b": torch.ones(2)})
    assert FileTransport(tmp_path).send(stream, None, "1") == 0
    assert stream.is_over
    assert list(tmp_path.iterdir()) == []


def test_a_full_place_is_named_and_the_stream_walked_to_its_end(transport: FileTransport) -> None:
    stream, client = Stream({name: torch.ones(2**16) for name in "abc"}), LookingClient()
    with file_size_limit(2**17), pytest.raises(WeightSyncError) as caught:
        transport.send(stream, client, "1")
    text = str(caught.value)
    assert "File too large" in text and "0.8 MB are needed" in text and "`gym_weight_dir`" in text
    assert stream.is_over
    assert client.updates == [] and client.num_abandoned == 1
    assert transport.send(stream, client, "2") > 0  # it can be tried again
    transport.release()


def test_a_folder_is_empty_after_a_sync_and_after_a_failure(tmp_path: Path) -> None:
    transport, client = FileTransport(tmp_path), LookingClient()
    transport.connect(client)
    transport.send(Stream({"a": torch.ones(2)}), client, "1")
    assert Path(client.updates[0]["path"]).parent == tmp_path
    transport.release()
    with file_size_limit(16), pytest.raises(WeightSyncError):
        transport.send(Stream({"a": torch.ones(2)}), client, "2")
    transport.release()
    transport.release()
    assert list(tmp_path.iterdir()) == []


def test_each_sync_has_its_own_name_in_a_folder(tmp_path: Path) -> None:
    transport, client = FileTransport(tmp_path), LookingClient()
    for _ in range(2):
        transport.send(Stream({"a": torch.ones(2)}), client, "1")
    assert client.updates[0]["path"] != client.updates[1]["path"]
    transport.release()


@pytest.mark.parametrize(
    ("yielded", "announced", "message"),
    [
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, r"announced as \(3,\)"),
        ({"a": torch.ones(2)}, {}, "was not announced"),
        ({}, {"a": torch.ones(2)}, "1 announced weights did not come: a"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.complex64)}, "complex64, which a safetensors file"),
    ],
)
def test_a_stream_that_is_not_as_announced_is_refused(
    tmp_path: Path, yielded: dict[str, torch.Tensor], announced: dict[str, torch.Tensor], message: str
) -> None:
    stream, client = Stream(yielded, announced), LookingClient()
    with pytest.raises(WeightSyncError, match=message):
        FileTransport(tmp_path).send(stream, client, "1")
    assert client.updates == [] and stream.is_over


def test_a_folder_that_is_not_there_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gym_weight_dir"):
        FileTransport(tmp_path / "missing")


@pytest.mark.parametrize("transport", [FileTransport, AdapterTransport])
def test_a_folder_below_the_home_folder(
    transport: type[FileTransport | AdapterTransport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    transport("~")  # which is there
    with pytest.raises(ConfigError, match=f"The folder {tmp_path}/missing"):
        transport("~/missing")


def test_memory_is_used_again_and_given_back_with_the_connection() -> None:
    transport, client = FileTransport(), LookingClient()
    weights = {"a": torch.ones(2**18)}
    files = set()
    for value in (1.0, 2.0):
        weights["a"].fill_(value)
        transport.send(Stream(weights), client, "1")
        path = client.updates[-1]["path"]
        files.add((path, os.stat(path).st_ino))
        assert client.files[-1]["a"].unique().tolist() == [value]
    assert len(files) == 1
    assert os.stat(path).st_nlink == 0  # without a name, it cannot be left behind
    transport.disconnect()
    assert not os.path.exists(path)


def test_after_a_refusal_the_server_keeps_its_file_and_the_next_one_is_another(tmp_path: Path) -> None:
    class Refusing(LookingClient):
        opened: ClassVar[list[IO[bytes]]] = []

        def update_weights(self, update_info: dict[str, str]) -> None:
            super().update_weights(update_info)
            self.opened.append(open(update_info["path"], "rb"))  # noqa: SIM115
            raise PolicyServerError("no answer within 1 s")

    transport, client = FileTransport(), Refusing()
    with pytest.raises(PolicyServerError):
        transport.send(Stream({"a": torch.ones(2)}), client, "1")
    transport.send(Stream({"a": torch.zeros(2)}), LookingClient(), "2")
    with client.opened[0] as file:
        assert file.read().endswith(torch.ones(2).numpy().tobytes())
    transport.disconnect()
