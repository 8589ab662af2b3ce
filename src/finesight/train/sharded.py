"""A model whose layers lie in parts with all processes (see `train.parallel`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from finesight.config import Sharing
from finesight.encode.pack import PackedBatch, with_blank
from finesight.model.linear import GroupedLinear
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import trainable
from finesight.train.optimizer import Masters

UNIT = 64_000_000
"""Numbers that are put together at once, or more."""


class Sharded:
    """Each process has some rows of every weight: the fp32 numbers that learn, and what is frozen
    in the type that computes. Weights are put together layer by layer when they are needed, in that
    type, and their gradients added up in fp32 where their rows are."""

    sharded = True

    def __init__(self, model: VisionLanguageModel, dtype: torch.dtype, how: Sharing) -> None:
        """From here on the model's parameters are DTensors."""
        self._kept, self._tower = how == "zero2", model.visual
        self._device = model.model.embed_tokens.weight.device
        mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy() if how == "fsdp_offload" else OffloadPolicy()
        for module in model.modules():
            if isinstance(module, GroupedLinear):
                module.apart = True
        units: list[list[nn.Module]] = [
            *_units(model.visual.blocks),
            *_units(model.model.layers),
            [model],
        ]
        for unit in units:
            for parameter in chain.from_iterable(module.parameters() for module in unit):
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            # The head is asked for after the way forth.
            again = not self._kept and unit is not units[-1]
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=again,
            )
        self._heads = [_sharded(unit[0]) for unit in units]
        for head in self._heads:
            head.set_gradient_divide_factor(1.0)
            head.set_force_sum_reduction_for_comms(True)
        for head, following in pairwise(self._heads[:-1]):
            # The processor is not always ahead of the device.
            head.set_modules_to_forward_prefetch([following])
        self.numbers = sum(parameter.numel() for parameter in trainable(model).values())
        self._rows: dict[str, DTensor] = {}
        learning: dict[str, nn.Parameter] = {}
        for name, parameter in trainable(model).items():
            assert isinstance(parameter, DTensor), f"{name} lies whole in every process"
            own = parameter.to_local().detach()
            # A small weight has fewer rows than there are processes.
            if own.numel():
                self._rows[name] = parameter
                learning[name] = nn.Parameter(own)
        self.learning: Mapping[str, nn.Parameter] = learning

    def passable(self, packed: PackedBatch) -> PackedBatch:
        """One without pictures gets a blank one, of nothing."""
        if packed.grids:
            return packed
        grid, numbers = self._tower.smallest, self._tower.geometry.patch_numbers
        if packed.share is not None:
            # What is made of it is nobody's.
            patches_ND = packed.patches_ND.new_zeros(math.prod(grid), numbers)
            return replace(packed, grids=(grid,), patches_ND=patches_ND)
        features = math.prod(grid) // self._tower.geometry.merge**2
        return with_blank(packed, grid, features, numbers)

    def joined(self, masters: Masters) -> Tensor:
        """The gradients were added up on their way back; their norm is that of all rows."""
        for name, rows in self._rows.items():
            if isinstance(rows.grad, DTensor):
                self.learning[name].grad = rows.grad.to_local()
                rows.grad = None
        squared = masters.norm().square().to(self._device)
        dist.all_reduce(squared)
        return squared.sqrt()

    @torch.no_grad()
    def moved(self) -> None:
        """Copy the masters to where layers are put together from."""
        rows = [rows.to_local() for rows in self._rows.values()]
        torch._foreach_copy_(rows, list(self.learning.values()))

    def forget(self) -> None:
        """Those that are on their rows."""
        for rows in self._rows.values():
            rows.grad = None

    def own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The rows of this process, of those parameters of which it has any."""
        return _Rows(tensors, self._rows)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every layer is put together at the same time."""
        for head in self._heads:
            head.set_reshard_after_forward(False, recurse=False)
            head.unshard()
        try:
            yield
        finally:
            for head in self._heads:
                again = not self._kept and head is not self._heads[-1]
                head.set_reshard_after_forward(again, recurse=False)
                head.reshard()


def _units(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Layers that are put together at once, one after the other: small ones would take longer to
    ask for than to compute."""
    layers = list(layers)
    numbers = sum(_numbers(layer) for layer in layers)
    unit: list[nn.Module] = []
    for layer in layers:
        unit.append(layer)
        if sum(map(_numbers, unit)) >= min(UNIT, numbers / 2):
            yield unit
            unit = []
    if unit:
        yield unit


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), f"{type(module).__name__} lies whole in every process"
    return module


class _Rows(Mapping[str, Tensor]):
    """A process's rows of whole tensors, each cut out when it is asked for."""

    def __init__(self, whole: Mapping[str, Tensor], rows: Mapping[str, DTensor]) -> None:
        self._whole, self._rows = whole, rows
        here = (name for name in whole if _parameter(name, rows) is not None)
        self._names = [name for name in whole if "." not in name] + list(here)

    def __getitem__(self, name: str) -> Tensor:
        found = _parameter(name, self._rows)
        if found is None:
            return self._whole[name]
        # As `torch.chunk` does it.
        mesh = found.device_mesh
        start = mesh.get_local_rank() * -(-len(found) // mesh.size())
        return self._whole[name][start : start + len(found.to_local())]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parameter(name: str, rows: Mapping[str, DTensor]) -> DTensor | None:
    """That which a name, or what stands behind its first full stop, means."""
    own = rows.get(name)
    return rows.get(name.partition(".")[2]) if own is None else own
