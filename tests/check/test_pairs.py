"""What samples show together: repeated, contradicting, mostly the same, held out and trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversing import by_line, checked, codes, lines, sample
from PIL import Image
from shape_pictures import draw_scenes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_scenes(tmp_path / "scenes", 12, seed=4)
    return tmp_path


def picture(number: int) -> str:
    return f"scenes/pictures/{number:04}.png"


def found(folder: Path, *records):
    return checked(lines(folder / "data.jsonl", records))


def test_the_same_sample_again(folder):
    copy = folder / "copy.png"
    copy.write_bytes((folder / picture(0)).read_bytes())
    result = found(folder, sample(picture(0)), sample(picture(1)), sample("copy.png"))
    assert codes(result) == {"duplicate": 1}
    finding = by_line(result, "duplicate")[3]
    assert (finding.severity, finding.fix) == ("note", "dropped")
    assert finding.what.endswith("data.jsonl:1")


@pytest.mark.parametrize(
    ("one", "other", "contradict"),
    [
        ("Yes", "No", True),
        ("yes.", "Yes", False),
        ("7", "9", True),
        ("A long description of what is there, and then of this.", "A quite other one.", True),
    ],
)
def test_other_words(folder, one, other, contradict):
    result = found(folder, *(sample(picture(0), "How?", answer) for answer in (one, other)))
    assert codes(result) == ({"contradiction": 1} if contradict else {})


@pytest.mark.parametrize(
    ("other", "contradict"),
    [([10, 10, 50, 50], False), ([11, 9, 50, 52], False), ([60, 60, 100, 100], True)],
)
def test_other_boxes(folder, other, contradict):
    records = [sample(picture(0), "Where?", None, box) for box in ([10, 10, 50, 50], other)]
    kind = {"duplicate": 1} if other == [10, 10, 50, 50] else {}
    assert codes(found(folder, *records)) == ({"contradiction": 1} if contradict else kind)


def test_another_question_or_picture_is_no_contradiction(folder):
    records = [
        sample(picture(0), "Which colour?", "red"),
        sample(picture(0), "Which shape?", "square"),
        sample(picture(1), "Which colour?", "blue"),
    ]
    assert codes(found(folder, *records)) == {}


def test_several_captions_of_each_picture_are_all_right(folder):
    answers = [f"The same picture told in other words, number {n} of them." for n in range(4)]
    records = [sample(picture(p), "Describe.", a) for p in range(8) for a in answers]
    wrong = [sample(picture(p), "Count.", f"{n}") for p, n in ((0, 1), (1, 2), (0, 3))]
    result = found(folder, *records, *wrong)
    assert codes(result) == {"contradiction": 1}
    assert by_line(result, "contradiction").keys() == {35}


def test_answers_of_one_row_are_all_right(folder):
    rows = [{"picture": picture(n), "texts": ["one word", "another"]} for n in range(3)]
    table = lines(folder / "rows.jsonl", rows)
    columns = {"image": "picture", "answer": "texts"}
    result = checked(table, format="table", columns=columns, prompt="What?")
    assert (result.samples, codes(result)) == (6, {})


def test_one_answer_to_most_questions(folder):
    answers = ["yes"] * 15 + [f"no, {n}" for n in range(10)]
    records = [sample(picture(0), f"Question {n}?", answer) for n, answer in enumerate(answers)]
    result = found(folder, *records)
    assert codes(result) == {"one-answer": 1}
    assert "15 of 25 answers are 'yes'" in result.findings[0].what


def test_held_out_pictures_in_the_training_file(folder):
    (folder / "copy.png").write_bytes((folder / picture(1)).read_bytes())
    Image.open(folder / picture(2)).resize((150, 150)).save(folder / "anew.jpg", quality=80)
    train = [sample(picture(n)) for n in (0, 3, 4)]
    train += [sample("copy.png"), sample("anew.jpg"), sample(picture(0), "Another?")]
    held_out = lines(folder / "eval.jsonl", [sample(picture(n)) for n in (0, 1, 2)])
    result = checked(lines(folder / "train.jsonl", train), held_out)
    assert by_line(result, "same-picture").keys() == {1, 4, 6}
    assert by_line(result, "same-picture-resaved").keys() == {5}
    finding = by_line(result, "same-picture-resaved")[5]
    assert [shown.path.name for shown in finding.shown] == ["anew.jpg", "0002.png"]
    assert finding.what.endswith("eval.jsonl:3")
    assert result.sources[0].held_out, "held-out sources are read first"


def test_a_blank_picture_on_both_sides_is_no_leak(folder):
    Image.new("L", (50, 50), 255).save(folder / "blank.png")
    held_out = lines(folder / "eval.jsonl", [sample("blank.png")])
    result = checked(lines(folder / "train.jsonl", [sample("blank.png", "Another?")]), held_out)
    assert codes(result) == {}
