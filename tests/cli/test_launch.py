"""Tests of the command `finesight launch`: job files, output, submission."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fake_slurm
import pytest

from finesight.cli.app import run_command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a recipe and without scheduler commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    text = "model: some/model\ndata: {train: a.jsonl}\noutput_dir: runs/first\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


def launch(*words: str) -> int:
    return run_command(["launch", "recipe.yaml", *words])


CLOUD = ("--image", "a/b:1", "--store", "s3://b/c")


@pytest.mark.parametrize(
    ("words", "file", "command"),
    [
        ((), "first.sh", "bash first.sh"),
        (("--on", "slurm", "--nodes", "1:4"), "first.sbatch", "sbatch first.sbatch"),
        (
            ("--on", "skypilot", *CLOUD, "--accelerator", "H100"),
            "first.sky.yaml",
            "sky jobs launch --yes first.sky.yaml",
        ),
        (
            ("--on", "kubeflow", "--image", "a/b:1", "--store", "a-claim"),
            "first.trainjob.yaml",
            "kubectl create --filename first.trainjob.yaml",
        ),
    ],
)
def test_job_file_and_start_command(
    words: tuple[str, ...],
    file: str,
    command: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch(*words) == 0
    assert capsys.readouterr().out == f"{file}\nstart with: {command}\n"
    assert "finesight train recipe.yaml --resume" in (folder / file).read_text()
    assert launch(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"file": file, "command": command, "submitted": False, "output": None}


def test_options_of_train_are_passed(folder: Path) -> None:
    assert launch("--push", "hf:me/a@main") == 2
    assert launch("--push", "hf:me/a", "--force") == 0
    assert "recipe.yaml --resume --push hf:me/a --force" in (folder / "first.sh").read_text()


def test_slurm_job_is_submitted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = fake_slurm.install(folder / "slurm")
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(commands))
    assert launch("--on", "slurm", "--submit", "--out", "-x.sbatch") == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    assert (commands / "told").read_text() == "sbatch ./-x.sbatch\n"


def test_submit_error_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    assert launch("--on", "slurm", "--submit") == 2
    assert "sbatch failed with exit code 1: no such partition" in capsys.readouterr().err


def test_existing_user_file_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch() == launch() == 0
    (folder / "first.sh").write_text("mine")
    assert launch() == 2
    assert "never overwritten" in capsys.readouterr().err
    assert (folder / "first.sh").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--on", "slurm", "--submit"), "sbatch is not installed"),
        (("--submit",), "torchrun has no job queue"),
        (("--partition", "x"), "--partition is given with --on torchrun"),
        (("--on", "slurm", "--image", "x"), "--image is given with --on slurm"),
        (("--on", "slurm", "--partition", "a b"), "'a b' is not a name"),
        (("--on", "kubeflow", "--image", "x"), "--store: is missing"),
        (("--nodes", "0"), "invalid number of nodes '0'"),
        (("--name", "A B"), "the name 'A B'"),
        (("train.bach=8",), "train.bach"),
    ],
)
def test_bad_input_is_rejected(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(*words) == 2
    output = capsys.readouterr().err
    assert message in output
    assert "remedy: " in output
