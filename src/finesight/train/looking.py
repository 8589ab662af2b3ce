"""Whether a run's pictures are looked at before its steps, and where their features are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finesight.data.headers import DamagedPicture
from finesight.errors import Interrupted, UserError
from finesight.memory import free_memory
from finesight.model.network import VisionLanguageModel
from finesight.train.budget import release, said
from finesight.train.feature_files import FeatureFiles, Stored, features_folder
from finesight.train.feature_place import (
    Free,
    Place,
    choose_place,
    feature_bytes,
    free_on_gpu,
)
from finesight.train.gathering import Gathering, Look, Opened, Writer, open_chunks
from finesight.train.prepare import Session
from finesight.train.progress import Screen
from finesight.train.seen import Seen
from finesight.train.shown import Chunk, Shown, shown_by
from finesight.train.stop import Stop
from finesight.train.tower import fingerprint

T = TypeVar("T")

READERS = 4
"""Threads that read features from disk."""

AT_ONCE = 64
"""Chunks that they read before a signal is heeded."""

_WORDS: dict[Place, str] = {"gpu": "on the GPU", "memory": "in memory", "disk": "on disk"}


ONCE = "each comes once in the run, and not all of their features are on disk"


@dataclass(frozen=True, slots=True)
class Looked:
    """What came of it: what is known of the pictures, or nothing, and for people why.

    `pictures` are those that are known, `found` of them from disk; their features take `size`
    bytes in `place`.
    """

    seen: Seen | None
    why: str
    place: Place | None = None
    pictures: int = 0
    found: int = 0
    size: int = 0

    def as_json(self) -> dict[str, Any]:
        """For a line of `metrics.jsonl`."""
        figures = {"place": self.place, "found": self.found, "bytes": self.size, "why": self.why}
        return {"pictures": self.pictures, "features": figures}


@contextmanager
def looked_at(session: Session, screen: Screen, stop: Stop) -> Iterator[Looked]:
    """Within the block, the pictures of all usable training samples are known, where looking at
    them beforehand pays: the tower is frozen, pictures come again, and their features have room.
    Of a run that goes on, where that was so when it began.

    Raises Interrupted when the run was asked to stop on the way, and UserError where
    `train.cache=disk` and the disk takes nothing.
    """
    with ExitStack() as stack:
        looking = _Looking(session, screen, stop)
        stack.callback(looking.close)
        try:
            looked = looking.look()
        except _InEveryStep as against:
            looked = _in_every_step(session, str(against))
            release(session.machine.device)
        if looked.place != "disk":
            # From here on other runs may remove the files.
            stack.close()
        yield looked


class _InEveryStep(Exception):
    """What looking beforehand has against it."""


def _in_every_step(session: Session, why: str) -> Looked:
    if session.progress.step and _began_so(session):
        why += "; they were known until here, so from here on the last bits may differ"
    return Looked(None, f"pictures are looked at in every step: {why}")


def _against(session: Session) -> str | None:
    """What recipe, model and data alone have against looking beforehand."""
    model = session.model
    if not session.train.survey.patches:
        return "there are none"
    if not isinstance(model, VisionLanguageModel):
        return f"{session.base.folder.family} is computed by transformers"
    if any(parameter.requires_grad for parameter in model.visual.parameters()):
        return "the vision part learns"
    if session.parallel.sharded:
        return f"the tower lies in parts (train.parallel={session.recipe.train.parallel})"
    if not session.train.survey.whole:
        return "there are too many samples to know all of their pictures"
    if session.recipe.train.cache == "never":
        return "train.cache=never"
    if session.progress.step and not _began_so(session):
        return "so the run began"
    if _once(session) and not features_folder().is_dir():
        return ONCE
    return None


def _began_so(session: Session) -> bool:
    """Whether the steps that the run has taken knew their pictures."""
    lines = [line for line in session.run.lines() if "pictures" in line]
    return bool(lines) and bool(lines[-1]["pictures"])


def _once(session: Session) -> bool:
    """Whether a run that begins shows its pictures no more often than once, in the mean."""
    survey, samples = session.train.survey, session.course.samples
    begins = not session.progress.step
    return begins and survey.pictures * samples <= survey.distinct * len(survey.kept)


class _Looking:
    """Looks at a run's pictures, shared out to all processes, each of which keeps what all have
    seen. `files` are None where features neither lie on disk nor may."""

    def __init__(self, session: Session, screen: Screen, stop: Stop) -> None:
        self._session, self._screen, self._stop = session, screen, stop
        self._ranks, self._setting = session.machine.ranks, session.recipe.train.cache
        self.files: FeatureFiles | None = None

    def close(self) -> None:
        """From here on other runs may remove the files."""
        if self.files is not None:
            self.files.close()

    def look(self) -> Looked:
        """Find on disk what lies there, look at the rest, and keep all of it where there is room.
        Raises _InEveryStep with what is against that."""
        once = self._together(self._begin)
        shown = self._together(self._shown)
        chunks = shown.chunks()
        self._ranks.same({"pictures": [chunk.name for chunk in chunks]})
        there = [chunk for chunk in chunks if self.files and self.files.has(chunk.name)]
        size = self._bytes(shown, chunks)
        missing = size - self._bytes(shown, there)
        free = self._free(chunks, missing)

        def begun() -> tuple[Place, Gathering, list[Chunk]]:
            if not chunks or (once and len(there) < len(chunks)):
                raise _InEveryStep(ONCE)
            place = choose_place(self._setting, size, missing, free)
            if place is None:
                raise _InEveryStep(self._too_much(size, free))
            gathering = Gathering(self._session, shown, place)
            return place, gathering, self._find(gathering, there)

        place, gathering, found = self._together(begun)
        left = self._left(chunks, found)
        stored = self._look_at(gathering, shown, left, missing <= free.disk)
        pictures, from_disk = len(shown.sights), shown.pictures(found)
        why = (
            f"{pictures} pictures are looked at once: their features ({_size(size)}) are"
            f" kept {_WORDS[place]}"
        )
        if self.files is not None and (stored or found):
            why += f"; {from_disk} of them lay in {self.files.home}"
        return Looked(gathering.seen(stored), why, place, pictures, from_disk, size)

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` gives, where it has come to its end in all processes. Raises in all of them
        alike, if one was asked to stop, or has something against looking."""
        found: list[T] = []
        against = ""
        with self._ranks.confirmed():
            try:
                found.append(work())
            except Interrupted:
                pass
            except _InEveryStep as error:
                against = str(error)
            except torch.OutOfMemoryError as error:
                against = f"the GPU's memory was full ({said(error)})"
        told = self._ranks.everybodys(json.dumps([self._stop.number, against]))
        signals, reasons = zip(*map(json.loads, told), strict=True)
        self._stop.heed(max(signals))
        # One that has come since is told at the next meeting.
        if max(signals):
            self._stop.check()
        for reason in filter(None, reasons):
            raise _InEveryStep(reason)
        return found[0]

    def _begin(self) -> bool:
        """Open the files. Whether pictures come no more often than once."""
        against = _against(self._session)
        if against is not None:
            raise _InEveryStep(against)
        self.files = None if self._setting == "memory" else self._opened()
        once = _once(self._session)
        if once and (self.files is None or self.files.is_empty):
            raise _InEveryStep(ONCE)
        return once

    def _opened(self) -> FeatureFiles | None:
        folder, model = self._session.base.folder, self._session.model
        assert isinstance(model, VisionLanguageModel), "a tower without native code"
        settings = {"config": folder.config, "preprocessor": folder.preprocessor}
        tower = fingerprint(model.visual, settings, self._session.machine.device)
        try:
            return FeatureFiles(features_folder(), tower, guards=self._ranks.local == 0)
        except UserError as error:
            self._not_kept(error)
            return None

    def _not_kept(self, error: UserError) -> None:
        """Go on without the disk, unless it is all that the recipe allows."""
        if self._setting == "disk":
            raise error
        self._screen.say(f"features of pictures are not kept on disk: {error.where}: {error.what}")

    def _shown(self) -> Shown:
        session, kept = self._session, self._session.train.survey.kept
        with self._screen.stage("reading pictures", len(kept)) as advance:

            def going_on(count: int) -> None:
                advance(count)
                self._stop.check()

            source = session.train.corpus, session.renderer, kept
            return shown_by(*source, session.machine.workers, going_on)

    def _bytes(self, shown: Shown, chunks: Sequence[Chunk]) -> int:
        model = self._session.model
        assert isinstance(model, VisionLanguageModel), "a tower without native code"
        return feature_bytes(shown.patches(chunks), model, self._session.machine.dtype)

    def _free(self, chunks: Sequence[Chunk], missing: int) -> Free:
        """Bytes that every process has for features: on its disk the `missing` ones if it can be,
        which one process of each machine sees to."""
        ranks, device = self._ranks, self._session.machine.device
        names = [chunk.name for chunk in chunks]

        def room() -> list[int]:
            if self.files is None:
                return [0]
            return [] if ranks.local else [self.files.make_room(names, missing)]

        disk, gpu = self._together(room), free_on_gpu(device)
        memory = free_memory() // ranks.beside
        told = ranks.everybodys(json.dumps([disk, memory, [] if gpu is None else [gpu]]))
        disks, memories, gpus = zip(*map(json.loads, told), strict=True)
        return Free(
            gpu=min(chain.from_iterable(gpus), default=None),
            memory=min(memories),
            disk=min(chain.from_iterable(disks)),
        )

    def _too_much(self, size: int, free: Free) -> str:
        gpu = "" if free.gpu is None else f", {_size(free.gpu)} on the GPU"
        return (
            f"their features take {_size(size)}, and free are {_size(free.memory)} in"
            f" memory{gpu}, {_size(free.disk)} on disk"
            f" (train.cache={self._setting})"
        )

    def _find(self, gathering: Gathering, there: Sequence[Chunk]) -> list[Chunk]:
        """Those of the chunks that are whole on disk."""
        files = self.files
        found: list[Chunk] = []
        if files is None:
            return found
        with (
            self._screen.stage("reading features", len(there)) as advance,
            ThreadPoolExecutor(READERS) as pool,
        ):
            for start in range(0, len(there), AT_ONCE):
                self._stop.check()
                some = there[start : start + AT_ONCE]
                wholes = pool.map(partial(gathering.find, files), some)
                found += [chunk for chunk, whole in zip(some, wholes, strict=True) if whole]
                advance(len(some))
        if len(found) < len(there):
            self._screen.say(
                f"{len(there) - len(found)} of {len(there)} files with features of pictures were"
                f" damaged and are made again, in {files.folder}"
            )
        return found

    def _left(self, chunks: Sequence[Chunk], found: Sequence[Chunk]) -> list[Chunk]:
        """Those that any process lacks."""
        lacking = sorted(chunk.start for chunk in {*chunks}.difference(found))
        told = self._ranks.everybodys(json.dumps(lacking))
        starts = {start for one in told for start in json.loads(one)}
        return [chunk for chunk in chunks if chunk.start in starts]

    def _look_at(
        self, gathering: Gathering, shown: Shown, chunks: Sequence[Chunk], writes: bool
    ) -> Mapping[Chunk, Stored]:
        """Look at the pictures of these chunks, each process at one of as many at a time; where
        those lie that are on disk now. One process of each machine writes."""
        ranks, wanted = self._ranks, writes and self._ranks.local == 0
        writer = Writer(self.files, self._not_kept) if self.files and wanted else None
        with (
            closing(open_chunks(self._session, shown, ranks.own(chunks))) as reading,
            self._screen.stage("looking at pictures", shown.pictures(chunks)) as advance,
            closing(writer) if writer is not None else nullcontext(),
        ):
            for start in range(0, len(chunks), ranks.count):
                some = chunks[start : start + ranks.count]
                looks = self._looks(gathering, reading, some)
                self._together(partial(gathering.keep_all, looks, writer))
                advance(sum(chunk.stop - chunk.start for chunk in some))

            def finished() -> Mapping[Chunk, Stored]:
                gathering.settle(writer)
                return {} if writer is None else writer.finish()

            return self._written(chunks, self._together(finished))

    def _looks(
        self, gathering: Gathering, reading: Iterator[Opened], chunks: Sequence[Chunk]
    ) -> Sequence[Look]:
        """What is seen of these chunks, by each process of its own."""
        ranks = self._ranks

        def seen() -> list[Look]:
            self._stop.check()
            return [
                gathering.see(next(reading)) if number == ranks.number else gathering.room(chunk)
                for number, chunk in enumerate(chunks)
            ]

        looks = self._together(seen)
        if ranks.alone:
            return looks
        own = looks[ranks.number].damaged if ranks.number < len(looks) else {}
        harm = [(n, e.what, e.where, e.expected, e.remedy) for n, e in own.items()]
        told = [json.loads(one) for one in ranks.everybodys(json.dumps(harm))]
        for number, look in enumerate(looks):
            dist.broadcast(look.features_MKD, src=number)
        damaged = [{n: _damaged(*said) for n, *said in one} for one in told]
        return [look._replace(damaged=found) for look, found in zip(looks, damaged, strict=False)]

    def _written(
        self, chunks: Sequence[Chunk], stored: Mapping[Chunk, Stored]
    ) -> Mapping[Chunk, Stored]:
        """Where chunks lie on this machine, from the process that has written them."""
        if self._ranks.alone:
            return stored
        own = [(chunk.start, str(lies.path), lies.start) for chunk, lies in stored.items()]
        told = self._ranks.everybodys(json.dumps(own))[self._ranks.number - self._ranks.local]
        by_start = {chunk.start: chunk for chunk in chunks}
        return {by_start[n]: Stored(Path(path), at) for n, path, at in json.loads(told)}


def _damaged(what: str, where: str, expected: str, remedy: str) -> DamagedPicture:
    return DamagedPicture(what, where=where, expected=expected, remedy=remedy)


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
