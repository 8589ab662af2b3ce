"""Samples in tars, Parquet files and shards are found wrong as the same ones in JSONL are."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from check_fixtures import SampleRecord, make_record, run_check, run_fix, write_records
from container_fixtures import read_rows, write_parquet, write_tar, write_tar_shards
from image_fixtures import write_gray_image
from PIL import Image
from pyarrow import parquet

from finesight.errors import UserError
from finesight.ingest.check.check_result import CheckResult
from finesight.ingest.check.data_checker import CheckInput, inputs_from_files
from finesight.ingest.import_source import ImportOptions
from finesight.samples.corpus import load_corpus
from finesight.settings.config import TrainFileSettings

FAULTY = [
    make_record("0.png", "Where is 0?", None, [1, 1, 300, 30]),
    make_record("1.png", "What is 1?"),
    make_record("cut.png"),
    make_record("1.png", "What is 1?"),
    make_record("2.png", "<|endoftext|>?"),
    {"messages": make_record("3.png")["messages"][::-1]},
    make_record("twin.png", "And this?"),
    make_record(None, "A question alone?"),
    make_record("5.png", "Where is 5?", None, [1, 2, 30, 40]),
]
VALIDATION = [make_record("5.png", "A validation one?"), make_record("6.png", "Another?")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        noise = Image.effect_noise((100 + number, 60), 90).resize((20, 12))
        noise.resize((100 + number, 60)).save(tmp_path / f"{number}.png")
    full = (tmp_path / "4.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(full[: len(full) // 2])
    Image.open(tmp_path / "6.png").resize((212, 120)).save(tmp_path / "twin.png")
    return tmp_path


def tars(table: Path) -> Path:
    return Path(write_tar_shards(table, table.with_suffix(".tars"), each=4))


def tar(table: Path) -> Path:
    return Path(write_tar_shards(table, table.with_suffix(".tars"), each=99)).parent / "000.tar"


def structs(table: Path) -> Path:
    return write_parquet(table, table.with_suffix(".parquet"), group=3)


def texts(table: Path) -> Path:
    return write_parquet(table, table.with_suffix(".parquet"), group=3, texts=True)


def summarize_issues(found: CheckResult) -> list[tuple[str, str]]:
    """Each finding by its fault and its sample."""
    return sorted((finding.code, finding.sample_id) for finding in found.issues)


@pytest.mark.parametrize("packed", [tars, tar, structs, texts])
def test_container_formats_give_the_same_issues_as_jsonl(folder, packed):
    train, validation = (
        write_records(folder / "t.jsonl", FAULTY),
        write_records(folder / "e.jsonl", VALIDATION),
    )
    baseline = run_check(train, validation, format=None)
    assert set(baseline.issue_counts) >= {
        *(
            "image-truncated",
            "box-outside",
            "special-token-in-text",
            "invalid-role-order",
            "duplicate-sample",
        ),
        *("leaked-image", "leaked-image-reencoded"),
    }
    found = run_check(packed(train), packed(validation), format=None)
    assert found.issue_counts == baseline.issue_counts
    assert found.affected_samples == baseline.affected_samples
    assert summarize_issues(found) == summarize_issues(baseline)
    assert found.num_unique_images == baseline.num_unique_images
    assert {source.format for source in found.sources} == {"samples"}


def test_issue_locations_match_training_errors(folder: Path) -> None:
    pattern = tars(write_records(folder / "t.jsonl", FAULTY))
    found = {f.sample_id: f.where for f in run_check(pattern).issues}
    assert found["s5"] == f"{pattern}, 001.tar, sample 1"
    one = run_check(pattern.parent / "001.tar").issues
    assert {f.where for f in one if f.sample_id == "s5"} == {
        f"{pattern.parent / '001.tar'}, sample 1"
    }
    table = structs(folder / "t.jsonl")
    assert {f.where for f in run_check(table).issues if f.sample_id == "s5"} == {f"{table}, row 5"}


def test_rows_that_are_no_samples_are_counted(folder: Path) -> None:
    rows = read_rows(
        write_records(folder / "t.jsonl", [make_record("1.png"), make_record("2.png", "Why?")])
    )
    spoilt = [rows[0], rows[1] | {"more": 1}, rows[1] | {"messages": []}]
    files: dict[str, bytes] = {}
    for number, row in enumerate(spoilt):
        files |= {f"{number}.json": json.dumps(row).encode()}
    found = run_check(write_tar(folder / "a.tar", files | {"9.json": b"{"}))
    assert found.issue_counts == {"invalid-row": 3, "image-missing": 1}
    table = pyarrow.Table.from_pylist(
        [row | {"messages": json.dumps(row["messages"])} for row in (rows[0], spoilt[2])]
        + [{"id": "s3", "messages": "{"}]
    )
    parquet.write_table(table, folder / "a.parquet")
    found = run_check(folder / "a.parquet")
    assert found.issue_counts == {"invalid-row": 2}


@pytest.mark.parametrize("packed", [tars, structs])
def test_fixed_samples_keep_their_images(folder: Path, packed: Callable[[Path], Path]) -> None:
    """What lies where in a file may change; and none is left of a sample that is left out."""
    source = packed(write_records(folder / "t.jsonl", FAULTY))
    done = run_fix(source, folder / "out")
    ((path, count),) = done.output_files
    assert path.name in ("t.jsonl", "t.tars.jsonl")
    images = {file.name for file in (folder / "out" / "images").iterdir()}
    assert len(images) == count - 1, "one sample shows none"
    corpus = load_corpus((TrainFileSettings(path=path),))
    assert len(corpus) == count == 4
    again = run_check(path)
    assert again.issue_counts == {}
    assert again.num_unique_images == len(images)


@pytest.mark.parametrize(
    ("files", "is_imported"),
    [
        ({"1.jpg": b"x", "1.txt": b"A square."}, True),
        ({"1.jpg": b"x", "1.json": b'{"caption": "A square."}'}, True),
        ({"1.json": json.dumps({"id": "1", **make_record(None)}).encode()}, False),
    ],
)
def test_other_webdatasets_are_read_like_imports(tmp_path, files, is_imported):
    source = write_tar(tmp_path / "a.tar", files)
    (found,) = inputs_from_files([source], [], ImportOptions())
    assert found.is_imported is is_imported


def test_other_tables_are_read_like_imports(tmp_path: Path) -> None:
    foreign: list[SampleRecord] = [
        {"image": b"x", "text": "A square."},
        {"id": "1", "messages": [{"role": "user", "content": "<image>?"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "Why?"}]},
    ]
    for number, row in enumerate(foreign):
        source = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([row]), source)
        assert inputs_from_files([source], [], ImportOptions())[0].is_imported, row
    own = structs(
        write_records(
            tmp_path / "t.jsonl", [make_record(write_gray_image(tmp_path / "0.png").name)]
        )
    )
    assert not inputs_from_files([own], [], ImportOptions())[0].is_imported
    mapped = ImportOptions(columns={"answer": "id"})
    assert inputs_from_files([own], [], mapped)[0].is_imported


def test_object_storage_address_is_accepted_as_path() -> None:
    (found,) = inputs_from_files([Path("s3://bucket/a/*.tar")], [], ImportOptions())
    assert found == CheckInput("s3://bucket/a/*.tar", ImportOptions(), is_imported=False)
    with pytest.raises(UserError, match="cannot be checked directly"):
        inputs_from_files([Path("https://host/a.tar")], [], ImportOptions())


def test_import_options_are_rejected_for_samples(folder: Path) -> None:
    source = structs(write_records(folder / "t.jsonl", [make_record("1.png")]))
    with pytest.raises(UserError, match="does not support it") as caught:
        run_check(source, prompt="What?")
    assert caught.value.where == "--prompt"
