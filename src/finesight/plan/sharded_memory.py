"""Memory of a model that several GPUs share, by FSDP unit.

`train.parallel.fsdp` shards the model with `fully_shard` of PyTorch. Each rank stores its rows of
every weight, trainable ones in fp32. A unit of layers is all-gathered in the compute dtype for its
forward and its backward pass, and its gradients are reduce-scattered in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.settings.config import ParallelMode
from finesight.train.parallel.fsdp_units import (
    find_replicated_params,
    is_frozen_fp32,
    is_resharded,
    list_units,
)

FP32_BYTES = 4

GPUS_PER_MACHINE = 8
"""Number of GPUs above which a run is assumed to use several machines."""


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Number of ranks of a run, each with one GPU, and the mode of `train.parallel`."""

    num_ranks: int = 1
    mode: ParallelMode = "ddp"

    @property
    def is_sharded(self) -> bool:
        """True if the ranks shard the model; a single process never does."""
        return self.num_ranks > 1 and self.mode != "ddp"

    @property
    def is_offloaded(self) -> bool:
        """True if the shards are in the memory of the host."""
        return self.is_sharded and self.mode == "fsdp_offload"


@dataclass(slots=True)
class UnitMemory:
    """Memory of an FSDP unit on one rank, or of all units together, in bytes.

    Attributes:
        weight_bytes: All-gathered weights in the compute dtype.
        loaded_bytes: Complete weights while the unit is sharded, trainable ones in fp32.
        shard_bytes: Stored rows: fp32 for trainable weights, the compute dtype for frozen ones.
        gradient_bytes: fp32 gradients of all ranks, the input of the reduce-scatter.
        gradient_shard_bytes: fp32 gradients of the own rows, its output.
        pinned_bytes: Stored rows and their gradients in page-locked memory of the host.
        communicated_bytes: All-gathered and reduce-scattered bytes of a micro-batch.
        transferred_bytes: Bytes that a micro-batch copies between host and GPU if offloaded.
        num_trainable: Number of sharded trainable tensors.
    """

    weight_bytes: int = 0
    loaded_bytes: int = 0
    shard_bytes: int = 0
    gradient_bytes: int = 0
    gradient_shard_bytes: int = 0
    pinned_bytes: int = 0
    communicated_bytes: int = 0
    transferred_bytes: int = 0
    num_trainable: int = 0

    def add_parameter(
        self, parameter: nn.Parameter, dtype: torch.dtype, num_ranks: int, num_gathers: int
    ) -> None:
        """Add a sharded parameter; all shards are padded to the one with the most rows.

        Args:
            num_gathers: Number of all-gathers of its unit in a micro-batch.
        """
        num_elements = _count_rows(parameter, num_ranks) * math.prod(parameter.shape[1:])
        stored_bytes = num_elements * dtype.itemsize
        if parameter.requires_grad:
            stored_bytes = num_elements * FP32_BYTES
            self.num_trainable += 1
            self.gradient_shard_bytes += stored_bytes
            self.gradient_bytes += num_ranks * stored_bytes
            self.pinned_bytes += _round_up_to_power_of_2(stored_bytes)
            self.communicated_bytes += (num_ranks - 1) * stored_bytes
            self.transferred_bytes += stored_bytes
        self.shard_bytes += stored_bytes
        self.loaded_bytes += num_ranks * stored_bytes
        self.pinned_bytes += _round_up_to_power_of_2(stored_bytes)
        self.transferred_bytes += num_gathers * stored_bytes
        gathered_bytes = num_elements * dtype.itemsize
        self.weight_bytes += num_ranks * gathered_bytes
        self.communicated_bytes += num_gathers * (num_ranks - 1) * gathered_bytes


@dataclass(frozen=True)
class ShardedModel:
    """Shards of a model on the rank with the most rows.

    Attributes:
        units: Units in forward order. The last one has the embeddings and the head.
        total: Sum of all units.
        unit_by_param: Unit of each sharded trainable parameter, by the id of the parameter.
        local_params: Own rows of the trainable parameters in fp32, which the optimizer updates.
        num_replicated: Number of elements of trainable parameters that every rank keeps.
        sharded_ids: ids of all sharded parameters.
    """

    layout: RankLayout
    units: tuple[UnitMemory, ...]
    total: UnitMemory
    unit_by_param: Mapping[int, UnitMemory]
    local_params: Mapping[str, nn.Parameter]
    num_replicated: int
    sharded_ids: frozenset[int]

    @property
    def gathered_bytes(self) -> int:
        """Bytes of all-gathered weights and of their buffers during a step.

        The last unit is never resharded before its backward pass. Another unit is in use, and the
        next one arrives in a buffer. With `zero2`, all units stay gathered.
        """
        largest_unit = max(self.units[:-1], key=lambda unit: unit.weight_bytes)
        if self.layout.mode == "zero2":
            return self.total.weight_bytes + largest_unit.weight_bytes
        num_bytes = self.units[-1].weight_bytes + 2 * largest_unit.weight_bytes
        if self.layout.is_offloaded:
            # The rows of a unit are copied to the GPU before they are cast.
            num_bytes += max(unit.shard_bytes for unit in self.units)
        return num_bytes

    @property
    def loading_bytes(self) -> int:
        """Highest memory of all units while the loaded model is sharded, unit by unit."""
        complete_bytes = peak_bytes = self.total.weight_bytes
        stored_bytes = 0
        for unit in self.units:
            complete_bytes -= unit.weight_bytes
            peak_bytes = max(peak_bytes, complete_bytes + stored_bytes + unit.loaded_bytes)
            if not self.layout.is_offloaded:
                stored_bytes += unit.shard_bytes
        return peak_bytes


def shard_model(model: VisionLanguageModel, dtype: torch.dtype, layout: RankLayout) -> ShardedModel:
    """Compute the shards of a model on the meta device, whose parameters stay complete."""
    replicated = find_replicated_params(model, dtype).values()
    # Adapters are parameters of the layers, too.
    complete_ids = set(map(id, replicated))
    units: list[UnitMemory] = []
    total = UnitMemory()
    unit_by_param: dict[int, UnitMemory] = {}
    sharded_ids: set[int] = set()
    module_groups = list_units(model)
    for index, modules in enumerate(module_groups):
        is_gathered_again = is_resharded(index, len(module_groups), is_zero2=layout.mode == "zero2")
        num_gathers = 2 if is_gathered_again else 1
        unit = UnitMemory()
        for parameter in chain.from_iterable(module.parameters() for module in modules):
            key = id(parameter)
            # The root unit has all parameters that no other unit has.
            if key in sharded_ids or key in complete_ids or is_frozen_fp32(parameter, dtype):
                continue
            sharded_ids.add(key)
            for memory in (unit, total):
                memory.add_parameter(parameter, dtype, layout.num_ranks, num_gathers)
            if parameter.requires_grad:
                unit_by_param[key] = unit
        units.append(unit)
    local_params: dict[str, nn.Parameter] = {}
    for name, parameter in trainable_parameters(model).items():
        shape = _count_rows(parameter, layout.num_ranks), *parameter.shape[1:]
        local_rows = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        local_params[name] = nn.Parameter(local_rows)
    return ShardedModel(
        layout,
        tuple(units),
        total,
        unit_by_param,
        local_params,
        sum(parameter.numel() for parameter in replicated),
        frozenset(sharded_ids),
    )


def _count_rows(parameter: nn.Parameter, num_ranks: int) -> int:
    """Return the largest number of rows of a rank, to which all shards are padded."""
    return math.ceil(len(parameter) / num_ranks)


def _round_up_to_power_of_2(num_bytes: int) -> int:
    """Return the bytes that PyTorch allocates for a tensor in page-locked memory."""
    return 1 << (num_bytes - 1).bit_length()
