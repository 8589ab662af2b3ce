"""Run model code on meta tensors as if they were on a target device, and track their memory.

`emulate_device` selects the code path of the target: fused Triton kernels, whose launches are
skipped, or the fallbacks of older GPUs and CPUs. `MemoryTracker` counts live storages. Temporary
memory inside the kernels of torch is declared here (`_kernel_workspace`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finesight.encode.batch import PackedBatch, compute_context_lengths
from finesight.encode.packing import effective_prefix_length, plan_packs
from finesight.model.config import VisionConfig
from finesight.model.kernels.runtime import override_launches
from finesight.model.vlm import VisionLanguageModel
from finesight.plan.meta_kernels import MetaKernels
from finesight.plan.sharded_memory import ShardedModel, UnitMemory
from finesight.train.dataset_stats import SampleStats
from finesight.train.objectives.objective import Objective
from finesight.train.sampler import StepSampler
from finesight.vision.image_processing import GridTHW

META = torch.device("meta")

BLOCK_BYTES = 512
"""Allocations of the CUDA allocator are rounded up to a multiple of this size."""

FLASH_BACKWARD_TILE = 128
"""Rows that torch's varlen attention backward pass adds per sequence as padding."""

FLASH_HEAD_DIM_MULTIPLE = 32
"""Multiple to which torch's varlen attention backward pass pads the head size."""

MAX_REORDERED_ELEMENTS = 1 << 18
"""Maximum number of elements, approximately, that oneDNN copies to transpose a large matrix."""

BATCH_PRODUCTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.baddbmm_)
WEIGHT_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
"""Matrix products of attention and of linear layers, which oneDNN computes on a CPU."""


@dataclass(frozen=True, slots=True)
class ComputeTarget:
    """Properties of a device that determine the code path and the saved activations.

    Attributes:
        is_cuda: True for a GPU.
        dtype: Data type of the weights and activations.
        capability: CUDA compute capability, major and minor. Ignored for a CPU.
    """

    is_cuda: bool
    dtype: torch.dtype
    capability: tuple[int, int] = (8, 0)

    @property
    def has_varlen_attention(self) -> bool:
        """True if one attention kernel handles sequences of different lengths.

        Decoder layers then run as fused layers (`model.fused_decoder`).
        """
        return self.is_cuda and self.dtype.itemsize == 2 and self.capability >= (8, 0)


class _FusedAttention(torch.autograd.Function):
    """Memory of a fused attention kernel, which does not store attention scores."""

    @staticmethod
    def forward(ctx: Any, q_NHLD: Tensor, k_NHLD: Tensor, v_NHLD: Tensor) -> Tensor:
        o_NLHD = q_NHLD.new_empty(q_NHLD.transpose(1, 2).shape)
        lse_NHL = q_NHLD.new_empty(q_NHLD.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q_NHLD, k_NHLD, v_NHLD, o_NLHD, lse_NHL)
        return o_NLHD.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_NHLD: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in ctx.saved_tensors[:3])


class _FusedRmsNorm(torch.autograd.Function):
    """RMS norm with the memory of the fused GPU kernels, for the meta device."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        rstd_T1 = x_TD.new_empty((*x_TD.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x_TD, weight_D, rstd_T1)
        return x_TD.new_empty(x_TD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        inputs = zip(ctx.saved_tensors[:2], ctx.needs_input_grad, strict=True)
        return tuple(x.new_empty(x.shape) if is_needed else None for x, is_needed in inputs)


class _EmulatedTensors(TorchFunctionMode):
    """Let meta tensors appear on a target device, with the memory of its fused operations."""

    def __init__(self, is_cuda: bool) -> None:
        super().__init__()

        def emulate_sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Any:
            return _FusedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]

        def emulate_rms_norm(x: Tensor, shape: object, weight: Tensor, eps: float) -> Any:
            return _FusedRmsNorm.apply(x, weight)  # type: ignore[no-untyped-call]

        self._emulations: dict[Callable[..., Any], Callable[..., Any]] = {
            Tensor.is_cuda.__get__: lambda x: is_cuda,  # type: ignore[attr-defined]
            F.scaled_dot_product_attention: emulate_sdpa,
        }
        if is_cuda:
            self._emulations[F.rms_norm] = emulate_rms_norm

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch, or its emulation."""
        return self._emulations.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def emulate_device(target: ComputeTarget) -> Iterator[None]:
    """Run the code path of a target device on meta tensors within the block.

    Triton kernels are not launched, so that all outputs remain undefined.
    """
    capability = (0, 0)
    if target.is_cuda:
        capability = target.capability
    with override_launches(_skip_launch, capability), _EmulatedTensors(target.is_cuda):
        yield


def _skip_launch(kernel: object, *arguments: object, **options: object) -> None:
    """Replace the launch of a Triton kernel."""


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of live storages, without those of the given tensors.

    Attributes:
        live_bytes: Bytes of live storages.
        peak_bytes: Maximum of `live_bytes`, the workspace of the current operation and
            `gathered_bytes`.
        gathered_bytes: Bytes of all-gathered weights of a sharded model.
        grads_at_peak: Bytes of parameter gradients at the peak.
        gathered_at_peak: Bytes of all-gathered weights at the peak.
        forward_at_peak: Bytes at the peak that were allocated before `start_backward`.
        saved_bytes: Bytes of live storages when the backward pass starts.
    """

    def __init__(
        self, known_tensors: Iterable[Tensor], kernels: MetaKernels, gathered_bytes: int = 0
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels
        self.gathered_bytes = gathered_bytes
        self._storages: dict[int, Any] = _map_storages(known_tensors)
        self._grad_bytes = 0
        self._forward_bytes = 0
        self._is_backward = False
        self.live_bytes = 0
        self.peak_bytes = 0
        self.saved_bytes = 0
        self.grads_at_peak = 0
        self.forward_at_peak = 0
        self.gathered_at_peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count the storages of its outputs."""
        if func is torch.ops.aten.native_dropout_backward.default:
            # One kernel on a GPU; torch decomposes it on the meta device.
            outputs = torch.empty_like(args[0])
        elif func is torch.ops.aten._grouped_mm.default:
            # The meta kernel accepts bf16 only.
            operands = [matrix.to(torch.bfloat16) for matrix in args[:2]]
            outputs = func(*operands, *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            outputs = self._kernels.run(func, _move_indices(args), kwargs or {})
        leaves = [outputs] if isinstance(outputs, Tensor) else tree_leaves(outputs)
        for output in leaves:
            if isinstance(output, Tensor):
                self._count(output.untyped_storage())
        self._record_peak(self.live_bytes + _kernel_workspace(func, args))
        return outputs

    def _record_peak(self, num_bytes: int) -> None:
        total = num_bytes + self.gathered_bytes
        if total > self.peak_bytes:
            self.peak_bytes = total
            self.grads_at_peak = self._grad_bytes
            self.forward_at_peak = self._forward_bytes
            self.gathered_at_peak = self.gathered_bytes

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._storages:
            return
        num_bytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        is_forward = not self._is_backward

        def release(_: object) -> None:
            del self._storages[key]
            self.live_bytes -= num_bytes
            self._forward_bytes -= num_bytes * is_forward

        self._storages[key] = weakref.ref(storage, release)
        self.live_bytes += num_bytes
        self._forward_bytes += num_bytes * is_forward

    def start_backward(self) -> None:
        """Start the backward pass: live storages are saved activations."""
        self._is_backward = True
        self.saved_bytes = self.live_bytes

    def add_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter; a hook of autograd."""
        self._grad_bytes += parameter.nbytes

    def free_gradient(self, parameter: Tensor) -> None:
        """Free the gradient of a parameter that `add_gradient` has counted."""
        self._grad_bytes -= parameter.nbytes
        parameter.grad = None

    def add_gradient_bytes(self, num_bytes: int) -> None:
        """Count gradient memory outside of the trace, such as that of collectives.

        A negative number frees it.
        """
        self.live_bytes += num_bytes
        self._grad_bytes += num_bytes
        self._record_peak(self.live_bytes)


class GradientReducer:
    """Gradient memory of FSDP units in a traced backward pass.

    The gradients of a unit wait until all of them are computed. They are then copied to the fp32
    input of the reduce-scatter, which exists until the next unit is reduced. The output, the
    gradients of the own rows, remains until the optimizer step. With `zero2`, the weights of the
    unit are then freed; with other modes, those of the next unit take their place.
    """

    def __init__(
        self, tracker: MemoryTracker, sharded: ShardedModel | None, accumulates: bool
    ) -> None:
        """Create a reducer without gradients.

        Args:
            sharded: Shards of the model; None if no parameter is sharded.
            accumulates: Whether the gradients of the own rows exist from an earlier pack.
        """
        self._tracker = tracker
        self._unit_by_param: dict[int, UnitMemory] = {}
        self._has_shards = accumulates
        self._frees_weights = False
        if sharded is not None:
            self._unit_by_param |= sharded.unit_by_param
            self._has_shards |= sharded.layout.is_offloaded
            self._frees_weights = sharded.layout.mode == "zero2"
        self._waiting: dict[int, list[Tensor]] = {}
        self._input_bytes = 0
        self._shard_bytes = 0

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._unit_by_param

    def add_gradient(self, parameter: Tensor) -> None:
        """Receive the gradient of a sharded parameter; a hook of autograd."""
        self._tracker.add_gradient(parameter)
        unit = self._unit_by_param[id(parameter)]
        waiting = self._waiting.setdefault(id(unit), [])
        waiting.append(parameter)
        if len(waiting) == unit.num_trainable:
            self._reduce(unit, waiting)

    def _reduce(self, unit: UnitMemory, parameters: Sequence[Tensor]) -> None:
        self._tracker.add_gradient_bytes(-self._input_bytes)
        self._input_bytes = unit.gradient_bytes
        self._tracker.add_gradient_bytes(self._input_bytes)
        for parameter in parameters:
            self._tracker.free_gradient(parameter)
        if not self._has_shards:
            self._shard_bytes += unit.gradient_shard_bytes
            self._tracker.add_gradient_bytes(unit.gradient_shard_bytes)
        if self._frees_weights:
            self._tracker.gathered_bytes -= unit.weight_bytes

    def release(self) -> None:
        """Free the memory that the reducer has counted, after the backward pass."""
        self._tracker.add_gradient_bytes(-self._input_bytes - self._shard_bytes)


def _move_indices(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace CPU tensors, such as indices, by meta tensors if other operands are meta tensors."""
    devices = {value.device.type for value in args if isinstance(value, Tensor)}
    if devices != {"cpu", "meta"}:
        return args
    moved_args = []
    for value in args:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            value = value.to(META)
        moved_args.append(value)
    return tuple(moved_args)


def _onednn_workspace(x_MK: Tensor, y_KN: Tensor, is_batch: bool) -> int:
    """Return the temporary bytes of a 16-bit matrix product of a batch or of weights.

    Each thread copies a transposed left operand of a batch. Processors with AMX copy the weights.
    Those with AVX-512 but without 16-bit products accumulate products of a batch in fp32.
    """
    num_rows, num_inner = x_MK.shape[-2:]
    num_columns = y_KN.shape[-1]
    num_threads = torch.get_num_threads() if is_batch else 1
    if x_MK.element_size() != 2 or not (is_batch or torch.cpu._is_amx_tile_supported()):
        return 0
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported():
        return 4 * num_threads * num_rows * num_columns
    left_rows = num_rows if x_MK.stride(-2) == 1 else 0  # of a transposed operand
    num_copied = 0
    if left_rows or not is_batch:
        num_copied = num_inner * (num_columns + left_rows)
    return 2 * num_threads * min(MAX_REORDERED_ELEMENTS, num_copied)


def _kernel_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Return the temporary bytes that an operation of torch allocates inside its kernel.

    The backward pass of FlashAttention accumulates fp32 gradients of padded queries. With
    grouped-query attention, each query head first has its own gradient of keys and values.
    """
    is_batch = func.overloadpacket in BATCH_PRODUCTS
    if (is_batch or func.overloadpacket in WEIGHT_PRODUCTS) and not args[0].is_cuda:
        return _onednn_workspace(args[-2], args[-1], is_batch)
    if func.name() != "torch_attn::_varlen_attn_backward":
        return 0
    _, q_THD, k_MKD, _, _, _, cu_seqlens_S1 = args[:7]
    num_tokens, num_heads, head_dim = q_THD.shape
    num_rows = num_tokens + FLASH_BACKWARD_TILE * (len(cu_seqlens_S1) - 1)
    padded_dim = -(-head_dim // FLASH_HEAD_DIM_MULTIPLE) * FLASH_HEAD_DIM_MULTIPLE
    num_bytes: int = num_rows * num_heads * (padded_dim + 1) * torch.float32.itemsize
    if k_MKD.shape[1] < num_heads:
        num_bytes += 2 * len(k_MKD) * num_heads * head_dim * q_THD.element_size()
    return num_bytes


MAX_PLANNED_STEPS = 2000
"""Maximum number of training steps to inspect, evenly spaced over the run."""


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """Sizes of a packed batch, without its content.

    Attributes:
        lengths: Tokens of each sequence. With a shared prefix, the first sequence is the prefix
            (`encode.batch`).
        grid_thw: Patch grid (frames, rows, columns) of each image or video.
        num_supervised_tokens: Number of tokens that contribute to the loss.
        prefix_length: Tokens of the shared prefix; 0 without one.
        num_ranks: Number of ranks that share the only sample (context parallelism). The other
            sizes are those of one rank.
    """

    lengths: tuple[int, ...]
    grid_thw: tuple[GridTHW, ...]
    num_supervised_tokens: int
    prefix_length: int = 0
    num_ranks: int = 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences. A shared prefix counts once."""
        return sum(self.lengths)

    @property
    def num_samples(self) -> int:
        """Number of samples in the pack."""
        return len(self.lengths) - (self.prefix_length > 0)

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """Number of tokens that each sequence attends to, including the shared prefix."""
        return compute_context_lengths(self.lengths, self.prefix_length)

    @property
    def num_patches(self) -> int:
        """Number of patches of all images and videos."""
        return sum(t * h * w for t, h, w in self.grid_thw)

    @property
    def num_attention_scores(self) -> int:
        """Number of attention scores of a head of the decoder."""
        return sum(length**2 for length in self.context_lengths)

    def stored_patch_dim(self, config: VisionConfig) -> int:
        """Return the number of elements that the pack stores per patch.

        This is a single frame if all inputs are images, whose frames are equal.
        """
        if all(frames == 1 for frames, _, _ in self.grid_thw):
            return config.in_channels * config.patch_size**2
        return config.patch_dim


def build_planned_pack(samples: Sequence[SampleStats], prefix_length: int = 0) -> PlannedPack:
    """Build the pack of the given samples. A shared prefix counts once."""
    lengths = [sample.num_packed_tokens for sample in samples]
    starts = samples[0].response_starts
    if starts:
        bounds = [0, *starts, *lengths]
        lengths = [stop - start for start, stop in pairwise(bounds)]
        prefix_length = starts[0]
    elif prefix_length and len(samples) > 1:
        lengths = [prefix_length, *(length - prefix_length for length in lengths)]
    else:
        prefix_length = 0
    grid_thw: list[GridTHW] = []
    num_supervised = 0
    for sample in samples:
        grid_thw += sample.grid_thw
        num_supervised += sample.num_supervised_tokens
    return PlannedPack(tuple(lengths), tuple(grid_thw), num_supervised, prefix_length)


def build_split_pack(sample: SampleStats, num_ranks: int) -> PlannedPack:
    """Build the pack of one rank for a sample that is split over all ranks."""
    frames: list[tuple[int, int]] = []
    for count, height, width in sample.grid_thw:
        frames += [(height, width)] * count
    own_frames = frames[: -(-len(frames) // num_ranks)]
    return PlannedPack(
        lengths=(-(-sample.num_packed_tokens // num_ranks),),
        grid_thw=tuple((count, *size) for size, count in Counter(own_frames).items()),
        num_supervised_tokens=-(-sample.num_supervised_tokens // num_ranks),
        num_ranks=num_ranks,
    )


def plan_step_packs(
    samples: Sequence[SampleStats], token_budget: int, prefix_length: int = 0
) -> list[PlannedPack]:
    """Split the samples of a training step into packs."""
    lengths = [sample.num_packed_tokens for sample in samples]
    prefix_length = effective_prefix_length(prefix_length, lengths)
    if any(sample.response_starts for sample in samples):
        token_budget = 1  # a pair is a pack
    packs = []
    for group in plan_packs(lengths, token_budget, prefix_length):
        group_samples = [samples[index] for index in group]
        packs.append(build_planned_pack(group_samples, prefix_length))
    return packs


def iter_planned_steps(
    sampler: StepSampler,
    sample_stats: Mapping[int, SampleStats],
    max_steps: int = MAX_PLANNED_STEPS,
) -> Iterator[list[SampleStats]]:
    """Iterate over the samples of evenly spaced training steps, from the first to the last."""
    last_step = len(sampler) - 1
    num_steps = min(max_steps, len(sampler))
    for i in range(num_steps):
        step = round(i * last_step / max(1, num_steps - 1))
        step_stats = [sample_stats[index] for index in sampler.batch_indices(step)]
        yield [stats for stats in step_stats if stats.num_tokens]


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Memory of the forward and backward pass of a pack, in bytes.

    Weights, optimizer states and the inputs are not included.

    Attributes:
        activations: Saved activations at the peak.
        workspace: Other temporary tensors at the peak.
        gradients: Gradients at the peak that wait for the optimizer step.
        saved: Saved activations at the end of the forward pass.
        gathered: All-gathered weights of a sharded model at the peak.
    """

    activations: int = 0
    workspace: int = 0
    gradients: int = 0
    saved: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """Total memory at the peak."""
        return self.activations + self.workspace + self.gradients + self.gathered


class StepTracer:
    """Traces the memory of training steps of a model on the meta device.

    The model must already be configured for tuning. Traces are cached.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        objective: Objective[Any],
        compute: ComputeTarget,
        teacher: VisionLanguageModel | None = None,
        sharded: ShardedModel | None = None,
    ) -> None:
        """Create a tracer without traces.

        Args:
            sharded: Shards of the model; None if the ranks do not shard it.
        """
        self.model = model
        self.objective = objective
        self.compute = compute
        self.teacher = teacher
        self._sharded = sharded
        self._traces: dict[tuple[object, ...], StepMemory] = {}
        self._token_bytes: float | None = None
        self._patch_bytes: float | None = None
        self.persistent_bytes = 0
        self._is_warm = False
        self._kernels = MetaKernels()

    def _warm_up(
        self, batch: PackedBatch, features_MKD: Tensor | None, accumulated_ids: Collection[int]
    ) -> MemoryTracker:
        """Run a pack, and count the bytes that remain allocated in addition to the weights.

        Examples are padding columns for LoRA and transposed copies of FP8 weights.
        """
        weights = _map_storages(self._own_tensors())
        tracker = self._run(batch, features_MKD, accumulated_ids)
        still_used = {id(tensor.untyped_storage()) for tensor in self._own_tensors()}
        replaced = sum(s.nbytes() for key, s in weights.items() if key not in still_used)
        self.persistent_bytes = tracker.live_bytes - replaced
        self._is_warm = True
        return tracker

    def _own_tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def trace(
        self,
        pack: PlannedPack,
        activation_checkpointing: float,
        accumulated_ids: Collection[int] = frozenset(),
        num_features: int | None = None,
    ) -> StepMemory:
        """Trace the forward and backward pass of a pack.

        Args:
            accumulated_ids: ids of parameters whose gradients are added to the accumulation buffer
                immediately, so they do not wait for the optimizer step. Those of sharded parameters
                are added when their unit is reduced.
            num_features: Number of precomputed image features. None runs the vision encoder.
        """
        key = pack, activation_checkpointing, bool(accumulated_ids), num_features
        if key not in self._traces:
            self.model.activation_checkpointing = activation_checkpointing
            batch = self._build_batch(pack, num_features)
            features_MKD = None
            if num_features is not None:
                features_MKD = self._build_features(num_features)
            tracker = None
            if not self._is_warm:
                tracker = self._warm_up(batch, features_MKD, accumulated_ids)
            # If nothing remains allocated, another run allocates the same.
            if tracker is None or tracker.live_bytes:
                tracker = self._run(batch, features_MKD, accumulated_ids)
            self._traces[key] = _summarize(tracker)
        return self._traces[key]

    def trace_vision(self, pack: PlannedPack, activation_checkpointing: float) -> StepMemory:
        """Trace the vision encoder alone, with its backward pass if it is trainable."""
        key = "vision", pack, activation_checkpointing
        if key not in self._traces:
            self.model.activation_checkpointing = activation_checkpointing
            batch = self._build_batch(pack, None)
            tracker = MemoryTracker([*self._own_tensors(), *_list_tensors(batch)], self._kernels)
            with emulate_device(self.compute), tracker:
                features_MKD = self.model.encode_images(batch.patches_ND, batch.grid_thw)
                tracker.start_backward()
                if features_MKD.requires_grad:
                    torch.autograd.backward(get_gradient_edge(features_MKD.sum()))
            self.model.zero_grad(set_to_none=True)
            self._traces[key] = _summarize(tracker)
        return self._traces[key]

    def trace_teacher(self, pack: PlannedPack) -> StepMemory:
        """Trace the forward pass of the teacher, which precedes that of the model."""
        assert self.teacher is not None, "no teacher"
        batch = self._build_batch(pack, None)
        weights = *self.teacher.parameters(), *self.teacher.buffers()
        tracker = MemoryTracker([*weights, *_list_tensors(batch)], self._kernels)
        with torch.no_grad(), emulate_device(self.compute), tracker:
            self.teacher(batch)
        return StepMemory(workspace=tracker.peak_bytes)

    def saved_bytes(self, pack: PlannedPack) -> float:
        """Estimate the bytes that a pack saves without activation checkpointing.

        Packs of a run are similar: the first one determines the bytes per token, and the first one
        with images the bytes per patch.
        """
        text_pack = replace(pack, grid_thw=())
        if self._token_bytes is None:
            self._token_bytes = self.trace(text_pack, 0.0).saved / pack.num_tokens
        if self._patch_bytes is None and pack.num_patches:
            vision_saved = self.trace(pack, 0.0).saved - self.trace(text_pack, 0.0).saved
            self._patch_bytes = vision_saved / pack.num_patches
        return self._token_bytes * pack.num_tokens + (self._patch_bytes or 0.0) * pack.num_patches

    def _run(
        self, batch: PackedBatch, features_MKD: Tensor | None, accumulated_ids: Collection[int]
    ) -> MemoryTracker:
        known = [*self._own_tensors(), *_list_tensors(batch)]
        if features_MKD is not None:
            known.append(features_MKD)
        gathered_bytes = 0
        if self._sharded is not None:
            gathered_bytes = self._sharded.gathered_bytes
        tracker = MemoryTracker(known, self._kernels, gathered_bytes)

        def free_gradient(parameter: Tensor) -> None:
            parameter.grad = None

        reducer = GradientReducer(tracker, self._sharded, accumulates=bool(accumulated_ids))

        def select_hook(parameter: Tensor) -> Callable[[Tensor], None]:
            if parameter in reducer:
                return reducer.add_gradient
            if id(parameter) in accumulated_ids:
                return free_gradient
            return tracker.add_gradient

        hooks = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    select_hook(parameter)
                )
                hooks.append(handle)
        seed_1 = self._empty(1, dtype=torch.int32)
        scale = self._empty(dtype=torch.float32)
        with emulate_device(self.compute), tracker:
            h_LD = self.model(batch, features_MKD, dropout_seed_1=seed_1)
            inputs = self.objective.loss_inputs(batch, scale)
            loss = self.objective.compute_loss(h_LD, self.model.lm_head_weight, inputs)
            del h_LD
            tracker.start_backward()
            # Of an edge, because the backward pass of a tensor would run without the emulation.
            # A pack of texts has no gradient if the language model is frozen.
            if loss.requires_grad:
                torch.autograd.backward(get_gradient_edge(loss[0]))
        for hook in hooks:
            hook.remove()
        reducer.release()
        del loss
        self.model.zero_grad(set_to_none=True)
        return tracker

    def _build_batch(self, pack: PlannedPack, num_features: int | None) -> PackedBatch:
        vision_config = self.model.config.vision
        num_tokens = pack.num_tokens
        if num_features is None:
            num_features = pack.num_patches // vision_config.merge_size**2
        patch_shape = (pack.num_patches, pack.stored_patch_dim(vision_config))
        return PackedBatch(
            ("",) * pack.num_samples,
            pack.lengths,
            pack.grid_thw,
            self._empty(num_tokens),
            self._empty(3, num_tokens),
            self._empty(len(pack.lengths) + 1, dtype=torch.int32),
            self._empty(*patch_shape, dtype=torch.uint8),
            self._empty(num_features),
            self._empty(pack.num_supervised_tokens),
            self._empty(pack.num_supervised_tokens),
            prefix_length=pack.prefix_length,
        )

    def _build_features(self, num_features: int) -> Tensor:
        encoder = self.model.visual
        shape = num_features, encoder.features_per_token, encoder.config.out_hidden_size
        features_MKD = self._empty(*shape, dtype=self.compute.dtype)
        return features_MKD.requires_grad_(any(p.requires_grad for p in encoder.parameters()))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)


def _list_tensors(batch: PackedBatch) -> list[Tensor]:
    tensors = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors.append(value)
    return tensors


def _map_storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages of tensors by id, which identifies them as long as they exist."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
    return storages


def _summarize(tracker: MemoryTracker) -> StepMemory:
    """Split the peak of a trace into saved activations, gradients and other tensors."""
    gradients = tracker.grads_at_peak
    gathered = tracker.gathered_at_peak
    activations = min(tracker.forward_at_peak, tracker.saved_bytes)
    workspace = tracker.peak_bytes - gradients - activations - gathered
    return StepMemory(activations, workspace, gradients, tracker.saved_bytes, gathered)
