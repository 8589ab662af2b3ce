"""Tests of the command `finesight plan`: output and exit code."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_task import TinyTask, make_task, read_losses, write_recipe

from finesight.plan import run_plan


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


def test_settings_of_the_plan_replace_those_of_the_command(cli):
    words = ("plan", "recipe.yaml", "train.parallel=fsdp", "train.epochs=1", "--gpu", "H100")
    (command,) = cli(*words, "--gpus", "2").next_steps.splitlines()
    settings = shlex.split(command.partition("  # ")[0])
    assert "train.epochs=1" in settings
    assert "train.parallel=ddp" in settings
    assert "train.parallel=fsdp" not in settings


@pytest.mark.parametrize(
    ("gpus", "sizes"),
    [(8, ""), (16, "--nodes 2"), (12, "--gpus-per-node 6 --nodes 2"), (1000, "--nodes 125")],
)
def test_many_gpus_are_launched_on_several_nodes(cli, gpus, sizes):
    found = cli("plan", "recipe.yaml", "--gpu", "H100", "--gpus", f"{gpus}").next_steps
    command, _, purpose = found.partition("  # ")
    assert command.startswith("finesight launch recipe.yaml")
    assert command.endswith(sizes)
    assert ("torchrun" in purpose) == (gpus <= 8)


def test_unfinished_run_is_continued_with_the_settings_of_its_plan(cli):
    run = TinyTask(Path("other")).rewind_to_checkpoint()
    recipe = run / "recipe.yaml"
    words = ("plan", recipe, "train.precision=fp32", "--gpu", "T4")
    start, resume = cli(*words, "--gpus", 2).next_steps.split("\n  ")
    assert start.startswith("finesight launch")
    assert f"output_dir={run}-2" in start
    assert resume.startswith("finesight launch")
    assert "output_dir" not in resume
    cli(*shlex.split(resume.partition("  # ")[0])[1:], "--out", "job.sh")
    assert "--resume" in Path("job.sh").read_text()
    # The precision of a T4 is fp16, but the run has fp32.
    assert "--resume" not in cli("plan", recipe, "--gpu", "T4").next_steps
    printed = cli(*words)
    assert "contains another run: the training starts in a new one" in printed.out
    start, resume = printed.next_steps.split("\n  ")
    assert start.endswith(f"output_dir={run}-2")
    command, _, purpose = resume.partition("  # ")
    assert "train.pack_tokens=" in command
    assert purpose == "to continue the unfinished run instead"
    cli(*shlex.split(command)[1:])
    assert not Path(f"{run}-2").exists()
    steps = [step for step, _ in read_losses(run)]
    assert steps == [step for step, _ in read_losses(run.parent / "whole")]
    # A finished run has no further steps.
    assert "\n" not in cli(*words).next_steps


@pytest.fixture
def unfinished_run() -> Path:
    """Write the start of a run with the settings of the recipe."""
    run = Path("run")
    run.mkdir()
    (run / "manifest.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 0, "precision": "fp16"}\n')
    shutil.copy("recipe.yaml", run)
    return run


@pytest.mark.parametrize(
    "setting", ["train.batch_size=3", "train.precision=fp32", "tune.quantize.nf4=[vision]"]
)
def test_unfinished_run_is_not_continued_with_other_results(cli, unfinished_run, setting):
    words = ("run/recipe.yaml", "--gpu", "T4")
    assert "--resume" in cli("plan", *words).next_steps
    printed = cli("plan", *words, setting)
    assert "output_dir=run-2" in printed.next_steps
    assert "--resume" not in printed.next_steps


@pytest.mark.parametrize(
    ("change", "is_continued"),
    [
        ("train.parallel=fsdp", True),
        ("train.activation_checkpointing=0.5", True),
        ("train.precision=bf16", False),
        ("tune.quantize.nf4=[vision]", False),
    ],
)
def test_unfinished_run_is_continued_with_some_changes_of_the_plan(
    cli, unfinished_run, monkeypatch, change, is_continued
):
    monkeypatch.setattr(run_plan, "list_overrides", lambda *args: (change,))
    printed = cli("plan", "run/recipe.yaml", "--gpu", "T4")
    assert change in printed.next_steps
    assert ("--resume" in printed.next_steps) == is_continued


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("recipe.yaml", "unknown: 1\n"),
        ("metrics.jsonl", "unknown: 1\n"),
        ("metrics.jsonl", '{"step": "x"}\n'),
    ],
)
def test_run_with_a_damaged_file_is_not_continued(cli, unfinished_run, name, damaged):
    words = ("plan", "recipe.yaml", "--gpu", "T4")
    content = (unfinished_run / name).read_text()
    assert "--resume" in cli(*words).next_steps
    (unfinished_run / name).write_text(damaged)
    assert "--resume" not in cli(*words).next_steps
    (unfinished_run / name).write_text(content)


@pytest.mark.parametrize("gpus", ["0", "-1", "10001", "two", "1.5", ""])
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
