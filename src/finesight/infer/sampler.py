"""How next tokens are chosen where it is not simply the most probable one.

Shapes: S rows that need more than that, V vocabulary, W numbers of 32 bits that hold a bit for each
token, N other tokens told of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.infer.request import Constraint, Sampling
from finesight.model.runs import upload

_COLDEST = 1e-30
"""The lowest temperature that fp32 divides by."""


class Chooser:
    """What one answer's tokens are chosen by, and what that remembers from token to token."""

    def __init__(
        self,
        sampling: Sampling,
        logprobs: int | None,
        constraint: Constraint | None,
        prompt_ids: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int32]],
    ) -> None:
        self.sampling, self.logprobs, self.constraint = sampling, logprobs, constraint
        self._allowed: NDArray[np.int32] | None = None
        self._prompt_ids = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._seen_V: Tensor | None = None
        seed = sampling.seed
        bits = np.random.Philox() if seed is None else np.random.Philox(key=seed % 2**64)
        self._random = np.random.Generator(bits)

    @property
    def plain(self) -> bool:
        """Whether the most probable token is taken and nothing more is asked."""
        penalised = self.sampling.repetition_penalty != 1.0
        free = self.constraint is None and self.logprobs is None
        return self.sampling.greedy and free and not penalised

    def follow(self) -> None:
        """Ask the constraint what may come next, if there is one: what goes wrong with it is known
        before the next `choose`."""
        if self.constraint is not None:
            self._allowed = self.constraint.allow()

    def allowed(self) -> NDArray[np.int32]:
        """What the constraint allows next; asked anew for each token."""
        if self._allowed is None:
            self.follow()
        allowed, self._allowed = self._allowed, None
        assert allowed is not None, "a chooser without a constraint"
        return allowed

    def chance(self) -> float:
        """The next number of this answer's own, from 0 up to but not 1."""
        return float(self._random.random())

    def penalised(self, logits_V: Tensor) -> Tensor:
        """With tokens that the prompt or the answer holds less probable."""
        penalty = self.sampling.repetition_penalty
        if penalty == 1.0:
            return logits_V
        if self._seen_V is None:
            seen_V = torch.zeros(len(logits_V), dtype=torch.bool, device=logits_V.device)
            self._seen_V = seen_V.index_fill_(0, upload(self._prompt_ids, logits_V.device), True)
        lower_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        return torch.where(self._seen_V, lower_V, logits_V)

    def remember(self, id_1: Tensor) -> None:
        """The token that was chosen, still on the device."""
        if self._seen_V is not None:
            self._seen_V.index_fill_(0, id_1, True)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Ids [S]; where they were asked for, log probabilities [S], and those of the most probable
    tokens with their ids [S, N]."""

    ids_S: Tensor
    logprobs_S: Tensor | None
    top_ids_SN: Tensor | None
    top_logprobs_SN: Tensor | None


def choose(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Chosen:
    """The next token of each row by its own chooser: the others beside it change nothing."""
    raw_SV = logits_SV.float()
    changed_SV = _constrained(_penalised(raw_SV, choosers), choosers)
    ids_S = changed_SV.argmax(-1)
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.sampling.greedy]
    cut = [row for row in drawn if _cuts(choosers[row].sampling)]
    for rows, draw in ((cut, _draw_cut), (sorted({*drawn} - {*cut}), _draw_whole)):
        if rows:
            at = upload(np.array(rows), logits_SV.device)
            picked = draw(changed_SV.index_select(0, at), [choosers[row] for row in rows])
            ids_S = ids_S.index_copy(0, at, picked)
    for row, chooser in enumerate(choosers):
        chooser.remember(ids_S[row : row + 1])
    return _told(raw_SV, ids_S, choosers)


def _cuts(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0


def _penalised(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    if all(chooser.sampling.repetition_penalty == 1.0 for chooser in choosers):
        return logits_SV
    return torch.stack([c.penalised(row) for c, row in zip(choosers, logits_SV, strict=True)])


def _constrained(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    rows = [row for row, chooser in enumerate(choosers) if chooser.constraint is not None]
    if not rows:
        return logits_SV
    allowed = [c.allowed() for c in choosers if c.constraint is not None]
    bits_SW = upload(np.stack(allowed), logits_SV.device)
    at = upload(np.array(rows), logits_SV.device)
    places_32 = torch.arange(32, device=logits_SV.device, dtype=torch.int32)
    allowed_SV = (bits_SW.unsqueeze(-1) >> places_32 & 1).flatten(1).bool()
    vocabulary = logits_SV.shape[1]
    if allowed_SV.shape[1] < vocabulary:
        # A head may have more rows than the tokenizer has tokens: those never come.
        missing = vocabulary - allowed_SV.shape[1]
        allowed_SV = torch.nn.functional.pad(allowed_SV, (0, missing))
    chosen_SV = logits_SV.index_select(0, at)
    chosen_SV = chosen_SV.masked_fill(~allowed_SV[:, :vocabulary], -torch.inf)
    return logits_SV.index_copy(0, at, chosen_SV)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(np.array(values, dtype=np.float32), like.device).unsqueeze(1)


def _probabilities(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    # The largest logit is made 0, which no temperature makes infinite.
    below_SV = logits_SV - logits_SV.amax(-1, keepdim=True)
    temperatures = [max(c.sampling.temperature, _COLDEST) for c in choosers]
    return (below_SV / _column(temperatures, logits_SV)).softmax(-1)


def _pick(shares_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """The place of each row's own chance among its shares, which need not come to 1."""
    ends_SV = shares_SV.double().cumsum(-1)
    chances_S1 = _column([c.chance() for c in choosers], shares_SV).double()
    found_S = torch.searchsorted(ends_SV, chances_S1 * ends_SV[:, -1:], right=True).squeeze(1)
    # Where rounding leads beyond the last share: the last that is not 0.
    last_S = (shares_SV > 0).long().mul(torch.arange(shares_SV.shape[1], device=shares_SV.device))
    return torch.minimum(found_S, last_S.amax(-1))


def _draw_whole(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    return _pick(_probabilities(logits_SV, choosers), choosers)


def _draw_cut(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    shares_SV, ids_SV = _probabilities(logits_SV, choosers).sort(
        stable=True, dim=-1, descending=True
    )
    ranks_V = torch.arange(shares_SV.shape[1], device=shares_SV.device)
    ks_S1 = _column([c.sampling.top_k or shares_SV.shape[1] for c in choosers], shares_SV)
    ps_S1 = _column([c.sampling.top_p for c in choosers], shares_SV)
    shares_SV = shares_SV * (ranks_V < ks_S1)
    ends_SV = shares_SV.double().cumsum(-1)
    is_nucleus_SV = ends_SV - shares_SV < ps_S1 * ends_SV[:, -1:]
    places_S = _pick(shares_SV * (is_nucleus_SV | (ranks_V == 0)), choosers)
    ids_S: Tensor = ids_SV.gather(1, places_S.unsqueeze(1)).squeeze(1)
    return ids_S


def _told(raw_SV: Tensor, ids_S: Tensor, choosers: Sequence[Chooser]) -> Chosen:
    wanted = [chooser.logprobs for chooser in choosers if chooser.logprobs is not None]
    if not wanted:
        return Chosen(ids_S, None, None, None)
    logprobs_SV = raw_SV.log_softmax(-1)
    own_S = logprobs_SV.gather(1, ids_S.unsqueeze(1)).squeeze(1)
    top = logprobs_SV.topk(min(max(wanted), logprobs_SV.shape[1]), dim=-1)
    return Chosen(ids_S, own_S, top.indices, top.values)
