from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from finesight.data.sample import BoxPart
from finesight.infer.prediction import Prediction, draw_boxes, save_annotated_images


def _prediction(images: tuple[Path, ...], *boxes: BoxPart) -> Prediction:
    return Prediction("s", images, "Where?", "there", "there<|im_end|>", boxes, 2, True)


def _write_gray(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    Image.new("RGB", size, (128, 128, 128)).save(path)
    return path


def _changed(path: Path) -> np.ndarray:
    return (np.asarray(Image.open(path)) != 128).any(-1)


def test_box_is_drawn_at_its_coordinates():
    drawn = draw_boxes(Image.new("RGB", (60, 40), (128,) * 3), [BoxPart(xyxy=(10, 5, 50, 30))])
    changed = (np.asarray(drawn) != 128).any(-1)
    assert drawn.size == (60, 40)
    assert changed[5, 10:51].all()
    assert changed[30, 10:51].all()
    assert changed[5:31, 10].all()
    assert changed[5:31, 50].all()
    assert not changed[7:29, 12:49].any()
    assert not changed[:4].any()


def test_labels_and_reversed_corners_are_drawn():
    image = Image.new("RGB", (200, 100), (128,) * 3)
    baseline = draw_boxes(image, [BoxPart(xyxy=(100, 80, 20, 40))])
    named = draw_boxes(image, [BoxPart(label="dog", xyxy=(100, 80, 20, 40))])
    assert (np.asarray(baseline) != 128).any()
    assert (np.asarray(named) != np.asarray(baseline)).any()
    assert (np.asarray(image) == 128).all()


def test_each_image_gets_its_own_file(tmp_path):
    first, second = _write_gray(tmp_path / "a.png"), _write_gray(tmp_path / "b.jpg.png")
    box = BoxPart(image=1, xyxy=(10, 5, 50, 30))
    written = save_annotated_images([_prediction((first, second), box)], tmp_path / "out")
    assert written == [tmp_path / "out/a.png", tmp_path / "out/b.jpg.png"]
    assert not _changed(written[0]).any()
    assert _changed(written[1]).any()


def test_existing_files_are_not_overwritten(tmp_path):
    image = _write_gray(tmp_path / "a.png")
    bytes_before = image.read_bytes()
    prediction = _prediction((image,), BoxPart(xyxy=(1, 1, 9, 9)))
    written = save_annotated_images([prediction, prediction], tmp_path)
    assert [path.name for path in written] == ["a-2.png", "a-3.png"]
    assert image.read_bytes() == bytes_before
