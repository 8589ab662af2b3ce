"""Every fault that a sample shows, planted into sound samples, is found where it was planted."""

from __future__ import annotations

from pathlib import Path

import pytest
from plant import CAPTION, FAULTS, Garden, Planted, parted, plant, samples_of, write
from shape_pictures import LABELS, draw_scenes

from finesight.check.findings import Checked
from finesight.check.run import Check
from finesight.check.subjects import Model, model_of, of_files
from finesight.data.opening import Request
from finesight.model.tiny import make_tiny

EACH = 4
MOST = 1200

SCENES = Request(
    columns={"image": "picture", "label": "shapes", "box": "boxes"},
    prompt="Find every shape.",
    box_format="xywh",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def model(work: Path) -> Model:
    return model_of(str(make_tiny(work / "model")), MOST)


def checked(train: Path, held_out: Path, model: Model, work: Path) -> Checked:
    subjects = of_files([train], [held_out], Request())
    saved = work / f"saved-{train.stem}"
    saved.mkdir()
    return Check(subjects, saved, model).run()[0]


@pytest.fixture(scope="module")
def planted(work: Path, model: Model) -> tuple[Checked, list[Planted], Path, Checked]:
    draw_scenes(work / "scenes", 160, seed=5)
    samples = list(samples_of(work / "scenes" / LABELS, SCENES, work))
    train, held_out = parted(samples, 10)
    eval_file = write(work / "eval.jsonl", held_out)
    clean = checked(write(work / "clean.jsonl", train), eval_file, model, work)
    records, faults = plant(train, Garden(3, work / "spoilt", held_out, MOST), EACH)
    train_file = write(work / "train.jsonl", records)
    return checked(train_file, eval_file, model, work), faults, train_file, clean


@pytest.mark.parametrize("fault", [*(fault.name for fault in FAULTS), "contradicting answers"])
def test_every_planted_fault_is_found_in_its_line(planted, fault):
    found, faults, train, _ = planted
    mine = [one for one in faults if one.fault == fault]
    assert len(mine) == EACH, mine
    for one in mine:
        places = {f"{train}:{line}" for line in one.lines}
        here = [finding for finding in found.findings if finding.where in places]
        codes = {finding.code for finding in here}
        assert one.code in codes, f"{one} was reported as {codes or 'nothing'}"


def test_no_other_line_is_accused(planted):
    found, faults, train, _ = planted
    spoilt = {f"{train}:{line}" for one in faults for line in one.lines}
    accused = [f for f in found.findings if f.severity != "note" and f.where not in spoilt]
    assert accused == []


def test_nothing_is_found_where_nothing_was_planted(planted):
    *_, clean = planted
    assert [finding for finding in clean.findings if finding.severity != "note"] == []
    assert clean.severity in (None, "note")


def test_real_data_raises_no_alarm(shared: Path, work: Path, model: Model):
    data = shared / "data"
    sources = {
        "latex": (data / "latex_ocr/latex_ocr.jsonl", {"image": "image", "answer": "latex"}),
        "captions": (data / "captions/captions.jsonl", {"image": "image", "answer": "captions"}),
        "words": (
            data / "grounding/grounding.jsonl",
            {"image": "image", "question": "question", "box": "bbox_xyxy"},
        ),
    }
    for name, (source, columns) in sources.items():
        prompt = None if name == "words" else CAPTION
        request = Request(columns=columns, prompt=prompt, limit=300)
        train, held_out = parted(list(samples_of(source, request, work)), 4)
        found = checked(
            write(work / f"{name}.jsonl", train),
            write(work / f"{name}-eval.jsonl", held_out),
            Model(),
            work,
        )
        accused = [finding for finding in found.findings if finding.severity != "note"]
        assert accused == [], f"{name}: {accused[:3]}"
