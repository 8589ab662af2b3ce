"""Audit of the parameters of a run: which parts training changed, and which it must not change."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import fsum

import torch
from torch import Tensor, nn

from finesight.evaluate.metric_difference import align_columns
from finesight.model.quant.base import find_quantized_weights
from finesight.model.trainable import MODEL_PARTS, ModelPart, get_part
from finesight.train.parallel.distributed import SINGLE_PROCESS, ProcessGroup

_INT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integer dtypes for viewing the bits of a tensor, by element size in bytes."""

CHECKSUM_CHUNK_ELEMENTS = 1 << 24
"""Number of elements per chunk when a checksum is computed; limits memory."""

SAMPLE_SIZE = 16384
"""Approximate number of evenly spaced elements of a tensor whose initial values are stored."""


@dataclass(frozen=True, slots=True)
class ParamChange:
    """Changes of the trainable or of the frozen parameters of one model part.

    Attributes:
        num_changed: Number of tensors with at least one changed bit.
        num_with_grad: Number of tensors that received a non-zero gradient. Weight decay changes a
            tensor even without a gradient.
        relative_change: Norm of the change divided by the norm of the initial values, estimated
            from sampled elements.
    """

    part: ModelPart
    is_trained: bool
    num_tensors: int
    num_params: int
    num_changed: int
    num_with_grad: int
    relative_change: float


ParamRecord = tuple[str, int, Tensor, Tensor | None]
"""Name, number of elements, checksum, and copied elements of a trainable parameter or shard."""


class ParamAudit:
    """Record of the initial parameters of a run, for comparison at its end.

    It contains checksums of all parameters, and sampled values of the trainable ones.
    """

    def __init__(self, model: nn.Module, master_weights: Mapping[str, Tensor]) -> None:
        # Parameters, not tensors: the data of a weight may be reallocated.
        is_sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())
        self._frozen: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            # Trainable parameters of a sharded model may have no master weights on this rank.
            may_be_of_other_rank = is_sharded and parameter.requires_grad
            if name not in master_weights and not may_be_of_other_rank:
                self._frozen[name] = parameter
        self._quantized = find_quantized_weights(model)
        self._master_weights = master_weights
        self._start = {name: values for name, _, *values in self._iter_records()}

    def _iter_records(self) -> Iterator[ParamRecord]:
        """Yield the current records of the local shards of all parameters."""
        for name, parameter in self._frozen.items():
            tensor = parameter.detach()
            # DTensor is slow to import.
            if hasattr(tensor, "to_local"):
                tensor = tensor.to_local()
            yield name, tensor.numel(), compute_checksum(tensor), None
        for name, weight in self._quantized.items():
            checksum = torch.stack([compute_checksum(one) for one in weight.buffers()]).sum()
            yield name, weight.num_elements, checksum, None
        for name, tensor in self._master_weights.items():
            flat_E = tensor.reshape(-1)
            sample = flat_E[:: max(1, len(flat_E) // SAMPLE_SIZE)].clone()
            yield name, tensor.numel(), compute_checksum(tensor), sample

    def compute_changes(
        self, params_with_grad: Collection[str], process_group: ProcessGroup = SINGLE_PROCESS
    ) -> list[ParamChange]:
        """Compare all parameters with their initial values.

        Args:
            params_with_grad: Names of parameters that received a non-zero gradient.
            process_group: Ranks of a sharded model, which must all call this method.

        Returns:
            Changes by model part, separately for trainable and frozen parameters.
        """
        own_sums = self._sum_own_changes(params_with_grad, process_group)
        sums_by_group: dict[tuple[ModelPart, bool], dict[str, list[float]]] = {}
        for rank_sums in process_group.all_gather_object(own_sums):
            for name, shard in rank_sums.items():
                is_trained = shard[3] > 0
                sums = sums_by_group.setdefault((get_part(name), is_trained), {})
                # Each rank has the sums over its shard of the parameter.
                sums[name] = [a + b for a, b in zip(sums.get(name, [0] * 6), shard, strict=True)]
        param_changes = []
        for part, is_trained in product(MODEL_PARTS, (True, False)):
            if sums := sums_by_group.get((part, is_trained), {}):
                param_changes.append(_summarize_changes(part, is_trained, sums.values()))
        return param_changes

    def _sum_own_changes(
        self, params_with_grad: Collection[str], process_group: ProcessGroup
    ) -> dict[str, list[float]]:
        """Return sums over the local shard of each parameter, which can be added over the ranks.

        These are the number of elements, whether it changed, whether it received a gradient,
        whether it is trained, and the squared norms of the change and of the initial values.
        """
        own_sums: dict[str, list[float]] = {}
        for name, num_params, checksum, sample in self._iter_records():
            start_checksum, start_sample = self._start[name]
            squared_change = 0.0
            squared_start = 0.0
            if sample is not None and start_sample is not None:
                squared_change = float((sample - start_sample).square().sum())
                squared_start = float(start_sample.square().sum())
            # Quantized weights are replicated on every rank.
            is_counted = name not in self._quantized or process_group.is_main
            own_sums[name] = [
                is_counted * num_params,
                bool(checksum != start_checksum),
                name in params_with_grad,
                sample is not None,
                squared_change,
                squared_start,
            ]
        return own_sums


def _summarize_changes(
    part: ModelPart, is_trained: bool, sums: Collection[list[float]]
) -> ParamChange:
    """Combine the sums of all parameters of a group, in the order of `_sum_own_changes`."""
    counts, changed, with_grad, _, squared_changes, squared_starts = zip(*sums, strict=True)
    change_norm = fsum(squared_changes) ** 0.5
    start_norm = fsum(squared_starts) ** 0.5
    if start_norm:
        relative_change = change_norm / start_norm
    elif change_norm:
        relative_change = float("inf")
    else:
        relative_change = 0.0
    return ParamChange(
        part=part,
        is_trained=is_trained,
        num_tensors=len(sums),
        num_params=int(sum(counts)),
        num_changed=sum(map(bool, changed)),
        num_with_grad=sum(map(bool, with_grad)),
        relative_change=relative_change,
    )


def compute_checksum(tensor: Tensor) -> Tensor:
    """Sum the bits of a tensor as integers, on its device.

    A change of a single element always changes the sum.
    """
    bits_E = tensor.reshape(-1).view(_INT_DTYPES[tensor.itemsize])
    # In chunks, because torch first converts to int64.
    chunks = torch.split(bits_E, CHECKSUM_CHUNK_ELEMENTS)
    return torch.stack([chunk.sum(dtype=torch.int64) for chunk in chunks]).sum()


def format_param_changes(changes: list[ParamChange]) -> str:
    """Format parameter changes as a table with one row per model part."""
    cells = [("part", "", "tensors", "parameters", "changed", "relative change")]
    for change in changes:
        kind = "frozen"
        ratio = "-"
        if change.is_trained:
            kind = "trained"
            ratio = f"{change.relative_change:.2e}"
        counts = (str(change.num_tensors), f"{change.num_params:,}", str(change.num_changed))
        cells.append((change.part, kind, *counts, ratio))
    return align_columns(cells, 2)
