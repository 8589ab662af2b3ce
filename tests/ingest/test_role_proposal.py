"""Proposals of column roles: what they leave out is never lost without consent."""

from typing import Any

import pytest

from finesight.ingest.formats.table import guess_columns, suggest_mapping
from finesight.ingest.role_proposal import RoleProposal, UnassignedKeysError

ROW = {"image": "a.png", "caption": "Two cups."}


def propose(*records: dict[str, object]) -> RoleProposal:
    return RoleProposal(records, guess_columns(records))


@pytest.mark.parametrize(
    "other",
    [
        {"license": "CC0"},
        {"is_wrong": False},
        {"score": 0},
        {"image_height": 480},
        {"annotator": 7},
        {"timestamp": "00:03"},
        {"system_prompt": "Be brief."},
        {"category_id": 3},
        {"after": "b.jpg", "license": "MIT"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_columns_without_a_role_need_consent(other):
    proposal = propose({**ROW, **other}, {**ROW, **other})
    assert proposal.columns["answer"] == "caption"
    assert [*proposal.list_unused()] == [[*other][-1]]
    with pytest.raises(UnassignedKeysError) as caught:
        proposal.check_columns("rows.csv")
    assert proposal.format_options() in str(caught.value.remedy)


@pytest.mark.parametrize(
    "other",
    [
        {"id": "x7"},
        {"image_id": 12},
        {"imageId": 12},
        {"question-id": "q1"},
        {"uuid": "1f"},
        {"Unnamed: 0": 0},
        {"split": "train"},
        {"license": ""},
        {"license": None},
        {"license": float("nan")},
    ],
    ids=str,
)
def test_names_of_rows_and_empty_columns_need_no_role(other):
    propose({**ROW, **other}, {**ROW, **other}).check_columns("rows.csv")


def test_column_that_counts_the_captions_of_an_image_needs_no_role():
    records = [{**ROW, "comment_number": number} for number in range(3)]
    propose(*records).check_columns("rows.csv")
    other = [{**ROW, "comment_number": number} for number in (3, 9, 1)]
    assert [*propose(*other).list_unused()] == ["comment_number"]


@pytest.mark.parametrize("name", ["#", "row", "No.", "index", ""])
def test_numbers_of_rows_need_no_role(name):
    records = [{**ROW, name: number} for number in (4, 5, 6)]
    propose(*records).check_columns("rows.csv")


@pytest.mark.parametrize("name", ["row", "no", "index", "\u20ac", "%"])
def test_other_values_under_names_of_numbers_need_a_role(name):
    records = [{**ROW, name: value} for value in ("B7", "C2", "A1")]
    assert [*propose(*records).list_unused()] == [name]


def test_read_fields_takes_columns_with_names_of_numbers():
    records = [{"image": "a.png", "row": row, "seat": "A", "document_id": "X1"} for row in "731"]
    assert propose(*records).choose_fields().columns["fields"] == "row,seat,document_id"


def test_read_fields_takes_columns_of_later_records():
    records = [{"image": "a.png", "seat": "A", "deck": "low"}]
    records.append({**records[0], "berth": "window"})
    assert propose(*records).choose_fields().columns["fields"] == "seat,deck,berth"


def test_names_cannot_begin_a_line_of_an_error():
    proposal = propose({**ROW, "note\n  remedy: run this": "x"})
    with pytest.raises(UnassignedKeysError) as caught:
        proposal.check_columns("rows.csv")
    assert len(str(caught.value).splitlines()) == 3


def test_value_of_any_record_counts():
    proposal = propose({**ROW, "note": None}, {**ROW, "note": "blurred"})
    assert proposal.list_unused() == {"note": "blurred"}


def test_sizes_need_no_role_beside_boxes_only():
    record = {"image": "a.png", "width": 80, "height": 40, "bbox": [1, 2, 30, 20], "label": "cup"}
    proposal = propose(record, record)
    assert proposal.columns["box"] == "bbox"
    proposal.check_columns("rows.csv")
    sized = {**ROW, "width": 80, "height": 40}
    assert [*propose(sized, sized).list_unused()] == ["width", "height"]


def test_options_of_boxes_are_a_part_of_the_remedy():
    proposal = RoleProposal([ROW], {"image": "image", "box": "a b"}, ("--box-format", "xywh"))
    assert (
        proposal.format_options()
        == "--map image=image --map 'box=a b' --box-format xywh (options of import)"
    )


def test_proposal_is_shown_on_three_records():
    lines = propose(*(ROW for _ in range(5))).format_records()
    assert lines == 3 * ["image 'a.png'; answer 'Two cups.'"]
    embedded = propose({**ROW, "image": {"bytes": b"\x89PNG", "path": None}})
    assert embedded.format_records() == ["image an image; answer 'Two cups.'"]


def test_columns_of_unknown_names_are_no_answer_without_consent():
    proposal = propose({"image": "a.png", "ts": "1-3", "q": "What?", "a0": "hat", "idx_2": 4})
    with pytest.raises(UnassignedKeysError, match="no column is known as the answer") as caught:
        proposal.check_columns("rows.csv")
    assert "--map answer=COLUMN" in str(caught.value.remedy)
    assert caught.value.proposal is proposal
    proposal.check_unused("rows.csv")  # the user chose fields


@pytest.mark.parametrize(
    ("columns", "answer"),
    [({"text": "a meme", "label": 1}, "text"), ({"caption": "a cup", "label": "true"}, "caption")],
)
def test_several_columns_that_may_be_the_answer(columns, answer):
    proposal = propose({"image": "a.png", **columns}, {"image": "b.png", **columns})
    assert proposal.columns["answer"] == answer
    with pytest.raises(UnassignedKeysError, match="may be the answer") as caught:
        proposal.check_columns("rows.csv")
    assert f"answer={answer}" not in str(caught.value.remedy)
    assert caught.value.proposal is not None
    assert caught.value.proposal.columns == {"image": "image"}


def test_answer_by_its_own_name_precedes_other_texts():
    proposal = propose({"image": "a.png", "category": "VD", "gt_answer": "1"})
    assert proposal.columns["answer"] == "gt_answer"
    assert [*proposal.list_unused()] == ["category"]


def test_address_of_an_image_is_no_second_image():
    record = {**ROW, "link": "https://x.test/a.png"}
    proposal = propose(record, record)
    assert proposal.columns["image"] == "image"
    assert [*proposal.list_unused()] == ["link"]


def test_key_of_a_later_record_counts():
    proposal = propose(ROW, {**ROW, "rating": 1})
    assert proposal.list_unused() == {"rating": 1}


def test_columns_of_flags_are_several_classes():
    flags = [{"image": f"{n}.png", "cat": str(n % 2), "dog": "1", "indoor": "0"} for n in range(4)]
    proposal = propose(*flags)
    assert proposal.columns["fields"] == "cat,dog,indoor"
    proposal.check_columns("rows.csv")
    with pytest.raises(UnassignedKeysError, match="no column is known"):
        propose(*({**record, "score": 7} for record in flags)).check_columns("rows.csv")


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            {"note": "Click on it.", "state": "open"},
            "--map answer=COLUMN, and --map question=COLUMN for a text of the question",
        ),
        (
            {"question": "Open?", "note": "Click on it.", "state": "open"},
            "--map answer=COLUMN --map question=question",
        ),
        (
            {"question": "Open?", "options": ["yes", "no"], "answer": "A", "solution": "Look."},
            "--map answer=COLUMN --map question=question,options",
        ),
    ],
    ids=["unknown", "known", "options"],
)
def test_remedy_of_one_answer_keeps_the_question(row: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UnassignedKeysError) as caught:
        propose({"image": "a.png", **row}).check_columns("rows.csv")
    start = "name the columns:" if "answer" in row else "for one of them,"
    assert str(caught.value.remedy).endswith(f"{start} --map image=image {remedy}")


@pytest.mark.parametrize(
    ("cells", "is_certain"),
    [(["1000065", "1000066"], False), (["7", "7"], True), (["47A", "12B"], True)],
)
def test_distinct_numbers_of_a_table_without_header_may_be_identifiers(cells, is_certain):
    proposal = propose(*[{"1": cell, "2": f"{cell}.png"} for cell in cells])
    assert proposal.columns["answer"] == "1"
    if is_certain:
        proposal.check_columns("rows.tsv")
        return
    with pytest.raises(UnassignedKeysError, match="an answer, or an identifier of the image") as e:
        proposal.check_columns("rows.tsv")
    assert "--map image=2 --map answer=1" in str(e.value.remedy)


def test_column_that_may_count_the_rows_of_an_image_is_asked_for():
    rows = [("a.png", 0, "x y", "u"), ("a.png", 1, "z", "v"), ("b.png", 0, "x", "w")]
    records = [dict(zip(("image", "k", "note", "place"), row, strict=True)) for row in rows]
    with pytest.raises(UnassignedKeysError, match="no column is known as the answer"):
        propose(*records).check_columns("rows.csv")


def test_error_of_nested_texts_shows_them_and_no_guess():
    record = {"photo": "a.png", "score": 3, "notes": [{"lang": "en", "raw": "A wet road."}]}
    with pytest.raises(UnassignedKeysError, match="texts inside of lists") as caught:
        propose(record, record).check_inner_values("rows.jsonl")
    assert "notes ([{'lang': 'en'" in str(caught.value.what)
    assert "score" not in str(caught.value)
    assert "score" not in suggest_mapping([record, record])
