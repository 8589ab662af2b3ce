"""Packs that a run learns from by recordings (`train.recorded`): which they are, and what a
recording holds. Larger ones, recorded only where half of a card is free, are not counted."""

from __future__ import annotations

from dataclasses import dataclass

from finesight.model.network import VisionLanguageModel
from finesight.plan.kept import INDEX, Computing
from finesight.plan.load import Load
from finesight.train.recorded import Kind, learns_little, pays

BOUND = 4
"""Bytes of where a sequence begins."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Of packs of a kind: one of them filled up, whose pictures' features are known, and the bytes
    of the tensors that it reads and leaves."""

    kind: Kind
    load: Load
    room: int


def recording(
    model: VisionLanguageModel, computing: Computing, recompute: float, load: Load
) -> Recording | None:
    """That of a pack on a card that has the kernels for it; None for one that is launched."""
    tower = model.visual
    if not (computing.flash and learns_little(model)):
        return None
    if not pays(model, load.tokens, load.supervised, recompute):
        return None
    places = load.patches // tower.geometry.merge**2
    kind = Kind.around(load.lengths, places, load.supervised)
    # Ids, three positions and places of tokens; tokens that predict, and what they predict.
    room = INDEX * (4 * kind.tokens + kind.places + 2 * kind.labels) + BOUND * (kind.sequences + 1)
    features = kind.places * tower.features * tower.geometry.out_width * computing.number
    learned = any(parameter.requires_grad for parameter in tower.parameters())
    room += features * (2 if learned else 1)
    filling = kind.tokens - load.tokens
    return Recording(kind, Load((*load.lengths, filling), (), kind.labels), room)
