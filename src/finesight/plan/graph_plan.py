"""Predict which packs run as CUDA graphs (`train.cuda_graphs`), and the memory of each graph.

If half of the GPU memory is free, training also captures graphs of larger packs, and graphs that
packs of several shapes share. These graphs are not predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

from finesight.model.families.qwen2_5_vl import WindowVisionEncoder
from finesight.model.vision_encoder import VisionEncoder
from finesight.model.vlm import VisionLanguageModel
from finesight.plan.planned_pack import PlannedPack
from finesight.plan.saved_activations import INDEX_BYTES, ComputeConfig
from finesight.train.cuda_graphs import has_few_trainable_params, should_capture
from finesight.train.graph_buffers import (
    GraphShape,
    GraphVisionShape,
    can_capture_vision,
    should_capture_vision,
)

CU_SEQLEN_BYTES = 4
"""Bytes of an element of `cu_seqlens` (int32)."""


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
    """Return the shape of the CUDA graph of a pack.

    Args:
        encoder: Vision encoder of the model.
        pack: Pack to plan.
        captures_vision: Whether the graph contains the vision encoder.
    """
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
    compute: ComputeConfig,
    activation_checkpointing: float,
    pack: PlannedPack,
) -> GraphPlan | None:
    """Return the CUDA graph plan of a pack, or None if no graph is used.

    Args:
        model: Model, configured for tuning.
        compute: Device properties.
        activation_checkpointing: Fraction of layers with activation checkpointing.
        pack: Pack to plan.
    """
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
    # Token ids, three position ids and indices of tokens; logit indices and labels.
    buffer_bytes = INDEX_BYTES * (
        4 * shape.num_tokens + shape.num_features + 2 * shape.num_labels
    ) + CU_SEQLEN_BYTES * (shape.num_sequences + 1)
    lengths = *pack.lengths, shape.num_tokens - pack.num_tokens
    if vision_shape is None:
        feature_bytes = (
            shape.num_features
            * encoder.features_per_token
            * encoder.config.out_hidden_size
            * compute.element_size
        )
        is_trainable = any(parameter.requires_grad for parameter in encoder.parameters())
        buffer_bytes += feature_bytes * (2 if is_trainable else 1)
        return GraphPlan(
            shape, PlannedPack(lengths, (), shape.num_labels, pack.prefix_length), buffer_bytes
        )
    # Patch bytes, row and column of each patch; permutation of merge windows and its inverse.
    buffer_bytes += vision_shape.num_patches * (vision_shape.patch_bytes + 2 * CU_SEQLEN_BYTES)
    buffer_bytes += 2 * INDEX_BYTES * shape.num_features * isinstance(encoder, WindowVisionEncoder)
    buffer_bytes += sum(CU_SEQLEN_BYTES * (count + 1) for count, _ in vision_shape.segment_shapes)
    num_padding = vision_shape.num_patches - pack.num_patches
    grid_thw = (
        (*pack.grid_thw, (1, merge_size, num_padding // merge_size))
        if num_padding
        else pack.grid_thw
    )
    return GraphPlan(
        shape, PlannedPack(lengths, grid_thw, shape.num_labels, pack.prefix_length), buffer_bytes
    )
