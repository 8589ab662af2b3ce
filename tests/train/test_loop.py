"""Whole runs of the tiny task: what they write, what they refuse, what they show."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_run import losses, make_task, write_recipe

from finesight import storage
from finesight.data.headers import DamagedPicture
from finesight.errors import UserError
from finesight.infer.load import load_answerer
from finesight.recipe import load_recipe
from finesight.train.finish import RunResult
from finesight.train.loop import train


class Task:
    """The tiny task in a folder; `run` trains it with settings of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = make_task(folder)
        self.screen = ""

    def run(
        self, *overrides: str, name: str = "run", resume: bool = False, **groups: Any
    ) -> RunResult:
        recipe = self.recipe | groups | {"output": str(self.folder / name)}
        path = write_recipe(self.folder / "recipe.yaml", recipe)
        shown = io.StringIO()
        console = Console(file=shown, width=200)
        try:
            return train(load_recipe(path, overrides), resume=resume, console=console)
        finally:
            self.screen = shown.getvalue()

    def history(self, name: str = "run") -> list[dict[str, Any]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)


def test_a_run_leaves_what_the_design_says(task: Task) -> None:
    result = task.run(eval={"metric": "ocr", "every": 4, "max_new_tokens": 6})
    run = task.folder / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        *("adapter", "checkpoints", "dropped.jsonl", "manifest.json", "metrics.jsonl", "model"),
        *("moved.json", "predictions", "recipe.yaml", "result.json"),
    ]
    for folder in (run / "adapter", run / "model", run / "checkpoints" / "step-6"):
        storage.verify_folder(folder)
    names = sorted(path.name for path in (run / "predictions").iterdir())
    assert names == ["after.jsonl", "before.jsonl", "step-4.jsonl"]
    assert load_recipe(run / "recipe.yaml").train.batch == 4
    assert RunResult.model_validate_json((run / "result.json").read_text()) == result
    assert result.before is not None
    assert result.after is not None
    assert result.after.held_out_loss < result.before.held_out_loss
    assert (result.steps, result.samples, result.dropped) == (6, 22, 0)
    assert "similarity" in task.screen
    assert "training merger full, language lora: 33,024 of 195,840 numbers; 6 steps" in task.screen
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
    assert task.history()[2]["lr"] == {"merger": 1e-6, "language": 0.01}


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


def test_going_on_from_a_run_and_from_its_adapter(task: Task) -> None:
    lora = {"language": "lora", "lora": {"rank": 2, "dropout": 0.0}}
    first = task.run(tune=lora, name="first")
    assert first.after is not None
    for number, start in enumerate(
        (
            {"model": str(task.folder / "first")},
            {"adapter": str(task.folder / "first")},
            {"adapter": str(task.folder / "first" / "adapter")},
        )
    ):
        result = task.run(tune=lora, name=f"second{number}", **start)
        assert result.before is not None
        assert result.before.held_out_loss == pytest.approx(first.after.held_out_loss, rel=1e-6)
    with pytest.raises(UserError, match="rank 2"):
        task.run(tune={"language": "lora"}, name="third", adapter=str(task.folder / "first"))
    assert not (task.folder / "third").exists()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        task.run(name="fourth", adapter=str(task.folder / "tiny"))


def test_another_run_is_refused_and_a_finished_one_stays(task: Task) -> None:
    first = task.run()
    with pytest.raises(UserError, match="holds another run"):
        task.run()
    before = (task.folder / "run" / "metrics.jsonl").read_bytes()
    assert task.run(resume=True) == first
    assert "come to its end already" in task.screen
    assert (task.folder / "run" / "metrics.jsonl").read_bytes() == before


def unfinished(task: Task) -> Path:
    """A run whose end has not been written yet."""
    task.run()
    run = task.folder / "run"
    (run / "result.json").unlink()
    storage.remove_folder(run / "checkpoints" / "step-6")
    return run


def test_resume_refuses_other_settings_and_other_data(task: Task) -> None:
    run = unfinished(task)
    with pytest.raises(UserError) as caught:
        task.run("train.batch=5", "tune.lora.rank=4", "train.weight_decay=0.5", resume=True)
    assert "train.batch is 5 now" in caught.value.what
    assert "train.weight_decay=0.01" in caught.value.expected
    assert str(run / "checkpoints" / "step-4") in caught.value.where
    with (task.folder / "train.jsonl").open("a") as file:
        file.write((task.folder / "train.jsonl").read_text().splitlines()[0].replace("0", "1"))
    with pytest.raises(UserError, match=r"data\.train is"):
        task.run(resume=True)


def test_resume_allows_what_does_not_touch_the_arithmetic(task: Task) -> None:
    unfinished(task)
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
    run = unfinished(task)
    spoil(run / "checkpoints" / "step-4")
    with pytest.raises(UserError) as caught:
        task.run(resume=True)
    assert words in str(caught.value)
    assert "to resume from step 2" in caught.value.remedy


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


def test_recompute_changes_nothing_but_memory(task: Task) -> None:
    task.run(name="plain")
    task.run("train.recompute=true", name="recomputed")
    assert losses(task.folder / "plain") == losses(task.folder / "recomputed")


def test_eval_without_data_is_refused_at_once(task: Task) -> None:
    data = {"train": task.recipe["data"]["train"]}
    with pytest.raises(UserError, match=r"data\.eval"):
        task.run(data=data, eval={"metric": "ocr"})
    assert task.run(data=data).before is None


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
