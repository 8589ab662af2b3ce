"""Classification and selection of examples, and differences from recorded scores."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from PIL import Image
from run_dir_fixtures import JsonLine, make_prediction_line

from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import compare_cases
from finesight.evaluate.task_metrics import compute_metrics, get_primary_metric
from finesight.report import examples
from finesight.report.examples import (
    MAX_ANSWER_CHARS,
    MAX_BOXES,
    Example,
    ExampleDataBuilder,
    ExampleSet,
    diff_fields,
    diff_texts,
    estimate_differences,
    read_boxes,
    read_examples,
    read_incorrect_lines,
)
from finesight.samples.sample import BoxPart
from finesight.settings.config import MetricSpec
from finesight.vision.image_processing import load_image


def write_predictions(path: Path, *lines: JsonLine) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compare(folder: Path, before: list[float], after: list[float], most: int = 100) -> ExampleSet:
    files = [
        write_predictions(
            folder / name,
            *(make_prediction_line(f"s{i}", "a", "g", x) for i, x in enumerate(scores)),
        )
        for name, scores in (("before.jsonl", before), ("after.jsonl", after))
    ]
    return read_examples(files[0], files[1], "x", most)


def test_example_kind_follows_its_score(tmp_path: Path) -> None:
    before, after = [0.1, 0.9, 0.5, 1.0, 0.5], [0.8, 0.7, 0.5, 1.0, 0.5 + 1e-9]
    found = compare(tmp_path, before, after)
    assert found.metric == "similarity"
    kinds = {one.latest["id"]: one.kind for one in found.displayed}
    assert kinds == {"s0": "better", "s1": "worse", "s2": "wrong", "s3": "right", "s4": "wrong"}
    assert found.counts == {"worse": 1, "better": 1, "wrong": 2, "right": 1}
    assert found.num_incorrect == 4
    assert found.is_paired
    assert found.count_hidden() == {}
    none = compare(tmp_path, [0.1, 0.9], [0.9, 0.1], most=0)
    assert none.displayed == []
    assert none.count_hidden() == {"worse": 1, "better": 1}


@pytest.mark.parametrize(
    ("headline", "score"),
    [
        *(("accuracy_at_0.5", "hit"), ("f1_at_0.5", "f1"), ("similarity", "similarity")),
        *(("mine", "mine"), ("bleu_4", "similarity"), (None, "similarity")),
    ],
)
def test_score_name_of_the_primary_metric(tmp_path: Path, headline: str | None, score: str) -> None:
    scores = {"exact": 1.0, "hit": 0.0, "f1": 0.5, "mine": 3.0, "similarity": 0.1}
    line = make_prediction_line("s", "a", "g", 0.0, scores=scores)
    file = write_predictions(tmp_path / "a.jsonl", line)
    assert read_examples(file, None, headline, 9).metric == score


def test_largest_changes_are_first_and_all_kinds_are_shown(tmp_path: Path) -> None:
    before = [0.5] * 40 + [0.9, 0.9] + [0.3] * 40 + [1.0] * 40
    after = [0.5 + i / 100 for i in range(1, 41)] + [0.2, 0.5] + [0.3] * 40 + [1.0] * 40
    found = compare(tmp_path, before, after, most=40)
    kinds = [one.kind for one in found.displayed]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"worse": 2, "better": 18, "wrong": 10, "right": 10}
    assert [one.latest["id"] for one in found.displayed[:3]] == ["s40", "s41", "s39"]
    assert found.count_hidden() == {"better": 22, "wrong": 30, "right": 30}
    assert found.total == 122


def test_equal_ids_are_paired_in_order(tmp_path: Path) -> None:
    rows = {"b": (("a", 0.1), ("a", 0.9), ("c", 0.5)), "a": (("a", 0.2), ("a", 0.8), ("d", 0.5))}
    before, after = (
        write_predictions(
            tmp_path / answer, *(make_prediction_line(n, answer, "g", x) for n, x in scores)
        )
        for answer, scores in rows.items()
    )
    changes = {
        (one.latest["id"], round(one.change, 3), *(line is None for line in one.predictions))
        for one in read_examples(before, after, "similarity", 9).displayed
    }
    # Sample c was not evaluated again: nothing is known about its latest answer.
    pairs = {("a", 0.1, False, False), ("a", -0.1, False, False)}
    assert changes == pairs | {("d", 0.0, True, False)}


def test_single_evaluation_separates_right_from_wrong(tmp_path: Path) -> None:
    lines = (make_prediction_line("a", "", "", 1.0), make_prediction_line("b", "", "", 0.5))
    file = write_predictions(tmp_path / "b.jsonl", *lines)
    found = read_examples(file, None, "similarity", 9)
    assert not found.is_paired
    assert [one.kind for one in found.displayed] == ["wrong", "right"]
    # A truncated line ends the file.
    with file.open("a") as stream:
        stream.write('{"id": "b", "ans')
    assert read_examples(file, None, "similarity", 9).total == 2
    invalid = {"similarity": float("nan"), "b": "x"}
    file = write_predictions(file, make_prediction_line("a", "", "", 0.0, scores=invalid))
    found = read_examples(file, None, "similarity", 9)
    assert (found.metric, found.counts["wrong"]) == ("", 1)


def test_answer_equal_to_a_reference_is_correct(tmp_path: Path) -> None:
    """The CIDEr-D of a perfect caption of common words is below its maximum."""
    scores = {"cider_d": 7.5}
    box = {"image": 0, "label": None, "xyxy": [1, 2, 3, 4]}
    lines = [
        make_prediction_line("equal", "a circle", "a circle", 0, scores=scores),
        make_prediction_line("second", "a ball", "a", 0, scores=scores, references=["a ball"]),
        make_prediction_line("other", "a ball", "a circle", 0, scores=scores),
        make_prediction_line("box", "here", "here", 0, scores=scores, gold_boxes=[box]),
    ]
    file = write_predictions(tmp_path / "a.jsonl", *lines)
    found = read_examples(file, None, "cider_d", 9)
    assert [one.latest["id"] for one in found.displayed] == ["other", "box", "equal", "second"]
    assert [one.is_incorrect for one in found.displayed] == [True, True, False, False]
    assert [line["id"] for line in read_incorrect_lines(file, "cider_d")] == ["other", "box"]


TEXTS = ["one two", "three", "four five six", "seven", "eight nine", "ten", "eleven", "twelve"]


def make_cases(metric: MetricSpec, num_correct: int) -> list[EvalCase]:
    box = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 9.0))
    other = BoxPart(image=0, label="a", xyxy=(0.0, 0.0, 9.0, 6.0))
    cases = []
    for i, text in enumerate(TEXTS):
        answer, found = (text, box) if i < num_correct else ("nothing", other)
        boxes, truth = ((found,), (box,)) if metric == "grounding" else ((), ())
        cases.append(EvalCase(answer, boxes, (text,), truth, str(i), ended_with_eos=i % 3 == 0))
    return cases


def write_scored(path: Path, metric: MetricSpec, cases: list[EvalCase]) -> Path:
    lines = []
    for one, scores in zip(cases, compute_metrics(metric, cases).per_sample, strict=True):
        reason = "stop" if one.ended_with_eos else "length"
        more = {"scores": scores, "finish_reason": reason}
        lines.append(make_prediction_line(one.id, one.answer, one.references[0], 0.0, **more))
    return write_predictions(path, *lines)


def estimate(folder, metric, **recorded):
    """Return the differences from recorded scores, and those of the full comparison."""
    before, after = make_cases(metric, 2), make_cases(metric, 7)
    files = [write_scored(folder / n, metric, c) for n, c in (("b", before), ("a", after))]
    then, since = (compute_metrics(metric, cases).scores for cases in (before, after))
    primary = get_primary_metric(metric, then)
    differences = estimate_differences(files[0], files[1], then | recorded, since, primary)
    return differences, compare_cases(metric, before, after)


@pytest.mark.parametrize("metric", ["ocr", "qa", "grounding", "classification"])
def test_differences_of_means_match_the_full_comparison(metric: MetricSpec, tmp_path: Path) -> None:
    found, expected = estimate(tmp_path, metric)
    wanted = {one.name: one for one in expected}
    assert len(found) >= 2
    assert "ended_with_eos" in found
    for name, one in found.items():
        assert one.verdict == wanted[name].verdict
        assert (one.low, one.high) == pytest.approx((wanted[name].low, wanted[name].high))
    assert {"similarity", "anls", "accuracy_at_0.5", "accuracy"} & found.keys()


def test_other_scores_and_samples_have_no_difference(tmp_path: Path) -> None:
    found, _ = estimate(tmp_path, "ocr")
    assert "cer" not in found
    # The recorded score differs from the mean of the file.
    found, _ = estimate(tmp_path, "ocr", exact=0.9)
    assert found.keys() == {"similarity", "exact_folded", "ended_with_eos"}
    files = [
        write_predictions(tmp_path / name, make_prediction_line(name, "", "", 0.5)) for name in "ba"
    ]
    assert estimate_differences(files[0], files[1], {"similarity": 0.5}, {"similarity": 0.5}) == {}


CASES = load_cases("example_data")


def example(before: Any = None, after: Any = None) -> Example:
    return Example([before, after], [None, None], "better", 0.5)


def build_data(*examples: Example, folders: tuple[Path, ...] = ()) -> Any:
    data = ExampleDataBuilder(folders, False).build(examples)
    json.dumps(data, allow_nan=False)
    return data


@pytest.fixture
def image_path(tmp_path: Path) -> str:
    Image.new("RGB", (80, 40), "red").save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def test_example_has_both_answers(image_path: str) -> None:
    images = [image_path, image_path]
    before = make_prediction_line("s", "b", "gold", 0.25, image=images, finish_reason="length")
    after = make_prediction_line("s", "a", "gold", 1.0, image=images, references=["", "other"])
    data = build_data(example(before, after), example(after=after))
    found, _ = data["examples"]
    assert found["references"] == ["gold", "other"]
    assert (found["predictions"][0]["text"], found["predictions"][0]["is_complete"]) == ("b", False)
    assert found["predictions"][1]["scores"] == {"similarity": 1.0, "exact match": 1.0}
    # Images are embedded once.
    (image,) = data["images"]
    assert [one["images"] for one in data["examples"]] == [[0, 0], [0, 0]]
    assert (image["width"], image["height"]) == (80, 40)
    assert image["src"].startswith("data:image/png;base64,")


def test_later_page_renders_only_new_images(image_path, tmp_path, monkeypatch):
    other = str(tmp_path / "other.png")
    Image.new("RGB", (20, 20), "blue").save(other)
    opened: list[str] = []

    def noted(path: Path, **kwargs: Any) -> Image.Image:
        opened.append(path.name)
        return load_image(path, **kwargs)

    monkeypatch.setattr(examples, "load_image", noted)
    missing = str(tmp_path / "later.png")
    known: examples.ThumbnailCache = {}

    def shown(*paths: str) -> Any:
        lines = [make_prediction_line("s", "", "", 1.0, image=path) for path in paths]
        found = ExampleDataBuilder((), False, known).build([example(after=line) for line in lines])
        return [one.get("src") for one in found["images"]]

    first, _ = shown(image_path, missing)
    Image.new("RGB", (9, 9), "green").save(missing)
    again, new, late = shown(image_path, other, missing)
    assert first == again
    # In any order: they are read side by side.
    assert sorted(opened) == ["later.png", "other.png", "p.png"]
    assert None not in (new, late)
    shown(other)
    assert {Path(path).name for path, _ in known} == {"other.png"}


def test_relative_paths_use_the_start_folder(image_path: str, tmp_path: Path) -> None:
    line = make_prediction_line("s", "", "", 1.0, image="p.png")
    folders = (tmp_path / "elsewhere", tmp_path)
    assert "src" in build_data(example(after=line), folders=folders)["images"][0]
    missing = build_data(example(after=line), folders=folders[:1])["images"][0]
    assert missing == {"path": "p.png", "error": "no such image"}


@pytest.mark.parametrize("name", ["broken.png", "folder.png", "null\0.png", "x" * 5000])
def test_unreadable_image_has_a_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    line = make_prediction_line("s", "", "", 1.0, image=os.path.join(tmp_path, name))
    (found,) = build_data(example(after=line))["images"]
    assert found["error"]
    assert "src" not in found


@pytest.mark.parametrize(
    "box",
    [
        {"xyxy": [1, 2, 3]},
        {"xyxy": [1, 2, 3, float("nan")]},
        {"xyxy": [1, 2, 3, "4"]},
        {"label": "x"},
        [1, 2, 3, 4],
        None,
    ],
)
def test_invalid_boxes_are_not_drawn(box: Any) -> None:
    good = {"image": 0, "label": None, "xyxy": [4, 3, 2, 1]}
    assert read_boxes([box, good]) == [{"image": 0, "label": "", "xyxy": [4.0, 3.0, 2.0, 1.0]}]
    assert read_boxes(box) == []


def test_long_answers_are_truncated() -> None:
    boxes = [{"image": 0, "label": "l" * 500, "xyxy": [0, 0, 1, 1]}] * 1000
    line = make_prediction_line("s", "x" * (MAX_ANSWER_CHARS + 1234), "", 0.0, boxes=boxes)
    (found,) = build_data(example(after=line))["examples"]
    assert found["predictions"][1]["text"].endswith("x [and 1,234 more characters]")
    assert found["is_truncated"] is True
    assert len(found["predictions"][1]["boxes"]) == MAX_BOXES
    assert len(found["predictions"][1]["boxes"][0]["label"]) == 80


TOO_LONG = ("word " * 300, "word other " * 300, None)


@pytest.mark.parametrize(
    ("answer", "reference", "pairs"), [*CASES["test_differences_of_texts"], TOO_LONG]
)
def test_differences_of_texts(answer: str, reference: str, pairs: list[list[str]] | None) -> None:
    spans = diff_texts(answer, reference)
    found = spans and [[answer[a:b], reference[c:d]] for a, b, c, d in spans]
    assert found == pairs


@pytest.mark.parametrize(
    ("answer", "reference", "fields"), CASES["test_differences_of_json_fields"]
)
def test_differences_of_json_fields(answer: str, reference: str, fields: object) -> None:
    found = diff_fields(answer, reference)
    if found:
        found["differences"].sort()
    assert found == fields
    (data,) = build_data(example(after=make_prediction_line("s", answer, reference, 0.0)))[
        "examples"
    ]
    assert (data["predictions"][1]["fields"] is None) == (fields is None)


def test_complete_formulas_of_latex_answers_are_rendered() -> None:
    pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")
    lines = [
        make_prediction_line("s", answer, r"\frac{a}{b}", 0.0, finish_reason=reason)
        for answer, reason in ((r"\frac ab", "stop"), ("orange " * 50, "length"))
    ]
    several = [example(after=line) for line in lines]
    first, second = ExampleDataBuilder((), True).build(several)["examples"]
    assert first["formula"][0] == first["predictions"][1]["formula"][0] == "math"
    assert second["predictions"][1]["formula"] is None
    assert build_data(*several)["examples"][0]["formula"] is None


def test_box_coordinates_follow_decoded_image_size(tmp_path: Path) -> None:
    """A large JPEG is decoded at reduced size and rotated by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (6000, 2000), "red")
    image.paste("blue", (0, 0, 3000, 2000))
    image.save(tmp_path / "p.jpg", exif=exif)
    line = make_prediction_line("s", "", "", 1.0, image=str(tmp_path / "p.jpg"))
    (found,) = build_data(example(after=line))["images"]
    assert (found["width"], found["height"]) == (2000, 6000)
    shown = Image.open(io.BytesIO(base64.b64decode(found["src"].partition(",")[2]))).convert("RGB")
    assert shown.size == (320, 960)
    assert [shown.getpixel((160, y))[2] > 200 for y in (100, 860)] == [True, False]


def test_large_images_use_bounded_memory(tmp_path: Path) -> None:
    """Reports are rendered in training processes, which need the memory.

    Takes long: decodes eight images of 49 megapixels.
    """
    Image.new("RGB", (7000, 7000)).save(tmp_path / "0.png", compress_level=1)
    for number in range(1, 8):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    program = (
        "import pathlib, sys; from finesight.report.examples import ExampleDataBuilder;"
        "from finesight.report.examples import Example;"
        "status = pathlib.Path('/proc/self/status');"
        "highest = lambda: int(status.read_text().split('VmHWM:')[1].split()[0]) / 1e3;"
        "before = highest();"
        "example = Example([None, {'id': '', 'image': sys.argv[1:]}], [None, None], 'right', 0.0);"
        "found = ExampleDataBuilder((), False).build([example])['images'];"
        "print(sum('src' in one for one in found), highest() - before)"
    )
    paths = [str(tmp_path / f"{number}.png") for number in range(8)]
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, megabytes = done.stdout.split()
    assert count == "8"
    # An image takes 147 MB as RGB, and 294 MB with its rotated or resized copy.
    assert float(megabytes) < 600
