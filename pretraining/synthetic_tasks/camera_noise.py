"""Simulated camera noise and text colors of synthetic images."""

from __future__ import annotations

import io
import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from synthetic_tasks.backgrounds import compute_luma, sample_color
from synthetic_tasks.canvas import Color

MIN_CONTRAST = 90.0
"""Minimum difference in luma (0 to 255) between text and background."""

_NOISE_SIZE = 512


def sample_ink(background: Color, rng: random.Random) -> Color:
    """Sample a text color with sufficient contrast to the background, mostly black or white."""
    default_ink: Color = (0, 0, 0) if compute_luma(background) > 127 else (255, 255, 255)
    if rng.random() < 0.5:
        return default_ink
    for _ in range(8):
        ink = sample_color(rng)
        if abs(compute_luma(ink) - compute_luma(background)) >= MIN_CONTRAST:
            return ink
    return default_ink


def apply_camera_noise(
    image: Image.Image, rng: random.Random, strength: float = 1.0
) -> Image.Image:
    """Apply blur, noise or JPEG compression to an image, or return it unchanged.

    `strength` scales the effect.
    """
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(strength * rng.uniform(0.3, 0.7)))
    if rng.random() < 0.4:
        image = add_noise(image, strength * rng.uniform(2, 11), rng)
    if rng.random() < 0.25:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=round(100 - strength * rng.uniform(10, 50)))
        image = Image.open(stream).convert("RGB")
    return image


def add_noise(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Add random noise to an image.

    `strength` is the standard deviation on the scale of 0 to 255.
    """
    width, height = image.size
    x, y = rng.randrange(_NOISE_SIZE), rng.randrange(_NOISE_SIZE)
    rows = (np.arange(height) + y) % _NOISE_SIZE
    columns = (np.arange(width) + x) % _NOISE_SIZE
    noise = _noise_texture()[rows[:, None], columns] * np.float32(strength)
    pixels = np.asarray(image, dtype=np.float32) + noise[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _noise_texture() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((_NOISE_SIZE, _NOISE_SIZE), dtype=np.float32)
