"""Asynchronous device-to-host copies of sampled tokens.

Shapes: R batch rows, S sampled (not greedily decoded) rows, N listed log
probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finesight.infer.request import GeneratedToken
from finesight.infer.token_sampler import SampledTokens


@dataclass(frozen=True, slots=True)
class AsyncTokens:
    """Sampled tokens of a decoding step with a pending copy to pinned host memory.

    Attributes:
        ids_R: Token id of each batch row.
        sampled: Sampler output and the index within it, by batch row, without greedy rows.
        is_finite_R: Whether the logits of each row are finite.
        ready: CUDA event recorded after the copies; None on CPU.
    """

    ids_R: Tensor
    sampled: Mapping[int, tuple[SampledTokens, int]]
    is_finite_R: Tensor
    ready: torch.cuda.Event | None

    @classmethod
    def from_device(
        cls,
        ids_R: Tensor,
        sampled: Mapping[int, tuple[SampledTokens, int]],
        is_finite_R: Tensor,
    ) -> AsyncTokens:
        """Start to copy sampled tokens to pinned host memory on the current CUDA stream."""
        host_copies = {id(tokens): _copy_to_host(tokens) for tokens, _ in sampled.values()}
        on_host = {row: (host_copies[id(one)], index) for row, (one, index) in sampled.items()}
        if not ids_R.is_cuda:
            return cls(ids_R.clone(), on_host, is_finite_R.clone(), None)
        ids_R, is_finite_R = _copy_to_pinned(ids_R), _copy_to_pinned(is_finite_R)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return cls(ids_R, on_host, is_finite_R, ready)

    def wait_tokens(self, logprobs: Sequence[int | None]) -> list[GeneratedToken | None]:
        """Wait for the copies and return one token per batch row.

        Args:
            logprobs: Number of log probabilities that each row requested; None for no log
                probabilities.

        Returns:
            One token per row; None for a row with non-finite logits.
        """
        if self.ready is not None:
            self.ready.synchronize()
        ids: list[int] = self.ids_R.tolist()
        is_finite: list[bool] = self.is_finite_R.tolist()
        return [
            self._build_token(row, ids[row], num_logprobs) if is_finite[row] else None
            for row, num_logprobs in enumerate(logprobs)
        ]

    def _build_token(self, row: int, id_: int, logprobs: int | None) -> GeneratedToken:
        if row not in self.sampled or logprobs is None:
            return GeneratedToken(id_)
        sampled, index = self.sampled[row]
        assert sampled.logprobs_S is not None, "no log probabilities"
        assert sampled.top_ids_SN is not None, "no other tokens"
        assert sampled.top_logprobs_SN is not None, "no other tokens' log probabilities"
        ids = sampled.top_ids_SN[index, :logprobs].tolist()
        top_logprobs = sampled.top_logprobs_SN[index, :logprobs].tolist()
        return GeneratedToken(
            id_, float(sampled.logprobs_S[index]), tuple(zip(ids, top_logprobs, strict=True))
        )


def _copy_to_pinned(x: Tensor) -> Tensor:
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def _copy_to_host(sampled: SampledTokens) -> SampledTokens:
    if sampled.logprobs_S is None or not sampled.ids_S.is_cuda:
        return sampled
    tops = (sampled.top_ids_SN, sampled.top_logprobs_SN)
    return SampledTokens(
        sampled.ids_S,
        _copy_to_pinned(sampled.logprobs_S),
        *(None if x is None else _copy_to_pinned(x) for x in tops),
    )
