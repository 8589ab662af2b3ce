"""Estimate the activations that vision mergers save for the backward pass, in bytes.

tests/plan/test_saved_activations.py compares the estimates with the tensors saved by autograd.
"""

from __future__ import annotations

from torch import nn

from finesight.model.config import VisionConfig
from finesight.model.families.qwen3_vl import DeepstackMerger
from finesight.model.families.qwen_vl import VisionResampler
from finesight.model.fused_linear import FusedLinear
from finesight.model.layers import PatchMerger
from finesight.plan.saved_activations import (
    FP32_BYTES,
    ComputeConfig,
    is_trainable,
    saved_linear_bytes,
    saved_norm_bytes,
    transposed_fp8_bytes,
)


def saved_merger_bytes(
    merger: nn.Module,
    config: VisionConfig,
    num_patches: int,
    has_input_grad: bool,
    compute: ComputeConfig,
) -> int:
    """Return the bytes that a merger saves for the backward pass.

    Args:
        merger: Patch merger, DeepStack merger, or resampler of the first Qwen-VL.
        config: Vision encoder configuration.
        num_patches: Number of patches of the pack.
        has_input_grad: Whether the output of the vision encoder needs a gradient.
        compute: Device properties.
    """
    if isinstance(merger, VisionResampler):
        return saved_resampler_bytes(merger, num_patches, has_input_grad, compute)
    num_features = num_patches // config.merge_size**2
    norm: nn.Module
    up: nn.Module
    down: nn.Module
    if isinstance(merger, DeepstackMerger):
        norm, up, down = merger.norm, merger.linear_fc1, merger.linear_fc2
        num_rows = num_features * merger.merged_size // merger.norm_size
        hidden_size = merger.norm_size
    else:
        assert isinstance(merger, PatchMerger), f"saved activations of {type(merger).__name__}"
        norm, up, down = merger.ln_q, merger.mlp["0"], merger.mlp["2"]
        num_rows, hidden_size = num_patches, config.hidden_size
    assert isinstance(up, FusedLinear), f"unexpected {type(up).__name__} in a merger"
    assert isinstance(down, FusedLinear), f"unexpected {type(down).__name__} in a merger"
    has_activation_grad = has_input_grad or is_trainable(norm) or is_trainable(up)
    activation_bytes = down.in_features * compute.element_size * has_activation_grad
    norm_bytes = num_rows * saved_norm_bytes(norm, hidden_size, has_input_grad, compute)
    return norm_bytes + num_features * (
        saved_linear_bytes(up, compute) + activation_bytes + saved_linear_bytes(down, compute)
    )


def saved_resampler_bytes(
    merger: VisionResampler, num_patches: int, has_input_grad: bool, compute: ComputeConfig
) -> int:
    """Return the bytes that the resampler of the first Qwen-VL saves for the backward pass.

    The resampler is cross-attention from learned queries to the patches of each image
    (`model.families.qwen_vl`).
    """
    pool, element_size = merger.attn_pool, compute.element_size
    if not (has_input_grad or is_trainable(merger)):
        return 0
    num_queries, hidden_size = pool.query.shape
    num_query_rows = num_patches // merger.grid_size**2 * num_queries
    is_in_proj_trainable = pool.attn.in_proj_weight.requires_grad
    patch_bytes = (
        saved_norm_bytes(pool.ln_kv, hidden_size, True, compute)
        + (2 + 2 * is_in_proj_trainable) * hidden_size * element_size
    )
    if pool.kv_proj is not None:
        patch_bytes += saved_linear_bytes(pool.kv_proj, compute)
    # Queries, attention outputs, and inputs of the norm and of the last product.
    query_bytes = (
        2 + is_in_proj_trainable
    ) * hidden_size * element_size + FP32_BYTES * pool.attn.num_heads
    query_bytes += saved_linear_bytes(pool.attn.out_proj, compute)
    query_bytes += saved_norm_bytes(merger.ln_post, hidden_size, True, compute)
    query_bytes += hidden_size * element_size * merger.proj.requires_grad
    return num_patches * patch_bytes + num_query_rows * query_bytes


def transposed_merger_bytes(merger: nn.Module, has_input_grad: bool) -> int:
    """Return the bytes of FP8 weights that the backward pass of a merger transposes.

    A linear layer needs its transposed weight if its input needs a gradient: from the vision
    encoder, or because an earlier linear layer of the merger is trainable.
    """
    num_bytes = 0
    for linear in merger.modules():
        if isinstance(linear, FusedLinear):
            num_bytes += transposed_fp8_bytes(linear) if has_input_grad else 0
            has_input_grad = has_input_grad or is_trainable(linear)
    return num_bytes
