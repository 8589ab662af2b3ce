"""What attention in plain products is said to take against what it really allocates."""

from __future__ import annotations

import pytest
import torch
from memory_profile import profile_memory

from finesight.model.attention import Segments, varlen_attention
from finesight.plan.cpu_attention_memory import CpuAttentionMemory

CPU = torch.device("cpu")
WIDTH = 64
CLOSE, NEAR = 0.01, 0.08
"""Tolerances: of the allocations of oneDNN, only large ones of the backward pass are counted."""

# Two sequences of a length at least: where heads are not grouped, one alone is a view of what
# others copy.
SHORT, LONG, EVEN = [43, 48, 45, 100, 44, 46] * 4, [490, 120, 490, 120], [128, 128]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (14, 2)])
@pytest.mark.parametrize("lengths", [SHORT, LONG, EVEN], ids=["short", "long", "even"])
@pytest.mark.parametrize("causal", [True, False])
def test_estimated_bytes_match_allocated_bytes(
    lengths: list[int], heads: int, kv_heads: int, causal: bool
) -> None:
    tokens, segments = sum(lengths), Segments.from_lengths(lengths, CPU)
    q_THD, k_TKD, v_TKD = (
        torch.randn(tokens, count, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    runs = segments.padded_buckets if causal else segments.length_buckets
    widths = heads * WIDTH, kv_heads * WIDTH
    output = CpuAttentionMemory(*widths, heads, causal, tokens, runs)
    # Once for all layers.
    buffers = [x for count in {heads, kv_heads} for x in runs.head_rows(count) if x is not None]
    assert output.index_bytes == sum(x.nbytes for x in buffers)
    with profile_memory() as forward:
        o_THD = varlen_attention(q_THD, k_TKD, v_TKD, segments, causal=causal)
    do_THD = torch.randn_like(o_THD)
    with profile_memory() as back:
        o_THD.backward(do_THD)  # type: ignore[no-untyped-call]
    assert output.forward_peak == pytest.approx(forward.peak_bytes, rel=CLOSE)
    assert output.backward_workspace == pytest.approx(back.peak_bytes + do_THD.nbytes, rel=NEAR)
