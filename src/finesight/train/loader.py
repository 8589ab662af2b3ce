"""From the samples of a step to its packs, in other processes and ahead of time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located
from finesight.data.sources import Corpus
from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, pack, plan_packs
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.train.course import Members
from finesight.train.workers import guarded, read_ahead

_ALIGNED = 64
"""Bytes between possible starts of a tensor in a parcel."""


class Dropped(NamedTuple):
    """A sample that is not learned from."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step reads: its packs are its micro-batches.

    `dropped` are the samples whose pictures could not be decoded. `members` are the indices into
    the corpus of each pack's samples.
    """

    number: int
    packs: tuple[PackedBatch, ...]
    dropped: tuple[Dropped, ...]
    members: tuple[tuple[int, ...], ...]

    @property
    def samples(self) -> int:
        return sum(len(batch.lengths) for batch in self.packs)

    @property
    def tokens(self) -> int:
        return sum(sum(batch.lengths) for batch in self.packs)

    @property
    def supervised(self) -> int:
        return sum(batch.supervised for batch in self.packs)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A step with all its numbers in one block of bytes.

    On its way from a worker every tensor costs an open file, and every pinned one a call of the
    driver: a parcel costs one of each, however many packs it holds.
    """

    step: Step
    forms: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    block_N: Tensor

    @classmethod
    def of(cls, step: Step) -> Parcel:
        """The step's tensors copied into a block; those of `step` are emptied."""
        tensors = [tensor for batch in step.packs for tensor in _tensors(batch)]
        block_N = torch.empty(sum(_room(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
        at = 0
        for tensor in tensors:
            block_N[at : at + tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
            at += _room(tensor.nbytes)
        empty = tuple(_with_tensors(batch, [torch.empty(0)] * 7) for batch in step.packs)
        forms = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        return cls(replace(step, packs=empty), forms, block_N)

    def pin_memory(self) -> Parcel:
        """The same parcel in page-locked memory; the loader calls this."""
        return replace(self, block_N=self.block_N.pin_memory())

    def open(self) -> Step:
        """The step, its tensors views into the block."""
        tensors, at = [], 0
        for dtype, shape in self.forms:
            size = dtype.itemsize * torch.Size(shape).numel()
            tensors.append(self.block_N[at : at + size].view(dtype).view(shape))
            at += _room(size)
        packs = [
            _with_tensors(b, tensors[7 * i : 7 * i + 7]) for i, b in enumerate(self.step.packs)
        ]
        return replace(self.step, packs=tuple(packs))


def _room(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _tensors(batch: PackedBatch) -> list[Tensor]:
    return [
        *(batch.ids_T, batch.positions_3T, batch.bounds_S1, batch.patches_ND),
        *(batch.visual_at_M, batch.predict_L, batch.target_L),
    ]


def _with_tensors(batch: PackedBatch, tensors: Sequence[Tensor]) -> PackedBatch:
    ids, positions, bounds, patches, visual, predict, target = tensors
    return replace(
        batch,
        ids_T=ids,
        positions_3T=positions,
        bounds_S1=bounds,
        patches_ND=patches,
        visual_at_M=visual,
        predict_L=predict,
        target_L=target,
    )


class StepData(Dataset[Parcel | UserError]):
    """Item k is step k: its samples encoded and packed within the token budget.

    A picture that turns out damaged when it is decoded drops its sample from the step, or is an
    error, by the recipe's `data.unusable`. Without `pictures` none is decoded, and packs hold
    neither patches nor grids: their features are known.
    """

    def __init__(
        self,
        corpus: Corpus,
        renderer: Renderer,
        members: Members,
        pack_tokens: int,
        unusable: Literal["drop", "refuse"],
        pictures: bool = True,
    ) -> None:
        self._corpus, self._renderer, self._members = corpus, renderer, members
        self._pack_tokens, self._unusable = pack_tokens, unusable
        self._pictures = pictures

    def without_pictures(self) -> StepData:
        """The same steps for a model that knows the features of all pictures."""
        return StepData(
            self._corpus, self._renderer, self._members, self._pack_tokens, self._unusable, False
        )

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, number: int) -> Parcel | UserError:
        return guarded(lambda: Parcel.of(self.step(number)))

    def step(self, number: int) -> Step:
        """The step with this number, counted from 0."""
        encoded: list[Encoded] = []
        indices: list[int] = []
        dropped: list[Dropped] = []
        for index in self._members.of(number):
            located = self._corpus[index]
            try:
                encoded.append(self._encode(located))
                indices.append(index)
            except DamagedPicture as error:
                if self._unusable == "refuse":
                    raise
                dropped.append(Dropped(located.sample.id, str(error).splitlines()[0]))
        plan = plan_packs([one.outline.tokens for one in encoded], self._pack_tokens)
        packs = [pack([encoded[i] for i in group]) for group in plan]
        if not self._pictures:
            packs = [replace(batch, grids=()) for batch in packs]
        members = tuple(tuple(indices[i] for i in group) for group in plan)
        return Step(number, tuple(packs), tuple(dropped), members)

    def _encode(self, located: Located) -> Encoded:
        if self._pictures:
            return self._renderer.encode(located)
        geometry = self._renderer.geometry
        nothing = np.empty((0, geometry.numbers), dtype=np.uint8)
        return Encoded(self._renderer.outline(located), nothing, geometry.temporal)


def read_steps(data: StepData, start: int, workers: int, pin: bool) -> Generator[Step, None, None]:
    """The steps from `start` on, the same ones for any number of workers. To be closed: that ends
    the workers."""
    parcels: Iterator[Parcel] = read_ahead(data, range(start, len(data)), workers, pin)
    return (parcel.open() for parcel in parcels)
