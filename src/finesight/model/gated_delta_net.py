"""Gated delta rule and causal convolution of packed sequences (Gated DeltaNet, Yang et al. 2024).

A layer of linear attention keeps one state matrix per head. For a token with query q, key k, value
v, log decay g and step size b:

    S <- exp(g) S;    S <- S + b k (v - S^T k)^T;    o = S^T q

`chunk_gated_delta_rule` computes all tokens of a packed batch in chunks, for training and prompts.
`recurrent_gated_delta_rule` computes one token per sequence, for decoding. The state and the
convolution start anew with each sequence.

Shapes: T tokens, S sequences, C chunks, L tokens of a chunk, H heads, D dimension of a query and a
key, V dimension of a value, N channels of the convolution, W width of its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LENGTH = 64
"""Tokens of a chunk. Within a chunk the tokens are computed in parallel."""


@dataclass(frozen=True)
class ChunkLayout:
    """Assignment of the tokens of a packed batch to chunks.

    Sequences are sorted by length, longest first, and chunks by their position in the sequence.
    The chunks of one position are therefore contiguous, and their sequences are the first ones.

    Attributes:
        token_indices_CL: Index of each token; `num_tokens` for padding.
        slots_T: Index of each token in the flattened chunks.
        order_S: Sequences, longest first.
        chunks_per_step: Number of sequences with at least 1, 2, ... chunks.
        num_tokens: Tokens of the packed batch.
    """

    token_indices_CL: Tensor
    slots_T: Tensor
    order_S: Tensor
    chunks_per_step: tuple[int, ...]
    num_tokens: int

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device, chunk_length: int = CHUNK_LENGTH
    ) -> ChunkLayout:
        """Lay out sequences of these lengths, each at least 1."""
        lengths_S = np.asarray(lengths, dtype=np.int64)
        starts_S = np.cumsum(lengths_S) - lengths_S
        num_chunks_S = -(-lengths_S // chunk_length)
        order_S = np.argsort(-num_chunks_S, kind="stable")
        num_tokens, num_steps = int(lengths_S.sum()), int(num_chunks_S.max())
        counts = tuple(int((num_chunks_S > step).sum()) for step in range(num_steps))
        sequence_C = np.concatenate([order_S[:count] for count in counts])
        step_C = np.repeat(np.arange(num_steps), counts)
        offsets_CL = step_C[:, None] * chunk_length + np.arange(chunk_length)
        is_token_CL = offsets_CL < lengths_S[sequence_C, None]
        indices_CL = np.where(is_token_CL, starts_S[sequence_C, None] + offsets_CL, num_tokens)
        slots_T = np.empty(num_tokens, dtype=np.int64)
        slots_T[indices_CL[is_token_CL]] = np.flatnonzero(is_token_CL)
        return cls(
            torch.from_numpy(indices_CL).to(device),
            torch.from_numpy(slots_T).to(device),
            torch.from_numpy(order_S).to(device),
            counts,
            num_tokens,
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
        v_THV: Values.
        log_decay_TH: Logarithm of the decay, at most 0.
        beta_TH: Step size, 0 to 1.
        layout: Assignment of the tokens to chunks.
        initial_state_SHDV: State before the first token of each sequence. None means zeros.

    Returns:
        Outputs [T, H, V] in the dtype of the values, and final states [S, H, D, V].
    """
    dtype = torch.promote_types(v_THV.dtype, torch.float32)
    q, k, v = (layout.split(x.to(dtype)) for x in (q_THD, k_THD, v_THV))
    g, beta = (layout.split(x.to(dtype)) for x in (log_decay_TH, beta_TH))
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
        num_sequences, (num_heads, head_dim) = len(layout.order_S), q_THD.shape[1:]
        state = v.new_zeros(num_sequences, num_heads, head_dim, v.shape[-1])
    else:
        state = initial_state_SHDV.to(dtype)[layout.order_S]
    outputs, finished, begin = [], [], 0
    for count in layout.chunks_per_step:
        # Sequences that end before this chunk are the last ones of the state.
        finished.append(state[count:])
        state, chunks = state[:count], slice(begin, begin + count)
        update = value_updates[chunks] - key_updates[chunks] @ state
        outputs.append(q_decayed[chunks] @ state + inner[chunks] @ update)
        state = state * chunk_decay[chunks] + k_to_end[chunks].mT @ update
        begin += count
    final = torch.cat([state, *reversed(finished)])[layout.inverse_order_S]
    return layout.join(torch.cat(outputs)).to(v_THV.dtype), final


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


def causal_conv1d(x_TN: Tensor, weight_NW: Tensor, position_in_sequence_T: Tensor) -> Tensor:
    """Apply a depthwise causal convolution to each sequence of a packed batch.

    Args:
        x_TN: Channels of the tokens.
        weight_NW: Kernel of each channel; the last weight belongs to the token itself.
        position_in_sequence_T: Index of each token in its sequence.
    """
    width = weight_NW.shape[1]
    y_TN = x_TN * weight_NW[:, -1]
    for distance in range(1, min(width, len(x_TN))):
        earlier_TN = F.pad(x_TN[:-distance], (0, 0, distance, 0))
        has_earlier_T1 = (position_in_sequence_T >= distance)[:, None]
        y_TN = y_TN + torch.where(has_earlier_T1, earlier_TN, 0) * weight_NW[:, -1 - distance]
    return y_TN
