"""Static input buffers of CUDA graphs, and rounding of pack sizes to graph shapes.

Packs are padded to the shape of a graph with a masked dummy sequence.

Shapes: T tokens, S sequences, M image tokens, K features per token, D width, L tokens that predict
a supervised token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.encode.packing import PAD_MULTIPLE, PackedBatch, compute_context_lengths
from finesight.model import attention
from finesight.model.vision_encoder import VisionEncoder
from finesight.train.graph_vision_buffers import GraphVisionInputs, GraphVisionShape, round_up

MAX_GRAPH_TOKENS = 6144
"""Maximum number of tokens of a pack that is launch-bound on an H200."""

MAX_GRAPH_TOKENS_CACHED = 8192
"""Maximum number of tokens of a CUDA graph if the image features are cached.

Without the vision encoder, the device has less work while the host launches kernels. The memory
estimate of `finesight plan` ignores packs above `MAX_GRAPH_TOKENS`.
"""

MAX_PADDING_DIVISOR = 8
"""Inverse of the maximum fraction of padding tokens when a pack uses a larger graph."""


class GraphShape(NamedTuple):
    """Fixed sizes of a CUDA graph; packs are padded to them.

    Attributes:
        num_tokens: Number of tokens.
        num_sequences: Number of sequences.
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
            lengths: Lengths of the sequences.
            prefix_length: Length of the shared prefix.
            num_features: Number of image tokens.
            num_labels: Number of supervised tokens.
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
        shape: Shape of the graph.
        batch: Packed batch with padded tensors.
        vision_inputs: Inputs of the vision encoder; None if the encoder is not in the graph.
        features_MKD: Image features; None for text, or if the graph contains the encoder.
        loss_weight: Scalar that multiplies the loss.
        seed_1: Random seed of dropout.
        features_grad_MKD: Gradient of trainable image features, an output of the graph.
    """

    shape: GraphShape
    batch: PackedBatch
    vision_inputs: GraphVisionInputs | None
    features_MKD: Tensor | None
    loss_weight: Tensor
    seed_1: Tensor
    features_grad_MKD: Tensor | None

    @classmethod
    def allocate(
        cls,
        shape: GraphShape,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        vision_encoder: VisionEncoder,
    ) -> GraphInputs:
        """Allocate the buffers of a graph.

        Args:
            shape: Shape of the graph.
            batch: Pack that the graph can run, for dtypes and device.
            features_MKD: Image features of this pack, if they are an input of the graph.
            vision_encoder: Vision encoder of the model.
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
            labels_L=zeros(shape.num_labels),
        )
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
        loss_weight, seed_1 = torch.zeros((), device=device), zeros(1).int()
        return cls(shape, buffers, vision_inputs, features, loss_weight, seed_1, features_grad)

    @torch.no_grad()
    def copy_from(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        loss_weight: Tensor,
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
        _copy_padded(static_batch.labels_L, batch.labels_L, -1)
        _copy_padded(
            static_batch.visual_indices_M, batch.visual_indices_M, self.shape.num_tokens - 1
        )
        if features_MKD is not None and self.features_MKD is not None:
            _copy_padded(self.features_MKD, features_MKD, 0)
        if self.vision_inputs is not None:
            self.vision_inputs.copy_from(batch, vision_encoder)
        self.loss_weight.copy_(loss_weight)
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
