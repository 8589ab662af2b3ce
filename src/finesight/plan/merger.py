"""What mergers keep for the backward pass, in bytes: a pack's patches become features.

tests/plan/test_kept.py counts what autograd really saves. A gradient `reaches` a merger where
something of the tower learns.
"""

from __future__ import annotations

from torch import nn

from finesight.model.geometry import VisionGeometry
from finesight.model.layers import PatchMerger
from finesight.model.linear import GroupedLinear
from finesight.model.qwen3_vl import Merger
from finesight.model.qwen_vl import Resampler
from finesight.plan.kept import WIDE, Computing, learns, of_group, of_norm, turned


def of_merger(
    merger: nn.Module,
    geometry: VisionGeometry,
    patches: int,
    reached: bool,
    computing: Computing,
) -> int:
    """Rows of merged patches go through two products, with an activation between them."""
    if isinstance(merger, Resampler):
        return of_resampler(merger, patches, reached, computing)
    features = patches // geometry.merge**2
    norm: nn.Module
    up: nn.Module
    down: nn.Module
    if isinstance(merger, Merger):
        norm, up, down = merger.norm, merger.linear_fc1, merger.linear_fc2
        rows = features * merger.merged_width // merger.normed_width
        width = merger.normed_width
    else:
        assert isinstance(merger, PatchMerger), f"what a {type(merger).__name__} keeps"
        norm, up, down = merger.ln_q, merger.mlp["0"], merger.mlp["2"]
        rows, width = patches, geometry.width
    assert isinstance(up, GroupedLinear), f"{type(up).__name__} in a merger"
    assert isinstance(down, GroupedLinear), f"{type(down).__name__} in a merger"
    inside = reached or learns(norm) or learns(up)
    activation = down.inputs * computing.number * inside
    found = rows * of_norm(norm, width, reached, computing)
    return found + features * (of_group(up, computing) + activation + of_group(down, computing))


def of_resampler(merger: Resampler, patches: int, reached: bool, computing: Computing) -> int:
    """The first Qwen-VL's (`model.qwen_vl`): queries of each picture look at its patches."""
    pool, number = merger.attn_pool, computing.number
    if not (reached or learns(merger)):
        return 0
    queries, width = pool.query.shape
    rows = patches // merger.side**2 * queries
    trained = pool.attn.in_proj_weight.requires_grad
    of_patch = of_norm(pool.ln_kv, width, True, computing) + (2 + 2 * trained) * width * number
    if pool.kv_proj is not None:
        of_patch += of_group(pool.kv_proj, computing)
    # Queries, what they took, and what norm and last product are given.
    of_query = (2 + trained) * width * number + WIDE * pool.attn.heads
    of_query += of_group(pool.attn.out_proj, computing)
    of_query += of_norm(merger.ln_post, width, True, computing)
    of_query += width * number * merger.proj.requires_grad
    return patches * of_patch + rows * of_query


def turned_in(merger: nn.Module, reached: bool) -> int:
    """Of its groups in FP8, whose ways back need their codes once more: the first one's where its
    input has a gradient, the others' where it learns, too."""
    found = 0
    for group in merger.modules():
        if isinstance(group, GroupedLinear):
            found += turned(group) if reached else 0
            reached = reached or learns(group)
    return found
