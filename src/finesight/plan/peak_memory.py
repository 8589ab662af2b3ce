"""Estimate the peak memory of a run from tensor shapes, split into parts.

The peak is the persistent memory (weights, master weights, gradients, optimizer states) plus the
temporary memory of a pack (`plan.dry_run`) or of the optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

from torch import Tensor, nn

from finesight.infer.kv_cache import get_kv_bytes_per_token
from finesight.model.linear import stacked_row_counts
from finesight.model.trainable import trainable_parameters
from finesight.model.vision_encoder import VisionEncoder
from finesight.model.vlm import VisionLanguageModel
from finesight.plan.dry_run import ComputeTarget, PlannedPack, StepMemory, StepTracer
from finesight.plan.sharded_memory import FP32_BYTES, RankLayout, ShardedModel, shard_model
from finesight.settings.config import TrainSettings
from finesight.train.cuda_graphs import MAX_GRAPHS, has_few_trainable_params, should_capture
from finesight.train.graph_buffers import (
    GraphShape,
    GraphVisionShape,
    can_capture_vision,
    should_capture_vision,
)
from finesight.train.master_weight_optimizer import (
    LARGE_PARAM_ELEMENTS,
    MasterWeightOptimizer,
    ParamGroup,
)
from finesight.vision.image_processing import GridTHW

INDEX_BYTES = 8
"""Bytes of an int64 index."""

CU_SEQLEN_BYTES = 4
"""Bytes of an element of `cu_seqlens` (int32)."""

CUBLAS_WORKSPACE_BYTES = 70 << 20
"""Bytes of the cuBLAS workspace that torch allocates on compute capability 9.0.

Small tensors of a run are included. See `CUBLAS_WORKSPACE_CONFIG` in the PyTorch documentation.
"""

CUDA_CONTEXT_BYTES = 600_000_000
"""GPU memory of the CUDA context, its libraries and kernels, in bytes.

The PyTorch allocator does not count it, so no metric of a run contains it. The value is an
assumption; measure it for each GPU model.
"""

NCCL_BYTES = 700_000_000
"""GPU memory of the buffers of an NCCL communicator, in bytes, outside of the PyTorch allocator.

NCCL allocates 10 MiB per channel and connection, and more channels for faster links. All-reduce on
A100 with NVLink took 544 MB with two GPUs and 688 MB with four (github.com/NVIDIA/nccl, issue 964).
"""

CPU_PROCESS_BYTES = 900_000_000
"""Bytes of a CPU process without its tensors.

Counts torch, and memory cached by allocators and oneDNN. It increases over the first hundreds of
steps: the quickstart uses 1.4 GB in total after 16 steps and 2.3 GB after 200 steps.
"""

USABLE_MEMORY_FRACTION = 0.9
"""Fraction of the device memory that a plan may use; the rest is for fragmentation."""

SINGLE_RANK = RankLayout()


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
        optimizer_traffic_bytes: Bytes of memory traffic of an optimizer step.
        accumulated_ids: ids of parameters whose gradients are added to the accumulation buffer
            immediately, for steps with one pack and for steps with several packs.
        loading_bytes: Bytes of the complete model while it is loaded, before it is sharded.
        host_bytes: Bytes of weights, gradients and optimizer states in host memory, of one rank.
        layout: Number of ranks, and the mode of sharding.
        sharded: Shards of the model; None if every rank has all of it.
    """

    num_trainable: int
    weight_bytes: int
    master_weight_bytes: int
    grad_sum_bytes: int
    multi_pack_grad_sum_bytes: int
    optimizer_state_bytes: int
    optimizer_step_bytes: int
    optimizer_traffic_bytes: int
    accumulated_ids: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    loading_bytes: int = 0
    host_bytes: int = 0
    layout: RankLayout = SINGLE_RANK
    sharded: ShardedModel | None = None

    @property
    def fixed_bytes(self) -> int:
        """Bytes on the device at any time of a training step."""
        weight_bytes = self.weight_bytes + self.master_weight_bytes
        return weight_bytes + self.optimizer_state_bytes + self.grad_sum_bytes


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Memory at the peak of a run by part, in bytes.

    The metrics of a run contain neither `cuda_context` and `nccl` nor the memory pool in
    `cuda_graphs`.

    Attributes:
        gathered_weights: All-gathered weights of a sharded model, with their buffers.
    """

    weights: int
    master_weights: int
    gradients: int
    optimizer_states: int
    activations: int
    workspace: int
    gathered_weights: int
    inputs: int
    libraries: int
    nccl: int
    cuda_graphs: int
    cuda_context: int

    @property
    def allocated(self) -> int:
        """Bytes that a run reports as `peak_memory_gb`."""
        return self.total - self.cuda_context - self.cuda_graphs - self.nccl

    @property
    def total(self) -> int:
        """Total memory of all parts in bytes."""
        return sum(asdict(self).values())


def compute_persistent_memory(
    model: VisionLanguageModel,
    train: TrainSettings,
    compute: ComputeTarget,
    teacher: VisionLanguageModel | None = None,
    layout: RankLayout = SINGLE_RANK,
) -> PersistentMemory:
    """Compute the persistent memory of a tuned model and its teacher, on the meta device.

    As in a run, the parameters of the model become views of the parameter groups of the optimizer,
    unless the model is sharded.
    """
    sharded: ShardedModel | None = None
    if layout.is_sharded:
        sharded = shard_model(model, compute.dtype, layout)
        params = sharded.local_params
    else:
        params = trainable_parameters(model)
    optimizer = MasterWeightOptimizer(params, train, stacked_row_counts(model))
    if layout.num_ranks > 1 and sharded is None:
        optimizer.use_flat_gradients()
    tensors = [*model.parameters(), *model.buffers()]
    if teacher is not None:
        tensors += [*teacher.parameters(), *teacher.buffers()]

    is_cuda = compute.is_cuda and not layout.is_offloaded
    num_trainable = 0
    num_summed = 0
    residual_bytes = 0
    state_bytes = 0
    traffic_bytes = 0
    always_summed: list[ParamGroup] = []
    for group in optimizer.param_groups:
        num_trainable += len(group.master_weights)
        # Some optimizers and several ranks accumulate gradients even with one pack per step.
        if group.gradients.sums[0] is not None:
            num_summed += len(group.master_weights)
            always_summed.append(group)
        residual_E = group.master_weights.residual_E
        if residual_E is not None:
            residual_bytes += residual_E.nbytes
        state_bytes += group.optimizer.state_bytes()
        traffic_bytes += group.optimizer.traffic_bytes(is_cuda)
    memory = PersistentMemory(
        num_trainable=num_trainable,
        weight_bytes=_count_bytes(tensors),
        master_weight_bytes=residual_bytes,
        grad_sum_bytes=FP32_BYTES * num_summed,
        multi_pack_grad_sum_bytes=FP32_BYTES * (num_trainable - num_summed),
        optimizer_state_bytes=state_bytes,
        optimizer_step_bytes=max(
            group.optimizer.workspace_bytes(is_cuda) for group in optimizer.param_groups
        ),
        optimizer_traffic_bytes=traffic_bytes,
        accumulated_ids=(_accumulated_ids(always_summed), _accumulated_ids(optimizer.param_groups)),
        layout=layout,
    )
    if sharded is None:
        return memory
    return _shard_memory(memory, sharded, tensors)


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _shard_memory(
    memory: PersistentMemory, sharded: ShardedModel, tensors: Iterable[Tensor]
) -> PersistentMemory:
    """Complete the memory of the optimizer of one rank by that of its shards.

    The optimizer has its own fp32 copy of the rows, beside those that are all-gathered.

    Args:
        memory: Memory of the optimizer of the own rows.
        tensors: All weights and buffers of the complete model.
    """
    complete_bytes = 0
    for tensor in tensors:
        if id(tensor) not in sharded.sharded_ids:
            complete_bytes += tensor.nbytes
    master_bytes = FP32_BYTES * memory.num_trainable
    # The gradients of replicated parameters are summed completely, and all-reduced.
    replicated_grad_bytes = FP32_BYTES * sharded.num_replicated
    multi_pack_bytes = replicated_grad_bytes + sharded.total.gradient_shard_bytes
    memory = replace(
        memory,
        weight_bytes=complete_bytes + sharded.total.shard_bytes,
        master_weight_bytes=master_bytes,
        multi_pack_grad_sum_bytes=multi_pack_bytes,
        optimizer_step_bytes=max(memory.optimizer_step_bytes, replicated_grad_bytes),
        accumulated_ids=(frozenset(), frozenset(sharded.unit_by_param)),
        loading_bytes=complete_bytes + sharded.loading_bytes,
        sharded=sharded,
    )
    if not sharded.layout.is_offloaded:
        return memory
    return replace(
        memory,
        weight_bytes=complete_bytes,
        master_weight_bytes=0,
        multi_pack_grad_sum_bytes=replicated_grad_bytes,
        optimizer_state_bytes=0,
        optimizer_step_bytes=replicated_grad_bytes,
        host_bytes=sharded.total.pinned_bytes + master_bytes + memory.optimizer_state_bytes,
    )


def _accumulated_ids(groups: Iterable[ParamGroup]) -> frozenset[int]:
    """Return the ids of parameters whose gradients are accumulated as soon as they are computed."""
    ids = set()
    for group in groups:
        for param_slice in group.param_slices:
            if param_slice.parameter.numel() >= LARGE_PARAM_ELEMENTS:
                ids.add(id(param_slice.parameter))
    return frozenset(ids)


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """Predicted CUDA graph for all packs of one shape.

    Attributes:
        shape: Shape of the graph, which identifies it.
        padded_pack: Pack padded to this shape. It contains images if the graph includes the vision
            encoder.
        buffer_bytes: Bytes of the static inputs and outputs.
    """

    shape: GraphShape
    padded_pack: PlannedPack
    buffer_bytes: int


def compute_graph_shape(
    encoder: VisionEncoder, pack: PlannedPack, captures_vision: bool
) -> GraphShape:
    """Return the shape of the CUDA graph of a pack."""
    vision_shape = None
    if captures_vision:
        patch_bytes = pack.stored_patch_dim(encoder.config)
        vision_shape = GraphVisionShape.from_grids(
            encoder, pack.grid_thw, pack.num_patches, patch_bytes
        )
    return GraphShape.from_lengths(
        pack.lengths,
        pack.prefix_length,
        pack.num_patches // encoder.config.merge_size**2,
        pack.num_supervised_tokens,
        vision_shape,
    )


def plan_graph(
    model: VisionLanguageModel,
    compute: ComputeTarget,
    activation_checkpointing: float,
    pack: PlannedPack,
) -> GraphPlan | None:
    """Return the CUDA graph plan of a pack, or None if no graph is used."""
    encoder = model.visual
    if not (compute.has_varlen_attention and has_few_trainable_params(model)):
        return None
    if not should_capture(
        model, pack.num_tokens, pack.num_supervised_tokens, activation_checkpointing
    ):
        return None
    merge_size = encoder.config.merge_size
    captures_vision = can_capture_vision(model) and should_capture_vision(
        pack.num_patches, activation_checkpointing
    )
    shape = compute_graph_shape(encoder, pack, captures_vision)
    vision_shape = shape.vision_shape
    # Per token an ID and three position IDs, per feature the index of its token, and per label
    # its value and the index of its logits.
    buffer_bytes = INDEX_BYTES * (
        4 * shape.num_tokens + shape.num_features + 2 * shape.num_labels
    ) + CU_SEQLEN_BYTES * (shape.num_sequences + 1)
    grid_thw: tuple[GridTHW, ...] = ()
    if vision_shape is None:
        feature_bytes = (
            shape.num_features
            * encoder.features_per_token
            * encoder.config.out_hidden_size
            * compute.dtype.itemsize
        )
        buffer_bytes += feature_bytes
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            # An encoder outside the graph gets the gradients of the features from a second buffer.
            buffer_bytes += feature_bytes
    else:
        # Per patch its bytes, row and column; with windows, their order and its inverse.
        buffer_bytes += vision_shape.num_patches * (vision_shape.patch_bytes + 2 * CU_SEQLEN_BYTES)
        if encoder.window_attention[1]:
            buffer_bytes += 2 * INDEX_BYTES * shape.num_features
        for count, _ in vision_shape.segment_shapes:
            buffer_bytes += CU_SEQLEN_BYTES * (count + 1)
        num_padding = vision_shape.num_patches - pack.num_patches
        grid_thw = pack.grid_thw
        if num_padding:
            grid_thw = (*grid_thw, (1, merge_size, num_padding // merge_size))
    lengths = *pack.lengths, shape.num_tokens - pack.num_tokens
    padded_pack = PlannedPack(lengths, grid_thw, shape.num_labels, pack.prefix_length)
    return GraphPlan(shape, padded_pack, buffer_bytes)


def compute_peak_memory(
    persistent: PersistentMemory,
    tracer: StepTracer,
    packs: Sequence[PlannedPack],
    activation_checkpointing: float,
    *,
    has_multiple_packs: bool,
    use_graphs: bool = True,
) -> PeakMemory:
    """Compute the peak memory over packs and the optimizer step."""
    model = tracer.model
    compute = tracer.compute
    graphs: dict[GraphShape, GraphPlan] = {}
    graph_packs: list[PlannedPack] = []
    eager_packs = [*packs]
    if use_graphs:
        graphs, graph_packs, eager_packs = _plan_graphs(
            model, compute, activation_checkpointing, packs
        )
    parameters = trainable_parameters(model).values()
    accumulated_ids = persistent.accumulated_ids[has_multiple_packs]
    candidates = [_Peak(_trace_optimizer_step(persistent, parameters, has_multiple_packs))]
    if tracer.teacher is not None:
        for pack in bound_packs(packs, compute):
            candidates.append(_Peak(tracer.trace_teacher(pack), count_input_bytes(model, pack)))
    for pack in bound_packs(eager_packs, compute):
        memory = tracer.trace(pack, activation_checkpointing, accumulated_ids)
        memory = _add_gathered_keys(memory, tracer, pack, activation_checkpointing)
        candidates.append(_Peak(memory, count_input_bytes(model, pack)))
    for pack in bound_packs(graph_packs, compute):
        graph = plan_graph(model, compute, activation_checkpointing, pack)
        assert graph is not None, "a pack with a graph"
        peaks = _trace_graph(
            tracer, pack, graph, activation_checkpointing, persistent.accumulated_ids[True]
        )
        inputs = count_input_bytes(model, pack)
        for memory, pool_bytes in peaks:
            candidates.append(_Peak(memory, inputs, pool_bytes))
    highest = max(candidates, key=lambda candidate: candidate.total)
    peak = highest.memory

    gradient_bytes = peak.gradients + persistent.grad_sum_bytes
    if graphs:
        gradient_bytes += _count_bytes(parameters)
    if has_multiple_packs:
        gradient_bytes += persistent.multi_pack_grad_sum_bytes
    idle = _build_idle_memory(tracer, persistent.layout.num_ranks)
    libraries = idle.libraries
    if graphs:
        libraries *= 2
    return PeakMemory(
        weights=persistent.weight_bytes + tracer.persistent_bytes,
        master_weights=persistent.master_weight_bytes,
        gradients=gradient_bytes,
        optimizer_states=persistent.optimizer_state_bytes,
        activations=peak.activations,
        workspace=peak.workspace,
        inputs=highest.input_bytes + sum(graph.buffer_bytes for graph in graphs.values()),
        libraries=libraries,
        cuda_graphs=max(candidate.pool_bytes for candidate in candidates),
        cuda_context=idle.cuda_context,
        gathered_weights=peak.gathered,
        nccl=idle.nccl,
    )


def _plan_graphs(
    model: VisionLanguageModel,
    compute: ComputeTarget,
    activation_checkpointing: float,
    packs: Sequence[PlannedPack],
) -> tuple[dict[GraphShape, GraphPlan], list[PlannedPack], list[PlannedPack]]:
    """Return at most `MAX_GRAPHS` graphs, the packs with a graph, and the other packs."""
    graphs: dict[GraphShape, GraphPlan] = {}
    graph_packs = []
    eager_packs = []
    for pack in packs:
        graph = plan_graph(model, compute, activation_checkpointing, pack)
        if graph is None or (graph.shape not in graphs and len(graphs) == MAX_GRAPHS):
            eager_packs.append(pack)
        else:
            graphs[graph.shape] = graph
            graph_packs.append(pack)
    return graphs, graph_packs, eager_packs


@dataclass(frozen=True, slots=True)
class _Peak:
    """Memory of a moment of a step that may be its peak, in bytes."""

    memory: StepMemory
    input_bytes: int = 0
    pool_bytes: int = 0

    @property
    def total(self) -> int:
        return self.memory.total + self.input_bytes


def _trace_optimizer_step(
    persistent: PersistentMemory, parameters: Iterable[nn.Parameter], has_multiple_packs: bool
) -> StepMemory:
    """Return the memory of the optimizer step, with the gradients that are not in sums."""
    accumulated_ids = persistent.accumulated_ids[has_multiple_packs]
    sharded = persistent.sharded
    sharded_ids = frozenset() if sharded is None else sharded.sharded_ids
    waiting_bytes = 0
    for parameter in parameters:
        if id(parameter) not in accumulated_ids and id(parameter) not in sharded_ids:
            waiting_bytes += parameter.nbytes
    if sharded is not None and not (has_multiple_packs or sharded.layout.is_offloaded):
        waiting_bytes += sharded.total.gradient_shard_bytes
    return StepMemory(workspace=persistent.optimizer_step_bytes, gradients=waiting_bytes)


def _add_gathered_keys(
    memory: StepMemory, tracer: StepTracer, pack: PlannedPack, activation_checkpointing: float
) -> StepMemory:
    """Add the keys and values that ranks gather for a split sample.

    They are saved for the backward pass, except in layers with activation checkpointing.
    """
    if pack.num_ranks == 1:
        return memory
    config = tracer.model.config.decoder
    num_tokens = pack.num_tokens * pack.num_ranks
    layer_bytes = num_tokens * get_kv_bytes_per_token(config, tracer.compute.dtype)
    layer_bytes //= config.num_layers
    num_saved = round(config.num_layers * (1 - activation_checkpointing))
    # The layer at the peak has them as received, in order, and with gradients.
    return replace(
        memory,
        activations=memory.activations + num_saved * layer_bytes,
        workspace=memory.workspace + 3 * layer_bytes,
    )


def compute_evaluation_memory(
    persistent: PersistentMemory, tracer: StepTracer, generation_bytes: int
) -> PeakMemory | None:
    """Compute the memory of evaluations and export; None without sharding.

    Both gather the complete model on every GPU, beside the shards and the optimizer states.
    """
    sharded = persistent.sharded
    if sharded is None:
        return None
    return replace(
        _build_idle_memory(tracer, persistent.layout.num_ranks),
        weights=persistent.weight_bytes + tracer.persistent_bytes,
        master_weights=persistent.master_weight_bytes,
        optimizer_states=persistent.optimizer_state_bytes,
        # The last unit arrives in a buffer before answers are generated.
        workspace=max(generation_bytes, sharded.units[-1].weight_bytes),
        gathered_weights=sharded.total.weight_bytes,
    )


def compute_loading_memory(persistent: PersistentMemory, tracer: StepTracer) -> PeakMemory | None:
    """Compute the memory while a model is loaded; None without sharding.

    Every rank loads the complete model.
    """
    if persistent.sharded is None:
        return None
    idle = _build_idle_memory(tracer, persistent.layout.num_ranks)
    return replace(idle, weights=persistent.loading_bytes)


def _build_idle_memory(tracer: StepTracer, num_ranks: int) -> PeakMemory:
    """Return the memory of a rank without a model."""
    empty = PeakMemory(**dict.fromkeys((field.name for field in fields(PeakMemory)), 0))
    if not tracer.compute.is_cuda:
        return replace(empty, libraries=CPU_PROCESS_BYTES)
    return replace(
        empty,
        libraries=CUBLAS_WORKSPACE_BYTES,
        cuda_context=CUDA_CONTEXT_BYTES,
        nccl=NCCL_BYTES if num_ranks > 1 else 0,
    )


def count_input_bytes(model: VisionLanguageModel, pack: PlannedPack) -> int:
    """Return the bytes of a pack that are copied to the device: pixels, ids and positions."""
    vision_config = model.config.vision
    patch_bytes = vision_config.in_channels * vision_config.patch_size**2
    return pack.num_patches * patch_bytes + pack.num_tokens * 5 * INDEX_BYTES


def bound_packs(packs: Sequence[PlannedPack], compute: ComputeTarget) -> list[PlannedPack]:
    """Return few packs that need at least the memory of each given pack.

    They combine the most tokens with the most patches and supervised tokens. Where attention scores
    are stored, the pack with the most scores counts, too.
    """
    if not packs:
        return []
    longest = [max(packs, key=lambda pack: pack.num_tokens)]
    if not compute.has_varlen_attention:
        longest.append(max(packs, key=lambda pack: pack.num_attention_scores))
    grid_thw = max(packs, key=lambda pack: pack.num_patches).grid_thw
    num_supervised = max(pack.num_supervised_tokens for pack in packs)
    bounds = [replace(p, grid_thw=grid_thw, num_supervised_tokens=num_supervised) for p in longest]
    return list(dict.fromkeys(bounds))


def _trace_graph(
    tracer: StepTracer,
    pack: PlannedPack,
    graph: GraphPlan,
    activation_checkpointing: float,
    accumulated_ids: frozenset[int],
) -> Iterator[tuple[StepMemory, int]]:
    """Yield memory and memory pool at possible peaks of capturing a pack.

    Tensors outside of graphs cannot use the pool, and allocator metrics do not contain it. Without
    the vision encoder in the graph, its saved activations exist during the graph.
    """
    num_features = None
    if graph.shape.vision_shape is None:
        num_features = graph.shape.num_features
    memory = tracer.trace(
        graph.padded_pack, activation_checkpointing, accumulated_ids, num_features
    )
    if num_features is None or not pack.num_patches:
        yield memory, memory.total
        return
    vision = tracer.trace_vision(pack, activation_checkpointing)
    yield replace(memory, activations=memory.activations + vision.saved), memory.total
    yield vision, 0
