"""Detect re-encoded copies of an image, such as another JPEG quality or a slight resize.

Images are compared in two steps: by 16 x 16 grayscale thumbnails, then in detail by patches of 8 x
8 pixels. Many different forms, receipts and formulas have similar thumbnails. Re-encoding changes
all textured patches slightly, while a single changed character changes one patch strongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.vision.image_processing import load_image

THUMBNAIL_SIZE = 16
"""Side length of a square thumbnail in pixels; the aspect ratio is not preserved."""

ImageSize = tuple[int, int]
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
    return (
        image.convert("L")
        .resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BICUBIC)
        .tobytes()
    )


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
        return [
            int(self._order[index]) for index in candidates[np.argsort(distance, kind="stable")]
        ]


def _decode_thumbnails(thumbnails: Sequence[bytes]) -> NDArray[np.float32]:
    gray = np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(
        -1, THUMBNAIL_SIZE * THUMBNAIL_SIZE
    )
    return gray.astype(np.float32)


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
