"""Run directory: one run, one process, no partial lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finesight.errors import UserError
from finesight.recipe import recipe_from_dict
from finesight.train.run_dir import RunDir


def test_new_or_empty_folder_is_accepted(tmp_path: Path) -> None:
    RunDir(tmp_path / "new").check_available(resume=False)
    RunDir(tmp_path).check_available(resume=False)


def test_existing_run_is_rejected_unless_resumed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UserError, match=r"contains another run[\s\S]*--resume"):
        RunDir(tmp_path).check_available(resume=False)
    RunDir(tmp_path).check_available(resume=True)


def test_finished_run_is_not_offered_for_resuming(tmp_path: Path) -> None:
    for name in ("manifest.json", "result.json"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="contains a finished run") as caught:
        RunDir(tmp_path).check_available(resume=False)
    assert caught.value.remedy == f"set another folder: output_dir={tmp_path}-2"


@pytest.mark.parametrize(
    ("existing", "run", "expected"),
    [
        (["run", "run-2"], "run", "run-3"),
        (["run", "run-2"], "run-2", "run-3"),
        (["run", "run-3"], "run-3", "run-2"),
        (["rank-64"], "rank-64", "rank-64-2"),
        (["folder-2024", "folder-2024-05"], "folder-2024-05", "folder-2024-05-2"),
    ],
)
def test_remedy_names_a_free_folder(
    tmp_path: Path, existing: list[str], run: str, expected: str
) -> None:
    for name in existing:
        (tmp_path / name).mkdir()
        if not name.startswith("folder"):
            (tmp_path / name / "manifest.json").touch()
    for name in ("manifest.json", "result.json"):
        (tmp_path / run / name).touch()
    with pytest.raises(UserError, match="contains a finished run") as caught:
        RunDir(tmp_path / run).check_available(resume=False)
    assert caught.value.remedy.endswith(f"output_dir={tmp_path / expected}")


def test_full_weights_are_available_after_the_run(tmp_path: Path) -> None:
    settings = {"model": "finesight-tiny", "data": {"train": "a.jsonl"}, "output_dir": "run"}
    run = RunDir(tmp_path / "run")
    for mode, start in (
        ("full", "; after the run has finished, to train its final weights with the new ones"),
        ("lora", "; to start from the checkpoint with the new ones"),
    ):
        recipe = recipe_from_dict(settings | {"tune": {"language": mode}})
        text = run.suggest_restart(recipe, tmp_path / "step-2", {"train.batch_size": 3})
        assert f"{start}: finesight train {tmp_path}/run/recipe.yaml train.batch_size=3" in text


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_not_touched(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"contains recipe\.yaml, thesis\.tex, but no run"):
        RunDir(tmp_path).check_available(resume)
    with pytest.raises(UserError, match="is a file"):
        RunDir(tmp_path / "thesis.tex").check_available(resume)


@pytest.mark.parametrize("resume", [False, True])
def test_dangling_symlink_is_rejected(tmp_path: Path, resume: bool) -> None:
    for target in ("nowhere", "link"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        with pytest.raises(UserError, match="a broken link"):
            RunDir(link).check_available(resume)


def test_invalid_folder_name_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file name too long[\s\S]*shorter output"):
        RunDir(tmp_path / ("long" * 100)).check_available(resume=False)


def test_run_folder_is_locked(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from finesight.errors import UserError
from finesight.train.run_dir import RunDir
try:
    with RunDir(Path({str(tmp_path)!r})).lock():
        print("entered")
except UserError as error:
    print(error.what)
"""
    with RunDir(tmp_path).lock():
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.strip() == f"another process is training in {tmp_path.name}", done.stderr
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "entered", done.stderr


def make_run(folder: Path) -> RunDir:
    run = RunDir(folder)
    for step in range(5):
        if step % 2 == 0:
            run.append_metrics({"step": step, "validation_loss": 1.0})
        run.append_metrics({"step": step + 1, "loss": 0.5})
    return run


def test_metrics_after_checkpoint_are_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    expected = [(0, False), (1, True), (2, True), (2, False), (3, True)]
    # The second call also removes the evaluation of step 2.
    for step, last_eval_step, count in ((3, 2, 5), (2, 0, 3)):
        run.truncate_metrics(step, last_eval_step)
        lines = [(line["step"], "loss" in line) for line in run.read_metrics()]
        assert lines == expected[:count]


@pytest.mark.parametrize("truncated", ['{"step": 6, "lo', '{"step": 6}', "7\n", "\x00\x00"])
def test_truncated_last_line_is_removed(tmp_path: Path, truncated: str) -> None:
    run = make_run(tmp_path)
    with run.metrics_path.open("a") as file:
        file.write(truncated)
    assert len(run.read_metrics()) == 8
    run.truncate_metrics(step=100, last_eval_step=100)
    run.append_metrics({"step": 6, "loss": 0.1})
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6]


def test_result_file_marks_the_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.read_result() is None
    run.write_result({"steps": 3})
    assert json.loads(run.read_result() or "") == {"steps": 3}
