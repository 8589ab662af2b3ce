"""Tests of `--fix`: certain corrections, skipped samples, and the list of both."""

import json
from pathlib import Path

import pytest
from check_fixtures import make_record, run_check, run_fix, write_records
from image_fixtures import write_gray_image
from shape_images import write_shape_images

from finesight.errors import UserError
from finesight.files.storage import write_folder
from finesight.ingest.check.data_checker import DataChecker, inputs_from_files
from finesight.ingest.import_source import ImportOptions
from finesight.samples.sample import read_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        write_gray_image(tmp_path / f"{number}.png", 100, 60, gray_level=40 * number)
    return tmp_path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


REJECTED = [{"type": "box", "label": "x", "xyxy": [90, 55, 80, 50]}]


def test_fix_result_of_each_sample(folder):
    records = [
        make_record("0.png"),
        make_record("gone.png"),
        make_record("1.png", "Where?", None, [90, 55, 80, 50]),
        make_record("2.png", "Where?", None, [40, 30, 20, 10]),
        make_record("3.png", "Where?", None, [0, 0, 100.5, 50], [1, 2, 3, 40]),
        make_record("4.png", "<image>\nWhat?"),
        make_record("0.png"),
        make_record("5.png", "What?<|im_end|>"),
        {**make_record("5.png", "Where?", None, [1, 2, 3, 9]), "rejected": REJECTED},
    ]
    source = write_records(folder / "data.jsonl", records)
    before = source.read_bytes()
    done = run_fix(source, folder / "out")
    assert source.read_bytes() == before
    assert (done.num_changed, done.num_skipped) == (4, 4)
    retained = read_samples(folder / "out/data.jsonl")
    assert [one.id for one in retained] == ["s1", "s3", "s5", "s6", "s9"]
    assert retained[1].messages[1].content[0].xyxy == (80, 50, 90, 55)
    assert [part.xyxy for part in retained[2].messages[1].content] == [
        (0, 0, 100, 50),
        (1, 2, 3, 40),
    ]
    assert [part.type for part in retained[3].messages[0].content] == ["image", "text"]
    assert retained[3].messages[0].content[1].text == "What?"
    assert retained[4].rejected[0].xyxy == (80, 50, 90, 55)
    left_out = rows(folder / "out/skipped_samples.jsonl")
    assert {row["sample_id"]: row["code"] for row in left_out} == {
        "s2": "image-missing",
        "s4": "box-inverted",
        "s7": "duplicate-sample",
        "s8": "special-token-in-text",
    }
    changes = {row["sample_id"]: row for row in rows(folder / "out/changes.jsonl")}
    assert changes["s3"]["fixes"] == ["reordered"]
    assert changes["s3"]["location"] == f"{source}:3"
    (message,) = changes["s3"]["messages"]
    assert message["before"][0]["xyxy"] == [90, 55, 80, 50]
    assert message["after"][0]["xyxy"] == [80, 50, 90, 55]
    (message,) = changes["s9"]["messages"]
    assert (message["message"], message["after"][0]["xyxy"]) == (2, [80, 50, 90, 55])


def test_eval_images_are_removed_from_training_data(folder):
    write_shape_images(folder / "scenes", 4, seed=1)
    names = [f"scenes/images/{number:04}.png" for number in range(4)]
    train = write_records(folder / "train.jsonl", [make_record(name) for name in names])
    validation = write_records(folder / "eval.jsonl", [make_record(name) for name in names[2:]])
    done = run_fix(train, folder / "out", validation)
    assert {path.name: count for path, count in done.output_files} == {
        "train.jsonl": 2,
        "eval.jsonl": 2,
    }
    assert run_check(folder / "out/train.jsonl", folder / "out/eval.jsonl").issue_counts == {}


def test_unreadable_rows_are_listed(folder):
    broken = {"messages": [{"role": "user", "content": [{"type": "sound"}]}]}
    done = run_fix(
        write_records(folder / "data.jsonl", [make_record("0.png"), broken]), folder / "out"
    )
    assert (done.num_skipped, done.output_files[0][1]) == (1, 1)
    (row,) = rows(folder / "out/skipped_samples.jsonl")
    assert (row["code"], row["location"]) == ("invalid-row", f"{folder / 'data.jsonl'}:2")


def test_output_file_names_are_unique(folder, monkeypatch):
    names = ("a.jsonl", "in/a.jsonl", "a-2.jsonl", "skipped_samples.jsonl", "changes.jsonl")
    (folder / "in").mkdir()
    sources = [
        write_records(folder / name, [make_record(str(folder / f"{n}.png"), f"What is {n}?")])
        for n, name in enumerate(names)
    ]
    monkeypatch.chdir(folder / "in")
    with write_folder(folder / "out") as staging:
        check = DataChecker(inputs_from_files(sources, [], ImportOptions()), staging)
        _, album = check.run()
        done = check.fixer.write(staging, folder / "out", album, check.sources)
    assert [len(read_samples(path)) for path, _ in done.output_files] == [1] * 5
    assert len({path for path, _ in done.output_files}) == 5
    assert rows(folder / "out/skipped_samples.jsonl") == rows(folder / "out/changes.jsonl") == []


def test_unnamed_folder_names_its_output_file(folder, monkeypatch):
    (folder / "0.txt").write_text("A square.")
    monkeypatch.chdir(folder)
    done = run_fix(Path("."), folder / "out", request=ImportOptions(prompt="What?"))
    assert [path.name for path, _ in done.output_files] == [f"{folder.name}.jsonl"]


def test_systematic_box_issues_are_not_fixed_individually(folder):
    records = [
        make_record(f"{n % 6}.png", f"Where is {n}?", None, [60 + n % 5, 30, 20, 10])
        for n in range(40)
    ]
    with pytest.raises(
        UserError, match="import the original data again, with --box-format xywh"
    ) as refused:
        run_fix(write_records(folder / "data.jsonl", records), folder / "out")
    assert "no files were written" in str(refused.value)
    assert not (folder / "out").exists()


def test_embedded_table_images_are_copied(folder):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    full = [(folder / f"{n}.png").read_bytes() for n in range(3)]
    cells = [full[0], full[1][:-30], full[2]]
    table = [
        {"image": {"bytes": cell, "path": "x"}, "text": f"{n}"} for n, cell in enumerate(cells)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "rows.parquet")
    request = ImportOptions(columns={"image": "image", "answer": "text"}, prompt="What?")
    done = run_fix(folder / "rows.parquet", folder / "out", request=request)
    assert (done.num_skipped, done.output_files[0][1]) == (1, 2)
    retained = [one.messages[0].content[0].image for one in read_samples(folder / "out/rows.jsonl")]
    assert [(folder / "out" / name).read_bytes() for name in retained] == [full[0], full[2]]
    images = list((folder / "out").rglob("*.png"))
    assert len(images) == 2, "the damaged one is not kept"


def test_no_files_are_written_if_no_sample_is_valid(folder):
    with pytest.raises(UserError, match="none of 1 rows is valid"):
        run_fix(write_records(folder / "data.jsonl", [make_record("gone.png")]), folder / "out")
    assert not (folder / "out").exists()
