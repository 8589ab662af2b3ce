"""Collect size, validity and a thumbnail of each image in a dataset, in worker processes.

Each file is hashed once, and files with identical content are decoded once.

Near duplicates, such as another JPEG quality or a slight resize, are found in two steps: by 16 x 16
grayscale thumbnails, then in detail by patches of 8 x 8 pixels. Many different forms, receipts and
formulas have similar thumbnails. Re-encoding changes all textured patches slightly, while a single
changed character changes one patch strongly.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.errors import UserError
from finesight.files.worker_pool import exit_with_parent
from finesight.host_memory import num_allowed_cpus
from finesight.samples.frames import ImageSize
from finesight.samples.image_file import (
    TRANSPOSED_ORIENTATIONS,
    CorruptImageError,
    ImageTooLargeError,
    MissingImageError,
    TruncatedImageError,
    open_image_header,
    read_exif_orientation,
    sha256_content,
    split_container_path,
)
from finesight.samples.sample import is_video_path
from finesight.samples.video_file import iter_video_frames, read_video_header
from finesight.vision.image_processing import MAX_ASPECT_RATIO, load_image

THUMBNAIL_SIZE = 16
"""Side length of a square thumbnail in pixels; the aspect ratio is not preserved."""

Floats = NDArray[np.float64]

_MAX_GRAY_DIFF, _MAX_CONTRAST_DIFF, _MAX_LOG_ASPECT_DIFF = 4.0, 0.5, 0.05
"""Maximum differences between the thumbnails of two encodings of an image.

They are the mean difference in gray levels, this difference divided by the standard deviation of
the gray levels, and the difference of the logarithmic aspect ratios. On 1,469 photographs, receipts
and formulas, JPEG quality 30 causes a mean difference of up to 2.4 levels, and downscaling by two
2.8.
"""

_MIN_CONTRAST = 1.0
"""Minimum standard deviation of the gray levels of an image that can be compared."""

_COMPARE_SIZE, _PATCH_SIZE = 512, 8
"""Longest image side in the detailed comparison, and patch side, in pixels."""

_LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""

_STRICT_MAX_DIFF, _STRICT_MAX_RATIO = 0.58, 6.0
_LOOSE_MAX_DIFF, _LOOSE_MAX_RATIO = 0.8, 3.5
"""Limits of the largest patch difference in the detailed comparison.

The first limit applies to the difference relative to the contrast of the patch, the second to its
ratio to the typical patch difference. An image pair must meet the strict or the loose pair of
limits. Re-encoded images reach a difference of 0.54 and a ratio of 5.4 (3.6 for photographs and
documents). Different receipts and formulas with the same thumbnail start at a difference of 1.1.
One exchanged character causes a difference of at least 0.6 and a ratio of 15, or of 7 and 4 after
JPEG of quality 85 and 50.
"""

_MAX_PATCH_COLOR_DIFF, _MAX_MEAN_COLOR_DIFF, _COLOR_DIFF_SLOPE = 35.0, 2.5, 30.0
"""Limits of the mean color difference of a patch and of an image.

The limit of the full image grows with the typical patch difference (slope), because JPEG of low
quality shifts uniform colors more. Scenes that differ only in the shade of their background exceed
these limits.
"""


def compute_thumbnail(image: Image.Image) -> bytes:
    """Return the 16 x 16 grayscale thumbnail of an image as bytes in row-major order."""
    size = THUMBNAIL_SIZE, THUMBNAIL_SIZE
    return image.convert("L").resize(size, Image.Resampling.BICUBIC).tobytes()


def has_contrast(thumbnail: bytes) -> bool:
    """Return whether a thumbnail has enough contrast to identify an image.

    A blank page, for example, does not.
    """
    return bool(np.frombuffer(thumbnail, dtype=np.uint8).std() >= _MIN_CONTRAST)


class NearDuplicateIndex:
    """Index of image thumbnails for similarity search."""

    def __init__(self, thumbnails: Sequence[bytes], sizes: Sequence[ImageSize]) -> None:
        gray_NT = _decode_thumbnails(thumbnails)
        brightness = gray_NT.mean(axis=1)
        self._order = np.argsort(brightness, kind="stable")
        self._brightness = brightness[self._order]
        self._gray = gray_NT[self._order]
        self._block_means = _compute_block_means(self._gray)
        self._aspects = np.log([w / h for h, w in sizes] or [1.0])[self._order]

    def find_similar(self, thumbnail: bytes, size: ImageSize) -> list[int]:
        """Return the indices of similar images, the most similar first.

        The result is empty for an image without contrast.
        """
        if not has_contrast(thumbnail):
            return []
        gray_1T = _decode_thumbnails([thumbnail])
        max_diff = min(_MAX_GRAY_DIFF, _MAX_CONTRAST_DIFF * float(gray_1T.std()))
        mean = float(gray_1T.mean())
        first, last = np.searchsorted(self._brightness, [mean - max_diff, mean + max_diff])
        candidates = np.arange(first, last)
        aspect = np.log(size[1] / size[0])
        candidates = candidates[np.abs(self._aspects[candidates] - aspect) <= _MAX_LOG_ASPECT_DIFF]
        # Block means differ by at most the pixel differences: no match is lost.
        candidates = candidates[
            _mean_abs_diff(self._block_means[candidates], _compute_block_means(gray_1T)) <= max_diff
        ]
        distance = _mean_abs_diff(self._gray[candidates], gray_1T)
        candidates, distance = candidates[distance <= max_diff], distance[distance <= max_diff]
        return [*map(int, self._order[candidates[np.argsort(distance, kind="stable")]])]


def _decode_thumbnails(thumbnails: Sequence[bytes]) -> NDArray[np.float32]:
    gray = np.frombuffer(b"".join(thumbnails), dtype=np.uint8)
    return gray.reshape(-1, THUMBNAIL_SIZE * THUMBNAIL_SIZE).astype(np.float32)


def _compute_block_means(gray_NT: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the means of 4 x 4 pixel blocks of N thumbnails, [N, 16]."""
    blocks = gray_NT.reshape(-1, 4, THUMBNAIL_SIZE // 4, 4, THUMBNAIL_SIZE // 4)
    return np.asarray(blocks.mean(axis=(2, 4)).reshape(-1, 16))


def _mean_abs_diff(
    candidates: NDArray[np.float32], query: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the mean absolute difference between each candidate row and the query row."""
    return np.asarray(np.abs(candidates - query).mean(axis=1))


def is_same_image(path: Path, other_path: Path) -> bool:
    """Return whether two image files show the same image, compared by patches.

    Raises:
        CorruptImageError: A file cannot be decoded.
    """
    images = _open_resized(path), _open_resized(other_path)
    width, height = (min(sides) for sides in zip(*(p.size for p in images), strict=True))
    first, second = (
        np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
        for image in images
    )
    if first.std() < _MIN_CONTRAST:
        return False
    gray, other_gray = first @ _LUMA_WEIGHTS, second @ _LUMA_WEIGHTS
    patch_size = min(_PATCH_SIZE, width, height)
    contrast = np.maximum(_box_stds(gray, patch_size), _box_stds(other_gray, patch_size))
    difference = _box_means(np.abs(gray - other_gray), patch_size) / (contrast + 12)
    typical_diff = float(np.quantile(difference[contrast >= min(20.0, contrast.max() / 2)], 0.75))
    max_diff = float(difference.max())
    diff_ratio = max_diff / (typical_diff + 0.04)
    if not (max_diff <= _STRICT_MAX_DIFF and diff_ratio <= _STRICT_MAX_RATIO) and not (
        max_diff <= _LOOSE_MAX_DIFF and diff_ratio <= _LOOSE_MAX_RATIO
    ):
        return False
    color_diff = np.moveaxis(first - second, 2, 0)
    patch_color_diff = np.abs(_box_means(color_diff, min(2 * _PATCH_SIZE, width, height))).max()
    mean_color_diff = np.abs(color_diff.mean(axis=(1, 2))).max()
    return bool(
        patch_color_diff <= _MAX_PATCH_COLOR_DIFF
        and mean_color_diff <= _MAX_MEAN_COLOR_DIFF + _COLOR_DIFF_SLOPE * typical_diff
    )


@lru_cache(64)
def _open_resized(path: Path) -> Image.Image:
    image = load_image(path, min_side=_COMPARE_SIZE)
    scale = min(1.0, _COMPARE_SIZE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _box_means(values_HW: Floats, side: int) -> Floats:
    """Return the means of all squares with a given side, over the last two axes."""
    padding = [(0, 0)] * (values_HW.ndim - 2) + [(1, 0), (1, 0)]
    sums = np.pad(values_HW, padding).cumsum(axis=-2).cumsum(axis=-1)
    upper, lower = sums[..., :-side, :], sums[..., side:, :]
    window_sums = lower[..., side:] - lower[..., :-side] - upper[..., side:] + upper[..., :-side]
    return np.asarray(window_sums / side**2)


def _box_stds(values_HW: Floats, side: int) -> Floats:
    """Return the standard deviations of all squares of a given side length."""
    means = _box_means(values_HW, side)
    return np.asarray(np.sqrt(np.maximum(_box_means(values_HW**2, side) - means**2, 0)))


ItemT = TypeVar("ItemT")
StartedT = TypeVar("StartedT")
ResultT = TypeVar("ResultT")
ArgsP = ParamSpec("ArgsP")

PREFETCH_ITEMS = 4
"""Number of items whose work is started ahead of the current item."""

MIN_PARALLEL_SAMPLES = 400
"""Minimum number of samples from which worker processes save time."""


@contextmanager
def open_executor(num_samples: int) -> Iterator[Executor]:
    """Open a process pool, or an inline executor for few samples.

    The pool has one worker per core. Workers are spawned rather than forked, so that they inherit
    no state.

    Raises:
        UserError: A worker died, most likely from lack of memory.
    """
    pool = None
    if num_samples >= MIN_PARALLEL_SAMPLES:
        context = multiprocessing.get_context("spawn")
        # Inter-process communication may be unavailable, such as with a read-only /dev/shm.
        with suppress(OSError):
            pool = ProcessPoolExecutor(num_allowed_cpus(), context, initializer=_start_worker)
    if pool is None:
        yield _InlineExecutor()
        return
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"an image worker process died ({error})",
            where="data check",
            expected="enough memory to decode one image per core",
            remedy="free memory and start again",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch_map(
    items: Iterable[ItemT],
    start: Callable[[ItemT], StartedT],
    finish: Callable[[ItemT, StartedT], ResultT],
    max_pending: int = PREFETCH_ITEMS,
) -> Iterator[ResultT]:
    """Yield `finish(item, start(item))` for each item in order, starting items ahead.

    At most `max_pending` items are started ahead of the current one.
    """
    pending: deque[tuple[ItemT, StartedT]] = deque()
    for item in items:
        pending.append((item, start(item)))
        if len(pending) > max_pending:
            yield finish(*pending.popleft())
    while pending:
        yield finish(*pending.popleft())


class _InlineExecutor(Executor):
    """Executor that runs each task immediately in the calling process."""

    def submit(
        self, fn: Callable[ArgsP, ResultT], /, *args: ArgsP.args, **kwargs: ArgsP.kwargs
    ) -> Future[ResultT]:
        future: Future[ResultT] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _start_worker() -> None:
    exit_with_parent()
    # Ctrl-C reaches every process of the group; the parent process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


FILES_PER_TASK = 16

MAX_COMPARISONS = 16
"""Maximum number of detailed comparisons per image, made with the most similar candidates."""

_MIN_SIDE = 64
"""Minimum shorter side in pixels of an image decoded for its thumbnail."""

ISSUE_IMAGE_MISSING = "image-missing"
_MISSING_REMEDY = "correct the path; relative paths start at the folder of the data file"

_FileIdentity = tuple[int, int, int, int, str]
"""Key that identifies file content without reading it.

It consists of device, inode, size, modification time, and the member path inside a tar or Parquet
file.
"""


_HashTask = tuple[list[tuple[int, str]], Future[list[bytes]]]
"""Files of a task as (file index, path), and a future of their digests."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Properties of an image. Files with identical content share one instance.

    Attributes:
        size: Height and width in pixels after EXIF rotation.
        exif_orientation: EXIF orientation, 1 to 8; 1 means no rotation.
        thumbnail: Gray levels of the thumbnail; see `compute_thumbnail`. Empty for an invalid image
            and for a video file.
        issue_code: Issue code of an invalid image, None for a valid one.
    """

    size: tuple[int, int] = (0, 0)
    exif_orientation: int = 1
    thumbnail: bytes = b""
    issue_code: str | None = None
    error: str = ""
    remedy: str = _MISSING_REMEDY


_DecodeTask = tuple[list[int], Future[list[ImageInfo]]]
"""Image indices of a task, and a future of the image properties."""


class ImageCatalog:
    """Catalog of all images in a data check, filled by worker processes.

    Paths with identical content share an image index.

    Attributes:
        image_infos: Properties by image index, in order of first appearance.
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
        """Return the number of distinct image paths."""
        return len(self._file_indices)

    def image_index(self, path: str) -> int:
        """Return the image index of a path; identical files share an index."""
        return self._image_of_file[self._file_indices[path]]

    def __getitem__(self, path: str) -> ImageInfo:
        return self.image_infos[self.image_index(path)]

    def process_groups(
        self, groups: Iterable[ItemT], paths: Callable[[ItemT], Iterable[str]]
    ) -> Iterator[ItemT]:
        """Yield groups in order, each after the images at its paths were checked.

        Images of the following groups are hashed and decoded in the background.
        """
        hashed_groups = prefetch_map(
            groups, lambda group: self._submit_hashing(paths(group)), self._assign_image_indices
        )
        return prefetch_map(
            hashed_groups, lambda group: self._submit_decoding(), self._store_image_infos
        )

    def find_near_duplicates(
        self, queries: Iterable[int], candidates: Iterable[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield pairs (query, candidate) of images that are re-encoded copies of each other."""
        infos = self.image_infos
        valid = [n for n in candidates if infos[n].thumbnail]
        index = NearDuplicateIndex(
            [infos[n].thumbnail for n in valid], [infos[n].size for n in valid]
        )

        def submit_comparison(query: int) -> tuple[list[int], Future[list[bool]] | None]:
            info = infos[query]
            similar = [] if not info.thumbnail else index.find_similar(info.thumbnail, info.size)
            matches = [valid[n] for n in similar if valid[n] != query][:MAX_COMPARISONS]
            paths = [self.example_paths[match] for match in matches]
            if not matches:
                return [], None
            return matches, self._pool.submit(_compare_images, self.example_paths[query], paths)

        def collect_pairs(
            query: int, job: tuple[list[int], Future[list[bool]] | None]
        ) -> list[tuple[int, int]]:
            matches, future = job
            is_same = future.result() if future else []
            return [(query, match) for match, same in zip(matches, is_same, strict=True) if same]

        for pairs in prefetch_map(queries, submit_comparison, collect_pairs, FILES_PER_TASK):
            yield from pairs

    def _submit_hashing(self, paths: Iterable[str]) -> list[_HashTask]:
        """Submit tasks that hash the files among the given paths that are not known yet.

        A file is known by its path, or by its identity (such as a hard link).
        """
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
        return [
            (job, self._pool.submit(_hash_files, [path for _, path in job]))
            for job in _split_tasks(unread)
        ]

    def _assign_image_indices(self, group: ItemT, jobs: list[_HashTask]) -> ItemT:
        """Assign image indices to hashed files, with one index per distinct content."""
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
        """Submit tasks that decode all images that were indexed since the last call."""
        pending = range(self._num_submitted, len(self.image_infos))
        self._num_submitted = len(self.image_infos)
        valid = [n for n in pending if self.image_infos[n].issue_code is None]
        return [
            (job, self._pool.submit(inspect_images, [self.example_paths[n] for n in job]))
            for job in _split_tasks(valid)
        ]

    def _store_image_infos(self, group: ItemT, jobs: list[_DecodeTask]) -> ItemT:
        for indices, results in jobs:
            for image_index, image_info in zip(indices, results.result(), strict=True):
                self.image_infos[image_index] = image_info
        return group


def _read_identity(path: str) -> _FileIdentity | None:
    """Return the identity of an image file, or None if the file does not exist."""
    for file, inner_path in ((path, ""), split_container_path(path)):
        try:
            stat_result = os.stat(file)
        except (OSError, ValueError):  # name too long, or with a null byte
            continue
        device, inode, size = stat_result.st_dev, stat_result.st_ino, stat_result.st_size
        return device, inode, size, stat_result.st_mtime_ns, inner_path
    return None


def _split_tasks(items: list[ItemT]) -> list[list[ItemT]]:
    starts = range(0, len(items), FILES_PER_TASK)
    return [items[start : start + FILES_PER_TASK] for start in starts]


def _hash_files(paths: Sequence[str]) -> list[bytes]:
    """Return the SHA-256 of each file; an unreadable file is identified by its path instead."""
    digests = []
    for path in paths:
        digest = hashlib.sha256(os.fsencode(path)).digest()
        # The decoder reports errors.
        with suppress(OSError, ValueError, UserError):
            if os.path.isfile(path):  # pipes block, devices never end
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
            elif split_container_path(path)[1]:
                digest = bytes.fromhex(sha256_content(Path(path)))
        digests.append(digest)
    return digests


def inspect_images(paths: Sequence[str]) -> list[ImageInfo]:
    """Decode each image completely and return its properties."""
    return [_inspect_image(Path(path)) for path in paths]


_CODE_BY_ERROR: dict[type[CorruptImageError], str] = {
    MissingImageError: ISSUE_IMAGE_MISSING,
    TruncatedImageError: "image-truncated",
    ImageTooLargeError: "image-too-large",
    CorruptImageError: "image-corrupt",
}


def _inspect_image(path: Path) -> ImageInfo:
    try:
        if is_video_path(path):
            video = read_video_header(path)
            deque(iter_video_frames(path, [video.num_frames - 1]), maxlen=0)
            return ImageInfo(video.size)
        image = load_image(path, min_side=_MIN_SIDE)
        with open_image_header(path) as header:
            width, height = header.size
            orientation = read_exif_orientation(header)
    except CorruptImageError as error:
        code = next(code for kind, code in _CODE_BY_ERROR.items() if isinstance(error, kind))
        if code == ISSUE_IMAGE_MISSING:
            return ImageInfo(issue_code=code)
        return ImageInfo(issue_code=code, error=error.what, remedy=str(error.remedy))
    size = (width, height) if orientation in TRANSPOSED_ORIENTATIONS else (height, width)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        error_text = f"{size[1]} x {size[0]}, one side over {MAX_ASPECT_RATIO} times the other"
        remedy = "resize or crop the image"
        return ImageInfo(size, orientation, b"", "image-too-large", error_text, remedy)
    return ImageInfo(size, orientation, compute_thumbnail(image))


def _compare_images(path: str, other_paths: Sequence[str]) -> list[bool]:
    """Return whether each of the other images is a re-encoded copy of the first."""
    return [is_same_image(Path(path), Path(other_path)) for other_path in other_paths]
