"""From the samples of a step to its packs, in other processes and ahead of time."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Literal, NamedTuple, Protocol, runtime_checkable
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from finesight.data.jsonl import Located
from finesight.data.lines import Unreadable
from finesight.data.sources import Corpus
from finesight.encode.encoded import Encoded, Outline
from finesight.encode.lengths import unfit
from finesight.encode.pack import PackedBatch, beginning_of, pack, plan_packs
from finesight.encode.rendering import Rendering
from finesight.encode.slice import Slice
from finesight.errors import UserError
from finesight.train.course import Members
from finesight.train.workers import WorkerDied, guarded, read_ahead
from finesight.vision.patches import common_shape

_ALIGNED = 64
"""Bytes between possible starts of a tensor in a parcel."""

Form = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""


@runtime_checkable
class Split(Members, Protocol):
    """Samples of which each process learns some, and some are learned by all together, each process
    a share of their tokens."""

    def within(self, pack_tokens: int) -> Split:
        """The same where packs have at most so many tokens."""
        ...

    def split(self, step: int) -> Sequence[int]:
        """Indices into the corpus of those that all learn, in the order in which all come to
        them."""
        ...

    def share(self, outline: Outline) -> Slice:
        """This process's share of one."""
        ...

    @property
    def most_alone(self) -> int | None:
        """Tokens of the longest sample that is not split; None where none is."""
        ...

    @property
    def counts(self) -> bool:
        """Whether this is the process that counts them."""
        ...


class Known(Protocol):
    """Pictures whose features are known; samples are named by their index in the corpus."""

    def check(self, sample: int, places: int) -> None:
        """Raises DamagedPicture for a sample of which a picture could not be looked at, or whose
        pictures no longer take as many places as they did."""
        ...

    def form(self, members: Sequence[int]) -> Form:
        """Of what travels with a pack of these samples."""
        ...

    def lay(self, members: Sequence[int], room: Tensor) -> None:
        """Write it there."""
        ...


class Dropped(NamedTuple):
    """A sample that is not learned from."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step reads: its packs are its micro-batches.

    `dropped` are the samples whose pictures could not be decoded. `members` are the indices into
    the corpus of each pack's samples. `known` is what travels with each pack whose pictures are
    known; without such, nothing.
    """

    number: int
    packs: tuple[PackedBatch, ...]
    dropped: tuple[Dropped, ...]
    members: tuple[tuple[int, ...], ...]
    known: tuple[Tensor, ...] = ()

    @property
    def samples(self) -> int:
        return sum(batch.samples for batch in self.packs)

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.packs)

    @property
    def supervised(self) -> int:
        return sum(batch.supervised for batch in self.packs)

    @property
    def shares(self) -> int:
        """Packs that all processes have to come to: the first ones."""
        return sum(batch.share is not None for batch in self.packs)

    @property
    def shared(self) -> int:
        """A number for which samples these are of; 0 of none."""
        names = [name for batch in self.packs[: self.shares] for name in batch.sample_ids]
        return crc32(json.dumps(names).encode()) if names else 0


Numbered = tuple[int, Encoded]
"""A sample and its index in the corpus."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors of these types and shapes one after the other in one piece of memory.

    On its way from a worker every piece costs an open file, and every pinned one a call of the
    driver, so tensors travel together.
    """

    forms: tuple[Form, ...]
    bytes_N: Tensor

    @classmethod
    def of(cls, *forms: Form) -> Block:
        """Room for such tensors. A worker's is memory that the training process reads, too, which
        spares a copy, as torch's own collate does."""
        size = sum(_room(dtype, shape) for dtype, shape in forms)
        if get_worker_info() is None:
            return cls(forms, torch.empty(size, dtype=torch.uint8))
        try:
            shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise WorkerDied(
                f"no shared memory for {size:,} bytes of a step: {str(error).splitlines()[0]}",
                where="train.workers",
                expected="room for two steps of each reading process in /dev/shm",
                remedy="set train.workers lower, or to 0, or give a container more (docker run"
                " --shm-size); then start again with --resume",
            ) from error
        return cls(forms, torch.empty(0, dtype=torch.uint8).set_(shared, 0, (size,), (1,)))

    def pin_memory(self) -> Block:
        """The same block in page-locked memory."""
        return replace(self, bytes_N=self.bytes_N.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """Views of the memory, in order."""
        at = 0
        for dtype, shape in self.forms:
            size = dtype.itemsize * math.prod(shape)
            yield self.bytes_N[at : at + size].view(dtype).view(shape)
            at += _room(dtype, shape)


def _room(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-dtype.itemsize * math.prod(shape) // _ALIGNED) * _ALIGNED


@dataclass(frozen=True, slots=True)
class Parcel:
    """A step on its way: the patches of all its packs and what is known of its pictures in one
    block, all other tensors in another, and none in the step. Fresh memory is what pictures cost
    most: they are laid there at once."""

    step: Step
    pictures: Block
    others: Block

    @classmethod
    def of(cls, step: Step, pictures: Block) -> Parcel:
        """The step's tensors that are not in `pictures` are copied."""
        tensors = [tensor for batch in step.packs for tensor in _others(batch)]
        block = Block.of(*((tensor.dtype, tuple(tensor.shape)) for tensor in tensors))
        for room, tensor in zip(block.tensors(), tensors, strict=True):
            room.copy_(tensor)
        nothing = torch.empty(0)
        empty = tuple(_with_tensors(batch, nothing, repeat(nothing)) for batch in step.packs)
        return cls(replace(step, packs=empty, known=()), pictures, block)

    def pin_memory(self) -> Parcel:
        """The same parcel in page-locked memory; the loader calls this."""
        return Parcel(self.step, self.pictures.pin_memory(), self.others.pin_memory())

    def open(self) -> Step:
        """The step, its tensors views into the blocks."""
        others, pictures = self.others.tensors(), self.pictures.tensors()
        packs = [_with_tensors(batch, next(pictures), others) for batch in self.step.packs]
        return replace(self.step, packs=tuple(packs), known=tuple(pictures))


def _others(batch: PackedBatch) -> tuple[Tensor, ...]:
    return (
        *(batch.ids_T, batch.positions_3T, batch.bounds_S1),
        *(batch.visual_at_M, batch.predict_L, batch.target_L),
        *batch.inputs.values(),
    )


def _with_tensors(batch: PackedBatch, patches_ND: Tensor, others: Iterator[Tensor]) -> PackedBatch:
    """`others` gives the tensors of `_others`, in order."""
    return replace(
        batch,
        patches_ND=patches_ND,
        ids_T=next(others),
        positions_3T=next(others),
        bounds_S1=next(others),
        visual_at_M=next(others),
        predict_L=next(others),
        target_L=next(others),
        inputs={name: next(others) for name in batch.inputs},
    )


@dataclass(frozen=True)
class StepData(Dataset[Parcel | UserError]):
    """Item k is step k: this process's shares of the samples that are split, and then those that it
    learns whole, encoded and packed within the token budget.

    A sample that turns out unusable when it is read, its picture damaged or, where not all samples
    were looked at beforehand, whatever is wrong with it, is dropped from the step, or is an error,
    by the recipe's `data.unusable`; so is one of more than `max_length` tokens, where that is
    given. Pictures that are `known` are not decoded, and packs hold neither patches nor grids.
    In `branched` steps, what all samples of a step begin with is laid once in each pack.
    """

    corpus: Corpus
    renderer: Rendering
    members: Members
    pack_tokens: int
    unusable: Literal["drop", "refuse"]
    known: Known | None = None
    max_length: int | None = None
    branched: bool = False

    def without_pictures(self, known: Known) -> StepData:
        """The same steps, with what is known of all pictures in their place."""
        return replace(self, known=known)

    def within(self, pack_tokens: int) -> StepData:
        """The same steps in packs of at most so many tokens."""
        members = self.members
        if isinstance(members, Split):
            members = members.within(pack_tokens)
        return replace(self, members=members, pack_tokens=pack_tokens)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, number: int) -> Parcel | UserError:
        return guarded(lambda: Parcel.of(*self.laid(number)))

    def know_order(self, number: int) -> None:
        """Find the order of samples around this step: workers that are forked off have it then."""
        if number < len(self):
            self.members.of(number)

    def step(self, number: int) -> Step:
        """The step with this number, counted from 0."""
        return self.laid(number)[0]

    def laid(self, number: int) -> tuple[Step, Block]:
        """The step, and the block that its packs' patches and what is known of them lie in."""
        split, shares, dropped = self._split(number)
        own, missing = self._read(self.members.of(number))
        # What a family's own processor made cannot be laid end to end.
        budget = 1 if any(one.inputs for _, one in own) else self.pack_tokens
        beginning = beginning_of([one.outline for _, one in own]) if self.branched else 0
        plan = plan_packs([one.outline.needed for _, one in own], budget, beginning)
        groups = [[one] for one in split] + [[own[i] for i in group] for group in plan]
        members = tuple(tuple(index for index, _ in group) for group in groups)
        forms: list[Form] = [
            (torch.uint8, common_shape([one.patches_ND for _, one in group])) for group in groups
        ]
        if self.known is not None:
            forms += map(self.known.form, members)
        block = Block.of(*forms)
        pictures = block.tensors()
        packs = [
            pack([one for _, one in group], next(pictures).numpy(), beginning) for group in groups
        ]
        packs[: len(shares)] = map(Slice.cut, shares, packs)
        known = tuple(pictures)
        if self.known is not None:
            packs = [replace(batch, grids=()) for batch in packs]
            for indices, room in zip(members, known, strict=True):
                self.known.lay(indices, room)
        return Step(number, tuple(packs), (*dropped, *missing), members, known), block

    def _split(self, number: int) -> tuple[list[Numbered], list[Slice], list[Dropped]]:
        """A step's long samples, each with the patches of this process's share alone, these shares,
        and those of them that are dropped, which one process tells of."""
        members = self.members
        if not isinstance(members, Split):
            return [], [], []
        found, dropped = self._read(members.split(number))
        shares = [members.share(one.outline) for _, one in found]
        own = [
            (index, replace(one, patches_ND=one.patches_ND[slice(*share.patches)]))
            for (index, one), share in zip(found, shares, strict=True)
        ]
        return own, shares, dropped if members.counts else []

    def _read(self, indices: Iterable[int]) -> tuple[list[Numbered], list[Dropped]]:
        """The samples with these indices, and those of them that are dropped."""
        found: list[Numbered] = []
        dropped: list[Dropped] = []
        for index in indices:
            name = self.corpus.where(index)
            try:
                located = self.corpus.checked(index)
                name = located.sample.id
                found.append((index, self._encode(index, located)))
            except Unreadable:
                raise
            except UserError as error:
                if self.unusable == "refuse":
                    raise
                dropped.append(Dropped(name, str(error).splitlines()[0]))
        return found, dropped

    def _encode(self, index: int, located: Located) -> Encoded:
        if self.known is None:
            encoded = self.renderer.encode(located)
            limit = self.max_length
            problem = None if limit is None else unfit(encoded.outline, limit)
            if problem is not None:
                raise problem
            return encoded
        unseen = self.renderer.unseen(located)
        self.known.check(index, sum(span.stop - span.start for span in unseen.outline.spans))
        return unseen


def read_steps(data: StepData, start: int, workers: int, pin: bool) -> Generator[Step, None, None]:
    """The steps from `start` on, the same ones for any number of workers. To be closed: that ends
    the workers."""
    if workers:
        data.know_order(start)
    parcels: Iterator[Parcel] = read_ahead(data, range(start, len(data)), workers, pin)
    return (parcel.open() for parcel in parcels)
