"""Rows of JSON, JSON Lines, CSV and Parquet files."""

import gzip
import json
import re
import sys
import tarfile
import tracemalloc
import zipfile
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pytest
from case_files import load_cases
from container_fixtures import make_png, write_tar
from image_fixtures import write_jsonl
from pyarrow import parquet

from finesight.errors import UserError
from finesight.ingest import row_reader
from finesight.ingest.folder_listing import is_json_file, list_folder
from finesight.ingest.row_reader import (
    SourceRow,
    is_webdataset,
    open_row_file,
    open_webdataset,
    read_first_records,
)
from finesight.samples.tar_members import split_member_name

CASES = load_cases("row_reader")
RECORDS = [{"id": n, "text": f'row {n}, \u2028 "quoted"\nline'} for n in range(5)]


def read_all(path: Path) -> list[SourceRow]:
    rows = open_row_file(path)
    return list(rows.iter_range(0, rows.num_rows))


def as_csv(path: Path, records: list[dict[str, Any]], delimiter: str = ",") -> Path:
    def cell(value: object) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    lines = [records[0].keys(), *(record.values() for record in records)]
    text = "".join(delimiter.join(map(cell, line)) + "\r\n" for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    rows = read_all(path)
    assert [(row.location, row.id) for row in rows] == [("line 1", "a-1"), ("line 3", "a-3")]


def test_lines_are_streamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": "x" * 1000, "n": n} for n in range(5000)))
    rows = open_row_file(path)
    tracemalloc.start()
    assert sum(row.record["n"] for row in rows.iter_range(0, rows.num_rows)) == 5000 * 4999 / 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10, f"{peak} bytes for a file of {path.stat().st_size}"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_array_with_any_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(json.dumps(RECORDS, indent=2))
    rows = read_all(path)
    assert [row.record for row in rows] == RECORDS
    assert rows[1].location == "row 2"


@pytest.mark.parametrize("suffix", ["ndjson", "manifest", "NDJSON"])
def test_other_suffixes_of_json_lines(tmp_path: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / f"a.{suffix}", RECORDS)
    rows = read_all(path)
    assert [row.record for row in rows] == RECORDS
    assert rows[1].location == "line 2"
    assert read_first_records(path, 1) == RECORDS[:1]


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 4), (3, 4), (4, 5), (2, 2)])
def test_parquet_row_groups(tmp_path: Path, start: int, stop: int) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=2)
    rows = open_row_file(path)
    assert rows.num_rows == 5
    chosen = list(rows.iter_range(start, stop))
    assert [row.record for row in chosen] == RECORDS[start:stop]
    assert [row.location for row in chosen] == [f"row {n + 1}" for n in range(start, stop)]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="needs pyarrow") as caught:
        open_row_file(tmp_path / "a.parquet")
    assert caught.value.remedy == "pip install 'finesight[hub]'"


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2", "broken JSON"),
        ("a.json", b'[{"a": 1},\n {"a": }]', "a.json:2", "broken JSON"),
        ("a.json", b'{"a": 1}\n\xff', "a.json:2", "not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n"b"\n', "a.jsonl, line 2", "holds str 'b'"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\\ud83d!"}', "a.jsonl:2", "a lone surrogate"),
        ("a.json", b"[" * 100_000, "a.json:1", "broken JSON"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv:3", "more or fewer cells"),
        ("a.csv", b"a,b\n1,2\n1\n", "a.csv:3", "more or fewer cells"),
        ("a.csv", b'a,b\n1,"x"y\n', "a.csv:2", "broken CSV"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', "a.csv:3", "broken CSV: unexpected end"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1", "duplicate column name 'a'"),
        ("a.csv", b"a,b\n", "a.csv", "contains no rows"),
        ("a.json", b"[]", "a.json", "contains no rows"),
        ("a.json", b'{\n"data": {"a": 1}}', "a.json", "one object with the keys data"),
        ("a.json", b'{\n"data": [{"a": 1}]', "a.json:1", "broken JSON"),
        ("a.jsonl", b"\n", "a.jsonl", "contains no rows"),
        ("a.parquet", b"nonsense", "a.parquet", "cannot be read as Parquet"),
        ("a.csv", "a,b\nä,ö\n\né,ü\nü,ü\nß,".encode() * 3 + b"\xff", "a.csv:16", "not UTF-8"),
        ("a.csv", b"a,b\nx,\x81\n", "a.csv:2", "not UTF-8"),
        ("a.xlsx", b"", "a.xlsx", "cannot be read as an Excel file"),
        ("a.xls", b"", "a.xls", "a file of type .xls"),
        ("a", b"", "a", "a file of type (no suffix)"),
        ("a.odgt", b'{\n"a": 1}\n', "a.odgt", "a file of type .odgt"),
        ("a.odgt", b'{"a": 1}\n{"a"\n', "a.odgt:2", "broken JSON"),
        ("a.csv", b"a, b,a \n1,2,3\n", "a.csv:1", "duplicate column name 'a'"),
        ("a.txt", b"a list, of\nno columns\n", "a.txt:2", "more or fewer cells"),
        ("a.txt", b"b.png\nc.png\n", "a.txt", "a text without columns"),
        ("a.txt", b'b.png\tx\nc.png\t"x"\n', "a.txt:2", "a cell begins with a quote"),
        ("a.csv.gz", b"a,b\n", "a.csv.gz", "cannot be decompressed"),
        ("a.gz", b"", "a.gz", "a file of type .gz"),
    ],
    ids=count(),
)
def test_invalid_files_are_rejected(tmp_path, name, content, where, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_row_file(tmp_path / name)
    assert what in caught.value.what
    assert caught.value.where == str(tmp_path / where)
    assert caught.value.remedy


def test_json_lines_have_any_suffix(tmp_path):
    (tmp_path / "a.odgt").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n')
    reader = open_row_file(tmp_path / "a.odgt")
    assert [row.record for row in reader.iter_range(0, 9)] == [{"a": 1}, {"a": 2}]
    assert reader.text_format == "JSON Lines, by the first line"


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_row_file(tmp_path / f"a.{suffix}")


def test_csv_with_semicolons(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "a.csv", RECORDS, ";")
    assert [row.record for row in read_all(path)] == [{**r, "id": str(r["id"])} for r in RECORDS]
    path.write_text("a,b;c\n1,2\n")
    assert read_all(path)[0].record == {"a": "1", "b;c": "2"}


@pytest.mark.parametrize("name", CASES["test_text_tables_are_read"])
def test_text_tables_are_read(tmp_path: Path, name: str) -> None:
    file, content, records, note = CASES["test_text_tables_are_read"][name]
    (tmp_path / file).write_text(content)
    assert [row.record for row in read_all(tmp_path / file)] == records
    assert open_row_file(tmp_path / file).text_format == note


def test_long_runs_of_spaces_are_stripped_once(tmp_path: Path) -> None:
    text = "x" + " " * 200_000 + "y"
    (tmp_path / "a.csv").write_text(f"image, note\na.png, {text} \n")
    assert read_all(tmp_path / "a.csv")[0].record == {"image": "a.png", "note": text}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", CASES["test_rows_of_documents"])
def test_rows_of_documents(tmp_path: Path, name: str, indent: int | None) -> None:
    document, records, others = CASES["test_rows_of_documents"][name]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, indent=indent))
    reader = open_row_file(path)
    assert [row.record for row in reader.iter_range(0, 9)] == records
    if isinstance(others, list):
        others = {f"{key} of the document": 1 for key in others}
    assert reader.other_keys == others
    assert reader.text_format.startswith("rows ")


@pytest.mark.parametrize("record", CASES["test_single_rows_are_no_documents"])
def test_single_rows_are_no_documents(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record))
    assert [row.record for row in read_all(path)] == [record]
    path.write_text(json.dumps(record, indent=1))
    with pytest.raises(UserError, match="one object with the keys"):
        open_row_file(path)


@pytest.mark.parametrize(("document", "what"), CASES["test_documents_are_rejected"])
def test_documents_are_rejected(tmp_path: Path, document: dict[str, Any], what: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=what) as caught:
        open_row_file(tmp_path / "a.json")
    assert caught.value.remedy


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_compressed_files(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"id": str(n), "text": f"row {n}"} for n in range(5)]
    plain = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(plain, records)
    elif suffix == "json":
        plain.write_text(json.dumps(records))
    else:
        as_csv(plain, records, "\t" if suffix == "tsv" else ",")
    content = plain.read_bytes()
    path = tmp_path / f"b.{suffix}.gz"
    path.write_bytes(gzip.compress(content[:20]) + gzip.compress(content[20:]))
    rows = read_all(path)
    assert [row.record for row in rows] == records
    assert {row.stem for row in rows} == {"b"}
    path.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(UserError, match="cannot be decompressed"):
        open_row_file(path)
    monkeypatch.setattr(row_reader, "UNCHECKED_BYTES", 1000)
    path.write_bytes(gzip.compress(b" " * 1_000_000 + content))
    with pytest.raises(UserError, match="it would unpack to more than"):
        open_row_file(path)


SENTENCES = {
    "utf-8": "a straße, 图",
    "utf-16": "a straße, 图",
    "utf-16-le": "the Straße and more text",
    "cp1252": "Ein Fußgänger überquert; café",
    "gb18030": "一只猫坐在沙发上，旁边是红色的汽车",
    "cp1250": "Czerwony samochód, żółty rower",
    "cp1253": "Ένα κόκκινο αυτοκίνητο στον δρόμο",
    "cp1254": "Kırmızı bir araba, sarı köpek",
    "shift_jis": "赤い車が道路を走っている",
}


@pytest.mark.parametrize("encoding", SENTENCES)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_delimiter_and_encoding(tmp_path: Path, encoding: str, delimiter: str, suffix: str) -> None:
    records = [{"n": str(n), "text": SENTENCES[encoding], "x": "1,5"} for n in range(4)]
    path = as_csv(tmp_path / "utf8.csv", records, delimiter)
    table = tmp_path / f"a.{suffix}"
    table.write_bytes(path.read_text(encoding="utf-8-sig").encode(encoding))
    reader = open_row_file(table)
    assert [row.record for row in read_all(table)] == records
    name = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}[delimiter]
    shown = encoding.upper().replace("_", "-")
    note = "" if encoding in ("utf-8", "utf-16") else "encoding guessed: "
    assert reader.text_format == f"{name}-separated, {note}{shown}"
    assert open_row_file(table, encoding).text_format == f"{name}-separated, {shown}"
    with pytest.raises(UserError, match="not ascii text"):
        open_row_file(table, "ascii")


def test_csv_columns_without_a_name_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",image, \n0,a.png,zebra\n")
    (row,) = open_row_file(tmp_path / "a.csv").iter_range(0, 9)
    names = {"unnamed column 1": "0", "image": "a.png", "unnamed column 3": "zebra"}
    assert row.record == names


def test_excel_workbook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workbook = openpyxl.Workbook()
    sheet = workbook.active
    days = (datetime(2026, 5, 17), datetime(2026, 5, 17, 8))
    for row in [[], ["image", "text", None, "n", None], ["a.png", *days, 3], [], ["b.png"]]:
        sheet.append(row)
    workbook.create_sheet("Notes")
    workbook.save(tmp_path / "saved.xlsx")
    for dimension in (b"A1", b"A1:XFD1048576"):
        with (
            zipfile.ZipFile(tmp_path / "saved.xlsx") as saved,
            zipfile.ZipFile(tmp_path / "a.xlsx", "w") as changed,
        ):
            for name in saved.namelist():
                content = re.sub(rb'ref="A[^"]*"', b'ref="%s"' % dimension, saved.read(name))
                changed.writestr(name, content)
        reader = open_row_file(tmp_path / "a.xlsx")
        assert reader.text_format == "sheet 'Sheet', not Notes"
        assert [(row.number, row.record) for row in reader.iter_range(0, 9)] == [
            (3, {"image": "a.png", "text": "2026-05-17", "unnamed column 3": days[1], "n": 3}),
            (5, {"image": "b.png", "text": None, "unnamed column 3": None, "n": None}),
        ]
    for limit, what in (("CELLS", "more than 10 cells"), ("BYTES", "unpacked, more than 10")):
        monkeypatch.setattr(row_reader, f"MAX_XLSX_{limit}", 10)
        with pytest.raises(UserError, match=what):
            open_row_file(tmp_path / "a.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match="openpyxl, which cannot be imported") as caught:
        open_row_file(tmp_path / "a.xlsx")
    assert "pip install 'finesight[xlsx]'" in caught.value.remedy


def test_padded_names_of_an_excel_table(tmp_path: Path) -> None:
    workbook = openpyxl.Workbook()
    for row in [["image", " n"], ["a.png ", 1], ["b.png", " x "]]:
        workbook.active.append(row)
    workbook.save(tmp_path / "a.xlsx")
    reader = open_row_file(tmp_path / "a.xlsx")
    records = [row.record for row in reader.iter_range(0, 9)]
    assert records == [{"image": "a.png", "n": 1}, {"image": "b.png", "n": "x"}]
    assert reader.text_format == "sheet 'Sheet'; spaces around cells removed"
    workbook.active["B1"] = "image "
    workbook.save(tmp_path / "a.xlsx")
    with pytest.raises(UserError, match="duplicate column name 'image'"):
        open_row_file(tmp_path / "a.xlsx")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "xlsx"])
@pytest.mark.parametrize("first", ["a.png", "https://x.org/a.jpg?w=1", "7", "9" * 200_000])
def test_first_row_without_header_is_a_row(tmp_path: Path, suffix: str, first: str) -> None:
    table = [[first, "cat", "cat"], ["b.png", "dog", "dog"]]
    path = tmp_path / f"a.{suffix}"
    if suffix == "xlsx":
        workbook = openpyxl.Workbook()
        for row in [[first[:99], *table[0][1:]], table[1]]:
            workbook.active.append(row)
        workbook.save(path)
    else:
        path.write_text("".join("\t,"[suffix == "csv"].join(row) + "\n" for row in table))
    is_detected = not first.isdecimal()
    if not is_detected:
        with pytest.raises(UserError, match="duplicate column name 'cat'") as caught:
            open_row_file(path)
        assert "--no-header" in caught.value.remedy
    reader = open_row_file(path, no_header=not is_detected)
    records = [row.record for row in reader.iter_range(0, 9)]
    assert [record["2"] for record in records] == ["cat", "dog"]
    assert records[0]["1"][:99] == first[:99]
    assert reader.text_format.endswith("; no header, columns 1 to 3")
    assert reader.num_rows == 2


def test_files_are_grouped_by_name(tmp_path: Path) -> None:
    files = {}
    for n in range(5):
        files[f"train/{n:04}.png"] = make_png(n)
        files[f"train/{n:04}.txt"] = f"caption {n}\n".encode()
        files[f"train/{n:04}.json"] = json.dumps({"width": 64, "image": "x"}).encode()
    files["__index__"] = b"x"
    tar = write_tar(tmp_path / "a.tar", files)
    assert is_webdataset(tar)
    rows = open_webdataset(tar)
    assert rows.num_rows == 5
    (second, third) = rows.iter_range(1, 3)
    assert (second.number, second.location) == (2, "sample train/0001")
    assert second.record == {
        "id": "train/0001", "image": make_png(1), "txt": "caption 1", "width": 64, "json.image": "x"
    }  # fmt: skip
    assert third.record["txt"] == "caption 2"


def test_several_images_per_sample(tmp_path: Path) -> None:
    files = {"1.left.png": make_png(1), "1.right.png": make_png(2), "1.json": b"[3]"}
    (row,) = open_webdataset(write_tar(tmp_path / "a.tar", files)).iter_range(0, 1)
    assert row.record == {
        "id": "1", "left.png": make_png(1), "right.png": make_png(2), "json": [3]
    }  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {"images/1.png": b"", "labels/1.txt": b""},
        {"1.png": b"", "1.txt": b"", "classes.txt": b""},
        {"train.jsonl": b"", "1.png": b""},
        {"1.png": b"", "1.json": b'{"imagePath": "1.png"}'},
        {"page.1.png": b"", "page.1.txt": b"", "page.2.png": b"", "page.2.txt": b""},
        {},
    ],
)
def test_other_tars_are_archives(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert not is_webdataset(write_tar(tmp_path / "a.tar", files))


def test_invalid_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = write_tar(tmp_path / "a.tar", {"1.png": make_png(1), "1.txt": b"a", "1.json": b"{"})
    with pytest.raises(UserError, match=r"1\.json: broken JSON"):
        list(open_webdataset(full).iter_range(0, 1))
    write_tar(full, {"1.png": make_png(1), "1.txt": b"\xff"})
    with pytest.raises(UserError, match="not UTF-8"):
        list(open_webdataset(full).iter_range(0, 1))
    full.write_bytes(full.read_bytes()[:700])
    with pytest.raises(UserError, match=r"ends early|cannot be read"):
        list(open_webdataset(full).iter_range(0, 1))
    (tmp_path / "none.tar").write_bytes(b"none" * 300)
    for read in (open_webdataset, is_webdataset):
        with pytest.raises(UserError, match="cannot be read: ReadError"):
            read(tmp_path / "none.tar")
    with pytest.raises(UserError, match="no such file"):
        open_webdataset(tmp_path / "missing.tar")
    with pytest.raises(UserError, match="contains no samples"):
        open_webdataset(write_tar(tmp_path / "empty.tar", {}))
    monkeypatch.setattr(row_reader, "MAX_MEMBER_BYTES", 10)
    with pytest.raises(UserError, match="has 11 bytes"):
        list(open_webdataset(write_tar(full, {"1.txt": b"a" * 11})).iter_range(0, 1))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("./0001.jpg", ("0001", "jpg")),
        ("./a//b.left.JPG", ("a/b", "left.jpg")),
        ("a.b/c.d", ("a.b/c", "d")),
        ("a/../b.c", ("a/../b", "c")),
        ("/b.c", ("/b", "c")),
        ("/a/b", ("/a/b", "")),
        ("a/.hidden", ("a/", "hidden")),
    ],
)
def test_member_name_is_split_into_key_and_suffix(name: str, parts: tuple[str, str]) -> None:
    assert split_member_name(tarfile.TarInfo(name)) == parts


def test_files_are_grouped_by_kind(tmp_path: Path) -> None:
    root = tmp_path / "set"
    names = ("b.PNG", "a.jpg", "in/c.txt", "in/.hidden", ".git/x.jpg", "sha256.json", "noend")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    found = list_folder(root)
    assert found.image_files() == [root / "a.jpg", root / "b.PNG"]
    assert found.files_with_suffix(".txt") == [root / "in" / "c.txt"]
    assert str(found) == "1 .jpg, 1 .png, 1 .txt, 1 no suffix"


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jpg").touch()
    (root / "images").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "again").symlink_to(elsewhere)
    assert list_folder(root).image_files() == [root / "images" / "a.jpg"]


def test_json_object_detection(tmp_path: Path) -> None:
    for name, content, is_object in (
        ("a.json", b'\xef\xbb\xbf \n{"a": 1}', True),
        ("a.JSON", b"{", True),
        ("a.json", b"[{}]", False),
        ("a.json", b"", False),
        ("a.jsonl", b"{}", False),
    ):
        (tmp_path / name).write_bytes(content)
        assert is_json_file(tmp_path / name) is is_object
    assert not is_json_file(tmp_path / "missing.json")


def test_json_lines_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text('{"file_name": "a.png", "n": 1}\n{"file_name": "b.png", "n": 2}\n')
    reader = open_row_file(path)
    assert [row.record["n"] for row in reader.iter_range(0, reader.num_rows)] == [1, 2]


def test_double_endings_are_a_text_and_json_of_their_own(tmp_path: Path) -> None:
    files = {}
    for n in range(2):
        files[f"line_{n}.png"] = make_png(n)
        files[f"line_{n}.read.txt"] = f"total {n}\n".encode()
        files[f"line_{n}.spots.json"] = json.dumps({"json": [n, 2]}).encode()
    tar = write_tar(tmp_path / "a.tar", files)
    assert is_webdataset(tar)
    _, second = open_webdataset(tar).iter_range(0, 2)
    assert second.record == {
        "id": "line_1",
        "image": make_png(1),
        "read.txt": "total 1",
        "spots.json": {"json": [1, 2]},
    }
