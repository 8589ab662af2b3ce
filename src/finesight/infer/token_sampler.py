"""Token sampling: temperature, top-k, top-p, repetition penalty and decoding constraints.

Shapes: R batch rows, S sampled (not greedily decoded) rows, V vocabulary, W 32-bit words of a token
bitmask, N listed log probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.batch import copy_to_device
from finesight.infer.request import GeneratedToken, GenerationRequest

_MIN_TEMPERATURE = 1e-30
"""Smallest temperature that does not overflow in fp32."""


class TokenSampler:
    """Sampling parameters and sampling state of one sequence."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.sampling_params = request.sampling_params
        self._bitmask: NDArray[np.int32] | None = None
        self._prompt_ids = np.unique(request.prompt.tokenized.ids_T).astype(np.int64)
        self.seen_V: Tensor | None = None
        seed = request.sampling_params.seed
        key = None if seed is None else seed % 2**64
        self.rng = np.random.Generator(np.random.Philox(key=key))

    @property
    def is_argmax_only(self) -> bool:
        """True for greedy decoding without penalty, constraint and log probabilities."""
        params = self.sampling_params
        is_unchanged = params.repetition_penalty == 1.0 and not params.banned_ids
        is_unconstrained = self.request.constraint is None and self.request.logprobs is None
        return params.is_greedy and is_unconstrained and is_unchanged

    def prepare_bitmask(self) -> None:
        """Compute the next bitmask, so that errors of the constraint occur before sampling."""
        if self.request.constraint is not None:
            self._bitmask = self.request.constraint.compute_bitmask()

    def pop_bitmask(self) -> NDArray[np.int32]:
        """Return and reset the bitmask of the next token; compute it if necessary."""
        if self._bitmask is None:
            self.prepare_bitmask()
        bitmask = self._bitmask
        self._bitmask = None
        assert bitmask is not None, "a sampler without a constraint"
        return bitmask

    def apply_repetition_penalty(self, logits_V: Tensor) -> Tensor:
        """Apply the repetition penalty to tokens that occur in the prompt or completion."""
        penalty = self.sampling_params.repetition_penalty
        if penalty == 1.0:
            return logits_V
        if self.seen_V is None:
            seen_V = torch.zeros(len(logits_V), dtype=torch.bool, device=logits_V.device)
            self.seen_V = seen_V.index_fill_(
                0, copy_to_device(self._prompt_ids, logits_V.device), True
            )
        penalized_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        return torch.where(self.seen_V, penalized_V, logits_V)


class SampledLogprobs(NamedTuple):
    """Log probabilities of sampled tokens [S], and the most probable tokens with theirs [S, N]."""

    logprobs_S: Tensor
    top_ids_SN: Tensor
    top_logprobs_SN: Tensor


def sample_tokens(
    logits_SV: Tensor, samplers: Sequence[TokenSampler]
) -> tuple[Tensor, SampledLogprobs | None]:
    """Sample the next token of each row.

    The result of a row is independent of the other rows.

    Returns:
        Sampled ids [S], and their log probabilities, or None if no row requested them.
    """
    raw_SV = logits_SV.float()
    processed_SV = _apply_penalties(raw_SV, samplers)
    processed_SV = _ban_ids(_apply_constraints(processed_SV, samplers), samplers)
    ids_S = processed_SV.argmax(-1)
    filtered_indices: list[int] = []
    unfiltered_indices: list[int] = []
    for index, sampler in enumerate(samplers):
        params = sampler.sampling_params
        if params.is_greedy:
            continue
        if params.top_k > 0 or params.top_p < 1.0:
            filtered_indices.append(index)
        else:
            unfiltered_indices.append(index)
    scaled_SV = raw_SV
    if filtered_indices or unfiltered_indices:
        scaled_SV = _scale(processed_SV, samplers)
    for indices, draw_ids in (
        (filtered_indices, _sample_filtered),
        (unfiltered_indices, _sample_inverse_cdf),
    ):
        if indices:
            indices_N = copy_to_device(np.array(indices), logits_SV.device)
            selected_NV = scaled_SV
            if len(indices) < len(samplers):
                selected_NV = scaled_SV.index_select(0, indices_N)
            drawn_N = draw_ids(selected_NV.softmax(-1), [samplers[index] for index in indices])
            ids_S = ids_S.index_copy(0, indices_N, drawn_N)
    for index, sampler in enumerate(samplers):
        # For the repetition penalty; the id remains on the device.
        if sampler.seen_V is not None:
            sampler.seen_V.index_fill_(0, ids_S[index : index + 1], True)
    requested = [sampler.request.logprobs for sampler in samplers]
    counts = [count for count in requested if count is not None]
    if not counts:
        return ids_S, None
    # The name is reused, which frees the raw logits before the log-softmax.
    raw_SV = _select_logits(raw_SV, scaled_SV, samplers)
    return ids_S, _compute_logprobs(raw_SV, ids_S, max(counts))


def _select_logits(raw_SV: Tensor, scaled_SV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Return the scaled logits of rows with processed log probabilities, and others unchanged."""
    is_processed = [sampler.request.processed_logprobs for sampler in samplers]
    if all(is_processed):
        return scaled_SV
    if not any(is_processed):
        return raw_SV
    is_processed_S1 = copy_to_device(np.array(is_processed), raw_SV.device)[:, None]
    return raw_SV.where(~is_processed_S1, scaled_SV)


def _compute_logprobs(logits_SV: Tensor, ids_S: Tensor, max_tops: int) -> SampledLogprobs:
    """Return the log probabilities of sampled tokens and of the most probable ones."""
    logprobs_SV = logits_SV.log_softmax(-1)
    sampled_logprobs_S = logprobs_SV.gather(1, ids_S.unsqueeze(1)).squeeze(1)
    top_logprobs_SN = logprobs_SV[:, :0]
    top_ids_SN = ids_S[:, None][:, :0]
    num_tops = min(max_tops, logprobs_SV.shape[1])
    if num_tops:
        top_logprobs_SN, top_ids_SN = logprobs_SV.topk(num_tops, dim=-1)
    return SampledLogprobs(sampled_logprobs_S, top_ids_SN, top_logprobs_SN)


def _apply_penalties(logits_SV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    if all(sampler.sampling_params.repetition_penalty == 1.0 for sampler in samplers):
        return logits_SV
    penalized = []
    for sampler, logits_V in zip(samplers, logits_SV, strict=True):
        penalized.append(sampler.apply_repetition_penalty(logits_V))
    return torch.stack(penalized)


def _apply_constraints(logits_SV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    constrained_rows: list[int] = []
    bitmasks: list[NDArray[np.int32]] = []
    for row, sampler in enumerate(samplers):
        if sampler.request.constraint is not None:
            constrained_rows.append(row)
            bitmasks.append(sampler.pop_bitmask())
    if not constrained_rows:
        return logits_SV
    bits_SW = copy_to_device(np.stack(bitmasks), logits_SV.device)
    rows_S = copy_to_device(np.array(constrained_rows), logits_SV.device)
    bit_positions_32 = torch.arange(32, device=logits_SV.device, dtype=torch.int32)
    allowed_SV = (bits_SW.unsqueeze(-1) >> bit_positions_32 & 1).flatten(1).bool()
    vocab_size = logits_SV.shape[1]
    if allowed_SV.shape[1] < vocab_size:
        # The LM head may be padded beyond the vocabulary; mask the padding.
        missing = vocab_size - allowed_SV.shape[1]
        allowed_SV = torch.nn.functional.pad(allowed_SV, (0, missing))
    constrained_SV = logits_SV.index_select(0, rows_S)
    constrained_SV = constrained_SV.masked_fill(~allowed_SV[:, :vocab_size], -torch.inf)
    return logits_SV.index_copy(0, rows_S, constrained_SV)


def _ban_ids(logits_SV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    pairs: list[tuple[int, int]] = []
    for row, sampler in enumerate(samplers):
        pairs += [(row, token) for token in sampler.sampling_params.banned_ids]
    if not pairs:
        return logits_SV
    rows_S, ids_S = copy_to_device(np.array(pairs).T.copy(), logits_SV.device)
    return logits_SV.index_put((rows_S, ids_S), logits_SV.new_full((), -torch.inf))


def _to_column(values: Sequence[float], reference: Tensor) -> Tensor:
    return copy_to_device(np.array(values, dtype=np.float32), reference.device).unsqueeze(1)


def _scale(logits_SV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Return the logits divided by the temperatures, with a maximum of 0."""
    # Shift the maximum to 0, so that no temperature overflows.
    shifted_SV = logits_SV - logits_SV.amax(-1, keepdim=True)
    temperatures = [max(c.sampling_params.temperature, _MIN_TEMPERATURE) for c in samplers]
    return shifted_SV / _to_column(temperatures, logits_SV)


def _sample_inverse_cdf(probs_SV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Sample from unnormalized probabilities by inverse transform sampling.

    Each row uses the random generator of its sequence.
    """
    cdf_SV = probs_SV.double().cumsum(-1)
    uniforms_S1 = _to_column([float(c.rng.random()) for c in samplers], probs_SV).double()
    # Below the total, the first larger sum belongs to a token with a probability.
    total_S1 = cdf_SV[:, -1:]
    targets_S1 = torch.minimum(
        uniforms_S1 * total_S1, total_S1.nextafter(torch.zeros_like(total_S1))
    )
    return torch.searchsorted(cdf_SV, targets_S1, right=True).squeeze(1)


def _sample_filtered(probs_SV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Sample from the tokens that top-k and top-p allow."""
    probs_SV, ids_SV = probs_SV.sort(stable=True, dim=-1, descending=True)
    ranks_V = torch.arange(probs_SV.shape[1], device=probs_SV.device)
    ks_S1 = _to_column([c.sampling_params.top_k or probs_SV.shape[1] for c in samplers], probs_SV)
    ps_S1 = _to_column([c.sampling_params.top_p for c in samplers], probs_SV)
    probs_SV = probs_SV * (ranks_V < ks_S1)
    cdf_SV = probs_SV.double().cumsum(-1)
    is_nucleus_SV = cdf_SV - probs_SV < ps_S1 * cdf_SV[:, -1:]
    sampled_S = _sample_inverse_cdf(probs_SV * (is_nucleus_SV | (ranks_V == 0)), samplers)
    ids_S: Tensor = ids_SV.gather(1, sampled_S.unsqueeze(1)).squeeze(1)
    return ids_S


@dataclass(frozen=True, slots=True)
class AsyncTokens:
    """Sampled tokens of a decoding step with a pending copy to pinned host memory.

    Attributes:
        logprobs: Log probabilities of the sampled rows, if one of them requested them.
        sampled_rows: Batch row of each sampled row; others are greedy.
        ready: CUDA event recorded after the copies; None on CPU.
    """

    ids_R: Tensor
    is_finite_R: Tensor
    logprobs: SampledLogprobs | None
    sampled_rows: Sequence[int]
    ready: torch.cuda.Event | None

    @classmethod
    def from_device(
        cls,
        ids_R: Tensor,
        is_finite_R: Tensor,
        logprobs: SampledLogprobs | None,
        sampled_rows: Sequence[int],
    ) -> AsyncTokens:
        """Start to copy sampled tokens to pinned host memory on the current CUDA stream."""
        if not ids_R.is_cuda:
            return cls(ids_R.clone(), is_finite_R.clone(), logprobs, sampled_rows, None)
        if logprobs is not None:
            logprobs = SampledLogprobs(*map(_copy_to_pinned, logprobs))
        ids_R = _copy_to_pinned(ids_R)
        is_finite_R = _copy_to_pinned(is_finite_R)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return cls(ids_R, is_finite_R, logprobs, sampled_rows, ready)

    def wait_tokens(self, num_logprobs: Sequence[int | None]) -> list[GeneratedToken | None]:
        """Wait for the copies and return one token per row; None for non-finite logits.

        `num_logprobs` is the number of log probabilities that each row requested; None for none.
        """
        if self.ready is not None:
            self.ready.synchronize()
        ids: list[int] = self.ids_R.tolist()
        is_finite: list[bool] = self.is_finite_R.tolist()
        tokens: list[GeneratedToken | None] = [
            GeneratedToken(id_) if flag else None for id_, flag in zip(ids, is_finite, strict=True)
        ]
        if self.logprobs is None:
            return tokens
        # One conversion of each tensor takes less time than one of each row.
        values = self.logprobs.logprobs_S.tolist()
        top_ids = self.logprobs.top_ids_SN.tolist()
        top_logprobs = self.logprobs.top_logprobs_SN.tolist()
        for index, row in enumerate(self.sampled_rows):
            count = num_logprobs[row]
            if is_finite[row] and count is not None:
                tops = zip(top_ids[index][:count], top_logprobs[index][:count], strict=True)
                tokens[row] = GeneratedToken(ids[row], values[index], tuple(tops))
        return tokens


def _copy_to_pinned(x: Tensor) -> Tensor:
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)
