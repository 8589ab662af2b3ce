"""Answers of runs, written by hand: worse, without end, with boxes in another frame."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest
import yaml
from doctor_fixtures import find_diagnosis, list_codes
from PIL import Image
from run_dir_fixtures import (
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_evaluation_line,
    make_prediction_line,
)

from finesight.doctor import prediction_check, run_check
from finesight.doctor.diagnosis import Diagnosis
from finesight.report.run_reader import read_run

EVAL = {"metric": "latex", "limit": 50, "max_new_tokens": 64}
RECIPE = {"model": "m", "data": {"train": "t.jsonl"}, "eval": EVAL, "output_dir": "runs/x"}


@pytest.fixture
def fake_run_dir(tmp_path: Path) -> FakeRunDir:
    made = FakeRunDir(tmp_path / "run")
    made.write_metrics()
    recipe = RECIPE | {"train": {"epochs": 1}}
    made.write("recipe.yaml", yaml.safe_dump(recipe))
    return made


def diagnose(made: FakeRunDir) -> list[Diagnosis]:
    return prediction_check.check_predictions(read_run(made.folder))


def difference(verdict: str, before: float = 0.4, after: float = 0.5) -> JsonLine:
    figures = {"before": before, "after": after, "low": -0.1, "high": 0.2}
    return {"name": "similarity", "verdict": verdict, **figures}


def test_improved_metric_has_no_issue(fake_run_dir: FakeRunDir) -> None:
    fake_run_dir.write_finished(metric_differences=[difference("better")])
    assert list_codes(diagnose(fake_run_dir)) == list_codes(diagnose(fake_run_dir), "warning") == []


def test_worse_metric_suggests_the_report(fake_run_dir: FakeRunDir) -> None:
    fake_run_dir.write_finished(metric_differences=[difference("worse", 0.9, 0.9)])
    found = find_diagnosis(diagnose(fake_run_dir), "metric-worse")
    assert shlex.split(found.remedy) == ["finesight", "report", str(fake_run_dir.folder)]


def test_metric_with_earlier_peak_suggests_patience(fake_run_dir: FakeRunDir) -> None:
    fake_run_dir.write_lines(
        "metrics.jsonl", [make_evaluation_line(n, f) for n, f in ((0, 0.5), (30, 0.7), (60, 0.4))]
    )
    fake_run_dir.write_finished(metric_differences=[difference("worse", 0.5, 0.4)])
    found = find_diagnosis(diagnose(fake_run_dir), "metric-worse")
    assert "after step 30" in found.what
    assert "eval.patience=2" in found.remedy


def test_insignificant_difference_suggests_more_samples(fake_run_dir: FakeRunDir) -> None:
    fake_run_dir.write_finished(metric_differences=[difference("no clear change")])
    found = find_diagnosis(diagnose(fake_run_dir), "metric-unclear")
    assert "within noise (-0.1000 to +0.2000)" in found.what
    assert found.remedy.endswith("--limit 200")


def test_run_without_evaluation_is_a_hint(fake_run_dir: FakeRunDir) -> None:
    fake_run_dir.write_lines("metrics.jsonl", [START_RECORD])
    assert list_codes(diagnose(fake_run_dir), "warning") == ["not-evaluated"]


def test_repetitive_answers_are_detected(fake_run_dir: FakeRunDir) -> None:
    loop = make_prediction_line("a", "x = " + "1 + " * 30, "x = 1", 0.1, stopped=False)
    fake_run_dir.write_predictions(
        "after", [loop] * 4 + [make_prediction_line("b", "x", "x", 1.0)] * 6
    )
    found = find_diagnosis(diagnose(fake_run_dir), "answers-unfinished")
    assert "4 of 10" in found.what
    assert "4 of them repetitive" in found.what
    assert "train.epochs=2" in found.remedy


def test_truncated_answers_suggest_more_tokens(fake_run_dir: FakeRunDir) -> None:
    text = "".join(random.Random(0).choices("abcdefghij ", k=200))
    cut = make_prediction_line("a", text[:100], text, 0.5, stopped=False)
    fake_run_dir.write_predictions(
        "after", [cut] * 3 + [make_prediction_line("b", "x", "x", 1.0)] * 7
    )
    words = shlex.split(find_diagnosis(diagnose(fake_run_dir), "answers-cut-off").remedy)
    assert words[words.index("--max-new-tokens") + 1] == "256"


def test_single_truncated_answer_is_no_issue(fake_run_dir: FakeRunDir) -> None:
    fake_run_dir.write_predictions(
        "after", [make_prediction_line("b", "x", "x", 1.0, stopped=n > 0) for n in range(40)]
    )
    assert list_codes(diagnose(fake_run_dir)) == []


SIZES = ((640, 480), (300, 500), (1000, 200), (800, 800))


def boxes(
    made: FakeRunDir, tmp_path: Path, message: str, right: str = "pixels", off: float = 0.0
) -> None:
    """Answers whose boxes, and labels, are written in some frame; all are good but for it."""
    rng = random.Random(1)
    lines = []
    for number in range(12):
        width, height = SIZES[number % 4]
        image = tmp_path / f"{number}.png"
        Image.new("1", (width, height)).save(image)
        x1, y1 = rng.uniform(0, 0.5) * width, rng.uniform(0, 0.5) * height
        box = (x1, y1, x1 + rng.uniform(0.2, 0.45) * width, y1 + rng.uniform(0.2, 0.45) * height)
        wide, high = off * width * rng.uniform(-1, 1), off * height * rng.uniform(-1, 1)
        changed = (box[0] + wide, box[1] + high, box[2] + wide, box[3] + high)
        written = [
            [{"image": 0, "label": "cat", "xyxy": list(to_frame(one, frame, width, height))}]
            for one, frame in ((changed, message), (box, right))
        ]
        texts = {"image": str(image), "boxes": written[0], "gold_boxes": written[1]}
        lines.append(make_prediction_line(str(number), "", "", 0.0, **texts))
    made.write_predictions("after", lines)


def to_frame(
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
    ("output", "right", "image", "words"),
    [
        ("thousandths", "pixels", None, "boxes of the predictions are in thousandths"),
        ("pixels", "thousandths", None, "boxes of the labels are in thousandths"),
        ("resized", "pixels", {"height": 112, "width": 504}, "copy of 504 x 112"),
        ("longest", "pixels", {"longest_side": 448}, "longest side is 448"),
        ("larger", "pixels", None, "copy scaled by 2.5"),
        ("sizes", "pixels", None, "x, y, width, height"),
    ],
)
def test_boxes_in_wrong_frame_are_detected(
    fake_run_dir: FakeRunDir,
    tmp_path: Path,
    output: str,
    right: str,
    image: JsonLine | None,
    words: str,
) -> None:
    fake_run_dir.write("recipe.yaml", yaml.safe_dump(RECIPE | {"image": image}))
    boxes(fake_run_dir, tmp_path, output, right, off=0.02)
    found = find_diagnosis(diagnose(fake_run_dir), "box-convention-mismatch")
    assert words in found.what
    assert shlex.split(found.remedy)[:2] == ["finesight", "check"]


@pytest.mark.parametrize("off", [0.0, 0.1, 1.0])
def test_inaccurate_boxes_are_in_the_right_frame(
    fake_run_dir: FakeRunDir, tmp_path: Path, off: float
) -> None:
    boxes(fake_run_dir, tmp_path, "pixels", off=off)
    assert "box-convention-mismatch" not in list_codes(diagnose(fake_run_dir))


def test_boxes_without_image_files_are_skipped(fake_run_dir: FakeRunDir, tmp_path: Path) -> None:
    boxes(fake_run_dir, tmp_path, "thousandths")
    for image in tmp_path.glob("*.png"):
        image.unlink()
    assert list_codes(diagnose(fake_run_dir)) == []


def test_out_of_memory_suggests_smaller_packs(fake_run_dir: FakeRunDir) -> None:
    record = read_run(fake_run_dir.folder)
    record.recipe["train"] = {"pack_tokens": 4096}
    for line in record.steps:
        line |= {"pack_tokens": 4096 if line["step"] < 9 else 1024, "activation_checkpointing": 0.0}
    found = find_diagnosis(run_check.check_run_end(record), "gpu-out-of-memory")
    assert "from step 9" in found.what
    assert "train.pack_tokens=1024" in found.remedy
