"""Static vision encoder inputs of CUDA graphs that contain a trainable vision encoder.

Patches are padded with dummy segments. Their features belong to the dummy sequence, which has no
gradient.

Shapes: N patches, B bytes of a patch, M merged patches, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.encode.packing import PAD_MULTIPLE, PackedBatch
from finesight.model.attention import Segments
from finesight.model.lora.layer import LoraLinear
from finesight.model.vision_encoder import PatchLayout, VisionEncoder, unique_objects
from finesight.model.vlm import VisionLanguageModel
from finesight.vision.patches import GridTHW

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
            Segments((max_seqlen,) * count, _zeros(count + 1, device, torch.int32), max_seqlen)
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
        num_patches, layout = (
            len(batch.patches_ND),
            vision_encoder.compute_patch_layout(batch.grid_thw, batch.patches_ND.device),
        )
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
