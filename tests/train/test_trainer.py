"""Runs of the tiny task: files, errors and console output."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import TinyTask, act_before_step, read_losses

from finesight.errors import UserError
from finesight.evaluate.prediction_file import read_predictions
from finesight.evaluate.score_function import ScoringError
from finesight.files import storage
from finesight.infer.model_loader import load_inference_model
from finesight.samples.image_file import CorruptImageError
from finesight.settings.recipe import load_recipe
from finesight.train import evaluation, trainer
from finesight.train.checkpoint import AsyncCheckpointer
from finesight.train.finalize import RunResult
from finesight.train.run_dir import RunDir

ONE_STEP = ("train.steps=1", "train.epochs=null")

METRIC = """
import os
def score(case):
    return 10**400 if os.path.exists({fails!r}) else len(case.answer)
"""


def test_run_resumed_after_a_failed_metric_equals_uninterrupted_run(task, monkeypatch):
    metric, fails = task.folder / "mine.py", task.folder / "fails"
    metric.write_text(METRIC.format(fails=str(fails)))
    settings = {"metric": f"{metric}:score", "every": 3, "max_new_tokens": 2}
    steps = ("train.save_every=null",)
    task.run(*steps, eval=settings, name="expected")
    with monkeypatch.context() as patched:
        act_before_step(patched, 2, fails.touch)
        with pytest.raises(ScoringError, match="score is 1000") as caught:
            task.run(*steps, eval=settings)
    assert str(metric) in caught.value.where
    assert "for sample 'eval0'" in caught.value.what
    assert caught.value.what.endswith("in the evaluation of step 3, checkpoint of step 3 written")
    metric.write_text("def score(case): return len(case.answer)")
    task.run(*steps, eval=settings, resume=True)
    assert read_losses(task.folder / "run") == read_losses(task.folder / "expected")


def test_run_folder_and_metrics(task):
    result = task.run(eval={"metric": "ocr", "every": 4, "max_new_tokens": 6})
    run = task.folder / "run"
    files = "images.safetensors manifest.json metrics.jsonl param_audit.json recipe.yaml"
    files += " report.html result.json skipped_samples.jsonl"
    folders = "adapter checkpoints model predictions"
    assert {path.name for path in run.iterdir()} == {*files.split(), *folders.split()}
    for folder in (run / "adapter", run / "model", run / "checkpoints" / "step-6"):
        storage.verify_folder(folder)
    names = {path.stem for path in (run / "predictions").iterdir()}
    assert names == {"after", "before", "step-4"}
    assert load_recipe(run / "recipe.yaml").train.batch_size == 4
    assert RunResult.model_validate_json((run / "result.json").read_text()) == result
    assert result.after.validation_loss < result.before.validation_loss
    assert (result.steps, result.samples, result.skipped_samples) == (6, 22, 0)
    size = "training merger full, language lora: 33,024 of 193,152 parameters; 6 steps"
    assert size in task.console_output
    assert re.search(r"step 6/6  loss .* samples/s .* tokens/s .* % MFU .* GB", task.console_output)
    # The adapter applies to the fully trained parts of the same run.
    parameters = dict(load_inference_model(str(run), "cpu").model.named_parameters())
    values = load_file(run / "checkpoints" / "step-6" / "trainable.safetensors")
    assert len(values) > 20
    for name, value in values.items():
        assert torch.equal(parameters[name].detach(), value), name
    lines = [line for line in task.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["num_samples"] for line in lines] == [4, 4, 4, 4, 4, 2]
    assert lines[2]["epoch"] == pytest.approx(12 / 11, abs=1e-3)
    for line in lines:
        assert line["lr"].keys() == {"merger", "language"}
        assert line["num_tokens"] > line["num_supervised_tokens"] > 0
        assert line["samples_per_s"] == pytest.approx(line["num_samples"] / line["step_s"])
        assert min(line["mfu"], line["peak_memory_gb"]) > 0
        assert 0 < line["data_wait_s"] < line["step_s"]
    assert lines[-1]["lr"]["merger"] < lines[1]["lr"]["merger"]
    measured = [line["step"] for line in task.read_metrics() if "validation_loss" in line]
    assert measured == [0, 4, 6]


class RenameLog(storage.FileSystem):
    """Keeps the names of renamed files and folders; fails to rename one."""

    def __init__(self, failing: str = "") -> None:
        self.names: list[str] = []
        self.failing = failing

    def rename(self, source: Path, target: Path) -> None:
        if target.name == self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().rename(source, target)
        self.names.append(target.name)


@pytest.mark.parametrize("interval", [0.0, 1000.0])
def test_background_checkpoint_precedes_weights(task, monkeypatch, interval):
    def make_checkpointer(*args, **kwargs):
        return AsyncCheckpointer(*args, **kwargs | {"is_async": True, "min_interval_s": interval})

    monkeypatch.setattr(trainer, "AsyncCheckpointer", make_checkpointer)
    disk = RenameLog()
    with patch.object(storage, "file_system", disk):
        task.run(eval={"metric": "ocr", "every": 0, "max_new_tokens": 2})
    assert [*filter({"step-6", "adapter", "model", "result.json"}.__contains__, disk.names)] == [
        *("step-6", "model", "adapter", "result.json")
    ]
    steps = sorted(path.name for path in (task.folder / "run" / "checkpoints").iterdir())
    assert steps == (["step-6"] if interval else ["step-4", "step-6"])


@pytest.mark.parametrize(("failing", "written"), [("step-6", []), ("adapter", ["model", "step-6"])])
def test_failed_export_or_checkpoint_leaves_a_resumable_run(task, monkeypatch, failing, written):
    def make_checkpointer(*args, **kwargs):
        return AsyncCheckpointer(*args, **kwargs | {"is_async": True})

    expected = task.run(name="expected")
    monkeypatch.setattr(trainer, "AsyncCheckpointer", make_checkpointer)
    with (
        patch.object(storage, "file_system", RenameLog(failing)),
        pytest.raises((UserError, OSError), match=r"(?i)no space"),
    ):
        task.run()
    run = task.folder / "run"
    paths = run / "model", run / "adapter", run / "checkpoints" / "step-6", run / "result.json"
    assert [path.name for path in paths if path.exists()] == written
    assert task.run(resume=True).loss == expected.loss
    assert all(path.exists() for path in paths)


def test_existing_run_is_rejected(task):
    first, run = task.run(), task.folder / "run"
    with pytest.raises(UserError, match="contains a finished run"):
        task.run()
    before = (run / "metrics.jsonl").read_bytes()
    assert task.run(resume=True) == first
    assert "the run is already complete" in task.console_output
    assert "no effect" not in task.console_output
    assert task.run("train.steps=99", resume=True) == first
    assert "changed settings have no effect: train.epochs, train.steps." in task.console_output
    assert (run / "metrics.jsonl").read_bytes() == before
    # A damaged result is written again after its deletion.
    (run / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"not a valid result[\s\S]*delete it"):
        task.run(resume=True)
    (run / "result.json").unlink()
    assert task.run(resume=True) == first


def test_resume_from_damaged_checkpoint(task):
    task.recipe["train"]["keep_checkpoints"] = 3
    checkpoints = task.rewind_to_checkpoint() / "checkpoints"
    (checkpoints / "step-4" / "trainable.safetensors").write_bytes(b"x")
    assert task.run(resume=True).steps == 6
    assert "resuming from step 2" in task.console_output
    assert (checkpoints / "corrupt-step-4").is_dir()
    (checkpoints / "step-2" / "optimizer.safetensors").unlink()
    (task.folder / "run" / "result.json").unlink()
    for step in (4, 6):
        storage.remove_folder(checkpoints / f"step-{step}")
    with pytest.raises(UserError, match=r"optimizer\.safetensors") as caught:
        task.run(resume=True)
    assert "to restart the run from step 0" in caught.value.remedy


def test_corrupt_images_are_counted_and_run_continues(task):
    """One image has no header; another training and a validation image are truncated."""
    (task.folder / "train2.png").write_bytes(b"no picture")
    task.truncate_images("train5", "eval0")
    result = task.run()
    skipped = [name for line in task.read_metrics() for name in line.get("skipped_samples", [])]
    assert skipped == ["train5", "train5"]
    listed = (task.folder / "run" / "skipped_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in listed] == ["train2", "eval0", "train5"]
    assert result.skipped_samples == 3
    for text in ("skipped train2", "skipped train5", "1 validation sample skipped, eval0: "):
        assert text in task.console_output
    with pytest.raises(CorruptImageError, match=r"train2\.png"):
        task.run("data.on_invalid_sample=fail", name="strict")
    assert not (task.folder / "strict").exists()


def test_unreadable_validation_images_end_the_run(task):
    task.truncate_images("eval0", "eval1", "eval2")
    with pytest.raises(UserError, match="none of 3 samples has decodable images"):
        task.run(name="blind")
    with pytest.raises(CorruptImageError, match=r"eval0\.png"):
        task.run("data.on_invalid_sample=fail", name="strict")


def test_evaluations_describe_the_samples_that_were_read(task):
    task.recipe["eval"] = {"metric": "ocr", "every": 4, "max_new_tokens": 3}
    run = task.rewind_to_checkpoint()
    # Its header is readable, so it is still in the list of samples.
    task.truncate_images("eval1")
    (run / "images.safetensors").unlink()
    result = task.run(resume=True)
    lines = [line for line in task.read_metrics() if "validation_loss" in line]
    first, last = lines[0], lines[-1]
    for key in ("num_samples", "num_loss_samples"):
        assert (first[key], last[key]) == (3, 2)
    sets = [{line["sample_set"], line["score_set"]} for line in (first, last)]
    assert sets[0].isdisjoint(sets[1])
    listed = [json.loads(line) for line in (run / "skipped_samples.jsonl").open()]
    assert [row["id"] for row in listed] == ["eval1"]
    assert "not compared" in task.console_output
    assert "(loss of 2 samples, scores of 2 samples)" in task.console_output
    assert result.metric_differences == ()
    text = "scores: not compared: the samples before (3) and after training (2) differ"
    assert text in task.console_output


def test_concurrent_run_is_rejected(task):
    """Later, the run resumes, with other settings that do not change its numbers."""
    run = RunDir(task.rewind_to_checkpoint())
    half_written = run.checkpoint_dir / ".step-6.partial"
    with run.lock():
        half_written.mkdir()
        for resume in (False, True):
            with pytest.raises(UserError, match="another process is training"):
                task.run(resume=resume)
        assert half_written.exists()
    settings = "train.num_workers=1", "train.keep_checkpoints=5", "train.save_every=1"
    assert task.run(*settings, resume=True).steps == 6
    assert [step for step, _ in read_losses(task.folder / "run")] == [1, 2, 3, 4, 5, 6]


def test_run_created_meanwhile_is_not_overwritten(task):
    class RacingDisk(storage.FileSystem):
        """Another process starts the same run just before this one creates the folder."""

        def make_folder(self, path: Path) -> None:
            super().make_folder(path)
            if path.name == "run":
                (path / "manifest.json").write_text("its own")

    with (
        patch.object(storage, "file_system", RacingDisk()),
        pytest.raises(UserError, match="contains another run"),
    ):
        task.run()
    assert [path.name for path in (task.folder / "run").iterdir()] == ["manifest.json"]


@pytest.mark.gpu
def test_gpu_run_with_workers_resumes(task):
    settings = ("train.device=cuda", "train.precision=bf16", "train.num_workers=2")
    first = task.run(*settings)
    assert first.after.validation_loss < first.before.validation_loss
    full = read_losses(task.folder / "run")
    (task.folder / "run" / "result.json").unlink()
    storage.remove_folder(task.folder / "run" / "checkpoints" / "step-6")
    task.run(*settings, resume=True)
    again = read_losses(task.folder / "run")
    assert [step for step, _ in again] == [1, 2, 3, 4, 5, 6]
    assert again[:4] == full[:4]
    # What is restored is exact; kernels that add in no fixed order are not.
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in full], rel=0.02)
    assert all(line["step_s"] > 0 for line in task.read_metrics() if "loss" in line)


def test_changed_data_file_ends_with_checkpoint(task, monkeypatch):
    """The run resumes after the file is restored."""
    file = task.folder / "train.jsonl"
    content, changed = file.read_bytes(), file.stat()
    with monkeypatch.context() as patch:
        act_before_step(patch, 2, lambda: file.write_bytes(content + b"\n"))
        with pytest.raises(UserError, match="has changed"):
            task.run("train.save_every=6")
    assert [path.name for path in (task.folder / "run" / "checkpoints").iterdir()] == ["step-3"]
    file.write_bytes(content)
    os.utime(file, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    assert task.run("train.save_every=6", resume=True).steps == 6


@pytest.mark.parametrize(
    "tune",
    [
        {"merger": "full"},
        {"vision": "lora", "merger": "frozen"},
        {"vision": "full", "merger": "lora"},
    ],
    ids=str,
)
def test_parts_without_gradient_are_rejected_before_the_first_step(task, tune):
    file = task.folder / "train.jsonl"
    with_images = file.read_text().splitlines(keepends=True)
    text_only = [re.sub(r'\{"type": "image"[^}]*\}, ', "", line) for line in with_images]
    file.write_text("".join(text_only))
    settings: dict[str, Any] = {"tune": tune | {"lora": {"rank": 4, "dropout": 0.0}}}
    with pytest.raises(UserError, match="no gradient would reach") as caught:
        task.run(**settings)
    parts = [part for part in ("vision", "merger") if tune.get(part, "frozen") != "frozen"]
    assert all(f"tune.{part}=frozen" in caught.value.remedy for part in parts)
    assert not (task.folder / "run").exists()
    file.write_text("".join([*text_only[1:], with_images[0]]))
    assert task.run("train.epochs=1", **settings).steps == 3


def test_default_evaluations_and_overfitting_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "DEFAULT_INTERIM_SAMPLES", 2)
    task = TinyTask(tmp_path)
    task.recipe["train"] |= {"epochs": None, "steps": 50, "learning_rate": 0.005}
    file = tmp_path / "eval.jsonl"
    file.write_text(re.sub('"(red|green|light blue|white)"', '"wrong"', file.read_text()))
    tune = {"language": "full", "embeddings": "full"}
    task.run("train.lr_schedule=constant", tune=tune, eval={"metric": "qa", "max_new_tokens": 4})
    evaluations = [line for line in task.read_metrics() if "validation_loss" in line]
    counts = [(line["step"], line["num_samples"], line["num_loss_samples"]) for line in evaluations]
    assert counts == [(step, 2, 2) for step in (0, 10, 20, 30, 40, 50)]
    assert len({line["sample_set"] for line in evaluations}) == 1
    full = {line["step"]: line["full"] for line in evaluations if line["full"]}
    assert [(step, one["num_samples"]) for step, one in full.items()] == [(0, 3), (50, 3)]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [result["before"], result["after"]] == [full[0], full[50]]
    assert len(read_predictions(tmp_path / "run" / "predictions" / "after.jsonl")) == 3
    losses = {line["step"]: line["validation_loss"] for line in evaluations if line["step"]}
    assert result["best_eval"]["step"] == min(losses, key=losses.__getitem__)
    for text in ("(common subset: 2 of 3 samples)", "(all 3 samples)"):
        assert text in task.console_output
    (warning,) = re.findall(r"^warning: Overfit.*$", task.console_output, re.M)
    checkpoint = re.search(r"training loss fell.*\(checkpoint (\S+/step-\d+)\)", warning)
    assert checkpoint is not None
    assert Path(checkpoint[1]).is_dir()
