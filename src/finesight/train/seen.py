"""Pictures that a frozen tower has looked at once: its features, kept for all epochs of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from finesight.encode.pack import PackedBatch
from finesight.model.network import VisionLanguageModel
from finesight.train.course import InOrder
from finesight.train.loader import StepData, read_steps
from finesight.train.prepare import Session
from finesight.train.progress import Screen
from finesight.train.stop import Stop

MOST_BYTES = 1 << 30
"""Features of more than this are not kept."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Features [M, K, D] of each sample's pictures, by the sample's index in the corpus; `pictures`
    counts them."""

    features: Mapping[int, Tensor]
    pictures: int

    def of(self, members: Sequence[int]) -> Tensor:
        """Those of a pack that holds these samples, end to end."""
        return torch.cat([self.features[index] for index in members])


def pays(session: Session, most_bytes: int = MOST_BYTES) -> bool:
    """Whether to look at all pictures beforehand: where nothing of the tower learns, pictures come
    more than once, and their features fit. On a CPU only: a GPU's memory is for the model.

    A function of recipe, data and model alone, so that a resumed run does the same.
    """
    model, survey = session.model, session.train.survey
    if not isinstance(model, VisionLanguageModel):
        return False
    tower, language = model.visual, model.geometry.language
    places = survey.patches // tower.geometry.merge**2
    return (
        session.machine.device.type == "cpu"
        and not any(parameter.requires_grad for parameter in tower.parameters())
        and session.course.samples > len(survey.kept)
        and 0
        < places * tower.features * language.width * session.machine.dtype.itemsize
        <= most_bytes
    )


@torch.no_grad()
def look(session: Session, screen: Screen, stop: Stop) -> Seen | None:
    """Features of all usable training samples, always in the same packs: a resumed run finds the
    same bits. None where a picture turns out damaged: steps know how to go on without it.

    Raises Interrupted when the run was asked to stop on the way.
    """
    kept, train = session.train.survey.kept, session.recipe.train
    members = InOrder(kept, train.batch)
    unusable = session.recipe.data.unusable
    data = StepData(session.train.corpus, session.renderer, members, train.pack_tokens, unusable)
    features: dict[int, Tensor] = {}
    pictures = 0
    reading = read_steps(data, 0, session.machine.workers, pin=False)
    with screen.stage("looking at pictures", len(kept)) as advance, closing(reading) as steps:
        for step in steps:
            stop.check()
            if step.dropped:
                return None
            for samples, batch in zip(step.members, step.packs, strict=True):
                features.update(zip(samples, _features(session, batch), strict=True))
                pictures += len(batch.grids)
            advance(step.samples)
    return Seen(features, pictures)


def _features(session: Session, packed: PackedBatch) -> Sequence[Tensor]:
    """Of each sample of the pack, [0, K, D] for one without pictures."""
    model = session.model
    assert isinstance(model, VisionLanguageModel), "looking did not pay"
    if not packed.grids:
        shape = (0, model.visual.features, model.geometry.language.width)
        return [torch.empty(shape, dtype=session.machine.dtype)] * len(packed.lengths)
    batch = session.placed(packed)
    ends = torch.searchsorted(batch.visual_at_M, batch.bounds_S1)
    counts: list[int] = ends.diff().tolist()
    features = torch.split(model.see(batch.patches_ND, batch.grids), counts)
    # Without what fills the pack up.
    return features[: len(packed.lengths)]
