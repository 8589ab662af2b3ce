"""Small images, samples and files for tests of data."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finesight.samples.sample import BoxPart, LocatedSample, Sample


def write_gray_image(path: Path, width: int = 40, height: int = 20, gray_level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height), gray_level).save(path)
    return path


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make colored noise: every patch differs from every other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_noise_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    make_noise_image(width, height, seed).save(path)
    return path


def encode_image(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def make_sample(
    name: str,
    folder: Path,
    *content: object,
    answer: str | BoxPart | Sequence[object] | None = None,
) -> LocatedSample:
    """Make a sample from file names (ending in .png), frames of videos, texts and other parts."""
    parts: list[object] = []
    for piece in content:
        if isinstance(piece, tuple):
            parts.append({"type": "video", "frames": piece, "fps": 2.0})
        elif isinstance(piece, str):
            kind = "image" if piece.endswith(".png") else "text"
            parts.append({"type": kind, kind: piece})
        else:
            parts.append(piece)
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if answer is not None:
        answer = [answer] if isinstance(answer, BoxPart) else answer
        messages.append({"role": "assistant", "content": answer})
    return LocatedSample(Sample.model_validate({"id": name, "messages": messages}), folder)
