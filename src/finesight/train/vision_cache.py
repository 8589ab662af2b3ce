"""Cached image features of a frozen vision encoder: image index, storage tiers and their readers.

The files of the disk tier are shared by runs. They are in the assets folder of the huggingface_hub
cache (`HF_HOME`), with a folder for each vision encoder and one safetensors file per chunk of
images. A file is renamed to its final name after it is complete, and its SHA-256 is verified on
reading. Least recently used files are evicted. Files are not flushed to disk: the features in a
file that a power failure corrupts are computed again.

Shapes: P unique images, M image tokens of a pack or chunk, A image tokens of all images, K features
per token, D width.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finesight.bounded_files import parse_json
from finesight.data.corpus import Corpus
from finesight.data.image_header import CorruptImageError, sha256_content
from finesight.data.line_index import UnreadableFileError
from finesight.encode.packing import ContextShard
from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import VisualSpan
from finesight.errors import UserError
from finesight.model_folder import MAX_HEADER_BYTES
from finesight.progress import ProgressCallback
from finesight.storage import FileLock, make_folder, translate_os_errors
from finesight.train.dataloader import (
    TensorSpec,
    VisionCacheReader,
    catch_user_error,
    prefetch_items,
)

CHUNK_PATCHES = 16384
"""Number of patches at which a chunk ends; limits the memory for encoding it."""

SAMPLES_PER_ITEM = 64
"""Number of samples per item of the index scan, loaded by one data loader worker."""


class ImageRef(NamedTuple):
    """Image or video of a sample.

    Attributes:
        key: SHA-256 over the bytes of the files, the resized size and the patch grid. Images with
            equal keys have equal model inputs.
        span: Tokens, files and patch grid of the image in its sample.
    """

    key: str
    span: VisualSpan

    @property
    def num_features(self) -> int:
        """Number of image tokens."""
        return self.span.stop - self.span.start

    @property
    def num_patches(self) -> int:
        """Number of patches, the inputs of the vision encoder."""
        frames, height, width = self.span.grid_thw
        return frames * height * width


@dataclass(frozen=True, slots=True)
class ImageChunk:
    """Images `start` to `stop` (exclusive) of an `ImageIndex`, which are encoded together.

    `name` is a SHA-256 of the keys of these images.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """Unique images of a dataset.

    Attributes:
        image_refs: Unique images in the order of their keys.
        images_by_sample: Indices into `image_refs`, by corpus index of the sample.
        corrupt_samples: Errors of samples with a corrupt image, by corpus index.
    """

    image_refs: tuple[ImageRef, ...]
    images_by_sample: Mapping[int, tuple[int, ...]]
    corrupt_samples: Mapping[int, CorruptImageError]

    @property
    def feature_offsets_P1(self) -> NDArray[np.int64]:
        """Start of each image in the concatenated features, and the total number of features."""
        return np.cumsum([0, *(image_ref.num_features for image_ref in self.image_refs)])

    def count_images(self, chunks: Sequence[ImageChunk]) -> int:
        """Count the images in several chunks."""
        return sum(chunk.stop - chunk.start for chunk in chunks)

    def count_patches(self, chunks: Sequence[ImageChunk]) -> int:
        """Count the patches in several chunks."""
        image_refs = self.image_refs
        return sum(
            image_refs[n].num_patches for chunk in chunks for n in range(chunk.start, chunk.stop)
        )

    def split_chunks(self) -> list[ImageChunk]:
        """Split the images into content-defined chunks, so that other datasets can reuse them.

        A chunk ends after an image whose key ends in 0 (one of 16), or at `CHUNK_PATCHES` patches.
        An added or removed image changes only its own chunk. The last bits of the features of an
        image may depend on the other images in the batch, so chunks make features reproducible.
        """
        chunk_ends, num_patches = [0], 0
        for position, image_ref in enumerate(self.image_refs, 1):
            num_patches += image_ref.num_patches
            last = position == len(self.image_refs)
            if last or image_ref.key[-1] == "0" or num_patches >= CHUNK_PATCHES:
                chunk_ends.append(position)
                num_patches = 0
        keys = [image_ref.key for image_ref in self.image_refs]
        return [
            ImageChunk(hashlib.sha256("".join(keys[start:stop]).encode()).hexdigest(), start, stop)
            for start, stop in pairwise(chunk_ends)
        ]


class _ImageRefReader:
    """Reader of the images of up to `SAMPLES_PER_ITEM` samples per call."""

    def __init__(self, corpus: Corpus, renderer: Renderer, samples: Sequence[int]) -> None:
        self._corpus, self._renderer, self._samples = corpus, renderer, samples
        self._digests: dict[Path, str] = {}

    def __call__(self, item_index: int) -> list[list[ImageRef] | UserError]:
        start = item_index * SAMPLES_PER_ITEM
        chunk = self._samples[start : start + SAMPLES_PER_ITEM]
        return [catch_user_error(self._read_image_refs, index) for index in chunk]

    def _read_image_refs(self, index: int) -> list[ImageRef]:
        spans = self._renderer.tokenize(self._corpus[index]).spans
        return [ImageRef(self._compute_key(span), span) for span in spans]

    def _compute_key(self, span: VisualSpan) -> str:
        key_fields: list[object] = [
            [self._file_digest(file) for file in span.files],
            span.kind,
            span.resized_size,
            span.grid_thw,
        ]
        if not span.frame_indices:
            return hashlib.sha256(json.dumps(key_fields).encode()).hexdigest()
        # Spans of a video file are adjacent and in order, so that a chunk decodes the file once.
        digests = [hashlib.sha256(json.dumps(key_fields[:3]).encode()).hexdigest()[:32]]
        digests.append(f"{span.frame_indices[0]:08x}")
        key_fields += [span.frame_indices, version("av")]
        digests.append(hashlib.sha256(json.dumps(key_fields).encode()).hexdigest()[:24])
        return "".join(digests)

    def _file_digest(self, file: Path) -> str:
        # Samples with the same image are often adjacent.
        if file not in self._digests:
            try:
                self._digests[file] = sha256_content(file)
            except OSError as error:
                raise CorruptImageError(
                    f"cannot be read: {error.strerror or error}",
                    where=str(file),
                    expected="a readable image during the complete run",
                    remedy="restore the image, or correct its permissions",
                ) from error
        return self._digests[file]


def index_images(
    corpus: Corpus,
    renderer: Renderer,
    samples: Sequence[int],
    num_workers: int,
    on_progress: ProgressCallback,
) -> ImageIndex:
    """Hash the image files of samples, and build an index of the unique images.

    Raises:
        UserError: A sample has an error other than a corrupt image.
    """
    item_indices = range(-(-len(samples) // SAMPLES_PER_ITEM))
    refs_by_sample: dict[int, list[ImageRef]] = {}
    corrupt_samples: dict[int, CorruptImageError] = {}
    indices = iter(samples)
    result_lists = prefetch_items(
        _ImageRefReader(corpus, renderer, samples),
        item_indices,
        min(num_workers, len(item_indices) // 4),
        pin_memory=False,
    )
    with closing(result for result in result_lists) as results:
        # Drop the last reference, so that the workers end with the block.
        del result_lists
        for result in results:
            for image_refs in result:
                index = next(indices)
                if isinstance(image_refs, CorruptImageError):
                    corrupt_samples[index] = image_refs
                elif isinstance(image_refs, UserError):
                    raise image_refs
                else:
                    refs_by_sample[index] = image_refs
            on_progress(len(result))
    unique_refs = {
        image_ref.key: image_ref
        for image_refs in refs_by_sample.values()
        for image_ref in image_refs
    }
    index_by_key = {key: idx for idx, key in enumerate(sorted(unique_refs))}
    return ImageIndex(
        image_refs=tuple(unique_refs[key] for key in index_by_key),
        images_by_sample={
            index: tuple(index_by_key[s.key] for s in refs_by_sample[index])
            for index in refs_by_sample
        },
        corrupt_samples=corrupt_samples,
    )


MAX_STORE_BYTES = 64 << 30
"""Maximum size of the feature files of all vision encoders, in bytes."""

MAX_FREE_FRACTION = 0.5
"""Maximum fraction of the free disk space for new feature files."""

MAX_PENDING_CHUNKS = 8
"""Maximum number of chunks that wait to be written to disk; limits memory."""

NUM_WRITER_THREADS = 2

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TENSOR_KEY, _SHA256_KEY = "features", "sha256"


def vision_cache_root() -> Path:
    """Return the root folder of the feature files of all vision encoders."""
    # Imported here, because huggingface_hub is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "vision_cache"


class StoredChunk(NamedTuple):
    """Feature file of a chunk of images, and the byte offset of its features."""

    path: Path
    data_offset: int


class VisionFileStore:
    """Folder of the feature files of one vision encoder.

    Other runs cannot evict files until the store is closed.
    """

    def __init__(self, root: Path, encoder_hash: str, *, use_lock: bool = True) -> None:
        """Create the folder of the vision encoder, and acquire the shared lock.

        Args:
            root: Root folder of all vision encoders.
            encoder_hash: Fingerprint of the encoder and its settings, used as folder name.
            use_lock: Whether to hold the lock; one rank per machine does.

        Raises:
            UserError: The folder cannot be created.
        """
        self.root, self.folder = root, root / encoder_hash
        make_folder(self.folder)
        with translate_os_errors(root):
            self._lock_fd = FileLock(root)
        self._use_lock = use_lock
        if use_lock:
            with suppress(OSError):
                self._lock_fd.acquire(shared=True)

    def close(self) -> None:
        """Release the lock, so that other runs may evict files."""
        self._lock_fd.close()

    @property
    def is_empty(self) -> bool:
        """True if there are no feature files of this vision encoder."""
        return not any(self.folder.iterdir())

    def chunk_path(self, name: str) -> Path:
        """Return the path of the feature file of a chunk."""
        return self.folder / f"{name}.safetensors"

    def has_chunk(self, name: str) -> bool:
        """Return whether the feature file of a chunk exists, without verifying it."""
        return self.chunk_path(name).exists()

    def evict(self, required_chunks: Iterable[str], missing_bytes: int) -> int:
        """Remove least recently used feature files until new files fit.

        No file is removed while another run uses the store.

        Args:
            required_chunks: Names of chunks that must not be removed.

        Returns:
            Number of bytes available for new files.
        """
        is_exclusive = self._use_lock and self._is_alone()
        files = self._list_files()
        used = sum(size for _, size, _ in files)
        free = shutil.disk_usage(self.root).free

        def available_bytes() -> int:
            return max(0, min(MAX_STORE_BYTES - used, int(MAX_FREE_FRACTION * free)))

        if is_exclusive:
            protected_paths = {self.chunk_path(name) for name in required_chunks}
            for path in self.root.glob("*/.*.tmp"):
                path.unlink(missing_ok=True)
            for _, size, path in sorted(files):
                if missing_bytes <= available_bytes():
                    break
                if path not in protected_paths:
                    path.unlink(missing_ok=True)
                    used, free = used - size, free + size
        if self._use_lock:
            with suppress(OSError):
                self._lock_fd.acquire(shared=True)
        return available_bytes()

    def _is_alone(self) -> bool:
        """Acquire the exclusive lock; return False if another run uses the store."""
        try:
            self._lock_fd.acquire(wait=False)
        except OSError:
            return False
        return True

    def _list_files(self) -> list[tuple[float, int, Path]]:
        """Return the time of last use, the size and the path of all feature files."""
        stats = []
        for path in self.root.glob("*/*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            stats.append((stat.st_mtime, stat.st_size, path))
        return stats

    def write(self, name: str, features_MKD: Tensor) -> StoredChunk:
        """Write the features of a chunk to a file, atomically.

        Args:
            features_MKD: Contiguous CPU tensor.

        Raises:
            UserError: The disk is not writable.
        """
        path = self.chunk_path(name)
        # A unique name per process and thread.
        temp_path = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with translate_os_errors(path):
                metadata = {_SHA256_KEY: hashlib.sha256(_as_bytes(features_MKD)).hexdigest()}
                save_file({_TENSOR_KEY: features_MKD}, temp_path, metadata)
                data_offset = temp_path.stat().st_size - len(_as_bytes(features_MKD))
                os.replace(temp_path, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot be written: {error}",
                where=str(path),
                expected="a writable folder during the complete run",
                remedy="set train.vision_cache=memory, or move HF_HOME to another disk",
            ) from error
        finally:
            with suppress(OSError):
                temp_path.unlink()
        return StoredChunk(path, data_offset)

    def read(self, name: str, features_MKD: Tensor) -> StoredChunk | None:
        """Read and verify the features of a chunk.

        Args:
            features_MKD: Contiguous CPU tensor that receives the features.

        Returns:
            The file; None if it is missing or corrupt. A corrupt file is removed.
        """
        path = self.chunk_path(name)
        try:
            with path.open("rb") as file:
                data_offset = _read_verified(file, features_MKD)
        except FileNotFoundError:
            return None
        except (ValueError, OSError):
            with suppress(OSError):
                path.unlink()
            return None
        # Files of other users may be read-only.
        with suppress(OSError):
            os.utime(path)
        return StoredChunk(path, data_offset)


class FeatureWriter:
    """Writer of image features to disk in background threads; call `close` to end them.

    Args:
        store: Feature files on disk.
        on_error: Callback for the first error, after which no more files are written.
    """

    def __init__(self, store: VisionFileStore, on_error: Callable[[UserError], None]) -> None:
        self._store, self._on_error, self._is_active = store, on_error, True
        self._pool = ThreadPoolExecutor(NUM_WRITER_THREADS)
        self._pending: deque[tuple[ImageChunk, Future[StoredChunk]]] = deque()
        self._stored: dict[ImageChunk, StoredChunk] = {}

    def write(self, chunk: ImageChunk, features_MKD: Tensor, name: str) -> None:
        """Queue features on the CPU for the file `name`; blocks while the queue is full."""
        if self._is_active:
            self._pending.append((chunk, self._pool.submit(self._store.write, name, features_MKD)))
        self._wait_until_pending(MAX_PENDING_CHUNKS)

    def flush(self) -> dict[ImageChunk, StoredChunk]:
        """Wait for all queued chunks, and return all files written so far."""
        self._wait_until_pending(0)
        return self._stored

    def close(self) -> None:
        """End the threads; queued chunks are discarded."""
        self._pool.shutdown(cancel_futures=True)

    def _wait_until_pending(self, count: int) -> None:
        while len(self._pending) > count:
            chunk, future = self._pending.popleft()
            try:
                self._stored[chunk] = future.result()
            except UserError as error:
                if self._is_active:
                    self._is_active = False
                    self._on_error(error)


def _read_verified(file: BinaryIO, features_MKD: Tensor) -> int:
    """Read the features in an open file and verify their SHA-256; return their byte offset."""
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header: Any = parse_json(file.read(length))
    buffer = _as_bytes(features_MKD)
    expected_spec = {
        "dtype": _DTYPE_NAMES[features_MKD.dtype],
        "shape": list(features_MKD.shape),
        "data_offsets": [0, len(buffer)],
    }
    if not isinstance(header, dict) or header.get(_TENSOR_KEY) != expected_spec:
        raise ValueError("another tensor")
    metadata = header.get("__metadata__")
    _read_into(file, buffer)
    digest = hashlib.sha256(buffer).hexdigest()
    if not isinstance(metadata, dict) or metadata.get(_SHA256_KEY) != digest:
        raise ValueError("other bytes")
    return 8 + length


def _read_into(file: BinaryIO, buffer: memoryview) -> None:
    """Fill a buffer with the next bytes of a file; raise ValueError if it is too short."""
    if file.readinto(buffer) < len(buffer):  # type: ignore[attr-defined]
        raise ValueError("cut off")


def _as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    assert tensor.is_contiguous(), "a tensor that is not contiguous"
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_rows(stored_chunk: StoredChunk, start_row: int, features_MKD: Tensor) -> None:
    """Read the features of consecutive image tokens of a chunk, without verifying them.

    Args:
        start_row: Index of the first image token in the chunk.
        features_MKD: Contiguous CPU tensor that receives the features.

    Raises:
        UnreadableFileError: The file is missing, truncated or unreadable.
    """
    buffer = _as_bytes(features_MKD)
    row_bytes = len(buffer) // max(1, len(features_MKD))
    try:
        with stored_chunk.path.open("rb") as file:
            file.seek(stored_chunk.data_offset + start_row * row_bytes)
            _read_into(file, buffer)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else error
        raise UnreadableFileError(
            f"cached image features cannot be read: {reason}",
            where=str(stored_chunk.path),
            expected="the file as it was at the start of training",
            remedy="start again with --resume to encode missing images again",
        ) from error


@dataclass(frozen=True)
class VisionIndexReader(VisionCacheReader):
    """Vision cache reader for features on the GPU; the data loader sends only feature indices.

    Attributes:
        image_index: Unique images of the dataset.
        feature_offsets_P1: Start of each image in the concatenated features, and their total
            number.
    """

    image_index: ImageIndex
    feature_offsets_P1: NDArray[np.int64]

    def check(self, sample: int, num_features: int) -> None:
        """Verify that a sample can use the cached features of its images.

        Raises:
            CorruptImageError: An image was corrupt, or its number of image tokens has changed.
        """
        if sample in self.image_index.corrupt_samples:
            raise self.image_index.corrupt_samples[sample]
        if num_features != self.count_features([sample]):
            raise CorruptImageError(
                f"an image has {num_features} tokens now, and had"
                f" {self.count_features([sample])} when its features were cached",
                where=str(
                    self.image_index.image_refs[self.image_indices([sample])[0]].span.files[0]
                ),
                expected="unchanged images during the run",
                remedy="start again with --resume to encode the images again",
            )

    def image_indices(self, sample_indices: Sequence[int]) -> list[int]:
        """Return the indices of the images of several samples, in order."""
        return [
            image_index
            for sample in sample_indices
            for image_index in self.image_index.images_by_sample[sample]
        ]

    def count_features(self, sample_indices: Sequence[int]) -> int:
        """Return the number of image tokens of several samples."""
        image_refs = self.image_index.image_refs
        return sum(
            image_refs[image_index].num_features
            for image_index in self.image_indices(sample_indices)
        )

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        """Return the dtype and shape of the feature indices of a pack: int64 [M]."""
        return torch.int64, (self.count_features(sample_indices),)

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Write the feature indices of the images of a pack to a buffer, in order."""
        offsets = self.feature_offsets_P1
        ranges = [np.arange(offsets[n], offsets[n + 1]) for n in self.image_indices(sample_indices)]
        if ranges:
            np.concatenate(ranges, out=buffer.numpy())


@dataclass(frozen=True)
class VisionRamReader(VisionIndexReader):
    """Vision cache reader for features in CPU memory; the data loader sends features.

    Attributes:
        features_AKD: Features of all images.
    """

    features_AKD: Tensor

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        """Return the dtype and shape of the features of a pack: [M, K, D]."""
        return self.features_AKD.dtype, (
            self.count_features(sample_indices),
            *self.features_AKD.shape[1:],
        )

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Copy the features of a pack to a buffer."""
        indices_M = torch.empty(len(buffer), dtype=torch.int64)
        super().write_to(sample_indices, indices_M)
        torch.index_select(self.features_AKD, 0, indices_M, out=buffer)


@dataclass(frozen=True)
class VisionDiskReader(VisionIndexReader):
    """Vision cache reader for features on disk; the data loader sends features.

    Attributes:
        files: File of each chunk of images.
        first_images: Index of the first image of each chunk.
        feature_shape: Shape (K, D) of the features of a token.
    """

    files: Sequence[StoredChunk]
    first_images: NDArray[np.int64]
    feature_shape: tuple[int, int]
    dtype: torch.dtype

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        """Return the dtype and shape of the features of a pack: [M, K, D]."""
        return self.dtype, (self.count_features(sample_indices), *self.feature_shape)

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Read the features of a pack from disk into a buffer.

        Raises:
            UnreadableFileError: A file is missing or truncated.
        """
        start = 0
        for image_index in self.image_indices(sample_indices):
            stop = start + self.image_index.image_refs[image_index].num_features
            chunk = int(np.searchsorted(self.first_images, image_index, "right")) - 1
            start_row = (
                self.feature_offsets_P1[image_index]
                - self.feature_offsets_P1[self.first_images[chunk]]
            )
            read_rows(self.files[chunk], int(start_row), buffer[start:stop])
            start = stop


@dataclass(frozen=True, slots=True)
class VisionCache:
    """Cached features of all images of a run.

    Attributes:
        reader: Reader that the data loader uses.
        features_AKD: Features on the device if the reader sends only indices; otherwise None.
    """

    reader: VisionIndexReader
    device: torch.device
    features_AKD: Tensor | None = None

    def load_features(
        self, cache_inputs: Tensor, context_shard: ContextShard | None = None
    ) -> Tensor:
        """Return the image features [M, K, D] of a pack on the device, without synchronization.

        Args:
            cache_inputs: Features or feature indices that the data loader has sent.
            context_shard: Part of a split sample that this rank processes.
        """
        if context_shard is not None:
            ranges = context_shard.feature_ranges
            cache_inputs = torch.cat([cache_inputs[start:stop] for start, stop in ranges])
        on_device = cache_inputs.to(self.device, non_blocking=True)
        return (
            on_device if self.features_AKD is None else self.features_AKD.index_select(0, on_device)
        )
