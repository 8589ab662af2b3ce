"""Every fault that a sample shows, planted into sound samples, is found where it was planted."""

from pathlib import Path

import pytest
from fault_injection import (
    CAPTION_PROMPT,
    FAULT_TYPES,
    FaultContext,
    inject_faults,
    load_external_samples,
    split_by_image,
    write_records,
)
from shape_images import LABELS_FILE, write_shape_images
from tiny_model import create_tiny_model

from finesight.encode.renderer_builder import build_renderer
from finesight.ingest.check.data_checker import (
    DataChecker,
    ModelRequirements,
    inputs_from_files,
    load_model_requirements,
)
from finesight.ingest.import_source import ImportOptions
from finesight.model_folder import ModelFolder

EACH = 4
MOST = 1200

SCENES = ImportOptions(
    columns={"image": "image", "label": "shapes", "box": "boxes"},
    prompt="Find every shape.",
    box_format="xywh",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def model(work: Path) -> ModelRequirements:
    folder = ModelFolder(create_tiny_model(work / "model"))
    return load_model_requirements(folder, build_renderer(folder), MOST)


def check_samples(train, validation, model, work):
    subjects = inputs_from_files([train], [validation], ImportOptions())
    saved = work / f"saved-{train.stem}"
    saved.mkdir()
    return DataChecker(subjects, saved, model).run()[0]


@pytest.fixture(scope="module")
def injected(work, model):
    write_shape_images(work / "scenes", 160, seed=5)
    samples = list(load_external_samples(work / "scenes" / LABELS_FILE, SCENES, work))
    train, validation = split_by_image(samples, 10)
    eval_file = write_records(work / "eval.jsonl", validation)
    clean = check_samples(write_records(work / "clean.jsonl", train), eval_file, model, work)
    records, injected_faults = inject_faults(
        train, FaultContext(3, work / "spoilt", validation, MOST), EACH
    )
    train_file = write_records(work / "train.jsonl", records)
    return check_samples(train_file, eval_file, model, work), injected_faults, train_file, clean


@pytest.mark.parametrize(
    "fault_type", [*(one.name for one in FAULT_TYPES), "contradicting answers"]
)
def test_every_injected_fault_is_reported_at_its_line(injected, fault_type):
    found, injected_faults, train, _ = injected
    mine = [one for one in injected_faults if one.fault_type == fault_type]
    assert len(mine) == EACH, mine
    for one in mine:
        locations = {f"{train}:{line}" for line in one.lines}
        here = [finding for finding in found.issues if finding.where in locations]
        codes = {finding.code for finding in here}
        assert one.code in codes, f"{one} was reported as {codes or 'nothing'}"


def test_no_other_line_is_reported(injected):
    found, injected_faults, train, _ = injected
    spoilt = {f"{train}:{line}" for one in injected_faults for line in one.lines}
    accused = [f for f in found.issues if f.severity != "note" and f.where not in spoilt]
    assert accused == []


def test_clean_data_has_no_issues(injected):
    *_, clean = injected
    assert [finding for finding in clean.issues if finding.severity != "note"] == []
    assert clean.severity in (None, "note")


def test_real_data_has_no_false_positives(shared: Path, work: Path, model: ModelRequirements):
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
        prompt = None if name == "words" else CAPTION_PROMPT
        request = ImportOptions(columns=columns, prompt=prompt, limit=150)
        train, validation = split_by_image(list(load_external_samples(source, request, work)), 4)
        found = check_samples(
            write_records(work / f"{name}.jsonl", train),
            write_records(work / f"{name}-eval.jsonl", validation),
            ModelRequirements(),
            work,
        )
        accused = [finding for finding in found.issues if finding.severity != "note"]
        assert accused == [], f"{name}: {accused[:3]}"
