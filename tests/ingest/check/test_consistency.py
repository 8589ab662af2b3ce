"""Consistency of samples: duplicates, contradictions, uniform answers, and leaked images."""

import random
from collections import Counter
from pathlib import Path

import pytest
from case_files import load_cases
from check_fixtures import count_codes, issues_by_line, make_record, run_check, write_records
from PIL import Image
from shape_images import write_shape_images

from finesight.ingest.check import dataset_issues

CASES = load_cases("consistency")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shape_images(tmp_path / "scenes", 12, seed=4)
    return tmp_path


def image_name(number: int) -> str:
    return f"scenes/images/{number:04}.png"


def check_records(folder: Path, *records):
    return run_check(write_records(folder / "data.jsonl", records))


@pytest.mark.parametrize(("one", "other", "contradict"), CASES["test_contradicting_answers"])
def test_contradicting_answers(folder, one, other, contradict):
    result = check_records(
        folder, *(make_record(image_name(0), "How?", answer) for answer in (one, other))
    )
    assert count_codes(result) == ({"contradictory-answers": 1} if contradict else {})


@pytest.mark.parametrize("num_texts", [2, 4])
def test_texts_among_json_answers_are_reported(folder, num_texts):
    answers = [*(f'{{"total": {index}}}' for index in range(5)), "12.50", '{"total": ', "x", "y"]
    # Answers to another question may be texts.
    questions = [("How?", answer) for answer in answers[: 5 + num_texts]] + [("Why?", "z")]
    result = check_records(
        folder, *(make_record(image_name(n), *pair) for n, pair in enumerate(questions))
    )
    assert count_codes(result) == {"answer-not-json": num_texts}
    issue = issues_by_line(result, "answer-not-json")[6]
    assert issue.severity == "warning"
    assert issue.what == f"'12.50', but 5 of {5 + num_texts} answers are JSON objects"


@pytest.mark.parametrize("answers", [('{"a": 1}', "x"), ("[1]", "x", "y"), ('{"a": 1}',) * 2])
def test_half_of_the_answers_as_json_is_no_issue(folder, answers):
    records = [make_record(image_name(n), "How?", answer) for n, answer in enumerate(answers)]
    assert count_codes(check_records(folder, *records)) == {}


@pytest.mark.parametrize(
    ("other", "contradict"),
    [
        ([10, 10, 50, 50], False),
        ([11, 9, 50, 52], False),
        ([60, 60, 100, 100], True),
        ([11, 10], False),
        ([60, 60], True),
    ],
)
def test_contradicting_boxes(folder, other, contradict):
    boxes = [10, 10, 50, 50][: len(other)], other
    records = [make_record(image_name(0), "Where?", None, box) for box in boxes]
    kind = {"duplicate-sample": 1} if other == [10, 10, 50, 50] else {}
    assert count_codes(check_records(folder, *records)) == (
        {"contradictory-answers": 1} if contradict else kind
    )


def test_different_question_or_image_is_no_contradiction(folder):
    rows = (
        (0, "Which colour?", "red"),
        (0, "Which shape?", "square"),
        (1, "Which colour?", "blue"),
    )
    records = [make_record(image_name(number), *texts) for number, *texts in rows]
    assert count_codes(check_records(folder, *records)) == {}


def test_several_captions_per_image_are_valid(folder):
    answers = [f"The same image in other words, number {n} of them." for n in range(4)]
    records = [make_record(image_name(p), "Describe.", a) for p in range(8) for a in answers]
    wrong = [make_record(image_name(p), "Count.", f"{n}") for p, n in ((0, 1), (1, 2), (0, 3))]
    result = check_records(folder, *records, *wrong)
    assert count_codes(result) == {"contradictory-answers": 1}
    assert issues_by_line(result, "contradictory-answers").keys() == {35}


def test_dominant_answer_is_reported(folder):
    answers = ["yes"] * 15 + [f"no, {n}" for n in range(10)]
    records = [
        make_record(image_name(0), f"Question {n}?", answer) for n, answer in enumerate(answers)
    ]
    result = check_records(folder, *records)
    assert count_codes(result) == {"dominant-answer": 1}
    assert "15 of 25 answers are 'yes'" in result.issues[0].what


@pytest.mark.parametrize(("rare", "is_similar"), CASES["test_rare_similar_answers"])
@pytest.mark.parametrize("num_rare", [1, 3])
def test_rare_similar_answers(folder, rare, is_similar, num_rare):
    answers = ["square"] * 60 + ["disc 1"] * 60 + ["cat"] * 60 + [rare] * num_rare
    records = [
        make_record(image_name(0), "Which?", answer) | {"id": f"s{n}"}
        for n, answer in enumerate(answers)
    ]
    train = write_records(folder / "train.jsonl", records[:-num_rare])
    result = run_check(train, write_records(folder / "eval.jsonl", records[-num_rare:]))
    issues = [one for one in result.issues if one.code == "rare-similar-answer"]
    assert [one.sample_id for one in issues] == [f"s{180 + n}" for n in range(num_rare)][
        : num_rare * is_similar
    ]
    for one in issues:
        assert one.severity == "note"
        assert (repr(rare) in one.what, "'square' in 60" in one.what) == (True, True)
        assert "if it is misspelled" in one.remedy


@pytest.mark.parametrize(("rare", "frequent", "similar"), CASES["test_classes_are_no_misspellings"])
def test_classes_are_no_misspellings(rare, frequent, similar):
    counts = Counter({frequent: 60, rare: 3})
    assert [*dataset_issues.find_similar(counts)] == ([(rare, frequent)] if similar else [])


def test_rare_labels_of_boxes_are_reported(folder):
    records = [
        make_record(image_name(0), f"Where is {n}?", None, [10, 10, 50, 50]) for n in range(60)
    ]
    for n, record in enumerate(records):
        record["messages"][-1]["content"][0]["label"] = "pedestrain" if n == 7 else "pedestrian"
    issues = issues_by_line(check_records(folder, *records), "rare-similar-answer")
    assert {line: issue.what for line, issue in issues.items()} == {
        8: "'pedestrain' (1 of 60 labels of boxes), but 'pedestrian' in 59"
    }


def test_few_pairs_of_classes_are_compared(monkeypatch):
    compared = []

    def is_similar(rare, frequent):
        compared.append((rare, frequent))
        return False

    monkeypatch.setattr(dataset_issues, "is_similar", is_similar)
    chance = random.Random(0)
    names = ["".join(chance.choices("abcdefgh", k=8)) for _ in range(340)]
    counts = Counter({name: 1 if n < 290 else 20 for n, name in enumerate(names)})
    assert [*dataset_issues.find_similar(counts)] == []
    assert 0 < len(compared) < 0.05 * 290 * 50
    assert all(counts[rare] == 1 and counts[text] == 20 for rare, text in compared)


def test_shared_blank_image_is_no_leak(folder):
    Image.new("L", (50, 50), 255).save(folder / "blank.png")
    validation = write_records(folder / "eval.jsonl", [make_record("blank.png")])
    result = run_check(
        write_records(folder / "train.jsonl", [make_record("blank.png", "Another?")]), validation
    )
    assert count_codes(result) == {}


def test_answers_of_free_text_are_not_similar(folder):
    answers = ["square"] * 30 + ["sqaure"] + [f"text {chr(97 + n)}" for n in range(20)]
    records = [make_record(image_name(0), "Which?", answer) for answer in answers]
    assert "rare-similar-answer" not in count_codes(check_records(folder, *records))
