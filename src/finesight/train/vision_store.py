"""Cached image features of a frozen vision encoder, with a reader for each storage tier.

Shapes: P unique images, M image tokens of a pack, A image tokens of all images, K features per
token, D width.
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
        dtype: Dtype of the features.
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
        device: Device of the model.
        features_AKD: Features on the device if the reader sends only indices; otherwise None.
    """

    reader: VisionIndexReader
    device: torch.device
    features_AKD: Tensor | None = None

    def load_features(self, cache_inputs: Tensor) -> Tensor:
        """Return the image features [M, K, D] of a pack on the device, without synchronization.

        Args:
            cache_inputs: Features or feature indices that the data loader has sent.
        """
        on_device = cache_inputs.to(self.device, non_blocking=True)
        return (
            on_device if self.features_AKD is None else self.features_AKD.index_select(0, on_device)
        )
