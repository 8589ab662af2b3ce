"""Sharding of the model over the ranks with PyTorch's `fully_shard` (FSDP and ZeRO-2).

`ParallelStrategy` describes the modes.
"""

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

from finesight.config import ParallelMode
from finesight.encode.packing import PackedBatch, append_dummy_image
from finesight.model.linear import FusedLinear
from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.train.optimizer import MasterWeightOptimizer

MIN_UNIT_PARAMS = 64_000_000
"""Minimum number of parameters of an FSDP unit, which is all-gathered at once."""


class FSDPStrategy:
    """Strategy that shards the rows of every weight over the ranks.

    Trainable weights are stored in fp32, frozen weights in the compute dtype. Each unit of layers
    is all-gathered in the compute dtype when it is needed. Gradients are reduce-scattered in fp32.

    Weights that the model computes with in fp32 are small. Every rank has a complete copy of them,
    because the all-gather would round them, and updates its rows.
    """

    is_sharded = True

    def __init__(self, model: VisionLanguageModel, dtype: torch.dtype, mode: ParallelMode) -> None:
        """Shard a model in-place; its parameters become DTensors.

        Args:
            model: Model to shard.
            dtype: Compute dtype.
            mode: Value of `train.parallel`: `zero2`, `fsdp` or `fsdp_offload`.
        """
        self._is_zero2, self._vision_encoder = mode == "zero2", model.visual
        self._device = model.model.embed_tokens.weight.device
        mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy() if mode == "fsdp_offload" else OffloadPolicy()
        for module in model.modules():
            if isinstance(module, FusedLinear):
                module.is_sharded = True
        units: list[list[nn.Module]] = [
            *_group_layers(model.visual.blocks),
            *_group_layers(model.model.layers),
            [model],
        ]
        replicated_params = {
            name: parameter
            for name, parameter in trainable_parameters(model).items()
            if name.endswith(model.architecture.fp32_suffixes) and dtype != torch.float32
        }
        for unit in units:
            for parameter in chain.from_iterable(module.parameters() for module in unit):
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            fp32_params = {
                parameter
                for parameter in chain.from_iterable(module.parameters() for module in unit)
                if not parameter.requires_grad and parameter.dtype == torch.float32 != dtype
            }
            # The loss uses the language model head after the forward pass.
            reshard = not self._is_zero2 and unit is not units[-1]
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=reshard,
                ignored_params=fp32_params | {*replicated_params.values()},
            )
        roots = [unit[0] for unit in units]
        self._fsdp_modules = [module for module in roots if isinstance(module, FSDPModule)]
        assert len(self._fsdp_modules) == len(roots), f"not all of {len(roots)} units are sharded"
        for fsdp_module in self._fsdp_modules:
            fsdp_module.set_gradient_divide_factor(1.0)
            fsdp_module.set_force_sum_reduction_for_comms(True)
        for fsdp_module, next_module in pairwise(self._fsdp_modules[:-1]):
            # Prefetch explicitly, because the CPU is not always ahead of the device.
            fsdp_module.set_modules_to_forward_prefetch([next_module])
        self.num_trainable_params = sum(
            parameter.numel() for parameter in trainable_parameters(model).values()
        )
        self._sharded_params: dict[str, DTensor] = {}
        self._replicated_params = replicated_params
        self._row_ranges: dict[str, slice] = {}
        trainable_params: dict[str, nn.Parameter] = {}
        for name, parameter in trainable_parameters(model).items():
            # The same split as in `torch.chunk`.
            start = mesh.get_local_rank() * -(-len(parameter) // mesh.size())
            if name in replicated_params:
                stop = start - (-len(parameter) // mesh.size())
                local_shard = parameter.detach()[start:stop].clone()
                local_shard = local_shard.cpu() if mode == "fsdp_offload" else local_shard
            else:
                assert isinstance(parameter, DTensor), f"{name} is not sharded"
                local_shard = parameter.to_local().detach()
            # A small weight has fewer rows than there are ranks.
            if local_shard.numel():
                if isinstance(parameter, DTensor):
                    self._sharded_params[name] = parameter
                self._row_ranges[name] = slice(start, start + len(local_shard))
                trainable_params[name] = nn.Parameter(local_shard)
        self.trainable_params: Mapping[str, nn.Parameter] = trainable_params

    def prepare_batch(self, packed_batch: PackedBatch) -> PackedBatch:
        """Append a dummy image to a batch without images.

        All ranks must run the vision encoder, because its weights are all-gathered.
        """
        if packed_batch.grid_thw:
            return packed_batch
        grid, patch_size = self._vision_encoder.min_grid, self._vision_encoder.config.patch_dim
        if packed_batch.context_shard is not None:
            # No token refers to the features of the dummy image.
            patches_ND = packed_batch.patches_ND.new_zeros(math.prod(grid), patch_size)
            return replace(packed_batch, grid_thw=(grid,), patches_ND=patches_ND)
        num_features = math.prod(grid) // self._vision_encoder.config.merge_size**2
        return append_dummy_image(packed_batch, grid, num_features, patch_size)

    def reduce_gradients(self, optimizer: MasterWeightOptimizer) -> Tensor:
        """Pass the reduce-scattered gradients to the optimizer; return their global norm."""
        for name, sharded_param in self._sharded_params.items():
            if isinstance(sharded_param.grad, DTensor):
                self.trainable_params[name].grad = sharded_param.grad.to_local()
                sharded_param.grad = None
        if self._replicated_params:
            self._reduce_replicated_gradients()
        squared_norm = optimizer.grad_norm().square().to(self._device)
        dist.all_reduce(squared_norm)
        return squared_norm.sqrt()

    @torch.no_grad()
    def sync_params(self) -> None:
        """Copy the master weights to the sharded parameters."""
        local_shards = [local_shards.to_local() for local_shards in self._sharded_params.values()]
        torch._foreach_copy_(
            local_shards, [self.trainable_params[name] for name in self._sharded_params]
        )
        if not self._replicated_params:
            return
        for name, parameter in self._replicated_params.items():
            parameter.zero_()
            if name in self._row_ranges:
                parameter[self._row_ranges[name]] = self.trainable_params[name].to(self._device)
        # Each row is zero on all ranks but one.
        self._all_reduce([parameter.data for parameter in self._replicated_params.values()])

    def zero_grad(self) -> None:
        """Discard the gradients of the model's parameters."""
        for parameter in (*self._sharded_params.values(), *self._replicated_params.values()):
            parameter.grad = None

    def _reduce_replicated_gradients(self) -> None:
        grads = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._replicated_params.items()
        }
        self._all_reduce(list(grads.values()))
        for name, grad in grads.items():
            self._replicated_params[name].grad = None
            if name in self._row_ranges:
                local_param = self.trainable_params[name]
                local_param.grad = grad[self._row_ranges[name]].to(local_param.device)

    def _all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum tensors over the ranks in place, in one operation."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, values in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(values.view_as(tensor))

    def shard_state(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a mapping that slices the shard of this rank from each tensor on access."""
        return _LocalShards(tensors, self._row_ranges)

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        """Unshard the complete model within the context."""
        for fsdp_module in self._fsdp_modules:
            fsdp_module.set_reshard_after_forward(False, recurse=False)
            fsdp_module.unshard()
        try:
            yield
        finally:
            for fsdp_module in self._fsdp_modules:
                reshard = not self._is_zero2 and fsdp_module is not self._fsdp_modules[-1]
                fsdp_module.set_reshard_after_forward(reshard, recurse=False)
                fsdp_module.reshard()


def _group_layers(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Group consecutive layers into FSDP units; small units are communication-bound."""
    layers = list(layers)
    num_params = sum(_count_params(layer) for layer in layers)
    unit: list[nn.Module] = []
    for layer in layers:
        unit.append(layer)
        if sum(map(_count_params, unit)) >= min(MIN_UNIT_PARAMS, num_params / 2):
            yield unit
            unit = []
    if unit:
        yield unit


def _count_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _LocalShards(Mapping[str, Tensor]):
    """Mapping of the slices of complete tensors that belong to this rank, created on access."""

    def __init__(self, full_tensors: Mapping[str, Tensor], row_ranges: Mapping[str, slice]) -> None:
        self._full_tensors, self._row_ranges = full_tensors, row_ranges
        self._names = [
            name
            for name in full_tensors
            if "." not in name or _find_rows(name, row_ranges) is not None
        ]

    def __getitem__(self, name: str) -> Tensor:
        rows = _find_rows(name, self._row_ranges)
        return self._full_tensors[name] if rows is None else self._full_tensors[name][rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _find_rows(name: str, row_ranges: Mapping[str, slice]) -> slice | None:
    """Find the rows of a parameter by its name, with or without a prefix such as `exp_avg.`."""
    rows = row_ranges.get(name)
    return row_ranges.get(name.partition(".")[2]) if rows is None else rows
