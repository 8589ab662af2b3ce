"""Rows that cannot be used: what --on-invalid-row skip leaves out, lists, and still refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from image_fixtures import write_gray_image, write_jsonl

from finesight.data.formats.dataset_format import NOTE_CLIPPED_BOX, NOTE_SKIPPED_BOX
from finesight.data.import_source import ImportOptions
from finesight.data.importer import REASON_NOT_SELECTED, import_dataset
from finesight.data.sample import read_samples
from finesight.errors import UserError
from finesight.storage import verify_folder

COLUMNS = {"image": "image", "answer": "answer"}
NOTES = (NOTE_CLIPPED_BOX, NOTE_SKIPPED_BOX)


def skip_options(limit: int | None = None) -> ImportOptions:
    return ImportOptions(columns=COLUMNS, prompt="?", on_invalid_row="skip", limit=limit)


def table(folder: Path, letters: str) -> Path:
    """Write rows.jsonl with a row and an image for each letter."""
    for shade, letter in enumerate(letters):
        write_gray_image(folder / "in" / f"{letter}.png", gray_level=shade)
    rows = [{"image": f"in/{c}.png", "answer": f"{c}{n}"} for n, c in enumerate(letters)]
    return write_jsonl(folder / "rows.jsonl", rows)


def test_invalid_rows_are_skipped_by_reason(tmp_path: Path) -> None:
    source = table(tmp_path, "abcdefgh")
    (tmp_path / "in" / "b.png").unlink()
    (tmp_path / "in" / "c.png").write_text("text")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[3]["answer"] = ""
    rows[4]["answer"] = "an <image> in the text"
    write_jsonl(source, rows)
    summary = import_dataset(source, tmp_path / "out", skip_options(limit=7))
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [one.messages[-1].content[0].text for one in samples] == ["a0", "f5", "g6"]
    assert summary.skipped_rows == {
        REASON_NOT_SELECTED: 1,
        "an image is missing or corrupt": 2,
        "turns have an invalid order or are empty": 1,
        "unsupported placeholders in the text": 1,
    }
    assert summary.num_rows == summary.output_files[0].num_rows + sum(summary.skipped_rows.values())
    assert summary.skipped_rows_file == tmp_path / "out" / "skipped_rows.jsonl"
    listed = [json.loads(line) for line in summary.skipped_rows_file.read_text().splitlines()]
    assert [line["location"] for line in listed] == ["line 2", "line 3", "line 4", "line 5"]
    assert listed[0]["reason"] == "an image is missing or corrupt"
    assert all("remedy:" in line["error"] for line in listed)
    verify_folder(tmp_path / "out")


def test_no_list_is_written_without_invalid_rows(tmp_path: Path) -> None:
    summary = import_dataset(table(tmp_path, "a"), tmp_path / "out", skip_options())
    assert summary.skipped_rows_file is None
    assert not (tmp_path / "out" / "skipped_rows.jsonl").exists()


@pytest.mark.parametrize("in_text", [False, True])
def test_invalid_boxes_of_tables_and_answers(tmp_path: Path, in_text: bool) -> None:
    write_gray_image(tmp_path / "a.png")
    valid, strays, wide, inverted = (
        [2, 3, 20, 10],
        [[5, 5, 5, 9], [50, 3, 60, 12]],
        [30, 3, 43, 22],
        [9, 9, 3, 3],
    )
    name = "answer" if in_text else "box"
    options = ImportOptions(columns={"image": "image", name: name}, prompt="?")
    for policy, others, expected in (
        ("drop", strays, [valid]),
        ("clip", [*strays, wide], [valid, [30, 3, 40, 20]]),
        ("drop", [wide], None),
        ("clip", [inverted], None),
    ):
        boxes = [valid, *others]
        text = json.dumps([{"bbox_2d": box, "label": "x"} for box in boxes])
        row = {"image": "a.png", name: text if in_text else boxes}
        source, out = write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / policy
        if expected is None:
            with pytest.raises(UserError, match="the answer would be incomplete") as caught:
                import_dataset(source, tmp_path / "x", replace(options, on_invalid_box=policy))
            assert ("--on-invalid-box clip" in caught.value.remedy) == (others == [wide])
            continue
        summary = import_dataset(source, out, replace(options, on_invalid_box=policy))
        (sample,) = read_samples(out / "data.jsonl")
        assert [list(part.xyxy) for part in sample.messages[-1].content] == expected
        assert sum(summary.source_notes.get(note, 0) for note in NOTES) == len(others)


@pytest.mark.parametrize("box", [[9, 9, 9, 9], [30, 3, 43, 22]])
@pytest.mark.parametrize("name", ["answer", "box", "<bbox>"])
def test_policies_of_the_remedy_succeed(tmp_path: Path, name: str, box: list[int]) -> None:
    """A box in a sentence cannot be dropped."""
    write_gray_image(tmp_path / "a.png")
    boxes = [[2, 3, 20, 10], box]
    text = json.dumps([{"bbox_2d": one, "label": "x"} for one in boxes])
    row = {"image": "a.png", name: boxes if name == "box" else text}
    options = ImportOptions(columns={"image": "image", name: name}, prompt="?")
    if name == "<bbox>":
        turns = {"user": "<image>Where?", "assistant": "At <bbox> and <bbox>."}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        row = {"messages": messages, "images": ["a.png"], "objects": {"bbox": boxes}}
        options = ImportOptions()
    source = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        import_dataset(source, tmp_path / "x", options)
    named = re.findall(r"clip|drop", str(caught.value.remedy))
    assert bool(named) == (name != "<bbox>" or box[0] != box[2])
    for policy in named:
        import_dataset(source, tmp_path / policy, replace(options, on_invalid_box=policy))


def test_many_invalid_boxes_are_a_wrong_convention(tmp_path: Path) -> None:
    options = ImportOptions(columns={"image": "image", "box": "box"}, prompt="?")
    rows = [{"image": f"{number}.png", "box": [30, 10, 50, 15]} for number in range(10)]
    for row in rows:
        write_gray_image(tmp_path / str(row["image"]))
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="10 of 10 rows are invalid") as caught:
        import_dataset(source, tmp_path / "out", replace(options, on_invalid_row="skip"))
    assert "the box convention is probably wrong" in caught.value.what
    summary = import_dataset(source, tmp_path / "out", replace(options, on_invalid_box="clip"))
    assert summary.source_notes == {NOTE_CLIPPED_BOX: 10}


def test_all_invalid_rows_raise(tmp_path: Path) -> None:
    source = table(tmp_path, "a")
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(UserError, match="1 of 1 rows are invalid") as caught:
        import_dataset(source, tmp_path / "out", skip_options())
    assert "--on-invalid-row" not in caught.value.remedy


def test_many_invalid_boxes_raise_format_error(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", 40, 20)
    boxes = [*[[20, 10, 5, 5]] * 2, *[[1, 2, 30, 14]] * 8]
    rows = [{"image": "a.png", "query": "?", "response": f'{{"bbox_2d": {b}}}'} for b in boxes]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="rows have invalid boxes") as caught:
        import_dataset(source, tmp_path / "out", ImportOptions(on_invalid_row="skip"))
    assert "--box-format xywh" in caught.value.remedy
    write_jsonl(source, [*rows, *rows[2:], *rows[2:]])
    summary = import_dataset(source, tmp_path / "out", ImportOptions(on_invalid_row="skip"))
    assert summary.skipped_rows == {"a box is invalid or outside its image": 2}


def test_images_of_skipped_rows_are_removed(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [write_gray_image(tmp_path / f"{n}.png", gray_level=n).read_bytes() for n in range(3)]
    rows = [
        {"image": {"bytes": d, "path": None}, "answer": a}
        for d, a in zip(data, ("x", "", "y"), strict=True)
    ]
    rows.append({"image": {"bytes": b"text", "path": None}, "answer": "z"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    summary = import_dataset(tmp_path / "rows.parquet", tmp_path / "out", skip_options())
    retained = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.read_bytes() for path in retained] == [data[0], data[2]]
    assert (summary.num_images, summary.output_files[0].num_rows) == (2, 2)


def test_missing_option_is_no_invalid_row(tmp_path: Path) -> None:
    for shade, name in enumerate("ab"):
        write_gray_image(tmp_path / "set" / f"{name}.png", gray_level=shade)
    (tmp_path / "set" / "a.txt").write_text("A house.")
    for on_invalid_row in ("fail", "skip"):
        with pytest.raises(UserError, match="a question without text") as caught:
            import_dataset(
                tmp_path / "set", tmp_path / "out", ImportOptions(on_invalid_row=on_invalid_row)
            )
        assert "--prompt" in caught.value.remedy
        assert "--on-invalid-row" not in caught.value.remedy
