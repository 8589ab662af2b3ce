"""Gradients that have come on the way back through a model, in bytes: what waits for the step grows
as what layers keep shrinks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from finesight.model.network import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Come:
    """When each layer of the decoder goes back, when each block of the tower does, when rows of the
    table of embeddings are summed up, last of all, and in the end."""

    at_layer: tuple[int, ...]
    at_block: tuple[int, ...]
    at_table: int
    at_end: int

    @classmethod
    def of(cls, model: VisionLanguageModel, summed: Collection[int]) -> Come:
        """Of what learns, but for the parameters of these ids: their gradients go into sums as soon
        as they come (`train.gradients`)."""

        def one(module: nn.Module) -> int:
            own = (p for p in module.parameters() if p.requires_grad and id(p) not in summed)
            return sum(p.nbytes for p in own)

        decoder, tower = model.model, model.visual
        ends = one(decoder.norm) + (0 if model.lm_head is None else one(model.lm_head))
        *at_layer, all_layers = _backwards(ends, map(one, decoder.layers))
        mergers = one(tower.merger) + one(tower.deepstack_merger_list)
        *at_block, _ = _backwards(all_layers + mergers, map(one, tower.blocks))
        at_table = all_layers + one(tower)
        at_end = at_table + one(decoder.embed_tokens)
        return cls(tuple(at_layer), tuple(at_block), at_table, at_end)


def _backwards(first: int, each: Iterable[int]) -> list[int]:
    """Sums of `first` and what comes after each; then that of all."""
    *sums, whole = accumulate(reversed([*each]), initial=first)
    return [*reversed(sums), whole]
