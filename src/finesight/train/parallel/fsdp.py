"""Sharding of the model over the ranks with PyTorch's `fully_shard` (FSDP and ZeRO-2).

`ParallelStrategy` describes the modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise

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

from finesight.encode.batch import PackedBatch, append_dummy_image
from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.settings.config import ParallelMode
from finesight.train.master_weight_optimizer import LazyTensors, MasterWeightOptimizer
from finesight.train.parallel.distributed import ParallelStrategy
from finesight.train.parallel.fsdp_units import (
    find_replicated_params,
    is_frozen_fp32,
    is_resharded,
    list_lora_params,
    list_units,
    mark_as_sharded,
)


class FSDPStrategy(ParallelStrategy):
    """Strategy that shards the rows of every weight over the ranks.

    Trainable weights are stored in fp32, frozen weights in the compute dtype. Each unit of layers
    is all-gathered in the compute dtype when it is needed. Gradients are reduce-scattered in fp32.

    Two kinds of small weights are replicated (`find_replicated_params`): every rank has a complete
    copy and updates its rows.
    """

    is_sharded = True

    def __init__(self, model: VisionLanguageModel, dtype: torch.dtype, mode: ParallelMode) -> None:
        """Shard a model in-place; its parameters become DTensors.

        Args:
            mode: Value of `train.parallel`: `zero2`, `fsdp` or `fsdp_offload`.
        """
        self._is_zero2 = mode == "zero2"
        self._vision_encoder = model.visual
        self._device = model.model.embed_tokens.weight.device
        mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy() if mode == "fsdp_offload" else OffloadPolicy()
        mark_as_sharded(model)
        units = list_units(model)
        lora_params = list_lora_params(model)
        replicated_params = find_replicated_params(model, dtype)
        for index, unit in enumerate(units):
            fp32_params = _convert_unit(unit, lora_params, dtype)
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=is_resharded(index, len(units), is_zero2=self._is_zero2),
                ignored_params=fp32_params | {*replicated_params.values()},
            )
        self._fsdp_modules: list[FSDPModule] = []
        for root, *_ in units:
            assert isinstance(root, FSDPModule), f"not all of {len(units)} units are sharded"
            self._fsdp_modules.append(root)
        for fsdp_module in self._fsdp_modules:
            fsdp_module.set_gradient_divide_factor(1.0)
            fsdp_module.set_force_sum_reduction_for_comms(True)
        for fsdp_module, next_module in pairwise(self._fsdp_modules[:-1]):
            # Prefetch explicitly, because the CPU is not always ahead of the device.
            fsdp_module.set_modules_to_forward_prefetch([next_module])
        self.num_trainable_params = sum(p.numel() for p in trainable_parameters(model).values())
        self._sharded_params: dict[str, DTensor] = {}
        self._replicated_params = replicated_params
        self._replicated_grad_E: Tensor | None = None
        self._row_ranges: dict[str, slice] = {}
        local_params: dict[str, nn.Parameter] = {}
        for name, parameter in trainable_parameters(model).items():
            # The same split as in `torch.chunk`.
            start = mesh.get_local_rank() * -(-len(parameter) // mesh.size())
            if name in replicated_params:
                stop = start - (-len(parameter) // mesh.size())
                local_shard = parameter.detach()[start:stop].to(torch.float32, copy=True)
                if mode == "fsdp_offload":
                    local_shard = local_shard.cpu()
            else:
                assert isinstance(parameter, DTensor), f"{name} is not sharded"
                local_shard = parameter.to_local().detach()
            # A small weight has fewer rows than there are ranks.
            if local_shard.numel():
                if isinstance(parameter, DTensor):
                    self._sharded_params[name] = parameter
                self._row_ranges[name] = slice(start, start + len(local_shard))
                local_params[name] = nn.Parameter(local_shard)
        self.trainable_params = local_params

    def prepare_batch(self, packed_batch: PackedBatch) -> PackedBatch:
        """Append a dummy image to a batch without images.

        All ranks must run the vision encoder, because its weights are all-gathered.
        """
        if packed_batch.grid_thw:
            return packed_batch
        grid = self._vision_encoder.min_grid
        patch_size = self._vision_encoder.config.patch_dim
        if packed_batch.context_shard is not None:
            # No token refers to the features of the dummy image.
            patches_ND = packed_batch.patches_ND.new_zeros(math.prod(grid), patch_size)
            return replace(packed_batch, grid_thw=(grid,), patches_ND=patches_ND)
        num_features = math.prod(grid) // self._vision_encoder.config.merge_size**2
        return append_dummy_image(packed_batch, grid, num_features, patch_size)

    @torch.no_grad()
    def accumulate_gradients(self, optimizer: MasterWeightOptimizer) -> None:
        """Add the gradients of the replicated parameters to fp32 sums.

        FSDP itself sums the reduce-scattered gradients of the sharded parameters in fp32.
        """
        params = self._replicated_params.values()
        grads: list[Tensor] = []
        for parameter in params:
            grad = parameter.grad
            if grad is None:
                grad = torch.zeros_like(parameter)
            grads.append(grad.flatten())
        if grads:
            # `torch.cat` converts to the widest dtype, so that no gradient is rounded.
            grad_E = torch.cat(grads).float()
            if self._replicated_grad_E is None:
                self._replicated_grad_E = grad_E
            else:
                self._replicated_grad_E.add_(grad_E)
        for parameter in params:
            parameter.grad = None

    def reduce_gradients(self, optimizer: MasterWeightOptimizer) -> Tensor:
        """Pass the reduced gradients of the local rows to the optimizer; return the global norm."""
        for name, sharded_param in self._sharded_params.items():
            if isinstance(sharded_param.grad, DTensor):
                self.trainable_params[name].grad = sharded_param.grad.to_local()
                sharded_param.grad = None
        self.accumulate_gradients(optimizer)
        if self._replicated_grad_E is not None:
            dist.all_reduce(self._replicated_grad_E)
            for name, grad in self._split(self._replicated_grad_E):
                if name in self._row_ranges:
                    local_param = self.trainable_params[name]
                    local_param.grad = grad[self._row_ranges[name]].to(local_param.device)
            self._replicated_grad_E = None
        squared_norm = optimizer.grad_norm().square().to(self._device)
        dist.all_reduce(squared_norm)
        return squared_norm.sqrt()

    @torch.no_grad()
    def sync_params(self) -> None:
        """Copy the master weights to the model's parameters."""
        local_shards: list[Tensor] = []
        master_weights: list[Tensor] = []
        for name, parameter in self._sharded_params.items():
            local_shards.append(parameter.to_local())
            master_weights.append(self.trainable_params[name])
        if local_shards:
            torch._foreach_copy_(local_shards, master_weights)
        if self._replicated_params:
            self._sync_replicated_params()

    def _sync_replicated_params(self) -> None:
        """Gather the rows of the replicated parameters that each rank has updated."""
        params = list(self._replicated_params.values())
        dtypes = {parameter.dtype for parameter in params}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        size = sum(parameter.numel() for parameter in params)
        # Each row is zero on all ranks but one, so that the sum is its value.
        values_E = torch.zeros(size, dtype=dtype, device=self._device)
        values: list[Tensor] = []
        own_rows: list[Tensor] = []
        master_weights: list[Tensor] = []
        for name, value in self._split(values_E):
            values.append(value)
            if name in self._row_ranges:
                own_rows.append(value[self._row_ranges[name]])
                master_weights.append(self.trainable_params[name])
        if own_rows:
            torch._foreach_copy_(own_rows, master_weights)
        dist.all_reduce(values_E)
        torch._foreach_copy_([parameter.data for parameter in params], values)

    def zero_grad(self) -> None:
        """Discard the gradients of the model's parameters."""
        for parameter in (*self._sharded_params.values(), *self._replicated_params.values()):
            parameter.grad = None
        self._replicated_grad_E = None

    def _split(self, flat_E: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the view of each replicated parameter in a flat tensor."""
        params = self._replicated_params
        views = torch.split(flat_E, [parameter.numel() for parameter in params.values()])
        for (name, parameter), view in zip(params.items(), views, strict=True):
            yield name, view.view_as(parameter)

    def shard_state(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a mapping that slices the shard of this rank from each tensor on access."""
        slice_fns: dict[str, Callable[[], Tensor]] = {}
        for name in tensors:
            # The name of a parameter, with or without a prefix such as `exp_avg.`.
            rows = self._row_ranges.get(name) or self._row_ranges.get(name.partition(".")[2])
            if rows is not None:
                slice_fns[name] = partial(_read_rows, tensors, name, rows)
            elif "." not in name:
                slice_fns[name] = partial(tensors.__getitem__, name)
        return LazyTensors(slice_fns)

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        """Unshard the complete model within the context."""
        for fsdp_module in self._fsdp_modules:
            fsdp_module.set_reshard_after_forward(False, recurse=False)
            fsdp_module.unshard()
        try:
            yield
        finally:
            for index, fsdp_module in enumerate(self._fsdp_modules):
                num_units = len(self._fsdp_modules)
                reshard = is_resharded(index, num_units, is_zero2=self._is_zero2)
                fsdp_module.set_reshard_after_forward(reshard, recurse=False)
                fsdp_module.reshard()


def _convert_unit(
    unit: Iterable[nn.Module], lora_params: Set[nn.Parameter], dtype: torch.dtype
) -> set[nn.Parameter]:
    """Convert the trainable weights of a unit to fp32, and return its frozen fp32 weights."""
    frozen_params = set()
    for module in unit:
        for parameter in module.parameters():
            # A sharded weight was converted in its own unit; adapters are replicated.
            is_stored = isinstance(parameter, DTensor) or parameter in lora_params
            if parameter.requires_grad and not is_stored:
                parameter.data = parameter.data.float()
            if is_frozen_fp32(parameter, dtype):
                frozen_params.add(parameter)
    return frozen_params


def _read_rows(tensors: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    return tensors[name][rows]
