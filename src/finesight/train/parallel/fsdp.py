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
from finesight.model.fused_linear import FusedLinear
from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.train.optimizer import MasterWeightOptimizer

MIN_UNIT_PARAMS = 64_000_000
"""Minimum number of parameters of an FSDP unit, which is all-gathered at once."""


class FSDPStrategy:
    """Strategy that shards the rows of every weight over the ranks.

    Trainable weights are stored in fp32, frozen weights in the compute dtype. Each unit of layers
    is all-gathered in the compute dtype when it is needed. Gradients are reduce-scattered in fp32.
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
        for unit in units:
            for parameter in chain.from_iterable(module.parameters() for module in unit):
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            # Frozen fp32 parameters are small and would be rounded by the all-gather.
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
                ignored_params=fp32_params,
            )
        self._fsdp_modules = [_as_fsdp_module(unit[0]) for unit in units]
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
        trainable_params: dict[str, nn.Parameter] = {}
        for name, parameter in trainable_parameters(model).items():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            local_shard = parameter.to_local().detach()
            # A small weight has fewer rows than there are ranks.
            if local_shard.numel():
                self._sharded_params[name] = parameter
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
        squared_norm = optimizer.grad_norm().square().to(self._device)
        dist.all_reduce(squared_norm)
        return squared_norm.sqrt()

    @torch.no_grad()
    def sync_params(self) -> None:
        """Copy the master weights to the sharded parameters."""
        local_shards = [local_shards.to_local() for local_shards in self._sharded_params.values()]
        torch._foreach_copy_(local_shards, list(self.trainable_params.values()))

    def zero_grad(self) -> None:
        """Discard the gradients of the sharded parameters."""
        for sharded_param in self._sharded_params.values():
            sharded_param.grad = None

    def shard_state(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a mapping that slices the shard of this rank from each tensor on access."""
        return _LocalShards(tensors, self._sharded_params)

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


def _as_fsdp_module(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), f"{type(module).__name__} is not sharded"
    return module


class _LocalShards(Mapping[str, Tensor]):
    """Mapping of the slices of complete tensors that belong to this rank, created on access."""

    def __init__(
        self, full_tensors: Mapping[str, Tensor], sharded_params: Mapping[str, DTensor]
    ) -> None:
        self._full_tensors, self._sharded_params = full_tensors, sharded_params
        local_names = (
            name for name in full_tensors if _find_sharded_param(name, sharded_params) is not None
        )
        self._names = [name for name in full_tensors if "." not in name] + list(local_names)

    def __getitem__(self, name: str) -> Tensor:
        sharded_param = _find_sharded_param(name, self._sharded_params)
        if sharded_param is None:
            return self._full_tensors[name]
        # The same split as in `torch.chunk`.
        mesh = sharded_param.device_mesh
        start = mesh.get_local_rank() * -(-len(sharded_param) // mesh.size())
        return self._full_tensors[name][start : start + len(sharded_param.to_local())]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _find_sharded_param(name: str, sharded_params: Mapping[str, DTensor]) -> DTensor | None:
    """Find a sharded parameter by its name, with or without a prefix such as `exp_avg.`."""
    param = sharded_params.get(name)
    return sharded_params.get(name.partition(".")[2]) if param is None else param
