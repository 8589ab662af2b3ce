"""A picture saved anew is known again; one that differs a little is not taken for it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from shape_pictures import draw_scenes

from finesight.check.alike import Lookalikes, same_picture, shows_something, thumbnail
from finesight.vision.picture import open_picture


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = draw_scenes(tmp_path_factory.mktemp("alike") / "scenes", 60, seed=2)
    return sorted((folder / "pictures").iterdir())


def resaved(path: Path, out: Path, kind: str, scale: float = 1.0, quality: int = 50) -> Path:
    image = Image.open(path).convert("RGB")
    size = [max(1, round(side * scale)) for side in image.size]
    buffer = io.BytesIO()
    image.resize((size[0], size[1])).save(buffer, kind, quality=quality)
    out.write_bytes(buffer.getvalue())
    return out


def index_of(paths: list[Path]) -> Lookalikes:
    images = [open_picture(path) for path in paths]
    return Lookalikes([thumbnail(i) for i in images], [(i.height, i.width) for i in images])


def places(index: Lookalikes, path: Path) -> list[int]:
    image = open_picture(path, at_least=64)
    size = open_picture(path).size
    return index.of(thumbnail(image), (size[1], size[0]))


@pytest.mark.parametrize(
    ("kind", "scale", "quality"),
    [("JPEG", 1.0, 40), ("JPEG", 0.7, 75), ("JPEG", 1.25, 85), ("PNG", 0.9, 0), ("WEBP", 1.0, 60)],
)
def test_saved_anew_is_found_and_confirmed(scenes, tmp_path, kind, scale, quality):
    index = index_of(scenes)
    for place in range(0, len(scenes), 6):
        copy = resaved(scenes[place], tmp_path / f"{place}.{kind}", kind, scale, quality)
        found = places(index, copy)
        assert place in found[:2], f"{scenes[place].name} as {kind} is not among {found}"
        assert same_picture(scenes[place], copy), f"{scenes[place].name} as {kind}"


def test_different_scenes_are_not_the_same(scenes):
    index = index_of(scenes)
    pairs = [(a, b) for a in range(len(scenes)) for b in places(index, scenes[a]) if b != a]
    same = [(a, b) for a, b in pairs if same_picture(scenes[a], scenes[b])]
    assert same == []


def formula(path: Path, words: str) -> Path:
    image = Image.new("L", (320, 48), 255)
    ImageDraw.Draw(image).text((8, 12), words, fill=0, font_size=20)
    image.save(path)
    return path


@pytest.mark.parametrize("other", ["a + b = 7 - c / 4 + x", "a + b = 3 - d / 4 + x"])
def test_one_exchanged_character_makes_another_picture(tmp_path, other):
    one = formula(tmp_path / "one.png", "a + b = 3 - c / 4 + x")
    two = formula(tmp_path / "two.png", other)
    assert places(index_of([one]), two) == [0], "they look alike"
    assert not same_picture(one, two)
    assert same_picture(one, resaved(one, tmp_path / "one.jpg", "JPEG", 1.0, 60))


def test_another_colour_makes_another_picture(tmp_path):
    # The same brightness: only the colours tell them apart.
    for name, colour in (("one", (200, 60, 60)), ("two", (60, 122, 106))):
        image = Image.new("RGB", (160, 120), (250, 250, 250))
        ImageDraw.Draw(image).ellipse((30, 30, 110, 100), fill=colour)
        image.save(tmp_path / f"{name}.png")
    assert not same_picture(tmp_path / "one.png", tmp_path / "two.png")


def test_a_blank_page_looks_like_nothing(tmp_path):
    blank = tmp_path / "blank.png"
    Image.new("L", (100, 50), 255).save(blank)
    assert not shows_something(thumbnail(Image.open(blank)))
    assert places(index_of([blank]), blank) == []


def test_another_shape_looks_like_nothing(scenes, tmp_path):
    wide = tmp_path / "wide.png"
    Image.open(scenes[0]).resize((336, 168)).save(wide)
    assert places(index_of(scenes), wide) == []


def test_the_index_loses_no_thumbnail_that_is_near_enough():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (200, 256)).astype(np.uint8)
    near = (grey.astype(np.int16) + rng.integers(-3, 4, grey.shape)).clip(0, 255).astype(np.uint8)
    index = Lookalikes([row.tobytes() for row in grey], [(100, 200)] * 200)
    for place, row in enumerate(near):
        assert index.of(row.tobytes(), (100, 200)) == [place]


def test_real_pictures_are_told_apart(shared: Path):
    paths = sorted((shared / "data").glob("*/images/*"))[::3]
    index = index_of(paths)
    same = [
        (paths[a].name, paths[b].name)
        for a in range(len(paths))
        for b in places(index, paths[a])[:16]
        if a < b and same_picture(paths[a], paths[b])
    ]
    assert same == []
