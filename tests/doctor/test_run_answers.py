"""Answers of runs, written by hand: worse, without end, with boxes in another frame."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest
import yaml
from doctoring import codes, only
from PIL import Image
from run_folders import START, Line, MadeRun, answer_line, measured_line

from finesight.doctor import run_answers, run_end
from finesight.doctor.findings import Finding
from finesight.report.record import read_record

EVAL = {"metric": "latex", "limit": 50, "max_new_tokens": 64}
RECIPE = {"model": "m", "data": {"train": "t.jsonl"}, "eval": EVAL, "output": "runs/x"}


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "run")
    made.trained()
    recipe = RECIPE | {"train": {"epochs": 1}}
    made.write("recipe.yaml", yaml.safe_dump(recipe))
    return made


def judged(made: MadeRun) -> list[Finding]:
    return run_answers.judge(read_record(made.folder))


def difference(verdict: str, before: float = 0.4, after: float = 0.5) -> Line:
    figures = {"before": before, "after": after, "low": -0.1, "high": 0.2}
    return {"name": "similarity", "verdict": verdict, **figures}


def test_a_metric_that_rose_is_fine(made: MadeRun) -> None:
    made.finished(differences=[difference("better")])
    assert codes(judged(made)) == codes(judged(made), "hint") == []


def test_a_metric_that_fell_leads_to_the_answers(made: MadeRun) -> None:
    made.finished(differences=[difference("worse", 0.9, 0.9)])
    found = only(judged(made), "metric-worse")
    assert shlex.split(found.remedy) == ["finesight", "report", str(made.folder)]


def test_a_metric_that_was_better_on_the_way_gets_patience(made: MadeRun) -> None:
    made.lines("metrics.jsonl", [measured_line(n, f) for n, f in ((0, 0.5), (30, 0.7), (60, 0.4))])
    made.finished(differences=[difference("worse", 0.5, 0.4)])
    found = only(judged(made), "metric-worse")
    assert "after step 30" in found.what
    assert "eval.patience=2" in found.remedy


def test_a_difference_within_noise_asks_for_more_samples(made: MadeRun) -> None:
    made.finished(differences=[difference("no clear change")])
    found = only(judged(made), "metric-unclear")
    assert "within noise (-0.1000 to +0.2000)" in found.what
    assert found.remedy.endswith("--limit 200")


def test_a_run_that_measured_nothing_is_a_hint(made: MadeRun) -> None:
    made.lines("metrics.jsonl", [START])
    assert codes(judged(made), "hint") == ["not-measured"]


def test_answers_that_repeat_themselves_have_no_end(made: MadeRun) -> None:
    loop = answer_line("a", "x = " + "1 + " * 30, "x = 1", 0.1, stopped=False)
    made.answered("after", [loop] * 4 + [answer_line("b", "x", "x", 1.0)] * 6)
    found = only(judged(made), "answers-endless")
    assert "4 of 10" in found.what
    assert "4 of them repeat" in found.what
    assert "train.epochs=2" in found.remedy


def test_answers_that_are_cut_off_get_more_room(made: MadeRun) -> None:
    text = "".join(random.Random(0).choices("abcdefghij ", k=200))
    cut = answer_line("a", text[:100], text, 0.5, stopped=False)
    made.answered("after", [cut] * 3 + [answer_line("b", "x", "x", 1.0)] * 7)
    words = shlex.split(only(judged(made), "answers-cut-off").remedy)
    assert words[words.index("--max-new-tokens") + 1] == "256"


def test_one_answer_without_end_among_many_is_fine(made: MadeRun) -> None:
    made.answered("after", [answer_line("b", "x", "x", 1.0, stopped=n > 0) for n in range(40)])
    assert codes(judged(made)) == []


SIZES = ((640, 480), (300, 500), (1000, 200), (800, 800))


def boxes(
    made: MadeRun, tmp_path: Path, said: str, right: str = "pixels", off: float = 0.0
) -> None:
    """Answers whose boxes, and labels, are written in some frame; all are good but for it."""
    rng = random.Random(1)
    lines = []
    for number in range(12):
        width, height = SIZES[number % 4]
        picture = tmp_path / f"{number}.png"
        Image.new("1", (width, height)).save(picture)
        x1, y1 = rng.uniform(0, 0.5) * width, rng.uniform(0, 0.5) * height
        box = (x1, y1, x1 + rng.uniform(0.2, 0.45) * width, y1 + rng.uniform(0.2, 0.45) * height)
        wide, high = off * width * rng.uniform(-1, 1), off * height * rng.uniform(-1, 1)
        moved = (box[0] + wide, box[1] + high, box[2] + wide, box[3] + high)
        written = [
            [{"image": 0, "label": "cat", "xyxy": list(in_frame(one, frame, width, height))}]
            for one, frame in ((moved, said), (box, right))
        ]
        texts = {"image": str(picture), "boxes": written[0], "gold_boxes": written[1]}
        lines.append(answer_line(str(number), "", "", 0.0, **texts))
    made.answered("after", lines)


def in_frame(
    box: tuple[float, float, float, float], frame: str, width: int, height: int
) -> tuple[float, ...]:
    x1, y1, x2, y2 = box
    if frame == "thousandths":
        return tuple(1000 * v / side for v, side in zip(box, (width, height) * 2, strict=True))
    if frame == "resized":
        return tuple(
            v * to / side
            for v, side, to in zip(box, (width, height) * 2, (504, 112) * 2, strict=True)
        )
    if frame == "larger":
        return tuple(2.5 * v for v in box)
    if frame == "longest":
        return tuple(448 * v / max(width, height) for v in box)
    return (x1, y1, x2 - x1, y2 - y1) if frame == "sizes" else box


@pytest.mark.parametrize(
    ("said", "right", "picture", "words"),
    [
        ("thousandths", "pixels", None, "boxes of the answers are in thousandths"),
        ("pixels", "thousandths", None, "boxes of the labels are in thousandths"),
        ("resized", "pixels", {"height": 112, "width": 504}, "copy of 504 x 112"),
        ("longest", "pixels", {"longest_side": 448}, "longer side is 448"),
        ("larger", "pixels", None, "2.5 times as large"),
        ("sizes", "pixels", None, "x, y, width, height"),
    ],
)
def test_boxes_in_another_frame_are_found(
    made: MadeRun, tmp_path: Path, said: str, right: str, picture: Line | None, words: str
) -> None:
    made.write("recipe.yaml", yaml.safe_dump(RECIPE | {"picture": picture}))
    boxes(made, tmp_path, said, right, off=0.02)
    found = only(judged(made), "boxes-in-another-frame")
    assert words in found.what
    assert shlex.split(found.remedy)[:3] == ["finesight", "data", "check"]


@pytest.mark.parametrize("off", [0.0, 0.1, 1.0])
def test_right_and_merely_wrong_boxes_are_in_their_frame(
    made: MadeRun, tmp_path: Path, off: float
) -> None:
    boxes(made, tmp_path, "pixels", off=off)
    assert "boxes-in-another-frame" not in codes(judged(made))


def test_boxes_about_pictures_that_are_gone_say_nothing(made: MadeRun, tmp_path: Path) -> None:
    boxes(made, tmp_path, "thousandths")
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    assert codes(judged(made)) == []


def test_memory_that_was_full_begins_with_smaller_packs(made: MadeRun) -> None:
    record = read_record(made.folder)
    record.recipe["train"] = {"pack_tokens": 4096}
    for line in record.steps:
        line |= {"pack_tokens": 4096 if line["step"] < 9 else 1024, "recompute": 0.0}
    found = only(run_end.judge(record), "memory-was-full")
    assert "from step 9 on" in found.what
    assert "train.pack_tokens=1024" in found.remedy
