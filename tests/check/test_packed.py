"""Samples in tars, Parquet files and shards are found wrong as the same ones in JSONL are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from conversing import Record, checked, lines, mended, sample
from packing import as_parquet, as_tars, rows_of, tar_of
from PIL import Image
from pyarrow import parquet
from scenery import paint

from finesight.check.findings import Checked
from finesight.check.processes import WORTH_IT
from finesight.check.run import Check
from finesight.check.subjects import Packed, Subject, of_files
from finesight.config import DataFile
from finesight.data.opening import Request
from finesight.data.sources import load_sources
from finesight.errors import UserError

FAULTY = [
    sample("0.png", "Where is 0?", None, [1, 1, 300, 30]),
    sample("1.png", "What is 1?"),
    sample("cut.png"),
    sample("1.png", "What is 1?"),
    sample("2.png", "<|endoftext|>?"),
    {"messages": sample("3.png")["messages"][::-1]},
    sample("twin.png", "And this?"),
    sample(None, "A question alone?"),
    sample("5.png", "Where is 5?", None, [1, 2, 30, 40]),
]
HELD_OUT = [sample("5.png", "A held-out one?"), sample("6.png", "Another?")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        noise = Image.effect_noise((100 + number, 60), 90).resize((20, 12))
        noise.resize((100 + number, 60)).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "4.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.open(tmp_path / "6.png").resize((212, 120)).save(tmp_path / "twin.png")
    return tmp_path


def tars(table: Path) -> Path:
    return Path(as_tars(table, table.with_suffix(".tars"), each=4))


def tar(table: Path) -> Path:
    return Path(as_tars(table, table.with_suffix(".tars"), each=99)).parent / "000.tar"


def structs(table: Path) -> Path:
    return as_parquet(table, table.with_suffix(".parquet"), group=3)


def texts(table: Path) -> Path:
    return as_parquet(table, table.with_suffix(".parquet"), group=3, texts=True)


def outline(found: Checked) -> list[tuple[str, str]]:
    """Each finding by its fault and its sample."""
    return sorted((finding.code, finding.sample) for finding in found.findings)


@pytest.mark.parametrize("packed", [tars, tar, structs, texts])
def test_what_is_found_is_what_is_found_in_lines(
    folder: Path, packed: Callable[[Path], Path]
) -> None:
    train, held_out = lines(folder / "t.jsonl", FAULTY), lines(folder / "e.jsonl", HELD_OUT)
    plain = checked(train, held_out, format=None)
    assert set(plain.counts) >= {
        *("picture-cut-off", "box-outside", "special-token", "roles-out-of-order", "duplicate"),
        *("same-picture", "same-picture-resaved"),
    }
    found = checked(packed(train), packed(held_out), format=None)
    assert found.counts == plain.counts
    assert found.affected == plain.affected
    assert outline(found) == outline(plain)
    assert found.contents == plain.contents
    assert {source.format for source in found.sources} == {"samples"}


def test_places_are_those_that_training_tells(folder: Path) -> None:
    pattern = tars(lines(folder / "t.jsonl", FAULTY))
    found = {f.sample: f.where for f in checked(pattern).findings}
    assert found["s5"] == f"{pattern}, 001.tar, sample 1"
    one = checked(pattern.parent / "001.tar").findings
    assert {f.where for f in one if f.sample == "s5"} == {f"{pattern.parent / '001.tar'}, sample 1"}
    table = structs(folder / "t.jsonl")
    assert {f.where for f in checked(table).findings if f.sample == "s5"} == {f"{table}, row 5"}


def test_pictures_that_are_not_there(folder: Path) -> None:
    row = rows_of(lines(folder / "t.jsonl", [sample("1.png")]))[0]
    other = tar_of(folder / "a.tar", {"s1.json": json.dumps(row).encode()})
    packed = row | {"messages": json.dumps(row["messages"])}
    table = pyarrow.Table.from_pylist([packed | {"images": [{"path": "other", "bytes": b"x"}]}])
    parquet.write_table(table, folder / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([packed]), folder / "beside.parquet")
    assert checked(other).counts == {"picture-missing": 1}
    assert checked(folder / "a.parquet").counts == {"picture-missing": 1}
    assert checked(folder / "beside.parquet").counts == {}


def test_rows_that_no_sample_can_be_made_of(folder: Path) -> None:
    rows = rows_of(lines(folder / "t.jsonl", [sample("1.png"), sample("2.png", "Why?")]))
    spoilt = [rows[0], rows[1] | {"more": 1}, rows[1] | {"messages": []}]
    files: dict[str, bytes] = {}
    for number, row in enumerate(spoilt):
        files |= {f"{number}.json": json.dumps(row).encode()}
    found = checked(tar_of(folder / "a.tar", files | {"9.json": b"{"}))
    assert found.counts == {"row-unreadable": 3, "picture-missing": 1}
    table = pyarrow.Table.from_pylist(
        [row | {"messages": json.dumps(row["messages"])} for row in (rows[0], spoilt[2])]
        + [{"id": "s3", "messages": "{"}]
    )
    parquet.write_table(table, folder / "a.parquet")
    found = checked(folder / "a.parquet")
    assert found.counts == {"row-unreadable": 2}


def test_other_processes_read_inside_of_files_too(folder: Path) -> None:
    records = [sample(f"{n % 8}.png", f"Question {n}?", f"{n}") for n in range(WORTH_IT)]
    source = structs(lines(folder / "t.jsonl", records))
    (folder / "saved").mkdir()
    found, album = Check(of_files([source], [], Request()), folder / "saved").run()
    assert found.counts == {}
    assert (found.pictures, found.contents) == (WORTH_IT, 8)
    assert album[album.examples[3]].size == (60, 103)


@pytest.mark.parametrize("packed", [tars, structs])
def test_mended_samples_bring_their_pictures(folder: Path, packed: Callable[[Path], Path]) -> None:
    """What lies where in a file may change; and none is left of a sample that is left out."""
    source = packed(lines(folder / "t.jsonl", FAULTY))
    done = mended(source, folder / "out")
    ((path, count),) = done.files
    assert path.name in ("t.jsonl", "t.tars.jsonl")
    pictures = {file.name for file in (folder / "out" / "pictures").iterdir()}
    assert len(pictures) == count - 1, "one sample shows none"
    corpus = load_sources((DataFile(path=path),))
    assert len(corpus) == count == 4
    again = checked(path)
    assert again.counts == {}
    assert again.contents == len(pictures)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"1.jpg": b"x", "1.txt": b"A square."}, Subject),
        ({"1.jpg": b"x", "1.json": b'{"caption": "A square."}'}, Subject),
        ({"1.json": json.dumps({"id": "1", **sample(None)}).encode()}, Packed),
    ],
)
def test_other_webdatasets_are_read_as_imports_read_them(
    tmp_path: Path, files: dict[str, bytes], kind: type
) -> None:
    source = tar_of(tmp_path / "a.tar", files)
    assert [type(s) for s in of_files([source], [], Request())] == [kind]


def test_other_tables_are_read_as_imports_read_them(tmp_path: Path) -> None:
    foreign: list[Record] = [
        {"image": b"x", "text": "A square."},
        {"id": "1", "messages": [{"role": "user", "content": "<image>?"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "Why?"}]},
    ]
    for number, row in enumerate(foreign):
        source = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([row]), source)
        assert [type(s) for s in of_files([source], [], Request())] == [Subject], row
    own = structs(lines(tmp_path / "t.jsonl", [sample(paint(tmp_path / "0.png").name)]))
    assert [type(s) for s in of_files([own], [], Request())] == [Packed]
    mapped = Request(columns={"answer": "id"})
    assert [type(s) for s in of_files([own], [], mapped)] == [Subject]


def test_an_address_in_object_storage_is_one_as_a_path_too() -> None:
    (found,) = of_files([Path("s3://bucket/a/*.tar")], [], Request())
    assert found == Packed("s3://bucket/a/*.tar", Request())
    with pytest.raises(UserError, match="not read where it lies"):
        of_files([Path("https://host/a.tar")], [], Request())


def test_options_that_mean_nothing_to_samples(folder: Path) -> None:
    source = structs(lines(folder / "t.jsonl", [sample("1.png")]))
    with pytest.raises(UserError, match="has no use for it") as caught:
        checked(source, prompt="What?")
    assert caught.value.where == "--prompt"
