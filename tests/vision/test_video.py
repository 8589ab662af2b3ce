"""Videos as frames: sizes, pairs along time, the published video processor."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finesight.data.image_header import CorruptImageError
from finesight.vision.image_processing import PatchConfig, get_frame_size, load_image, patchify


def write_frames(folder: Path, count: int, size: tuple[int, int] = (56, 84)) -> list[Path]:
    rng = np.random.default_rng(count)
    files = [folder / f"{number}.png" for number in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return files


def test_frames_are_paired_and_padded(tmp_path: Path) -> None:
    files, geometry = write_frames(tmp_path, 3), PatchConfig()
    patches = patchify([load_image(file) for file in files], (56, 84), geometry)
    assert patches.shape == (2 * 4 * 6, 1176)
    by_frame = patches.reshape(2, 24, 3, 2, 196).transpose(0, 3, 1, 2, 4)
    stills = [patchify([Image.open(file)], (56, 84), geometry) for file in (*files, files[-1])]
    for number, still in enumerate(stills):
        one = still.reshape(24, 3, 196)
        np.testing.assert_array_equal(by_frame[number // 2, number % 2], one)


def test_frames_must_have_equal_size(tmp_path: Path) -> None:
    files = write_frames(tmp_path, 3)
    assert get_frame_size(files) == (56, 84)
    Image.new("RGB", (84, 57)).save(files[2])
    message = "84 x 57 pixels, but the first frame has 84 x 56"
    with pytest.raises(CorruptImageError, match=message) as raised:
        get_frame_size(files)
    assert raised.value.where == str(files[2])
    files[1].unlink()
    with pytest.raises(CorruptImageError):
        get_frame_size(files)
