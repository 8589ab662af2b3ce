"""Samples in tars and Parquet files: the same ones as in JSONL, by shards, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hubs import picture
from packing import as_parquet, as_tars, rows_of, tar_of
from pyarrow import parquet

from finesight.config import DataFile
from finesight.data import parquet_groups
from finesight.data.headers import DamagedPicture, picture_size
from finesight.data.inside import content, content_digest
from finesight.data.lines import Unreadable
from finesight.data.sample import ImagePart
from finesight.data.sources import Corpus, load_sources
from finesight.digests import digest
from finesight.errors import UserError
from finesight.storage import Disk

NAMES = [f"pictures.d/{number}.png" for number in range(7)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Seven samples, each with a picture of its own."""
    (tmp_path / "pictures.d").mkdir()
    rows = []
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(picture(number, 10 + number, 20))
        asked = [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]
        answer = [{"type": "box", "image": 0, "label": "x", "xyxy": [1, 2, 3.5, 4 + number]}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"s{number}", "messages": turns})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path | str, **settings: Any) -> Corpus:
    return load_sources((DataFile.model_validate({"path": str(path)} | settings),))


def shown(corpus: Corpus, index: int) -> Path:
    located = corpus[index]
    (part,) = (part for part in located.sample.parts() if isinstance(part, ImagePart))
    return located.path(part.image)


def assert_same(corpus: Corpus, table: Path) -> None:
    plain = load(table)
    assert len(corpus) == len(plain)
    for index in (3, 0, 6, 1, 2, 5, 4):
        mine, theirs = corpus.checked(index).sample, plain.checked(index).sample
        assert mine.with_files(lambda name: "") == theirs.with_files(lambda name: "")
        assert content_digest(shown(corpus, index)) == digest(shown(plain, index))
        assert picture_size(shown(corpus, index)) == (20, 10 + index)


def test_shards_of_tars_by_a_pattern(table: Path, tmp_path: Path) -> None:
    corpus = load(as_tars(table, tmp_path / "shards", each=3))
    assert_same(corpus, table)
    assert corpus.sizes == (7,)
    assert corpus.where(4) == f"{tmp_path / 'shards' / '001.tar'}, sample 2"
    few = load(tmp_path / "shards" / "*.tar", limit=4)
    assert [few[i].sample.id for i in range(len(few))] == ["s0", "s1", "s2", "s3"]
    assert len({corpus.fingerprint, few.fingerprint, load(table).fingerprint}) == 3


def test_many_shards_are_gone_through_by_several_processes(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    pattern = as_tars(table, tmp_path / "shards", each=1)
    alone = load(pattern)
    monkeypatch.setattr("finesight.data.sources.MANY", 7)
    together = load(pattern)
    assert together.fingerprint == alone.fingerprint
    assert_same(together, table)
    (tmp_path / "shards" / "003.tar").write_bytes(b"none" * 500)
    with pytest.raises(UserError, match=r"003\.tar: cannot be read"):
        load(pattern)


@pytest.mark.parametrize("texts", [False, True], ids=["structs", "texts"])
def test_parquet_with_pictures_in_it(table: Path, tmp_path: Path, texts: bool) -> None:
    path = as_parquet(table, tmp_path / "a.parquet", group=3, texts=texts)
    corpus = load(path)
    assert_same(corpus, table)
    assert corpus.where(4) == f"{path}, row 5"
    assert len(load(path, limit=4)) == 4


def test_parquet_with_pictures_beside_it(table: Path, tmp_path: Path) -> None:
    whole = parquet.read_table(as_parquet(table, tmp_path / "a.parquet"))
    parquet.write_table(whole.drop(["images"]), tmp_path / "b.parquet", row_group_size=2)
    assert_same(load(tmp_path / "b.parquet"), table)


def test_pictures_without_a_path_are_known_by_their_number(table: Path, tmp_path: Path) -> None:
    row = rows_of(table)[2]
    row["messages"][0]["content"][0]["image"] = "1"
    images = [{"path": None, "bytes": picture(n, 12, 20)} for n in (0, 2)]
    packed = pyarrow.Table.from_pylist(
        [row | {"messages": json.dumps(row["messages"]), "images": images}]
    )
    parquet.write_table(packed, tmp_path / "a.parquet")
    assert content_digest(shown(load(tmp_path / "a.parquet"), 0)) == digest(tmp_path / NAMES[2])


def test_a_change_of_a_sample_is_another_fingerprint(table: Path, tmp_path: Path) -> None:
    prints = [load(as_tars(table, tmp_path / "one", 3)).fingerprint]
    prints.append(load(as_parquet(table, tmp_path / "one.parquet")).fingerprint)
    table.write_text(table.read_text().replace("What?", "That?"))
    prints.append(load(as_tars(table, tmp_path / "two", 3)).fingerprint)
    prints.append(load(as_parquet(table, tmp_path / "two.parquet")).fingerprint)
    assert len(set(prints)) == 4


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_another_file_is_never_taken_for_the_old_one(
    table: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "one" / "000.tar" if kind == "tar" else tmp_path / "a.parquet"
    as_tars(table, tmp_path / "one", 9)
    as_parquet(table, tmp_path / "a.parquet")
    corpus = load(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(Unreadable, match="has changed"):
        _ = corpus[0]


def test_tars_without_samples_are_refused(tmp_path: Path) -> None:
    files = {"1.jpg": picture(1), "1.txt": b"caption"}
    with pytest.raises(UserError, match=r"no sample beside 1\.jpg[\s\S]*data import"):
        load(tar_of(tmp_path / "a.tar", files))
    foreign = {"1.jpg": picture(1), "1.json": b'{"image": "1.jpg", "conversations": []}'}
    with pytest.raises(UserError, match=r"a\.tar, sample 1: the key image.*another program"):
        load(tar_of(tmp_path / "a.tar", foreign)).read()
    with pytest.raises(UserError, match="holds no samples"):
        load(tar_of(tmp_path / "a.tar", {}))
    (tmp_path / "a.tar").write_bytes(b"none" * 500)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("name", ["{beside}", "../{name}", "../../../../../../../{beside}"])
def test_no_picture_that_did_not_come_with_it(
    table: Path, tmp_path: Path, kind: str, name: str
) -> None:
    (tmp_path / "in").mkdir()
    row = rows_of(table)[0]
    named = name.format(beside=tmp_path / NAMES[0], name=NAMES[0])
    row["messages"][0]["content"][0]["image"] = named
    if kind == "tar":
        path = tar_of(tmp_path / "in" / "a.tar", {"s0.json": json.dumps(row).encode()})
    else:
        images = [{"path": "other", "bytes": b""}]
        packed = row | {"messages": json.dumps(row["messages"]), "images": images}
        path = tmp_path / "in" / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([packed]), path)
    with pytest.raises(DamagedPicture, match="no such picture"):
        picture_size(shown(load(path), 0))


def test_a_picture_that_the_tar_does_not_have(table: Path, tmp_path: Path) -> None:
    row = rows_of(table)[0]
    tar = tar_of(tmp_path / "a.tar", {"s0.json": json.dumps(row).encode()})
    with pytest.raises(DamagedPicture, match=r"a\.tar/pictures\.d/0\.png: no such picture"):
        picture_size(shown(load(tar), 0))


def test_a_tar_that_was_cut_off_after_its_samples_were_found(table: Path, tmp_path: Path) -> None:
    as_tars(table, tmp_path / "one", 9)
    path = tmp_path / "one" / "000.tar"
    file = shown(load(path), 6)
    assert isinstance(content(file), object)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DamagedPicture, match="ends before byte"):
        picture_size(file)


@pytest.mark.parametrize("texts", [False, True], ids=["structs", "texts"])
def test_groups_too_large_to_be_read_again_and_again_are_divided_once(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: bool
) -> None:
    path = as_parquet(table, tmp_path / "a.parquet", group=5, texts=texts)
    plain = load(path)
    written: list[Path] = []
    divide = parquet_groups._divide
    monkeypatch.setattr(parquet_groups, "divided_folder", lambda: tmp_path / "divided")
    monkeypatch.setattr(parquet_groups, "LARGEST", 10)
    monkeypatch.setattr(parquet_groups, "MOST_ROWS", 2)
    monkeypatch.setattr(
        parquet_groups, "_divide", lambda *paths: (written.append(paths[1]), divide(*paths))
    )
    for _ in range(2):
        parquet_groups._divided.cache_clear()
        corpus = load(path)
        assert_same(corpus, table)
    assert parquet_groups.group_sizes(path) == (2, 2, 1, 2)
    assert len(written) == 1
    assert corpus.fingerprint == plain.fingerprint
    assert corpus.where(4) == f"{path}, row 5"
    assert shown(corpus, 4).is_relative_to(path)
    # Another file of this name is not taken for the old one.
    as_parquet(table, path, group=7, texts=texts)
    assert_same(load(path), table)
    assert len(written) == 2


def test_no_room_for_smaller_groups(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_parquet(table, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_groups, "divided_folder", lambda: tmp_path / "divided")
    monkeypatch.setattr(parquet_groups, "LARGEST", 10)
    monkeypatch.setattr(Disk, "free", lambda disk, folder: 100)
    with pytest.raises(UserError, match=r"GB are free[\s\S]*row_group_size"):
        load(path)
    assert [file for file in (tmp_path / "divided").iterdir() if file.suffix != ".lock"] == []


@pytest.mark.parametrize("large", [False, True])
def test_damage_within_a_parquet_file(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Whatever byte is wrong: what is read, if anything, or a UserError."""
    if large:
        monkeypatch.setattr(parquet_groups, "divided_folder", lambda: tmp_path / "divided")
        monkeypatch.setattr(parquet_groups, "LARGEST", 10)
    whole = as_parquet(table, tmp_path / "a.parquet").read_bytes()
    said: list[str] = []
    for at in range(4, len(whole), len(whole) // 150):
        path = tmp_path / f"{at}.parquet"
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            corpus = load(path)
            for index in range(len(corpus)):
                picture_size(shown(corpus, index))
        except UserError as error:
            said.append(error.what)
    assert any("cannot be read as Parquet" in one for one in said)


def test_broken_parquet_files_are_refused(table: Path, tmp_path: Path) -> None:
    path = as_parquet(table, tmp_path / "a.parquet", texts=True)
    whole = parquet.read_table(path)
    broken = whole.set_column(1, "messages", pyarrow.array(["{"] * 7))
    parquet.write_table(broken, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 3: broken JSON"):
        _ = load(tmp_path / "b.parquet")[2]
    parquet.write_table(whole.append_column("label", pyarrow.array(["x"] * 7)), path)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: unknown key label"):
        _ = load(path)[0]
    (tmp_path / "c.parquet").write_bytes(b"PAR1 none")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load(tmp_path / "c.parquet")


def test_a_pattern_that_fits_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    for pattern in ("*.tar", "none/*.jsonl"):
        with pytest.raises(UserError, match="no file fits"):
            load(tmp_path / pattern)
    odd = tmp_path / "a[1].jsonl"
    odd.write_text('{"id": "a", "messages": [{"role": "user", "content": "q"}]}\n')
    assert len(load(odd)) == 1
