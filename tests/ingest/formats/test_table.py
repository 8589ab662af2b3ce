"""Any table, read by the columns that the user names."""

import json
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import import_samples, list_turns, parse_record, summarize_content
from case_files import load_cases
from image_fixtures import write_gray_image, write_jsonl

from finesight.errors import UserError
from finesight.ingest.formats.dataset_format import ImportExample
from finesight.ingest.formats.table import (
    COMPONENT,
    check_guessed_columns,
    find_box_format,
    find_stated_format,
    guess_box_options,
    guess_columns,
    suggest_mapping,
)
from finesight.samples.boxes import InvalidBoxError
from finesight.samples.sample import BoxPart, InvalidRowError, join_text

CASES = load_cases("table")

NAN = float("nan")
LONG_NUMBERS = [
    ({"b": text}, "image=image box=b", "the box") for text in ("[" * 5000, "1 2 3 1" + "0" * 400)
]


def case(folder: Path, record: dict[str, Any], columns: Any, **output: Any) -> ImportExample:
    is_text = isinstance(columns, str)
    mapped = dict(pair.split("=") for pair in columns.split()) if is_text else columns
    return parse_record(COMPONENT, {"image": "b.png", **record}, folder, columns=mapped, **output)


def summarize(content: list[Any]) -> list[object]:
    """Return images as names, and boxes as lists of label and corners."""
    names = [part.name if isinstance(part, Path) else part for part in content]
    return [[part[1], *part[2]] if isinstance(part, tuple) else part for part in names]


@pytest.mark.parametrize("row", CASES["test_rows_become_samples"])
def test_rows_become_samples(folder: Path, row: dict[str, Any]) -> None:
    found = case(folder, row["record"], row["map"], **{"prompt": "?", **row.get("options", {})})
    assert summarize(list_turns(found)[0][1]) == row.get("user", ["b.png", "?"])
    answers = [summarize(summarize_content(answer)) for answer in found.answers]
    assert answers == row["answers"]


@pytest.mark.parametrize(
    ("question", "user"),
    [
        ("Is <image 1>\nas <image 2>?", ["Is ", "a.png", "\nas ", "b.png", "?"]),
        ("<image 1>\n<image 2>\nEqual?\nA. no", ["a.png", "b.png", "Equal?\nA. no"]),
        ("<image_00><image_01>Equal?", ["a.png", "b.png", "Equal?"]),
        (
            "<imager 1> <image 1 /> <image-1>?",
            ["a.png", "b.png", "<imager 1> <image 1 /> <image-1>?"],
        ),
    ],
)
def test_images_are_placed_at_their_numbers(folder: Path, question: str, user: list[str]) -> None:
    record = {"image": ["a.png", "b.png"], "q": question, "a": "x"}
    found = case(folder, record, "image=image question=q answer=a")
    assert summarize(list_turns(found)[0][1]) == user


@pytest.mark.parametrize(
    "question",
    ["<image 2> or <image 1>?", "<image 1>?", "<image1> <image2> <image1>?", "<image_2>?"],
)
def test_numbers_of_other_images_are_rejected(folder: Path, question: str) -> None:
    record = {"image": ["a.png", "b.png"], "q": question, "a": "x"}
    with pytest.raises(InvalidRowError, match=f"of 2 images in the text '{question[:8]}") as caught:
        case(folder, record, "image=image question=q answer=a")
    assert "in the order of the text" in caught.value.expected
    assert "remove the placeholders" in caught.value.remedy


@pytest.mark.parametrize(
    ("record", "columns", "what"), [*CASES["test_invalid_rows"], *LONG_NUMBERS]
)
def test_invalid_rows_are_rejected(folder, record, columns, what):
    with pytest.raises(UserError, match=what) as caught:
        case(folder, record, columns, prompt="?")
    assert caught.value.expected
    assert caught.value.remedy


def test_column_mapping_is_suggested_and_shell_quoted():
    names = ["image_path", "captions", "bbox_xyxy", "n"]
    assert suggest_mapping([{**dict.fromkeys(names), "bbox_xyxy": [1, 2, 9, 9]}]) == (
        "--map image=image_path --map answer=captions --map box=bbox_xyxy"
    )
    assert suggest_mapping([{"n": 1}]) == "--map image=COLUMN --map answer=COLUMN"
    names = ["file name", "Caption "]
    mapping = "--map 'image=file name' --map 'answer=Caption '"
    assert suggest_mapping([dict.fromkeys(names)]) == mapping


@pytest.mark.parametrize(
    ("column", "boxes", "area", "size", "expected"),
    CASES["test_box_format_is_guessed_by_areas_and_images"],
)
def test_box_format_is_guessed_by_areas_and_images(column, boxes, area, size, expected):
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


@pytest.mark.parametrize(("names", "expected"), CASES["test_roles_are_guessed"])
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


def build_records(names: list[str], rows: list[list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", CASES["test_roles_are_guessed_by_values"])
def test_roles_are_guessed_by_values(name: str) -> None:
    names, rows, expected = CASES["test_roles_are_guessed_by_values"][name]
    records = build_records(names, rows)
    columns = guess_columns(records)
    assert columns == expected
    check_guessed_columns(records, columns, "here")


@pytest.mark.parametrize("name", CASES["test_guessed_roles_are_rejected"])
def test_guessed_roles_are_rejected(name: str) -> None:
    names, rows, what = CASES["test_guessed_roles_are_rejected"][name]
    records = build_records(names, rows)
    with pytest.raises(UserError, match=what) as caught:
        check_guessed_columns(records, guess_columns(records), "here")
    assert "--map" in caught.value.remedy


@pytest.mark.parametrize(("record", "options"), CASES["test_mapping_is_suggested_by_values"])
def test_mapping_is_suggested_by_values(record: dict[str, Any], options: str) -> None:
    assert suggest_mapping([record]) == options


@pytest.mark.parametrize("empty", [None, "", []])
def test_box_column_without_boxes_is_not_suggested(empty: object) -> None:
    rows = [{"photo": f"{n}.png", "bbox": empty, "caption": "a cup"} for n in range(3)]
    assert guess_columns(rows) == {"image": "photo", "answer": "caption"}
    assert "bbox" not in suggest_mapping([{"name": "a", "bbox": empty}])
    rows[2]["bbox"] = [1, 2, 9, 9]
    assert guess_columns(rows)["box"] == "bbox"


@pytest.mark.parametrize(
    ("first", "second", "image"),
    [
        ("a{}.png", "a{}.png", "file"),
        ("a{}.png", "shots/a{}.png", "copy"),
        ("shots/a{}.png", "a{}.png", "file"),
        ("left/a{}.png", "right/a{}.png", "file,copy"),
        ("a{}.png", "b{}.png", "file,copy"),
    ],
)
def test_two_names_of_one_image(first: str, second: str, image: str) -> None:
    rows = [
        {"file": first.format(n), "copy": second.format(n), "caption": "a cup"} for n in range(3)
    ]
    assert guess_columns(rows)["image"] == image


def test_names_of_splits_are_no_answer() -> None:
    rows = [{"photo": f"{n}.png", "part": "val", "told": "a cup"} for n in range(3)]
    assert guess_columns(rows) == {"image": "photo", "answer": "told"}


def test_options_of_some_rows_are_a_part_of_the_question(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png")
    base = {"photo": "a.png", "question": "What?", "option_A": "cup", "option_B": "hat"}
    rows = [{**base, "answer": "B"}, {**base, "option_C": "pen", "answer": "C"}]
    columns = guess_columns(rows)
    assert columns["question"] == "question,option_A,option_B,option_C"
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    samples = import_samples(source, tmp_path / "out", columns=columns)[0]
    questions = [sample.messages[0].content[-1].text for sample in samples]
    assert questions == [
        "What?\nA. cup\nB. hat",
        "What?\nA. cup\nB. hat\nC. pen",
    ]


@pytest.mark.parametrize("value", [{"raw": "x", "n": 1}, [{"raw": "x"}], [["x"], ["y"]]])
def test_remedy_for_a_structure_as_the_answer_names_keys_or_json(
    tmp_path: Path, value: object
) -> None:
    write_gray_image(tmp_path / "a.png")
    source = write_jsonl(tmp_path / "rows.jsonl", [{"photo": "a.png", "told": value}])
    columns = {"image": "photo", "answer": "told"}
    with pytest.raises(UserError) as caught:
        import_samples(source, tmp_path / "out", columns=columns, prompt="")
    assert "answer: {path: told, write: json}" in str(caught.value.remedy)
    assert ("answer=told.raw" in str(caught.value.remedy)) == ("raw" in str(value))


@pytest.mark.parametrize(
    ("name", "value"), [("reasoning", "It is red, so it stops."), ("history", [["q", "a"]])]
)
def test_columns_that_an_answer_depends_on_are_found(name: str, value: object) -> None:
    records = [{"image": "a.png", "q": "x", "a": "y", name: value}]
    columns = {"image": "image", "question": "q", "answer": "a"}
    with pytest.raises(UserError, match=f"the column '{name}'"):
        check_guessed_columns(records, columns, "here")
    check_guessed_columns([{**records[0], name: None}], columns, "here")


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["left", "right"], "A. left\nB. right"),
        (["A. left", "B) right", "(C) up"], "A. left\nB) right\n(C) up"),
        (["A. M. Turing", "K. Zuse"], "A. A. M. Turing\nB. K. Zuse"),
        (["A left", "B right"], "A. A left\nB. B right"),
        (["B. left", "A. right"], "A. B. left\nB. A. right"),
    ],
)
def test_options_with_letters_get_no_second_one(
    folder: Path, options: list[str], lines: str
) -> None:
    row = {"question": "Where?", "options": options, "answer": "A"}
    found = case(folder, row, "image=image question=question,options answer=answer")
    assert list_turns(found)[0][1] == [folder / "b.png", f"Where?\n{lines}"]
    columns = dict(zip("ABC", options, strict=False))
    names = ",".join(columns)
    row = {"question": "Where?", **columns, "answer": "A"}
    found = case(folder, row, f"image=image question=question,{names} answer=answer")
    assert list_turns(found)[0][1] == [folder / "b.png", f"Where?\n{lines}"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"question_type": "size", "question": "Which?", "options": ["big"], "answer": "A"},
            "--map image=COLUMN --map answer=answer --map question=question,options",
        ),
        (
            {"prompt_id": "p", "prompt": "Why?"},
            "--map image=COLUMN --map answer=COLUMN --map question=prompt",
        ),
        ({"video_id": 70, "answer": "a"}, "--map answer=answer --map video=video_id"),
        (
            {"url": "https://a.example/a.jpg", "image": b"\x89PNG\r\n\x1a\n", "caption": "a"},
            "--map image=image --map answer=caption",
        ),
        ({"image": "a.png", "noteids": [1, 2]}, "--map image=image --map answer=COLUMN"),
        ({"image": "a.png", "note_ids": ["a", "b"]}, "--map image=image --map answer=COLUMN"),
        ({"image": "a.png", "kids": "two"}, "--map image=image --map answer=kids"),
    ],
)
def test_suggested_mapping_has_the_best_columns(record: dict[str, Any], expected: str) -> None:
    assert suggest_mapping([record]) == expected


def test_list_of_options_follows_the_question(folder: Path) -> None:
    record = {"question": "Which pet is it?", "choices": ["cat", "dog"], "answer": "B"}
    columns = guess_columns([{"image": "b.png", **record}] * 3)
    assert columns["question"] == "question,choices"
    mapped = " ".join(map("=".join, columns.items()))
    for choices in (record["choices"], "['cat', 'dog']", '["cat", "dog"]'):
        found = case(folder, {**record, "choices": choices}, mapped)
        assert list_turns(found)[0][1] == [folder / "b.png", "Which pet is it?\nA. cat\nB. dog"]
    for choices in ([], "[]", "[ ]", "", None):
        found = case(folder, {**record, "choices": choices}, mapped)
        assert list_turns(found)[0][1] == [folder / "b.png", "Which pet is it?"]
    with pytest.raises(UserError, match="the answer 1 to a question with 2 options"):
        case(folder, {**record, "answer": 1}, mapped)
    assert list_turns(case(folder, {**record, "choices": ["1", "2"], "answer": 1}, mapped))[1]


@pytest.mark.parametrize("names", [("A", "B"), ("Option A", "Option B"), ("choice_a", "choice_b")])
def test_numbers_do_not_answer_questions_with_lettered_columns(
    folder: Path, names: tuple[str, str]
) -> None:
    record = {"question": "Which pet is it?", **dict(zip(names, ("cat", "dog"), strict=True))}
    mapped = {"image": "image", "answer": "answer", "question": ",".join(["question", *names])}
    for answer in ("B", "dog"):
        assert case(folder, {**record, "answer": answer}, mapped)
    for number in (0, "1"):
        with pytest.raises(UserError, match=f"the answer {number} to a question with 2 options"):
            case(folder, {**record, "answer": number}, mapped)
    numbers = {"question": "How many?", **dict(zip(names, ("3", "5"), strict=True)), "answer": 5}
    assert case(folder, numbers, mapped)


@pytest.mark.parametrize(
    ("cells", "remedy"),
    [
        ({"options": {"B": "red", "A": "blue"}}, "choices: options.*, answer: answer"),
        ({"options": "{'A': 'red', 'B': 'blue'}"}, "parse: {options: python}, images: [image]"),
        ({"options": '{"A": "red", "B": "blue"}'}, "parse: {options: json}, images: [image]"),
        ({"options": [{"id": "A", "text": "red"}]}, "KEY is the key of the texts, of id, text"),
        ({"colors": ["red", "blue"]}, "write one text into each cell"),
        ({"options": {"option1": "red", "option2": "blue"}}, "choices: options.*, answer: answer"),
        ({"hint": {"text": "red", "level": 2}}, "hint.text,hint.level instead of hint"),
        ({"options": ["red", None]}, "write one text into each cell"),
        ({"options": '["red", null]'}, "write one text into each cell"),
        ({"options": "[None]"}, "write one text into each cell"),
        ({"options": '[{"id": "A", "text": "red"}, null]'}, "KEY is the key of the texts"),
        ({"options": [["red", [0]], ["blue"]]}, "write one text into each cell"),
    ],
)
def test_objects_and_lists_are_no_question(folder: Path, cells: Any, remedy: str) -> None:
    (name,) = cells
    row = {"question": "Which?", **cells, "answer": "A"}
    with pytest.raises(InvalidRowError, match=f"in the column '{name}' of the question") as caught:
        case(folder, row, f"image=image question=question,{name} answer=answer")
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("box", [None, "", " ", NAN, [], "[]"])
def test_empty_box_cell_means_no_objects(folder: Path, box: object) -> None:
    found = case(folder, {"b": box, "l": None}, "image=image box=b label=l", prompt="Find all.")
    assert list_turns(found)[1] == ("assistant", ["none"])
    with pytest.raises(UserError, match="1 labels for 0 boxes"):
        case(folder, {"b": box, "l": "cat"}, "image=image box=b label=l", prompt="Find all.")


@pytest.mark.parametrize(
    ("prompt", "question"), CASES["test_question_does_not_name_a_class_without_its_box"]
)
def test_question_does_not_name_a_class_without_its_box(folder, prompt, question):
    record = {"b": [[1, 1, 9, 9], [5, 5, 5, 5]], "l": ["cat", "dog"]}
    options = {"columns": {"image": "image", "box": "b", "label": "l"}, "on_invalid_box": "drop"}
    record |= {"image": "b.png"}
    if question is None:
        with pytest.raises(InvalidBoxError, match="no area"):
            parse_record(COMPONENT, record, folder, prompt=prompt, **options)
        return
    for other in ({"b": [[1, 1, 9, 9], [5, 5, 2000, 9]], "l": ["cat", "cat"]}, {"l": None}):
        wide = {**record, "b": [[1, 1, 9, 9], [5, 5, 2000, 9]]} | other
        with pytest.raises(InvalidBoxError, match="outside its image; the answer would be"):
            parse_record(COMPONENT, wide, folder, prompt="Locate each cat.", **options)
    found = parse_record(COMPONENT, record, folder, prompt=prompt, **options)
    assert list_turns(found) == [
        ("user", [folder / "b.png", question]),
        ("assistant", [(0, "cat", (1.0, 1.0, 9.0, 9.0))]),
    ]


@pytest.mark.parametrize("empty", ["", None])
def test_invalid_box_without_a_label_is_counted(folder: Path, empty: str | None) -> None:
    columns = {"image": "image", "box": "b", "label": "l"}
    record = {"image": "b.png", "b": [[1, 1, 9, 9], [5, 5, 5, 5]], "l": ["cat", empty]}
    found = parse_record(
        COMPONENT, record, folder, columns=columns, prompt="Find.", on_invalid_box="drop"
    )
    assert list_turns(found)[1] == ("assistant", [(0, "cat", (1.0, 1.0, 9.0, 9.0))])
    with pytest.raises(UserError, match="no area"):
        parse_record(COMPONENT, record, folder, columns=columns, prompt="Find.")
    with pytest.raises(UserError, match="a box without a label"):
        case(folder, {**record, "b": [[1, 1, 9, 9]] * 2}, "image=image box=b label=l", prompt="?")


@pytest.mark.parametrize(("boxes", "expected"), CASES["test_boxes_in_columns_of_unknown_names"])
def test_boxes_in_columns_of_unknown_names(boxes: list[Any], expected: str | None) -> None:
    records = [dict(zip("abcd", box, strict=True)) for box in boxes]
    assert find_box_format(records, "a,b,c,d", [(200, 100)] * 2) == expected
    assert find_box_format(records, "a,b,c,d", [(200, 100), None]) is None


def test_images_without_objects_do_not_decide_the_box_format() -> None:
    empty = dict.fromkeys("abcd", "")
    records: list[dict[str, Any]] = [empty, {"a": 10, "b": 20, "c": 180, "d": 90}, empty]
    assert find_box_format(records, "a,b,c,d", [(200, 100)] * 3) == "xyxy"
    assert find_box_format([empty], "a,b,c,d", [(200, 100)]) is None


@pytest.mark.parametrize(
    ("options", "num_boxes"), [({}, 0), ({"box_units": "pixel"}, 2), ({"box_format": "xyxy"}, 2)]
)
def test_units_convert_boxes_inside_of_fields(
    tmp_path: Path, options: dict[str, Any], num_boxes: int
) -> None:
    write_gray_image(tmp_path / "a.png", 40, 20)
    spots = [{"spot": [1, 2, 9, 12], "kind": "dent"}, {"spot": [3, 4, 30, 18], "kind": "dent"}]
    row = {"photo": "a.png", "found": {"spots": spots, "state": "bent"}}
    source = write_jsonl(tmp_path / "rows.jsonl", [row])
    columns = {"image": "photo", "fields": "found.spots,found.state"}
    (sample,), _ = import_samples(source, tmp_path / "out", columns=columns, prompt="?", **options)
    boxes = [part.xyxy for part in sample.messages[-1].content if isinstance(part, BoxPart)]
    assert boxes == [(1, 2, 9, 12), (3, 4, 30, 18)][:num_boxes]
    if not boxes:
        assert json.loads(join_text(sample.messages[-1].content)) == row["found"]


@pytest.mark.parametrize("units", [None, "pixel"])
def test_units_of_a_box_column_leave_numbers_in_fields(folder: Path, units: Any) -> None:
    spots = [{"spot": [1, 2, 9, 12], "kind": "dent"}]
    record = {"b": [3, 4, 30, 18], "spots": spots, "state": "bent"}
    columns = {"image": "image", "box": "b", "fields": "spots,state"}
    found = case(folder, record, columns, prompt="?", box_units=units)
    text, box = found.answers[0]
    assert json.loads(text.text) == {"spots": spots, "state": "bent"}
    assert box.xyxy == (3, 4, 30, 18)


def test_rows_may_lack_some_fields_and_no_coordinate(folder: Path) -> None:
    found = case(folder, {"color": "red"}, "image=image fields=color,size", prompt="?")
    assert summarize_content(found.answers[0]) == ['{"color": "red"}']
    with pytest.raises(InvalidBoxError, match="None"):
        case(folder, {"x1": 1, "y1": 2, "x2": 9}, "image=image box=x1,y1,x2,y2", prompt="?")


def test_rows_of_boxes_may_lack_some_fields(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", 40, 20)
    row = {"image": "a.png", "b": [1, 2, 9, 12], "color": "red"}
    rows = [row, {**row, "b": [3, 4, 30, 18]}, {**row, "size": "small"}]
    columns = {"image": "image", "box": "b", "fields": "color,size"}
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    samples, _ = import_samples(source, tmp_path / "out", columns=columns, prompt="?")
    answers = [json.loads(sample.messages[-1].content[0].text) for sample in samples]
    assert answers == [{"color": "red"}, {"color": "red", "size": "small"}]
    assert [len(sample.messages[-1].content) for sample in samples] == [3, 2]


@pytest.mark.parametrize(
    "text",
    ["." * 300_000 + "x", "1." * 200_000, " \n" * 200_000, "item 1, 2, 3 sold " * 30_000],
    ids=range(4),
)
def test_long_names_of_box_columns_are_read_in_linear_time(text):
    """In the square of their length they take minutes."""
    signal.alarm(60)
    try:
        assert find_stated_format(f"{text}bbox_xywh") == "xywh"
    finally:
        signal.alarm(0)
