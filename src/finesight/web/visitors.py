"""Who talks on the page: each visitor's talk, and the files that belong to it."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from finesight.data.jsonl import write_samples
from finesight.errors import UserError
from finesight.infer.service import Service
from finesight.infer.talk import Talk
from finesight.vision.picture import open_picture
from finesight.web.disk_budget import DiskBudget, DiskFull
from finesight.web.limits import (
    QUESTION_CHARACTERS,
    QUESTION_PICTURES,
    TALK_PICTURES,
    VISITORS,
)
from finesight.web.words import ENGLISH, Words

SHOWN_SIDE = 1600
"""Pixels of the longer side of a picture as the page shows it, at most."""

SHOWN_BYTES = 4 << 20
"""Of the file of such a picture, at most."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture on the page: its size in pixels of the original, and its copy for browsers, upright
    and without what else its file held."""

    name: str
    number: int
    width: int
    height: int
    copy: Path


@dataclass(slots=True)
class Visitor:
    """A talk with its private folder; `token` is in the addresses of its pictures, and secret."""

    talk: Talk
    folder: Path
    budget: DiskBudget
    words: Words = ENGLISH
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    pictures: dict[Path, Shown] = field(default_factory=dict)
    _keeping: threading.Lock = field(default_factory=threading.Lock)

    def take(self, text: str, uploads: Sequence[Path]) -> list[Path]:
        """Copies of uploaded pictures, to ask about: their headers are read, then their pixels.

        Raises UserError for what is no picture, too large, too long or too many.
        """
        held = len(self.pictures) + len(uploads)
        if len(uploads) > QUESTION_PICTURES or held > TALK_PICTURES:
            told = self.words.too_many.format(len(uploads), QUESTION_PICTURES, TALK_PICTURES)
            raise UserError(told)
        if len(text) > QUESTION_CHARACTERS:
            raise UserError(self.words.too_long.format(len(text), QUESTION_CHARACTERS))
        size = sum(path.stat().st_size for path in uploads if path.exists())
        try:
            reservation = self.budget.reserve(size + SHOWN_BYTES * len(uploads))
        except DiskFull as error:
            raise UserError(self.words.disk_full) from error
        kept: list[Path] = []
        try:
            # One question at a time, or two pictures get one number.
            with reservation, self._keeping:
                for upload in uploads:
                    kept.append(self._keep(upload))
        except BaseException:
            self.forget(kept)
            raise
        return kept

    def forget(self, pictures: Sequence[Path]) -> None:
        """Remove pictures that no turn shows any more."""
        in_use = {path for turn in self.talk.turns for path in turn.pictures}
        for path in set(pictures) - in_use:
            self.pictures.pop(path).copy.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def export(self) -> IO[bytes]:
        """The talk and its pictures in a zip archive, as `finesight train` and `predict --data`
        read them once unpacked. The file has no name, so it is gone with its handle, read or not.
        Raises UserError where nothing has been said, or where there is no room for it."""
        names = {
            path: f"pictures/{shown.number}-{path.name.partition('-')[2]}"
            for path, shown in self.pictures.items()
        }
        samples = self.talk.samples(lambda path: names[path])
        if not samples:
            raise UserError(f"{len(self.talk.turns)} turns, none with an answer: nothing to export")
        lines = self.folder / "talk.jsonl"
        write_samples(lines, samples)
        try:
            size = sum(path.stat().st_size for path in (lines, *names))
            reservation = self.budget.reserve(size)
        except DiskFull as error:
            raise UserError(self.words.disk_full) from error
        with contextlib.ExitStack() as on_failure:
            on_failure.enter_context(reservation)
            archive = on_failure.enter_context(tempfile.TemporaryFile(dir=self.folder))
            with zipfile.ZipFile(archive, "w") as file:
                file.write(lines, "talk/talk.jsonl")
                for path, name in names.items():
                    file.write(path, f"talk/{name}")
            archive.seek(0)
            on_failure.pop_all()
        # A file without a name is in no folder where it would be counted.
        weakref.finalize(archive, reservation.release)
        return archive

    def _keep(self, upload: Path) -> Path:
        number = 1 + max((shown.number for shown in self.pictures.values()), default=0)
        picture = open_picture(upload)
        width, height = picture.size
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        copy = self.folder / f"shown-{number}.webp"
        picture.save(copy, format="WEBP", quality=90)
        kept = self.folder / f"{number}-{upload.name[-80:]}"
        shutil.copyfile(upload, kept)
        self.pictures[kept] = Shown(upload.name, number, width, height, copy)
        return kept


class Visitors:
    """All of them, by the name that the page gives its session; the quietest goes for a new one."""

    def __init__(self, service: Service, folder: Path, budget: DiskBudget) -> None:
        self.service, self._folder, self.budget = service, folder, budget
        self._known: dict[str, Visitor] = {}
        # Some of the page's events come in threads, also of one session.
        self._lock = threading.RLock()

    def of(self, session: str) -> Visitor:
        """The visitor of that session, a new one at first."""
        with self._lock:
            visitor = self._known.pop(session, None)
            if visitor is None:
                while len(self._known) >= VISITORS:
                    self.leave(next(iter(self._known)))
                folder = self._folder / secrets.token_hex(16)
                folder.mkdir()
                visitor = Visitor(Talk(self.service), folder, self.budget)
            self._known[session] = visitor
        return visitor

    def leave(self, session: str) -> None:
        """End the session: its answers stop, its files are removed."""
        with self._lock:
            visitor = self._known.pop(session, None)
        if visitor is not None:
            while visitor.talk.undo():
                pass
            shutil.rmtree(visitor.folder, ignore_errors=True)

    def all(self) -> list[Visitor]:
        """Everybody who is here, the quietest first."""
        with self._lock:
            return [*self._known.values()]

    def with_token(self, token: str) -> Visitor | None:
        """The one whose secret token that is."""
        given = token.encode()
        same = (v for v in self.all() if secrets.compare_digest(v.token.encode(), given))
        return next(same, None)
