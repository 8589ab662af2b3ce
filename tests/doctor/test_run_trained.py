"""Runs that really went wrong, and the printed commands that set them right."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctoring import codes, only
from small_run import Task

from finesight import storage
from finesight.cli.app import run
from finesight.doctor import run_course, run_end
from finesight.doctor.findings import Finding
from finesight.errors import Interrupted, UserError
from finesight.report.record import read_record

SHORT = ("train.epochs=null", "train.steps=16", "train.save_every=16", "train.pack_tokens=1000")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path / "task")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has not come to its end, to look at."""
    return Task(tmp_path_factory.mktemp("stopped") / "task").unfinished()


def judged(folder: Path) -> list[Finding]:
    record = read_record(folder)
    return [*run_end.judge(record), *run_course.judge(record)]


def typed_in(remedy: str) -> None:
    """Every command of a remedy: ours in this process, others by a shell."""
    for command in remedy.replace(" && ", "\n").splitlines():
        words = shlex.split(command)
        if words[0] == "finesight":
            # What `data check` mends it also tells, by its exit code.
            assert run(words[1:]) == (2 if "--fix" in words else 0), command
        else:
            subprocess.run(command, shell=True, check=True)


def output_of(remedy: str) -> Path:
    """The new folder that a remedy names."""
    words = shlex.split(remedy.splitlines()[-1])
    (output,) = [word.partition("=")[2] for word in words if word.startswith("output=")]
    return Path(output)


def test_a_learning_rate_that_is_too_high_is_found_and_lowered(task: Task) -> None:
    task.run(*SHORT, "train.learning_rate=1.0", "train.schedule=constant", name="my run")
    found = only(judged(task.folder / "my run"), "rate-too-high")
    assert "gradients have died away" in found.what
    typed_in(found.remedy)
    assert codes(judged(output_of(found.remedy))) == []


def test_a_flat_loss_is_found_and_following_the_commands_it_falls(task: Task) -> None:
    task.run(*SHORT, "train.learning_rate=1e-7", "train.schedule=constant")
    folder = task.folder / "run"
    for _ in range(2):
        found = only(judged(folder), "loss-flat")
        assert "learning rate is too low" in found.why
        typed_in(found.remedy)
        folder = output_of(found.remedy)
    assert codes(judged(folder)) == []


def test_a_run_without_finite_losses_is_explained_and_set_right(task: Task) -> None:
    with pytest.raises(UserError, match="no finite"):
        task.run(*SHORT, "train.learning_rate=1e30")
    faults = [one for one in judged(task.folder / "run") if one.severity == "fault"]
    assert [one.code for one in faults] == ["not-finite"]
    assert "train.jsonl:" in faults[0].why
    typed_in(faults[0].remedy)
    assert codes(judged(output_of(faults[0].remedy))) == []


@pytest.mark.parametrize("ended", [False, True])
def test_a_recipe_that_cannot_be_read_is_told(stopped: Path, tmp_path: Path, ended: bool) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed:", "sead:"))
    if ended:
        (folder / "result.json").write_text('{"steps": 4}')
    found = only(judged(folder), "recipe")
    assert found.severity == ("hint" if ended else "fault")
    assert "sead" in found.what
    assert run(shlex.split(found.remedy)[1:]) == 2


def test_a_run_that_was_killed_goes_on(task: Task) -> None:
    folder = task.unfinished()
    found = only(judged(folder), "unfinished")
    assert "was killed" in found.why
    assert "; 2 steps are done again" in found.why
    typed_in(found.remedy)
    assert codes(judged(folder)) == []


@pytest.mark.parametrize(
    ("how", "said"), [("interrupted", "it was interrupted: for a test"), ("failed", "it failed")]
)
def test_why_a_run_ended_is_what_it_noted(
    stopped: Path, tmp_path: Path, how: str, said: str
) -> None:
    """A run that was started again since has not ended by that."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    end = {"step": 6, "ended": "2026-01-01T00:00:00+00:00", "how": how, "why": "for a test"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(end) + "\n")
        file.flush()
        found = only(judged(folder), "unfinished")
        assert said in found.why
        assert "for a test; 2 steps" in found.why
        file.write(json.dumps({"step": 6, "started": "2026-01-02T00:00:00+00:00"}) + "\n")
    assert "was killed" in only(judged(folder), "unfinished").why


def test_an_interrupted_run_says_itself_what_stopped_it(task: Task) -> None:
    class Stopping(storage.Disk):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name == "step-2":
                os.kill(os.getpid(), signal.SIGTERM)

    with storage.using(Stopping()), pytest.raises(Interrupted):
        task.run()
    found = only(judged(task.folder / "run"), "unfinished")
    assert "it was interrupted: stopped by SIGTERM" in found.why
    assert "done again" not in found.why


def test_a_damaged_checkpoint_is_told_and_resuming_passes_it_by(task: Task) -> None:
    task.run("train.keep=3")
    folder = task.folder / "run"
    (folder / "result.json").unlink()
    storage.remove_folder(folder / "checkpoints" / "step-6")
    state = folder / "checkpoints" / "step-4" / "state.json"
    state.write_text(state.read_text() + " ")
    found = only(judged(folder), "checkpoint-damaged")
    assert "step 2 comes before it" in found.why
    typed_in(found.remedy)
    assert codes(judged(folder)) == []


def test_damaged_weights_are_written_again_from_the_checkpoint(task: Task) -> None:
    task.run()
    folder = task.folder / "run"
    weights = folder / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x7f")
    typed_in(only(judged(folder), "weights-damaged").remedy)
    assert codes(judged(folder)) == []
    assert len(weights.read_bytes()) == len(whole)


def _lose_picture(task: Task) -> None:
    (task.folder / "train3.png").unlink()


def _shorten(task: Task) -> None:
    task.recipe["data"]["max_length"] = 44


@pytest.mark.parametrize("plant", [_lose_picture, _shorten])
def test_samples_that_were_left_out_are_mended(task: Task, plant: Callable[[Task], None]) -> None:
    plant(task)
    task.run(*SHORT[:1], "train.steps=2")
    found = only(judged(task.folder / "run"), "left-out")
    assert found.severity == "fault"
    typed_in(found.remedy)
    assert "left-out" not in codes(judged(output_of(found.remedy)))


def test_a_base_that_moved_is_looked_for_and_a_changed_one_is_told(task: Task) -> None:
    task.run(*SHORT[:1], "train.steps=1")
    folder, model = task.folder / "run", task.folder / "tiny"
    model.rename(task.folder / "elsewhere")
    found = only(judged(folder), "base-missing")
    assert shlex.split(found.remedy)[-1] == "tiny"
    (task.folder / "elsewhere").rename(model)
    header = model / "model.safetensors"
    header.write_bytes(
        header.read_bytes().replace(b'"BF16"', b'"F16" ').replace(b'"F32"', b'"I32"')
    )
    found = only(judged(folder), "base-changed")
    assert shlex.split(found.remedy) == ["finesight", "doctor", str(model)]
    assert run(["doctor", str(model)]) == 2


def test_a_run_that_goes_on_is_left_in_peace(stopped: Path) -> None:
    handle = os.open(stopped, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        found = judged(stopped)
    finally:
        os.close(handle)
    assert codes(found) == []
    assert str(os.getpid()) in only(found, "end").what


def test_a_checkpoint_that_has_no_room_is_told(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_end.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    found = only(judged(stopped), "disk-full")
    assert found.remedy.startswith("du ")


def test_the_command_says_all_of_it(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", str(stopped)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  FAULT  the run is not finished") for line in lines)
    assert f"         $ finesight train {stopped}/recipe.yaml --resume" in lines
    assert run(["doctor", str(stopped), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["faults"] == 1
    assert {"section", "code", "severity", "what", "why", "remedy"} == set(said["findings"][0])
