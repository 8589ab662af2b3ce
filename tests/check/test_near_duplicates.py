"""Near duplicates: re-encoded images match, slightly different images do not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from shape_images import write_shape_images

from finesight.check.image_catalog import (
    NearDuplicateIndex,
    compute_thumbnail,
    has_contrast,
    is_same_image,
)
from finesight.vision.image_processing import load_image


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = write_shape_images(tmp_path_factory.mktemp("alike") / "scenes", 60, seed=2)
    return sorted((folder / "images").iterdir())


def reencode(path: Path, out: Path, kind: str, scale: float = 1.0, quality: int = 50) -> Path:
    image = Image.open(path).convert("RGB")
    size = [max(1, round(side * scale)) for side in image.size]
    buffer = io.BytesIO()
    image.resize((size[0], size[1])).save(buffer, kind, quality=quality)
    out.write_bytes(buffer.getvalue())
    return out


def build_index(paths: list[Path]) -> NearDuplicateIndex:
    images = [load_image(path) for path in paths]
    return NearDuplicateIndex(
        [compute_thumbnail(i) for i in images], [(i.height, i.width) for i in images]
    )


def find_candidates(index: NearDuplicateIndex, path: Path) -> list[int]:
    image = load_image(path, min_side=64)
    size = load_image(path).size
    return index.find_similar(compute_thumbnail(image), (size[1], size[0]))


@pytest.mark.parametrize(
    ("kind", "scale", "quality"),
    [("JPEG", 1.0, 40), ("JPEG", 0.7, 75), ("JPEG", 1.25, 85), ("PNG", 0.9, 0), ("WEBP", 1.0, 60)],
)
def test_reencoded_image_is_found_as_duplicate(scenes, tmp_path, kind, scale, quality):
    index = build_index(scenes)
    for location in range(0, len(scenes), 6):
        copy = reencode(scenes[location], tmp_path / f"{location}.{kind}", kind, scale, quality)
        found = find_candidates(index, copy)
        assert location in found[:2], f"{scenes[location].name} as {kind} is not among {found}"
        assert is_same_image(scenes[location], copy), f"{scenes[location].name} as {kind}"


def test_different_scenes_are_not_duplicates(scenes):
    index = build_index(scenes)
    pairs = [
        (a, b) for a in range(len(scenes)) for b in find_candidates(index, scenes[a]) if b != a
    ]
    same = [(a, b) for a, b in pairs if is_same_image(scenes[a], scenes[b])]
    assert same == []


def formula(path: Path, words: str) -> Path:
    image = Image.new("L", (320, 48), 255)
    ImageDraw.Draw(image).text((8, 12), words, fill=0, font_size=20)
    image.save(path)
    return path


@pytest.mark.parametrize("other", ["a + b = 7 - c / 4 + x", "a + b = 3 - d / 4 + x"])
def test_one_changed_character_is_not_a_duplicate(tmp_path, other):
    one = formula(tmp_path / "one.png", "a + b = 3 - c / 4 + x")
    two = formula(tmp_path / "two.png", other)
    assert find_candidates(build_index([one]), two) == [0], "they look alike"
    assert not is_same_image(one, two)
    assert is_same_image(one, reencode(one, tmp_path / "one.jpg", "JPEG", 1.0, 60))


def test_changed_color_is_not_a_duplicate(tmp_path):
    # The same brightness: only the colours tell them apart.
    for name, colour in (("one", (200, 60, 60)), ("two", (60, 122, 106))):
        image = Image.new("RGB", (160, 120), (250, 250, 250))
        ImageDraw.Draw(image).ellipse((30, 30, 110, 100), fill=colour)
        image.save(tmp_path / f"{name}.png")
    assert not is_same_image(tmp_path / "one.png", tmp_path / "two.png")


def test_blank_page_has_no_duplicates(tmp_path):
    blank = tmp_path / "blank.png"
    Image.new("L", (100, 50), 255).save(blank)
    assert not has_contrast(compute_thumbnail(Image.open(blank)))
    assert find_candidates(build_index([blank]), blank) == []


def test_different_aspect_ratio_is_not_a_duplicate(scenes, tmp_path):
    wide = tmp_path / "wide.png"
    Image.open(scenes[0]).resize((336, 168)).save(wide)
    assert find_candidates(build_index(scenes), wide) == []


def test_index_finds_all_near_thumbnails():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (200, 256)).astype(np.uint8)
    near = (grey.astype(np.int16) + rng.integers(-3, 4, grey.shape)).clip(0, 255).astype(np.uint8)
    index = NearDuplicateIndex([row.tobytes() for row in grey], [(100, 200)] * 200)
    for location, row in enumerate(near):
        assert index.find_similar(row.tobytes(), (100, 200)) == [location]


def test_real_images_are_distinguished(shared: Path):
    paths = sorted((shared / "data").glob("*/images/*"))[::3]
    index = build_index(paths)
    same = [
        (paths[a].name, paths[b].name)
        for a in range(len(paths))
        for b in find_candidates(index, paths[a])[:16]
        if a < b and is_same_image(paths[a], paths[b])
    ]
    assert same == []
