"""Packs that a run learns from by recordings (`train.recorded`): which they are, and what a
recording holds. Larger ones, and those that several kinds share, are not counted: they are made
only where half of a card is free."""

from __future__ import annotations

from dataclasses import dataclass

from finesight.model.network import VisionLanguageModel
from finesight.model.qwen2_5_vl import WindowedTower
from finesight.plan.kept import INDEX, Computing
from finesight.plan.load import Load
from finesight.train.held import Kind
from finesight.train.recorded import learns_little, pays
from finesight.train.sight import SightKind, sees, watches

BOUND = 4
"""Bytes of where a sequence begins."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Of packs of a kind: one of them filled up, with pictures where the tower is recorded, too,
    and the bytes of the tensors that it reads and leaves."""

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
    merge = tower.geometry.merge
    inside = watches(model) and sees(load.patches, recompute)
    numbers = load.numbers(tower.geometry)
    sight = SightKind.around(tower, load.grids, load.patches, numbers) if inside else None
    kind = Kind.around(
        load.lengths, load.beginning, load.patches // merge**2, load.supervised, sight
    )
    # Ids, three positions and places of tokens; tokens that predict, and what they predict.
    room = INDEX * (4 * kind.tokens + kind.places + 2 * kind.labels) + BOUND * (kind.sequences + 1)
    lengths = *load.lengths, kind.tokens - load.tokens
    if sight is None:
        features = kind.places * tower.features * tower.geometry.out_width * computing.number
        learned = any(parameter.requires_grad for parameter in tower.parameters())
        room += features * (2 if learned else 1)
        return Recording(kind, Load(lengths, (), kind.labels, load.beginning), room)
    # Bytes, and the row and column of each; squares in another order, and back.
    room += sight.patches * (sight.bytes + 2 * BOUND)
    room += 2 * INDEX * kind.places * isinstance(tower, WindowedTower)
    room += sum(BOUND * (count + 1) for count, _ in sight.ways)
    rest = sight.patches - load.patches
    grids = (*load.grids, (1, merge, rest // merge)) if rest else load.grids
    return Recording(kind, Load(lengths, grids, kind.labels, load.beginning), room)
