"""Estimate the peak memory of a run from tensor shapes, split into parts.

The peak is the persistent memory (weights, master weights, gradients, optimizer states) plus the
temporary memory of a pack (`plan.activation_memory`) or of the optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from finesight.config import TrainSettings
from finesight.model.lora.layer import stacked_row_counts
from finesight.model.trainable import trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.plan.activation_memory import ActivationMemory, MemorySnapshot
from finesight.plan.planned_pack import PlannedPack
from finesight.plan.saved_activations import FP32_BYTES, ComputeConfig
from finesight.train.cuda_graphs import MAX_GRAPHS
from finesight.train.grad_accumulation import LARGE_PARAM_ELEMENTS
from finesight.train.graph_buffers import GraphShape
from finesight.train.optim_states import BLOCK_SIZE
from finesight.train.optimizer import (
    MAX_CHUNK_ELEMENTS,
    MAX_STACK_ELEMENTS,
    MasterWeightOptimizer,
    ParamGroup,
)

ADAMW_STEP_BYTES = 20
"""Workspace bytes per parameter of an AdamW step on a CPU, without a kernel (`train.optimizer`)."""

CUBLAS_WORKSPACE_BYTES = 70 << 20
"""Bytes of the cuBLAS workspace that torch allocates on compute capability 9.0.

Small tensors of a run are included. See `CUBLAS_WORKSPACE_CONFIG` in the PyTorch documentation.
"""

CUDA_CONTEXT_BYTES = 600_000_000
"""GPU memory of the CUDA context, its libraries and kernels, in bytes.

The PyTorch allocator does not count it, so no metric of a run contains it. The value is an
assumption; measure it for each GPU model.
"""

CPU_PROCESS_BYTES = 900_000_000
"""Bytes of a CPU process without its tensors.

Counts torch, and memory cached by allocators and oneDNN. It increases over the first hundreds of
steps: the quickstart uses 1.4 GB in total after 16 steps and 2.3 GB after 200 steps.
"""

USABLE_MEMORY_FRACTION = 0.9
"""Fraction of the device memory that a plan may use.

The rest is reserved for fragmentation.
"""


@dataclass(frozen=True, slots=True)
class PersistentMemory:
    """Memory that exists throughout a run, and the optimizer step workspace, in bytes.

    Attributes:
        num_trainable: Number of trainable parameters.
        weight_bytes: Bytes of all weights and buffers of the model.
        master_weight_bytes: Bytes that master weights add to the weights.
        grad_sum_bytes: Bytes of gradient accumulation buffers that always exist.
        multi_pack_grad_sum_bytes: Bytes of buffers that exist only with several packs per step.
        optimizer_state_bytes: Bytes of the optimizer states.
        optimizer_step_bytes: Workspace bytes of an optimizer step.
        accumulated_ids: ids of parameters whose gradients are added to the accumulation buffer
            immediately, for steps with one pack and for steps with several packs.
    """

    num_trainable: int
    weight_bytes: int
    master_weight_bytes: int
    grad_sum_bytes: int
    multi_pack_grad_sum_bytes: int
    optimizer_state_bytes: int
    optimizer_step_bytes: int
    accumulated_ids: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Memory at the peak of a run by part, in bytes.

    The metrics of a run contain neither `cuda_context` nor the memory pool in `cuda_graphs`.
    """

    weights: int
    master_weights: int
    gradients: int
    optimizer_states: int
    activations: int
    workspace: int
    logits: int
    inputs: int
    libraries: int
    cuda_graphs: int
    cuda_context: int

    @property
    def allocated(self) -> int:
        """Bytes that a run reports as `peak_memory_gb`."""
        return self.total - self.cuda_context - self.cuda_graphs

    @property
    def total(self) -> int:
        """Total memory of all parts in bytes."""
        return sum(asdict(self).values())


def compute_persistent_memory(
    model: VisionLanguageModel, train: TrainSettings, compute: ComputeConfig
) -> PersistentMemory:
    """Compute the persistent memory of a tuned model on the meta device.

    As in a run, the parameters of the model become views of the parameter groups of the optimizer.
    """
    trainable_params = trainable_parameters(model)
    # Parameter groups of the optimizer, without optimizer state.
    param_groups = MasterWeightOptimizer(
        trainable_params, train.model_copy(update={"optimizer": "adamw"}), stacked_row_counts(model)
    ).param_groups
    tensors = [*model.parameters(), *model.buffers()]
    num_trainable = sum(len(group.master_weights) for group in param_groups)
    always_summed = [group for group in param_groups if _always_sums_gradients(group, train)]
    num_summed = sum(len(group.master_weights) for group in always_summed)
    residuals = [group.master_weights.residual_E for group in param_groups]
    return PersistentMemory(
        num_trainable=num_trainable,
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        master_weight_bytes=sum(
            residual_E.nbytes for residual_E in residuals if residual_E is not None
        ),
        grad_sum_bytes=FP32_BYTES * num_summed,
        multi_pack_grad_sum_bytes=FP32_BYTES * (num_trainable - num_summed),
        optimizer_state_bytes=sum(_optimizer_state_bytes(group, train) for group in param_groups),
        optimizer_step_bytes=max(
            _optimizer_step_bytes(group, train, compute) for group in param_groups
        ),
        accumulated_ids=(_accumulated_ids(always_summed), _accumulated_ids(param_groups)),
    )


def _accumulated_ids(groups: Iterable[ParamGroup]) -> frozenset[int]:
    param_slices = (param_slice for group in groups for param_slice in group.param_slices)
    return frozenset(
        id(p.parameter) for p in param_slices if p.parameter.numel() >= LARGE_PARAM_ELEMENTS
    )


def _always_sums_gradients(group: ParamGroup, train: TrainSettings) -> bool:
    """Return whether a parameter group accumulates gradients even with one pack per step."""
    return group.is_matmul and train.optimizer == "muon"


def _optimizer_state_bytes(group: ParamGroup, train: TrainSettings) -> int:
    num_elements = len(group.master_weights)
    if group.is_matmul and train.optimizer == "muon":
        return FP32_BYTES * num_elements
    if group.is_matmul and train.optimizer == "adamw_8bit":
        return 2 * (num_elements + FP32_BYTES * num_elements // BLOCK_SIZE)
    return 2 * FP32_BYTES * num_elements


def _optimizer_step_bytes(group: ParamGroup, train: TrainSettings, compute: ComputeConfig) -> int:
    """Return the workspace bytes of an optimizer step; 0 for the AdamW kernel."""
    num_elements = len(group.master_weights)
    if group.is_matmul and train.optimizer == "muon":
        return 3 * FP32_BYTES * min(num_elements, MAX_STACK_ELEMENTS)
    return 0 if compute.is_cuda else ADAMW_STEP_BYTES * min(num_elements, MAX_CHUNK_ELEMENTS)


def compute_peak_memory(
    persistent: PersistentMemory,
    activations: ActivationMemory,
    packs: Iterable[PlannedPack],
    compute: ComputeConfig,
    patch_bytes: int,
    *,
    has_multiple_packs: bool,
    use_graphs: bool = True,
) -> PeakMemory:
    """Compute the peak memory over packs and the optimizer step.

    Args:
        persistent: Persistent memory of the run.
        activations: Activation memory of the model.
        packs: Packs that may be the peak.
        compute: Device properties.
        patch_bytes: Bytes of a patch copied to the device.
        has_multiple_packs: Whether any step has several packs.
        use_graphs: Whether CUDA graphs are used where possible.
    """
    timeline = activations.gradient_timeline(persistent.accumulated_ids[has_multiple_packs])
    peak_snapshot, input_bytes = (
        MemorySnapshot(
            saved_activations=0,
            workspace=persistent.optimizer_step_bytes,
            gradients=timeline.at_end,
        ),
        0,
    )
    graphs = _GraphMemory(activations, persistent.accumulated_ids[True])
    for pack in packs:
        pack_input_bytes = pack.num_patches * patch_bytes + pack.num_tokens * 40
        graph_snapshots = graphs.collect_snapshots(pack) if use_graphs else []
        for snapshot in graph_snapshots or activations.iter_snapshots(pack, timeline):
            if snapshot.total + pack_input_bytes > peak_snapshot.total + input_bytes:
                peak_snapshot, input_bytes = snapshot, pack_input_bytes
    return PeakMemory(
        weights=persistent.weight_bytes + activations.persistent_bytes,
        master_weights=persistent.master_weight_bytes,
        gradients=peak_snapshot.gradients
        + graphs.grad_bytes
        + persistent.grad_sum_bytes
        + (persistent.multi_pack_grad_sum_bytes if has_multiple_packs else 0),
        optimizer_states=persistent.optimizer_state_bytes,
        activations=peak_snapshot.saved_activations,
        workspace=peak_snapshot.workspace,
        logits=peak_snapshot.logits,
        inputs=input_bytes + sum(graphs.buffer_bytes.values()),
        libraries=(CUBLAS_WORKSPACE_BYTES if compute.is_cuda else CPU_PROCESS_BYTES)
        * (2 if graphs.buffer_bytes else 1),
        cuda_graphs=graphs.pool_bytes,
        cuda_context=CUDA_CONTEXT_BYTES if compute.is_cuda else 0,
    )


class _GraphMemory:
    """Memory of the CUDA graphs of a run: static buffers, gradient buffers and memory pool.

    Tensors outside of graphs cannot use the pool, and allocator metrics do not contain it.
    """

    def __init__(self, activations: ActivationMemory, large_param_ids: frozenset[int]) -> None:
        self._activations = activations
        self._full_timeline, self._timeline = (
            activations.gradient_timeline(),
            activations.gradient_timeline(large_param_ids),
        )
        self.buffer_bytes: dict[GraphShape, int] = {}
        self.grad_bytes = self.pool_bytes = 0

    def collect_snapshots(self, pack: PlannedPack) -> list[MemorySnapshot]:
        """Return the memory snapshots of capturing a pack as a CUDA graph.

        Returns an empty list for a pack that runs without a CUDA graph.
        """
        graph = self._activations.plan_graph(pack)
        if graph is None or (
            graph.shape not in self.buffer_bytes and len(self.buffer_bytes) == MAX_GRAPHS
        ):
            return []
        self.buffer_bytes[graph.shape] = graph.buffer_bytes
        self.grad_bytes = self._full_timeline.at_end
        snapshots = [*self._activations.iter_snapshots(graph.padded_pack, self._timeline)]
        self.pool_bytes = max(self.pool_bytes, *(snapshot.total for snapshot in snapshots))
        if graph.shape.vision_shape is not None:
            return snapshots
        saved_vision = self._activations.saved_vision_bytes(pack)
        with_vision = [
            replace(snapshot, saved_activations=snapshot.saved_activations + saved_vision)
            for snapshot in snapshots
        ]
        return [*with_vision, *self._activations.iter_vision_snapshots(pack, self._timeline)]
