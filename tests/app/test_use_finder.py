"""Tests of the search for what uses a folder of a workspace."""

import os
from pathlib import Path

import pytest

from finesight.app import use_finder
from finesight.app.use_finder import UseFinder
from finesight.errors import UserError


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for name in ("data/a", "data/b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/a/data.jsonl").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "is_used"),
    [
        ("data: {train: data/a/data.jsonl}", True),
        ("data: {train: [{path: data/*/data.jsonl}]}", True),
        ("data: {train: data/b}", False),
        ("model: data/a", True),
        # Invalid recipes are searched as text.
        ("data: {train: data/a/data.jsonl, eval: &a [*a]}", True),
        ("data: &a {train: *a}\nmodel: data/a", True),
        ("data: &a [*a]", False),
        ("data: &a {? *a : x}", False),
        ("model: &a {<<: *a}", False),
        ("data: {train: [", False),
        (f"data: {list(range(6000))}", False),
        (f"data: {['data/a', *range(6000)]}", True),
        ("data: {train: 'd*/../*/../*/../*/../*/../*/../nothing'}", False),
    ],
)
def test_use_by_a_recipe(workspace, text, is_used):
    (workspace / "r.yaml").write_text(f"{text}\n")
    assert UseFinder(workspace, Path("data/a")).is_used_by_recipe(Path("r.yaml")) == is_used


def test_recipes_beyond_the_bound_are_searched_as_text(workspace, monkeypatch):
    monkeypatch.setattr(use_finder, "MAX_SEARCHED_VALUES", 30)
    finder = UseFinder(workspace, Path("data/a"))
    for number in range(20):
        (workspace / f"{number}.yaml").write_text("model: m\ndata: {train: data/*/data.jsonl}\n")
    used = [finder.is_used_by_recipe(Path(f"{number}.yaml")) for number in range(20)]
    assert used[0]
    assert not used[-1]
    (workspace / "named.yaml").write_text("model: m\ndata: {train: data/a/data.jsonl}\n")
    assert finder.is_used_by_recipe(Path("named.yaml"))


@pytest.mark.parametrize("end", ["", "\n", " " * 100])
def test_use_by_data_is_found_across_chunks(workspace, monkeypatch, end):
    """Lines may have any length."""
    monkeypatch.setattr(use_finder, "CHUNK_BYTES", 16)
    file = workspace / "data/b/data.jsonl"
    for size in range(40):
        file.write_text(f'{"x" * size}"../a/1.png"{end}')
        assert UseFinder(workspace, Path("data/a")).is_used_by_data(file.parent, [file]), size
    file.write_text(f'"../ab/1.png" "{workspace}/data/b/../a"{end}')
    assert not UseFinder(workspace, Path("data/a")).is_used_by_data(file.parent, [file])


def test_files_that_are_too_large_to_search_are_reported(workspace):
    file = workspace / "data/b/train.jsonl"
    file.touch()
    os.truncate(file, 300 << 30)
    with pytest.raises(UserError, match=r"data/b/train\.jsonl is too large to search for uses"):
        UseFinder(workspace, Path("data/a")).is_used_by_data(file.parent, [file])
