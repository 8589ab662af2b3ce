"""Triton kernels of Gated DeltaNet: convolution and gated delta rule, in chunks and by token.

All of them start anew with each sequence of a packed batch. With G the cumulative log decay within
a chunk, S the state before the chunk and M_ij = exp(G_i - G_j) for i >= j, a chunk computes

    A = strictly lower part of b_i (k_i . k_j) M_ij,  T = (I + A)^-1,  P = (q k^T) * M
    R = b (v - exp(G) k S),  U = T R,  O = exp(G) q S + P U
    S <- exp(G_L) S + (exp(G_L - G) k)^T U

T and P depend on one chunk only and are computed for all chunks at once. The recurrence computes
the rest with the state in registers. The backward pass computes U and the states again.

Shapes: T tokens, S sequences, C chunks, L = 64 tokens of a chunk, K heads of queries and keys,
H heads of values (a multiple of K), D dimension of a query and a key, V dimension of a value,
N channels of the convolution, W width of its kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.kernels.runtime import (
    MAX_PARTIAL_SUMS,
    Ptr,
    TileConfig,
    get_device_capability,
    jit,
    sum_partials,
    supports_pdl,
    tl,
    triton,
    wait_for_previous_kernel,
)

CHUNK_LENGTH, BLOCK_LENGTH = 64, 16
"""Tokens of a chunk, which are computed in parallel, and rows of the diagonal blocks of I + A,
which are inverted row by row."""

CONV_BLOCK, CONV_BACKWARD_BLOCK, STEP_ELEMENTS = 16, 32, 256
"""Tokens per program of the convolution and its gradient, and elements per program of its decoding
steps. From 256 elements on, each thread has 8 of a row, and the sum of a row has one order."""

TOKEN_TILE = TileConfig(0, 64, 2, 1)
"""Columns of a state and warps per program of the recurrence over tokens; fastest on an H100."""


class SequenceChunks(NamedTuple):
    """Chunks of a packed batch, in the order of the tokens.

    Attributes:
        first_chunk_S1: First chunk of each sequence, and the number of chunks.
        start_C: First token of each chunk.
        end_C: Token after the last one of each chunk.
    """

    first_chunk_S1: Tensor
    start_C: Tensor
    end_C: Tensor


@jit
def _load_gates(
    log_decay: Ptr, beta: Ptr, start: tl.tensor, end: tl.tensor, head: tl.tensor,
    heads: tl.constexpr, length: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Load the cumulative log decay of a chunk, its last value and the step sizes."""
    rows = start + tl.arange(0, length)
    mask = rows < end
    offsets = rows.to(tl.int64) * heads + head
    g_L = tl.load(log_decay + offsets, mask=mask, other=0.0).to(tl.float32)
    beta_L = tl.load(beta + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.cumsum(g_L, 0), tl.sum(g_L, 0), beta_L


@jit
def _load_rows(
    x: Ptr, start: tl.tensor, end: tl.tensor, head: tl.tensor, first: tl.tensor,
    heads: tl.constexpr, width: tl.constexpr, length: tl.constexpr, block: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load columns of one head of a chunk [L, block], zeros after its end."""
    rows = start + tl.arange(0, length)
    columns = first + tl.arange(0, block)
    offsets = (rows.to(tl.int64) * heads + head)[:, None] * width + columns[None, :]
    return tl.load(x + offsets, mask=(rows < end)[:, None], other=0.0)


@jit
def _store_rows(
    x: Ptr, value: tl.tensor, start: tl.tensor, end: tl.tensor, head: tl.tensor, first: tl.tensor,
    heads: tl.constexpr, width: tl.constexpr, length: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    rows = start + tl.arange(0, length)
    columns = first + tl.arange(0, block)
    offsets = (rows.to(tl.int64) * heads + head)[:, None] * width + columns[None, :]
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=(rows < end)[:, None])


@jit
def _decay_matrix(g_L: tl.tensor, length: tl.constexpr) -> tl.tensor:
    """Compute exp(G_i - G_j) for i >= j, otherwise 0. The mask comes first: exp would overflow."""
    index = tl.arange(0, length)
    difference = g_L[:, None] - g_L[None, :]
    return tl.exp(tl.where(index[:, None] >= index[None, :], difference, float("-inf")))


@jit
def _invert_unit_lower(
    a_LL: tl.tensor, length: tl.constexpr, block: tl.constexpr, precision: tl.constexpr
) -> tl.tensor:
    """Compute (I + A)^-1 for a strictly lower triangular A.

    The diagonal blocks are inverted by forward substitution, all at once. With E their inverse and
    N = E (A without the diagonal blocks), N^4 = 0 and the inverse is (I - N) (I + N^2) E.
    """
    blocks: tl.constexpr = length // block
    b = tl.arange(0, blocks)
    i = tl.arange(0, block)
    is_diagonal = (b[:, None] == b[None, :])[:, None, :, None]
    a_BIBI = tl.reshape(a_LL, (blocks, block, blocks, block))
    diagonal_BII = tl.sum(tl.where(is_diagonal, a_BIBI, 0.0), 2)
    identity_II = (i[:, None] == i[None, :]).to(tl.float32)
    inverse_BII = tl.broadcast_to(identity_II[None, :, :], (blocks, block, block))
    for row in range(1, block):
        is_row = (i == row)[None, :, None]
        row_BI = tl.sum(tl.where(is_row, diagonal_BII, 0.0), 1)
        # Rows from `row` on are those of the identity, but their coefficients are zero.
        update_BI = tl.sum(row_BI[:, :, None] * inverse_BII, 1)
        inverse_BII -= tl.where(is_row, update_BI[:, None, :], 0.0)
    inverse_BIBI = tl.where(is_diagonal, inverse_BII[:, :, None, :], 0.0)
    inverse_LL = tl.reshape(inverse_BIBI, (length, length))
    outer_LL = tl.reshape(tl.where(is_diagonal, 0.0, a_BIBI), (length, length))
    index = tl.arange(0, length)
    identity_LL = (index[:, None] == index[None, :]).to(tl.float32)
    n_LL = tl.dot(inverse_LL, outer_LL, input_precision=precision)
    square_LL = tl.dot(n_LL, n_LL, input_precision=precision)
    series_LL = tl.dot(identity_LL - n_LL, identity_LL + square_LL, input_precision=precision)
    return tl.dot(series_LL, inverse_LL, input_precision=precision)


@jit
def _chunk_matrices_kernel(
    q: Ptr, k: Ptr, log_decay: Ptr, beta: Ptr, starts: Ptr, ends: Ptr, inverse: Ptr, product: Ptr,
    key_heads: tl.constexpr, heads: tl.constexpr, head_dim: tl.constexpr, length: tl.constexpr,
    block: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    key_head = head // (heads // key_heads)
    g_L, _, beta_L = _load_gates(log_decay, beta, start, end, head, heads, length)
    k_LD = _load_rows(k, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
    q_LD = _load_rows(q, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
    decay_LL = _decay_matrix(g_L, length)
    index = tl.arange(0, length)
    is_lower = index[:, None] > index[None, :]
    kk_LL = tl.dot(k_LD, tl.trans(k_LD), input_precision=precision)
    a_LL = tl.where(is_lower, kk_LL * decay_LL * beta_L[:, None], 0.0)
    p_LL = tl.dot(q_LD, tl.trans(k_LD), input_precision=precision) * decay_LL
    inverse_LL = _invert_unit_lower(a_LL, length, block, precision)
    base = (chunk.to(tl.int64) * heads + head) * length * length
    offsets = base + index[:, None] * length + index[None, :]
    tl.store(inverse + offsets, inverse_LL.to(inverse.dtype.element_ty))
    tl.store(product + offsets, p_LL.to(product.dtype.element_ty))


@jit(do_not_specialize=["initial_stride"])
def _recurrence_kernel(
    q: Ptr, k: Ptr, v: Ptr, log_decay: Ptr, beta: Ptr, inverse: Ptr, product: Ptr, initial: Ptr,
    first_chunks: Ptr, starts: Ptr, ends: Ptr, out: Ptr, final: Ptr, states: Ptr, updates: Ptr,
    initial_stride: int, key_heads: tl.constexpr, heads: tl.constexpr, head_dim: tl.constexpr,
    value_dim: tl.constexpr, length: tl.constexpr, block_v: tl.constexpr, has_initial: tl.constexpr,
    for_backward: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    first_v = tl.program_id(0) * block_v
    head, sequence = tl.program_id(1), tl.program_id(2)
    key_head = head // (heads // key_heads)
    d = tl.arange(0, head_dim)
    columns = first_v + tl.arange(0, block_v)
    index = tl.arange(0, length)
    state_offsets = d[:, None] * value_dim + columns[None, :]
    own_state = (sequence.to(tl.int64) * heads + head) * head_dim * value_dim
    if has_initial:
        first = sequence.to(tl.int64) * initial_stride + head * head_dim * value_dim
        state_DV = tl.load(initial + first + state_offsets).to(tl.float32)
    else:
        state_DV = tl.zeros((head_dim, block_v), tl.float32)
    dtype = q.dtype.element_ty
    for chunk in range(tl.load(first_chunks + sequence), tl.load(first_chunks + sequence + 1)):
        start, end = tl.load(starts + chunk), tl.load(ends + chunk)
        row = tl.cast(chunk, tl.int64) * heads + head
        g_L, last, beta_L = _load_gates(log_decay, beta, start, end, head, heads, length)
        from_start_L = tl.exp(g_L)[:, None]
        k_LD = _load_rows(k, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
        v_LV = _load_rows(v, start, end, head, first_v, heads, value_dim, length, block_v)
        matrix_offsets = row * length * length + index[:, None] * length + index[None, :]
        inverse_LL = tl.load(inverse + matrix_offsets)
        rounded_DV = state_DV.to(dtype)
        kS_LV = tl.dot(k_LD, rounded_DV, input_precision=precision)
        r_LV = (v_LV - from_start_L * kS_LV) * beta_L[:, None]
        u_LV = tl.dot(inverse_LL, r_LV.to(dtype), input_precision=precision).to(dtype)
        if for_backward:
            offsets = row * head_dim * value_dim + state_offsets
            tl.store(states + offsets, rounded_DV)
            _store_rows(updates, u_LV, start, end, head, first_v, heads, value_dim, length, block_v)
        else:
            q_LD = _load_rows(q, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
            p_LL = tl.load(product + matrix_offsets)
            o_LV = from_start_L * tl.dot(q_LD, rounded_DV, input_precision=precision)
            o_LV += tl.dot(p_LL, u_LV, input_precision=precision)
            _store_rows(out, o_LV, start, end, head, first_v, heads, value_dim, length, block_v)
        to_end_LD = (k_LD * tl.exp(last - g_L)[:, None]).to(dtype)
        state_DV = state_DV * tl.exp(last) + tl.dot(
            tl.trans(to_end_LD), u_LV, input_precision=precision
        )
    if not for_backward:
        tl.store(final + own_state + state_offsets, state_DV)


@jit
def _recurrence_backward_kernel(
    q: Ptr, k: Ptr, log_decay: Ptr, beta: Ptr, inverse: Ptr, product: Ptr, dout: Ptr, dfinal: Ptr,
    first_chunks: Ptr, starts: Ptr, ends: Ptr, dstates: Ptr, drs: Ptr, dinitial: Ptr,
    key_heads: tl.constexpr, heads: tl.constexpr, head_dim: tl.constexpr, value_dim: tl.constexpr,
    length: tl.constexpr, block_v: tl.constexpr, has_final: tl.constexpr,
    has_initial: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    first_v = tl.program_id(0) * block_v
    head, sequence = tl.program_id(1), tl.program_id(2)
    key_head = head // (heads // key_heads)
    d = tl.arange(0, head_dim)
    columns = first_v + tl.arange(0, block_v)
    index = tl.arange(0, length)
    state_offsets = d[:, None] * value_dim + columns[None, :]
    own_state = (sequence.to(tl.int64) * heads + head) * head_dim * value_dim
    if has_final:
        dstate_DV = tl.load(dfinal + own_state + state_offsets).to(tl.float32)
    else:
        dstate_DV = tl.zeros((head_dim, block_v), tl.float32)
    dtype = q.dtype.element_ty
    first, stop = tl.load(first_chunks + sequence), tl.load(first_chunks + sequence + 1)
    for step in range(stop - first):
        chunk = stop - 1 - step
        start, end = tl.load(starts + chunk), tl.load(ends + chunk)
        row = tl.cast(chunk, tl.int64) * heads + head
        g_L, last, beta_L = _load_gates(log_decay, beta, start, end, head, heads, length)
        from_start_L = tl.exp(g_L)
        k_LD = _load_rows(k, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
        q_LD = _load_rows(q, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
        do_LV = _load_rows(dout, start, end, head, first_v, heads, value_dim, length, block_v)
        matrix_offsets = row * length * length + index[:, None] * length + index[None, :]
        inverse_LL, p_LL = tl.load(inverse + matrix_offsets), tl.load(product + matrix_offsets)
        rounded_DV = dstate_DV.to(dtype)
        tl.store(dstates + row * head_dim * value_dim + state_offsets, rounded_DV)
        to_end_LD = (k_LD * tl.exp(last - g_L)[:, None]).to(dtype)
        du_LV = tl.dot(to_end_LD, rounded_DV, input_precision=precision)
        du_LV += tl.dot(tl.trans(p_LL), do_LV, input_precision=precision)
        dr_LV = tl.dot(tl.trans(inverse_LL), du_LV.to(dtype), input_precision=precision).to(dtype)
        _store_rows(drs, dr_LV, start, end, head, first_v, heads, value_dim, length, block_v)
        decayed_q_LD = (q_LD * from_start_L[:, None]).to(dtype)
        decayed_k_LD = (k_LD * (from_start_L * beta_L)[:, None]).to(dtype)
        dstate_DV = dstate_DV * tl.exp(last)
        dstate_DV += tl.dot(tl.trans(decayed_q_LD), do_LV, input_precision=precision)
        dstate_DV -= tl.dot(tl.trans(decayed_k_LD), dr_LV, input_precision=precision)
    if has_initial:
        tl.store(dinitial + own_state + state_offsets, dstate_DV)


@jit
def _chunk_gradients_kernel(
    q: Ptr, k: Ptr, v: Ptr, log_decay: Ptr, beta: Ptr, dout: Ptr, states: Ptr, dstates: Ptr,
    updates: Ptr, drs: Ptr, starts: Ptr, ends: Ptr, dq: Ptr, dk: Ptr, dv: Ptr, dlog_decay: Ptr,
    dbeta: Ptr, key_heads: tl.constexpr, heads: tl.constexpr, head_dim: tl.constexpr,
    value_dim: tl.constexpr, length: tl.constexpr, block_v: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the gradients of one value head; those of queries and keys are summed later."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    key_head = head // (heads // key_heads)
    dtype = q.dtype.element_ty
    index = tl.arange(0, length)
    d = tl.arange(0, head_dim)
    row = chunk.to(tl.int64) * heads + head
    g_L, last, beta_L = _load_gates(log_decay, beta, start, end, head, heads, length)
    from_start_L, to_end_L = tl.exp(g_L), tl.exp(last - g_L)
    da_LL = tl.zeros((length, length), tl.float32)
    dp_LL = tl.zeros((length, length), tl.float32)
    dq_LD = tl.zeros((length, head_dim), tl.float32)
    key_LD = tl.zeros((length, head_dim), tl.float32)
    end_LD = tl.zeros((length, head_dim), tl.float32)
    dbeta_L = tl.zeros((length,), tl.float32)
    dlast = 0.0
    for first_v in range(0, value_dim, block_v):
        columns = first_v + tl.arange(0, block_v)
        offsets = row * head_dim * value_dim + d[:, None] * value_dim + columns[None, :]
        state_DV, dstate_DV = tl.load(states + offsets), tl.load(dstates + offsets)
        do_LV = _load_rows(dout, start, end, head, first_v, heads, value_dim, length, block_v)
        u_LV = _load_rows(updates, start, end, head, first_v, heads, value_dim, length, block_v)
        dr_LV = _load_rows(drs, start, end, head, first_v, heads, value_dim, length, block_v)
        v_LV = _load_rows(v, start, end, head, first_v, heads, value_dim, length, block_v)
        dq_LD += tl.dot(do_LV, tl.trans(state_DV), input_precision=precision)
        key_LD += tl.dot(dr_LV, tl.trans(state_DV), input_precision=precision)
        end_LD += tl.dot(u_LV, tl.trans(dstate_DV), input_precision=precision)
        da_LL -= tl.dot(dr_LV, tl.trans(u_LV), input_precision=precision)
        dp_LL += tl.dot(do_LV, tl.trans(u_LV), input_precision=precision)
        dr_wide_LV = dr_LV.to(tl.float32)
        dbeta_L += tl.sum(dr_wide_LV * v_LV, 1)
        dlast += tl.sum(state_DV.to(tl.float32) * dstate_DV)
        dv_LV = dr_wide_LV * beta_L[:, None]
        _store_rows(dv, dv_LV, start, end, head, first_v, heads, value_dim, length, block_v)
    k_LD = _load_rows(k, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
    q_LD = _load_rows(q, start, end, key_head, 0, key_heads, head_dim, length, head_dim)
    dq_LD *= from_start_L[:, None]
    end_LD *= to_end_L[:, None]
    through_key_L = from_start_L * tl.sum(key_LD * k_LD, 1)
    through_end_L = tl.sum(end_LD * k_LD, 1)
    dbeta_L -= through_key_L
    dg_L = tl.sum(dq_LD * q_LD, 1) - beta_L * through_key_L - through_end_L
    dlast = dlast * tl.exp(last) + tl.sum(through_end_L, 0)
    dk_LD = end_LD - key_LD * (beta_L * from_start_L)[:, None]

    decay_LL = _decay_matrix(g_L, length)
    is_lower = index[:, None] > index[None, :]
    kk_LL = tl.dot(k_LD, tl.trans(k_LD), input_precision=precision) * decay_LL
    da_LL = tl.where(is_lower, da_LL, 0.0)
    da_kk_LL = da_LL * kk_LL
    dbeta_L += tl.sum(da_kk_LL, 1)
    through_LL = da_kk_LL * beta_L[:, None]
    dp_LL *= decay_LL
    qk_LL = tl.dot(q_LD, tl.trans(k_LD), input_precision=precision)
    through_LL += dp_LL * qk_LL
    dg_L += tl.sum(through_LL, 1) - tl.sum(through_LL, 0)
    dkk_LL = (da_LL * decay_LL * beta_L[:, None]).to(dtype)
    dp_rounded_LL = dp_LL.to(dtype)
    dq_LD += tl.dot(dp_rounded_LL, k_LD, input_precision=precision)
    dk_LD += tl.dot(tl.trans(dp_rounded_LL), q_LD, input_precision=precision)
    dk_LD += tl.dot(dkk_LL, k_LD, input_precision=precision)
    dk_LD += tl.dot(tl.trans(dkk_LL), k_LD, input_precision=precision)

    rows = start + index
    gate_offsets = rows.to(tl.int64) * heads + head
    dlog_L = tl.sum(dg_L, 0) - tl.cumsum(dg_L, 0) + dg_L + dlast
    tl.store(dlog_decay + gate_offsets, dlog_L, mask=rows < end)
    tl.store(dbeta + gate_offsets, dbeta_L, mask=rows < end)
    _store_rows(dq, dq_LD, start, end, head, 0, heads, head_dim, length, head_dim)
    _store_rows(dk, dk_LD, start, end, head, 0, heads, head_dim, length, head_dim)


def _precision(x: Tensor) -> str:
    """Return the precision of fp32 products; with 16-bit inputs, only the inverse has them."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _num_stages(device: torch.device) -> int:
    """Return the pipeline stages of loops with large tiles: 2 with 160 KB of shared memory."""
    capability = get_device_capability(device)
    return 2 if capability in ((8, 0), (8, 7)) or (9, 0) <= capability < (12, 0) else 1


def _value_block(num_sequences: int, heads: int, value_dim: int) -> int:
    """Return the columns of a state per program: fewer columns for few sequences."""
    block = min(64, value_dim)
    while block > 16 and num_sequences * heads * (value_dim // block) < 264:
        block //= 2
    return block


def _chunk_matrices(
    q_TKD: Tensor, k_TKD: Tensor, log_decay_TH: Tensor, beta_TH: Tensor, chunks: SequenceChunks
) -> tuple[Tensor, Tensor]:
    """Compute the inverse T and the product P of all chunks, both [C, H, L, L]."""
    heads, num_chunks = log_decay_TH.shape[1], len(chunks.start_C)
    inverse = q_TKD.new_empty(num_chunks, heads, CHUNK_LENGTH, CHUNK_LENGTH)
    product = torch.empty_like(inverse)
    _chunk_matrices_kernel[(num_chunks, heads)](
        q_TKD, k_TKD, log_decay_TH, beta_TH, chunks.start_C, chunks.end_C, inverse, product,
        key_heads=q_TKD.shape[1], heads=heads, head_dim=q_TKD.shape[2], length=CHUNK_LENGTH,
        block=BLOCK_LENGTH, precision=_precision(q_TKD), num_warps=2,
    )  # fmt: skip
    return inverse, product


def _run_recurrence(
    q_TKD: Tensor, k_TKD: Tensor, v_THV: Tensor, log_decay_TH: Tensor, beta_TH: Tensor,
    matrices: tuple[Tensor, Tensor], initial_SHDV: Tensor | None, chunks: SequenceChunks,
    outputs: tuple[Tensor, Tensor], *, for_backward: bool,
) -> None:  # fmt: skip
    """Run the recurrence.

    The outputs are the attention output and the final states, or, for the backward pass, the states
    before each chunk and the updates U.
    """
    num_sequences, (_, heads, value_dim) = len(chunks.first_chunk_S1) - 1, v_THV.shape
    block_v = _value_block(num_sequences, heads, value_dim)
    # The states of several sequences may be one expanded tensor.
    assert initial_SHDV is None or initial_SHDV[0].is_contiguous(), "a state with strides"
    unused = (outputs[0],) * 2
    _recurrence_kernel[(value_dim // block_v, heads, num_sequences)](
        q_TKD, k_TKD, v_THV, log_decay_TH, beta_TH, *matrices,
        q_TKD if initial_SHDV is None else initial_SHDV, *chunks,
        *(unused + outputs if for_backward else outputs + unused),
        0 if initial_SHDV is None else initial_SHDV.stride(0), key_heads=q_TKD.shape[1],
        heads=heads, head_dim=q_TKD.shape[2], value_dim=value_dim, length=CHUNK_LENGTH,
        block_v=block_v, has_initial=initial_SHDV is not None, for_backward=for_backward,
        precision=_precision(q_TKD), num_warps=4, num_stages=_num_stages(q_TKD.device),
    )  # fmt: skip


@jit
def _update_state(
    state_DV: tl.tensor, q_D: tl.tensor, k_D: tl.tensor, v_V: tl.tensor, decay: tl.tensor,
    beta: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Compute one token: the new state and the output."""
    state_DV *= decay
    update_V = (v_V - tl.sum(state_DV * k_D[:, None], 0)) * beta
    state_DV += k_D[:, None] * update_V[None, :]
    return state_DV, tl.sum(state_DV * q_D[:, None], 0)


@jit(do_not_specialize=["initial_stride"])
def _token_recurrence_kernel(
    q: Ptr, k: Ptr, v: Ptr, log_decay: Ptr, beta: Ptr, initial: Ptr, final: Ptr, slots: Ptr,
    starts: Ptr, out: Ptr, initial_stride: int, key_heads: tl.constexpr, heads: tl.constexpr,
    head_dim: tl.constexpr, value_dim: tl.constexpr, block_v: tl.constexpr,
) -> None:  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2)
    key_head = head // (heads // key_heads)
    d, v_index = tl.arange(0, head_dim), tl.program_id(0) * block_v + tl.arange(0, block_v)
    slot = tl.load(slots + sequence).to(tl.int64)
    offsets = head * head_dim * value_dim + d[:, None] * value_dim + v_index[None, :]
    state_DV = tl.load(initial + slot * initial_stride + offsets)
    for t in range(tl.load(starts + sequence), tl.load(starts + sequence + 1)):
        row = tl.cast(t, tl.int64)
        q_D = tl.load(q + (row * key_heads + key_head) * head_dim + d).to(tl.float32)
        k_D = tl.load(k + (row * key_heads + key_head) * head_dim + d).to(tl.float32)
        v_V = tl.load(v + (row * heads + head) * value_dim + v_index).to(tl.float32)
        decay = tl.exp(tl.load(log_decay + row * heads + head))
        step = tl.load(beta + row * heads + head)
        state_DV, o_V = _update_state(state_DV, q_D, k_D, v_V, decay, step)
        tl.store(out + (row * heads + head) * value_dim + v_index, o_V)
    tl.store(final + slot * heads * head_dim * value_dim + offsets, state_DV)


def recurrent_gated_delta_rule(
    q_TKD: Tensor, k_TKD: Tensor, v_THV: Tensor, log_decay_TH: Tensor, beta_TH: Tensor,
    initial_SHDV: Tensor, final_SHDV: Tensor, slots_S: Tensor, cu_seqlens_S1: Tensor,
) -> Tensor:  # fmt: skip
    """Compute the outputs [T, H, V] token by token, with the same bits for any number of tokens.

    Args:
        initial_SHDV: States before the first token of each sequence, in fp32.
        final_SHDV: Receives the states after the last token; may be `initial_SHDV`.
        slots_S: Row of each sequence in both.
    """
    out_THV, (heads, head_dim, value_dim) = torch.empty_like(v_THV), final_SHDV.shape[1:]
    block_v = min(TOKEN_TILE.block_n, value_dim)
    # Without contraction to fused multiply-adds, the bits do not depend on the compiler.
    _token_recurrence_kernel[(value_dim // block_v, heads, len(slots_S))](
        q_TKD, k_TKD, v_THV, log_decay_TH, beta_TH, initial_SHDV, final_SHDV, slots_S,
        cu_seqlens_S1, out_THV, initial_SHDV.stride(0), key_heads=q_TKD.shape[1], heads=heads,
        head_dim=head_dim, value_dim=value_dim, block_v=block_v, num_warps=TOKEN_TILE.num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out_THV


def gated_delta_rule(
    q_TKD: Tensor,
    k_TKD: Tensor,
    v_THV: Tensor,
    log_decay_TH: Tensor,
    beta_TH: Tensor,
    initial_SHDV: Tensor | None,
    chunks: SequenceChunks,
    cu_seqlens_S1: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Compute the outputs [T, H, V] and the final states [S, H, D, V] in fp32.

    The matrices T and P of all chunks, the last result, are inputs of the backward pass. With
    `cu_seqlens_S1`, outputs and states have the bits of decoding steps.
    """
    matrices = _chunk_matrices(q_TKD, k_TKD, log_decay_TH, beta_TH, chunks)
    out_THV = torch.empty_like(v_THV)
    final_SHDV = torch.empty(
        (len(chunks.first_chunk_S1) - 1, v_THV.shape[1], q_TKD.shape[2], v_THV.shape[2]),
        dtype=torch.float32,
        device=v_THV.device,
    )
    inputs = q_TKD, k_TKD, v_THV, log_decay_TH, beta_TH
    if cu_seqlens_S1 is None:
        outputs = out_THV, final_SHDV
        _run_recurrence(*inputs, matrices, initial_SHDV, chunks, outputs, for_backward=False)
    else:
        assert initial_SHDV is not None, "tokens without a state before them"
        slots_S = torch.arange(len(final_SHDV), device=v_THV.device)
        states = initial_SHDV, final_SHDV, slots_S
        out_THV = recurrent_gated_delta_rule(*inputs, *states, cu_seqlens_S1)
    return out_THV, final_SHDV, matrices


def gated_delta_rule_backward(
    q_TKD: Tensor,
    k_TKD: Tensor,
    v_THV: Tensor,
    log_decay_TH: Tensor,
    beta_TH: Tensor,
    initial_SHDV: Tensor | None,
    chunks: SequenceChunks,
    matrices: tuple[Tensor, Tensor],
    dout_THV: Tensor,
    dfinal_SHDV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of q, k, v, log decay, beta and the initial state."""
    (_, key_heads, head_dim), (_, heads, value_dim) = q_TKD.shape, v_THV.shape
    num_sequences, num_chunks = len(chunks.first_chunk_S1) - 1, len(chunks.start_C)
    states = q_TKD.new_empty(num_chunks, heads, head_dim, value_dim)
    dstates, updates_THV, dr_THV = (torch.empty_like(x) for x in (states, v_THV, v_THV))
    _run_recurrence(
        q_TKD, k_TKD, v_THV, log_decay_TH, beta_TH, matrices, initial_SHDV, chunks,
        (states, updates_THV), for_backward=True,
    )  # fmt: skip
    dinitial = None
    if initial_SHDV is not None:
        dinitial = initial_SHDV.new_empty(initial_SHDV.shape, dtype=torch.float32)
    sizes = {
        "key_heads": key_heads, "heads": heads, "head_dim": head_dim, "value_dim": value_dim,
        "length": CHUNK_LENGTH, "precision": _precision(q_TKD),
    }  # fmt: skip
    block_v = _value_block(num_sequences, heads, value_dim)
    _recurrence_backward_kernel[(value_dim // block_v, heads, num_sequences)](
        q_TKD, k_TKD, log_decay_TH, beta_TH, *matrices, dout_THV,
        dout_THV if dfinal_SHDV is None else dfinal_SHDV, *chunks, dstates, dr_THV,
        dout_THV if dinitial is None else dinitial, block_v=block_v,
        has_final=dfinal_SHDV is not None, has_initial=dinitial is not None, num_warps=4,
        num_stages=_num_stages(q_TKD.device), **sizes,
    )  # fmt: skip
    # A key head has one or several value heads, whose gradients are summed in fp32.
    dtype = q_TKD.dtype if heads == key_heads else torch.float32
    dq, dk = (x.new_empty(len(x), heads, head_dim, dtype=dtype) for x in (q_TKD, k_TKD))
    dv = torch.empty_like(v_THV)
    dlog_decay, dbeta = (torch.empty_like(x, dtype=torch.float32) for x in (log_decay_TH, beta_TH))
    _chunk_gradients_kernel[(num_chunks, heads)](
        q_TKD, k_TKD, v_THV, log_decay_TH, beta_TH, dout_THV, states, dstates, updates_THV, dr_THV,
        chunks.start_C, chunks.end_C, dq, dk, dv, dlog_decay, dbeta, block_v=min(64, value_dim),
        num_warps=8, num_stages=_num_stages(q_TKD.device), **sizes,
    )  # fmt: skip
    if heads != key_heads:
        dq, dk = (x.unflatten(1, (key_heads, -1)).sum(2).to(q_TKD.dtype) for x in (dq, dk))
    return dq, dk, dv, dlog_decay.to(log_decay_TH.dtype), dbeta.to(beta_TH.dtype), dinitial


@jit
def _conv_rows(
    x: Ptr, x_stride: tl.tensor, weight: Ptr, position: Ptr, t: tl.tensor, n: tl.tensor,
    num_tokens: tl.tensor, width: tl.constexpr, block_t: tl.constexpr, block_n: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Compute the convolution at tokens `t` of channels `n`, in fp32; zeros outside the batch."""
    is_token = (t >= 0) & (t < num_tokens)
    position_T = tl.load(position + t, mask=is_token, other=-1)
    y_TN = tl.zeros((block_t, block_n), tl.float32)
    for distance in tl.static_range(width):
        weight_N = tl.load(weight + n * width + (width - 1 - distance)).to(tl.float32)
        mask = (position_T >= distance)[:, None]
        rows = (t - distance).to(tl.int64)[:, None] * x_stride + n[None, :]
        y_TN += tl.load(x + rows, mask=mask, other=0.0).to(tl.float32) * weight_N[None, :]
    return y_TN


@jit
def _conv_state_rows(
    x: Ptr, x_stride: tl.tensor, weight: Ptr, states: Ptr, slots: Ptr, t: tl.tensor, n: tl.tensor,
    num_tokens: tl.tensor, channels: tl.tensor, width: tl.constexpr, block_t: tl.constexpr,
    block_n: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Compute `_conv_rows` for the next token of each sequence, and update the states."""
    mask = (t < num_tokens)[:, None]
    slot_T = tl.load(slots + t, mask=t < num_tokens, other=0).to(tl.int64)
    oldest = states + slot_T[:, None] * (width - 1) * channels + n[None, :]
    newest = x + t.to(tl.int64)[:, None] * x_stride + n[None, :]
    y_TN = tl.zeros((block_t, block_n), tl.float32)
    for distance in tl.static_range(width):
        weight_N = tl.load(weight + n * width + (width - 1 - distance)).to(tl.float32)
        rows = newest if distance == 0 else oldest + (width - 1 - distance) * channels
        y_TN += tl.load(rows, mask=mask, other=0.0).to(tl.float32) * weight_N[None, :]
    for w in tl.static_range(1, width):
        later = newest if w == width - 1 else oldest + w * channels
        tl.store(oldest + (w - 1) * channels, tl.load(later, mask=mask, other=0.0), mask=mask)
    return y_TN


@jit(do_not_specialize=["num_tokens"])
def _conv_kernel(
    x: Ptr, x_stride: int, first_channel: int, weight: Ptr, position: Ptr, states: Ptr, y: Ptr,
    num_tokens: int, channels: int, scale: float, eps: float, heads: tl.constexpr,
    width: tl.constexpr, is_normed: tl.constexpr, is_step: tl.constexpr, block_t: tl.constexpr,
    block_n: tl.constexpr,
) -> None:  # fmt: skip
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    n = first_channel + column
    if is_step:
        y_TN = _conv_state_rows(
            x, x_stride, weight, states, position, t, n, num_tokens, channels, width, block_t,
            block_n,
        )  # fmt: skip
    else:
        y_TN = _conv_rows(x, x_stride, weight, position, t, n, num_tokens, width, block_t, block_n)
    y_TN = y_TN * tl.sigmoid(y_TN)
    if is_normed:
        y_TN *= (scale / tl.sqrt(tl.sum(y_TN * y_TN, 1) + eps))[:, None]
    offsets = t.to(tl.int64)[:, None] * (heads * block_n) + column[None, :]
    tl.store(y + offsets, y_TN.to(y.dtype.element_ty), mask=(t < num_tokens)[:, None])


@jit(do_not_specialize=["num_tokens"])
def _conv_activation_backward_kernel(
    x: Ptr, x_stride: int, first_channel: int, weight: Ptr, position: Ptr, dy: Ptr, da: Ptr,
    num_tokens: int, channels: int, scale: float, eps: float, heads: tl.constexpr,
    width: tl.constexpr, is_normed: tl.constexpr, block_t: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of the convolution before SiLU and normalization."""
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    n = first_channel + column
    mask = (t < num_tokens)[:, None]
    a_TN = _conv_rows(x, x_stride, weight, position, t, n, num_tokens, width, block_t, block_n)
    sigmoid_TN = tl.sigmoid(a_TN)
    y_TN = a_TN * sigmoid_TN
    offsets = t.to(tl.int64)[:, None] * (heads * block_n) + column[None, :]
    dy_TN = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    if is_normed:
        rnorm_T = 1.0 / tl.sqrt(tl.sum(y_TN * y_TN, 1) + eps)
        dot_T = tl.sum(dy_TN * y_TN, 1) * rnorm_T * rnorm_T
        dy_TN = (dy_TN - y_TN * dot_T[:, None]) * (rnorm_T * scale)[:, None]
    da_TN = dy_TN * (sigmoid_TN + y_TN * (1.0 - sigmoid_TN))
    offsets = t.to(tl.int64)[:, None] * channels + n[None, :]
    tl.store(da + offsets, da_TN.to(da.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["num_tokens", "per_program"])
def _conv_backward_kernel(
    x: Ptr, x_stride: int, weight: Ptr, position: Ptr, da: Ptr, dx: Ptr, dweight: Ptr,
    num_tokens: int, per_program: int, channels: int, width: tl.constexpr, block_w: tl.constexpr,
    needs_weight_grad: tl.constexpr, block_t: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    w = tl.arange(0, block_w)
    dweight_NW = tl.zeros((block_n, block_w), tl.float32)
    first = tl.program_id(0) * per_program
    for begin in range(first, first + per_program, block_t):
        t = begin + tl.arange(0, block_t)
        position_T = tl.load(position + t, mask=t < num_tokens, other=-2 * width)
        dx_TN = tl.zeros((block_t, block_n), tl.float32)
        for distance in tl.static_range(width):
            # A later token of the sequence whose convolution contains token t.
            later = t + distance
            later_position_T = tl.load(position + later, mask=later < num_tokens, other=-1)
            is_same_T1 = (later_position_T == position_T + distance)[:, None]
            mask = is_same_T1 & (n < channels)[None, :]
            offsets = later.to(tl.int64)[:, None] * channels + n[None, :]
            da_TN = tl.load(da + offsets, mask=mask, other=0.0).to(tl.float32)
            weight_offsets = n * width + (width - 1 - distance)
            weight_N = tl.load(weight + weight_offsets, mask=n < channels, other=0.0)
            dx_TN += da_TN * weight_N.to(tl.float32)[None, :]
            if needs_weight_grad:
                rows = t.to(tl.int64)[:, None] * x_stride + n[None, :]
                x_TN = tl.load(x + rows, mask=mask, other=0.0).to(tl.float32)
                sum_N = tl.sum(da_TN * x_TN, 0)
                dweight_NW += tl.where((w == width - 1 - distance)[None, :], sum_N[:, None], 0.0)
        offsets = t.to(tl.int64)[:, None] * channels + n[None, :]
        mask = (t < num_tokens)[:, None] & (n < channels)[None, :]
        tl.store(dx + offsets, dx_TN.to(dx.dtype.element_ty), mask=mask)
    if needs_weight_grad:
        base = tl.program_id(0).to(tl.int64) * channels * width
        offsets = base + n[:, None] * width + w[None, :]
        mask = (n < channels)[:, None] & (w < width)[None, :]
        tl.store(dweight + offsets, dweight_NW, mask=mask)


ConvOutput = tuple[int, int, int, float | None]
"""First channel, number and dimension of the heads of queries, keys or values, and the norm of each
head after normalization; None without normalization."""


def causal_conv_silu(
    x_TN: Tensor, weight_NW: Tensor, position_T: Tensor, outputs: list[ConvOutput], eps: float,
    states_SWN: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Compute convolution and SiLU, and normalize queries and keys.

    Args:
        x_TN: Channels of the tokens; rows may be strided.
        weight_NW: Kernel of each channel; the last weight belongs to the token itself.
        position_T: Index of each token in its sequence, int32; with states, the row of its state.
        outputs: Heads to compute.
        eps: Added to the squared norm.
        states_SWN: Earlier inputs, updated in place; each token is the next one of a sequence.
    """
    num_tokens, is_step = len(x_TN), states_SWN is not None
    results = []
    for first_channel, heads, head_dim, norm_scale in outputs:
        results.append(x_TN.new_empty(num_tokens, heads, head_dim))
        block_t = STEP_ELEMENTS // head_dim if is_step else CONV_BLOCK
        _conv_kernel[(triton.cdiv(num_tokens, block_t), heads)](
            x_TN, x_TN.stride(0), first_channel, weight_NW, position_T,
            states_SWN if is_step else x_TN, results[-1], num_tokens, x_TN.shape[1],
            norm_scale or 1.0, eps, heads=heads, width=weight_NW.shape[1],
            is_normed=norm_scale is not None, is_step=is_step, block_t=block_t, block_n=head_dim,
            num_warps=1,
        )  # fmt: skip
    return results


def causal_conv_silu_backward(
    x_TN: Tensor, weight_NW: Tensor, position_T: Tensor, outputs: list[ConvOutput], eps: float,
    grads: list[Tensor], *, needs_weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of the channels and of the kernel."""
    (num_tokens, channels), width = x_TN.shape, weight_NW.shape[1]
    dx_TN = torch.empty_like(x_TN, memory_format=torch.contiguous_format)
    blocks = triton.cdiv(num_tokens, CONV_BACKWARD_BLOCK)
    blocks_per_program = triton.cdiv(blocks, MAX_PARTIAL_SUMS) if needs_weight_grad else 1
    programs = triton.cdiv(blocks, blocks_per_program)
    dweight = torch.empty(
        (programs if needs_weight_grad else 0, channels, width),
        dtype=torch.float32,
        device=x_TN.device,
    )
    da_TN = torch.empty_like(dx_TN, dtype=torch.float32)
    for (first_channel, heads, head_dim, norm_scale), dy in zip(outputs, grads, strict=True):
        _conv_activation_backward_kernel[(blocks, heads)](
            x_TN, x_TN.stride(0), first_channel, weight_NW, position_T, dy.contiguous(), da_TN,
            num_tokens, channels, norm_scale or 1.0, eps, heads=heads, width=width,
            is_normed=norm_scale is not None, block_t=CONV_BACKWARD_BLOCK, block_n=head_dim,
            num_warps=4,
        )  # fmt: skip
    block_n = min(128, triton.next_power_of_2(channels))
    _conv_backward_kernel[(programs, triton.cdiv(channels, block_n))](
        x_TN, x_TN.stride(0), weight_NW, position_T, da_TN, dx_TN, dweight, num_tokens,
        blocks_per_program * CONV_BACKWARD_BLOCK, channels, width=width,
        block_w=triton.next_power_of_2(width), needs_weight_grad=needs_weight_grad,
        block_t=CONV_BACKWARD_BLOCK, block_n=block_n, num_warps=4,
    )  # fmt: skip
    return dx_TN, sum_partials(dweight, weight_NW.dtype) if needs_weight_grad else None


@jit
def _conv_step_kernel(
    x: Ptr, weight: Ptr, states: Ptr, slots: Ptr, y: Ptr, x_stride: int, scale: float, eps: float,
    key_heads: tl.constexpr, heads: tl.constexpr, head_dim: tl.constexpr, value_dim: tl.constexpr,
    width: tl.constexpr, block_n: tl.constexpr, use_pdl: tl.constexpr,
) -> None:  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels: tl.constexpr = 2 * key_heads * head_dim + heads * value_dim
    is_key = head < 2 * key_heads
    first_value: tl.constexpr = 2 * key_heads * head_dim
    first = tl.where(is_key, head * head_dim, first_value + (head - 2 * key_heads) * value_dim)
    column = tl.arange(0, block_n)
    mask = column < tl.where(is_key, head_dim, value_dim)
    n = first + column
    state = states + tl.load(slots + row).to(tl.int64) * (width - 1) * channels + n
    y_N = tl.zeros((block_n,), tl.float32)
    for w in tl.static_range(width - 1):
        earlier_N = tl.load(state + w * channels, mask=mask, other=0.0)
        weight_N = tl.load(weight + n * width + w, mask=mask, other=0.0).to(tl.float32)
        y_N += earlier_N.to(tl.float32) * weight_N
    weight_N = tl.load(weight + n * width + width - 1, mask=mask, other=0.0).to(tl.float32)
    if use_pdl:
        wait_for_previous_kernel()
    x_N = tl.load(x + row * x_stride + n, mask=mask, other=0.0)
    y_N += x_N.to(tl.float32) * weight_N
    for w in tl.static_range(1, width - 1):
        earlier_N = tl.load(state + w * channels, mask=mask, other=0.0)
        tl.store(state + (w - 1) * channels, earlier_N, mask=mask)
    tl.store(state + (width - 2) * channels, x_N, mask=mask)
    y_N *= tl.sigmoid(y_N)
    norm = tl.sqrt(tl.sum(y_N * y_N, 0) + eps)
    y_N *= tl.where(is_key, tl.where(head < key_heads, scale, 1.0) / norm, 1.0)
    tl.store(y + row * channels + n, y_N, mask=mask)


@jit
def _delta_step_kernel(
    qkv: Ptr, a: Ptr, b: Ptr, a_log: Ptr, dt_bias: Ptr, z: Ptr, norm: Ptr, states: Ptr, slots: Ptr,
    y: Ptr, a_stride: int, b_stride: int, z_stride: int, eps: float, key_heads: tl.constexpr,
    heads: tl.constexpr, head_dim: tl.constexpr, value_dim: tl.constexpr, use_pdl: tl.constexpr,
) -> None:  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_head = head // (heads // key_heads)
    d, v = tl.arange(0, head_dim), tl.arange(0, value_dim)
    slot = tl.load(slots + row).to(tl.int64)
    state = states + (slot * heads + head) * head_dim * value_dim
    state_DV = tl.load(state + d[:, None] * value_dim + v[None, :])
    if use_pdl:
        # The state was written one decoding step before.
        wait_for_previous_kernel()
    own = qkv + row * (2 * key_heads * head_dim + heads * value_dim)
    q_D = tl.load(own + key_head * head_dim + d).to(tl.float32)
    k_D = tl.load(own + (key_heads + key_head) * head_dim + d).to(tl.float32)
    v_V = tl.load(own + 2 * key_heads * head_dim + head * value_dim + v).to(tl.float32)
    step = tl.load(a + row * a_stride + head).to(tl.float32)
    step += tl.load(dt_bias + head).to(tl.float32)
    step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(step)))
    decay = tl.exp(-tl.exp(tl.load(a_log + head).to(tl.float32)) * step)
    beta = tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))
    state_DV, o_V = _update_state(state_DV, q_D, k_D, v_V, decay, beta)
    tl.store(state + d[:, None] * value_dim + v[None, :], state_DV)
    o_V = o_V.to(y.dtype.element_ty).to(tl.float32)
    z_V = tl.load(z + row * z_stride + head * value_dim + v).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(o_V * o_V, 0) / value_dim + eps)
    o_V *= rstd * tl.load(norm + v).to(tl.float32) * (z_V * tl.sigmoid(z_V))
    tl.store(y + (row * heads + head) * value_dim + v, o_V)


def causal_conv_step(
    x_RN: Tensor, weight_NW: Tensor, states_SWN: Tensor, slots_R: Tensor, key_heads: int,
    heads: int, value_dim: int, eps: float,
) -> Tensor:  # fmt: skip
    """Compute convolution, SiLU and normalization of one token per sequence.

    Args:
        x_RN: Channels of the tokens; rows may be strided.
        states_SWN: Earlier inputs, updated in place.
    """
    (num_rows, channels), width = x_RN.shape, weight_NW.shape[1]
    head_dim = (channels - heads * value_dim) // (2 * key_heads)
    y_RN = x_RN.new_empty(num_rows, channels)
    use_pdl = supports_pdl(x_RN.device)
    _conv_step_kernel[(num_rows, 2 * key_heads + heads)](
        x_RN, weight_NW, states_SWN, slots_R, y_RN, x_RN.stride(0), head_dim**-0.5, eps,
        key_heads=key_heads, heads=heads, head_dim=head_dim, value_dim=value_dim, width=width,
        block_n=max(head_dim, value_dim), use_pdl=use_pdl, num_warps=1, launch_pdl=use_pdl,
    )  # fmt: skip
    return y_RN


def gated_delta_step(
    qkv_RN: Tensor, a_RH: Tensor, b_RH: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, z_RE: Tensor,
    norm_V: Tensor, states_SHDV: Tensor, slots_R: Tensor, key_heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """Compute the gated delta rule and the gated RMS norm of one token per sequence.

    Args:
        qkv_RN: Result of `causal_conv_step`.
        a_RH: Decay before softplus; rows may be strided, as those of `b_RH` and `z_RE`.
        b_RH: Step size before the sigmoid.
        z_RE: Gate of the norm.
        states_SHDV: States in fp32, updated in place.
    """
    _, heads, head_dim, value_dim = states_SHDV.shape
    y_RE = qkv_RN.new_empty(len(qkv_RN), heads * value_dim)
    use_pdl = supports_pdl(qkv_RN.device)
    _delta_step_kernel[(heads, len(qkv_RN))](
        qkv_RN, a_RH, b_RH, a_log_H, dt_bias_H, z_RE, norm_V, states_SHDV, slots_R, y_RE,
        a_RH.stride(0), b_RH.stride(0), z_RE.stride(0), eps, key_heads=key_heads, heads=heads,
        head_dim=head_dim, value_dim=value_dim, use_pdl=use_pdl, num_warps=4,
        launch_pdl=use_pdl,
    )  # fmt: skip
    return y_RE
