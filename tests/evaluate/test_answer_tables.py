import csv
import io
import json
import re
import zipfile
from pathlib import Path

import openpyxl
import pytest
from PIL import Image

from finesight.evaluate import answer_tables
from finesight.evaluate.answer_tables import AnswerTable, build_table, format_csv, format_workbook

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "=1", "\uff1d1+1")
"""Texts that a spreadsheet would evaluate."""


def open_workbook(table, images=(), on_note=list):
    content = format_workbook(table, images or [()] * len(table.rows), on_note)
    return content, openpyxl.load_workbook(io.BytesIO(content)).active


def test_fields_of_answers_are_columns():
    answers = ['{"price": 3, "answer": "x"}', '```json\n{"price": 4}\n```', "no fields"]
    records = [{"id": "1", "image": ["a", "b"], "prompt": "?", "answer": one} for one in answers]
    table = build_table(records)
    assert [*table.header] == ["id", "image", "prompt", "answer", "price", "answer.answer"]
    fields = [tuple(row[4:]) for row in table.rows]
    assert fields == [(3, "x"), (4, None), (None, None)]
    assert table.rows[0][1] == "a, b"
    assert [*build_table(records[2:]).header] == ["id", "image", "prompt", "answer"]


@pytest.mark.parametrize("text", FORMULAS)
def test_texts_are_no_formulas(text):
    """In cells and in names of fields, which are those of the answer of a model."""
    table = AnswerTable(["answer", text], [["a", text]])
    for row in csv.reader(io.StringIO(format_csv(table).removeprefix("\ufeff"), newline="")):
        assert row[1].startswith("'")
        assert row[1].replace("'", "") == text.replace("'", "")
    content, sheet = open_workbook(table)
    for cell in (sheet["C1"], sheet["C2"]):
        assert (cell.data_type, cell.quotePrefix) == ("s", True)
        assert cell.value.strip() == text.strip()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert b"<f>" not in archive.read("xl/worksheets/sheet1.xml")


@pytest.mark.parametrize("text", ["a;=1+1", 'a;"=1+1"', "a\n@SUM(A1)", "a\r\n-2+3", ["a;+1+1"]])
def test_lists_with_semicolons_have_no_formulas(text):
    """There, a spreadsheet begins a cell after a semicolon or a line of a text with commas."""
    content = format_csv(AnswerTable(["id", "answer"], [["1", text]]))
    assert not re.search('[;\r\n]"*[=@+-]', content)


def test_texts_that_are_no_formulas_stay():
    texts = ["-3;-4,5", "a=b", "a;b", "x\ny", "1 - 2", "e@f"]
    _, row = csv.reader(io.StringIO(format_csv(AnswerTable(["answer"] * 6, [texts])), newline=""))
    assert row == texts


def test_numbers_stay_numbers():
    values = [-1.5, 7, True, 10**20, float("nan"), "-3", [1, {"a": 2}], None]
    table = AnswerTable(["answer"] * len(values), [values])
    _, row = csv.reader(io.StringIO(format_csv(table)))
    assert row == ["-1.5", "7", "true", "1" + "0" * 20, "NaN", "-3", '[1, {"a": 2}]', ""]
    _, sheet = open_workbook(table)
    found = [cell.value for cell in sheet[2][1:]]
    assert found == [-1.5, 7, True, "1" + "0" * 20, "NaN", "-3", '[1, {"a": 2}]', None]


def test_texts_that_xml_cannot_contain():
    texts = ["\x00\x1b\ufffe", "\ud800", "_x0041_", "x" * 40_000, "<b>&amp;", "\U0001f600"]
    _, sheet = open_workbook(AnswerTable(["answer"], [[text] for text in texts]))
    found = [cell.value for cell in sheet["B"][1:]]
    assert found[0] == "\ufffd" * 3
    assert found[1] == "\\ud800"
    assert found[2].replace("_x005F_", "_") == "_x0041_"
    assert found[3] == "x" * 32_767
    assert found[4:] == texts[4:]


def test_thumbnails_are_beside_their_rows(tmp_path):
    """A deleted image has an empty cell, and its row the answer."""
    for name, size in (("a.png", (400, 100)), ("c.png", (10, 20))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    images = [
        [tmp_path / "a.png"],
        [tmp_path / "gone.png"],
        [tmp_path / "text.png", tmp_path / "c.png"],
        [],
    ]
    table = AnswerTable(["answer"], [[name] for name in "abcd"])
    content, sheet = open_workbook(table, images)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        drawing = archive.read("xl/drawings/drawing1.xml").decode()
        files = sorted(name for name in archive.namelist() if "/media/" in name)
        sizes = [Image.open(io.BytesIO(archive.read(name))).size for name in files]
    assert re.findall(r"<(?:\w+:)?row>(\d+)<", drawing) == ["1", "3"]
    assert sizes == [(120, 30), (10, 20)]
    assert [cell.value for cell in sheet["B"]] == ["answer", *"abcd"]
    assert sheet.row_dimensions[2].height > 20


def test_limits_of_a_workbook_are_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_tables, "MAX_SHEET_ROWS", 2)
    monkeypatch.setattr(answer_tables, "MAX_THUMBNAILS", 1)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    notes: list[str] = []
    images = [[tmp_path / "a.png"]] * 3
    table = AnswerTable(["answer"], [[1], [2], [3]])
    content, sheet = open_workbook(table, images, notes.append)
    assert (sheet.max_row, content.count(b"xl/media/image")) == (3, 2), "twice in the archive"
    assert notes == [
        "the workbook has the first 2 of 3 answers",
        "the workbook has thumbnails of the first 1 images",
    ]


def test_format_is_that_of_the_suffix():
    record = {"id": "1", "image": None, "prompt": "?", "answer": "\udc80 \u00fc"}
    lines = answer_tables.format_answers((), [record], ".jsonl", list)
    assert json.loads(lines.decode(errors="surrogateescape"))["id"] == "1"
    assert answer_tables.format_answers((), [record], ".csv", list).startswith(b"\xef\xbb\xbfid,")
    assert Path(answer_tables.XLSX_FILE).suffix in answer_tables.TABLE_SUFFIXES
