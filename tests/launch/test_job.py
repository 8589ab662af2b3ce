"""What a job is made of, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from finesight.errors import UserError
from finesight.launch.job import Job, Machines

MACHINES = Machines(1, 1, 8)


def recipe(folder: Path, output: str = "runs/first") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model: some/model\ndata: {{train: a.jsonl}}\noutput: {output}\n")
    return path


@pytest.mark.parametrize(("nodes", "range_"), [("1", (1, 1)), ("4", (4, 4)), ("2:16", (2, 16))])
def test_machines(nodes: str, range_: tuple[int, int]) -> None:
    machines = Machines.of(nodes, 8)
    assert (machines.least, machines.most) == range_
    assert machines.elastic == (range_[0] < range_[1])


@pytest.mark.parametrize("nodes", ["", "0", "-1", "2:1", "1:", ":2", "1:2:3", "two", "1 ", "9" * 9])
def test_numbers_that_no_machines_have(nodes: str) -> None:
    with pytest.raises(UserError, match="machines") as caught:
        Machines.of(nodes, 8)
    assert caught.value.where == "--nodes"


def test_the_name_comes_from_the_output(tmp_path: Path) -> None:
    for output, name in (
        ("runs/Qwen2-VL_2B", "qwen2-vl-2b"),
        ("runs/2024", "finesight"),
        ("'x'", "x"),
        ("'été 3'", "t-3"),
        ("a" * 100, "a" * 63),
        ("'7-b-'", "b"),
    ):
        assert Job.of(recipe(tmp_path, output), (), None, MACHINES).name == name
    assert Job.of(recipe(tmp_path), (), "mine", MACHINES).name == "mine"


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "1a", "a b", "a" * 64, "a\n"])
def test_names_that_an_engine_refuses(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="the name") as caught:
        Job.of(recipe(tmp_path), (), name, MACHINES)
    assert caught.value.where == "--name"


def test_mistakes_in_the_recipe_come_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.bach"):
        Job.of(recipe(tmp_path), ("train.bach=8",), None, MACHINES)


def test_a_recipe_that_looks_like_an_option(tmp_path: Path) -> None:
    job = Job("x", Path("-r.yaml"), (), Path("run"), tmp_path, MACHINES)
    assert job.arguments == "-m finesight train ./-r.yaml --resume"
