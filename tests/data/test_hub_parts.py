"""Which files of a data repository are meant."""

from __future__ import annotations

import time

import pytest

from finesight.data.hub_parts import choose, data_files
from finesight.errors import UserError

SHARDS = [f"data/{s}-0000{n}-of-00002.parquet" for s in ("train", "test") for n in (0, 1)]
LATEX = """---
license: apache-2.0
configs:
- config_name: full
  data_files:
  - split: train
    path: full/train-*
  - split: test
    path: full/test-*
- config_name: default
  data_files:
  - split: train
    path: data/train-*
- config_name: small
  data_files: small/*.parquet
---
# A data set
"""
FILES = [
    *("README.md", "data/train-0.parquet", "full/train-0.parquet", "full/train-1.parquet"),
    *("full/test-0.parquet", "small/all.parquet", "dataset_infos.json"),
]


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (None, ["data/train-0.parquet"]),
        ("train", ["data/train-0.parquet"]),
        ("full/train", ["full/train-0.parquet", "full/train-1.parquet"]),
        ("full", ["full/train-0.parquet", "full/train-1.parquet"]),
        ("full/test", ["full/test-0.parquet"]),
        ("small", ["small/all.parquet"]),
        ("full/test-0.parquet", ["full/test-0.parquet"]),
    ],
)
def test_subsets_of_a_card(part: str | None, rows: list[str]) -> None:
    assert list(choose(FILES, part, LATEX, "hf:a/b").rows) == rows


@pytest.mark.parametrize(
    ("data_files", "rows"),
    [
        ("data_files: {train: full/train-*, test: full/test-*}", FILES[2:4]),
        ("data_files: [full/train-1.parquet]", ["full/train-1.parquet"]),
        ("data_files: [{split: train, path: [small/*, ./data/*]}]", [FILES[1], FILES[5]]),
        ("data_dir: full", FILES[2:4]),
        ("data_dir: ./small", [FILES[5]]),
    ],
)
def test_ways_in_which_a_card_says_it(data_files: str, rows: list[str]) -> None:
    card = f"---\nconfigs:\n- config_name: mine\n  {data_files}\n---\n"
    assert list(choose(FILES, "mine", card, "hf:a/b").rows) == rows
    assert list(choose(FILES, None, card, "hf:a/b").rows) == rows


def test_a_card_of_empty_lines_takes_no_time() -> None:
    started = time.perf_counter()
    assert choose(FILES, None, "---" + "\n" * 20_000, "hf:a/b").rows
    assert time.perf_counter() - started < 1


def test_a_subset_without_a_card_is_a_folder() -> None:
    assert choose(FILES, "full/train", "", "hf:a/b").rows == tuple(FILES[2:4])
    with pytest.raises(UserError, match="no split 'half/train'"):
        choose(FILES, "half/train", "", "hf:a/b")


@pytest.mark.parametrize("card", ["", "# No head", "---\nconfigs: 3\n---\n", "---\n{ [\n---\n"])
@pytest.mark.parametrize(
    ("part", "rows"), [(None, SHARDS[:2]), ("train", SHARDS[:2]), ("test", SHARDS[2:])]
)
def test_splits_by_name(card: str, part: str | None, rows: list[str]) -> None:
    found = choose(["README.md", *reversed(SHARDS)], part, card, "hf:a/b")
    assert list(found.rows) == rows
    assert found.others == (("train",) if part == "test" else ("test",))
    assert found.needed == ()


def test_other_words_for_splits() -> None:
    files = ["training.jsonl", "val/rows.jsonl", "evaluation-0.csv", "images/1.png", "code.py"]
    for part, row in (("train", 0), ("validation", 1), ("dev", 1), ("test", 2)):
        found = choose(files, part, "", "hf:a/b")
        assert found.rows == (files[row],)
        assert found.needed == ("images/1.png",)


def test_no_splits_at_all() -> None:
    files = ["rows.json", "pictures.zip", "state.json", "configuration.json"]
    found = choose(files, None, "", "hf:a/b")
    assert (found.rows, found.needed) == (("rows.json",), ("pictures.zip",))
    assert choose(["a.parquet", "b.parquet"], None, "", "x").rows == ("a.parquet", "b.parquet")
    assert choose(["a/1.jpg", "a/1.txt"], None, "", "x").rows == ()
    assert choose(["shard-0.tar", "shard-1.tar"], None, "", "x").rows == (
        "shard-0.tar",
        "shard-1.tar",
    )


@pytest.mark.parametrize(
    ("files", "part", "words"),
    [
        (SHARDS, "validation", "no split 'validation'"),
        (["data/test-0.parquet", "data/val-0.parquet"], None, "several splits"),
        (["a/1.jpg", "a/1.txt"], "train", "no split 'train'"),
        (["data.py", "README.md"], None, "no file of data among 2: data.py, README.md"),
        (["model.safetensors"], None, "no file of data"),
    ],
)
def test_what_is_not_plain(files: list[str], part: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        choose(files, part, "", "hf:a/b")
    assert raised.value.expected
    assert raised.value.remedy


def test_scripts_are_told_and_never_fetched() -> None:
    with pytest.raises(UserError) as raised:
        choose(["coco.py", "README.md"], None, "", "hf:a/b")
    assert "coco.py makes the data when it runs, and code of others is never run" in (
        raised.value.remedy
    )
    bad = ["a.py", "a.pkl", "a.bin", "a.pt", "a.arrow", "a.so", ".gitattributes"]
    assert data_files([*bad, "a.parquet", "LICENSE"]) == ["a.parquet", "LICENSE"]
