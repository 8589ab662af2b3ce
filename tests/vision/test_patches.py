"""Patches against the published processor, as whole numbers and so exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.samples.image_file import CorruptImageError
from finesight.settings.config import PixelRange
from finesight.vision.image_processing import (
    PatchConfig,
    compute_resized_size,
    concat_patches,
    first_frame,
    get_frame_size,
    load_image,
    load_patch_config,
    patchify,
    repeat_still_frames,
    unpatchify,
)

RULE = PixelRange(min_pixels=3136, max_pixels=200704)
PROCESSOR = Qwen2VLImageProcessorPil(min_pixels=RULE.min_pixels, max_pixels=RULE.max_pixels)


def expected(image: Image.Image) -> tuple[np.ndarray, tuple[int, ...]]:
    """The processor's patches before it rescales and normalises, and its grid."""
    out = PROCESSOR(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_patches_match_published_processor(mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(len(mode))
    geometry = PatchConfig()
    for number in range(32):
        height, width = (int(side) for side in rng.integers(4, 700 if number % 8 == 0 else 300, 2))
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = Image.fromarray(pixels).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
        path = tmp_path / f"{number}.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
        # Pillow 12 does not read the plain TIFF that it writes of YCbCr.
        image.save(path, **({"compression": "tiff_lzw"} if mode == "YCbCr" else {}))
        size = compute_resized_size((height, width), RULE, geometry.resize_factor)
        one = patchify([load_image(path)], size, geometry)
        ours = repeat_still_frames(one, geometry.patch_dim)
        theirs, grid = expected(Image.open(path))
        assert geometry.compute_grid(size) == grid
        assert one.shape == (len(theirs), geometry.patch_dim // geometry.temporal_patch_size)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("geometry", [PatchConfig(), PatchConfig(4, 2, 3), PatchConfig(8, 1)])
def test_frames_roundtrip_through_patches(geometry: PatchConfig) -> None:
    rng = np.random.default_rng(0)
    size = 2 * geometry.resize_factor, 5 * geometry.resize_factor
    for count in (1, 2, 4):
        noise = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
        frames = [Image.fromarray(frame) for frame in noise]
        grid = geometry.compute_grid(size, count)
        patches = patchify(frames, size, geometry)
        found = unpatchify(repeat_still_frames(patches, geometry.patch_dim), grid, geometry)
        assert len(found) == grid[0] * geometry.temporal_patch_size
        filled = frames + [frames[-1]] * (len(found) - count)
        for ours, theirs in zip(found, filled, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_patches_are_concatenated_with_one_frame() -> None:
    still, other = (np.full((number, 12), number, dtype=np.uint8) for number in (1, 2))
    video = np.arange(72, dtype=np.uint8).reshape(3, 24)
    none = np.empty((0, 24), dtype=np.uint8)
    assert concat_patches([still, none, other]).tolist() == [*still.tolist(), *other.tolist()]
    mixed = concat_patches([still, video])
    assert mixed.shape == (4, 24)
    assert mixed[0].tolist() == [1] * 24
    assert mixed[1:].tolist() == video.tolist()
    assert concat_patches([none]).shape == concat_patches([none, none]).shape == (0, 24)
    out = np.zeros((3, 12), dtype=np.uint8)
    assert concat_patches([still, other], out) is out
    assert out.tolist() == [*still.tolist(), *other.tolist()]
    assert repeat_still_frames(np.arange(6, dtype=np.uint8)[None], 12).tolist() == [
        [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
    ]
    for frames in (1, 2):
        repeated = repeat_still_frames(still, 12 * frames)
        assert first_frame(repeated, patch=2).tolist() == still.tolist()


@pytest.mark.parametrize("geometry", [PatchConfig(4, 2, 2), PatchConfig(8, 1, 1)])
def test_patch_value_order(geometry: PatchConfig) -> None:
    p, m, depth = geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size
    size = (p * m * 2, p * m * 3)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(3)]
    patches = patchify([Image.fromarray(frame) for frame in frames], size, geometry)
    t, h, w = geometry.compute_grid(size, 3)
    assert patches.shape == (t * h * w, geometry.patch_dim)
    assert geometry.count_tokens((t, h, w)) == t * 6
    filled = [*frames, frames[-1]]
    # Patches are ordered by frame pair, merged block and patch, values by channel and frame.
    values = np.stack(filled[: t * depth]).reshape(t, depth, h // m, m, p, w // m, m, p, 3)
    ordered = values.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    np.testing.assert_array_equal(patches, ordered.reshape(len(patches), -1))


def test_patch_geometry_of_model(tmp_path: Path) -> None:
    def write_config(vision: dict[str, int] | None) -> None:
        config = {"model_type": "qwen2_vl", "vision_config": vision}
        (tmp_path / "config.json").write_text(json.dumps(config))

    write_config({"patch_size": 14, "spatial_merge_size": 2})
    assert load_patch_config(ModelFolder(tmp_path)) == PatchConfig(14, 2, 2)
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    with pytest.raises(UserError, match=r"patch_size 16 in .* patch_size 14 under"):
        load_patch_config(ModelFolder(tmp_path))
    write_config({"patch_size": 16, "spatial_merge_size": 1})
    with pytest.raises(UserError, match=r"merge_size 2 in .* spatial_merge_size 1 under"):
        load_patch_config(ModelFolder(tmp_path))
    # Whether there is a vision_config at all is the model's to say.
    write_config(None)
    assert load_patch_config(ModelFolder(tmp_path)) == PatchConfig(16, 2, 2)


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
