"""A source read leniently, faults and all, and what an opened source refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scenery import paint, write_jsonl

from finesight.data.boxes import BadBox, BoxForm
from finesight.data.importing import import_file
from finesight.data.opening import Drafted, Request, draft
from finesight.data.sample import BoxPart, ImagePart
from finesight.errors import UserError


def drafted(source: Path, **wishes: Any) -> list[Drafted]:
    (source.parent / "saved").mkdir(exist_ok=True)
    drafts = draft(source, Request(**wishes), source.parent / "saved")
    rows = list(drafts)
    assert len(drafts) == len(rows)
    again = [row.samples for row in drafts]
    assert again == [row.samples for row in rows], "a second reading differs"
    return rows


def sample(*answer: dict[str, Any], picture: str = "a.png") -> dict[str, Any]:
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": list(answer)}]
    return {"id": "1", "messages": messages}


def box(*xyxy: float, **more: Any) -> dict[str, Any]:
    return {"type": "box", "xyxy": xyxy, **more}


def test_samples_keep_their_faults(tmp_path: Path) -> None:
    picture = paint(tmp_path / "a.png", 40, 20)
    rows = [
        sample(box(30, 2, 1, 14, label="reversed")),
        sample(box(-5, -5, 900, 900)),
        sample(box(1, 2, 3, 4, image=1)),
        sample(),
        {
            "id": "2",
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}],
        },
        {"id": "3", "messages": [{"role": "nobody", "content": ""}]},
    ]
    found = drafted(write_jsonl(tmp_path / "data.jsonl", rows))
    assert [row.place for row in found] == [f"line {n}" for n in range(1, 7)]
    assert [len(row.samples) for row in found] == [1, 1, 1, 1, 1, 0]
    assert [row.problem is None for row in found] == [True] * 5 + [False]
    (reversed_box,) = found[0].boxes
    assert (reversed_box.numbers, reversed_box.label) == ((30, 2, 1, 14), "reversed")
    assert (reversed_box.picture, reversed_box.form) == (picture, BoxForm())
    outside = found[1].samples[0].messages[-1].content[0]
    assert isinstance(outside, BoxPart)
    assert outside.xyxy == (-5, -5, 900, 900)


def test_pictures_that_are_not_there_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_text("no picture")
    rows = [sample(box(1, 2, 3, 4), picture=name) for name in ("gone/a.png", "b.png")]
    found = drafted(write_jsonl(tmp_path / "data.jsonl", rows))
    parts = [row.samples[0].messages[0].content[0] for row in found]
    assert parts == [
        ImagePart(image=str(tmp_path / "gone" / "a.png")),
        ImagePart(image=str(tmp_path / "b.png")),
    ]
    assert [len(row.boxes) for row in found] == [1, 1]


def test_a_foreign_source_gives_its_numbers_and_the_corners(tmp_path: Path) -> None:
    picture = paint(tmp_path / "a.png", 40, 20)
    rows = [
        {"image": "a.png", "query": "?", "response": f'{{"bbox_2d": {numbers}}}'}
        for numbers in ([10, 5, 2, 3], [1, 2, 3], [500, 500, 100, 100])
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    first, broken, _ = drafted(source, box_format="xywh")
    assert first.samples[0].messages[-1].content == (BoxPart(xyxy=(10, 5, 12, 8)),)
    assert first.boxes[0].numbers == (10, 5, 2, 3)
    assert first.boxes[0].form == BoxForm("xywh", "pixel")
    assert isinstance(broken.problem, BadBox)
    *_, shares = drafted(source, box_units="1000")
    assert shares.boxes[0].picture == picture
    assert shares.samples[0].messages[-1].content == (BoxPart(xyxy=(20, 10, 4, 2)),)


def test_only_the_selected_rows(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    source = write_jsonl(tmp_path / "data.jsonl", [sample() for _ in range(5)])
    assert [row.number for row in drafted(source, rows=(1, None), limit=2)] == [2, 3]


def test_pictures_out_of_a_table_are_saved_as_they_are(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": data, "path": None}, "n": 1} for data in (b"text", b"\xff\xd8cut")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = drafted(
        tmp_path / "rows.parquet", columns={"image": "image", "answer": "n"}, prompt="?"
    )
    names = [Path(row.samples[0].messages[0].content[0].image) for row in found]
    assert [path.read_bytes() for path in names] == [b"text", b"\xff\xd8cut"]


def test_a_folder_that_holds_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.bin").write_text("x")
    with pytest.raises(UserError, match="a folder in which no known data set") as caught:
        import_file(tmp_path / "data", tmp_path / "out", Request())
    assert "yolo" in caught.value.expected
    with pytest.raises(UserError, match="no coco is found there"):
        import_file(tmp_path / "data", tmp_path / "out", Request(format="coco"))


def test_columns_of_a_folder(tmp_path: Path) -> None:
    paint(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("A house.")
    with pytest.raises(UserError, match=r"the format folder .* has no use for it") as caught:
        import_file(tmp_path / "set", tmp_path / "out", Request(columns={"image": "image"}))
    assert caught.value.where == "--map"
