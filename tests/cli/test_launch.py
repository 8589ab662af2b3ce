"""The command `finesight launch`: files, what is printed, and how they are submitted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fake_slurm
import pytest

from finesight.cli.app import run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs: with a recipe, without the commands of any engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    text = "model: some/model\ndata: {train: a.jsonl}\noutput: runs/first\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


def launch(*words: str) -> int:
    return run(["launch", "recipe.yaml", *words])


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
def test_a_file_and_how_to_start_it(
    words: tuple[str, ...],
    file: str,
    command: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch(*words) == 0
    assert capsys.readouterr().out == f"{file}\nstart it: {command}\n"
    assert "finesight train recipe.yaml --resume" in (folder / file).read_text()
    assert launch(*words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"file": file, "command": command, "submitted": False, "said": None}


def test_slurm_takes_the_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = fake_slurm.install(folder / "slurm")
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(commands))
    assert launch("--on", "slurm", "--submit", "--out", "-x.sbatch") == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    assert (commands / "told").read_text() == "sbatch ./-x.sbatch\n"


def test_an_engine_that_refuses_is_heard(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    assert launch("--on", "slurm", "--submit") == 2
    assert "sbatch ended with 1: no such partition" in capsys.readouterr().err


def test_a_file_of_ones_own_is_not_overwritten(
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
        (("--on", "slurm", "--submit"), "sbatch is not installed here"),
        (("--submit",), "no queue to submit to"),
        (("--partition", "x"), "--partition beside --on torchrun"),
        (("--on", "slurm", "--image", "x"), "--image beside --on slurm"),
        (("--on", "slurm", "--partition", "a b"), "'a b' is not a name"),
        (("--on", "kubeflow", "--image", "x"), "--store: is missing"),
        (("--nodes", "0"), "'0' machines"),
        (("--name", "A B"), "the name 'A B'"),
        (("train.bach=8",), "train.bach"),
    ],
)
def test_bad_input(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(*words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "remedy: " in said
