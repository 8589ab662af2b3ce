"""Tests of the bounded search for the files that match a pattern."""

import os
from collections.abc import Iterable
from glob import iglob
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from hypothesis import given
from hypothesis import strategies as st

from finesight.errors import UserError
from finesight.files import path_patterns
from finesight.files.path_patterns import SearchBudget, has_match, iter_matches
from finesight.settings.recipe import load_recipe

FILES = ("a/b/x.tar", "a/.h/z.tar", "c/x.tar", "c/[k].tar", "x.tar", "c/d/e/f.jsonl")

PARTS = st.sampled_from(
    ["*", "**", "?", ".*", "[ac]", "a", "c", "*.tar", "[[]k].tar", "x.tar", "."]
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "c/latest").symlink_to("d")
    (folder / "above").symlink_to("a")
    return folder


def resolve(paths: Iterable[str]) -> set[str]:
    """Return the real paths, because folders are found once although links lead to them."""
    return {*map(os.path.realpath, paths)}


def test_patterns_match_as_those_of_glob(tree, monkeypatch):
    monkeypatch.chdir(tree)
    for pattern in load_cases("bounded_files")["test_patterns_match_as_those_of_glob"]:
        found, expected = iter_matches(pattern), iglob(pattern, recursive=True)
        assert resolve(found) == resolve(expected), pattern


@given(parts=st.lists(PARTS, min_size=1, max_size=5))
def test_any_pattern_finds_the_files_of_glob(tree, parts):
    pattern = f"{tree}/{'/'.join(parts)}"
    found, expected = iter_matches(pattern), iglob(pattern, recursive=True)
    files, expected_files = (filter(os.path.isfile, paths) for paths in (found, expected))
    assert resolve(files) == resolve(expected_files)


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*/train.jsonl", ["latest/train.jsonl"]),
        ("**/train.jsonl", ["latest/train.jsonl"]),
        ("v*/train.jsonl", ["v1/train.jsonl"]),
        ("v1/**", ["v1/train.jsonl"]),
        ("v1/*/", ["v1/train.jsonl"]),
        ("*", ["v1", "latest"]),
    ],
)
def test_linked_folder_is_found_once_in_any_order_of_the_disk(
    tmp_path, monkeypatch, pattern, found, is_reversed
):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1/train.jsonl").touch()
    (tmp_path / "latest").symlink_to("v1")

    def list_names(*args: Any, **options: Any) -> list[str]:
        return sorted(iglob(*args, **options), reverse=is_reversed)

    monkeypatch.setattr(path_patterns, "iglob", list_names)
    monkeypatch.chdir(tmp_path)
    assert [*iter_matches(pattern)] == found


def make_folders(folder: Path, count: int = 60) -> None:
    for number in range(count):
        (folder / f"d/{number}").mkdir(parents=True)


@pytest.mark.parametrize(
    "pattern", ["d/*/../*/../*/../*", "d/*/../*/../*/../*/../*/../*", "d/*/./../*/./../../d/*"]
)
def test_folder_is_read_once_however_many_paths_lead_to_it(tmp_path, monkeypatch, pattern):
    """60 folders have 13 million paths of the first pattern."""
    make_folders(tmp_path)
    monkeypatch.setattr(path_patterns, "MAX_SEARCHED_FILES", 1000)
    assert len([*iter_matches(str(tmp_path / pattern))]) == 60
    assert has_match(str(tmp_path / pattern), SearchBudget())
    assert not has_match(f"{tmp_path / pattern}/none", SearchBudget())


def test_search_ends_after_too_many_files(tree, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setattr(path_patterns, "MAX_SEARCHED_FILES", 5)
    with pytest.raises(UserError, match="too many files to search"):
        next(iter_matches("**/none"))
    # Several patterns have one budget.
    budget = SearchBudget()
    assert [*iter_matches("*.tar", budget)]
    assert [*iter_matches("c/*.tar", budget)]
    with pytest.raises(UserError, match="too many files to search"):
        [*iter_matches("*", budget)]


def test_search_of_a_recipe_for_its_files_is_bounded(tmp_path, monkeypatch):
    """A recipe is searched for paths beside it before anything else of it is checked."""
    make_folders(tmp_path / "recipes")
    (tmp_path / "recipes/d/0/a.jsonl").touch()
    recipe = tmp_path / "recipes/r.yaml"
    recipe.write_text("model: m\ndata: {train: [d/*/../*/../*/../*, d/*/a.jsonl]}\noutput_dir: o\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(path_patterns, "MAX_SEARCHED_FILES", 1000)
    beside = [f"{recipe.parent}/{name}" for name in ("d/*/../*/../*/../*", "d/*/a.jsonl")]
    assert [str(file.path) for file in load_recipe(recipe).data.train] == beside
    # Beyond the bound, the paths stay as they are.
    monkeypatch.setattr(path_patterns, "MAX_SEARCHED_FILES", 10)
    assert str(load_recipe(recipe).data.train[1].path) == "d/*/a.jsonl"


@pytest.mark.parametrize("name", ["", "missing", "a" * 5000, "*" * 300, "[", "a\x7f*", "~*"])
def test_unusual_patterns_match_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert not has_match(name, SearchBudget())
