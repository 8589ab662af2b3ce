"""Pages of the cache: which are free, and which hold what a later question begins with too.

A prompt's full pages are known by a digest of everything up to their end: tokens, positions, the
pixels of pictures, and who reads them (an adapter changes what is read). A page that is known stays
after its answer has ended, until its room is needed, and is not read again by a prompt that begins
alike: a picture asked about a second time costs nothing but the question.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finesight.encode.encoded import Encoded, Outline
from finesight.vision.patches import first_frame

Key = bytes
"""A digest of a prompt up to the end of a page."""


class Pages:
    """The pages 1, 2, ... of a cache, each held by answers, or known, or free; page 0 is nobody's:
    rows that no answer uses write there."""

    def __init__(self, number: int) -> None:
        assert number >= 2, f"{number} pages, and the first is nobody's"
        self.number = number
        self._free = list(range(number - 1, 0, -1))
        self._held: Counter[int] = Counter()
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Known pages that nobody holds, the longest unused first."""

    @property
    def free(self) -> int:
        """Pages that may be taken, known ones included."""
        return len(self._free) + len(self._idle)

    def known(self, keys: Iterable[Key]) -> list[int]:
        """The pages of the longest beginning that is known; they are held from now on."""
        found: list[int] = []
        for key in keys:
            if key not in self._page_of:
                break
            found.append(self._page_of[key])
        for page in found:
            self._idle.pop(page, None)
            self._held[page] += 1
        return found

    def take(self, number: int) -> list[int]:
        """So many pages to write to, of `free` ones; what is known of them is forgotten."""
        assert number <= self.free, f"{number} pages of {self.free} free ones"
        taken = []
        for _ in range(number):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._held[page] = 1
            taken.append(page)
        return taken

    def know(self, keys: Sequence[Key], pages: Sequence[int]) -> None:
        """These pages hold what the keys say; where another page holds it too, that one stays."""
        for key, page in zip(keys, pages, strict=True):
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key], self._key_of[page] = page, key

    def give_back(self, pages: Iterable[int]) -> None:
        """An answer holds these no longer."""
        # The last ones first: a beginning is worth more than what follows it.
        for page in reversed(list(pages)):
            self._held[page] -= 1
            if self._held[page] == 0:
                del self._held[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)


def keys_of(outline: Outline, pictures: Sequence[bytes], page: int, reader: str) -> list[Key]:
    """Of each page of `page` tokens that a sequence fills; `pictures` are the digests of its spans,
    `reader` says who reads it."""
    keys: list[Key] = []
    before = hashlib.sha256(reader.encode()).digest()
    for end in range(page, outline.tokens + 1, page):
        start = end - page
        digest = hashlib.sha256(before)
        digest.update(outline.ids_T[start:end].tobytes())
        digest.update(np.ascontiguousarray(outline.positions_3T[:, start:end]).tobytes())
        for span, picture in zip(outline.spans, pictures, strict=True):
            if span.start < end and span.stop > start:
                digest.update(picture)
        before = digest.digest()
        keys.append(before)
    return keys


def grown(outline: Outline, ids: Sequence[int]) -> Outline:
    """A prompt with tokens of its answer after it: text, whose positions go on from the largest."""
    first = outline.positions_3T.max() + 1
    following = np.arange(first, first + len(ids), dtype=outline.positions_3T.dtype)
    return replace(
        outline,
        ids_T=np.concatenate([outline.ids_T, np.array(ids, dtype=outline.ids_T.dtype)]),
        learned_T=np.concatenate([outline.learned_T, np.zeros(len(ids), dtype=np.bool_)]),
        positions_3T=np.concatenate([outline.positions_3T, np.tile(following, (3, 1))], axis=1),
    )


def picture_digests(prompt: Encoded) -> tuple[bytes, ...]:
    """Of the pixels of each picture or video, as the model sees them."""
    digests = []
    for number, span in enumerate(prompt.outline.spans):
        digest = hashlib.sha256(repr(span.grid).encode())
        digest.update(np.ascontiguousarray(patches_of(prompt, number)).data)
        digests.append(digest.digest())
    return tuple(digests)


def patches_of(prompt: Encoded, number: int) -> NDArray[np.uint8]:
    """Return the patches of one image or video of a prompt.

    Those of a still hold one frame each, also beside a video: what is known of an image is found
    again in every company.
    """
    spans = prompt.outline.spans
    counts = [math.prod(span.grid) for span in spans]
    start, span = sum(counts[:number]), spans[number]
    patches_ND = prompt.patches_ND[start : start + counts[number]]
    if len(span.files) > 1:
        return patches_ND
    return first_frame(patches_ND, span.resized[0] // span.grid[1])
