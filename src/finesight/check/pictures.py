"""Facts about the pictures of a data set: every file hashed once, every content decoded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finesight.check.alike import Lookalikes, same_picture, thumbnail
from finesight.check.processes import ahead
from finesight.data.headers import (
    SIDEWAYS,
    CutOff,
    DamagedPicture,
    Missing,
    TooLarge,
    open_header,
    orientation,
)
from finesight.data.inside import container, content_digest
from finesight.errors import UserError
from finesight.vision.picture import open_picture
from finesight.vision.resize import LARGEST_ASPECT

Item = TypeVar("Item")

AT_ONCE = 16
"""Files that a process takes at a time."""

COMPARED = 16
"""Pictures that one is compared with in detail, at most: the most alike."""

_LEAST = 64
"""Pixels of the shorter side that a thumbnail is made from, at least."""

MISSING = "picture-missing"
"""The fault of a picture without a file."""

_Identity = tuple[int, int, int, int, str]
"""What tells files apart unread: device, number, length, time of the last change, and the name of
what lies inside of one."""


_Hashing = tuple[list[tuple[int, str]], Future[list[bytes]]]
"""Files, by number and path, and the digests that are to come."""


@dataclass(frozen=True, slots=True)
class Content:
    """What one content shows, in however many files it lies.

    `size` is height and width after the EXIF turn `turn` (1 to 8, 1 is none). Where the picture
    cannot be used, `fault` is the fault's code and `problem` what is wrong with it.
    """

    size: tuple[int, int] = (0, 0)
    turn: int = 1
    thumbnail: bytes = b""
    fault: str | None = None
    problem: str = ""


_Decoding = tuple[list[int], Future[list[Content]]]
"""Contents, by number, and what is to be known of them."""


class Album:
    """The pictures of a check by their paths, looked at by the processes of `pool`.

    `contents` are numbered in the order in which they came up; `examples` has a path of each.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._files: dict[str, int] = {}
        self._by_identity: dict[_Identity, int] = {}
        self._content_of: list[int] = []
        self._by_digest: dict[bytes, int] = {}
        self._decoded = 0
        self.contents: list[Content] = []
        self.examples: list[str] = []

    def __len__(self) -> int:
        """How many paths were looked at."""
        return len(self._files)

    def number(self, path: str) -> int:
        """Which of `contents` lies at a path."""
        return self._content_of[self._files[path]]

    def __getitem__(self, path: str) -> Content:
        return self.contents[self.number(path)]

    def look(
        self, groups: Iterable[Item], paths: Callable[[Item], Iterable[str]]
    ) -> Iterator[Item]:
        """The groups in order, each as soon as all is known about the pictures at its `paths`."""
        named = ahead(groups, lambda group: self._hash(paths(group)), self._name)
        return ahead(named, lambda group: self._decode(), self._describe)

    def alike(self, some: Iterable[int], others: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Pairs of a content of `some` and one of `others` that show the same, saved anew."""
        sound = [number for number in others if self.contents[number].fault is None]
        contents = [self.contents[number] for number in sound]
        index = Lookalikes([c.thumbnail for c in contents], [c.size for c in contents])

        def pairs() -> Iterator[tuple[int, list[int]]]:
            for number in some:
                one = self.contents[number]
                near = [] if one.fault else index.of(one.thumbnail, one.size)
                found = [sound[place] for place in near if sound[place] != number][:COMPARED]
                if found:
                    yield number, found

        def compare(job: tuple[int, list[int]]) -> Future[list[bool]]:
            number, found = job
            return self._pool.submit(
                _same, self.examples[number], [self.examples[other] for other in found]
            )

        def chosen(job: tuple[int, list[int]], same: Future[list[bool]]) -> list[tuple[int, int]]:
            number, found = job
            return [(number, o) for o, yes in zip(found, same.result(), strict=True) if yes]

        for part in ahead(pairs(), compare, chosen, most=AT_ONCE):
            yield from part

    def _hash(self, paths: Iterable[str]) -> list[_Hashing]:
        """Have the files read that are not known, by their path or by another name of theirs."""
        unread: list[tuple[int, str]] = []
        for path in paths:
            if path in self._files:
                continue
            identity = _identity(path)
            file = None if identity is None else self._by_identity.get(identity)
            if file is None:
                file = len(self._content_of)
                self._content_of.append(-1)
                if identity is None:
                    self._content_of[file] = self._add(path, Content(fault=MISSING))
                else:
                    self._by_identity[identity] = file
                    unread.append((file, path))
            self._files[path] = file
        jobs = [unread[start : start + AT_ONCE] for start in range(0, len(unread), AT_ONCE)]
        return [(job, self._pool.submit(_digests, [path for _, path in job])) for job in jobs]

    def _name(self, group: Item, jobs: list[_Hashing]) -> Item:
        """Give every content that comes up for the first time a number."""
        for files, digests in jobs:
            for (file, path), digest in zip(files, digests.result(), strict=True):
                if digest not in self._by_digest:
                    self._by_digest[digest] = self._add(path, Content())
                self._content_of[file] = self._by_digest[digest]
        return group

    def _add(self, path: str, content: Content) -> int:
        self.contents.append(content)
        self.examples.append(path)
        return len(self.contents) - 1

    def _decode(self) -> list[_Decoding]:
        """Have all contents decoded that have a number and were not given out yet."""
        waiting = range(self._decoded, len(self.contents))
        self._decoded = len(self.contents)
        sound = [number for number in waiting if self.contents[number].fault is None]
        jobs = [sound[start : start + AT_ONCE] for start in range(0, len(sound), AT_ONCE)]
        return [(job, self._pool.submit(describe, [self.examples[n] for n in job])) for job in jobs]

    def _describe(self, group: Item, jobs: list[_Decoding]) -> Item:
        for numbers, looks in jobs:
            for number, content in zip(numbers, looks.result(), strict=True):
                self.contents[number] = content
        return group


def _identity(path: str) -> _Identity | None:
    """None where no file lies."""
    for file, within in ((path, ""), container(path)):
        try:
            found = os.stat(file)
        except (OSError, ValueError):  # a name that cannot be one: too long, or with a zero byte
            continue
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, within
    return None


def _digests(paths: Sequence[str]) -> list[bytes]:
    """SHA-256 of each file's bytes; of the path itself, where they cannot be read."""
    return [_digest(path) for path in paths]


def _digest(path: str) -> bytes:
    try:
        if os.path.isfile(path):  # a pipe would keep its reader waiting, a device never ends
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        if container(path)[1]:
            return bytes.fromhex(content_digest(Path(path)))
    except (OSError, ValueError, UserError):
        pass  # why it cannot be read is for whoever decodes it
    return hashlib.sha256(os.fsencode(path)).digest()


def describe(paths: Sequence[str]) -> list[Content]:
    """What the files show, each decoded from its first byte to its last."""
    return [_look(Path(path)) for path in paths]


def _look(path: Path) -> Content:
    try:
        shown = open_picture(path, at_least=_LEAST)
        with open_header(path) as image:
            width, height = image.size
            turn = orientation(image)
    except Missing:
        return Content(fault=MISSING)
    except CutOff as error:
        return Content(fault="picture-cut-off", problem=error.what)
    except TooLarge as error:
        return Content(fault="picture-too-large", problem=error.what)
    except DamagedPicture as error:
        return Content(fault="picture-damaged", problem=error.what)
    size = (width, height) if turn in SIDEWAYS else (height, width)
    if max(size) > LARGEST_ASPECT * min(size):
        problem = f"{size[1]} x {size[0]}, one side over {LARGEST_ASPECT} times the other"
        return Content(size, turn, fault="picture-too-large", problem=problem)
    return Content(size, turn, thumbnail(shown))


def _same(one: str, others: Sequence[str]) -> list[bool]:
    """Which of `others` show what `one` shows, saved anew."""
    return [same_picture(Path(one), Path(other)) for other in others]
