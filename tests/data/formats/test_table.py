"""Any table, read by the columns that the user names."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from foreign import brief, read, talk

from finesight.data.case import Case
from finesight.data.formats.table import FORMAT, suggestion
from finesight.errors import UserError

NAN = float("nan")


def case(folder: Path, record: dict[str, Any], columns: str, **said: Any) -> Case:
    mapped = dict(pair.split("=") for pair in columns.split())
    return read(FORMAT, {"image": "b.png", **record}, folder, columns=mapped, **said)


def test_question_and_prompt_after_the_picture(folder: Path) -> None:
    found = case(
        folder, {"q": "who?", "a": 7}, "image=image question=q answer=a", prompt="One word."
    )
    assert talk(found) == [
        ("user", [folder / "b.png", "who?\nOne word."]),
        ("assistant", ["7"]),
    ]
    assert talk(case(folder, {"a": "x"}, "image=image answer=a", prompt="Read."))[0] == (
        "user",
        [folder / "b.png", "Read."],
    )


def test_a_list_of_answers(folder: Path) -> None:
    found = case(folder, {"a": ["x", "y", "x"]}, "image=image answer=a", prompt="?")
    samples = found.for_training()
    assert [sample.id for sample in samples] == ["rows-3-1", "rows-3-2", "rows-3-3"]
    assert [brief(sample.messages[-1].content) for sample in samples] == [["x"], ["y"], ["x"]]
    assert all(not sample.references for sample in samples)
    measured = found.for_evaluation()
    assert measured.id == "rows-3"
    assert brief(measured.messages[-1].content) == ["x"]
    assert measured.references == ("y", "x")


@pytest.mark.parametrize(
    "box",
    [
        [1, 2, 3, 4],
        [[1, 2, 3, 4]],
        "1 2 3 4",
        "1, 2; 3,4",
        "[1, 2, 3, 4]",
        "[[1,2,3,4]]",
        "(1, 2, 3, 4)",
        "[ 1.  2.\n 3.  4.]",
        "1e0 2 .3e1 +4",
    ],
)
def test_a_box_is_the_answer_when_there_is_no_other(folder: Path, box: object) -> None:
    found = case(folder, {"b": box, "l": "cat"}, "image=image box=b label=l", prompt="?")
    assert talk(found)[1] == ("assistant", [(0, "cat", (1.0, 2.0, 3.0, 4.0))])


def test_box_format_and_units(folder: Path) -> None:
    found = case(
        folder,
        {"b": [0.5, 0.5, 0.1, 0.2]},
        "image=image box=b",
        prompt="?",
        box_format="cxcywh",
        box_units="1",
    )
    assert talk(found)[1][1] == [(0, None, pytest.approx((450.0, 200.0, 550.0, 300.0)))]


def test_several_boxes_with_labels(folder: Path) -> None:
    record = {"b": [[1, 2, 3, 4], [5, 6, 7, 8]], "l": ["cat", "dog"]}
    assert talk(case(folder, record, "image=image box=b label=l", prompt="?"))[1][1] == [
        (0, "cat", (1.0, 2.0, 3.0, 4.0)),
        (0, "dog", (5.0, 6.0, 7.0, 8.0)),
    ]


@pytest.mark.parametrize("text", ["[1,2,3,4],[5,6,7,8]", "[[1 2 3 4]\n [5 6 7 8]]"])
def test_several_boxes_in_a_cell_of_text(folder: Path, text: str) -> None:
    found = talk(case(folder, {"b": text}, "image=image box=b", prompt="?"))[1][1]
    assert found == [(0, None, (1.0, 2.0, 3.0, 4.0)), (0, None, (5.0, 6.0, 7.0, 8.0))]


def test_boxes_as_json_in_an_answer_become_boxes(folder: Path) -> None:
    found = case(folder, {"a": '{"bbox_2d": [1, 2, 3, 4]}'}, "image=image answer=a", prompt="?")
    assert talk(found)[1][1] == [(0, None, (1.0, 2.0, 3.0, 4.0))]


def test_columns_become_the_fields_of_a_json_answer(folder: Path) -> None:
    record = {"from": "Zürich", "seat": "7C", "price": 12.5, "none": None, "empty": "", "nan": NAN}
    columns = "image=image fields=from,price,none,empty,nan,seat"
    found = case(folder, record, columns, prompt="?")
    assert talk(found)[1] == ("assistant", ['{"from": "Zürich", "price": 12.5, "seat": "7C"}'])
    assert len(found.answers) == 1


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("12", '"12"'),
        (["a", {"b": 1}], '["a", {"b": 1}]'),
        (datetime.date(2027, 3, 14), '"2027-03-14"'),
    ],
)
def test_one_column_may_be_the_only_field(folder: Path, value: object, written: str) -> None:
    found = case(folder, {"a,b": value}, "image=image fields=a,b", prompt="?")
    assert talk(found)[1][1] == [f'{{"a,b": {written}}}']


def test_fields_stay_text_whatever_their_columns_are_called(folder: Path) -> None:
    record = {"bbox_2d": [1, 2, 3, 4], "label": "cat"}
    text = '{"bbox_2d": [1, 2, 3, 4], "label": "cat"}'
    found = case(folder, record, "image=image fields=bbox_2d,label", prompt="?")
    assert talk(found)[1] == ("assistant", [text])
    from_csv = case(
        folder, {**record, "bbox_2d": "1 2 3 4"}, "image=image fields=bbox_2d,label", prompt="?"
    )
    assert talk(from_csv)[1][1] == [text.replace("[1, 2, 3, 4]", '"1 2 3 4"')]


def test_blank_cells_are_empty_fields(folder: Path) -> None:
    record = {"a": " ", "b": "\t\n", "c": " x "}
    found = case(folder, record, "image=image fields=a,b,c", prompt="?")
    assert talk(found)[1][1] == ['{"c": " x "}']


def test_blanks_around_the_names_of_columns(folder: Path) -> None:
    record = {"a": 1, " b ": 2, "x": 1, "y": 2, "z": 3, "w": 4}
    columns = {"image": "image", "fields": " a, b ", "box": "x, y, z, w"}
    found = read(FORMAT, {"image": "b.png", **record}, folder, columns=columns, prompt="?")
    assert talk(found)[1][1] == ['{"a": 1, " b ": 2}\n', (0, None, (1.0, 2.0, 3.0, 4.0))]


def test_fields_with_a_box_stand_before_it(folder: Path) -> None:
    record = {"a": "x", "b": [1, 2, 3, 4]}
    found = case(folder, record, "image=image fields=a box=b", prompt="?")
    assert talk(found)[1][1] == ['{"a": "x"}\n', (0, None, (1.0, 2.0, 3.0, 4.0))]


def test_an_empty_list_is_no_picture(folder: Path) -> None:
    found = case(folder, {"image": [], "a": "x"}, "image=image answer=a", prompt="?")
    assert talk(found)[0][1] == ["?"]


def test_boxes_in_columns_of_their_own(folder: Path) -> None:
    record = {"x": "1", "y": "2", "w": "3", "h": "4"}
    found = case(folder, record, "image=image box=x,y,w,h", prompt="?", box_format="xywh")
    assert talk(found)[1][1] == [(0, None, (1.0, 2.0, 4.0, 6.0))]


def test_with_an_answer_the_box_stands_on_the_next_line(folder: Path) -> None:
    found = case(
        folder, {"a": ["stop", "Stop"], "b": [1, 2, 3, 4]}, "image=image answer=a box=b", prompt="?"
    )
    box = (0, None, (1.0, 2.0, 3.0, 4.0))
    assert [brief(answer) for answer in found.answers] == [["stop\n", box], ["Stop\n", box]]
    assert found.for_evaluation().references == ("Stop",)


def test_several_pictures(folder: Path) -> None:
    record = {"image": ["a.png", "b.png"], "a": "x"}
    assert talk(case(folder, record, "image=image answer=a", prompt="?"))[0][1] == [
        folder / "a.png",
        folder / "b.png",
        "?",
    ]


@pytest.mark.parametrize(
    ("record", "columns", "what"),
    [
        ({"a": "x"}, "image=picture answer=a", "no column 'picture'"),
        ({"a": ""}, "image=image answer=a", "the answer is ''"),
        ({"a": ["x", None]}, "image=image answer=a", "the answer is 'None'"),
        ({"a": {"raw": "x"}}, "image=image answer=a", "the answer is"),
        ({"a": []}, "image=image answer=a", "no answer"),
        ({"b": None}, "image=image box=b", "no answer"),
        ({"a": "x", "q": " "}, "image=image answer=a question=q", "the question is"),
        ({"a": float("nan")}, "image=image answer=a", "the answer is 'nan'"),
        ({"a": "see <|vision_start|>"}, "image=image answer=a", "the mark"),
        ({"image": None, "a": "x"}, "image=image answer=a", "a picture given as NoneType"),
        ({"b": "1 2 3"}, "image=image box=b", "the box"),
        ({"b": "1 2 3 4 5 6 7 8"}, "image=image box=b", "the box"),
        ({"b": "None", "a": "x"}, "image=image box=b answer=a", "the box 'None'"),
        ({"b": "[" * 5000}, "image=image box=b", "the box"),
        ({"b": "1 2 3 1" + "0" * 400}, "image=image box=b", "the box"),
        ({"b": "left"}, "image=image box=b", "the box 'left'"),
        ({"b": [[1, 2, 3, 4], [5]]}, "image=image box=b", r"the box '\[5\]'"),
        ({"b": [1, 2, 3, 4], "l": ["a", "b"]}, "image=image box=b label=l", "2 labels for 1"),
        ({"b": [1, 2, 3, 4], "image": ["a.png"] * 2}, "image=image box=b", "2 pictures"),
        ({"b": [1, 2, 3, 4]}, "box=b", "0 pictures"),
        ({"image": "", "a": "x"}, "image=image answer=a", "a picture given as str"),
        ({"a": "", "b": None}, "image=image fields=a,b", "no answer in image, a,b"),
        ({"a": "x"}, "image=image fields=a,c", "no column 'a,c' for --map fields=a,c"),
        ({"a": " ", "b": "\t"}, "image=image fields=a,b", "no answer in image, a,b"),
        ({"a": 1, "b": [NAN]}, "image=image fields=a,b", "column 'b' .* cannot be written as JSON"),
        ({"a": b"raw", "b": 1}, "image=image fields=a,b", "column 'a' .*3 bytes that are no text"),
        ({"a": 1, "b": "<image>"}, "image=image fields=a,b", "column 'b': the mark '<image>'"),
        ({"a": 1, "b": {"<bbox>": 2}}, "image=image fields=a,b", "column 'b': the mark '<bbox>'"),
        ({"<image>": 1}, "image=image fields=<image>", "column '<image>': the mark '<image>'"),
        ({"a": 1, "b": 2}, "image=image fields=b,a,b", "column 'b' twice in fields=b,a,b"),
        ({"a": "x", "b": "y"}, "image=image fields=b answer=a", "fields=b beside answer=a"),
    ],
)
def test_refused(folder: Path, record: dict[str, Any], columns: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        case(folder, record, columns, prompt="?")
    assert caught.value.expected
    assert caught.value.remedy


def test_columns_are_suggested() -> None:
    names = ["image_path", "captions", "bbox_xyxy", "n"]
    assert suggestion(dict.fromkeys(names)) == (
        "--map image=image_path --map answer=captions --map box=bbox_xyxy"
    )
    assert suggestion({"n": 1}) == "--map image=COLUMN --map answer=COLUMN"


def test_suggested_columns_can_be_pasted_into_a_shell() -> None:
    assert suggestion(dict.fromkeys(["file name", "Caption "])) == (
        "--map 'image=file name' --map 'answer=Caption '"
    )
