"""Cached features of a frozen vision encoder, in one of three storage tiers.

Shapes: P unique images, M image tokens of a pack, A image tokens of all images, K features per
token,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.data.image_header import CorruptImageError
from finesight.train.dataloader import TensorSpec, VisionCacheReader
from finesight.train.vision_cache_index import ImageIndex
from finesight.train.vision_store_files import StoredChunk, read_rows


@dataclass(frozen=True)
class VisionIndexReader(VisionCacheReader):
    """Reader for features on the GPU: the data loader only sends feature indices.

    `feature_offsets_P1` is the start of each image, and the total number of features.
    """

    image_index: ImageIndex
    feature_offsets_P1: NDArray[np.int64]

    def check(self, sample: int, num_features: int) -> None:
        """Verify that the cached features of a sample are usable.

        Raises:
            CorruptImageError: An image was corrupt, or its number of features has changed.
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
        """Return the image indices of these samples in order."""
        return [
            image_index
            for sample in sample_indices
            for image_index in self.image_index.images_by_sample[sample]
        ]

    def count_features(self, sample_indices: Sequence[int]) -> int:
        """Return M of these samples."""
        image_refs = self.image_index.image_refs
        return sum(
            image_refs[image_index].num_features
            for image_index in self.image_indices(sample_indices)
        )

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        """Return int64 [M]."""
        return torch.int64, (self.count_features(sample_indices),)

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Write the feature indices of the images in order."""
        offsets = self.feature_offsets_P1
        ranges = [np.arange(offsets[n], offsets[n + 1]) for n in self.image_indices(sample_indices)]
        if ranges:
            np.concatenate(ranges, out=buffer.numpy())


@dataclass(frozen=True)
class VisionRamReader(VisionIndexReader):
    """Reader for features [A, K, D] in shared memory: the data loader sends the features."""

    features_AKD: Tensor

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        """Return the feature dtype and [M, K, D]."""
        return self.features_AKD.dtype, (
            self.count_features(sample_indices),
            *self.features_AKD.shape[1:],
        )

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Copy the features to the buffer."""
        indices_M = torch.empty(len(buffer), dtype=torch.int64)
        super().write_to(sample_indices, indices_M)
        torch.index_select(self.features_AKD, 0, indices_M, out=buffer)


@dataclass(frozen=True)
class VisionDiskReader(VisionIndexReader):
    """Reader for features on disk, one file per chunk: the data loader sends the features.

    `first_images` are the first image indices of the chunks, and `feature_shape` is (K, D).
    """

    files: Sequence[StoredChunk]
    first_images: NDArray[np.int64]
    feature_shape: tuple[int, int]
    dtype: torch.dtype

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        """Return the feature dtype and [M, K, D]."""
        return self.dtype, (self.count_features(sample_indices), *self.feature_shape)

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        """Read the features into the buffer.

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
    """Cached features of all images.

    `features_AKD` are on the device if the reader only sends indices.
    """

    reader: VisionIndexReader
    device: torch.device
    features_AKD: Tensor | None = None

    def load_features(self, cache_inputs: Tensor) -> Tensor:
        """Return features [M, K, D] of a pack on the device, without synchronization."""
        on_device = cache_inputs.to(self.device, non_blocking=True)
        return (
            on_device if self.features_AKD is None else self.features_AKD.index_select(0, on_device)
        )
