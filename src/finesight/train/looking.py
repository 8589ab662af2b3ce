"""Whether a run's pictures are looked at before its steps, and where their features are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finesight.errors import UserError
from finesight.model.network import VisionLanguageModel
from finesight.train.budget import release, said
from finesight.train.feature_files import FeatureFiles, Stored, features_folder
from finesight.train.feature_place import (
    Free,
    Place,
    choose_place,
    feature_bytes,
    free_memory,
    free_on_gpu,
)
from finesight.train.gathering import Gathering, Writer, open_chunks
from finesight.train.prepare import Session
from finesight.train.progress import Screen
from finesight.train.seen import Seen
from finesight.train.shown import Chunk, Shown, shown_by
from finesight.train.stop import Stop
from finesight.train.tower import fingerprint

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
    against = _against(session)
    if against is not None:
        yield _in_every_step(session, against)
        return
    with ExitStack() as stack:
        looking = _Looking(session, screen, stop)
        if looking.files is not None:
            stack.enter_context(closing(looking.files))
        try:
            looked = looking.look()
        except torch.OutOfMemoryError as error:
            looked = _in_every_step(session, f"the GPU's memory was full ({said(error)})")
            release(session.machine.device)
        if looked.place != "disk":
            # From here on other runs may remove the files.
            stack.close()
        yield looked


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
    """Looks at a run's pictures. `files` are None where features neither lie on disk nor may."""

    def __init__(self, session: Session, screen: Screen, stop: Stop) -> None:
        model = session.model
        assert isinstance(model, VisionLanguageModel), "a tower without native code"
        self._session, self._screen, self._stop, self._model = session, screen, stop, model
        self._setting = session.recipe.train.cache
        self.files = None if self._setting == "memory" else self._opened()

    def _opened(self) -> FeatureFiles | None:
        folder, device = self._session.base.folder, self._session.machine.device
        settings = {"config": folder.config, "preprocessor": folder.preprocessor}
        tower = fingerprint(self._model.visual, settings, device)
        try:
            return FeatureFiles(features_folder(), tower)
        except UserError as error:
            self._not_kept(error)
            return None

    def _not_kept(self, error: UserError) -> None:
        """Go on without the disk, unless it is all that the recipe allows."""
        if self._setting == "disk":
            raise error
        self._screen.say(f"features of pictures are not kept on disk: {error.where}: {error.what}")

    def look(self) -> Looked:
        """Find on disk what lies there, look at the rest, and keep all of it where there is room;
        or say what is against that."""
        once = _once(self._session)
        if once and (self.files is None or self.files.is_empty):
            return _in_every_step(self._session, ONCE)
        shown = self._shown()
        chunks = shown.chunks()
        there = [chunk for chunk in chunks if self.files and self.files.has(chunk.name)]
        if not chunks or (once and len(there) < len(chunks)):
            return _in_every_step(self._session, ONCE)
        size = self._bytes(shown, chunks)
        missing = size - self._bytes(shown, there)
        free = self._free(chunks, missing)
        place = choose_place(self._setting, size, missing, free)
        if place is None:
            return _in_every_step(self._session, self._too_much(size, free))
        gathering = Gathering(self._session, shown, place)
        found = self._find(gathering, there)
        left = sorted({*chunks}.difference(found), key=lambda chunk: chunk.start)
        stored = self._look_at(gathering, shown, left, missing <= free.disk)
        pictures, from_disk = len(shown.sights), shown.pictures(found)
        why = (
            f"{pictures} pictures are looked at once: their features ({_size(size)}) are"
            f" kept {_WORDS[place]}"
        )
        if self.files is not None and (stored or found):
            why += f"; {from_disk} of them lay in {self.files.home}"
        return Looked(gathering.seen(stored), why, place, pictures, from_disk, size)

    def _shown(self) -> Shown:
        session, kept = self._session, self._session.train.survey.kept
        with self._screen.stage("reading pictures", len(kept)) as advance:

            def going_on(count: int) -> None:
                advance(count)
                self._stop.check()

            source = session.train.corpus, session.renderer, kept
            return shown_by(*source, session.machine.workers, going_on)

    def _bytes(self, shown: Shown, chunks: Sequence[Chunk]) -> int:
        return feature_bytes(shown.patches(chunks), self._model, self._session.machine.dtype)

    def _free(self, chunks: Sequence[Chunk], missing: int) -> Free:
        names = [chunk.name for chunk in chunks]
        disk = 0 if self.files is None else self.files.make_room(names, missing)
        machine = self._session.machine
        return Free(free_on_gpu(machine.device), free_memory() // machine.ranks.beside, disk)

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

    def _look_at(
        self, gathering: Gathering, shown: Shown, chunks: Sequence[Chunk], writes: bool
    ) -> Mapping[Chunk, Stored]:
        """Look at the pictures of these chunks; where those lie that are on disk now."""
        writer = Writer(self.files, self._not_kept) if self.files and writes else None
        with (
            closing(open_chunks(self._session, shown, chunks)) as reading,
            self._screen.stage("looking at pictures", shown.pictures(chunks)) as advance,
            closing(writer) if writer is not None else nullcontext(),
        ):
            for opened in reading:
                self._stop.check()
                gathering.look(opened, writer)
                advance(opened.chunk.stop - opened.chunk.start)
            gathering.settle(writer)
            return {} if writer is None else writer.finish()


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
