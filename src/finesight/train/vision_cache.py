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

import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finesight.encode.context_shard import ContextShard
from finesight.encode.tokenization import VisualSpan
from finesight.errors import UserError
from finesight.files.storage import FileLock, make_folder, open_tensors, translate_os_errors
from finesight.samples.image_file import CorruptImageError
from finesight.samples.line_index import UnreadableFileError
from finesight.settings.config import VisionCacheMode

CHUNK_PATCHES = 16384
"""Number of patches at which a chunk ends; limits the memory for encoding it."""


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


@dataclass(frozen=True)
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

    @cached_property
    def feature_offsets_P1(self) -> NDArray[np.int64]:
        """Start of each image in the concatenated features, and the total number of features."""
        return np.cumsum([0, *(image_ref.num_features for image_ref in self.image_refs)])

    def feature_rows(self, images: Sequence[int]) -> NDArray[np.int64]:
        """Return the indices of the features of several images in the concatenated features."""
        offsets = self.feature_offsets_P1
        # An empty array, so that the result has its dtype without images as well.
        ranges = [offsets[:0]]
        for image in images:
            ranges.append(np.arange(offsets[image], offsets[image + 1]))
        return np.concatenate(ranges)

    def count_images(self, chunks: Sequence[ImageChunk]) -> int:
        """Count the images in several chunks."""
        return sum(chunk.stop - chunk.start for chunk in chunks)

    def split_chunks(self) -> list[ImageChunk]:
        """Split the images into content-defined chunks, so that other datasets can reuse them.

        A chunk ends after an image whose key ends in 0 (one of 16), or at `CHUNK_PATCHES` patches.
        An added or removed image changes only its own chunk. The last bits of the features of an
        image may depend on the other images in the batch, so chunks make features reproducible.
        """
        chunk_ends = [0]
        num_patches = 0
        for position, image_ref in enumerate(self.image_refs, 1):
            num_patches += image_ref.num_patches
            last = position == len(self.image_refs)
            if last or image_ref.key[-1] == "0" or num_patches >= CHUNK_PATCHES:
                chunk_ends.append(position)
                num_patches = 0
        chunks = []
        for start, stop in pairwise(chunk_ends):
            keys = "".join(image_ref.key for image_ref in self.image_refs[start:stop])
            name = hashlib.sha256(keys.encode()).hexdigest()
            chunks.append(ImageChunk(name, start, stop))
        return chunks


CacheTier = Literal["gpu", "memory", "disk"]

MAX_GPU_FRACTION = 1 / 16
"""Maximum fraction of the free GPU memory, after loading the model, for cached features.

Training and evaluation need an unknown amount of the rest, and the other tiers are fast enough as
well.
"""

MAX_RAM_FRACTION = 1 / 2
"""Maximum fraction of the available CPU memory for cached features."""


class FreeBytes(NamedTuple):
    """Free bytes for cached features in each storage tier.

    Attributes:
        gpu: GPU memory; 0 without a GPU.
        memory: CPU memory per rank.
        disk: Disk space.
    """

    gpu: int
    memory: int
    disk: int


def choose_cache_tier(
    setting: VisionCacheMode, needed_bytes: int, missing_bytes: int, free: FreeBytes
) -> CacheTier | None:
    """Choose the fastest storage tier with enough free space: GPU, CPU memory, then disk.

    The setting restricts the choice: `memory` excludes the disk, and `disk` allows only the disk.

    Args:
        needed_bytes: Size of all features.
        missing_bytes: Size of the features that are not yet on disk.
        free: Free bytes in each tier.

    Returns:
        Storage tier; None if no tier fits, or for `never`.
    """
    if setting in ("auto", "memory"):
        if needed_bytes <= MAX_GPU_FRACTION * free.gpu:
            return "gpu"
        if needed_bytes <= MAX_RAM_FRACTION * free.memory:
            return "memory"
    if setting in ("auto", "disk") and missing_bytes <= free.disk:
        return "disk"
    return None


MAX_STORE_BYTES = 64 << 30
"""Maximum size of the feature files of all vision encoders, in bytes."""

MAX_FREE_FRACTION = 0.5
"""Maximum fraction of the free disk space for new feature files."""

_TENSOR_KEY = "features"
_SHA256_KEY = "sha256"


def vision_cache_root() -> Path:
    """Return the root folder of the feature files of all vision encoders."""
    # Imported here, because huggingface_hub is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "vision_cache"


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
        self.root = root
        self.folder = root / encoder_hash
        make_folder(self.folder)
        with translate_os_errors(root):
            self._lock_fd = FileLock(root)
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

        No file is removed while another run uses the store. Only the rank that holds the lock may
        call this.

        Args:
            required_chunks: Names of chunks that must not be removed.

        Returns:
            Number of bytes available for new files.
        """
        is_exclusive = False
        # Fails while another run uses the store, and on a file system without locks.
        with suppress(OSError):
            self._lock_fd.acquire(wait=False)
            is_exclusive = True
        files = []
        for path in self.root.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
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
                    used -= size
                    free += size
        with suppress(OSError):
            self._lock_fd.acquire(shared=True)
        return available_bytes()

    def write(self, name: str, features_MKD: Tensor) -> None:
        """Write the features of a chunk to a file, atomically.

        Args:
            features_MKD: Contiguous CPU tensor.

        Raises:
            UserError: The disk is not writable.
        """
        path = self.chunk_path(name)
        # Runs that share the folder may write the same chunk at the same time.
        temp_path = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with translate_os_errors(path):
                metadata = {_SHA256_KEY: compute_sha256(features_MKD)}
                save_file({_TENSOR_KEY: features_MKD}, temp_path, metadata)
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

    def read(self, name: str, features_MKD: Tensor) -> bool:
        """Read and verify the features of a chunk.

        Args:
            features_MKD: Contiguous CPU tensor that receives the features.

        Returns:
            False if the file is missing or corrupt. A corrupt file is removed.
        """
        path = self.chunk_path(name)
        try:
            with open_tensors(path) as file:
                stored_MKD = file.get_tensor(_TENSOR_KEY)
                digest = (file.metadata() or {}).get(_SHA256_KEY)
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError):
            stored_MKD = torch.empty(0)
            digest = None
        is_valid = (
            stored_MKD.dtype == features_MKD.dtype
            and stored_MKD.shape == features_MKD.shape
            and digest == compute_sha256(stored_MKD)
        )
        # Files of other users may be read-only.
        with suppress(OSError):
            if is_valid:
                os.utime(path)
            else:
                path.unlink()
        if is_valid:
            features_MKD.copy_(stored_MKD)
        return is_valid


def compute_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of the memory of a contiguous CPU tensor."""
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()


@dataclass(frozen=True)
class VisionCacheReader:
    """Reader of the vision cache inputs of a pack in data loader workers.

    It reads features in CPU memory, or indices of features on the GPU.

    Attributes:
        image_index: Unique images of the dataset.
        dtype: Dtype of the inputs.
        token_shape: Shape of the inputs of an image token: (K, D) of features, () of indices.
        features_AKD: Features in CPU memory; None if they are on the GPU or on disk.
    """

    image_index: ImageIndex
    dtype: torch.dtype
    token_shape: tuple[int, ...]
    features_AKD: Tensor | None = field(default=None, kw_only=True)

    def check(self, sample: int, num_features: int) -> None:
        """Verify that a sample can use the cached features of its images.

        Raises:
            CorruptImageError: An image was corrupt, or its number of image tokens has changed.
        """
        if sample in self.image_index.corrupt_samples:
            raise self.image_index.corrupt_samples[sample]
        if num_features != self.count_features([sample]):
            first = self.image_index.image_refs[self.image_indices([sample])[0]]
            raise CorruptImageError(
                f"an image has {num_features} tokens now, and had"
                f" {self.count_features([sample])} when its features were cached",
                where=str(first.span.files[0]),
                expected="unchanged images during the run",
                remedy="start again with --resume to encode the images again",
            )

    def image_indices(self, sample_indices: Sequence[int]) -> list[int]:
        """Return the indices of the images of several samples, in order."""
        images: list[int] = []
        for sample in sample_indices:
            images += self.image_index.images_by_sample[sample]
        return images

    def count_features(self, sample_indices: Sequence[int]) -> int:
        """Return the number of image tokens of several samples."""
        num_features = 0
        for image in self.image_indices(sample_indices):
            num_features += self.image_index.image_refs[image].num_features
        return num_features

    def tensor_spec(self, sample_indices: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return the dtype and shape of the inputs of a pack, [M, ...]."""
        return self.dtype, (self.count_features(sample_indices), *self.token_shape)

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Write the inputs of a pack to a buffer with the dtype and shape of `tensor_spec`.

        Raises:
            UnreadableFileError: A file is missing or truncated.
        """
        images = self.image_indices(sample_indices)
        rows_M = torch.from_numpy(self.image_index.feature_rows(images))
        if self.features_AKD is None:
            buffer.copy_(rows_M)
        else:
            torch.index_select(self.features_AKD, 0, rows_M, out=buffer)


@dataclass(frozen=True)
class VisionDiskReader(VisionCacheReader):
    """Vision cache reader for features on disk.

    Attributes:
        paths: File of each chunk of images.
        first_images: Index of the first image of each chunk.
    """

    paths: Sequence[Path]
    first_images: NDArray[np.int64]

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Read the features of a pack from disk into a buffer, without verifying them."""
        offsets = self.image_index.feature_offsets_P1
        start = 0
        for image in self.image_indices(sample_indices):
            chunk = int(np.searchsorted(self.first_images, image, "right")) - 1
            first_row = offsets[self.first_images[chunk]]
            rows = slice(int(offsets[image] - first_row), int(offsets[image + 1] - first_row))
            stop = start + rows.stop - rows.start
            buffer[start:stop] = self._read_rows(self.paths[chunk], rows)
            start = stop

    def _read_rows(self, path: Path, rows: slice) -> Tensor:
        try:
            with open_tensors(path) as file:
                features_MKD: Tensor = file.get_slice(_TENSOR_KEY)[rows]
        except (SafetensorError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError) and error.errno:
                reason = os.strerror(error.errno)
            raise UnreadableFileError(
                f"cached image features cannot be read: {reason}",
                where=str(path),
                expected="the file as it was at the start of training",
                remedy="start again with --resume to encode missing images again",
            ) from error
        return features_MKD


@dataclass(frozen=True, slots=True)
class VisionCache:
    """Cached features of all images of a run.

    Attributes:
        reader: Reader that the data loader uses.
        features_AKD: Features on the device if the reader sends only indices; otherwise None.
    """

    reader: VisionCacheReader
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
        if self.features_AKD is None:
            return on_device
        return self.features_AKD.index_select(0, on_device)
