"""Image facts of a dataset: each file is hashed once, each content decoded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finesight.check.near_duplicates import NearDuplicateIndex, compute_thumbnail, is_same_image
from finesight.check.parallel_executor import prefetch_map
from finesight.data.container_paths import sha256_content, split_container_path
from finesight.data.image_header import (
    TRANSPOSED_ORIENTATIONS,
    CorruptImageError,
    ImageTooLargeError,
    MissingImageError,
    TruncatedImageError,
    open_image_header,
    read_exif_orientation,
)
from finesight.errors import UserError
from finesight.vision.image_decoding import load_image
from finesight.vision.resize import MAX_ASPECT_RATIO

ItemT = TypeVar("ItemT")

FILES_PER_TASK = 16
"""Number of files per worker task."""

MAX_COMPARISONS = 16
"""Maximum number of detailed comparisons per image, with the most similar candidates."""

_MIN_SIDE = 64
"""Minimum length in pixels of the shorter side of an image decoded for a thumbnail."""

ISSUE_IMAGE_MISSING = "image-missing"
"""Issue code of an image without a file."""

_FileIdentity = tuple[int, int, int, int, str]
"""File identity without reading: device, inode, size, modification time, and the member name inside
a container.
"""


_HashTask = tuple[list[tuple[int, str]], Future[list[bytes]]]
"""Files by index and path, and their pending digests."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Properties of one image content, which may be in several files.

    Attributes:
        size: Height and width after EXIF rotation.
        exif_orientation: EXIF orientation, 1 to 8; 1 is none.
        issue_code: Issue code of an invalid image, else None.
        error: Description of the issue.
    """

    size: tuple[int, int] = (0, 0)
    exif_orientation: int = 1
    thumbnail: bytes = b""
    issue_code: str | None = None
    error: str = ""


_DecodeTask = tuple[list[int], Future[list[ImageInfo]]]
"""Contents by index, and their pending properties."""


class ImageCatalog:
    """The images of a check by path, processed by the worker processes of `executor`.

    `image_infos` are numbered in order of appearance. `example_paths` has one path per content.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._file_indices: dict[str, int] = {}
        self._by_identity: dict[_FileIdentity, int] = {}
        self._image_of_file: list[int] = []
        self._image_by_digest: dict[bytes, int] = {}
        self._num_submitted = 0
        self.image_infos: list[ImageInfo] = []
        self.example_paths: list[str] = []

    def __len__(self) -> int:
        """Return the number of image paths."""
        return len(self._file_indices)

    def image_index(self, path: str) -> int:
        """Return the content index of a path."""
        return self._image_of_file[self._file_indices[path]]

    def __getitem__(self, path: str) -> ImageInfo:
        return self.image_infos[self.image_index(path)]

    def process_groups(
        self, groups: Iterable[ItemT], paths: Callable[[ItemT], Iterable[str]]
    ) -> Iterator[ItemT]:
        """Yield the groups in order, each when all images at its `paths` are processed."""
        hashed_groups = prefetch_map(
            groups, lambda group: self._submit_hashing(paths(group)), self._assign_image_indices
        )
        return prefetch_map(
            hashed_groups, lambda group: self._submit_decoding(), self._store_image_infos
        )

    def find_near_duplicates(
        self, queries: Iterable[int], candidates: Iterable[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield pairs of a query and a candidate that are re-encoded copies of each other."""
        valid = [
            image_index
            for image_index in candidates
            if self.image_infos[image_index].issue_code is None
        ]
        image_infos = [self.image_infos[image_index] for image_index in valid]
        index = NearDuplicateIndex(
            [c.thumbnail for c in image_infos], [c.size for c in image_infos]
        )

        def iter_candidates() -> Iterator[tuple[int, list[int]]]:
            for image_index in queries:
                image_info = self.image_infos[image_index]
                similar = (
                    []
                    if image_info.issue_code
                    else index.find_similar(image_info.thumbnail, image_info.size)
                )
                matches = [valid[index] for index in similar if valid[index] != image_index][
                    :MAX_COMPARISONS
                ]
                if matches:
                    yield image_index, matches

        def submit_comparison(job: tuple[int, list[int]]) -> Future[list[bool]]:
            image_index, matches = job
            return self._pool.submit(
                _compare_images,
                self.example_paths[image_index],
                [self.example_paths[match] for match in matches],
            )

        def collect_pairs(
            job: tuple[int, list[int]], same: Future[list[bool]]
        ) -> list[tuple[int, int]]:
            image_index, matches = job
            return [
                (image_index, match)
                for match, is_same in zip(matches, same.result(), strict=True)
                if is_same
            ]

        for pairs_chunk in prefetch_map(
            iter_candidates(), submit_comparison, collect_pairs, max_pending=FILES_PER_TASK
        ):
            yield from pairs_chunk

    def _submit_hashing(self, paths: Iterable[str]) -> list[_HashTask]:
        """Submit files for hashing that are not known by path or by file identity."""
        unread: list[tuple[int, str]] = []
        for path in paths:
            if path in self._file_indices:
                continue
            identity = _read_identity(path)
            file_index = None if identity is None else self._by_identity.get(identity)
            if file_index is None:
                file_index = len(self._image_of_file)
                self._image_of_file.append(-1)
                if identity is None:
                    self._image_of_file[file_index] = self._add_image(
                        path, ImageInfo(issue_code=ISSUE_IMAGE_MISSING)
                    )
                else:
                    self._by_identity[identity] = file_index
                    unread.append((file_index, path))
            self._file_indices[path] = file_index
        jobs = [
            unread[start : start + FILES_PER_TASK]
            for start in range(0, len(unread), FILES_PER_TASK)
        ]
        return [(job, self._pool.submit(_hash_files, [path for _, path in job])) for job in jobs]

    def _assign_image_indices(self, group: ItemT, jobs: list[_HashTask]) -> ItemT:
        """Assign an index to each new content."""
        for files, digests in jobs:
            for (file_index, path), digest in zip(files, digests.result(), strict=True):
                if digest not in self._image_by_digest:
                    self._image_by_digest[digest] = self._add_image(path, ImageInfo())
                self._image_of_file[file_index] = self._image_by_digest[digest]
        return group

    def _add_image(self, path: str, image_info: ImageInfo) -> int:
        self.image_infos.append(image_info)
        self.example_paths.append(path)
        return len(self.image_infos) - 1

    def _submit_decoding(self) -> list[_DecodeTask]:
        """Submit all indexed contents for decoding that were not submitted before."""
        pending = range(self._num_submitted, len(self.image_infos))
        self._num_submitted = len(self.image_infos)
        valid = [
            image_index
            for image_index in pending
            if self.image_infos[image_index].issue_code is None
        ]
        jobs = [
            valid[start : start + FILES_PER_TASK] for start in range(0, len(valid), FILES_PER_TASK)
        ]
        return [
            (job, self._pool.submit(inspect_images, [self.example_paths[n] for n in job]))
            for job in jobs
        ]

    def _store_image_infos(self, group: ItemT, jobs: list[_DecodeTask]) -> ItemT:
        for indices, results in jobs:
            for image_index, image_info in zip(indices, results.result(), strict=True):
                self.image_infos[image_index] = image_info
        return group


def _read_identity(path: str) -> _FileIdentity | None:
    """Return the file identity, None for a missing file."""
    for file, inner_path in ((path, ""), split_container_path(path)):
        try:
            stat_result = os.stat(file)
        except (OSError, ValueError):  # a name that cannot be one: too long, or with a zero byte
            continue
        return (
            stat_result.st_dev,
            stat_result.st_ino,
            stat_result.st_size,
            stat_result.st_mtime_ns,
            inner_path,
        )
    return None


def _hash_files(paths: Sequence[str]) -> list[bytes]:
    """Return the SHA-256 of each file, or of its path if it is unreadable."""
    return [_hash_file(path) for path in paths]


def _hash_file(path: str) -> bytes:
    try:
        if os.path.isfile(path):  # a pipe would keep its reader waiting, a device never ends
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        if split_container_path(path)[1]:
            return bytes.fromhex(sha256_content(Path(path)))
    except (OSError, ValueError, UserError):
        pass  # the decoder reports the error
    return hashlib.sha256(os.fsencode(path)).digest()


def inspect_images(paths: Sequence[str]) -> list[ImageInfo]:
    """Decode each file completely and return its properties."""
    return [_inspect_image(Path(path)) for path in paths]


def _inspect_image(path: Path) -> ImageInfo:
    try:
        image = load_image(path, min_side=_MIN_SIDE)
        with open_image_header(path) as header:
            width, height = header.size
            orientation = read_exif_orientation(header)
    except MissingImageError:
        return ImageInfo(issue_code=ISSUE_IMAGE_MISSING)
    except TruncatedImageError as error:
        return ImageInfo(issue_code="image-truncated", error=error.what)
    except ImageTooLargeError as error:
        return ImageInfo(issue_code="image-too-large", error=error.what)
    except CorruptImageError as error:
        return ImageInfo(issue_code="image-corrupt", error=error.what)
    size = (width, height) if orientation in TRANSPOSED_ORIENTATIONS else (height, width)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        error_text = f"{size[1]} x {size[0]}, one side over {MAX_ASPECT_RATIO} times the other"
        return ImageInfo(size, orientation, issue_code="image-too-large", error=error_text)
    return ImageInfo(size, orientation, compute_thumbnail(image))


def _compare_images(path: str, other_paths: Sequence[str]) -> list[bool]:
    """Return which of `other_paths` are re-encoded copies of `path`."""
    return [is_same_image(Path(path), Path(other_path)) for other_path in other_paths]
