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

from finesight.config import ParallelMode
from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel
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


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Memory of an FSDP unit on one rank, in bytes.

    Attributes:
        weight_bytes: All-gathered weights in the compute dtype.
        loaded_bytes: Complete weights while the unit is sharded, trainable ones in fp32.
        shard_bytes: Stored rows: fp32 for trainable weights, the compute dtype for frozen ones.
        num_trainable: Number of sharded trainable tensors.
        gradient_bytes: fp32 gradients of all ranks, the input of the reduce-scatter.
        gradient_shard_bytes: fp32 gradients of the own rows, its output.
        num_gathers: Number of all-gathers of the unit in a micro-batch.
    """

    weight_bytes: int
    loaded_bytes: int
    shard_bytes: int
    num_trainable: int
    gradient_bytes: int
    gradient_shard_bytes: int
    num_gathers: int


@dataclass(frozen=True)
class ShardedModel:
    """Shards of a model on the rank with the most rows.

    Attributes:
        units: Units in forward order. The last one has the embeddings and the head.
        unit_by_param: Unit of each sharded trainable parameter, by the id of the parameter.
        local_params: Own rows of the trainable parameters in fp32, which the optimizer updates.
        num_replicated: Number of elements of trainable parameters that every rank keeps.
        sharded_ids: ids of all sharded parameters.
    """

    layout: RankLayout
    units: tuple[UnitMemory, ...]
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
        *units, root = (unit.weight_bytes for unit in self.units)
        if self.layout.mode == "zero2":
            return sum(units) + root + max(units)
        num_bytes = root + 2 * max(units)
        if self.layout.is_offloaded:
            # The rows of a unit are copied to the GPU before they are cast.
            num_bytes += max(unit.shard_bytes for unit in self.units)
        return num_bytes

    @property
    def complete_bytes(self) -> int:
        """Weights of all units in the compute dtype, as for an evaluation and the export."""
        return sum(unit.weight_bytes for unit in self.units)

    @property
    def shard_bytes(self) -> int:
        """Stored rows of all weights."""
        return sum(unit.shard_bytes for unit in self.units)

    @property
    def gradient_shard_bytes(self) -> int:
        """fp32 gradients of the own rows of all units."""
        return sum(unit.gradient_shard_bytes for unit in self.units)

    @property
    def loading_bytes(self) -> int:
        """Highest memory of all units while the loaded model is sharded, unit by unit."""
        complete_bytes = peak_bytes = self.complete_bytes
        stored_bytes = 0
        for unit in self.units:
            complete_bytes -= unit.weight_bytes
            peak_bytes = max(peak_bytes, complete_bytes + stored_bytes + unit.loaded_bytes)
            stored_bytes += 0 if self.layout.is_offloaded else unit.shard_bytes
        return peak_bytes

    @property
    def communicated_bytes(self) -> int:
        """Bytes that a micro-batch all-gathers and reduce-scatters, without the own rows."""
        gathered = sum(unit.num_gathers * unit.weight_bytes for unit in self.units)
        reduced = sum(unit.gradient_bytes for unit in self.units)
        return round((gathered + reduced) * (1 - 1 / self.layout.num_ranks))

    @property
    def transferred_bytes(self) -> int:
        """Bytes that a micro-batch copies between the host and the GPU with `fsdp_offload`."""
        if not self.layout.is_offloaded:
            return 0
        return sum(unit.num_gathers * unit.shard_bytes for unit in self.units) + (
            self.gradient_shard_bytes
        )


def shard_model(model: VisionLanguageModel, dtype: torch.dtype, layout: RankLayout) -> ShardedModel:
    """Compute the shards of a model on the meta device, whose parameters stay complete."""
    replicated = find_replicated_params(model, dtype)
    # Adapters are parameters of the layers, too.
    complete_ids = {id(parameter) for parameter in replicated.values()}
    complete_ids |= {id(p) for p in model.parameters() if is_frozen_fp32(p, dtype)}
    units: list[UnitMemory] = []
    unit_by_param: dict[int, UnitMemory] = {}
    sharded_ids: set[int] = set()
    module_groups = list_units(model)
    for index, modules in enumerate(module_groups):
        parameters: list[nn.Parameter] = []
        for parameter in chain.from_iterable(module.parameters() for module in modules):
            if id(parameter) not in complete_ids and id(parameter) not in sharded_ids:
                parameters.append(parameter)
                sharded_ids.add(id(parameter))
        is_gathered_again = is_resharded(index, len(module_groups), is_zero2=layout.mode == "zero2")
        num_gathers = 2 if is_gathered_again else 1
        unit = _build_unit(parameters, dtype, layout.num_ranks, num_gathers)
        units.append(unit)
        unit_by_param |= {id(one): unit for one in parameters if one.requires_grad}
    local_params: dict[str, nn.Parameter] = {}
    for name, parameter in trainable_parameters(model).items():
        num_rows = _count_rows(parameter, layout.num_ranks)
        shape = num_rows, *parameter.shape[1:]
        local_rows = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        local_params[name] = nn.Parameter(local_rows)
    num_replicated = sum(parameter.numel() for parameter in replicated.values())
    return ShardedModel(
        layout,
        tuple(units),
        unit_by_param,
        local_params,
        num_replicated,
        frozenset(sharded_ids),
    )


def _build_unit(
    parameters: list[nn.Parameter], dtype: torch.dtype, num_ranks: int, num_gathers: int
) -> UnitMemory:
    num_elements = dict.fromkeys((True, False), 0)
    for parameter in parameters:
        num_rows = _count_rows(parameter, num_ranks)
        num_elements[parameter.requires_grad] += num_rows * math.prod(parameter.shape[1:])
    num_trainable, num_frozen = num_elements[True], num_elements[False]
    return UnitMemory(
        weight_bytes=num_ranks * (num_trainable + num_frozen) * dtype.itemsize,
        loaded_bytes=num_ranks * (FP32_BYTES * num_trainable + dtype.itemsize * num_frozen),
        shard_bytes=FP32_BYTES * num_trainable + dtype.itemsize * num_frozen,
        num_trainable=sum(parameter.requires_grad for parameter in parameters),
        gradient_bytes=num_ranks * FP32_BYTES * num_trainable,
        gradient_shard_bytes=FP32_BYTES * num_trainable,
        num_gathers=num_gathers,
    )


def _count_rows(parameter: nn.Parameter, num_ranks: int) -> int:
    """Return the largest number of rows of a rank, to which all shards are padded."""
    return -(-len(parameter) // num_ranks)
