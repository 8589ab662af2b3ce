"""Drawn scenes: the labels say where the colours are, and the file imports."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from finesight.data.generated import (
    CELL,
    COLOURS,
    LABELS,
    MOST,
    SHAPES,
    SIDE,
    Shape,
    draw,
    draw_scenes,
)
from finesight.data.importing import import_file
from finesight.data.jsonl import read_samples
from finesight.data.opening import Request
from finesight.data.sample import BoxPart
from finesight.errors import UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw_scenes(tmp_path_factory.mktemp("drawn") / "scenes", 60, seed=3)


def _rows(folder):
    return [json.loads(line) for line in (folder / LABELS).read_text().splitlines()]


def test_each_row_has_a_picture_and_a_box_for_each_shape(scenes):
    rows = _rows(scenes)
    assert len(rows) == 60
    assert {len(row["shapes"]) for row in rows} == set(range(1, MOST + 1))
    for row in rows:
        assert len(row["boxes"]) == len(row["shapes"])
        assert Image.open(scenes / row["picture"]).size == (SIDE, SIDE)


def test_every_shape_and_colour_occurs(scenes):
    words = {word for row in _rows(scenes) for shape in row["shapes"] for word in shape.split()}
    assert words == {*SHAPES, *COLOURS}


def test_shapes_stand_apart_from_left_to_right_inside_the_picture(scenes):
    for row in _rows(scenes):
        cells = [(x // CELL, y // CELL) for x, y, _, _ in row["boxes"]]
        assert cells == sorted(cells)
        covered = np.zeros((SIDE, SIDE), int)
        for x, y, width, height in row["boxes"]:
            assert 0 <= x < x + width <= SIDE
            assert 0 <= y < y + height <= SIDE
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("corners", [(10, 20, 60, 70), (0, 0, 40, 40), (71, 71, 112, 112)])
def test_a_shape_fills_its_box_and_nothing_else(name, corners):
    picture = np.asarray(draw([Shape("blue", name, corners)], (255, 255, 255)), dtype=int)
    inked = (np.abs(picture - 255).sum(-1) > 60).nonzero()
    y1, x1, y2, x2 = (int(v) for axis in (np.min, np.max) for v in map(axis, inked))
    assert np.allclose([x1, y1, x2 + 1, y2 + 1], corners, atol=1), (x1, y1, x2 + 1, y2 + 1)
    strongest = np.abs(picture - np.array(COLOURS["blue"])).sum(-1).min()
    assert strongest == 0, "the colour itself is there"


def test_same_seed_same_bytes_and_another_seed_another_task(scenes, tmp_path):
    again = draw_scenes(tmp_path / "again", 60, seed=3)
    for path in (path for path in scenes.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(scenes)).read_bytes(), path
    other = draw_scenes(tmp_path / "other", 60, seed=4)
    assert (other / LABELS).read_bytes() != (scenes / LABELS).read_bytes()


def test_more_pictures_begin_with_the_same_ones(scenes, tmp_path):
    fewer = draw_scenes(tmp_path / "fewer", 5, seed=3)
    assert _rows(fewer) == _rows(scenes)[:5]


def test_existing_folder_is_left_alone(scenes):
    with pytest.raises(UserError, match="exists already"):
        draw_scenes(scenes, 1, seed=0)


def test_labels_import_as_a_foreign_table(scenes, tmp_path):
    columns = {"image": "picture", "label": "shapes", "box": "boxes"}
    request = Request(columns=columns, prompt="Find.", box_format="xywh", eval_last=10)
    summary = import_file(scenes / LABELS, tmp_path / "data", request)
    assert [part.rows for part in summary.written] == [50, 10]
    row = _rows(scenes)[0]
    answer = read_samples(tmp_path / "data" / "train.jsonl")[0].messages[-1].content
    assert [part.label for part in answer if isinstance(part, BoxPart)] == row["shapes"]
    x, y, width, height = row["boxes"][0]
    assert answer[0].xyxy == (x, y, x + width, y + height)
