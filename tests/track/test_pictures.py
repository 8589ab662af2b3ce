"""Pictures of answers: which, with whose boxes where, and what of them cannot be drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finesight.infer.draw import COLOURS
from finesight.track.pictures import GAP, MOST, SIDE, drawn

Box = tuple[float, float, float, float]


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(picture: object, boxes: Sequence[Box] = (), **more: Any) -> dict[str, Any]:
    found = [{"image": 0, "label": None, "xyxy": list(box)} for box in boxes]
    return {"id": "s", "image": picture, "prompt": "Where?", "answer": "", "boxes": found, **more}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "white.png"
    Image.new("RGB", (2 * SIDE, SIDE), "white").save(path)
    return str(path)


def colour(image: Image.Image, at: tuple[int, int]) -> str:
    """The one of the colours of boxes that a pixel is nearest to, or white."""
    pixel = image.convert("RGB").getpixel(at)
    assert isinstance(pixel, tuple)

    def far(name: str) -> int:
        wanted = [int(name[i : i + 2], 16) for i in (1, 3, 5)]
        return sum((a - b) ** 2 for a, b in zip(pixel, wanted, strict=True))

    return min((*COLOURS, "#ffffff"), key=far)


def test_right_before_and_now_side_by_side_in_pixels_of_the_smaller_picture(
    tmp_path: Path, picture: str
) -> None:
    """Boxes at x = 200, 400 and 600 of 1280 pixels are at half of that in panels of 640."""
    gold = line(picture, [(200, 100, 300, 300)])["boxes"]
    before = write(tmp_path / "before.jsonl", line(picture, [(400, 100, 500, 300)], answer="b"))
    now = write(
        tmp_path / "step-4.jsonl",
        line(picture, [(600, 100, 700, 300)], answer="n", gold="g", gold_boxes=gold),
    )
    (found,) = drawn(before, now)
    image = found.image()
    assert image.size == (3 * SIDE + 2 * GAP, SIDE // 2)
    for panel, x in enumerate((100, 200, 300)):
        start = panel * (SIDE + GAP)
        assert colour(image, (start + x, 100)) == COLOURS[0]
        others = {100, 200, 300} - {x}
        assert all(colour(image, (start + other, 100)) == "#ffffff" for other in others)
    assert found.caption.splitlines() == [
        "id: s",
        "question: Where?",
        "right: g",
        "before: b",
        "now: n",
        "boxes, left to right: right, before, now",
    ]


def test_without_boxes_the_picture_alone(tmp_path: Path, picture: str) -> None:
    now = write(tmp_path / "before.jsonl", line(picture, answer="a word"))
    (found,) = drawn(now, now)
    assert found.image().size == (SIDE, SIDE // 2)
    assert found.caption == "id: s\nquestion: Where?\nnow: a word"


def test_the_same_samples_at_every_evaluation(tmp_path: Path, picture: str) -> None:
    for name in ("before", "step-2", "after"):
        lines = [line(picture, id=str(i), answer=name) for i in range(101)]
        write(tmp_path / f"{name}.jsonl", *lines)
    shown = [
        [one.caption.splitlines()[0] for one in drawn(tmp_path / "before.jsonl", file)]
        for file in (tmp_path / f"{name}.jsonl" for name in ("before", "step-2", "after"))
    ]
    assert shown[0] == shown[1] == shown[2]
    assert len(shown[0]) == MOST
    assert shown[0][0] == "id: 0"
    assert shown[0][-1] == "id: 100"


def test_the_picture_that_the_boxes_are_in(tmp_path: Path, picture: str) -> None:
    small = tmp_path / "small.png"
    Image.new("RGB", (40, 30)).save(small)
    box = {"image": 1, "label": "it", "xyxy": [1, 1, 20, 20]}
    now = write(tmp_path / "a.jsonl", line([picture, str(small)]) | {"boxes": [box]})
    (found,) = drawn(tmp_path / "none.jsonl", now)
    assert found.image().size == (40, 30)


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path, picture: str) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(picture).read_bytes()[:99])
    cases = [str(tmp_path / "gone.png"), str(broken), None, [], "nul\0byte", picture]
    now = write(tmp_path / "a.jsonl", *(line(case, id=str(i)) for i, case in enumerate(cases)))
    assert [one.caption[:5] for one in drawn(tmp_path / "none.jsonl", now)] == ["id: 5"]
    assert drawn(tmp_path / "none.jsonl", tmp_path / "none.jsonl") == []
