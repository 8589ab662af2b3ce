"""Exports of Label Studio: selection of results, regions, texts, choices and image references."""

import json
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import (
    check_export_roundtrip,
    import_samples,
    list_answers,
    list_questions,
    write_box_image,
)
from case_files import load_cases

from finesight.errors import UserError
from finesight.ingest.exporter import export_dataset
from finesight.ingest.formats.image_annotations import REASON_OBJECT_WITHOUT_BOX
from finesight.ingest.formats.label_studio import SPOTTING_PROMPT, LabelControl, parse_label_config
from finesight.samples.sample import LocatedSample

CASES = load_cases("label_studio")

WHITE = (12, 3, 32, 17)


def region(label: str | None, *, id: str = "r", **value: Any) -> dict[str, Any]:
    """Return the result of a rectangle at WHITE, with other values if given."""
    labels = {} if label is None else {"rectanglelabels": [label]}
    geometry = {"x": 30, "y": 15, "width": 50, "height": 70}
    return {
        "id": id,
        "type": "rectanglelabels",
        "from_name": "label",
        "original_width": 40,
        "original_height": 20,
        "value": (value or geometry) | labels,
    }


def answer(name: str, **value: Any) -> dict[str, Any]:
    return {"id": name, "from_name": name, "value": value}


def annotation(*results: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"result": list(results), **fields}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_box_image(tmp_path / "set" / "a.png", WHITE)
    return tmp_path / "set"


def write_tasks(root: Path, *tasks: dict[str, Any]) -> Path:
    """Write tasks about the image a.png, unless they have data of their own."""
    data = {"image": "/data/local-files/?d=a.png"}
    (root / "tasks.json").write_text(json.dumps([{"data": data, **task} for task in tasks]))
    return root / "tasks.json"


def test_results_of_each_task(root: Path, tmp_path: Path) -> None:
    old = annotation(region("old"), updated_at="2026-01-01")
    new = annotation(region("new"), updated_at="2026-02-01", lead_time=3)
    truth = annotation(region("truth"), updated_at="2025-01-01", ground_truth=True)
    predicted = annotation(region("guess"), model_version="1")
    source = write_tasks(
        root,
        {"annotations": [new, old], "predictions": [predicted], "meta": {"shift": 1}},
        {"annotations": [new, truth]},
        {"annotations": [], "predictions": [predicted]},
        {"annotations": [annotation(region("x"), was_cancelled=True)], "predictions": [predicted]},
        {"annotations": []},
        {"annotations": [annotation()]},
    )
    samples, summary = import_samples(source, tmp_path / "out")
    labels = [parts[0][0] if parts != ["none"] else None for parts in list_answers(samples)]
    assert labels == ["new", "truth", "guess", None]
    assert summary.skipped_rows == {
        "tasks that their annotators skipped": 1,
        "tasks without annotations": 1,
    }
    assert summary.source_notes == {
        "tasks with several annotations (the ground truth or the newest is used)": 2,
        "tasks without annotations (predictions are used)": 1,
    }
    counts = {"meta of tasks": 1, "meta.shift of tasks": 1, "lead_time of annotations": 2}
    for name, count in counts.items():
        assert summary.other_keys[f"{name}, not imported"] == count
    samples, _ = import_samples(source, tmp_path / "predicted", format="label-studio-predictions")
    assert list_answers(samples) == [[("guess", WHITE)]] * 3
    (root / "rows.jsonl").write_text('{"image": "a.png"}')
    with pytest.raises(UserError, match="no label-studio-predictions dataset is found"):
        import_samples(root / "rows.jsonl", tmp_path / "x", format="label-studio-predictions")


def test_regions_of_other_shapes(root: Path, tmp_path: Path) -> None:
    # A rectangle of 10 x 4 pixels at (20, 8), rotated by 90 degrees around this corner.
    rotated = {"x": 50, "y": 40, "width": 25, "height": 20, "rotation": 90}
    results = [
        region("a", id="1", **rotated),
        region("b", id="2", points=[[10, 10], [50, 10], [25, 90]]),
        {
            "id": "3",
            "type": "ellipselabels",
            "value": {"x": 1, "radiusX": 2, "ellipselabels": ["sky"]},
        },
        answer("kind", choices=["street"]),
    ]
    samples, summary = import_samples(
        write_tasks(root, {"annotations": [annotation(*results)]}), tmp_path / "out"
    )
    assert list_answers(samples) == [[("a", (16, 8, 20, 18)), ("b", (4, 2, 20, 18))]]
    assert summary.source_notes == {
        "rotated rectangles (converted to bounding boxes)": 1,
        "polygons (converted to bounding boxes)": 1,
        "regions of type ellipselabels (skipped)": 1,
        "answers about the whole image, next to regions (ignored)": 1,
    }


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (region("a") | {"original_width": 80}, "80 x 20 pixels, the image has 40 x 20"),
        (region("a") | {"image_rotation": 90}, "the rectanglelabels"),
        (region(None), "the rectanglelabels"),
        (region("a", x=1, y=2, width="wide", height=4), "the rectanglelabels"),
    ],
)
def test_invalid_regions(root: Path, tmp_path: Path, result: dict[str, Any], what: str) -> None:
    source = write_tasks(root, {"annotations": [annotation(result)]})
    with pytest.raises(UserError, match=what):
        import_samples(source, tmp_path / "out")


def test_texts_of_regions(root: Path, tmp_path: Path) -> None:
    text = region(None, x=30, y=15, width=50, height=70, text=["Total 12"]) | {"type": "textarea"}
    rating = region(None, x=30, y=15, width=50, height=70, rating=4) | {"type": "rating"}
    results = [region("Text"), text, rating, region("Logo", id="logo")]
    unread = [*results, region("Text", id="unread")]
    tasks = [{"annotations": [annotation(*one)]} for one in (results, unread)]
    samples, summary = import_samples(write_tasks(root, *tasks), tmp_path / "out")
    assert list_questions(samples) == [SPOTTING_PROMPT]
    assert list_answers(samples) == [[("Total 12", WHITE)]]
    assert samples[0].meta["boxes"] == [{"class": "Text"}]
    notes = {"regions without text (skipped)": 3, "rating of regions (ignored)": 2}
    assert summary.source_notes == notes
    assert summary.skipped_rows == {REASON_OBJECT_WITHOUT_BOX: 1}
    located_samples = [LocatedSample(sample, tmp_path / "out") for sample in samples]
    export_dataset(located_samples, tmp_path / "exported", "label-studio", copy_images=True)
    again, _ = import_samples(tmp_path / "exported" / "tasks.json", tmp_path / "again")
    assert (list_answers(again), again[0].meta) == (list_answers(samples), samples[0].meta)
    config = (tmp_path / "exported" / "label_config.xml").read_text()
    assert parse_label_config(config) == [
        LabelControl("boxes", "label", "image", "image", ("Text",), text_name="text")
    ]


@pytest.mark.parametrize(("results", "question", "answers"), CASES["test_answers_about_the_image"])
def test_answers_about_the_image(root, tmp_path, results, question, answers):
    write_box_image(root / "b.png", WHITE)
    first, second = ([annotation(*one)] for one in results)
    data = {"image": "/data/local-files/?d=b.png"}
    tasks = {"annotations": first}, {"annotations": second, "data": data}
    samples, _ = import_samples(write_tasks(root, *tasks), tmp_path / "out")
    assert list_answers(samples) == [[one] for one in answers]
    assert set(list_questions(samples)) == {question}


@pytest.mark.parametrize(
    "reference",
    ["/data/local-files/?d=server%20files/images/a.png", "/data/upload/3/0a1b2c3d-a.png", "a.png"],
)
@pytest.mark.parametrize("location", ["a.png", "images/a.png", "photos/a.png"])
def test_image_references(tmp_path: Path, reference: str, location: str) -> None:
    is_name = reference == "a.png"
    write_box_image(tmp_path / "set" / ("a.png" if is_name else location), WHITE)
    task = {"data": {"image": reference}, "annotations": [annotation(region("dog"))]}
    samples, _ = import_samples(write_tasks(tmp_path / "set", task), tmp_path / "out")
    assert len(samples) == 1


@pytest.mark.parametrize(("references", "what"), CASES["test_images_elsewhere_are_rejected"])
def test_images_elsewhere_are_rejected(root, tmp_path, references, what):
    results = [annotation(region("dog"))]
    tasks = [{"data": {"photo": one}, "annotations": results} for one in references]
    with pytest.raises(UserError, match=what):
        import_samples(write_tasks(root, *tasks), tmp_path / "out")


def test_json_min(root: Path, tmp_path: Path) -> None:
    common = {"image": "/data/upload/1/0a1b2c3d-a.png", "annotator": 1, "annotation_id": 1}
    box = {**region("dog")["value"], "original_width": 40, "original_height": 20}
    (root / "min.json").write_text(json.dumps([{**common, "label": [box], "id": 5}]))
    samples, summary = import_samples(root / "min.json", tmp_path / "boxes")
    assert list_answers(samples) == [[("dog", WHITE)]]
    assert summary.format == "label-studio"
    keys = ("annotator", "annotation_id")
    assert summary.other_keys == {f"{key} of tasks, not imported": 1 for key in keys}
    (root / "min.json").write_text(json.dumps([{**common, "caption": "A dog.", "rating": 2.5}]))
    samples, summary = import_samples(root / "min.json", tmp_path / "texts")
    assert list_answers(samples) == [["A dog."]]
    assert summary.other_keys.keys() > {"rating of tasks, not imported"}


def test_choices_roundtrip(root: Path, tmp_path: Path) -> None:
    write_box_image(root / "b.png", WHITE)
    data = {"image": "/data/local-files/?d=b.png"}
    cat, dog = (annotation(answer("kind", choices=[name])) for name in ("cat", "dog"))
    source = write_tasks(root, {"annotations": [cat]}, {"annotations": [dog], "data": data})
    done = check_export_roundtrip(source, tmp_path)
    assert done.lost_counts.keys() == {
        "questions, which an import regenerates from --prompt and --box-task"
    }
    config = (tmp_path / "exported" / "label_config.xml").read_text()
    assert parse_label_config(config) == [
        LabelControl("choices", "answer", "image", "image", ("cat", "dog"))
    ]


@pytest.mark.parametrize(
    ("data", "results", "prompt", "expected"), CASES["test_questions_in_the_data_of_tasks"]
)
def test_questions_in_the_data_of_tasks(root, tmp_path, data, results, prompt, expected):
    results = [region(**one["region"]) if "region" in one else one for one in results]
    task = {"data": {"image": "a.png", **data}, "annotations": [annotation(*results)]}
    samples, summary = import_samples(write_tasks(root, task), tmp_path / "out", prompt=prompt)
    assert list_questions(samples) == [expected]
    assert "question of tasks, not imported" not in summary.other_keys


@pytest.mark.parametrize(("tasks", "what", "remedy"), CASES["test_unclear_questions_are_rejected"])
def test_unclear_questions_are_rejected(root, tmp_path, tasks, what, remedy):
    """Check that the remedies, of which --prompt and --replace-prompts are options, work."""
    source = write_tasks(
        root,
        *(
            {"data": {"image": "a.png", **data}, "annotations": [annotation(answer("a", text="b"))]}
            for data in tasks
        ),
    )
    with pytest.raises(UserError, match=what) as caught:
        import_samples(source, tmp_path / "out")
    assert remedy in str(caught.value)
    for option in ("prompt", "replace_prompts"):
        samples, _ = import_samples(source, tmp_path / option, **{option: "Read it."})
        assert list_questions(samples)[-1] == "Read it."


def test_other_texts_of_tasks_are_named(root: Path, tmp_path: Path) -> None:
    data = {"image": "a.png", "remark": "A kite over the sea", "shift": "early"}
    source = write_tasks(root, {"data": data, "annotations": [annotation(answer("a", text="b"))]})
    _, summary = import_samples(source, tmp_path / "out")
    assert summary.source_notes == {"texts 'remark' of tasks (not in the question)": 1}
    assert summary.other_keys == {"shift of tasks, not imported": 1}


def test_question_of_several_samples_per_image(root: Path, tmp_path: Path) -> None:
    task = {"data": {"image": "a.png", "question": "Where is it?"}}
    source = write_tasks(root, task | {"annotations": [annotation(region("dog"))]})
    with pytest.raises(UserError, match="a question of their own"):
        import_samples(source, tmp_path / "out", box_task="grounding")


def test_questions_of_json_min(root: Path, tmp_path: Path) -> None:
    common = {"image": "a.png", "annotator": 1, "annotation_id": 1, "prompt": "Read {it}."}
    (root / "min.json").write_text(json.dumps([{**common, "result": "A dog."}]))
    samples, _ = import_samples(root / "min.json", tmp_path / "question")
    assert (list_questions(samples), list_answers(samples)) == (["Read {it}."], [["A dog."]])
    (root / "min.json").write_text(json.dumps([common]))
    samples, _ = import_samples(root / "min.json", tmp_path / "answer")
    assert list_answers(samples) == [["Read {it}."]]
