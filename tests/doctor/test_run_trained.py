"""Runs that really went wrong, and the printed commands that set them right."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
from doctor_fixtures import find_diagnosis, list_codes
from tiny_task import TinyTask

from finesight.cli.app import run_command
from finesight.doctor import run_check
from finesight.doctor.diagnosis import Diagnosis
from finesight.errors import TrainingInterrupted, UserError
from finesight.files import storage
from finesight.report.run_reader import read_run

SHORT = ("train.epochs=null", "train.steps=16", "train.save_every=16", "train.pack_tokens=1000")


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path / "task")


@pytest.fixture(scope="module")
def unfinished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an unfinished run."""
    return TinyTask(tmp_path_factory.mktemp("stopped") / "task").rewind_to_checkpoint()


def diagnose(folder: Path) -> list[Diagnosis]:
    record = read_run(folder)
    return [*run_check.check_run_end(record), *run_check.check_training(record)]


def run_remedy(remedy: str) -> None:
    """Every command of a remedy: ours in this process, others by a shell."""
    for command in remedy.replace(" && ", "\n").splitlines():
        words = shlex.split(command)
        if words[0] == "finesight":
            assert run_command(words[1:]) == 0, command
        else:
            subprocess.run(command, shell=True, check=True)


def output_of(remedy: str) -> Path:
    """The new folder that a remedy names."""
    words = shlex.split(remedy.splitlines()[-1])
    (output,) = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    return Path(output)


def test_high_learning_rate_is_found_and_lowered(task: TinyTask) -> None:
    task.run(*SHORT, "train.learning_rate=1.0", "train.lr_schedule=constant", name="my run")
    found = find_diagnosis(diagnose(task.folder / "my run"), "learning-rate-too-high")
    assert "gradients vanished" in found.what
    run_remedy(found.remedy)
    assert list_codes(diagnose(output_of(found.remedy))) == []


def test_flat_loss_is_found_and_remedy_trains(task: TinyTask) -> None:
    task.run(*SHORT, "train.learning_rate=1e-7", "train.lr_schedule=constant")
    folder = task.folder / "run"
    for _ in range(2):
        found = find_diagnosis(diagnose(folder), "loss-flat")
        assert "learning rate is too low" in found.why
        run_remedy(found.remedy)
        folder = output_of(found.remedy)
    assert list_codes(diagnose(folder)) == []


def test_non_finite_loss_is_explained_and_fixed(task: TinyTask) -> None:
    with pytest.raises(UserError, match="non-finite"):
        task.run(*SHORT, "train.learning_rate=1e30")
    errors = [one for one in diagnose(task.folder / "run") if one.severity == "error"]
    assert [one.code for one in errors] == ["not-finite"]
    assert "train.jsonl:" in errors[0].why
    run_remedy(errors[0].remedy)
    assert list_codes(diagnose(output_of(errors[0].remedy))) == []


@pytest.mark.parametrize("ended", [False, True])
def test_unreadable_recipe_is_reported(unfinished_run: Path, tmp_path: Path, ended: bool) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(unfinished_run, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed:", "sead:"))
    if ended:
        (folder / "result.json").write_text('{"steps": 4}')
    found = find_diagnosis(diagnose(folder), "recipe")
    assert found.severity == ("warning" if ended else "error")
    assert "sead" in found.what
    assert run_command(shlex.split(found.remedy)[1:]) == 2


def test_interrupted_run_records_the_signal(task: TinyTask) -> None:
    class Stopping(storage.FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name == "step-2":
                os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(storage, "file_system", Stopping()), pytest.raises(TrainingInterrupted):
        task.run()
    found = find_diagnosis(diagnose(task.folder / "run"), "unfinished")
    assert "it was interrupted: stopped by SIGTERM" in found.why
    assert "repeated" not in found.why


@pytest.mark.parametrize(
    ("reason", "is_full"),
    [
        ("sample a, 9 tokens and 4 patches: the GPU memory is full: CUDA out of memory", True),
        ("training: rank 1 of 2 failed in the middle of a step: the GPU memory is full: x", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("training: rank 1 of 2 failed", False),
    ],
)
def test_full_gpu_memory_is_answered_by_a_plan(unfinished_run, tmp_path, reason, is_full):
    folder = tmp_path / "run"
    shutil.copytree(unfinished_run, folder)
    end = {"step": 4, "ended_at": "2026-01-01T00:00:00+00:00", "status": "failed", "reason": reason}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(end) + "\n")
    found = find_diagnosis(diagnose(folder), "unfinished")
    assert f"it failed: {reason}" in found.why
    words = shlex.split(found.remedy)
    assert words[:2] == (["finesight", "plan"] if is_full else ["finesight", "train"])
    assert str(folder / "recipe.yaml") in words[2]


def test_damaged_checkpoint_is_reported_and_skipped(task: TinyTask) -> None:
    task.run("train.keep_checkpoints=3")
    folder = task.folder / "run"
    (folder / "result.json").unlink()
    storage.remove_folder(folder / "checkpoints" / "step-6")
    state = folder / "checkpoints" / "step-4" / "state.json"
    state.write_text(state.read_text() + " ")
    found = find_diagnosis(diagnose(folder), "checkpoint-damaged")
    assert "previous checkpoint is from step 2" in found.why
    run_remedy(found.remedy)
    assert list_codes(diagnose(folder)) == []


def test_damaged_weights_are_rewritten_from_checkpoint(task: TinyTask) -> None:
    task.run()
    folder = task.folder / "run"
    weights = folder / "adapter" / "adapter_model.safetensors"
    full = weights.read_bytes()
    weights.write_bytes(full[:-1] + b"\x7f")
    run_remedy(find_diagnosis(diagnose(folder), "weights-damaged").remedy)
    assert list_codes(diagnose(folder)) == []
    assert len(weights.read_bytes()) == len(full)


@pytest.mark.parametrize("is_long", [False, True])
def test_skipped_samples_are_reported(task: TinyTask, is_long: bool) -> None:
    if is_long:
        task.recipe["data"]["max_length"] = 44
    else:
        (task.folder / "train3.png").unlink()
    task.run(*SHORT[:1], "train.steps=2")
    found = find_diagnosis(diagnose(task.folder / "run"), "samples-skipped")
    assert found.severity == "error"
    if is_long:
        run_remedy(found.remedy)
        assert "samples-skipped" not in list_codes(diagnose(output_of(found.remedy)))
    else:
        assert run_command(shlex.split(found.remedy)[1:]) == 2


def test_skipped_validation_samples_are_counted_separately(task: TinyTask) -> None:
    image = task.folder / "eval1.png"
    image.write_bytes(image.read_bytes()[:60])
    task.run(*SHORT[:1], "train.steps=1")
    found = find_diagnosis(diagnose(task.folder / "run"), "samples-skipped")
    assert found.what.startswith("1 of 3 validation samples were skipped, 1 of them: truncated")


def test_missing_or_changed_base_is_reported(task: TinyTask) -> None:
    task.run(*SHORT[:1], "train.steps=1")
    folder, model = task.folder / "run", task.folder / "tiny"
    model.rename(task.folder / "elsewhere")
    found = find_diagnosis(diagnose(folder), "base-missing")
    assert shlex.split(found.remedy)[-1] == "tiny"
    (task.folder / "elsewhere").rename(model)
    header = model / "model.safetensors"
    header.write_bytes(
        header.read_bytes().replace(b'"BF16"', b'"F16" ').replace(b'"F32"', b'"I32"')
    )
    found = find_diagnosis(diagnose(folder), "base-changed")
    assert shlex.split(found.remedy) == ["finesight", "doctor", str(model)]
    assert run_command(["doctor", str(model)]) == 2


def test_running_run_is_not_touched(unfinished_run: Path) -> None:
    handle = os.open(unfinished_run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        found = diagnose(unfinished_run)
    finally:
        os.close(handle)
    assert list_codes(found) == []
    assert find_diagnosis(found, "run-end").what == "the run is running"
