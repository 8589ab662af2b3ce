"""A family without native code trains, measures, answers and resumes like the native ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import borrowed
import pytest
import torch
from safetensors.torch import load_file
from small_run import Task, final_files

from finesight.cli.app import run as command
from finesight.encode.rendering import renderer_of
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.load import load_answerer
from finesight.infer.predict import predict
from finesight.storage import remove_folder

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
ALL = {"vision": "lora", "merger": "full", "language": "lora", "lora": LORA["lora"]}
WHOLE = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}


@pytest.fixture(scope="module", params=["llava", "idefics3"])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    make = {"llava": borrowed.llava, "idefics3": borrowed.idefics3}[request.param]
    made = Task(tmp_path_factory.mktemp("borrowed") / "task")
    model = make(made.folder / request.param)
    try:
        renderer_of(ModelFolder(model))
    except UserError as error:
        if "torchvision" in str(error):
            pytest.skip("this transformers reads its pictures with torchvision alone")
        raise
    made.recipe |= {"model": str(model), "picture": None, "tune": LORA}
    return made


@pytest.fixture(scope="module")
def tuned(task: Task) -> Path:
    task.run("train.epochs=6", name="tuned", eval={"metric": "qa", "max_new_tokens": 5})
    return task.folder / "tuned"


def asked(task: Task) -> Any:
    return borrowed.sample(task.folder, ("Which colour?", ""))


@torch.no_grad()
def logits(model: Any, run: Path, task: Task) -> torch.Tensor:
    """Of the run's model, or of another one given the same question."""
    answerer = load_answerer(str(run), "cpu")
    prompt = answerer.renderer.with_patches(answerer.renderer.prompt_outline(asked(task)))
    ids = torch.from_numpy(prompt.outline.ids_T).long()[None]
    asked_of = answerer.model.inner if model is None else model
    found: torch.Tensor = asked_of(input_ids=ids, **prompt.inputs).logits
    return found


def test_the_loss_falls_and_limits_are_said(task: Task, tuned: Path) -> None:
    assert "has no code of its own in finesight: transformers computes it" in task.screen
    losses = [line["loss"] for line in task.history("tuned") if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    measured = [x["held_out_loss"] for x in task.history("tuned") if "held_out_loss" in x]
    assert measured[-1] < 0.6 * measured[0]
    assert (tuned / "report.html").is_file()


def test_the_adapter_gives_the_same_logits_in_peft(task: Task, tuned: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(task.recipe["model"])
    plain = logits(base, tuned, task)
    theirs = logits(PeftModel.from_pretrained(base, tuned / "adapter").eval(), tuned, task)
    ours = logits(None, tuned, task)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1


def test_a_run_answers_and_is_measured(
    task: Task, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(task.folder / "train0.png")
    assert command(["predict", str(tuned), picture, "--prompt", "Which colour?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["boxes"] == []
    assert command(["eval", str(tuned), "--limit", "2", "--max-new-tokens", "3"]) == 0
    assert "qa: 2 samples" in capsys.readouterr().out


def test_all_parts_whole_are_read_by_transformers(task: Task) -> None:
    from transformers import AutoModelForImageTextToText

    task.run(name="whole", tune=WHOLE, train=task.recipe["train"] | {"learning_rate": 0.001})
    run = task.folder / "whole"
    theirs = AutoModelForImageTextToText.from_pretrained(run / "model")
    torch.testing.assert_close(logits(None, run, task), logits(theirs, run, task))
    moved = {row["part"]: row for row in json.loads((run / "moved.json").read_text())}
    assert all(row["trained"] for row in moved.values())
    stored, base = load_file(run / "model/model.safetensors"), Path(task.recipe["model"])
    assert stored.keys() == load_file(base / "model.safetensors").keys()
    answerer = load_answerer(str(run / "model"), "cpu")
    assert predict(answerer.model, answerer.renderer, [asked(task)], max_new_tokens=2, batch=1)


def test_a_tied_head_stays_tied(task: Task, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = borrowed.llava(tmp_path / "tied", tied=True)
    task.run("train.epochs=1", name=f"tied {tmp_path.name}", model=str(model), tune=WHOLE)
    run = task.folder / f"tied {tmp_path.name}"
    stored = load_file(run / "model/model.safetensors")
    assert stored.keys() == load_file(model / "model.safetensors").keys()
    theirs = AutoModelForImageTextToText.from_pretrained(run / "model")
    torch.testing.assert_close(logits(None, run, task), logits(theirs, run, task))


def test_a_resumed_run_ends_with_the_same_bits(task: Task) -> None:
    task.run(name="straight", tune=ALL)
    task.run(name="resumed", tune=ALL)
    resumed = task.folder / "resumed"
    (resumed / "result.json").unlink()
    for folder in ("checkpoints/step-6", "adapter", "model"):
        remove_folder(resumed / folder)
    task.run(name="resumed", tune=ALL, resume=True)
    found, expected = final_files(resumed), final_files(task.folder / "straight")
    assert found == expected


def test_reading_processes_change_no_number(task: Task) -> None:
    for workers in (0, 2):
        task.run(
            "train.steps=3", "train.epochs=null", f"train.workers={workers}", name=f"w{workers}"
        )
    one, other = ([x["loss"] for x in task.history(f"w{n}") if "loss" in x] for n in (0, 2))
    assert one == other


def test_recomputed_activations_change_no_number(task: Task) -> None:
    for chosen in ("true", "false"):
        task.run("train.steps=2", "train.epochs=null", f"train.recompute={chosen}", name=chosen)
    one, other = ([x["loss"] for x in task.history(n) if "loss" in x] for n in ("true", "false"))
    assert one == pytest.approx(other, rel=1e-5)


def test_sixteen_bits_on_a_cpu(task: Task) -> None:
    task.run("train.steps=2", "train.epochs=null", "train.precision=bf16", name="bf16")
    assert load_answerer(str(task.folder / "bf16"), "cpu", "bf16").model.head_weight.itemsize == 2


def test_an_adapter_is_trained_on(task: Task, tuned: Path) -> None:
    task.run("train.steps=1", "train.epochs=null", name="further", adapter=str(tuned))
    first = next(x["loss"] for x in task.history("further") if "loss" in x)
    start = next(x["loss"] for x in task.history("tuned") if "loss" in x)
    assert first < 0.7 * start


def test_samples_are_checked_and_shown_without_a_page(
    task: Task, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tuned / "recipe.yaml")
    assert command(["data", "check", recipe]) == 0
    assert command(["data", "show", recipe]) == 0
    assert "learned: " in capsys.readouterr().out
    assert command(["data", "show", recipe, "--html", str(task.folder / "page.html")]) == 2
    assert "a model of a native family" in capsys.readouterr().err


def test_few_bits_and_merging_are_refused(
    task: Task, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for few in ("nf4", "fp8"):
        with pytest.raises(UserError, match=rf"tune\.{few}"):
            task.run(name=few, tune=LORA | {few: ["language"]})
    assert command(["merge", str(tuned), str(task.folder / "merged")]) == 2
    assert "merge_and_unload" in capsys.readouterr().err
