"""Which files of a data repository are meant."""

import pytest
from case_files import load_cases

from finesight.errors import UserError
from finesight.ingest.source_fetch import is_data_file, select_files

CASES = load_cases("hub_files")

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
# A dataset
"""
FILES = [
    *("README.md", "data/train-0.parquet", "full/train-0.parquet", "full/train-1.parquet"),
    *("full/test-0.parquet", "small/all.parquet", "dataset_infos.json"),
]


@pytest.mark.parametrize(("part", "rows"), CASES["test_subsets_of_dataset_card"])
def test_subsets_of_dataset_card(part: str | None, rows: list[str]) -> None:
    assert list(select_files(FILES, part, LATEX, "hf:a/b").row_files) == rows


@pytest.mark.parametrize(("data_files", "rows"), CASES["test_data_files_notations"])
def test_data_files_notations(data_files: str, rows: list[str]) -> None:
    card = f"---\nconfigs:\n- config_name: mine\n  {data_files}\n---\n"
    assert list(select_files(FILES, "mine", card, "hf:a/b").row_files) == rows
    assert list(select_files(FILES, None, card, "hf:a/b").row_files) == rows


def test_folder_is_a_subset_without_card():
    assert select_files(FILES, None, "---" + "\n" * 20_000, "hf:a/b").row_files
    assert select_files(FILES, "full/train", "", "hf:a/b").row_files == tuple(FILES[2:4])
    with pytest.raises(UserError, match="no split 'half/train'"):
        select_files(FILES, "half/train", "", "hf:a/b")


@pytest.mark.parametrize("card", ["", "# No head", "---\nconfigs: 3\n---\n", "---\n{ [\n---\n"])
@pytest.mark.parametrize(
    ("part", "rows"), [(None, SHARDS[:2]), ("train", SHARDS[:2]), ("test", SHARDS[2:])]
)
def test_splits_by_name(card: str, part: str | None, rows: list[str]) -> None:
    found = select_files(["README.md", *reversed(SHARDS)], part, card, "hf:a/b")
    assert list(found.row_files) == rows
    assert found.other_splits == (("train",) if part == "test" else ("test",))
    assert found.support_files == ()


def test_split_name_synonyms() -> None:
    files = ["training.jsonl", "val/rows.jsonl", "evaluation-0.csv", "images/1.png", "code.py"]
    for part, row in (("train", 0), ("validation", 1), ("dev", 1), ("test", 2)):
        found = select_files(files, part, "", "hf:a/b")
        assert found.row_files == (files[row],)
        assert found.support_files == ("images/1.png",)


def test_repository_without_splits():
    files = ["rows.json", "images.zip", "state.json", "configuration.json"]
    found = select_files(files, None, "", "hf:a/b")
    assert (found.row_files, found.support_files) == (("rows.json",), ("images.zip",))
    for shards in (("a.parquet", "b.parquet"), ("shard-0.tar", "shard-1.tar")):
        assert select_files(shards, None, "", "x").row_files == shards
    assert select_files(["a/1.jpg", "a/1.txt"], None, "", "x").row_files == ()


@pytest.mark.parametrize(("files", "part", "words"), CASES["test_ambiguous_selection_is_rejected"])
def test_ambiguous_selection_is_rejected(files: list[str], part: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        select_files(files, part, "", "hf:a/b")
    assert raised.value.expected
    assert raised.value.remedy


def test_scripts_are_reported_and_never_fetched() -> None:
    with pytest.raises(UserError) as raised:
        select_files(["coco.py", "README.md"], None, "", "hf:a/b")
    assert "coco.py generates the data, and remote code is never executed" in (raised.value.remedy)
    bad = ["a.py", "a.pkl", "a.bin", "a.pt", "a.arrow", "a.so", ".gitattributes"]
    assert [*filter(is_data_file, [*bad, "a.parquet", "LICENSE"])] == ["a.parquet", "LICENSE"]
