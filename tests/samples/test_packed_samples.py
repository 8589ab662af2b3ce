"""Samples in tars and Parquet files: the same ones as in JSONL, by shards, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from container_fixtures import make_png, read_rows, write_parquet, write_tar, write_tar_shards
from pyarrow import parquet

from finesight.errors import UserError
from finesight.files.storage import FileSystem, sha256_file
from finesight.samples import parquet_reader
from finesight.samples.corpus import Corpus, load_corpus
from finesight.samples.image_file import (
    CorruptImageError,
    read_image_size,
    resolve_content,
    sha256_content,
)
from finesight.samples.line_index import UnreadableFileError
from finesight.samples.sample import ImagePart
from finesight.settings.config import TrainFileSettings

NAMES = [f"images.d/{number}.png" for number in range(7)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write seven samples with different images."""
    (tmp_path / "images.d").mkdir()
    rows = []
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(make_png(number, 10 + number, 20))
        requested = [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]
        answer = [{"type": "box", "image": 0, "label": "x", "xyxy": [1, 2, 3.5, 4 + number]}]
        turns = [{"role": "user", "content": requested}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"s{number}", "messages": turns})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path | str, **settings: Any) -> Corpus:
    return load_corpus((TrainFileSettings.model_validate({"path": str(path)} | settings),))


def image_file(corpus: Corpus, index: int) -> Path:
    located_sample = corpus[index]
    (part,) = (part for part in located_sample.sample.iter_parts() if isinstance(part, ImagePart))
    return located_sample.resolve_path(part.image)


def assert_same(corpus: Corpus, table: Path) -> None:
    baseline = load(table)
    assert len(corpus) == len(baseline)
    for index in (3, 0, 6, 1, 2, 5, 4):
        mine, theirs = corpus.read_validated(index).sample, baseline.read_validated(index).sample
        assert mine.map_paths(lambda name: "") == theirs.map_paths(lambda name: "")
        assert sha256_content(image_file(corpus, index)) == sha256_file(image_file(baseline, index))
        assert read_image_size(image_file(corpus, index)) == (20, 10 + index)


def test_tar_shards_by_pattern(table: Path, tmp_path: Path) -> None:
    corpus = load(write_tar_shards(table, tmp_path / "shards", each=3))
    assert_same(corpus, table)
    assert corpus.source_sizes == (7,)
    assert corpus.location(4) == f"{tmp_path / 'shards' / '001.tar'}, sample 2"
    few = load(tmp_path / "shards" / "*.tar", limit=4)
    assert [few[i].sample.id for i in range(len(few))] == ["s0", "s1", "s2", "s3"]
    assert len({corpus.fingerprint, few.fingerprint, load(table).fingerprint}) == 3


def test_many_shards_are_scanned_in_parallel(table, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    pattern = write_tar_shards(table, tmp_path / "shards", each=1)
    alone = load(pattern)
    monkeypatch.setattr("finesight.samples.corpus.MIN_PARALLEL_FILES", 7)
    parallel = load(pattern)
    assert parallel.fingerprint == alone.fingerprint
    assert_same(parallel, table)
    (tmp_path / "shards" / "003.tar").write_bytes(b"none" * 500)
    with pytest.raises(UserError, match=r"003\.tar: cannot be read"):
        load(pattern)


@pytest.mark.parametrize("texts", [False, True], ids=["structs", "texts"])
def test_parquet_with_embedded_images(table: Path, tmp_path: Path, texts: bool) -> None:
    path = write_parquet(table, tmp_path / "a.parquet", group=3, texts=texts)
    corpus = load(path)
    assert_same(corpus, table)
    assert corpus.location(4) == f"{path}, row 5"
    assert len(load(path, limit=4)) == 4


def test_images_without_path_are_identified_by_index(table: Path, tmp_path: Path) -> None:
    row = read_rows(table)[2]
    row["messages"][0]["content"][0]["image"] = "1"
    images = [{"path": None, "bytes": make_png(n, 12, 20)} for n in (0, 2)]
    packed = pyarrow.Table.from_pylist(
        [row | {"messages": json.dumps(row["messages"]), "images": images}]
    )
    parquet.write_table(packed, tmp_path / "a.parquet")
    assert sha256_content(image_file(load(tmp_path / "a.parquet"), 0)) == sha256_file(
        tmp_path / NAMES[2]
    )


def test_changed_sample_changes_the_fingerprint(table: Path, tmp_path: Path) -> None:
    prints = [load(write_tar_shards(table, tmp_path / "one", 3)).fingerprint]
    prints.append(load(write_parquet(table, tmp_path / "one.parquet")).fingerprint)
    table.write_text(table.read_text().replace("What?", "That?"))
    prints.append(load(write_tar_shards(table, tmp_path / "two", 3)).fingerprint)
    prints.append(load(write_parquet(table, tmp_path / "two.parquet")).fingerprint)
    assert len(set(prints)) == 4


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_replaced_file_is_detected(table: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "one" / "000.tar" if kind == "tar" else tmp_path / "a.parquet"
    write_tar_shards(table, tmp_path / "one", 9)
    write_parquet(table, tmp_path / "a.parquet")
    corpus = load(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UnreadableFileError, match="has changed"):
        _ = corpus[0]


def test_tar_without_samples_is_rejected(tmp_path: Path) -> None:
    files = {"1.jpg": make_png(1), "1.txt": b"caption"}
    with pytest.raises(UserError, match=r"no sample next to 1\.jpg[\s\S]*finesight import"):
        load(write_tar(tmp_path / "a.tar", files))
    foreign = {"1.jpg": make_png(1), "1.json": b'{"image": "1.jpg", "conversations": []}'}
    with pytest.raises(UserError, match=r"a\.tar, sample 1: the key image.*another dataset"):
        load(write_tar(tmp_path / "a.tar", foreign)).read_samples()
    with pytest.raises(UserError, match="contains no samples"):
        load(write_tar(tmp_path / "a.tar", {}))
    (tmp_path / "a.tar").write_bytes(b"none" * 500)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("name", ["{beside}", "../{name}", "../../../../../../../{beside}"])
def test_images_outside_the_container_are_not_read(table, tmp_path, kind, name):
    (tmp_path / "in").mkdir()
    row = read_rows(table)[0]
    named = name.format(beside=tmp_path / NAMES[0], name=NAMES[0])
    row["messages"][0]["content"][0]["image"] = named
    if kind == "tar":
        path = write_tar(tmp_path / "in" / "a.tar", {"s0.json": json.dumps(row).encode()})
    else:
        images = [{"path": "other", "bytes": b""}]
        packed = row | {"messages": json.dumps(row["messages"]), "images": images}
        path = tmp_path / "in" / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([packed]), path)
    with pytest.raises(CorruptImageError, match="no such image"):
        read_image_size(image_file(load(path), 0))


def test_truncated_tar_is_detected(table: Path, tmp_path: Path) -> None:
    write_tar_shards(table, tmp_path / "one", 9)
    path = tmp_path / "one" / "000.tar"
    file = image_file(load(path), 6)
    assert isinstance(resolve_content(file), object)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptImageError, match="ends before byte"):
        read_image_size(file)


@pytest.mark.parametrize("texts", [False, True], ids=["structs", "texts"])
def test_large_row_groups_are_split_once(table, tmp_path, monkeypatch, texts):
    path = write_parquet(table, tmp_path / "a.parquet", group=5, texts=texts)
    baseline = load(path)
    written: list[Path] = []
    divide = parquet_reader.rewrite_row_groups
    monkeypatch.setattr(parquet_reader, "cache_folder", lambda name: tmp_path / "divided")
    monkeypatch.setattr(parquet_reader, "MAX_ROW_GROUP_BYTES", 10)
    monkeypatch.setattr(parquet_reader, "MAX_GROUP_ROWS", 2)
    monkeypatch.setattr(
        parquet_reader,
        "rewrite_row_groups",
        lambda *paths: (written.append(paths[1]), divide(*paths)),
    )
    for _ in range(2):
        parquet_reader.ensure_small_groups.cache_clear()
        corpus = load(path)
        assert_same(corpus, table)
    assert parquet_reader.list_row_group_sizes(path) == (2, 2, 1, 2)
    assert len(written) == 1
    assert corpus.fingerprint == baseline.fingerprint
    assert corpus.location(4) == f"{path}, row 5"
    assert image_file(corpus, 4).is_relative_to(path)
    # Another file of this name is not taken for the old one.
    write_parquet(table, path, group=7, texts=texts)
    assert_same(load(path), table)
    assert len(written) == 2


def test_no_disk_space_for_split_row_groups(table, tmp_path, monkeypatch):
    path = write_parquet(table, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_reader, "cache_folder", lambda name: tmp_path / "divided")
    monkeypatch.setattr(parquet_reader, "MAX_ROW_GROUP_BYTES", 10)
    monkeypatch.setattr(FileSystem, "free_bytes", lambda disk, folder: 100)
    with pytest.raises(UserError, match=r"GB are free[\s\S]*row_group_size"):
        load(path)
    assert [file for file in (tmp_path / "divided").iterdir() if file.suffix != ".lock"] == []


@pytest.mark.parametrize("large", [False, True])
def test_corrupt_parquet_raises_user_error(table, tmp_path, monkeypatch, large):
    """Whatever byte is wrong: what is read, if anything, or a UserError."""
    if large:
        monkeypatch.setattr(parquet_reader, "cache_folder", lambda name: tmp_path / "divided")
        monkeypatch.setattr(parquet_reader, "MAX_ROW_GROUP_BYTES", 10)
    full = write_parquet(table, tmp_path / "a.parquet").read_bytes()
    output: list[str] = []
    for at in range(4, len(full), len(full) // 80):
        path = tmp_path / f"{at}.parquet"
        path.write_bytes(full[:at] + bytes([full[at] ^ 0x55]) + full[at + 1 :])
        try:
            corpus = load(path)
            for index in range(len(corpus)):
                read_image_size(image_file(corpus, index))
        except UserError as error:
            output.append(error.what)
    assert any("cannot be read as Parquet" in one for one in output)


def test_invalid_parquet_rows_are_rejected(table: Path, tmp_path: Path) -> None:
    path = write_parquet(table, tmp_path / "a.parquet", texts=True)
    full = parquet.read_table(path)
    broken = full.set_column(1, "messages", pyarrow.array(["{"] * 7))
    parquet.write_table(broken, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 3: broken JSON"):
        _ = load(tmp_path / "b.parquet")[2]
    parquet.write_table(full.append_column("score", pyarrow.array(["x"] * 7)), path)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: unknown key score"):
        _ = load(path)[0]
    (tmp_path / "c.parquet").write_bytes(b"PAR1 none")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load(tmp_path / "c.parquet")


def test_pattern_without_matches(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    for pattern in ("*.tar", "none/*.jsonl"):
        with pytest.raises(UserError, match="no file matches"):
            load(tmp_path / pattern)
    odd = tmp_path / "a[1].jsonl"
    odd.write_text('{"id": "a", "messages": [{"role": "user", "content": "q"}]}\n')
    assert len(load(odd)) == 1


def test_parquet_with_separate_images(table: Path, tmp_path: Path) -> None:
    full = parquet.read_table(write_parquet(table, tmp_path / "a.parquet"))
    parquet.write_table(full.drop(["images"]), tmp_path / "b.parquet", row_group_size=2)
    assert_same(load(tmp_path / "b.parquet"), table)
