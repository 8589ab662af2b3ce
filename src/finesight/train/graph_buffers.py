"""Static inputs and gradients of CUDA graphs, and rounding of pack sizes to graph shapes.

Packs are padded to the shape of a graph with a masked dummy sequence. If a graph contains a
trainable vision encoder, patches are padded with dummy segments, whose features belong to the dummy
sequence.

Shapes: T tokens, S sequences, M image tokens, K features per token, D width, L tokens that predict
a supervised token; N patches, B bytes of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from finesight.encode.packing import PAD_MULTIPLE, PackedBatch, compute_context_lengths
from finesight.model import attention
from finesight.model.attention import Segments
from finesight.model.linear import LoraLinear
from finesight.model.lora.fused import write_gradients_to
from finesight.model.vision_encoder import PatchLayout, VisionEncoder, unique_objects
from finesight.model.vlm import VisionLanguageModel
from finesight.train.optimizer import LARGE_PARAM_ELEMENTS
from finesight.vision.image_processing import GridTHW

MAX_GRAPH_PATCHES = 4096
"""Maximum number of patches of a pack for capturing the vision encoder.

Larger packs are not launch-bound on an H200, and a graph holds all activations of the encoder.
"""

HEAD_DIM_MULTIPLE = 8
"""Divisor of the head dimension that `model.attention.supports_varlen_attention` requires."""


def round_up(value: int, multiple: int) -> int:
    """Round a value up to a multiple of another one."""
    return -(-value // multiple) * multiple


def can_capture_vision(model: VisionLanguageModel) -> bool:
    """Return whether CUDA graphs can contain the vision encoder of a model.

    The encoder must be trainable, have no dropout, and depend on image sizes only through its patch
    layout. Attention must read the segment lengths on the device.
    """
    vision_encoder = model.visual
    if (
        not vision_encoder.supports_cuda_graphs
        or vision_encoder.config.head_dim % HEAD_DIM_MULTIPLE
    ):
        return False
    lora_layers = (module for module in vision_encoder.modules() if isinstance(module, LoraLinear))
    has_dropout = any(layer.dropout for layer in lora_layers)
    return not has_dropout and any(
        parameter.requires_grad for parameter in vision_encoder.parameters()
    )


def should_capture_vision(num_patches: int, activation_checkpointing: float) -> bool:
    """Return whether the CUDA graph of a pack should contain the vision encoder."""
    return 0 < num_patches <= MAX_GRAPH_PATCHES and not activation_checkpointing


class GraphVisionShape(NamedTuple):
    """Fixed sizes of the vision encoder inputs of a CUDA graph.

    Attributes:
        num_patches: Number of patches.
        patch_bytes: Bytes per patch.
        segment_shapes: Number and maximum length of the attention segments, for each distinct
            segmentation.
    """

    num_patches: int
    patch_bytes: int
    segment_shapes: tuple[tuple[int, int], ...]

    @classmethod
    def from_batch(cls, batch: PackedBatch, vision_encoder: VisionEncoder) -> GraphVisionShape:
        """Return the sizes for the images of a pack, rounded up."""
        num_patches, patch_bytes = batch.patches_ND.shape
        return cls.from_grids(vision_encoder, batch.grid_thw, num_patches, patch_bytes)

    @classmethod
    def from_grids(
        cls,
        vision_encoder: VisionEncoder,
        grid_thw: Sequence[GridTHW],
        num_patches: int,
        patch_bytes: int,
    ) -> GraphVisionShape:
        """Return the sizes for images with the given patch grids, rounded up."""
        multiple, segment_shapes = PAD_MULTIPLE * vision_encoder.config.merge_size**2, []
        for lengths in unique_objects(vision_encoder.segment_lengths(grid_thw)):
            max_seqlen = round_up(max(lengths), PAD_MULTIPLE)
            max_segments = len(lengths) + -(-multiple // max_seqlen)
            segment_shapes.append(
                (round_up(max_segments, max(8, (1 << max_segments.bit_length()) // 16)), max_seqlen)
            )
        return cls(round_up(num_patches, multiple), patch_bytes, tuple(segment_shapes))


@dataclass(frozen=True)
class GraphVisionInputs:
    """Static buffers for the patches of a pack and their layout."""

    shape: GraphVisionShape
    patches_NB: Tensor
    layout: PatchLayout

    @classmethod
    def allocate(
        cls, shape: GraphVisionShape, batch: PackedBatch, vision_encoder: VisionEncoder
    ) -> GraphVisionInputs:
        """Allocate buffers of the given sizes, with the dtypes and device of `batch`."""
        num_patches, device = shape.num_patches, batch.patches_ND.device
        layout = vision_encoder.compute_patch_layout(batch.grid_thw, device)
        segment_buffers = [
            Segments(
                (max_seqlen,) * count,
                _zeros(count + 1, device, torch.int32),
                max_seqlen,
                num_patches,
            )
            for count, max_seqlen in shape.segment_shapes
        ]
        segment_ids = [id(segments) for segments in unique_objects(layout.segments)]
        order_M = None
        if layout.window_index_M is not None:
            order_M = _zeros(
                num_patches // vision_encoder.config.merge_size**2, device, torch.int64
            )
        return cls(
            shape,
            batch.patches_ND.new_zeros(num_patches, shape.patch_bytes),
            PatchLayout(
                position_ids_N2=_zeros(num_patches, device, layout.position_ids_N2.dtype, 2),
                segments=tuple(
                    segment_buffers[segment_ids.index(id(own))] for own in layout.segments
                ),
                window_index_M=order_M,
                reverse_index_M=None if order_M is None else torch.zeros_like(order_M),
            ),
        )

    @torch.no_grad()
    def copy_from(self, batch: PackedBatch, vision_encoder: VisionEncoder) -> None:
        """Copy the patches and layout of a pack to the buffers, without synchronization."""
        num_patches = len(batch.patches_ND)
        layout = vision_encoder.compute_patch_layout(batch.grid_thw, batch.patches_ND.device)
        self.patches_NB[:num_patches].copy_(batch.patches_ND)
        self.patches_NB[num_patches:].zero_()
        self.layout.position_ids_N2[:num_patches].copy_(layout.position_ids_N2)
        self.layout.position_ids_N2[num_patches:].zero_()
        segment_pairs = unique_objects(self.layout.segments), unique_objects(layout.segments)
        for buffer_segments, segments in zip(*segment_pairs, strict=True):
            _copy_segments(buffer_segments, segments, num_patches, self.shape.num_patches)
        pairs = (
            (self.layout.window_index_M, layout.window_index_M),
            (self.layout.reverse_index_M, layout.reverse_index_M),
        )
        for buffer, order_M in pairs:
            if buffer is not None and order_M is not None:
                num_merged = len(order_M)
                buffer[:num_merged].copy_(order_M)
                buffer[num_merged:].copy_(
                    torch.arange(num_merged, len(buffer), device=buffer.device)
                )

    def encode(self, vision_encoder: VisionEncoder) -> Tensor:
        """Encode the patches in the buffers to features [M, K, D].

        The features of padding patches come last.
        """
        features_MKD: Tensor = vision_encoder(self.patches_NB, (), layout=self.layout)
        return features_MKD


def _copy_segments(
    buffer_segments: Segments, segments: Segments, num_patches: int, max_patches: int
) -> None:
    """Copy cumulative segment lengths to a buffer, followed by padding.

    Dummy segments cover the padding patches; empty segments fill the rest of the buffer.
    """
    count = len(segments.lengths)
    buffer_segments.cu_seqlens_S1[: count + 1].copy_(segments.cu_seqlens_S1)
    num_padding = len(buffer_segments.cu_seqlens_S1) - count - 1
    ends = torch.arange(
        1, num_padding + 1, device=buffer_segments.cu_seqlens_S1.device, dtype=torch.int32
    )
    buffer_segments.cu_seqlens_S1[count + 1 :].copy_(
        (ends * buffer_segments.max_seqlen + num_patches).clamp_(max=max_patches)
    )


def _zeros(rows: int, device: torch.device, dtype: torch.dtype, *extra_dims: int) -> Tensor:
    return torch.zeros(rows, *extra_dims, dtype=dtype, device=device)


class GraphGradients:
    """Static gradient buffers of the trainable parameters, shared by all CUDA graphs.

    The optimizer accumulates the gradients before the next replay overwrites them. Gradients of
    large parameters are computed in their buffers or copied to them immediately, so that two copies
    of all gradients never exist at the same time.
    """

    def __init__(self, trainable_params: Sequence[nn.Parameter]) -> None:
        self._trainable_params = trainable_params
        self._large_indices = {
            id(one): n
            for n, one in enumerate(trainable_params)
            if one.numel() >= LARGE_PARAM_ELEMENTS
        }
        self._buffers: dict[int, Tensor] = {}

    def backward(self, loss: Tensor, extra_outputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compute the gradients of a loss and write them to static buffers.

        Args:
            extra_outputs: Additional tensors that require gradients, each with its gradient buffer.
        """
        handles = [self._register_hook(index) for index in self._large_indices.values()]
        inputs = [*self._trainable_params, *(tensor for tensor, _ in extra_outputs)]

        def find_buffer(weight: Tensor) -> Tensor | None:
            index = self._large_indices.get(id(weight))
            return None if index is None else self._get_buffer(index)

        try:
            with write_gradients_to(find_buffer):
                gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        param_gradients = gradients[: len(self._trainable_params)]
        extra_gradients = gradients[len(self._trainable_params) :]
        for (_, buffer), gradient in zip(extra_outputs, extra_gradients, strict=True):
            buffer.copy_(gradient)
        large = self._large_indices.values()
        small = {
            n: one for n, one in enumerate(param_gradients) if one is not None and n not in large
        }
        if small:
            torch._foreach_copy_([self._get_buffer(n) for n in small], [*small.values()])

    def assign_grads(self, excluded: Collection[int] = ()) -> None:
        """Set `parameter.grad` to the static buffers after a replay.

        Args:
            excluded: Indices of parameters that the graph does not use; their gradient is None.
        """
        for index, parameter in enumerate(self._trainable_params):
            parameter.grad = None if index in excluded else self._buffers.get(index)

    def clear(self) -> None:
        """Free the gradient buffers."""
        self._buffers.clear()

    def _register_hook(self, index: int) -> RemovableHandle:
        def copy_to_buffer(gradient: Tensor) -> Tensor:
            buffer = self._get_buffer(index)
            return buffer if buffer.data_ptr() == gradient.data_ptr() else buffer.copy_(gradient)

        register: Callable[..., RemovableHandle] = self._trainable_params[index].register_hook
        return register(copy_to_buffer)

    def _get_buffer(self, index: int) -> Tensor:
        if index not in self._buffers:
            # The layout of the parameter, because a gradient may be transposed.
            self._buffers[index] = torch.empty_like(
                self._trainable_params[index], requires_grad=False
            )
        return self._buffers[index]


MAX_GRAPH_TOKENS = 6144
"""Maximum number of tokens of a pack that is launch-bound on an H200."""

MAX_GRAPH_TOKENS_CACHED = 8192
"""Maximum number of tokens of a CUDA graph if the image features are cached.

Without the vision encoder, the device has less work while the host launches kernels. The memory
estimate of a plan ignores packs above `MAX_GRAPH_TOKENS`.
"""

MAX_PADDING_DIVISOR = 8
"""Inverse of the maximum fraction of padding tokens when a pack uses a larger graph."""


class GraphShape(NamedTuple):
    """Fixed sizes of a CUDA graph; packs are padded to them.

    Attributes:
        prefix_length: Number of tokens of the shared prefix, which is not padded.
        max_seqlen: Maximum length of a sequence, including the shared prefix.
        num_features: Number of image tokens.
        num_labels: Number of supervised tokens.
        vision_shape: Sizes of the vision encoder inputs; None if the encoder is not in the graph.
    """

    num_tokens: int
    num_sequences: int
    prefix_length: int
    max_seqlen: int
    num_features: int
    num_labels: int
    vision_shape: GraphVisionShape | None

    @classmethod
    def from_batch(
        cls, batch: PackedBatch, vision_shape: GraphVisionShape | None = None
    ) -> GraphShape:
        """Return the graph shape for a packed batch: its sizes, rounded up."""
        num_features, num_labels = len(batch.visual_indices_M), len(batch.logit_indices_L)
        return cls.from_lengths(
            batch.lengths, batch.prefix_length, num_features, num_labels, vision_shape
        )

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        prefix_length: int,
        num_features: int,
        num_labels: int,
        vision_shape: GraphVisionShape | None = None,
    ) -> GraphShape:
        """Return the graph shape for packed sequences: their sizes, rounded up.

        The shape has space for at least one padding token, and for padding sequences of at most
        `max_seqlen` tokens.

        Args:
            vision_shape: Sizes of the vision encoder inputs, if the graph contains the encoder.
        """
        num_tokens = sum(lengths) + 1
        multiple = PAD_MULTIPLE if num_tokens <= MAX_GRAPH_TOKENS_CACHED + 1 else 4 * PAD_MULTIPLE
        max_seqlen = round_up(
            max(compute_context_lengths(lengths, prefix_length)), 4 * PAD_MULTIPLE
        )
        return cls(
            num_tokens=round_up(num_tokens, multiple),
            num_sequences=round_up(len(lengths) + -(-multiple // (max_seqlen - prefix_length)), 8),
            prefix_length=prefix_length,
            max_seqlen=max_seqlen,
            num_features=round_up(num_features, PAD_MULTIPLE if vision_shape else 4 * PAD_MULTIPLE),
            # Coarse rounding, to a quarter of a power of two: labels cost little.
            num_labels=round_up(num_labels, max(PAD_MULTIPLE, (1 << num_labels.bit_length()) // 8)),
            vision_shape=vision_shape,
        )

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a larger graph that may run packs of this shape."""
        return self.num_tokens + self.num_tokens // MAX_PADDING_DIVISOR

    def fits(self, other: GraphShape) -> bool:
        """Return whether this graph can run packs of another shape with little padding."""
        extra_tokens = self.num_tokens - other.num_tokens
        return (
            (self.prefix_length, self.vision_shape) == (other.prefix_length, other.vision_shape)
            and (self.num_features > 0) == (other.num_features > 0)
            and other.num_tokens <= self.num_tokens <= other.max_tokens
            and other.num_labels <= self.num_labels <= 2 * other.num_labels
            and other.max_seqlen <= self.max_seqlen
            # Long sequences use other kernels, which copy the shared prefix.
            and (self.max_seqlen <= attention.MAX_TRITON_SEQLEN)
            == (other.max_seqlen <= attention.MAX_TRITON_SEQLEN)
            and other.num_features <= self.num_features
            and other.num_sequences + -(-extra_tokens // self.max_suffix_length)
            <= self.num_sequences
            <= 2 * other.num_sequences
        )

    def widen(self, candidates: Iterable[GraphShape]) -> GraphShape:
        """Return a shape that also fits packs of as many candidates as possible."""
        shapes = [self]
        for other in candidates:
            wider = self._union([*shapes, other])
            if all(wider.fits(shape) for shape in (*shapes, other)):
                shapes.append(other)
        return self._union(shapes)

    def _union(self, shapes: Sequence[GraphShape]) -> GraphShape:
        num_tokens = max(shape.num_tokens for shape in shapes)
        max_seqlen = max(shape.max_seqlen for shape in shapes)
        max_suffix = max_seqlen - self.prefix_length
        return self._replace(
            num_tokens=num_tokens,
            num_sequences=max(
                k.num_sequences + -(-(num_tokens - k.num_tokens) // max_suffix) for k in shapes
            ),
            max_seqlen=max_seqlen,
            num_features=max(shape.num_features for shape in shapes),
            num_labels=max(shape.num_labels for shape in shapes),
        )

    @property
    def max_suffix_length(self) -> int:
        """Maximum length of a sequence without the shared prefix."""
        return self.max_seqlen - self.prefix_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Maximum lengths of the sequences; `cu_seqlens` contains the actual lengths."""
        return (
            self.prefix_length or self.max_suffix_length,
            *[self.max_suffix_length] * (self.num_sequences - 1),
        )


@dataclass(frozen=True)
class GraphInputs:
    """Static input buffers of a CUDA graph.

    Attributes:
        batch: Packed batch with padded tensors.
        vision_inputs: Inputs of the vision encoder; None if the encoder is not in the graph.
        features_MKD: Image features; None for text, or if the graph contains the encoder.
        loss_inputs: Inputs of the loss, with padding (`Objective.loss_inputs`).
        seed_1: Random seed of dropout.
        features_grad_MKD: Gradient of trainable image features, an output of the graph.
    """

    shape: GraphShape
    batch: PackedBatch
    vision_inputs: GraphVisionInputs | None
    features_MKD: Tensor | None
    loss_inputs: dict[str, Tensor]
    seed_1: Tensor
    features_grad_MKD: Tensor | None

    @classmethod
    def allocate(
        cls,
        shape: GraphShape,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        loss_inputs: Mapping[str, Tensor],
        vision_encoder: VisionEncoder,
    ) -> GraphInputs:
        """Allocate the buffers of a graph.

        Args:
            batch: Pack that the graph can run, for dtypes and device.
            features_MKD: Image features of this pack, if they are an input of the graph.
            loss_inputs: Inputs of the loss of this pack, for dtypes and dimensions.
        """
        device = batch.ids_T.device

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        buffers = replace(
            batch,
            sample_ids=(),
            lengths=shape.lengths,
            grid_thw=(),
            ids_T=zeros(shape.num_tokens),
            position_ids_3T=zeros(3, shape.num_tokens),
            cu_seqlens_S1=zeros(shape.num_sequences + 1, dtype=torch.int32),
            patches_ND=batch.patches_ND.new_empty(0, batch.patches_ND.shape[1]),
            visual_indices_M=zeros(shape.num_features),
            logit_indices_L=zeros(shape.num_labels),
            labels_L=zeros(0),
        )
        loss_buffers = {
            name: zeros(*(shape.num_labels, *value.shape[1:])[: value.dim()], dtype=value.dtype)
            for name, value in loss_inputs.items()
        }
        features, features_grad = None, None
        if features_MKD is not None:
            features = zeros(shape.num_features, *features_MKD.shape[1:], dtype=features_MKD.dtype)
            if features_MKD.requires_grad:
                features_grad = torch.zeros_like(features)
                features.requires_grad_()
        vision_inputs = (
            None
            if shape.vision_shape is None
            else GraphVisionInputs.allocate(shape.vision_shape, batch, vision_encoder)
        )
        seed_1 = zeros(1).int()
        return cls(shape, buffers, vision_inputs, features, loss_buffers, seed_1, features_grad)

    @torch.no_grad()
    def copy_from(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        loss_inputs: Mapping[str, Tensor],
        vision_encoder: VisionEncoder,
    ) -> None:
        """Copy a pack to the buffers with padding, without synchronizing with the device."""
        static_batch, num_tokens = self.batch, len(batch.ids_T)
        padding_positions = torch.arange(
            self.shape.num_tokens - num_tokens, device=batch.ids_T.device
        )
        _copy_padded(static_batch.ids_T, batch.ids_T, 0)
        static_batch.position_ids_3T[:, :num_tokens].copy_(batch.position_ids_3T)
        static_batch.position_ids_3T[:, num_tokens:].copy_(padding_positions)
        # Empty sequences follow the padding sequences.
        num_cu_seqlens = len(batch.cu_seqlens_S1)
        ends = torch.arange(
            1, len(static_batch.cu_seqlens_S1) - num_cu_seqlens + 1, device=padding_positions.device
        )
        static_batch.cu_seqlens_S1[:num_cu_seqlens].copy_(batch.cu_seqlens_S1)
        static_batch.cu_seqlens_S1[num_cu_seqlens:].copy_(
            (ends * self.shape.max_suffix_length + num_tokens).clamp_(max=self.shape.num_tokens)
        )
        _copy_padded(static_batch.logit_indices_L, batch.logit_indices_L, 0)
        _copy_padded(
            static_batch.visual_indices_M, batch.visual_indices_M, self.shape.num_tokens - 1
        )
        if features_MKD is not None and self.features_MKD is not None:
            _copy_padded(self.features_MKD, features_MKD, 0)
        if self.vision_inputs is not None:
            self.vision_inputs.copy_from(batch, vision_encoder)
        for name, value in loss_inputs.items():
            buffer = self.loss_inputs[name]
            if value.dim():
                _copy_padded(buffer, value, 0 if value.is_floating_point() else -1)
            else:
                buffer.copy_(value)
        self.seed_1.random_(2**31 - 1)

    @property
    def trainable_features(self) -> list[tuple[Tensor, Tensor]]:
        """Image features that require gradients, each with its gradient buffer."""
        if self.features_MKD is None or self.features_grad_MKD is None:
            return []
        return [(self.features_MKD, self.features_grad_MKD)]

    def backward_features(self, features_MKD: Tensor | None) -> None:
        """Backpropagate the feature gradient of the graph through the vision encoder.

        Args:
            features_MKD: Image features of the pack with their autograd graph, if the vision
                encoder is trainable.
        """
        if features_MKD is not None and self.features_grad_MKD is not None:
            torch.autograd.backward(features_MKD, self.features_grad_MKD[: len(features_MKD)])


def _copy_padded(buffer: Tensor, values: Tensor, fill_value: int) -> None:
    buffer[: len(values)].copy_(values)
    buffer[len(values) :].fill_(fill_value)
