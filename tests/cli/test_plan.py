"""Tests of the command `finesight plan`: output and exit code."""

import json
import shlex
from pathlib import Path

import pytest
from each_value import each
from tiny_task import make_task, write_recipe


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(Path("recipe.yaml"), make_task(Path("task")) | {"output_dir": "run"})


def test_plan_is_printed(cli):
    before = Path("recipe.yaml").read_bytes()
    printed = cli("plan", "recipe.yaml", "--gpu", "T4")
    assert "target  T4 (data sheet): 16 GB" in printed.out
    assert "data    11 samples" in printed.out
    assert "samples/s" in printed.out
    assert printed.next_steps.startswith("finesight train recipe.yaml")
    assert Path("recipe.yaml").read_bytes() == before
    assert not Path("run").exists()


def test_json_output_with_overrides(cli):
    record = cli("plan", "recipe.yaml", "train.batch_size=2", "--gpu", "h100", "--json").json
    assert (record["batch_size"], record["target"]["name"]) == (2, "H100")
    assert record["recipe"]["fits"]
    assert record["chosen"]["allocated_gb"] > 0


def test_exit_code_2_if_no_settings_fit(cli):
    file = Path("task/tiny/config.json")
    config = json.loads(file.read_text())
    config.get("text_config", config)["vocab_size"] = 2_000_000_000
    file.write_text(json.dumps(config))
    printed = cli("plan", "recipe.yaml", "--gpu", "T4", code=2)
    assert "does not fit: needs " in printed.out
    assert "T4 has 16 GB; up to 64 such GPUs are not sufficient either; try smaller" in printed.out
    assert not printed.next_steps


def test_several_gpus_are_planned_and_launched(cli):
    """The next step writes the job file of as many GPUs."""
    printed = cli("plan", "recipe.yaml", "--gpu", "T4", "--gpus", "2")
    assert "target  2 x T4 (data sheet): 16 GB each" in printed.out
    command, _, purpose = printed.next_steps.partition("  # ")
    assert command.startswith("finesight launch recipe.yaml ")
    assert command.endswith("--gpus-per-node 2")
    assert purpose.startswith("or: torchrun --nproc-per-node 2 -m finesight train recipe.yaml")
    cli(*shlex.split(command)[1:], "--out", "job.sh")
    assert "--nproc-per-node=2" in Path("job.sh").read_text()
    assert cli("plan", "recipe.yaml", "--gpu", "T4", "--gpus", "1").next_steps.startswith(
        "finesight train recipe.yaml"
    )


@each(
    ("gpus", "sizes"),
    [(8, ""), (16, "--nodes 2"), (12, "--gpus-per-node 6 --nodes 2"), (1000, "--nodes 125")],
)
def test_many_gpus_are_launched_on_several_nodes(cli, gpus, sizes):
    found = cli("plan", "recipe.yaml", "--gpu", "H100", "--gpus", f"{gpus}").next_steps
    command, _, purpose = found.partition("  # ")
    assert command.startswith("finesight launch recipe.yaml")
    assert command.endswith(sizes)
    assert ("torchrun" in purpose) == (gpus <= 8)


@each("gpus", ["0", "-1", "10001", "two", "1.5", ""])
def test_invalid_numbers_of_gpus_are_refused(cli, gpus):
    assert "--gpus" in cli("plan", "recipe.yaml", "--gpu", "T4", f"--gpus={gpus}", code=2).err


def test_gpus_without_a_gpu_are_refused(cli):
    error = cli("plan", "recipe.yaml", "--gpus", "2", code=2).err
    assert "--gpus: 2 GPUs, but" in error
    assert '--gpu "RTX 4090"' in error
    assert not Path("run").exists()


def test_advice_of_more_gpus_is_the_next_step(cli):
    """A wide model with all parameters trained: too large for one GPU, not for several."""
    file = Path("task/tiny/config.json")
    config = json.loads(file.read_text()) | {"num_hidden_layers": 4, "intermediate_size": 3_000_000}
    file.write_text(json.dumps(config))
    parts = [f"tune.{part}=full" for part in ("vision", "merger", "language", "embeddings")]
    words = ("recipe.yaml", *parts, "--gpu", "A10")
    printed = cli("plan", *words, code=2)
    plan, launch = printed.next_steps.split("\n  ")
    assert plan.startswith("finesight plan recipe.yaml tune.vision=full")
    number = plan.rpartition("--gpus ")[2]
    assert f"use {number} such GPUs with train.parallel=" in printed.out
    assert "train.parallel=" in launch
    assert "finesight launch" in launch
    record = cli("plan", *words, "--json", code=2).json
    assert record["advice"]["num_gpus"] == int(number)
    assert cli(*shlex.split(plan)[1:], "--json").json["chosen"]["fits"]
