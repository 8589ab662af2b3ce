"""The run folder: one run, one process, no torn lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finesight.errors import UserError
from finesight.train.run import Run


def test_a_new_or_empty_folder_is_free(tmp_path: Path) -> None:
    Run(tmp_path / "new").check_free(resume=False)
    Run(tmp_path).check_free(resume=False)


def test_another_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UserError, match=r"holds another run[\s\S]*--resume"):
        Run(tmp_path).check_free(resume=False)
    Run(tmp_path).check_free(resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_other_peoples_files_are_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"holds recipe\.yaml, thesis\.tex, and no run"):
        Run(tmp_path).check_free(resume)
    with pytest.raises(UserError, match="is a file"):
        Run(tmp_path / "thesis.tex").check_free(resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_link_to_nothing_is_refused(tmp_path: Path, resume: bool) -> None:
    for target in ("nowhere", "link"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        with pytest.raises(UserError, match="a link to nothing"):
            Run(link).check_free(resume)


def test_a_users_own_recipe_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"holds recipe\.yaml, and no run"):
        Run(tmp_path).check_free(resume=False)


def test_a_name_that_cannot_be_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file name too long[\s\S]*shorter output"):
        Run(tmp_path / ("long" * 100)).check_free(resume=False)


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from finesight.errors import UserError
from finesight.train.run import Run
try:
    with Run(Path({str(tmp_path)!r})).locked():
        print("entered")
except UserError as error:
    print(error.what)
"""
    with Run(tmp_path).locked():
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.strip() == f"another process is training in {tmp_path.name}", done.stderr
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "entered", done.stderr


def filled(folder: Path) -> Run:
    run = Run(folder)
    for step in range(5):
        if step % 2 == 0:
            run.note({"step": step, "held_out_loss": 1.0})
        run.note({"step": step + 1, "loss": 0.5})
    return run


def test_lines_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    run = filled(tmp_path)
    run.forget_after(step=3, measured=2)
    assert [(line["step"], "loss" in line) for line in run.history()] == [
        (0, False),
        (1, True),
        (2, True),
        (2, False),
        (3, True),
    ]


def test_a_measurement_that_the_checkpoint_does_not_know_is_cut(tmp_path: Path) -> None:
    run = filled(tmp_path)
    run.forget_after(step=2, measured=0)
    assert [(line["step"], "loss" in line) for line in run.history()][-1] == (2, True)


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', '{"step": 6}', "7\n", "\x00\x00"])
def test_a_torn_last_line_is_cut_and_writing_goes_on(tmp_path: Path, torn: str) -> None:
    run = filled(tmp_path)
    with run.metrics.open("a") as file:
        file.write(torn)
    assert len(run.history()) == 8
    run.forget_after(step=100, measured=100)
    run.note({"step": 6, "loss": 0.1})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6]


def test_the_result_marks_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.result() is None
    run.finished({"steps": 3})
    assert json.loads(run.result() or "") == {"steps": 3}
