"""Tests of the command `finesight launch`: job files, output, submission."""

import os
from pathlib import Path

import fake_slurm
import pytest
from case_files import load_cases

from finesight import api

CASES = load_cases("launch")

LAUNCH = ("launch", "recipe.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a recipe and without scheduler commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    text = "model: some/model\ndata: {train: a.jsonl}\noutput_dir: runs/first\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize(("options", "file", "command"), CASES["test_job_file_and_start_command"])
def test_job_file_and_start_command(options, file, command, cli):
    assert cli(*LAUNCH, *options.split()).out == f"{file}\nstart with: {command}\n"
    assert "finesight train recipe.yaml --resume" in Path(file).read_text()
    result = cli(*LAUNCH, *options.split(), "--json").json
    assert result == {"file": file, "command": command, "submitted": False, "output": None}


@pytest.mark.parametrize(
    ("options", "gpus"),
    [("", 8), ("--gpus-per-node 2", 2), ("--nodes 3 --on slurm", 24), ("--nodes 2:4", 16)],
)
def test_plan_of_the_gpus_is_proposed(cli, options, gpus):
    """Of the minimum of an elastic job."""
    found = cli(*LAUNCH, "train.parallel=fsdp", *options.split(), "--out", f"{gpus}.job")
    command, _, purpose = found.next_steps.partition("  # ")
    assert command == f"finesight plan recipe.yaml train.parallel=fsdp --gpus {gpus}"
    assert "--gpu NAME" in purpose


def test_options_of_train_are_passed(cli):
    api.launch("recipe.yaml", {"train.epochs": 2, "data.train": ["b.jsonl"]}, name="two")
    words = """train recipe.yaml train.epochs=2 'data.train=["b.jsonl"]' --resume"""
    assert words in Path("two.sh").read_text()
    cli(*LAUNCH, "--push", "hf:me/a@main", code=2)
    cli(*LAUNCH, "--push", "hf:me/a", "--force")
    assert "recipe.yaml --resume --push hf:me/a --force" in Path("first.sh").read_text()


def test_slurm_job_is_submitted(folder, monkeypatch, cli):
    commands = fake_slurm.install(folder / "slurm")
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(commands))
    output = cli(*LAUNCH, "--on", "slurm", "--submit", "--out", "-x.sbatch").out
    assert "Submitted batch job 7" in output
    assert (commands / "told").read_text() == "sbatch ./-x.sbatch\n"
    (commands / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    error = cli(*LAUNCH, "--on", "slurm", "--submit", code=2).err
    assert "sbatch failed with exit code 1: no such partition" in error


def test_existing_user_file_is_not_overwritten(cli):
    cli(*LAUNCH)
    cli(*LAUNCH)
    Path("first.sh").write_text("mine")
    assert "never overwritten" in cli(*LAUNCH, code=2).err
    assert Path("first.sh").read_text() == "mine"


@pytest.mark.parametrize(("words", "message"), CASES["test_bad_input_is_rejected"])
def test_bad_input_is_rejected(words, message, folder, monkeypatch, cli):
    monkeypatch.setenv("PATH", str(folder))
    error = cli(*LAUNCH, *words, code=2).err
    assert message in error
    assert "remedy: " in error
