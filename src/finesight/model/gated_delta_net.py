"""Gated delta rule and causal convolution of packed sequences (Gated DeltaNet, Yang et al. 2024).

A layer of linear attention keeps one state matrix per head. For a token with query q, key k, value
v, log decay g and step size b:

    S <- exp(g) S;    S <- S + b k (v - S^T k)^T;    o = S^T q

`chunk_gated_delta_rule` computes all tokens of a packed batch in chunks, for training and prompts.
`recurrent_gated_delta_rule` computes one token per sequence, for decoding. The state and the
convolution start anew with each sequence. `forward_packed`, `forward_with_states`, `forward_step`
and `update_states` combine the convolution and the rule.

Shapes: T tokens, S sequences, C chunks, L tokens of a chunk, H heads, D dimension of a query and a
key, V dimension of a value, N channels of the convolution, W width of its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.config import LinearAttentionConfig
from finesight.model.fused_ops import apply, has_kernels, rms_norm
from finesight.model.kernels import gated_delta_net as kernels
from finesight.model.kernels import norm as norm_kernels
from finesight.model.kernels.gated_delta_net import CHUNK_LENGTH, ConvOutput, SequenceChunks
from finesight.model.kernels.runtime import get_device_capability

L2_NORM_EPS = 1e-6


class DeltaNetState(NamedTuple):
    """State of a linear attention layer after the tokens of each sequence.

    `conv_SWN` holds the last W - 1 inputs of the convolution, oldest first.
    """

    conv_SWN: Tensor
    delta_SHDV: Tensor


@dataclass(frozen=True)
class DeltaNetInputs:
    """Inputs of the convolution and the gated delta rule of one layer.

    Attributes:
        qkv_TN: Queries, keys and values before the convolution.
        log_decay_TH: Logarithm of the decay, in fp32.
        beta_TH: Step size, 0 to 1, in fp32.
    """

    config: LinearAttentionConfig
    qkv_TN: Tensor
    conv_weight_NW: Tensor
    log_decay_TH: Tensor
    beta_TH: Tensor

    def select(self, tokens: slice | Tensor) -> DeltaNetInputs:
        """Return the inputs of a range of tokens, or of tokens with these indices."""
        return DeltaNetInputs(
            self.config,
            self.qkv_TN[tokens],
            self.conv_weight_NW,
            self.log_decay_TH[tokens],
            self.beta_TH[tokens],
        )


@dataclass(frozen=True)
class ChunkLayout:
    """Sequences of a packed batch and their chunks.

    Attributes:
        lengths: Length of each sequence. In a CUDA graph these are upper bounds, which the kernels
            do not need exactly.
        cu_seqlens_S1: First token of each sequence, and the number of tokens.
        num_tokens: Tokens of the packed batch.
    """

    lengths: tuple[int, ...]
    cu_seqlens_S1: Tensor
    max_seqlen: int
    num_tokens: int

    @cached_property
    def lengths_S(self) -> Tensor:
        """Length of each sequence."""
        return self.cu_seqlens_S1.diff()

    @cached_property
    def sequence_T(self) -> Tensor:
        """Sequence of each token."""
        tokens_T = self._arange(self.num_tokens)
        return torch.searchsorted(self.cu_seqlens_S1[1:-1], tokens_T, right=True, out_int32=True)

    @cached_property
    def position_T(self) -> Tensor:
        """Index of each token in its sequence."""
        return self._arange(self.num_tokens) - self.cu_seqlens_S1[self.sequence_T]

    @cached_property
    def sequence_chunks(self) -> SequenceChunks:
        """Chunks in the order of the tokens, for the kernels. Unused chunks are empty."""
        cu_seqlens_S1 = self.cu_seqlens_S1
        num_chunks_S = (self.lengths_S + (CHUNK_LENGTH - 1)) // CHUNK_LENGTH
        first_chunk_S1 = F.pad(num_chunks_S.cumsum(0, dtype=torch.int32), (1, 0))
        # The number must be known without reading the device. Each sequence adds less than one
        # chunk of padding. The lengths of a CUDA graph are upper bounds, whose sum may be larger.
        chunks_of_lengths = sum(-(-length // CHUNK_LENGTH) for length in self.lengths)
        max_padding = (CHUNK_LENGTH - 1) * len(self.lengths)
        chunks_of_tokens = (self.num_tokens + max_padding) // CHUNK_LENGTH
        chunks_C = self._arange(min(chunks_of_lengths, chunks_of_tokens))
        sequence_C = torch.searchsorted(first_chunk_S1[1:-1], chunks_C, right=True, out_int32=True)
        index_C = chunks_C - first_chunk_S1[sequence_C]
        start_C = cu_seqlens_S1[sequence_C] + index_C * CHUNK_LENGTH
        end_C = torch.minimum(start_C + CHUNK_LENGTH, cu_seqlens_S1[sequence_C + 1])
        return SequenceChunks(first_chunk_S1, start_C, end_C)

    @cached_property
    def padded_chunks(self) -> PaddedChunks:
        """Chunks for the PyTorch implementation."""
        return PaddedChunks.from_lengths(self.lengths, self.cu_seqlens_S1.device)

    def _arange(self, size: int) -> Tensor:
        return torch.arange(size, device=self.cu_seqlens_S1.device, dtype=torch.int32)

    def prepend_states(self, x_TN: Tensor, state_SWN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Insert the state rows before each sequence.

        Returns:
            The rows, the position of each in its sequence, and the row of each token.
        """
        num_rows = state_SWN.shape[1]
        rows_T = self._arange(self.num_tokens) + (self.sequence_T + 1) * num_rows
        extended_RN = x_TN.new_empty(self.num_tokens + state_SWN[..., 0].numel(), x_TN.shape[1])
        starts_S1 = self._arange(len(state_SWN) + 1)[1:, None] * num_rows
        starts_S1 = starts_S1 + self.cu_seqlens_S1[:-1, None]
        state_rows_SW = starts_S1 + self._arange(num_rows) - num_rows
        index = torch.cat([rows_T, state_rows_SW.flatten()])
        values = torch.cat([x_TN, state_SWN.flatten(0, 1).to(x_TN.dtype)])
        position_R = torch.empty_like(index)
        states = self._arange(num_rows).repeat(len(state_SWN))
        position_R[index] = torch.cat([self.position_T + num_rows, states])
        return extended_RN.index_copy(0, index.long(), values), position_R, rows_T

    def last_rows(self, x_TN: Tensor, count: int, state_SWN: Tensor | None) -> Tensor:
        """Return the last `count` rows of each sequence, preceded by its state or zeros."""
        position_SW = self.lengths_S[:, None] + self._arange(count) - count
        is_token_SW1 = (position_SW >= 0)[..., None]
        last_SWN = x_TN[(self.cu_seqlens_S1[:-1, None] + position_SW).clamp_min(0)]
        if state_SWN is None:
            return torch.where(is_token_SW1, last_SWN, 0)
        earlier_SW1 = (position_SW + count).clamp_max(count - 1)[..., None].long()
        return torch.where(is_token_SW1, last_SWN, state_SWN.take_along_dim(earlier_SW1, 1))


@dataclass(frozen=True)
class PaddedChunks:
    """Assignment of the tokens of a packed batch to chunks of equal length, with padding.

    Sequences are sorted by length, longest first, and chunks by their position in the sequence.
    The chunks of one position are therefore contiguous, and their sequences are the first ones.

    Attributes:
        token_indices_CL: Index of each token; the number of tokens for padding.
        slots_T: Index of each token in the flattened chunks.
        order_S: Sequences, longest first.
        chunks_per_step: Number of sequences with at least 1, 2, ... chunks.
    """

    token_indices_CL: Tensor
    slots_T: Tensor
    order_S: Tensor
    chunks_per_step: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> PaddedChunks:
        """Lay out sequences of these lengths, each at least 1."""
        lengths_S = np.asarray(lengths, dtype=np.int64)
        starts_S = np.cumsum(lengths_S) - lengths_S
        num_chunks_S = -(-lengths_S // CHUNK_LENGTH)
        order_S = np.argsort(-num_chunks_S, kind="stable")
        num_tokens = int(lengths_S.sum())
        num_steps = int(num_chunks_S.max())
        counts = tuple(int((num_chunks_S > step).sum()) for step in range(num_steps))
        sequence_C = np.concatenate([order_S[:count] for count in counts])
        step_C = np.repeat(np.arange(num_steps), counts)
        offsets_CL = step_C[:, None] * CHUNK_LENGTH + np.arange(CHUNK_LENGTH)
        is_token_CL = offsets_CL < lengths_S[sequence_C, None]
        indices_CL = np.where(is_token_CL, starts_S[sequence_C, None] + offsets_CL, num_tokens)
        slots_T = np.empty(num_tokens, dtype=np.int64)
        slots_T[indices_CL[is_token_CL]] = np.flatnonzero(is_token_CL)
        return cls(
            torch.from_numpy(indices_CL).to(device),
            torch.from_numpy(slots_T).to(device),
            torch.from_numpy(order_S).to(device),
            counts,
        )

    @cached_property
    def inverse_order_S(self) -> Tensor:
        """Position of each sequence in `order_S`."""
        return torch.argsort(self.order_S)

    def split(self, x_T: Tensor) -> Tensor:
        """Gather [T, H, ...] to [C, H, L, ...], with zeros as padding."""
        padded = torch.cat([x_T, x_T.new_zeros(1, *x_T.shape[1:])])
        return padded[self.token_indices_CL].transpose(1, 2)

    def join(self, x_CHL: Tensor) -> Tensor:
        """Gather [C, H, L, ...] to [T, H, ...]."""
        return x_CHL.transpose(1, 2).flatten(0, 1)[self.slots_T]


def chunk_gated_delta_rule(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    log_decay_TH: Tensor,
    beta_TH: Tensor,
    layout: ChunkLayout,
    initial_state_SHDV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule for all sequences of a packed batch.

    The computation is in fp32, or in fp64 for fp64 inputs.

    Args:
        q_THD: Queries, normalized and scaled.
        k_THD: Keys, normalized.
        log_decay_TH: Logarithm of the decay, at most 0.
        beta_TH: Step size, 0 to 1.
        layout: Assignment of the tokens to chunks.
        initial_state_SHDV: State before the first token of each sequence. None means zeros.

    Returns:
        Outputs [T, H, V] in the dtype of the values, and final states [S, H, D, V].
    """
    dtype = torch.promote_types(v_THV.dtype, torch.float32)
    padded_chunks = layout.padded_chunks
    q, k, v = (padded_chunks.split(x.to(dtype)) for x in (q_THD, k_THD, v_THV))
    g = padded_chunks.split(log_decay_TH.to(dtype))
    beta = padded_chunks.split(beta_TH.to(dtype))
    decay_CHL = g.cumsum(-1)
    # Decay from token j to token i >= j of a chunk. The mask comes first: exp would overflow.
    difference = decay_CHL[..., :, None] - decay_CHL[..., None, :]
    is_later = torch.ones_like(difference, dtype=torch.bool).tril()
    decay_CHLL = difference.masked_fill(~is_later, -torch.inf).exp()

    # Updates of a chunk depend on earlier updates of it: solve (I + A) u = b v, A lower triangular.
    k_beta = k * beta[..., None]
    lower = (k_beta @ k.mT * decay_CHLL).tril(-1)
    from_start = decay_CHL.exp()[..., None]
    right = torch.cat([v * beta[..., None], k_beta * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(
        lower + torch.eye(lower.shape[-1], dtype=dtype, device=lower.device),
        right,
        upper=False,
        unitriangular=True,
    )
    value_updates, key_updates = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    inner = q @ k.mT * decay_CHLL
    q_decayed = q * from_start
    k_to_end = k * (decay_CHL[..., -1:] - decay_CHL).exp()[..., None]
    chunk_decay = decay_CHL[..., -1].exp()[..., None, None]

    if initial_state_SHDV is None:
        num_heads, head_dim = q_THD.shape[1:]
        state = v.new_zeros(len(layout.lengths), num_heads, head_dim, v.shape[-1])
    else:
        state = initial_state_SHDV.to(dtype)[padded_chunks.order_S]
    outputs = []
    finished = []
    begin = 0
    for count in padded_chunks.chunks_per_step:
        # Sequences that end before this chunk are the last ones of the state.
        finished.append(state[count:])
        state = state[:count]
        chunks = slice(begin, begin + count)
        update = value_updates[chunks] - key_updates[chunks] @ state
        outputs.append(q_decayed[chunks] @ state + inner[chunks] @ update)
        state = state * chunk_decay[chunks] + k_to_end[chunks].mT @ update
        begin += count
    final = torch.cat([state, *reversed(finished)])[padded_chunks.inverse_order_S]
    return padded_chunks.join(torch.cat(outputs)).to(v_THV.dtype), final


def recurrent_gated_delta_rule(
    q_SHD: Tensor,
    k_SHD: Tensor,
    v_SHV: Tensor,
    log_decay_SH: Tensor,
    beta_SH: Tensor,
    state_SHDV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute one token of each sequence from its state. Returns outputs [S, H, V] and new states.

    The arguments are those of `chunk_gated_delta_rule`.
    """
    dtype = state_SHDV.dtype
    q, k, v, beta = (x.to(dtype) for x in (q_SHD, k_SHD, v_SHV, beta_SH))
    decayed = state_SHDV * log_decay_SH.to(dtype).exp()[..., None, None]
    predicted = torch.einsum("shdv,shd->shv", decayed, k)
    update = (v - predicted) * beta[..., None]
    state = decayed + k[..., :, None] * update[..., None, :]
    return torch.einsum("shdv,shd->shv", state, q).to(v_SHV.dtype), state


def causal_conv1d(x_TN: Tensor, weight_NW: Tensor, position_T: Tensor) -> Tensor:
    """Apply a depthwise causal convolution to each sequence of a packed batch.

    The result is in fp32, or in fp64 for fp64 inputs.

    Args:
        x_TN: Channels of the tokens.
        weight_NW: Kernel of each channel; the last weight belongs to the token itself.
        position_T: Index of each token in its sequence.
    """
    dtype = torch.promote_types(x_TN.dtype, torch.float32)
    x_TN = x_TN.to(dtype)
    weight_NW = weight_NW.to(dtype)
    y_TN = x_TN * weight_NW[:, -1]
    for distance in range(1, weight_NW.shape[1]):
        earlier_TN = F.pad(x_TN[:-distance], (0, 0, min(distance, len(x_TN)), 0))
        earlier_TN = torch.where((position_T >= distance)[:, None], earlier_TN, 0)
        y_TN = y_TN + earlier_TN * weight_NW[:, -1 - distance]
    return y_TN


def forward_with_states(
    inputs: DeltaNetInputs, layout: ChunkLayout, state: DeltaNetState | None = None
) -> tuple[Tensor, DeltaNetState]:
    """Compute a linear attention layer for a packed batch, and the states of its sequences.

    Args:
        state: State before the first token of each sequence. None means zeros.

    Returns:
        Outputs [T, H, V], and the state after the last token of each sequence.
    """
    conv_SWN = delta_SHDV = None
    if state is not None:
        conv_SWN, delta_SHDV = state
    o_THV, final_SHDV = forward_packed(inputs, layout, conv_SWN, delta_SHDV)
    state_length = inputs.conv_weight_NW.shape[1] - 1
    last_SWN = layout.last_rows(inputs.qkv_TN, state_length, conv_SWN)
    return o_THV, DeltaNetState(last_SWN, final_SHDV)


def forward_packed(
    inputs: DeltaNetInputs,
    layout: ChunkLayout,
    conv_SWN: Tensor | None = None,
    delta_SHDV: Tensor | None = None,
    matches_decoding: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute a linear attention layer: outputs [T, H, V], and final states of the delta rule.

    With `matches_decoding`, kernels compute each bit of `update_states`; it requires states.
    """
    gates = inputs.log_decay_TH, inputs.beta_TH
    weight_NW = inputs.conv_weight_NW
    x_TN = inputs.qkv_TN
    position_T = layout.position_T
    rows_T = None
    if conv_SWN is not None:
        x_TN, position_T, rows_T = layout.prepend_states(x_TN, conv_SWN)
    uses_kernels = supports_kernels(inputs.config, x_TN)
    if uses_kernels:
        outputs = _get_conv_outputs(inputs.config)
        qkv = _CausalConvSilu.apply(  # type: ignore[no-untyped-call]
            x_TN, weight_NW, position_T, outputs
        )
    else:
        y_TN = F.silu(causal_conv1d(x_TN, weight_NW, position_T))
        qkv = _split_heads(y_TN.to(x_TN.dtype), inputs.config)
    q, k, v = qkv
    if rows_T is not None:  # drop the outputs of the state rows
        q, k, v = (x[rows_T] for x in qkv)
    if not uses_kernels:
        return chunk_gated_delta_rule(q, k, v, *gates, layout, delta_SHDV)
    cu_seqlens_S1 = layout.cu_seqlens_S1 if matches_decoding else None
    o_THV, final_SHDV = _GatedDeltaRule.apply(  # type: ignore[no-untyped-call]
        q, k, v, *gates, delta_SHDV, layout.sequence_chunks, cu_seqlens_S1
    )
    return o_THV, final_SHDV


def forward_step(inputs: DeltaNetInputs, state: DeltaNetState) -> tuple[Tensor, DeltaNetState]:
    """Compute one token of each sequence and its new state, for decoding."""
    dtype = torch.promote_types(inputs.qkv_TN.dtype, torch.float32)
    window_SWN = torch.cat([state.conv_SWN, inputs.qkv_TN[:, None]], dim=1)
    y_SN = (window_SWN.to(dtype) * inputs.conv_weight_NW.T.to(dtype)).sum(1)
    q, k, v = _split_heads(F.silu(y_SN).to(inputs.qkv_TN.dtype), inputs.config)
    o_SHV, delta_SHDV = recurrent_gated_delta_rule(
        q, k, v, inputs.log_decay_TH, inputs.beta_TH, state.delta_SHDV
    )
    return o_SHV, DeltaNetState(window_SWN[:, 1:], delta_SHDV)


def update_states(inputs: DeltaNetInputs, states: DeltaNetState, slots_S: Tensor) -> Tensor:
    """Compute one token of each sequence with the kernels and update its state.

    The state of a sequence is in the row of `states` that `slots_S` gives. The bits of the outputs
    do not depend on the other sequences.
    """
    x_SN = inputs.qkv_TN
    weight_NW = inputs.conv_weight_NW.contiguous()
    outputs = _get_conv_outputs(inputs.config)
    q, k, v = kernels.causal_conv_silu(
        x_SN, weight_NW, slots_S, outputs, L2_NORM_EPS, states.conv_SWN
    )
    gates = inputs.log_decay_TH.contiguous(), inputs.beta_TH.contiguous()
    delta_SHDV = states.delta_SHDV
    starts_S1 = torch.arange(len(x_SN) + 1, device=x_SN.device, dtype=torch.int32)
    return kernels.recurrent_gated_delta_rule(
        q, k, v, *gates, delta_SHDV, delta_SHDV, slots_S, starts_S1
    )


def _split_heads(qkv_TN: Tensor, config: LinearAttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Split the convolution output into normalized queries and keys, and values, per value head."""
    sizes = [config.key_size, config.key_size, config.value_size]
    q_TE, k_TE, v_TE = torch.split(qkv_TN, sizes, dim=-1)
    q_TKD = _l2_normalize(torch.unflatten(q_TE, -1, (config.num_key_heads, -1)))
    k_TKD = _l2_normalize(torch.unflatten(k_TE, -1, (config.num_key_heads, -1)))
    q_TKD = q_TKD * config.key_head_dim**-0.5
    repeats = config.num_value_heads // config.num_key_heads
    q_THD = q_TKD.repeat_interleave(repeats, dim=1)
    k_THD = k_TKD.repeat_interleave(repeats, dim=1)
    v_THV = torch.unflatten(v_TE, -1, (config.num_value_heads, -1))
    return q_THD, k_THD, v_THV


def _l2_normalize(x_THD: Tensor) -> Tensor:
    """Normalize each head to length 1, in fp32 at least."""
    wide_THD = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    return wide_THD * (wide_THD.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt()


def gated_rms_norm(x_THV: Tensor, z_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Compute RMS norm times weight times SiLU of the gate, in fp32 at least.

    The result has the dtype of the gate.
    """
    if has_kernels(z_THV) and _is_kernel_size(x_THV.shape[-1]):
        return apply(_GatedRmsNorm, x_THV.contiguous(), z_THV, weight_V, eps)
    dtype = torch.promote_types(z_THV.dtype, torch.float32)
    normed_THV = rms_norm(x_THV.to(dtype), weight_V.to(dtype), eps)
    return (normed_THV * F.silu(z_THV.to(dtype))).to(z_THV.dtype)


def _is_kernel_size(size: int) -> bool:
    """Return True for the head dimensions that the kernels support."""
    return size in (16, 32, 64, 128)


def supports_kernels(config: LinearAttentionConfig, x: Tensor) -> bool:
    """Return True if the kernels support a layer and the device and dtype of `x`.

    They need the shared memory of an NVIDIA GPU of compute capability 8.0 or higher.
    """
    is_supported = all(map(_is_kernel_size, (config.key_head_dim, config.value_head_dim)))
    return is_supported and has_kernels(x) and get_device_capability(x.device) >= (8, 0)


def _get_conv_outputs(config: LinearAttentionConfig) -> list[ConvOutput]:
    """Return queries, keys and values as heads of the convolution."""
    first_key = config.key_size
    first_value = 2 * config.key_size
    return [
        (0, config.num_key_heads, config.key_head_dim, config.key_head_dim**-0.5),
        (first_key, config.num_key_heads, config.key_head_dim, 1.0),
        (first_value, config.num_value_heads, config.value_head_dim, None),
    ]


class _CausalConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TN: Tensor, weight_NW: Tensor, position_T: Tensor, outputs: list[ConvOutput]
    ) -> tuple[Tensor, ...]:
        weight_NW = weight_NW.contiguous()
        ctx.save_for_backward(x_TN, weight_NW, position_T)
        ctx.outputs = outputs
        return tuple(kernels.causal_conv_silu(x_TN, weight_NW, position_T, outputs, L2_NORM_EPS))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TN, weight_NW, position_T = ctx.saved_tensors
        dx_TN, dweight_NW = kernels.causal_conv_silu_backward(
            x_TN,
            weight_NW,
            position_T,
            ctx.outputs,
            L2_NORM_EPS,
            list(grads),
            needs_weight_grad=ctx.needs_input_grad[1],
        )
        return dx_TN, dweight_NW, None, None


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TKD: Tensor,
        k_TKD: Tensor,
        v_THV: Tensor,
        log_decay_TH: Tensor,
        beta_TH: Tensor,
        initial_SHDV: Tensor | None,
        chunks: SequenceChunks,
        cu_seqlens_S1: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        gates = log_decay_TH.contiguous(), beta_TH.contiguous()
        o_THV, final_SHDV, matrices = kernels.gated_delta_rule(
            q_TKD, k_TKD, v_THV, *gates, initial_SHDV, chunks, cu_seqlens_S1
        )
        ctx.save_for_backward(q_TKD, k_TKD, v_THV, *gates, initial_SHDV, *matrices)
        ctx.chunks = chunks
        ctx.set_materialize_grads(False)
        return o_THV, final_SHDV

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout_THV: Tensor | None, dfinal_SHDV: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_TKD, k_TKD, v_THV, log_decay_TH, beta_TH, initial_SHDV, *matrices = ctx.saved_tensors
        inverse, product = matrices
        dout_THV = torch.zeros_like(v_THV) if dout_THV is None else dout_THV.contiguous()
        if dfinal_SHDV is not None:
            dfinal_SHDV = dfinal_SHDV.contiguous()
        grads = kernels.gated_delta_rule_backward(
            q_TKD,
            k_TKD,
            v_THV,
            log_decay_TH,
            beta_TH,
            initial_SHDV,
            ctx.chunks,
            (inverse, product),
            dout_THV,
            dfinal_SHDV,
        )
        return *grads, None, None


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THV: Tensor, z_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_THV, z_THV, weight_V)
        ctx.eps = eps
        return norm_kernels.gated_rms_norm(x_THV, z_THV, weight_V, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THV: Tensor) -> tuple[Tensor | None, ...]:
        x_THV, z_THV, weight_V = ctx.saved_tensors
        grads = norm_kernels.gated_rms_norm_backward(
            x_THV,
            z_THV,
            weight_V,
            ctx.eps,
            dy_THV.contiguous(),
            needs_weight_grad=ctx.needs_input_grad[2],
        )
        return *grads, None
