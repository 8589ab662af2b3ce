"""`--fix`: what is certain is mended, what cannot be used is left out, all of it is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversing import checked, lines, mended, sample
from scenery import paint
from shape_pictures import draw_scenes

from finesight.check.run import Check
from finesight.check.subjects import of_files
from finesight.data.jsonl import read_samples
from finesight.data.opening import Request
from finesight.errors import UserError
from finesight.storage import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        paint(tmp_path / f"{number}.png", 100, 60, shade=40 * number)
    return tmp_path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_becomes_of_each_sample(folder):
    records = [
        sample("0.png"),
        sample("gone.png"),
        sample("1.png", "Where?", None, [90, 55, 80, 50]),
        sample("2.png", "Where?", None, [40, 30, 20, 10]),
        sample("3.png", "Where?", None, [0, 0, 100.5, 50], [1, 2, 3, 40]),
        sample("4.png", "<image>\nWhat?"),
        sample("0.png"),
        sample("5.png", "What?<|im_end|>"),
    ]
    source = lines(folder / "data.jsonl", records)
    before = source.read_bytes()
    done = mended(source, folder / "out")
    assert source.read_bytes() == before
    assert (done.changed, done.left_out) == (3, 4)
    kept = read_samples(folder / "out/data.jsonl")
    assert [one.id for one in kept] == ["s1", "s3", "s5", "s6"]
    assert kept[1].messages[1].content[0].xyxy == (80, 50, 90, 55)
    assert [part.xyxy for part in kept[2].messages[1].content] == [(0, 0, 100, 50), (1, 2, 3, 40)]
    assert [part.type for part in kept[3].messages[0].content] == ["image", "text"]
    assert kept[3].messages[0].content[1].text == "What?"
    left_out = rows(folder / "out/left_out.jsonl")
    assert {row["sample"]: row["code"] for row in left_out} == {
        "s2": "picture-missing",
        "s4": "box-reversed",
        "s7": "duplicate",
        "s8": "special-token",
    }
    changes = {row["sample"]: row for row in rows(folder / "out/changes.jsonl")}
    assert changes["s3"]["fixes"] == ["put in order"]
    assert changes["s3"]["where"] == f"{source}:3"
    (message,) = changes["s3"]["messages"]
    assert message["before"][0]["xyxy"] == [90, 55, 80, 50]
    assert message["after"][0]["xyxy"] == [80, 50, 90, 55]


def test_what_was_mended_has_no_faults_left(folder):
    records = [
        sample("0.png", "Where?", None, [90, 55, 80, 50]),
        sample("1.png", "Where?", None, [-0.5, 0, 50, 50]),
        sample("2.png", "<image>What?"),
        sample("3.png", "What?", ""),
    ]
    mended(lines(folder / "data.jsonl", records), folder / "out")
    found = checked(folder / "out/data.jsonl")
    assert (found.samples, found.counts) == (3, {})
    first = read_samples(folder / "out/data.jsonl")[0].messages[0].content[0].image
    assert first == "../0.png"


def test_held_out_pictures_are_taken_out_of_training(folder):
    draw_scenes(folder / "scenes", 4, seed=1)
    names = [f"scenes/pictures/{number:04}.png" for number in range(4)]
    train = lines(folder / "train.jsonl", [sample(name) for name in names])
    held_out = lines(folder / "eval.jsonl", [sample(name) for name in names[2:]])
    done = mended(train, folder / "out", held_out)
    assert {path.name: count for path, count in done.files} == {"train.jsonl": 2, "eval.jsonl": 2}
    assert checked(folder / "out/train.jsonl", folder / "out/eval.jsonl").counts == {}


def test_rows_that_cannot_be_read_are_listed(folder):
    broken = {"messages": [{"role": "user", "content": [{"type": "sound"}]}]}
    done = mended(lines(folder / "data.jsonl", [sample("0.png"), broken]), folder / "out")
    assert (done.left_out, done.files[0][1]) == (1, 1)
    (row,) = rows(folder / "out/left_out.jsonl")
    assert (row["code"], row["where"]) == ("row-unreadable", f"{folder / 'data.jsonl'}:2")


def test_no_source_takes_the_name_of_another_or_of_a_list(folder, monkeypatch):
    names = ("a.jsonl", "in/a.jsonl", "a-2.jsonl", "left_out.jsonl", "changes.jsonl")
    (folder / "in").mkdir()
    sources = [
        lines(folder / name, [sample(str(folder / f"{n}.png"), f"What is {n}?")])
        for n, name in enumerate(names)
    ]
    monkeypatch.chdir(folder / "in")
    with write_folder(folder / "out") as staging:
        check = Check(of_files(sources, [], Request()), staging)
        _, album = check.run()
        done = check.mending.write(staging, folder / "out", album, check.drafts)
    assert [len(read_samples(path)) for path, _ in done.files] == [1] * 5
    assert len({path for path, _ in done.files}) == 5
    assert rows(folder / "out/left_out.jsonl") == rows(folder / "out/changes.jsonl") == []


def test_a_folder_without_a_name_gives_its_file_one(folder, monkeypatch):
    (folder / "0.txt").write_text("A square.")
    monkeypatch.chdir(folder)
    done = mended(Path("."), folder / "out", request=Request(prompt="What?"))
    assert [path.name for path, _ in done.files] == [f"{folder.name}.jsonl"]


def test_nothing_is_written_when_nothing_is_left(folder):
    with pytest.raises(UserError, match="none of 1 rows is left"):
        mended(lines(folder / "data.jsonl", [sample("gone.png")]), folder / "out")
    assert not (folder / "out").exists()


def test_boxes_of_another_convention_are_not_mended_one_by_one(folder):
    records = [
        sample(f"{n % 6}.png", f"Where is {n}?", None, [60 + n % 5, 30, 20, 10]) for n in range(40)
    ]
    with pytest.raises(UserError, match="made from again, with --box-format xywh") as refused:
        mended(lines(folder / "data.jsonl", records), folder / "out")
    assert "nothing was written" in str(refused.value)
    assert not (folder / "out").exists()


def test_pictures_out_of_a_table_come_along(folder):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    whole = [(folder / f"{n}.png").read_bytes() for n in range(3)]
    cells = [whole[0], whole[1][:-30], whole[2]]
    table = [
        {"image": {"bytes": cell, "path": "x"}, "text": f"{n}"} for n, cell in enumerate(cells)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "rows.parquet")
    request = Request(columns={"image": "image", "answer": "text"}, prompt="What?")
    done = mended(folder / "rows.parquet", folder / "out", request=request)
    assert (done.left_out, done.files[0][1]) == (1, 2)
    kept = [one.messages[0].content[0].image for one in read_samples(folder / "out/rows.jsonl")]
    assert [(folder / "out" / name).read_bytes() for name in kept] == [whole[0], whole[2]]
    pictures = list((folder / "out").rglob("*.png"))
    assert len(pictures) == 2, "the damaged one is not kept"
