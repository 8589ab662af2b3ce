"""From chunks of pictures to their features, and to the place where a run keeps them.

Shapes: N patches, M places of the pictures of a chunk, A places of all pictures, K features of
each, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from finesight.data.headers import DamagedPicture
from finesight.encode.encoded import Outline
from finesight.encode.pack import evened
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.model.network import VisionLanguageModel
from finesight.train.feature_files import FeatureFiles, Stored
from finesight.train.feature_place import Place
from finesight.train.loader import Block
from finesight.train.prepare import Session, merge_filled
from finesight.train.seen import InMemory, OnDisk, Places, Seen
from finesight.train.shown import Chunk, Shown
from finesight.train.workers import guarded, read_ahead
from finesight.vision.patches import common_shape, end_to_end

WAITING = 8
"""Chunks that may wait to be written: bounds the memory of them."""

WRITERS = 2
"""Threads that write them."""


Damaged = Mapping[int, DamagedPicture]
"""What is wrong with pictures, by their numbers."""


class Look(NamedTuple):
    """Features of a chunk, zeros for pictures that are damaged."""

    chunk: Chunk
    features_MKD: Tensor
    damaged: Damaged


@dataclass(frozen=True, slots=True)
class Opened:
    """The patches of a chunk's pictures, without those that are `damaged`, by number."""

    chunk: Chunk
    patches: Block
    damaged: Damaged

    @property
    def whole(self) -> list[int]:
        """Numbers of the pictures that patches are of."""
        numbers = range(self.chunk.start, self.chunk.stop)
        return [number for number in numbers if number not in self.damaged]

    def pin_memory(self) -> Opened:
        """The same in page-locked memory; the loader calls this."""
        return replace(self, patches=self.patches.pin_memory())


class _Openings(Dataset[Opened | UserError]):
    """Item k is chunk k, its pictures decoded."""

    def __init__(
        self,
        shown: Shown,
        chunks: Sequence[Chunk],
        renderer: Rendering,
        unusable: Literal["drop", "refuse"],
    ) -> None:
        self._shown, self._chunks = shown, chunks
        self._renderer, self._unusable = renderer, unusable

    def __getitem__(self, number: int) -> Opened | UserError:
        return guarded(lambda: self._opened(self._chunks[number]))

    def _opened(self, chunk: Chunk) -> Opened:
        patches, damaged = [], {}
        for number in range(chunk.start, chunk.stop):
            try:
                patches.append(self._patches(number))
            except DamagedPicture as error:
                if self._unusable == "refuse":
                    raise
                damaged[number] = error
        if not patches:
            return Opened(
                chunk, Block(((torch.uint8, (0, 0)),), torch.empty(0, dtype=torch.uint8)), damaged
            )
        block = Block.of((torch.uint8, common_shape(patches)))
        end_to_end(patches, next(block.tensors()).numpy())
        return Opened(chunk, block, damaged)

    def _patches(self, number: int) -> NDArray[np.uint8]:
        # As a sample of this picture and no text.
        nothing_T = np.empty(0, dtype=np.int32)
        places = np.empty((3, 0), dtype=np.int32)
        span = self._shown.sights[number].span
        outline = Outline(span.files[0].name, nothing_T, nothing_T > 0, places, (span,))
        return self._renderer.with_patches(outline).patches_ND


def open_chunks(
    session: Session, shown: Shown, chunks: Sequence[Chunk]
) -> Generator[Opened, None, None]:
    """The chunks with their pictures decoded, in other processes and ahead of time. To be closed.

    Raises UserError for a damaged picture where the recipe refuses such.
    """
    source = _Openings(shown, chunks, session.renderer, session.recipe.data.unusable)
    workers, pin = session.machine.workers, session.machine.device.type == "cuda"
    opened: Iterator[Opened] = read_ahead(
        source, range(len(chunks)), min(workers, len(chunks)), pin
    )
    return (one for one in opened)


class Writer:
    """Writes chunks to disk beside what computes them. To be closed."""

    def __init__(self, files: FeatureFiles, failed: Callable[[UserError], None]) -> None:
        """What cannot be written is told to `failed`, once; no more is written then."""
        self._files, self._failed, self._works = files, failed, True
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[tuple[Chunk, Future[Stored]]] = deque()
        self._stored: dict[Chunk, Stored] = {}

    def write(self, chunk: Chunk, features_MKD: Tensor, name: str) -> None:
        """Have the features of a chunk, on the CPU, written under this name."""
        if self._works:
            self._waiting.append((chunk, self._pool.submit(self._files.write, name, features_MKD)))
        if len(self._waiting) > WAITING:
            self._settle()

    def finish(self) -> Mapping[Chunk, Stored]:
        """Wait for all that is being written: where it lies."""
        while self._waiting:
            self._settle()
        return self._stored

    def close(self) -> None:
        """End the threads; what waits is not written."""
        self._pool.shutdown(cancel_futures=True)

    def _settle(self) -> None:
        chunk, future = self._waiting.popleft()
        try:
            self._stored[chunk] = future.result()
        except UserError as error:
            if self._works:
                self._works = False
                self._failed(error)


class Gathering:
    """Brings the features of all chunks to the place where a run keeps them: from disk with `find`,
    from the tower with `see` and `keep`."""

    def __init__(self, session: Session, shown: Shown, place: Place) -> None:
        model, machine = session.model, session.machine
        assert isinstance(model, VisionLanguageModel), "a tower without native code"
        self._session, self._model, self._shown, self._place = session, model, shown, place
        self._bounds_P1 = shown.bounds_P1
        self._tail = model.visual.features, model.geometry.language.width
        self._damaged: dict[int, DamagedPicture] = {}
        self._found: dict[Chunk, Stored] = {}
        self._behind: tuple[Look, torch.cuda.Event | None] | None = None
        places = 0 if place == "disk" else int(self._bounds_P1[-1])
        device = machine.device if place == "gpu" else torch.device("cpu")
        self._features_AKD = torch.empty((places, *self._tail), dtype=machine.dtype, device=device)

    def find(self, files: FeatureFiles, chunk: Chunk) -> bool:
        """Whether the chunk was on disk, and whole."""
        there = self._place == "memory"
        form = (self._places(chunk), *self._tail)
        room = self._of(chunk) if there else torch.empty(form, dtype=self._features_AKD.dtype)
        stored = files.read(chunk.name, room)
        if stored is None:
            return False
        if self._place == "gpu":
            self._of(chunk).copy_(room)
        self._found[chunk] = stored
        return True

    @torch.no_grad()
    def see(self, opened: Opened) -> Look:
        """Compute the chunk's features."""
        return Look(opened.chunk, self._see(opened), opened.damaged)

    def room(self, chunk: Chunk) -> Look:
        """Of a chunk that another process looks at, for what that sees."""
        device, dtype = self._session.machine.device, self._features_AKD.dtype
        form = (self._places(chunk), *self._tail)
        return Look(chunk, torch.empty(form, dtype=dtype, device=device), {})

    def keep_all(self, looks: Iterable[Look], writer: Writer | None) -> None:
        """One after the other."""
        for look in looks:
            self.keep(look, writer)

    def keep(self, look: Look, writer: Writer | None) -> None:
        """Keep the features of the chunk before while the device works on this one's."""
        features_MKD = look.features_MKD
        self._damaged |= look.damaged
        event = None
        if self._place == "gpu":
            self._of(look.chunk).copy_(features_MKD)
        if features_MKD.is_cuda and (self._place != "gpu" or writer is not None):
            features_MKD = features_MKD.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.settle(writer)
        self._behind = look._replace(features_MKD=features_MKD), event

    def settle(self, writer: Writer | None) -> None:
        """Keep the features that were computed last."""
        if self._behind is None:
            return
        ((chunk, features_MKD, damaged), event), self._behind = self._behind, None
        if event is not None:
            event.synchronize()
        if self._place == "memory":
            features_MKD = self._of(chunk).copy_(features_MKD)
        # What lacks a picture is for this run alone: another one has to find the damage itself.
        name = chunk.name + "-damaged" * bool(damaged)
        if writer is not None and (not damaged or self._place == "disk"):
            writer.write(chunk, features_MKD, name)

    def seen(self, written: Mapping[Chunk, Stored]) -> Seen:
        """What is known of all pictures, once every chunk was found or looked at."""
        shown, device = self._without_damaged(), self._session.machine.device
        if self._place == "gpu":
            return Seen(Places(shown, self._bounds_P1), device, self._features_AKD)
        if self._place == "memory":
            return Seen(InMemory(shown, self._bounds_P1, self._features_AKD), device)
        stored = {**self._found, **written}
        chunks = sorted(stored, key=lambda chunk: chunk.start)
        firsts = np.array([chunk.start for chunk in chunks])
        files = [stored[chunk] for chunk in chunks]
        dtype = self._features_AKD.dtype
        return Seen(OnDisk(shown, self._bounds_P1, files, firsts, self._tail, dtype), device)

    def _without_damaged(self) -> Shown:
        """A sample is damaged by any of its pictures."""
        damaged = {
            sample: self._damaged[number]
            for sample, numbers in self._shown.of_sample.items()
            for number in numbers
            if number in self._damaged
        }
        return replace(self._shown, damaged={**self._shown.damaged, **damaged})

    def _see(self, opened: Opened) -> Tensor:
        """Features [M, K, D] on the device; zeros for pictures that are damaged."""
        session, sights, whole = self._session, self._shown.sights, opened.whole
        shape = (self._places(opened.chunk), *self._tail)
        device, dtype = session.machine.device, self._features_AKD.dtype
        if not whole:
            return torch.zeros(shape, dtype=dtype, device=device)
        (patches_ND,) = opened.patches.tensors()
        grids = tuple(sights[number].span.grid for number in whole)
        merge = merge_filled(self._model)
        if session.even and merge is not None:
            patches_ND, grids = evened(patches_ND, grids, merge)
        features_MKD = self._model.see(patches_ND.to(device, non_blocking=True), grids)
        if len(whole) == opened.chunk.stop - opened.chunk.start:
            return features_MKD[: shape[0]]
        some_MKD = torch.zeros(shape, dtype=dtype, device=device)
        counts = [sights[number].places for number in whole]
        first = self._bounds_P1[opened.chunk.start]
        # Without what fills them up.
        pieces = torch.split(features_MKD[: sum(counts)], counts)
        for number, piece in zip(whole, pieces, strict=True):
            start = int(self._bounds_P1[number] - first)
            some_MKD[start : start + len(piece)] = piece
        return some_MKD

    def _places(self, chunk: Chunk) -> int:
        return int(self._bounds_P1[chunk.stop] - self._bounds_P1[chunk.start])

    def _of(self, chunk: Chunk) -> Tensor:
        return self._features_AKD[self._bounds_P1[chunk.start] : self._bounds_P1[chunk.stop]]
