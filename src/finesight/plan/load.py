"""What the steps of a run have to carry: its samples' sizes, packed as the run will pack them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finesight.encode.encoded import Grid
from finesight.encode.pack import contexts, plan_packs, worth
from finesight.model.geometry import VisionGeometry
from finesight.train.course import Members
from finesight.train.survey import Glance

MOST_STEPS = 2000
"""Steps of a run that are looked at, evenly spread: others are like them."""


@dataclass(frozen=True, slots=True)
class Load:
    """One pack: tokens of each sequence, grids of its pictures, tokens that are predicted, and
    those that all samples begin with: the first sequence, where there are any (`encode.pack`)."""

    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    supervised: int
    beginning: int = 0

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    @property
    def samples(self) -> int:
        """In the pack."""
        return len(self.lengths) - (self.beginning > 0)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens that each sequence reads."""
        return contexts(self.lengths, self.beginning)

    @property
    def patches(self) -> int:
        """Of all pictures."""
        return sum(t * h * w for t, h, w in self.grids)

    def numbers(self, geometry: VisionGeometry) -> int:
        """Of a patch as a pack holds it: of one of its frames, where all of them are alike."""
        stills = all(frames == 1 for frames, _, _ in self.grids)
        return geometry.channels * geometry.patch**2 if stills else geometry.patch_numbers


def load_of(samples: Sequence[Glance], beginning: int = 0) -> Load:
    """These samples end to end, what several begin with once."""
    lengths = [sample.needed for sample in samples]
    beginning = beginning if len(samples) > 1 else 0
    if beginning:
        lengths = [beginning, *(length - beginning for length in lengths)]
    return Load(
        tuple(lengths),
        tuple(grid for sample in samples for grid in sample.grids),
        sum(sample.supervised for sample in samples),
        beginning,
    )


def packed(samples: Sequence[Glance], budget: int, beginning: int = 0) -> list[Load]:
    """A step's samples, which begin with so many tokens that all have, in packs of at most so many
    tokens."""
    lengths = [sample.needed for sample in samples]
    beginning = worth(beginning, lengths)
    groups = plan_packs(lengths, budget, beginning)
    return [load_of([samples[index] for index in group], beginning) for group in groups]


def steps_of(
    course: Members, glances: Mapping[int, Glance], most: int = MOST_STEPS
) -> Iterator[list[Glance]]:
    """The samples of the run's steps, or of `most` of them, the first and the last one too."""
    last = len(course) - 1
    number = min(most, len(course))
    for k in range(number):
        step = round(k * last / max(1, number - 1))
        seen = (glances[index] for index in course.of(step))
        yield [glance for glance in seen if glance.tokens]
