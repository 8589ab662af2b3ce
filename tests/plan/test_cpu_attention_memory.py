"""Estimated memory of unfused attention compared with allocated memory."""

from __future__ import annotations

import pytest
import torch
from memory_profile import profile_memory

from finesight.model.attention import Segments, varlen_attention
from finesight.plan.cpu_attention_memory import CpuAttentionMemory

CPU = torch.device("cpu")
HEAD_DIM = 64
FORWARD_TOLERANCE, BACKWARD_TOLERANCE = 0.01, 0.08
"""Relative tolerances. The estimate has only the large oneDNN buffers of the backward pass."""

# At least two sequences of a length: without grouped heads, a single one is a view, not a copy.
SHORT, LONG, EVEN = [43, 48, 45, 100, 44, 46] * 4, [490, 120, 490, 120], [128, 128]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (14, 2)])
@pytest.mark.parametrize("lengths", [SHORT, LONG, EVEN], ids=["short", "long", "even"])
@pytest.mark.parametrize("causal", [True, False])
def test_estimated_bytes_match_allocated_bytes(
    lengths: list[int], num_heads: int, num_kv_heads: int, causal: bool
) -> None:
    num_tokens, segments = sum(lengths), Segments.from_lengths(lengths, CPU)
    q_THD, k_TKD, v_TKD = (
        torch.randn(num_tokens, n, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
        for n in (num_heads, num_kv_heads, num_kv_heads)
    )
    buckets = segments.padded_buckets if causal else segments.length_buckets
    hidden_sizes = num_heads * HEAD_DIM, num_kv_heads * HEAD_DIM
    estimate = CpuAttentionMemory(*hidden_sizes, num_heads, causal, num_tokens, buckets)
    # All layers share the index tensors.
    index_tensors = [
        x for n in {num_heads, num_kv_heads} for x in buckets.head_rows(n) if x is not None
    ]
    assert estimate.index_bytes == sum(x.nbytes for x in index_tensors)
    with profile_memory() as forward_memory:
        o_THD = varlen_attention(q_THD, k_TKD, v_TKD, segments, causal=causal)
    do_THD = torch.randn_like(o_THD)
    with profile_memory() as backward_memory:
        o_THD.backward(do_THD)  # type: ignore[no-untyped-call]
    assert estimate.forward_peak == pytest.approx(forward_memory.peak_bytes, rel=FORWARD_TOLERANCE)
    assert estimate.backward_workspace == pytest.approx(
        backward_memory.peak_bytes + do_THD.nbytes, rel=BACKWARD_TOLERANCE
    )
