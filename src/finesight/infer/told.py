"""What the host is told of tokens that the device makes, some time after they were launched.

Shapes: R rows, S rows of those that wanted more than the most probable token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finesight.infer.request import Token
from finesight.infer.sampler import Chosen


@dataclass(frozen=True, slots=True)
class Told:
    """Copies on the host, which are there some time later: ids, whether the logits were finite,
    and what was chosen, by row, with its place there."""

    ids_R: Tensor
    chosen: Mapping[int, tuple[Chosen, int]]
    finite_R: Tensor
    ready: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        ids_R: Tensor,
        chosen: Mapping[int, tuple[Chosen, int]],
        finite_R: Tensor,
    ) -> Told:
        """Copies that are made when the device has come so far."""
        kinds = {id(one): _on_host(one) for one, _ in chosen.values()}
        on_host = {row: (kinds[id(one)], place) for row, (one, place) in chosen.items()}
        if not ids_R.is_cuda:
            return cls(ids_R.clone(), on_host, finite_R.clone(), None)
        ids_R, finite_R = _copied(ids_R), _copied(finite_R)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return cls(ids_R, on_host, finite_R, ready)

    def tokens(self, logprobs: Sequence[int | None]) -> list[Token | None]:
        """Wait until it is there. The token of each row, with as many others as it asked for; None
        where the model's numbers have overflowed."""
        if self.ready is not None:
            self.ready.synchronize()
        ids: list[int] = self.ids_R.tolist()
        finite: list[bool] = self.finite_R.tolist()
        return [
            self._token(row, ids[row], wanted) if finite[row] else None
            for row, wanted in enumerate(logprobs)
        ]

    def _token(self, row: int, id_: int, logprobs: int | None) -> Token:
        if row not in self.chosen or logprobs is None:
            return Token(id_)
        chosen, place = self.chosen[row]
        assert chosen.logprobs_S is not None, "no log probabilities"
        assert chosen.top_ids_SN is not None, "no other tokens"
        assert chosen.top_logprobs_SN is not None, "no other tokens' log probabilities"
        ids = chosen.top_ids_SN[place, :logprobs].tolist()
        others = chosen.top_logprobs_SN[place, :logprobs].tolist()
        return Token(id_, float(chosen.logprobs_S[place]), tuple(zip(ids, others, strict=True)))


def _copied(x: Tensor) -> Tensor:
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def _on_host(chosen: Chosen) -> Chosen:
    if chosen.logprobs_S is None or not chosen.ids_S.is_cuda:
        return chosen
    tops = (chosen.top_ids_SN, chosen.top_logprobs_SN)
    return Chosen(
        chosen.ids_S, _copied(chosen.logprobs_S), *(None if x is None else _copied(x) for x in tops)
    )
