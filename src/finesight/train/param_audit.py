"""Parameter audit: verifies that training changed the trainable parameters and no others."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import fsum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finesight.errors import UserError
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
        part: Model part.
        is_trained: Whether the parameters are trainable.
        num_tensors: Number of tensors.
        num_params: Number of parameters.
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

    def as_json(self) -> dict[str, Any]:
        """Return the content of an entry of `param_audit.json`."""
        return asdict(self)


class ParamAudit:
    """Record of the initial parameters of a run, for comparison at its end.

    It contains checksums of all parameters, and sampled values of the trainable ones.
    """

    def __init__(self, model: nn.Module, master_weights: Mapping[str, Tensor]) -> None:
        # Parameters, not tensors: the data of a weight may be reallocated.
        self._frozen = {
            name: parameter
            for name, parameter in model.named_parameters()
            # A trainable DTensor without master weights on this rank has no local rows.
            if name not in master_weights
            and not (hasattr(parameter, "to_local") and parameter.requires_grad)
        }
        self._quantized = find_quantized_weights(model)
        self._master_weights = master_weights
        frozen = {name: _local_tensor(tensor).numel() for name, tensor in self._frozen.items()}
        frozen |= {name: weight.num_elements for name, weight in self._quantized.items()}
        trained = {name: tensor.numel() for name, tensor in master_weights.items()}
        self._param_counts = {True: trained, False: frozen}
        self._sums = self._compute_checksums()
        self._start_samples = {
            name: _sample_values(tensor).clone() for name, tensor in master_weights.items()
        }

    def _compute_checksums(self) -> dict[str, int]:
        frozen = {
            name: _local_tensor(parameter.detach()) for name, parameter in self._frozen.items()
        }
        sums = compute_checksums(frozen) | compute_checksums(self._master_weights)
        for name, weight in self._quantized.items():
            sums[name] = sum(compute_checksums(dict(weight.named_buffers())).values())
        return sums

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
        sums = self._compute_checksums()
        own_changes = {
            name: _TensorChange(
                is_trained,
                # Quantized weights are replicated on every rank.
                0 if name in self._quantized and not process_group.is_main else num_params,
                sums[name] != self._sums[name],
                name in params_with_grad,
                *(self._sampled_change(name) if is_trained else (0.0, 0.0)),
            )
            for is_trained, param_counts in self._param_counts.items()
            for name, num_params in param_counts.items()
        }
        changes_by_name: dict[str, _TensorChange] = {}
        for payload in process_group.all_gather_str(json.dumps(own_changes)):
            # The changes of all shards of a parameter are added.
            for name, shard in json.loads(payload).items():
                total = zip(changes_by_name.get(name, _TensorChange()), shard, strict=True)
                changes_by_name[name] = _TensorChange(*(a + b for a, b in total))
        param_changes = []
        for part in MODEL_PARTS:
            for is_trained in self._param_counts:
                changes = [
                    change
                    for name, change in changes_by_name.items()
                    if get_part(name) == part and bool(change.is_trained) == is_trained
                ]
                if not changes:
                    continue
                change_norm = fsum(change.change_sq for change in changes) ** 0.5
                start_norm = fsum(change.start_sq for change in changes) ** 0.5
                ratio = float("inf") if change_norm else 0.0
                param_changes.append(
                    ParamChange(
                        part=part,
                        is_trained=is_trained,
                        num_tensors=len(changes),
                        num_params=sum(change.num_params for change in changes),
                        num_changed=sum(change.is_changed > 0 for change in changes),
                        num_with_grad=sum(change.has_grad > 0 for change in changes),
                        relative_change=change_norm / start_norm if start_norm else ratio,
                    )
                )
        return param_changes

    def _sampled_change(self, name: str) -> tuple[float, float]:
        """Return the squared norms of the change and of the initial values, of sampled elements."""
        start = self._start_samples[name]
        change = _sample_values(self._master_weights[name]) - start
        return float(change.square().sum()), float(start.square().sum())


class _TensorChange(NamedTuple):
    """Change of a parameter, or sums over its shards.

    Attributes:
        is_trained: Whether the parameter is trainable; a count of shards, as the other flags.
        num_params: Number of elements.
        is_changed: Whether at least one bit changed.
        has_grad: Whether the parameter received a non-zero gradient.
        change_sq: Squared norm of the change of the sampled elements.
        start_sq: Squared norm of the initial sampled elements.
    """

    is_trained: int = 0
    num_params: int = 0
    is_changed: int = 0
    has_grad: int = 0
    change_sq: float = 0.0
    start_sq: float = 0.0


def _local_tensor(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor; return any other tensor unchanged.

    The class is not imported, because DTensor is slow to import.
    """
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def compute_checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Sum the bits of each tensor as integers.

    A change of a single element always changes the sum.
    """
    sums = []
    for tensor in tensors.values():
        bits_E = tensor.reshape(-1).view(_INT_DTYPES[tensor.itemsize])
        # In chunks, because torch first converts to int64.
        chunks = torch.split(bits_E, CHECKSUM_CHUNK_ELEMENTS)
        sums.append(torch.stack([chunk.sum(dtype=torch.int64) for chunk in chunks]).sum())
    return dict(zip(tensors, torch.stack(sums).tolist(), strict=True)) if sums else {}


def _sample_values(tensor: Tensor) -> Tensor:
    flat_E = tensor.reshape(-1)
    return flat_E[:: max(1, len(flat_E) // SAMPLE_SIZE)]


def check_param_changes(param_changes: Iterable[ParamChange]) -> None:
    """Verify that frozen parts are unchanged and trainable parts have changed.

    Raises:
        RuntimeError: A frozen part changed, which is a bug.
        UserError: A trainable part did not change.
    """
    for change in param_changes:
        if not change.is_trained and change.num_changed:
            raise RuntimeError(
                f"{change.num_changed} of {change.num_tensors} frozen tensors of {change.part}"
                " changed"
            )
        if change.is_trained and not (change.num_changed and change.num_with_grad):
            problem = "no gradient reached" if change.num_changed else "training did not change"
            raise UserError(
                f"{problem} the {change.num_tensors} trainable tensors of {change.part}",
                where=f"tune.{change.part}",
                expected="updates of all trainable parts",
                remedy=f"add samples that use it (images, for vision and merger), increase"
                f" train.learning_rate.{change.part}, or set tune.{change.part}=frozen",
            )
