"""Optimizer state that goes away and comes back: bit for bit, and never missed by a step or a save."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.fsdp
from accelerate import Accelerator

from trl_gym.errors import ConfigError
from trl_gym.memory.offload import OptimizerOffload, check_offload, measured_peak, release_cached

CPU = torch.device("cpu")  # the bytes go from the host to the host; what is tested is that they go and come back


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))


def gradients(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, 64)).pow(2).mean().backward()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def trained(*, offload: bool, accelerate: bool = False) -> torch.nn.Module:
    """Four steps, with gradients accumulated around an offload in the third."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if accelerate:
        model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    mover = OptimizerOffload(optimizer, CPU)
    for step in range(4):
        gradients(model, seed=step)
        if offload:
            mover.offload()
            mover.restore()
        gradients(model, seed=10 + step)
        optimizer.step()
        optimizer.zero_grad()
        if offload:
            assert mover.offload() > 0 and mover._away
            assert mover.offload() == 0
            mover.restore()
            mover.restore()
    return model


@pytest.mark.parametrize("accelerate", [False, True])
def test_training_is_bit_for_bit_the_same(accelerate: bool) -> None:
    expected = dict(trained(offload=False, accelerate=accelerate).state_dict())
    for name, tensor in trained(offload=True, accelerate=accelerate).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_memory_is_given_up_and_the_host_buffers_are_used_again() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = state_bytes(optimizer)
    mover = OptimizerOffload(optimizer, CPU)
    freed = mover.offload()
    assert 0 < freed <= before and state_bytes(optimizer) == before - freed
    buffers = [buffer.data_ptr() for buffer in mover._buffers]
    mover.restore()
    assert state_bytes(optimizer) == before
    mover.offload()
    assert [buffer.data_ptr() for buffer in mover._buffers] == buffers


def test_a_step_or_a_save_brings_the_state_back_by_itself() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    gradients(model, 0)
    optimizer.step()
    mover = OptimizerOffload(optimizer, CPU)
    kept = {name: value.clone() for name, value in optimizer.state[model[0].weight].items()}
    mover.offload()
    saved = optimizer.state_dict()["state"][0]
    assert not mover._away
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    optimizer.zero_grad()
    mover.offload()
    gradients(model, 1)
    optimizer.step()
    assert not mover._away


def test_the_sharded_state_of_fsdp2_goes_and_comes_back(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.distributed.fsdp.fully_shard(network())
        optimizer = torch.optim.AdamW(model.parameters())
        gradients(model, 0)
        optimizer.step()
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        assert all(type(moment).__name__ == "DTensor" for moment in moments)
        kept = [moment.to_local().clone() for moment in moments]
        mover = OptimizerOffload(optimizer, CPU)
        assert mover.offload() >= 64 * 128 * 4 * 2 * 3  # both moments and the gradient, of both layers
        mover.restore()
        assert all(torch.equal(m.to_local(), k) for m, k in zip(moments, kept, strict=True))
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_only_what_is_on_the_device_moves() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    gradients(model, 0)
    optimizer.step()
    elsewhere = OptimizerOffload(optimizer, torch.device("meta"))
    assert elsewhere.offload() == 0 and not elsewhere._away


def test_before_the_first_step_there_is_nothing() -> None:
    mover = OptimizerOffload(torch.optim.AdamW(network().parameters()), CPU)
    assert mover.offload() == 0
    mover.restore()


def test_optimizers_that_move_themselves_are_refused() -> None:
    optimizer = torch.optim.AdamW(network().parameters())
    optimizer.is_paged = True
    with pytest.raises(ConfigError, match="by itself"):
        OptimizerOffload(optimizer, CPU)
    with pytest.raises(ConfigError, match="works with optimizers of torch"):
        OptimizerOffload(SimpleNamespace(), CPU)


def accelerator(plugin: object) -> SimpleNamespace:
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))


def test_what_cannot_work_is_refused_before_anything_is_loaded() -> None:
    check_offload(accelerator(None), "adamw_torch_fused")
    with pytest.raises(ConfigError, match=r"offload_optimizer: \{device: cpu\}"):
        check_offload(accelerator(object()), "adamw_torch")
    with pytest.raises(ConfigError, match="paged_adamw_8bit"):
        check_offload(accelerator(None), "paged_adamw_8bit")


def test_state_in_a_form_of_its_own_is_refused() -> None:
    class Packed(torch.Tensor):
        """A wrapper without memory of its own, as torchao's quantized states are."""

        @classmethod
        def __torch_dispatch__(cls, *_: object) -> None:
            raise AssertionError("nothing computes with it here")

        @staticmethod
        def __new__(cls, inner: torch.Tensor) -> Packed:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner: torch.Tensor) -> None:
            self.inner = inner

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner: dict, *_: object) -> Packed:
            return Packed(inner["inner"])

    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model[0].weight]["exp_avg"] = Packed(torch.zeros(64, 64))
    with pytest.raises(ConfigError, match="Packed"):
        OptimizerOffload(optimizer, CPU).offload()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_without_cuda_nothing_is_measured_or_released() -> None:
    assert measured_peak() == {}
    release_cached()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_memory_is_free_for_others() -> None:
    model = torch.nn.Linear(4096, 4096, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 4096, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    mover = OptimizerOffload(optimizer, torch.device("cuda"))
    kept = [value.clone().cpu() for value in optimizer.state[model.weight].values()]
    free = torch.cuda.mem_get_info()[0]
    assert mover.offload() >= 2 * 4096 * 4096 * 4
    assert torch.cuda.mem_get_info()[0] - free >= 100_000_000
    mover.restore()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(kept, optimizer.state[model.weight].values(), strict=True))
    assert measured_peak()["memory/trainer_peak_gb"] > 0.1
