"""Parameters of a wrapped model: find them, and put a whole one together.

| wrapping           | what a rank holds                       | how a whole parameter is had                        |
|--------------------|-----------------------------------------|-----------------------------------------------------|
| none, DDP, ZeRO-1/2| all of it                               | as it is                                            |
| FSDP2              | a `DTensor`                             | `full_tensor()`                                     |
| ZeRO-3             | an empty parameter with a `ds_tensor`   | `deepspeed.zero.GatheredParameters`                 |
| FSDP1              | a slice of a unit's flat parameter      | `summon_full_params` of that unit, not of the model |

This is the only module that knows what torch's FSDP1 and DeepSpeed attach to parameters. Neither has public names for
it: `FlatParameter._param_infos`, `_shapes`, `_shard_param_infos`, `_shared_param_infos`, `_local_shard` (documented in
torch's source, unchanged since 2.0, and FSDP1 is frozen), and `ds_shape`, `ds_numel`, `ds_tensor`, `ds_process_group`
(used by transformers and PEFT too). Checked with torch 2.13 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trl_gym.errors import WeightSyncError

T = TypeVar("T")

_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A place of a model that holds a parameter or persistent buffer. Wrappers swap the tensor, the place stays."""

    name: str  # name in the model without wrappers, e.g. `"model.norm.weight"`; the first one of a tied parameter
    module: nn.Module  # module that holds it
    attribute: str  # name under which the module holds it
    shape: tuple[int, ...]  # shape of the whole parameter
    dtype: torch.dtype  # precision in which it is trained
    trained: bool  # whether it gets gradients
    aliases: tuple[str, ...] = ()  # further names of a tied parameter
    unit: Any = None  # the FSDP1 unit that manages it
    place: int = 0  # its index in that unit's flat parameter

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now: whole, or this rank's part of it."""
        return getattr(self.module, self.attribute)

    @property
    def is_sharded(self) -> bool:
        if self.unit is not None:
            return self.unit._handle.uses_sharded_strategy
        return _is_dtensor(self.tensor) or _is_partitioned(self.tensor)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model below DDP, DeepSpeed's engine and `torch.compile`. FSDP1 units stay: they hold parameters."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or _is_engine(model):
            model = model.module
        else:
            return model


def bare(model: nn.Module) -> nn.Module:
    """Return the model as its author wrote it, without any wrapper around the whole."""
    model = unwrap(model)
    while (inner := getattr(model, "_fsdp_wrapped_module", None)) is not None:
        model = unwrap(inner)
    return model


def find_slots(model: nn.Module, *, buffers: bool = False) -> list[Slot]:
    """List every parameter of a model, in the order of `named_parameters`. Local: nothing is gathered.

    Do not call it between a forward pass and its backward pass.

    Args:
        model: Wrapped or not; under FSDP1 the wrapped one.
        buffers: Include what `state_dict` has beside parameters.

    Raises:
        WeightSyncError: The model was taken out of an FSDP1 unit that manages its parameters.
    """
    root = unwrap(model)
    for module in root.modules():
        if isinstance(module, FSDPModule):  # after a forward pass without a backward pass the root is still whole:
            module.reshard()  # a copy beside what the optimizer steps
    units = [unit for unit in root.modules() if hasattr(unit, "_fsdp_wrapped_module") and unit._handle is not None]
    places = _fsdp1_places(units)
    flat = {id(unit._handle.flat_param) for unit in units}
    found: dict[Any, Slot] = {}
    aliases: dict[Any, list[str]] = {}
    for path, module in root.named_modules():
        managed = places.get(module, {})
        if any(_is_flat(value) and id(value) not in flat for value in module._parameters.values()):
            raise _inside_a_unit(clean(path))
        for attribute in _attributes(module, managed, buffers):
            place = managed.get(attribute)
            # Two names of one tensor are tied. FSDP1 makes other tensors of it, but has written down which they were.
            key = id(getattr(module, attribute)) if place is None else place
            name = clean(f"{path}.{attribute}")
            if key in found:
                aliases.setdefault(key, []).append(name)
            else:
                found[key] = _slot(name, module, attribute, place)
    return [dataclasses.replace(slot, aliases=tuple(aliases.get(key, ()))) for key, slot in found.items()]


def clean(name: str) -> str:
    """Remove the parts that wrappers add to a name: `"model._orig_mod.norm.weight"` → `"model.norm.weight"`."""
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)


def gather(jobs: Iterable[Sequence[Slot]], device: torch.device | None = None) -> Iterator[list[torch.Tensor]]:
    """Put whole parameters together, one job after the other. A collective: every rank walks to the end.

    Args:
        jobs: Slots that are needed at the same time, ordered by `unit_by_unit`: a unit is gathered once for all of
            its jobs.
        device: Device on which shards that are offloaded to the host are gathered; by default, that of their mesh.

    Yields:
        The tensors of one job, detached. They may be gone when the next is asked for.
    """
    for unit, group in itertools.groupby(jobs, key=lambda job: job[0].unit):
        with _summoned(unit):
            for job in group:
                others = {id(slot.unit): slot.unit for slot in job if slot.unit is not unit}
                with contextlib.ExitStack() as stack:
                    for other in others.values():
                        stack.enter_context(_summoned(other))
                    stack.enter_context(_collected([slot.tensor for slot in job]))
                    yield [_whole(slot.tensor, device) for slot in job]


def unit_by_unit(items: Sequence[T], slot: Callable[[T], Slot]) -> list[T]:
    """Order items for `gather`: one FSDP1 unit after the other, else as they are. The same on every rank."""
    places: dict[int, int] = {}
    for item in items:
        places.setdefault(id(slot(item).unit), len(places))
    return sorted(items, key=lambda item: places[id(slot(item).unit)])


def local_part(slot: Slot) -> torch.Tensor | None:
    """Return this rank's part of a sum over a sharded model's parameters, so that every element counts exactly once.

    Replicas (of a parameter, or of whole shards as in hybrid sharding) count on the ranks that share a group with
    rank 0; padding is left out.

    Returns:
        A tensor of any shape, or None.
    """
    tensor = slot.tensor.detach()
    if slot.is_sharded and slot.unit is not None:
        return _part_of_flat(slot)
    if _is_dtensor(tensor):
        return _part_of_dtensor(tensor)
    if _is_partitioned(tensor := slot.tensor):
        return _part_of_partition(tensor)
    return tensor.detach() if dist.get_rank() == 0 else None


def _is_engine(model: nn.Module) -> bool:
    """Compare names, because importing DeepSpeed takes seconds."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_partitioned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


def _fsdp1_places(units: Iterable[Any]) -> dict[nn.Module, dict[str, tuple[Any, int]]]:
    """Map module → attribute → unit and index in its flat parameter, for what FSDP1 manages."""
    places: dict[nn.Module, dict[str, tuple[Any, int]]] = {}
    for unit in units:
        flat = unit._handle.flat_param
        for index, info in enumerate(flat._param_infos):
            places.setdefault(info.module, {})[info.param_name] = (unit, index)
        for info in flat._shared_param_infos:
            first = places[info.prim_module][info.prim_param_name]
            places.setdefault(info.module, {})[info.param_name] = first
    return places


def _attributes(module: nn.Module, managed: Mapping[str, Any], buffers: bool) -> list[str]:
    """List attributes of one module that hold parameters; FSDP1 may have taken them off `_parameters`."""
    own = [name for name, value in module._parameters.items() if value is not None and not _is_flat(value)]
    own += [name for name in managed if name not in own]
    if buffers:
        skipped = module._non_persistent_buffers_set
        own += [name for name, value in module._buffers.items() if value is not None and name not in skipped]
    return own


def _is_flat(parameter: nn.Parameter | None) -> bool:
    return hasattr(parameter, "_param_infos")


def _slot(name: str, module: nn.Module, attribute: str, managed: tuple[Any, int] | None) -> Slot:
    if managed is not None:
        unit, place = managed
        flat = unit._handle.flat_param
        own = module._parameters.get(attribute)
        trained = flat.requires_grad if own is None else own.requires_grad
        return Slot(name, module, attribute, tuple(flat._shapes[place]), flat.dtype, trained, unit=unit, place=place)
    tensor = getattr(module, attribute)
    if hasattr(tensor, "_fsdp_flattened"):
        raise _inside_a_unit(name)
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return Slot(name, module, attribute, tuple(shape), tensor.dtype, tensor.requires_grad)


def _inside_a_unit(name: str) -> WeightSyncError:
    return WeightSyncError(
        f"{name or 'The model'} is managed by an FSDP1 unit around the model that was passed.",
        "Pass the wrapped model (`trainer.model_wrapped`).",
    )


@contextlib.contextmanager
def _summoned(unit: Any) -> Iterator[None]:
    if unit is None:
        yield
        return
    with type(unit).summon_full_params(unit, recurse=False, writeback=False):
        yield


@contextlib.contextmanager
def _collected(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    partitioned = [tensor for tensor in tensors if _is_partitioned(tensor)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def _whole(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    tensor = tensor.detach()
    if not _is_dtensor(tensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded; NCCL gathers on devices only
        tensor = tensor.to(device or tensor.device_mesh.device_type)
    return tensor.full_tensor()


def _holds_rank_zero(group: Any) -> bool:
    return dist.get_process_group_ranks(group)[0] == 0


def _part_of_flat(slot: Slot) -> torch.Tensor | None:
    flat = slot.unit._handle.flat_param
    info = flat._shard_param_infos[slot.place]
    if not info.in_shard or not _holds_rank_zero(slot.unit.process_group):
        return None
    return flat._local_shard.detach()[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]


def _part_of_dtensor(tensor: Any) -> torch.Tensor | None:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    replicas = [at for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()]
    return None if any(replicas) else tensor.to_local()


def _part_of_partition(parameter: Any) -> torch.Tensor | None:
    group = parameter.ds_process_group
    if not _holds_rank_zero(group):
        return None
    shard = parameter.ds_tensor.detach().flatten()
    start = dist.get_rank(group) * shard.numel()
    return shard[: max(0, min(shard.numel(), parameter.ds_numel - start))]
