"""Whole runs of the tiny task: what they write, what they refuse, what they show."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import Task, losses
from torch.nn.modules.module import register_module_forward_pre_hook

from finesight import digests, storage
from finesight.data.headers import DamagedPicture
from finesight.errors import UserError
from finesight.infer.load import load_answerer
from finesight.model.tiny import make_tiny
from finesight.recipe import load_recipe
from finesight.train import loop
from finesight.train.finish import RunResult
from finesight.train.loader import Step
from finesight.train.prepare import Session
from finesight.train.run import Run
from finesight.train.step import Taken


def test_a_run_leaves_what_the_design_says(task: Task) -> None:
    result = task.run(eval={"metric": "ocr", "every": 4, "max_new_tokens": 6})
    run = task.folder / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        *("adapter", "checkpoints", "dropped.jsonl", "images.safetensors", "manifest.json"),
        *(
            "metrics.jsonl",
            "model",
            "moved.json",
            "predictions",
            "recipe.yaml",
            "report.html",
            "result.json",
        ),
    ]
    for folder in (run / "adapter", run / "model", run / "checkpoints" / "step-6"):
        digests.verify_folder(folder)
    names = sorted(path.name for path in (run / "predictions").iterdir())
    assert names == ["after.jsonl", "before.jsonl", "step-4.jsonl"]
    assert load_recipe(run / "recipe.yaml").train.batch == 4
    assert RunResult.model_validate_json((run / "result.json").read_text()) == result
    assert result.before is not None
    assert result.after is not None
    assert result.after.held_out_loss < result.before.held_out_loss
    assert (result.steps, result.samples, result.dropped) == (6, 22, 0)
    assert "similarity" in task.screen
    assert "training merger full, language lora: 33,024 of 193,152 numbers; 6 steps" in task.screen
    assert re.search(r"step 6/6  loss .* samples/s .* tokens/s .* % of peak .* GB", task.screen)
    load_answerer(str(run), "cpu")


def test_metrics_say_everything_about_each_step(task: Task) -> None:
    task.run()
    lines = [line for line in task.history() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples"] for line in lines] == [4, 4, 4, 4, 4, 2]
    assert lines[2]["epoch"] == pytest.approx(12 / 11, abs=1e-3)
    for line in lines:
        assert line["lr"].keys() == {"merger", "language"}
        assert line["tokens"] > line["supervised"] > 0
        assert line["samples_per_s"] == pytest.approx(line["samples"] / line["seconds"])
        assert line["utilisation"] > 0
        assert line["memory_gb"] > 0
    assert lines[-1]["lr"]["merger"] < lines[1]["lr"]["merger"]
    measured = [line["step"] for line in task.history() if "held_out_loss" in line]
    assert measured == [0, 2, 4, 6]


def test_separate_learning_rates_reach_their_parts(task: Task) -> None:
    rates = {"default": 0.01, "merger": 1e-6}
    train_settings = task.recipe["train"] | {"learning_rate": rates, "schedule": "constant"}
    result = task.run(train=train_settings)
    moved = {row.part: row.relative for row in result.moved if row.trained}
    assert moved["merger"] < moved["language"] / 100
    first = next(line for line in task.history() if "lr" in line)
    assert first["lr"] == {"merger": 1e-6, "language": 0.01}


def test_lora_alone_writes_no_model_and_whole_parts_no_adapter(task: Task) -> None:
    task.run(tune={"language": "lora", "lora": {"rank": 2}}, name="a")
    assert not (task.folder / "a" / "model").exists()
    task.run(tune={"language": "frozen", "vision": "full"}, name="b")
    assert not (task.folder / "b" / "adapter").exists()
    before = load_file(task.folder / "tiny" / "model.safetensors")
    after = load_file(task.folder / "b" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("visual.") and "merger" not in name for name in changed)


def test_a_mixed_run_answers_with_both_of_its_halves(task: Task) -> None:
    """The adapter lies on top of the whole parts that were trained beside it."""
    task.run()
    answerer = load_answerer(str(task.folder / "run"), "cpu")
    values = load_file(task.folder / "run" / "checkpoints" / "step-6" / "trainable.safetensors")
    parameters = dict(answerer.model.named_parameters())
    assert len(values) > 20
    for name, value in values.items():
        assert torch.equal(parameters[name].detach(), value), name


def test_another_run_is_refused_and_a_finished_one_stays(task: Task) -> None:
    first = task.run()
    with pytest.raises(UserError, match="holds another run"):
        task.run()
    before = (task.folder / "run" / "metrics.jsonl").read_bytes()
    assert task.run(resume=True) == first
    assert "come to its end already" in task.screen
    assert (task.folder / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_allows_what_does_not_touch_the_arithmetic(task: Task) -> None:
    task.unfinished()
    result = task.run("train.workers=1", "train.keep=5", "train.save_every=1", resume=True)
    assert result.steps == 6
    assert [step for step, _ in losses(task.folder / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors"),
        (
            lambda folder: (folder / "trainable.safetensors").write_bytes(b"x"),
            "trainable.safetensors",
        ),
    ],
)
def test_resume_from_a_damaged_checkpoint(task: Task, spoil: Any, words: str) -> None:
    task.recipe["train"]["keep"] = 3
    run = task.unfinished()
    spoil(run / "checkpoints" / "step-4")
    assert task.run(resume=True).steps == 6
    assert words in task.screen
    assert "going on from that of step 2" in task.screen
    assert (run / "checkpoints" / "damaged-step-4").is_dir()
    spoil(run / "checkpoints" / "step-2")
    (run / "result.json").unlink()
    for step in (4, 6):
        storage.remove_folder(run / "checkpoints" / f"step-{step}")
    with pytest.raises(UserError) as caught:
        task.run(resume=True)
    assert words in str(caught.value)
    assert "to start from the beginning" in caught.value.remedy


def test_damaged_pictures_are_counted_and_the_run_goes_on(task: Task) -> None:
    (task.folder / "train2.png").write_bytes(b"no picture")
    whole = (task.folder / "train5.png").read_bytes()
    (task.folder / "train5.png").write_bytes(whole[:-30])
    result = task.run()
    dropped = [name for line in task.history() for name in line.get("dropped", [])]
    assert dropped == ["train5", "train5"]
    listed = (task.folder / "run" / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in listed] == ["train2"]
    assert result.dropped == 3
    assert "dropped train2" in task.screen
    assert "dropped train5" in task.screen
    with pytest.raises(DamagedPicture, match=r"train2\.png"):
        task.run("data.unusable=refuse", name="strict")
    assert not (task.folder / "strict").exists()


def test_damaged_held_out_pictures_are_counted_and_never_a_loss_of_zero(task: Task) -> None:
    for number in range(3):
        path = task.folder / f"eval{number}.png"
        path.write_bytes(path.read_bytes()[:-30])
        if number == 0:
            task.run()
            assert "1 held-out samples left out, eval0: " in task.screen
    with pytest.raises(UserError, match="not one of 3 samples has a picture that can be decoded"):
        task.run(name="blind")
    with pytest.raises(DamagedPicture, match=r"eval0\.png"):
        task.run("data.unusable=refuse", name="strict")


def test_a_damaged_result_is_explained_and_written_again(task: Task) -> None:
    first = task.run()
    (task.folder / "run" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"not a result[\s\S]*delete it"):
        task.run(resume=True)
    (task.folder / "run" / "result.json").unlink()
    assert task.run(resume=True) == first


def test_full_memory_is_explained(task: Task) -> None:
    def refuse(module: torch.nn.Module, inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    hook = register_module_forward_pre_hook(refuse)
    try:
        with pytest.raises(UserError, match=r"memory is full[\s\S]*tune\.nf4=\[language\]"):
            task.run()
    finally:
        hook.remove()


def test_a_run_in_progress_is_not_touched_by_a_second_one(task: Task) -> None:
    task.unfinished()
    run = Run(task.folder / "run")
    half_written = run.checkpoints / ".step-6.partial"
    with run.locked():
        half_written.mkdir()
        with pytest.raises(UserError, match="another process is training"):
            task.run(resume=True)
        assert half_written.exists()


def test_a_run_that_began_meanwhile_is_not_overwritten(task: Task) -> None:
    class Quicker(storage.Disk):
        """Another process begins the same run just before this one makes the folder."""

        def make_folder(self, path: Path) -> None:
            super().make_folder(path)
            if path.name == "run":
                (path / "manifest.json").write_text("its own")

    with storage.using(Quicker()), pytest.raises(UserError, match="holds another run"):
        task.run()
    assert [path.name for path in (task.folder / "run").iterdir()] == ["manifest.json"]


def test_a_part_that_cannot_learn_is_reported(task: Task) -> None:
    """Text alone gives the merger nothing to learn."""
    turns = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    lines = [json.dumps({"id": str(i), "messages": turns}) for i in range(4)]
    (task.folder / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"no gradient came to the 6 tensors of merger"):
        task.run()
    assert re.search(r"merger +trained +6 ", task.screen)
    assert not (task.folder / "run" / "model").exists()


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(task: Task) -> None:
    settings = task.recipe["train"] | {
        "learning_rate": 1e20,
        "clip": None,
        "save_every": 1,
        "schedule": "constant",
        "warmup": 3,
    }
    with pytest.raises(UserError, match=r"(loss|gradient norm) of step|(held-out loss)"):
        task.run(train=settings)
    for folder in (task.folder / "run" / "checkpoints").glob("step-*"):
        values = load_file(folder / "trainable.safetensors")
        assert all(value.isfinite().all() for value in values.values())


def test_full_disk_at_a_checkpoint_is_explained(task: Task) -> None:
    class FullDisk(storage.Disk):
        def sync_path(self, path: Path) -> None:
            if path.name == "optimizer.safetensors":
                raise OSError(28, "No space left on device")
            super().sync_path(path)

    with storage.using(FullDisk()), pytest.raises(UserError, match="no space left"):
        task.run()
    assert list((task.folder / "run" / "checkpoints").iterdir()) == []
    assert task.run(resume=True).steps == 6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_end_to_end(task: Task, precision: str) -> None:
    result = task.run(f"train.precision={precision}")
    assert result.before is not None
    assert result.after is not None
    assert result.after.held_out_loss < result.before.held_out_loss
    stored = load_file(task.folder / "run" / "model" / "model.safetensors")
    expected = torch.bfloat16 if precision == "bf16" else torch.float16
    assert {tensor.dtype for tensor in stored.values()} == {expected}


def test_sixteen_bits_where_all_pictures_have_one_size(task: Task) -> None:
    """16 patches each, and packs of other numbers than even ones."""
    folder = make_tiny(task.folder / "square", "qwen")
    config = json.loads((folder / "config.json").read_text())
    config["visual"]["image_size"] = 56
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "sha256.json").unlink()
    one = ("train.precision=bf16", "train.steps=1", "train.epochs=null", "train.pack_tokens=130")
    assert task.run(*one, model=str(folder), picture=None).steps == 1


@pytest.mark.parametrize(
    "tune",
    [
        {"vision": "lora", "merger": "lora", "language": "lora", "embeddings": "full"},
        {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"},
        {"merger": "full", "language": "lora"},
    ],
    ids=["adapters everywhere", "all whole", "vision frozen"],
)
def test_recompute_changes_nothing_but_memory(task: Task, tune: dict[str, Any]) -> None:
    tune = tune | {"lora": {"rank": 2, "dropout": 0.2}}
    task.run(name="plain", tune=tune)
    task.run("train.recompute=true", name="recomputed", tune=tune)
    task.run("train.recompute=0.5", name="half", tune=tune)
    names = ("plain", "recomputed", "half")
    assert len({tuple(losses(task.folder / name)) for name in names}) == 1
    weights = {
        (task.folder / name / "checkpoints" / "step-6" / "trainable.safetensors").read_bytes()
        for name in names
    }
    assert len(weights) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_with_readers_stopped_and_resumed(task: Task) -> None:
    settings = ("train.device=cuda", "train.precision=bf16", "train.workers=2")
    first = task.run(*settings)
    assert first.before is not None
    assert first.after is not None
    assert first.after.held_out_loss < first.before.held_out_loss
    whole = losses(task.folder / "run")
    (task.folder / "run" / "result.json").unlink()
    storage.remove_folder(task.folder / "run" / "checkpoints" / "step-6")
    task.run(*settings, resume=True)
    again = losses(task.folder / "run")
    assert [step for step, _ in again] == [1, 2, 3, 4, 5, 6]
    assert again[:4] == whole[:4]
    # What is restored is exact; kernels that add in no fixed order are not.
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in whole], rel=0.02)
    assert all(line["seconds"] > 0 for line in task.history() if "loss" in line)


def test_a_data_file_that_changes_costs_no_step(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run with a checkpoint of what was learned so far; put back, the run goes on."""
    file = task.folder / "train.jsonl"
    content, changed = file.read_bytes(), file.stat()
    real = loop.take_step

    def taking(session: Session, step: Step, *rest: Any) -> Taken:
        if step.number == 2:
            file.write_bytes(content + b"\n")
        return real(session, step, *rest)

    monkeypatch.setattr(loop, "take_step", taking)
    with pytest.raises(UserError, match="has changed"):
        task.run(train=task.recipe["train"] | {"save_every": 6})
    assert [path.name for path in (task.folder / "run" / "checkpoints").iterdir()] == ["step-3"]
    file.write_bytes(content)
    os.utime(file, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    monkeypatch.undo()
    assert task.run(train=task.recipe["train"] | {"save_every": 6}, resume=True).steps == 6
