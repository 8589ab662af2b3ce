"""Rows that cannot be used: what --unusable drop leaves out, lists, and still refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenery import paint, write_jsonl

from finesight.data.importing import UNSELECTED, import_file
from finesight.data.jsonl import read_samples
from finesight.data.opening import Request
from finesight.digests import verify_folder
from finesight.errors import UserError

COLUMNS = {"image": "image", "answer": "answer"}


def dropping(limit: int | None = None) -> Request:
    return Request(columns=COLUMNS, prompt="?", unusable="drop", limit=limit)


def table(folder: Path, letters: str) -> Path:
    """rows.jsonl with a row and a picture for each letter."""
    for shade, letter in enumerate(letters):
        paint(folder / "in" / f"{letter}.png", shade=shade)
    rows = [{"image": f"in/{c}.png", "answer": f"{c}{n}"} for n, c in enumerate(letters)]
    return write_jsonl(folder / "rows.jsonl", rows)


def test_unusable_rows_are_left_out_by_reason(tmp_path: Path) -> None:
    source = table(tmp_path, "abcdefgh")
    (tmp_path / "in" / "b.png").unlink()
    (tmp_path / "in" / "c.png").write_text("text")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[3]["answer"] = ""
    rows[4]["answer"] = "an <image> in the text"
    write_jsonl(source, rows)
    summary = import_file(source, tmp_path / "out", dropping(limit=7))
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [one.messages[-1].content[0].text for one in samples] == ["a0", "f5", "g6"]
    assert summary.left_out == {
        UNSELECTED: 1,
        "a picture is missing or damaged": 2,
        "turns are out of order or empty": 1,
        "marks in the text that its format does not read": 1,
    }
    assert summary.rows == summary.written[0].rows + sum(summary.left_out.values())
    assert summary.listed == tmp_path / "out" / "left_out.jsonl"
    listed = [json.loads(line) for line in summary.listed.read_text().splitlines()]
    assert [line["place"] for line in listed] == ["line 2", "line 3", "line 4", "line 5"]
    assert listed[0]["reason"] == "a picture is missing or damaged"
    assert all("remedy:" in line["problem"] for line in listed)
    verify_folder(tmp_path / "out")


def test_nothing_is_dropped_when_nothing_is_wrong(tmp_path: Path) -> None:
    summary = import_file(table(tmp_path, "a"), tmp_path / "out", dropping())
    assert summary.listed is None
    assert not (tmp_path / "out" / "left_out.jsonl").exists()


def test_rows_are_not_dropped_when_all_are_bad(tmp_path: Path) -> None:
    source = table(tmp_path, "a")
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(UserError, match="1 of 1 rows cannot be used") as caught:
        import_file(source, tmp_path / "out", dropping())
    assert "--unusable" not in caught.value.remedy


def test_many_bad_boxes_are_a_wrong_form_and_not_dropped(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 40, 20)
    boxes = [*[[20, 10, 5, 5]] * 2, *[[1, 2, 30, 14]] * 8]
    rows = [{"image": "a.png", "query": "?", "response": f'{{"bbox_2d": {b}}}'} for b in boxes]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="so many bad boxes") as caught:
        import_file(source, tmp_path / "out", Request(unusable="drop"))
    assert "--box-format xywh" in caught.value.remedy
    write_jsonl(source, [*rows, *rows[2:], *rows[2:]])
    summary = import_file(source, tmp_path / "out", Request(unusable="drop"))
    assert summary.left_out == {"a box is none, or lies outside of its picture": 2}


def test_pictures_of_dropped_rows_are_not_kept(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [paint(tmp_path / f"{n}.png", shade=n).read_bytes() for n in range(3)]
    rows = [
        {"image": {"bytes": d, "path": None}, "answer": a}
        for d, a in zip(data, ("x", "", "y"), strict=True)
    ]
    rows.append({"image": {"bytes": b"text", "path": None}, "answer": "z"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    summary = import_file(tmp_path / "rows.parquet", tmp_path / "out", dropping())
    kept = sorted((tmp_path / "out" / "pictures").iterdir())
    assert [path.read_bytes() for path in kept] == [data[0], data[2]]
    assert (summary.pictures, summary.written[0].rows) == (2, 2)


def test_rows_are_not_dropped_for_a_missing_option(tmp_path: Path) -> None:
    for shade, name in enumerate("ab"):
        paint(tmp_path / "set" / f"{name}.png", shade=shade)
    (tmp_path / "set" / "a.txt").write_text("A house.")
    for unusable in ("refuse", "drop"):
        with pytest.raises(UserError, match="a question without words") as caught:
            import_file(tmp_path / "set", tmp_path / "out", Request(unusable=unusable))
        assert "--prompt" in caught.value.remedy
        assert "--unusable" not in caught.value.remedy
