"""Audit of the parameters of a run: which parts training changed, and which it must not change.

Shapes: R rank, I inputs, O outputs of one layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import fsum

import torch
from torch import Tensor, nn

from finesight.evaluate.metric_difference import align_columns
from finesight.model.linear import LoraFactors, iter_adapters
from finesight.model.quant.base import find_quantized_weights
from finesight.model.trainable import MODEL_PARTS, ModelPart, get_part
from finesight.train.parallel.distributed import SINGLE_PROCESS, ProcessGroup

_INT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integer dtypes for viewing the bits of a tensor, by element size in bytes."""

CHUNK_ELEMENTS = 1 << 24
"""Number of elements per chunk of a checksum or a norm; limits memory."""

SAMPLE_SIZE = 16384
"""Approximate number of evenly spaced elements of a tensor whose initial values are stored."""


@dataclass(frozen=True, slots=True)
class ParamChange:
    """Changes of the trainable or of the frozen parameters of one model part.

    Attributes:
        num_changed: Number of tensors with at least one changed bit.
        num_with_grad: Number of tensors that received a non-zero gradient. Weight decay changes a
            tensor even without a gradient.
        relative_change: Norm of the change divided by the norm of the initial weights of the part.
            The change of a part with adapters is that of the merged weights, and its initial
            weights are those of the base model. Both norms of a fully trained part are estimated
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

    It contains checksums of all parameters, sampled values of fully trained ones, and the values of
    adapters that the run continues.
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
        self._adapters = {f"{path}.adapter": adapter for path, _, adapter in iter_adapters(model)}
        self._initial_factors: dict[str, LoraFactors] = {}
        for name, (lora_A_RI, lora_B_OR), _ in self._iter_factors():
            # A new adapter begins with zeros.
            if lora_B_OR.any():
                self._initial_factors[name] = LoraFactors(
                    lora_A_RI.to("cpu", copy=True), lora_B_OR.to("cpu", copy=True)
                )
        self._start = {name: values for name, _, *values in self._iter_records()}

    def _iter_records(self) -> Iterator[ParamRecord]:
        """Yield the current records of the local shards of all parameters."""
        for name, parameter in self._frozen.items():
            tensor = _get_local(parameter)
            yield name, tensor.numel(), compute_checksum(tensor), None
        for name, weight in self._quantized.items():
            checksum = torch.stack([compute_checksum(one) for one in weight.buffers()]).sum()
            yield name, weight.num_elements, checksum, None
        for name, tensor in self._master_weights.items():
            sample = None
            if name.rpartition(".lora_")[0] not in self._adapters:
                flat_E = tensor.reshape(-1)
                sample = flat_E[:: max(1, len(flat_E) // SAMPLE_SIZE)].clone()
            yield name, tensor.numel(), compute_checksum(tensor), sample

    def _iter_factors(self) -> Iterator[tuple[str, LoraFactors, float]]:
        """Yield name of the up-projection, current matrices and scale of each adapted layer."""
        for path, adapter in self._adapters.items():
            lora_A = self._read_factor(f"{path}.lora_A", adapter.lora_A)
            for layer, lora_slice in adapter.slices.items():
                name = f"{path}.lora_B.{layer}"
                lora_B_OR = self._read_factor(name, adapter.lora_B[layer])
                factors = LoraFactors(lora_A[lora_slice.rank_slice], lora_B_OR)
                yield name, factors, lora_slice.scale

    def _read_factor(self, name: str, parameter: Tensor) -> Tensor:
        """Return the complete values of an adapter matrix.

        A master weight may consist of the rows of this rank. Adapters themselves are replicated.
        """
        master_weight = self._master_weights.get(name)
        if master_weight is None or master_weight.shape != parameter.shape:
            return parameter.detach()
        return master_weight

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
                # Weights with adapters are frozen parameters of the part.
                frozen = sums_by_group.get((part, False), {}) if is_trained else {}
                squared_base = fsum(one[5] for one in frozen.values())
                param_changes.append(
                    _summarize_changes(part, is_trained, sums.values(), squared_base)
                )
        return param_changes

    def _sum_own_changes(
        self, params_with_grad: Collection[str], process_group: ProcessGroup
    ) -> dict[str, list[float]]:
        """Return sums over the local shard of each parameter, which can be added over the ranks.

        These are the number of elements, whether it changed, whether it received a gradient,
        whether it is trained, and the squared norms of the change and of the initial values. The
        change of an adapted layer is that of its up-projection, and its initial values are those of
        the frozen parameters of the part.
        """
        parts_with_adapters = set(map(get_part, self._adapters))
        own_sums: dict[str, list[float]] = {}
        for name, num_params, checksum, sample in self._iter_records():
            start_checksum, start_sample = self._start[name]
            squared_change = 0.0
            squared_start = 0.0
            is_trained = name in self._master_weights
            if sample is not None and start_sample is not None:
                scale = num_params / len(sample)
                squared_change = scale * float((sample - start_sample).square().sum())
                squared_start = scale * float(start_sample.square().sum())
            # Replicated weights are equal on every rank.
            is_counted = process_group.is_main or is_trained or self._is_sharded(name)
            if is_counted and not is_trained and get_part(name) in parts_with_adapters:
                squared_start = self._compute_frozen_norm(name)
            own_sums[name] = [
                is_counted * num_params,
                bool(checksum != start_checksum),
                name in params_with_grad,
                is_trained,
                squared_change,
                squared_start,
            ]
        if process_group.is_main:
            for name, factors, scale in self._iter_factors():
                # A rank may have no rows of it.
                sums = own_sums.setdefault(name, [0, False, False, True, 0.0, 0.0])
                initial = self._initial_factors.get(name)
                sums[4] = scale**2 * float(compute_squared_delta(factors, initial))
        return own_sums

    def _is_sharded(self, name: str) -> bool:
        return hasattr(self._frozen.get(name), "to_local")

    def _compute_frozen_norm(self, name: str) -> float:
        """Return the squared norm of the local shard of a frozen, possibly quantized parameter."""
        if name in self._quantized:
            layers = self._quantized[name].dequantize_layers()
            return sum(float(compute_squared_norm(layer_OI)) for layer_OI in layers)
        return float(compute_squared_norm(_get_local(self._frozen[name])))


def _get_local(parameter: nn.Parameter) -> Tensor:
    """Return the values of a parameter, or of its local shard."""
    tensor = parameter.detach()
    # DTensor is slow to import.
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor


def _summarize_changes(
    part: ModelPart, is_trained: bool, sums: Collection[list[float]], squared_base: float
) -> ParamChange:
    """Combine the sums of all parameters of a group, in the order of `_sum_own_changes`.

    Args:
        squared_base: Squared norm of frozen weights with adapters in the group; 0 without adapters.
    """
    counts, changed, with_grad, _, squared_changes, squared_starts = zip(*sums, strict=True)
    change_norm = fsum(squared_changes) ** 0.5
    start_norm = fsum((*squared_starts, squared_base)) ** 0.5
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


def compute_squared_norm(tensor: Tensor) -> Tensor:
    """Return the sum of the squares of all elements in fp64, on the device of the tensor."""
    chunks = torch.split(tensor.reshape(-1), CHUNK_ELEMENTS)
    # PyTorch sums pairwise, so that fp32 is precise within a chunk.
    return torch.stack([chunk.float().square().sum() for chunk in chunks]).double().sum()


def compute_squared_delta(factors: LoraFactors, initial: LoraFactors | None = None) -> Tensor:
    """Return the squared norm of B A minus the initial product, in fp64.

    The norm follows from products of size [R, R]: |B A|^2 = trace((B^T B) (A A^T)).
    """
    lora_A_RI = factors.lora_A.double()
    lora_B_OR = factors.lora_B.double()
    if initial is not None:
        # The difference is a product of twice the rank.
        lora_A_RI = torch.cat([lora_A_RI, initial.lora_A.to(lora_A_RI)])
        lora_B_OR = torch.cat([lora_B_OR, -initial.lora_B.to(lora_B_OR)], 1)
    gram_B_RR = lora_B_OR.T @ lora_B_OR
    gram_A_RR = lora_A_RI @ lora_A_RI.T
    # Rounding may make a difference of zero negative.
    return (gram_B_RR * gram_A_RR).sum().clamp(min=0)


def compute_checksum(tensor: Tensor) -> Tensor:
    """Sum the bits of a tensor as integers, on its device.

    A change of a single element always changes the sum.
    """
    bits_E = tensor.reshape(-1).view(_INT_DTYPES[tensor.itemsize])
    # In chunks, because torch first converts to int64.
    chunks = torch.split(bits_E, CHUNK_ELEMENTS)
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
