"""Any table, read by the columns that the user names."""

from __future__ import annotations

import datetime
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record, summarize_content
from case_files import load_cases

from finesight.data.boxes import InvalidBoxError
from finesight.data.formats.dataset_format import ImportExample
from finesight.data.formats.table import (
    FORMAT,
    check_guessed_columns,
    find_box_format,
    guess_box_options,
    guess_columns,
    suggest_mapping,
)
from finesight.errors import UserError

CASES = load_cases("table")

NAN = float("nan")


def case(folder: Path, record: dict[str, Any], columns: str, **output: Any) -> ImportExample:
    mapped = dict(pair.split("=") for pair in columns.split())
    return parse_record(FORMAT, {"image": "b.png", **record}, folder, columns=mapped, **output)


def test_question_and_prompt_follow_the_image(folder: Path) -> None:
    found = case(
        folder, {"q": "who?", "a": 7}, "image=image question=q answer=a", prompt="One word."
    )
    assert list_turns(found) == [
        ("user", [folder / "b.png", "who?\nOne word."]),
        ("assistant", ["7"]),
    ]
    assert list_turns(case(folder, {"a": "x"}, "image=image answer=a", prompt="Read."))[0] == (
        "user",
        [folder / "b.png", "Read."],
    )


def test_list_of_answers(folder: Path) -> None:
    found = case(folder, {"a": ["x", "y", "x"]}, "image=image answer=a", prompt="?")
    samples = found.to_train_samples()
    assert [sample.id for sample in samples] == ["rows-3-1", "rows-3-2", "rows-3-3"]
    assert [summarize_content(sample.messages[-1].content) for sample in samples] == [
        ["x"],
        ["y"],
        ["x"],
    ]
    assert all(not sample.references for sample in samples)
    measured = found.to_eval_sample()
    assert measured.id == "rows-3"
    assert summarize_content(measured.messages[-1].content) == ["x"]
    assert measured.references == ("y", "x")


@pytest.mark.parametrize("box", CASES["test_box_is_the_answer_without_answer_column"])
def test_box_is_the_answer_without_answer_column(folder: Path, box: object) -> None:
    found = case(folder, {"b": box, "l": "cat"}, "image=image box=b label=l", prompt="?")
    assert list_turns(found)[1] == ("assistant", [(0, "cat", (1.0, 2.0, 3.0, 4.0))])


def test_box_format_and_units(folder: Path) -> None:
    found = case(
        folder,
        {"b": [0.5, 0.5, 0.1, 0.2]},
        "image=image box=b",
        prompt="?",
        box_format="cxcywh",
        box_units="1",
    )
    assert list_turns(found)[1][1] == [(0, None, pytest.approx((450.0, 200.0, 550.0, 300.0)))]


def test_several_boxes_with_labels(folder: Path) -> None:
    record = {"b": [[1, 2, 3, 4], [5, 6, 7, 8]], "l": ["cat", "dog"]}
    assert list_turns(case(folder, record, "image=image box=b label=l", prompt="?"))[1][1] == [
        (0, "cat", (1.0, 2.0, 3.0, 4.0)),
        (0, "dog", (5.0, 6.0, 7.0, 8.0)),
    ]


@pytest.mark.parametrize("text", ["[1,2,3,4],[5,6,7,8]", "[[1 2 3 4]\n [5 6 7 8]]"])
def test_several_boxes_in_text_cell(folder: Path, text: str) -> None:
    found = list_turns(case(folder, {"b": text}, "image=image box=b", prompt="?"))[1][1]
    assert found == [(0, None, (1.0, 2.0, 3.0, 4.0)), (0, None, (5.0, 6.0, 7.0, 8.0))]


def test_json_boxes_in_answer(folder: Path) -> None:
    found = case(folder, {"a": '{"bbox_2d": [1, 2, 3, 4]}'}, "image=image answer=a", prompt="?")
    assert list_turns(found)[1][1] == [(0, None, (1.0, 2.0, 3.0, 4.0))]


def test_columns_become_json_answer_fields(folder: Path) -> None:
    record = {"from": "Zürich", "seat": "7C", "price": 12.5, "none": None, "empty": "", "nan": NAN}
    columns = "image=image fields=from,price,none,empty,nan,seat"
    found = case(folder, record, columns, prompt="?")
    assert list_turns(found)[1] == (
        "assistant",
        ['{"from": "Zürich", "price": 12.5, "seat": "7C"}'],
    )
    assert len(found.answers) == 1


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("12", '"12"'),
        (["a", {"b": 1}], '["a", {"b": 1}]'),
        (datetime.date(2027, 3, 14), '"2027-03-14"'),
    ],
)
def test_single_json_field(folder: Path, value: object, written: str) -> None:
    found = case(folder, {"a,b": value}, "image=image fields=a,b", prompt="?")
    assert list_turns(found)[1][1] == [f'{{"a,b": {written}}}']


def test_field_values_stay_text(folder: Path) -> None:
    record = {"bbox_2d": [1, 2, 3, 4], "label": "cat"}
    text = '{"bbox_2d": [1, 2, 3, 4], "label": "cat"}'
    found = case(folder, record, "image=image fields=bbox_2d,label", prompt="?")
    assert list_turns(found)[1] == ("assistant", [text])
    from_csv = case(
        folder, {**record, "bbox_2d": "1 2 3 4"}, "image=image fields=bbox_2d,label", prompt="?"
    )
    assert list_turns(from_csv)[1][1] == [text.replace("[1, 2, 3, 4]", '"1 2 3 4"')]


def test_blank_cells_are_omitted_fields(folder: Path) -> None:
    record = {"a": " ", "b": "\t\n", "c": " x "}
    found = case(folder, record, "image=image fields=a,b,c", prompt="?")
    assert list_turns(found)[1][1] == ['{"c": " x "}']


def test_spaces_around_column_names(folder: Path) -> None:
    record = {"a": 1, " b ": 2, "x": 1, "y": 2, "z": 3, "w": 4}
    columns = {"image": "image", "fields": " a, b ", "box": "x, y, z, w"}
    found = parse_record(FORMAT, {"image": "b.png", **record}, folder, columns=columns, prompt="?")
    assert list_turns(found)[1][1] == ['{"a": 1, " b ": 2}\n', (0, None, (1.0, 2.0, 3.0, 4.0))]


def test_json_fields_precede_the_box(folder: Path) -> None:
    record = {"a": "x", "b": [1, 2, 3, 4]}
    found = case(folder, record, "image=image fields=a box=b", prompt="?")
    assert list_turns(found)[1][1] == ['{"a": "x"}\n', (0, None, (1.0, 2.0, 3.0, 4.0))]


def test_empty_image_list(folder: Path) -> None:
    found = case(folder, {"image": [], "a": "x"}, "image=image answer=a", prompt="?")
    assert list_turns(found)[0][1] == ["?"]


def test_box_from_four_columns(folder: Path) -> None:
    record = {"x": "1", "y": "2", "w": "3", "h": "4"}
    found = case(folder, record, "image=image box=x,y,w,h", prompt="?", box_format="xywh")
    assert list_turns(found)[1][1] == [(0, None, (1.0, 2.0, 4.0, 6.0))]


def test_box_follows_the_answer_text(folder: Path) -> None:
    found = case(
        folder, {"a": ["stop", "Stop"], "b": [1, 2, 3, 4]}, "image=image answer=a box=b", prompt="?"
    )
    box = (0, None, (1.0, 2.0, 3.0, 4.0))
    assert [summarize_content(answer) for answer in found.answers] == [
        ["stop\n", box],
        ["Stop\n", box],
    ]
    assert found.to_eval_sample().references == ("Stop",)


def test_several_images(folder: Path) -> None:
    record = {"image": ["a.png", "b.png"], "a": "x"}
    assert list_turns(case(folder, record, "image=image answer=a", prompt="?"))[0][1] == [
        folder / "a.png",
        folder / "b.png",
        "?",
    ]


@pytest.mark.parametrize(
    ("record", "columns", "what"),
    [
        ({"a": "x"}, "image=photo answer=a", "no column 'photo'"),
        ({"a": ""}, "image=image answer=a", "the answer is ''"),
        ({"a": ["x", None]}, "image=image answer=a", "the answer is 'None'"),
        ({"a": {"raw": "x"}}, "image=image answer=a", "the answer is"),
        ({"a": []}, "image=image answer=a", "no answer"),
        ({"a": "x", "q": " "}, "image=image answer=a question=q", "the question is"),
        ({"a": float("nan")}, "image=image answer=a", "the answer is 'nan'"),
        ({"a": "see <|vision_start|>"}, "image=image answer=a", "the placeholder"),
        ({"image": None, "a": "x"}, "image=image answer=a", "an image given as NoneType"),
        ({"b": "1 2 3"}, "image=image box=b", "the box"),
        ({"b": "1 2 3 4 5 6 7 8"}, "image=image box=b", "the box"),
        ({"b": "None", "a": "x"}, "image=image box=b answer=a", "the box 'None'"),
        ({"b": "[" * 5000}, "image=image box=b", "the box"),
        ({"b": "1 2 3 1" + "0" * 400}, "image=image box=b", "the box"),
        ({"b": "left"}, "image=image box=b", "the box 'left'"),
        ({"b": [[1, 2, 3, 4], [5]]}, "image=image box=b", r"the box '\[5\]'"),
        ({"b": [1, 2, 3, 4], "l": ["a", "b"]}, "image=image box=b label=l", "2 labels for 1"),
        ({"b": [1, 2, 3, 4], "l": {"a": None}}, "image=image box=b label=l", "the label is"),
        ({"b": [1, 2, 3, 4], "image": ["a.png"] * 2}, "image=image box=b", "2 images"),
        ({"b": [1, 2, 3, 4]}, "box=b", "0 images"),
        ({"image": "", "a": "x"}, "image=image answer=a", "an image given as str"),
        ({"a": "", "b": None}, "image=image fields=a,b", "no answer in image, a,b"),
        ({"a": "x"}, "image=image fields=a,c", "no column 'c' for --map fields=a,c"),
        ({"a": " ", "b": "\t"}, "image=image fields=a,b", "no answer in image, a,b"),
        ({"a": 1, "b": [NAN]}, "image=image fields=a,b", "column 'b' .* cannot be written as JSON"),
        ({"a": b"raw", "b": 1}, "image=image fields=a,b", "column 'a' .*3 bytes that are not text"),
        (
            {"a": 1, "b": "<image>"},
            "image=image fields=a,b",
            "column 'b': the placeholder '<image>'",
        ),
        (
            {"a": 1, "b": {"<bbox>": 2}},
            "image=image fields=a,b",
            "column 'b': the placeholder '<bbox>'",
        ),
        (
            {"<image>": 1},
            "image=image fields=<image>",
            "column '<image>': the placeholder '<image>'",
        ),
        ({"a": 1, "b": 2}, "image=image fields=b,a,b", "duplicate column 'b' in fields=b,a,b"),
        ({"a": "x", "b": "y"}, "image=image fields=b answer=a", "fields=b together with answer=a"),
    ],
)
def test_invalid_rows_are_rejected(
    folder: Path, record: dict[str, Any], columns: str, what: str
) -> None:
    with pytest.raises(UserError, match=what) as caught:
        case(folder, record, columns, prompt="?")
    assert caught.value.expected
    assert caught.value.remedy


def test_column_mapping_is_suggested() -> None:
    names = ["image_path", "captions", "bbox_xyxy", "n"]
    assert suggest_mapping(dict.fromkeys(names)) == (
        "--map image=image_path --map answer=captions --map box=bbox_xyxy"
    )
    assert suggest_mapping({"n": 1}) == "--map image=COLUMN --map answer=COLUMN"


def test_suggested_mapping_is_shell_quoted() -> None:
    assert suggest_mapping(dict.fromkeys(["file name", "Caption "])) == (
        "--map 'image=file name' --map 'answer=Caption '"
    )


@pytest.mark.parametrize(
    ("column", "boxes", "area", "size", "expected"),
    [
        ("xmin,ymin,xmax,ymax", [[20, 10, 120, 90]] * 8 + [[20, 10, 20, 90]], None, None, None),
        ("bbox_xyxy", [[50, 60, 20, 30]] * 9, None, None, None),
        ("bbox", [[20, 10, 120, 90]] * 8 + [[20, 10, 20, 90]], None, (200, 150), None),
        ("bbox", [[50, 60, 20, 30]] * 5 + [[5, 5, 60, 70]] * 4, None, None, "xywh"),
        ("objects.bbox", [[10, 10, 60, 50]] * 12, 3000, None, None),
        ("objects.bbox", [[10, 10, 60, 50]] * 12, 2000, None, "xyxy"),
        ("objects.bbox", [[10, 10, 60, 50]] * 12, None, (200, 150), None),
        ("objects.bbox", [[90, 90, 160, 120]] * 12, None, (200, 150), "xyxy"),
        ("objects.bbox", [[10, 10, 60, 50]] * 12, None, None, None),
    ],
)
def test_box_format_is_guessed_by_areas_and_images(
    column: str, boxes: list[list[int]], area: int | None, size: Any, expected: str | None
) -> None:
    names = column.split(",")
    records: list[dict[str, Any]] = []
    for box in boxes:
        record: dict[str, Any] = {column: box} if len(names) == 1 else {}
        record |= dict(zip(names, box, strict=True)) if len(names) == 4 else {}
        if "." in column:
            record = {"objects": {"bbox": [box], "area": [area]}}
        records.append(record)
    found = guess_box_options(records, column, [size] * len(records))
    assert found == (expected, None)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("caption", "image=image,after answer=caption"),
        ("Frage Antwort", "image=image,after question=Frage answer=Antwort"),
        ("问 答", "image=image,after question=问 answer=答"),
        ("ask reply", "image=image,after question=ask answer=reply"),
        ("hint answer", "image=image,after question=hint answer=answer"),
        ("instruction context output", "question=instruction,context answer=output"),
        ("question A B C answer", "question=question,A,B,C answer=answer"),
        ("question answer bbox", "question=question answer=answer box=bbox"),
        ("startX startY endX endY", "image=image,after box=startX,startY,endX,endY"),
        ("links oben rechts unten", "image=image,after box=links,oben,rechts,unten"),
        ("question chosen rejected", "question=question answer=chosen"),
    ],
)
def test_roles_are_guessed(names: str, expected: str) -> None:
    records = []
    for i in range(6):
        texts = {name: f"some {name} {i}" for name in names.split()}
        if "box" in expected:
            texts |= {name: str(10 * n + 1) for n, name in enumerate(names.split()[-4:])}
        texts |= {"bbox": "[1, 2, 3, 4]"} if "bbox" in texts else {}
        records.append({"image": f"{i}.png", "after": f"{i + 1}.png", "mask": "m.png", **texts})
    columns = guess_columns(records)
    assert dict(pair.split("=") for pair in expected.split()).items() <= columns.items()
    is_preference = "rejected" in names
    with pytest.raises(UserError, match="rejected") if is_preference else nullcontext():
        check_guessed_columns(records, columns, "here")


@pytest.mark.parametrize(
    ("name", "value"), [("reasoning", "It is red, so it stops."), ("history", [["q", "a"]])]
)
def test_columns_that_an_answer_depends_on_are_found(name: str, value: object) -> None:
    records = [{"image": "a.png", "q": "x", "a": "y", name: value}]
    columns = {"image": "image", "question": "q", "answer": "a"}
    with pytest.raises(UserError, match=f"the column '{name}'"):
        check_guessed_columns(records, columns, "here")
    check_guessed_columns([{**records[0], name: None}], columns, "here")


def test_options_follow_the_question(folder: Path) -> None:
    record = {"q": "which?", "A": "cat", "option_b": "dog", "C": None, "a": "A", "more": ""}
    columns = {"image": "image,more", "question": "q,A,option_b,C", "answer": "a"}
    found = parse_record(FORMAT, {"image": "b.png", **record}, folder, columns=columns)
    assert list_turns(found)[0][1] == [folder / "b.png", "which?\nA. cat\nB. dog"]


def test_list_of_options_follows_the_question(folder: Path) -> None:
    record = {"question": "Which pet is it?", "choices": ["cat", "dog"], "answer": "B"}
    columns = guess_columns([{"image": "b.png", **record}] * 3)
    assert columns["question"] == "question,choices"
    mapped = " ".join(map("=".join, columns.items()))
    for choices in (record["choices"], "['cat', 'dog']", '["cat", "dog"]'):
        found = case(folder, {**record, "choices": choices}, mapped)
        assert list_turns(found)[0][1] == [folder / "b.png", "Which pet is it?\nA. cat\nB. dog"]
    with pytest.raises(UserError, match="the answer 1 to a question with 2 options"):
        case(folder, {**record, "answer": 1}, mapped)
    assert list_turns(case(folder, {**record, "choices": ["1", "2"], "answer": 1}, mapped))[1]


@pytest.mark.parametrize("box", [None, "", " ", NAN, [], "[]"])
def test_empty_box_cell_means_no_objects(folder: Path, box: object) -> None:
    found = case(folder, {"b": box, "l": None}, "image=image box=b label=l", prompt="Find all.")
    assert list_turns(found)[1] == ("assistant", ["none"])
    with pytest.raises(UserError, match="1 labels for 0 boxes"):
        case(folder, {"b": box, "l": "cat"}, "image=image box=b label=l", prompt="Find all.")


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Locate these classes: cat, dog, owl.", "Locate these classes: cat, owl."),
        ("Locate these classes: dog, owl, cat.", "Locate these classes: owl, cat."),
        ("Locate cat, owl, or dog?", "Locate cat, owl?"),
        ("Locate every dogfish and cat.", "Locate every dogfish and cat."),
        ("Locate each dog in the image.", None),
        ("Locate every dogfish.", None),
        ("Find all objects.", None),
    ],
)
def test_question_does_not_name_a_class_without_its_box(
    folder: Path, prompt: str, question: str | None
) -> None:
    record = {"b": [[1, 1, 9, 9], [5, 5, 5, 5]], "l": ["cat", "dog"]}
    options = {"columns": {"image": "image", "box": "b", "label": "l"}, "on_invalid_box": "drop"}
    record |= {"image": "b.png"}
    if question is None:
        with pytest.raises(InvalidBoxError, match="no area"):
            parse_record(FORMAT, record, folder, prompt=prompt, **options)
        return
    for other in ({"b": [[1, 1, 9, 9], [5, 5, 2000, 9]], "l": ["cat", "cat"]}, {"l": None}):
        wide = {**record, "b": [[1, 1, 9, 9], [5, 5, 2000, 9]]} | other
        with pytest.raises(InvalidBoxError, match="outside its image; the answer would be"):
            parse_record(FORMAT, wide, folder, prompt="Locate each cat.", **options)
    found = parse_record(FORMAT, record, folder, prompt=prompt, **options)
    assert list_turns(found) == [
        ("user", [folder / "b.png", question]),
        ("assistant", [(0, "cat", (1.0, 1.0, 9.0, 9.0))]),
    ]


@pytest.mark.parametrize("empty", ["", None])
def test_invalid_box_without_a_label_is_counted(folder: Path, empty: str | None) -> None:
    columns = {"image": "image", "box": "b", "label": "l"}
    record = {"image": "b.png", "b": [[1, 1, 9, 9], [5, 5, 5, 5]], "l": ["cat", empty]}
    found = parse_record(
        FORMAT, record, folder, columns=columns, prompt="Find.", on_invalid_box="drop"
    )
    assert list_turns(found)[1] == ("assistant", [(0, "cat", (1.0, 1.0, 9.0, 9.0))])
    with pytest.raises(UserError, match="no area"):
        parse_record(FORMAT, record, folder, columns=columns, prompt="Find.")
    with pytest.raises(UserError, match="a box without a label"):
        case(folder, {**record, "b": [[1, 1, 9, 9]] * 2}, "image=image box=b label=l", prompt="?")


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(10, 10, 60, 50), (100, 20, 180, 90)], "xyxy"),
        ([(110.5, 10, 60, 50), (20, 60, 18, 30)], "xywh"),
        ([(170, 80, 60, 40), (20, 20, 30, 30)], "cxcywh"),
        ([(21, 3, 17, 8), (19, 4, 11, 9)], None),
        ([(0.2, 0.3, 0.1, 0.4), (0.6, 0.1, 0.2, 0.1)], None),
    ],
)
def test_boxes_in_columns_of_unknown_names(boxes: list[Any], expected: str | None) -> None:
    records = [dict(zip("abcd", box, strict=True)) for box in boxes]
    assert find_box_format(records, "a,b,c,d", [(200, 100)] * 2) == expected
    assert find_box_format(records, "a,b,c,d", [(200, 100), None]) is None
