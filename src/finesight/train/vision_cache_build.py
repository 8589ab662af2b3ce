"""Builder of the vision cache: encodes images in chunks and stores their features.

Shapes: N patches, M image tokens of a chunk, A image tokens of all images, K features per token, D
width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finesight.config import VisionCacheMode
from finesight.data.image_header import CorruptImageError
from finesight.encode.packing import pad_patches
from finesight.encode.renderer import Renderer
from finesight.encode.tokenized_sample import TokenizedSample
from finesight.errors import UserError
from finesight.model.vlm import VisionLanguageModel
from finesight.train.dataloader import TensorBlock, prefetch_items
from finesight.train.train_state import TrainState
from finesight.train.vision_store import (
    ImageChunk,
    ImageIndex,
    StoredChunk,
    VisionCache,
    VisionDiskReader,
    VisionFileStore,
    VisionIndexReader,
    VisionRamReader,
)
from finesight.vision.patches import concat_patches, concat_shape

CacheTier = Literal["gpu", "memory", "disk"]

MAX_GPU_FRACTION = 1 / 16
"""Maximum fraction of the free GPU memory, after loading the model, for cached features.

Training and evaluation need an unknown amount of the rest, and the other tiers are fast enough as
well.
"""

MAX_RAM_FRACTION = 1 / 2
"""Maximum fraction of the available CPU memory for cached features."""


@dataclass(frozen=True, slots=True)
class FreeBytes:
    """Free bytes for cached features in each storage tier.

    Attributes:
        gpu: GPU memory; None without a GPU.
        memory: CPU memory per rank.
        disk: Disk space.
    """

    gpu: int | None
    memory: int
    disk: int


def estimate_feature_bytes(num_patches: int, model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Compute the size in bytes of the cached features of a number of patches.

    The weights of the model are not read. The result is an upper bound if samples share images.
    """
    vision_encoder, decoder_config = model.visual, model.config.decoder
    num_features = num_patches // vision_encoder.config.merge_size**2
    return (
        num_features
        * vision_encoder.features_per_token
        * decoder_config.hidden_size
        * dtype.itemsize
    )


def choose_cache_tier(
    setting: VisionCacheMode, needed_bytes: int, missing_bytes: int, free: FreeBytes
) -> CacheTier | None:
    """Choose the fastest storage tier with enough free space: GPU, CPU memory, then disk.

    The setting restricts the choice: `memory` excludes the disk, and `disk` allows only the disk.

    Args:
        setting: Value of `train.vision_cache`.
        needed_bytes: Size of all features.
        missing_bytes: Size of the features that are not yet on disk.
        free: Free bytes in each tier.

    Returns:
        Storage tier; None if no tier fits, or for `never`.
    """
    if setting == "never":
        return None
    fits_on_disk = missing_bytes <= free.disk
    if setting == "disk":
        return "disk" if fits_on_disk else None
    if free.gpu is not None and needed_bytes <= MAX_GPU_FRACTION * free.gpu:
        return "gpu"
    if needed_bytes <= MAX_RAM_FRACTION * free.memory:
        return "memory"
    return "disk" if setting == "auto" and fits_on_disk else None


def free_gpu_memory(device: torch.device) -> int | None:
    """Return the bytes of GPU memory available to this process; None on a CPU.

    Memory that PyTorch has cached but does not use counts as available.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


MAX_PENDING_CHUNKS = 8
"""Maximum number of chunks that wait to be written to disk; limits memory."""

NUM_WRITER_THREADS = 2
"""Number of threads that write chunks to disk."""


CorruptImages = Mapping[int, CorruptImageError]
"""Errors of corrupt images, by index of the image in an `ImageIndex`."""


class ChunkFeatures(NamedTuple):
    """Image features of a chunk; features of corrupt images are zero."""

    chunk: ImageChunk
    features_MKD: Tensor
    corrupt_images: CorruptImages


@dataclass(frozen=True, slots=True)
class DecodedChunk:
    """Patches of the valid images of a chunk, and errors of corrupt ones."""

    chunk: ImageChunk
    patches: TensorBlock
    corrupt_images: CorruptImages

    @property
    def valid_indices(self) -> list[int]:
        """Indices of the images that could be decoded."""
        image_indices = range(self.chunk.start, self.chunk.stop)
        return [
            image_index for image_index in image_indices if image_index not in self.corrupt_images
        ]

    def pin_memory(self) -> DecodedChunk:
        """Return a copy in pinned memory; PyTorch's data loader calls this method."""
        return replace(self, patches=self.patches.pin_memory())


def _decode_chunk(
    image_index: ImageIndex,
    chunks: Sequence[ImageChunk],
    renderer: Renderer,
    on_invalid_sample: Literal["skip", "fail"],
    index: int,
) -> DecodedChunk:
    chunk, patches, corrupt_images = chunks[index], [], {}
    empty_ids_T, position_ids = np.empty(0, dtype=np.int32), np.empty((3, 0), dtype=np.int32)
    for image in range(chunk.start, chunk.stop):
        span = image_index.image_refs[image].span
        # A sample with this image and no text.
        tokenized = TokenizedSample(
            span.files[0].name, empty_ids_T, empty_ids_T > 0, position_ids, (span,)
        )
        try:
            patches.append(renderer.load_patches(tokenized).patches_ND)
        except CorruptImageError as error:
            if on_invalid_sample == "fail":
                raise
            corrupt_images[image] = error
    if not patches:
        no_patches = TensorBlock(((torch.uint8, (0, 0)),), torch.empty(0, dtype=torch.uint8))
        return DecodedChunk(chunk, no_patches, corrupt_images)
    block = TensorBlock.allocate((torch.uint8, concat_shape(patches)))
    concat_patches(patches, next(block.tensors()).numpy())
    return DecodedChunk(chunk, block, corrupt_images)


def read_image_chunks(
    state: TrainState, image_index: ImageIndex, chunks: Sequence[ImageChunk]
) -> Generator[DecodedChunk, None, None]:
    """Decode the images of chunks in worker processes.

    Close the generator to end the workers.

    Raises:
        UserError: An image is corrupt and `on_invalid_sample` is `fail`.
    """
    on_invalid_sample = state.recipe.data.on_invalid_sample
    decode_chunk = partial(_decode_chunk, image_index, chunks, state.renderer, on_invalid_sample)
    num_workers, pin_memory = state.hardware.num_workers, state.hardware.device.type == "cuda"
    decoded_chunks = prefetch_items(
        decode_chunk, range(len(chunks)), min(num_workers, len(chunks)), pin_memory
    )
    return (chunk for chunk in decoded_chunks)


class FeatureWriter:
    """Writer of image features to disk in background threads; call `close` to end them."""

    def __init__(self, store: VisionFileStore, on_error: Callable[[UserError], None]) -> None:
        """Start the threads.

        Args:
            store: Feature files on disk.
            on_error: Callback for the first error, after which no more files are written.
        """
        self._store, self._on_error, self._is_active = store, on_error, True
        self._pool = ThreadPoolExecutor(NUM_WRITER_THREADS)
        self._pending: deque[tuple[ImageChunk, Future[StoredChunk]]] = deque()
        self._stored: dict[ImageChunk, StoredChunk] = {}

    def write(self, chunk: ImageChunk, features_MKD: Tensor, name: str) -> None:
        """Queue the features of a chunk for writing; blocks while the queue is full.

        Args:
            chunk: Chunk of images.
            features_MKD: Features on the CPU.
            name: File name without extension.
        """
        if self._is_active:
            self._pending.append((chunk, self._pool.submit(self._store.write, name, features_MKD)))
        if len(self._pending) > MAX_PENDING_CHUNKS:
            self._wait_oldest()

    def flush(self) -> Mapping[ImageChunk, StoredChunk]:
        """Wait for all queued chunks, and return all files written so far."""
        while self._pending:
            self._wait_oldest()
        return self._stored

    def close(self) -> None:
        """End the threads; queued chunks are discarded."""
        self._pool.shutdown(cancel_futures=True)

    def _wait_oldest(self) -> None:
        chunk, future = self._pending.popleft()
        try:
            self._stored[chunk] = future.result()
        except UserError as error:
            if self._is_active:
                self._is_active = False
                self._on_error(error)


class VisionCacheBuilder:
    """Collector of the image features of all chunks in one storage tier.

    `load_chunk` reads features from disk. `encode_chunk` and `store_chunk` compute and store the
    missing ones.
    """

    def __init__(self, state: TrainState, image_index: ImageIndex, tier: CacheTier) -> None:
        model, hardware = state.model, state.hardware
        assert isinstance(model, VisionLanguageModel), (
            "a vision encoder without native implementation"
        )
        self._state, self._model, self._image_index, self.tier = state, model, image_index, tier
        self._feature_offsets_P1 = image_index.feature_offsets_P1
        self._feature_shape = model.visual.features_per_token, model.config.decoder.hidden_size
        self._corrupt_images: dict[int, CorruptImageError] = {}
        self._loaded_chunks: dict[ImageChunk, StoredChunk] = {}
        self._pending: tuple[ChunkFeatures, torch.cuda.Event | None] | None = None
        num_features = 0 if tier == "disk" else int(self._feature_offsets_P1[-1])
        device = hardware.device if tier == "gpu" else torch.device("cpu")
        self._features_AKD = torch.empty(
            (num_features, *self._feature_shape), dtype=hardware.dtype, device=device
        )

    def load_chunk(self, store: VisionFileStore, chunk: ImageChunk) -> bool:
        """Load the features of a chunk from disk.

        Returns False if the file is missing or corrupt.
        """
        reads_directly = self.tier == "memory"
        shape = (self._count_features(chunk), *self._feature_shape)
        buffer = (
            self._chunk_view(chunk)
            if reads_directly
            else torch.empty(shape, dtype=self._features_AKD.dtype)
        )
        stored = store.read(chunk.name, buffer)
        if stored is None:
            return False
        if self.tier == "gpu":
            self._chunk_view(chunk).copy_(buffer)
        self._loaded_chunks[chunk] = stored
        return True

    @torch.no_grad()
    def encode_chunk(self, decoded_chunk: DecodedChunk) -> ChunkFeatures:
        """Encode the images of a chunk with the vision encoder."""
        return ChunkFeatures(
            decoded_chunk.chunk, self._encode_features(decoded_chunk), decoded_chunk.corrupt_images
        )

    def allocate_chunk(self, chunk: ImageChunk) -> ChunkFeatures:
        """Allocate uninitialized features for a chunk that another rank encodes."""
        device, dtype = self._state.hardware.device, self._features_AKD.dtype
        shape = (self._count_features(chunk), *self._feature_shape)
        return ChunkFeatures(chunk, torch.empty(shape, dtype=dtype, device=device), {})

    def store_all(self, results: Iterable[ChunkFeatures], writer: FeatureWriter | None) -> None:
        """Store the features of several chunks in the tier."""
        for result in results:
            self.store_chunk(result, writer)

    def store_chunk(self, result: ChunkFeatures, writer: FeatureWriter | None) -> None:
        """Start storing the features of a chunk, and finish storing the previous chunk.

        The copy of the previous chunk overlaps with the computation of the next one.

        Args:
            result: Features of the chunk.
            writer: Writer for the disk; None if this rank writes no files.
        """
        features_MKD = result.features_MKD
        self._corrupt_images |= result.corrupt_images
        event = None
        if self.tier == "gpu":
            self._chunk_view(result.chunk).copy_(features_MKD)
        if features_MKD.is_cuda and (self.tier != "gpu" or writer is not None):
            features_MKD = features_MKD.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.flush(writer)
        self._pending = result._replace(features_MKD=features_MKD), event

    def flush(self, writer: FeatureWriter | None) -> None:
        """Finish storing the features of the last chunk."""
        if self._pending is None:
            return
        ((chunk, features_MKD, corrupt_images), event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        if self.tier == "memory":
            features_MKD = self._chunk_view(chunk).copy_(features_MKD)
        # Incomplete chunks are private to this run; other runs must detect corrupt images.
        name = chunk.name + "-corrupt" * bool(corrupt_images)
        if writer is not None and (not corrupt_images or self.tier == "disk"):
            writer.write(chunk, features_MKD, name)

    def build(self, written: Mapping[ImageChunk, StoredChunk]) -> VisionCache:
        """Create the vision cache after all chunks are stored.

        Args:
            written: Files of the chunks that were encoded in this run.
        """
        image_index, device = self._mark_corrupt_samples(), self._state.hardware.device
        if self.tier == "gpu":
            return VisionCache(
                VisionIndexReader(image_index, self._feature_offsets_P1), device, self._features_AKD
            )
        if self.tier == "memory":
            return VisionCache(
                VisionRamReader(image_index, self._feature_offsets_P1, self._features_AKD), device
            )
        stored = {**self._loaded_chunks, **written}
        chunks = sorted(stored, key=lambda chunk: chunk.start)
        first_images = np.array([chunk.start for chunk in chunks])
        store = [stored[chunk] for chunk in chunks]
        dtype = self._features_AKD.dtype
        return VisionCache(
            VisionDiskReader(
                image_index,
                self._feature_offsets_P1,
                store,
                first_images,
                self._feature_shape,
                dtype,
            ),
            device,
        )

    def _mark_corrupt_samples(self) -> ImageIndex:
        """Return the image index with the samples marked that contain a corrupt image."""
        corrupt_samples = {
            sample: self._corrupt_images[image_index]
            for sample, image_indices in self._image_index.images_by_sample.items()
            for image_index in image_indices
            if image_index in self._corrupt_images
        }
        return replace(
            self._image_index,
            corrupt_samples={**self._image_index.corrupt_samples, **corrupt_samples},
        )

    def _encode_features(self, decoded_chunk: DecodedChunk) -> Tensor:
        """Encode a chunk to features [M, K, D] on the device.

        The features of corrupt images are zero.
        """
        state, image_refs, valid_indices = (
            self._state,
            self._image_index.image_refs,
            decoded_chunk.valid_indices,
        )
        shape = (self._count_features(decoded_chunk.chunk), *self._feature_shape)
        device, dtype = state.hardware.device, self._features_AKD.dtype
        if not valid_indices:
            return torch.zeros(shape, dtype=dtype, device=device)
        (patches_ND,) = decoded_chunk.patches.tensors()
        grids = tuple(image_refs[image_index].span.grid_thw for image_index in valid_indices)
        if state.pads_shapes and state.padding_merge_size is not None:
            patches_ND, grids = pad_patches(patches_ND, grids, state.padding_merge_size)
        features_MKD = self._model.encode_images(patches_ND.to(device, non_blocking=True), grids)
        if len(valid_indices) == decoded_chunk.chunk.stop - decoded_chunk.chunk.start:
            return features_MKD[: shape[0]]
        padded_MKD = torch.zeros(shape, dtype=dtype, device=device)
        counts = [image_refs[image_index].num_features for image_index in valid_indices]
        first_offset = self._feature_offsets_P1[decoded_chunk.chunk.start]
        # Exclude the features of padding patches.
        image_features = torch.split(features_MKD[: sum(counts)], counts)
        for image_index, features in zip(valid_indices, image_features, strict=True):
            start = int(self._feature_offsets_P1[image_index] - first_offset)
            padded_MKD[start : start + len(features)] = features
        return padded_MKD

    def _count_features(self, chunk: ImageChunk) -> int:
        return int(self._feature_offsets_P1[chunk.stop] - self._feature_offsets_P1[chunk.start])

    def _chunk_view(self, chunk: ImageChunk) -> Tensor:
        return self._features_AKD[
            self._feature_offsets_P1[chunk.start] : self._feature_offsets_P1[chunk.stop]
        ]
