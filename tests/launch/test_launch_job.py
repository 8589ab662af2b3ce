"""What a job is made of, and what is refused before anything is written."""

from pathlib import Path

import pytest

from finesight.errors import UserError
from finesight.launch.launch_job import LaunchJob, NodeSpec

MACHINES = NodeSpec(1, 1, 8)


def recipe(folder: Path, output: str = "runs/first") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model: some/model\ndata: {{train: a.jsonl}}\noutput_dir: {output}\n")
    return path


def test_node_counts() -> None:
    for nodes, expected in (("1", (1, 1)), ("4", (4, 4)), ("2:16", (2, 16))):
        machines = NodeSpec.parse(nodes, 8)
        assert (machines.min_nodes, machines.max_nodes) == expected
        assert machines.is_elastic == (expected[0] < expected[1])
    for nodes in ("", "0", "-1", "2:1", "1:", ":2", "1:2:3", "two", "1 ", "9" * 9):
        with pytest.raises(UserError, match="invalid number of nodes") as caught:
            NodeSpec.parse(nodes, 8)
        assert caught.value.where == "--nodes"


def test_job_name_is_derived_from_output(tmp_path: Path) -> None:
    for output, name in (
        ("runs/Qwen2-VL_2B", "qwen2-vl-2b"),
        ("runs/2024", "finesight"),
        ("'x'", "x"),
        ("'été 3'", "t-3"),
        ("a" * 100, "a" * 63),
        ("'7-b-'", "b"),
    ):
        assert LaunchJob.from_recipe(recipe(tmp_path, output), (), None, MACHINES).name == name
    assert LaunchJob.from_recipe(recipe(tmp_path), (), "mine", MACHINES).name == "mine"


def test_invalid_names_and_recipes_are_rejected(tmp_path: Path) -> None:
    for name in ("", "A", "a_b", "-a", "a-", "1a", "a b", "a" * 64, "a\n"):
        with pytest.raises(UserError, match="invalid name") as caught:
            LaunchJob.from_recipe(recipe(tmp_path), (), name, MACHINES)
        assert caught.value.where == "--name"
    with pytest.raises(UserError, match=r"train\.bach"):
        LaunchJob.from_recipe(recipe(tmp_path), ("train.bach=8",), None, MACHINES)


def test_recipe_path_starting_with_dash(tmp_path: Path) -> None:
    job = LaunchJob("x", Path("-r.yaml"), (), Path("run"), tmp_path, MACHINES)
    assert job.python_arguments == "-m finesight train ./-r.yaml --resume"
