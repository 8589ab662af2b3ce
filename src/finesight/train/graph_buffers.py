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

from finesight.encode.batch import PAD_MULTIPLE, PackedBatch, compute_context_lengths
from finesight.model import attention
from finesight.model.attention import Segments
from finesight.model.linear import LoraLinear
from finesight.model.lora.fused import write_gradients_to
from finesight.model.vision_encoder import PatchLayout, VisionEncoder, unique_objects
from finesight.model.vlm import VisionLanguageModel
from finesight.train.master_weight_optimizer import LARGE_PARAM_ELEMENTS
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
    def from_grids(
        cls,
        vision_encoder: VisionEncoder,
        grid_thw: Sequence[GridTHW],
        num_patches: int,
        patch_bytes: int,
    ) -> GraphVisionShape:
        """Return the sizes for images with the given patch grids, rounded up."""
        multiple = PAD_MULTIPLE * vision_encoder.config.merge_size**2
        segment_shapes = []
        for lengths in unique_objects(vision_encoder.segment_lengths(grid_thw)):
            max_seqlen = round_up(max(lengths), PAD_MULTIPLE)
            max_segments = len(lengths) + -(-multiple // max_seqlen)
            # Rounded to an eighth of a power of two, so that more packs fit the same graph.
            segment_multiple = max(8, (1 << max_segments.bit_length()) // 16)
            segment_shapes.append((round_up(max_segments, segment_multiple), max_seqlen))
        return cls(round_up(num_patches, multiple), patch_bytes, tuple(segment_shapes))


def _allocate_layout(shape: GraphVisionShape, layout: PatchLayout, merge_size: int) -> PatchLayout:
    """Allocate static buffers for patch layouts like `layout`."""
    num_patches = shape.num_patches
    # Layers with equal segmentation share one object, and so do their buffers.
    buffers_by_id: dict[int, Segments] = {}
    distinct_segments = unique_objects(layout.segments)
    for segments, (count, max_seqlen) in zip(distinct_segments, shape.segment_shapes, strict=True):
        buffers_by_id[id(segments)] = Segments(
            (max_seqlen,) * count,
            segments.cu_seqlens_S1.new_zeros(count + 1),
            max_seqlen,
            num_patches,
        )
    window_index_M = layout.window_index_M
    if window_index_M is not None:
        window_index_M = window_index_M.new_zeros(num_patches // merge_size**2)
    return PatchLayout(
        layout.position_ids_N2.new_zeros(num_patches, 2),
        tuple(buffers_by_id[id(segments)] for segments in layout.segments),
        window_index_M,
        None if window_index_M is None else torch.zeros_like(window_index_M),
    )


def _copy_layout(buffers: PatchLayout, layout: PatchLayout) -> None:
    """Copy the layout of a pack to static buffers. Padding patches have dummy segments."""
    num_patches = len(layout.position_ids_N2)
    max_patches = len(buffers.position_ids_N2)
    _copy_padded(buffers.position_ids_N2, layout.position_ids_N2, 0)
    own_segments = unique_objects(buffers.segments)
    for own, segments in zip(own_segments, unique_objects(layout.segments), strict=True):
        _copy_cu_seqlens(
            own.cu_seqlens_S1, segments.cu_seqlens_S1, own.max_seqlen, num_patches, max_patches
        )
    for buffer, order_M in (
        (buffers.window_index_M, layout.window_index_M),
        (buffers.reverse_index_M, layout.reverse_index_M),
    ):
        if buffer is not None and order_M is not None:
            padding = torch.arange(len(order_M), len(buffer), device=buffer.device)
            _copy_padded(buffer, order_M, padding)


def _copy_cu_seqlens(
    buffer_S1: Tensor, cu_seqlens_S1: Tensor, max_seqlen: int, num_rows: int, max_rows: int
) -> None:
    """Copy cumulative lengths to a buffer, followed by dummy segments for the padding rows.

    Empty segments fill the rest of the buffer.
    """
    num_padding = len(buffer_S1) - len(cu_seqlens_S1)
    ends = torch.arange(1, num_padding + 1, device=buffer_S1.device, dtype=buffer_S1.dtype)
    _copy_padded(buffer_S1, cu_seqlens_S1, (ends * max_seqlen + num_rows).clamp_(max=max_rows))


def _copy_padded(buffer: Tensor, values: Tensor, padding: int | Tensor) -> None:
    buffer[: len(values)].copy_(values)
    if isinstance(padding, Tensor):
        buffer[len(values) :].copy_(padding)
    else:
        buffer[len(values) :].fill_(padding)


class GraphGradients:
    """Static gradient buffers of the trainable parameters, shared by all CUDA graphs.

    The optimizer accumulates the gradients before the next replay overwrites them. Gradients of
    large parameters are computed in their buffers or copied to them immediately, so that two copies
    of all gradients never exist at the same time.
    """

    def __init__(self, trainable_params: Sequence[nn.Parameter]) -> None:
        self._trainable_params = trainable_params
        self._large_indices: dict[int, int] = {}
        for index, parameter in enumerate(trainable_params):
            if parameter.numel() >= LARGE_PARAM_ELEMENTS:
                self._large_indices[id(parameter)] = index
        self._buffers: dict[int, Tensor] = {}

    def backward(self, loss: Tensor, features_MKD: Tensor | None) -> None:
        """Compute the gradients of a loss and write them to static buffers.

        Args:
            features_MKD: Image features, with a gradient buffer `grad` if they are trainable.
        """
        handles = [self._register_hook(index) for index in self._large_indices.values()]
        inputs: list[Tensor] = [*self._trainable_params]
        if features_MKD is not None and features_MKD.requires_grad:
            inputs.append(features_MKD)

        def find_buffer(weight: Tensor) -> Tensor | None:
            index = self._large_indices.get(id(weight))
            if index is None:
                return None
            return self._get_buffer(index)

        try:
            with write_gradients_to(find_buffer):
                gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        if features_MKD is not None and features_MKD.grad is not None:
            features_MKD.grad.copy_(gradients[-1])
        buffers = []
        small_gradients = []
        for index, gradient in enumerate(gradients[: len(self._trainable_params)]):
            if gradient is not None and index not in self._large_indices.values():
                buffers.append(self._get_buffer(index))
                small_gradients.append(gradient)
        if buffers:
            torch._foreach_copy_(buffers, small_gradients)

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
            if buffer.data_ptr() == gradient.data_ptr():
                return buffer
            return buffer.copy_(gradient)

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
        num_features = len(batch.visual_indices_M)
        num_labels = len(batch.logit_indices_L)
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
        max_length = max(compute_context_lengths(lengths, prefix_length))
        max_seqlen = round_up(max_length, 4 * PAD_MULTIPLE)
        num_padding_sequences = -(-multiple // (max_seqlen - prefix_length))
        feature_multiple = PAD_MULTIPLE if vision_shape else 4 * PAD_MULTIPLE
        # Coarse rounding, to a quarter of a power of two: labels cost little.
        label_multiple = max(PAD_MULTIPLE, (1 << num_labels.bit_length()) // 8)
        return cls(
            num_tokens=round_up(num_tokens, multiple),
            num_sequences=round_up(len(lengths) + num_padding_sequences, 8),
            prefix_length=prefix_length,
            max_seqlen=max_seqlen,
            num_features=round_up(num_features, feature_multiple),
            num_labels=round_up(num_labels, label_multiple),
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
        for candidate in candidates:
            extended = [*shapes, candidate]
            wider = self._union(extended)
            if all(wider.fits(shape) for shape in extended):
                shapes = extended
        return self._union(shapes)

    def _union(self, shapes: Sequence[GraphShape]) -> GraphShape:
        """Return the smallest shape with space for packs of all given shapes."""
        num_tokens = max(shape.num_tokens for shape in shapes)
        max_seqlen = max(shape.max_seqlen for shape in shapes)
        max_suffix = max_seqlen - self.prefix_length
        num_sequences = 0
        for shape in shapes:
            # The other tokens become padding sequences.
            num_padding_sequences = -(-(num_tokens - shape.num_tokens) // max_suffix)
            num_sequences = max(num_sequences, shape.num_sequences + num_padding_sequences)
        return self._replace(
            num_tokens=num_tokens,
            num_sequences=num_sequences,
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
        batch: Packed batch with padded tensors. It contains patches if the vision encoder is in the
            graph.
        layout: Layout of the patches; None if the encoder is not in the graph.
        features_MKD: Image features; None for text, or if the graph contains the encoder. The graph
            writes the gradient of trainable features to `features_MKD.grad`.
        loss_inputs: Inputs of the loss, with padding (`Objective.loss_inputs`).
        seed_1: Random seed of dropout.
    """

    shape: GraphShape
    batch: PackedBatch
    layout: PatchLayout | None
    features_MKD: Tensor | None
    loss_inputs: dict[str, Tensor]
    seed_1: Tensor

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
        layout = None
        num_patches = 0
        vision_shape = shape.vision_shape
        if vision_shape is not None:
            num_patches = vision_shape.num_patches
            layout = vision_encoder.compute_patch_layout(batch.grid_thw, device)
            layout = _allocate_layout(vision_shape, layout, vision_encoder.config.merge_size)
        buffers = replace(
            batch,
            sample_ids=(),
            lengths=shape.lengths,
            grid_thw=(),
            ids_T=batch.ids_T.new_zeros(shape.num_tokens),
            position_ids_3T=batch.position_ids_3T.new_zeros(3, shape.num_tokens),
            cu_seqlens_S1=batch.cu_seqlens_S1.new_zeros(shape.num_sequences + 1),
            patches_ND=batch.patches_ND.new_zeros(num_patches, batch.patches_ND.shape[1]),
            visual_indices_M=batch.visual_indices_M.new_zeros(shape.num_features),
            logit_indices_L=batch.logit_indices_L.new_zeros(shape.num_labels),
            labels_L=batch.labels_L.new_zeros(0),
        )
        loss_buffers: dict[str, Tensor] = {}
        for name, value in loss_inputs.items():
            buffer_shape = (shape.num_labels, *value.shape[1:]) if value.dim() else ()
            loss_buffers[name] = value.new_zeros(buffer_shape)
        features = None
        if features_MKD is not None:
            features = features_MKD.new_zeros(shape.num_features, *features_MKD.shape[1:])
            if features_MKD.requires_grad:
                features.grad = torch.zeros_like(features)
                features.requires_grad_()
        seed_1 = torch.zeros(1, dtype=torch.int32, device=device)
        return cls(shape, buffers, layout, features, loss_buffers, seed_1)

    @torch.no_grad()
    def copy_from(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        loss_inputs: Mapping[str, Tensor],
        vision_encoder: VisionEncoder,
    ) -> None:
        """Copy a pack to the buffers with padding, without synchronizing with the device."""
        buffers = self.batch
        num_tokens = len(batch.ids_T)
        max_tokens = self.shape.num_tokens
        padding_positions = torch.arange(max_tokens - num_tokens, device=batch.ids_T.device)
        _copy_padded(buffers.ids_T, batch.ids_T, 0)
        _copy_padded(buffers.position_ids_3T.T, batch.position_ids_3T.T, padding_positions[:, None])
        max_suffix_length = self.shape.max_suffix_length
        _copy_cu_seqlens(
            buffers.cu_seqlens_S1, batch.cu_seqlens_S1, max_suffix_length, num_tokens, max_tokens
        )
        _copy_padded(buffers.logit_indices_L, batch.logit_indices_L, 0)
        _copy_padded(buffers.visual_indices_M, batch.visual_indices_M, max_tokens - 1)
        if features_MKD is not None and self.features_MKD is not None:
            _copy_padded(self.features_MKD, features_MKD, 0)
        if self.layout is not None:
            _copy_padded(buffers.patches_ND, batch.patches_ND, 0)
            layout = vision_encoder.compute_patch_layout(batch.grid_thw, batch.patches_ND.device)
            _copy_layout(self.layout, layout)
        for name, value in loss_inputs.items():
            buffer = self.loss_inputs[name]
            if not value.dim():
                buffer.copy_(value)
            elif value.is_floating_point():
                _copy_padded(buffer, value, 0)
            else:
                _copy_padded(buffer, value, -1)
        self.seed_1.random_(2**31 - 1)

    def load_features(self, vision_encoder: VisionEncoder) -> Tensor | None:
        """Return the image features [M, K, D], from the encoder if the graph contains it.

        The features of padding patches come last.
        """
        if self.layout is None:
            return self.features_MKD
        features_MKD: Tensor = vision_encoder(self.batch.patches_ND, (), layout=self.layout)
        return features_MKD

    def backward_features(self, features_MKD: Tensor | None) -> None:
        """Backpropagate the feature gradient of the graph through the vision encoder.

        Args:
            features_MKD: Image features of the pack with their autograd graph, if the vision
                encoder is trainable.
        """
        if features_MKD is None or self.features_MKD is None or self.features_MKD.grad is None:
            return
        torch.autograd.backward(features_MKD, self.features_MKD.grad[: len(features_MKD)])
