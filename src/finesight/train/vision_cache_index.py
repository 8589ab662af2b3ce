"""Index of the unique images of a dataset, split into chunks for encoding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from finesight.data.corpus import Corpus
from finesight.data.image_header import CorruptImageError, sha256_content
from finesight.encode.renderer import Renderer
from finesight.encode.tokenized_sample import VisualSpan
from finesight.errors import UserError
from finesight.train.console import ProgressCallback
from finesight.train.dataloader_workers import catch_user_error, prefetch_items

CHUNK_PATCHES = 16384
"""Number of patches at which a chunk ends; limits the memory for encoding it."""

_SAMPLES_PER_ITEM = 64
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
        return [
            ImageChunk(self._hash_keys(start, stop), start, stop)
            for start, stop in pairwise(chunk_ends)
        ]

    def _hash_keys(self, start: int, stop: int) -> str:
        keys = "".join(image_ref.key for image_ref in self.image_refs[start:stop])
        return hashlib.sha256(keys.encode()).hexdigest()


class _ImageRefDataset(Dataset[list[list[ImageRef] | UserError] | UserError]):
    """Map-style dataset of image references; an item contains up to `_SAMPLES_PER_ITEM` samples."""

    def __init__(self, corpus: Corpus, renderer: Renderer, samples: Sequence[int]) -> None:
        self._corpus, self._renderer, self._samples = corpus, renderer, samples
        self._digests: dict[Path, str] = {}

    def __getitem__(self, item_index: int) -> list[list[ImageRef] | UserError] | UserError:
        start = item_index * _SAMPLES_PER_ITEM
        return [
            self._read_guarded(index) for index in self._samples[start : start + _SAMPLES_PER_ITEM]
        ]

    def _read_guarded(self, index: int) -> list[ImageRef] | UserError:
        return catch_user_error(lambda: self._read_image_refs(index))

    def _read_image_refs(self, index: int) -> list[ImageRef]:
        spans = self._renderer.tokenize(self._corpus[index]).spans
        return [ImageRef(self._compute_key(span), span) for span in spans]

    def _compute_key(self, span: VisualSpan) -> str:
        key_fields = [
            [self._file_digest(file) for file in span.files],
            span.kind,
            span.resized_size,
            span.grid_thw,
        ]
        return hashlib.sha256(json.dumps(key_fields).encode()).hexdigest()

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

    Args:
        corpus: Samples.
        renderer: Tokenizer and image processor.
        samples: Corpus indices of the samples to index.
        num_workers: Number of data loader workers.
        on_progress: Callback for the number of newly hashed samples.

    Raises:
        UserError: A sample has an error other than a corrupt image.
    """
    item_indices = range(-(-len(samples) // _SAMPLES_PER_ITEM))
    source = _ImageRefDataset(corpus, renderer, samples)
    refs_by_sample: dict[int, list[ImageRef]] = {}
    corrupt_samples: dict[int, CorruptImageError] = {}
    indices = iter(samples)
    result_lists: Iterator[list[list[ImageRef] | UserError]] = prefetch_items(
        source, item_indices, min(num_workers, len(item_indices) // 4), pin_memory=False
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
