"""Tests of rendered examples: selection, boxes, and unreadable images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finesight.infer.prediction import BOX_COLORS
from finesight.track.tracked_images import (
    MAX_PANEL_SIDE,
    MAX_SAMPLES,
    PANEL_GAP,
    render_example_images,
)

Box = tuple[float, float, float, float]


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(image: object, boxes: Sequence[Box] = (), **more: Any) -> dict[str, Any]:
    found = [{"image": 0, "label": None, "xyxy": list(box)} for box in boxes]
    return {"id": "s", "image": image, "prompt": "Where?", "answer": "", "boxes": found, **more}


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    path = tmp_path / "white.png"
    Image.new("RGB", (2 * MAX_PANEL_SIDE, MAX_PANEL_SIDE), "white").save(path)
    return str(path)


def nearest_color(image: Image.Image, at: tuple[int, int]) -> str:
    """Return the box color nearest to a pixel, or white."""
    pixel = image.convert("RGB").getpixel(at)
    assert isinstance(pixel, tuple)

    def far(name: str) -> int:
        wanted = [int(name[i : i + 2], 16) for i in (1, 3, 5)]
        return sum((a - b) ** 2 for a, b in zip(pixel, wanted, strict=True))

    return min((*BOX_COLORS, "#ffffff"), key=far)


def test_reference_before_and_current_panels(tmp_path: Path, image_file: str) -> None:
    """Boxes at x = 200, 400 and 600 of 1280 pixels are at half of it in panels of 640 pixels."""
    gold = line(image_file, [(200, 100, 300, 300)])["boxes"]
    before = write(tmp_path / "before.jsonl", line(image_file, [(400, 100, 500, 300)], answer="b"))
    now = write(
        tmp_path / "step-4.jsonl",
        line(image_file, [(600, 100, 700, 300)], answer="n", gold="g", gold_boxes=gold),
    )
    (found,) = render_example_images(before, now)
    image = found.image
    assert image.size == (3 * MAX_PANEL_SIDE + 2 * PANEL_GAP, MAX_PANEL_SIDE // 2)
    for panel, x in enumerate((100, 200, 300)):
        start = panel * (MAX_PANEL_SIDE + PANEL_GAP)
        assert nearest_color(image, (start + x, 100)) == BOX_COLORS[0]
        others = {100, 200, 300} - {x}
        assert all(nearest_color(image, (start + other, 100)) == "#ffffff" for other in others)
    assert found.caption.splitlines() == [
        "id: s",
        "question: Where?",
        "reference: g",
        "before: b",
        "after: n",
        "boxes, left to right: reference, before, after",
    ]


def test_same_samples_at_every_evaluation(tmp_path: Path, image_file: str) -> None:
    Image.new("RGB", (8, 8)).save(image_file)
    for name in ("before", "step-2", "after"):
        lines = [line(image_file, id=str(i), answer=name) for i in range(101)]
        write(tmp_path / f"{name}.jsonl", *lines)
    before = tmp_path / "before.jsonl"
    shown = [
        [one.caption.splitlines()[0] for one in render_example_images(before, file)]
        for file in (before, tmp_path / "step-2.jsonl", tmp_path / "after.jsonl")
    ]
    assert shown[0] == shown[1] == shown[2]
    assert len(shown[0]) == MAX_SAMPLES
    assert (shown[0][0], shown[0][-1]) == ("id: 0", "id: 100")


def test_undrawable_samples_are_skipped(tmp_path: Path, image_file: str) -> None:
    missing, broken = tmp_path / "none.jsonl", tmp_path / "broken.png"
    broken.write_bytes(Path(image_file).read_bytes()[:99])
    cases = [str(tmp_path / "gone.png"), str(broken), None, [], "nul\0byte", image_file]
    now = write(tmp_path / "a.jsonl", *(line(case, id=str(i)) for i, case in enumerate(cases)))
    (found,) = render_example_images(missing, now)
    assert found.caption.startswith("id: 5")
    assert render_example_images(missing, missing) == []
