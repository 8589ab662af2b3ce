"""A family without native code trains, measures, answers and resumes like the native ones."""

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from safetensors.torch import load_file
from tiny_task import TinyTask, assert_same_run

from finesight.cli.app import run_command as command
from finesight.encode.renderer_builder import build_renderer
from finesight.errors import UserError
from finesight.files.storage import remove_folder
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import predict
from finesight.model_folder import ModelFolder

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
ALL = {"vision": "lora", "merger": "full", "language": "lora", "lora": LORA["lora"]}
FULL_FINETUNE = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}


@pytest.fixture(scope="module", params=["llava", "idefics3"])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    make = {"llava": hf_models.make_llava, "idefics3": hf_models.make_idefics3}[request.param]
    made = TinyTask(tmp_path_factory.mktemp("borrowed") / "task")
    model = make(made.folder / request.param)
    try:
        build_renderer(ModelFolder(model))
    except UserError as error:
        if "torchvision" in str(error):
            pytest.skip("this transformers requires torchvision for images")
        raise
    made.recipe |= {"model": str(model), "image": None, "tune": LORA}
    return made


@pytest.fixture(scope="module")
def tuned(task: TinyTask) -> Path:
    task.run("train.epochs=6", name="tuned", eval={"metric": "qa", "max_new_tokens": 5})
    return task.folder / "tuned"


def make_question(task: TinyTask) -> Any:
    return hf_models.make_sample(task.folder, ("Which colour?", ""))


def read_run_losses(task: TinyTask, name: str, key: str = "loss") -> list[float]:
    return [line[key] for line in task.read_metrics(name) if key in line]


@torch.no_grad()
def logits(model: Any, run: Path, task: TinyTask) -> torch.Tensor:
    """Of the run's model, or of another one given the same question."""
    answerer = load_inference_model(str(run), "cpu")
    prompt = answerer.renderer.load_patches(answerer.renderer.tokenize_prompt(make_question(task)))
    ids = torch.from_numpy(prompt.tokenized.ids_T).long()[None]
    source_model = answerer.model.inner if model is None else model
    found: torch.Tensor = source_model(input_ids=ids, **prompt.hf_inputs).logits
    return found


def test_loss_decreases_and_limits_are_reported(task, tuned):
    output = task.console_output
    assert "has no native implementation in finesight and runs through transformers" in output
    for key in ("loss", "validation_loss"):
        losses = read_run_losses(task, "tuned", key)
        assert losses[-1] < 0.6 * losses[0]
    assert (tuned / "report.html").is_file()


def test_adapter_gives_the_same_logits_in_peft(task, tuned):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(task.recipe["model"])
    baseline = logits(base, tuned, task)
    theirs = logits(PeftModel.from_pretrained(base, tuned / "adapter").eval(), tuned, task)
    ours = logits(None, tuned, task)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - baseline).abs().max() > 0.1


def test_run_predicts_and_is_evaluated(task, tuned, capsys):
    image = str(task.folder / "train0.png")
    assert command(["predict", str(tuned), image, "--prompt", "Which colour?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["boxes"] == []
    assert command(["eval", str(tuned), "--limit", "2", "--max-new-tokens", "3"]) == 0
    assert "qa: 2 samples" in capsys.readouterr().out


def test_full_finetune_loads_in_transformers(task):
    from transformers import AutoModelForImageTextToText

    train = task.recipe["train"] | {"learning_rate": 0.001}
    task.run(name="whole", tune=FULL_FINETUNE, train=train)
    run = task.folder / "whole"
    theirs = AutoModelForImageTextToText.from_pretrained(run / "model")
    torch.testing.assert_close(logits(None, run, task), logits(theirs, run, task))
    changed = {row["part"]: row for row in json.loads((run / "param_audit.json").read_text())}
    assert all(row["is_trained"] for row in changed.values())
    stored, base = load_file(run / "model/model.safetensors"), Path(task.recipe["model"])
    assert stored.keys() == load_file(base / "model.safetensors").keys()
    answerer = load_inference_model(str(run / "model"), "cpu")
    requested = [make_question(task)]
    assert predict(answerer.model, answerer.renderer, requested, max_new_tokens=2, batch_size=1)


def test_tied_lm_head_stays_tied(task, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = hf_models.make_llava(tmp_path / "tied", tied=True)
    task.run("train.epochs=1", name=f"tied {tmp_path.name}", model=str(model), tune=FULL_FINETUNE)
    run = task.folder / f"tied {tmp_path.name}"
    stored = load_file(run / "model/model.safetensors")
    assert stored.keys() == load_file(model / "model.safetensors").keys()
    theirs = AutoModelForImageTextToText.from_pretrained(run / "model")
    torch.testing.assert_close(logits(None, run, task), logits(theirs, run, task))


def test_resumed_run_is_bit_identical(task):
    task.run(name="straight", tune=ALL)
    task.run(name="resumed", tune=ALL)
    resumed = task.folder / "resumed"
    (resumed / "result.json").unlink()
    for folder in ("checkpoints/step-6", "adapter", "model"):
        remove_folder(resumed / folder)
    task.run(name="resumed", tune=ALL, resume=True)
    assert_same_run(resumed, task.folder / "straight")


@pytest.mark.filterwarnings("error:.*checkpointing:FutureWarning")
def test_settings_of_memory_and_workers_do_not_change_the_loss(task):
    def train_two_steps(name: str, *overrides: str) -> list[float]:
        task.run("train.steps=2", "train.epochs=null", *overrides, name=name)
        return read_run_losses(task, name)

    baseline = train_two_steps("plain")
    assert train_two_steps("workers", "train.num_workers=2") == baseline
    for choice in ("true", "false"):
        found = train_two_steps(choice, f"train.activation_checkpointing={choice}")
        assert found == pytest.approx(baseline, rel=1e-5)
    train_two_steps("bf16", "train.precision=bf16")
    model = load_inference_model(str(task.folder / "bf16"), "cpu", "bf16").model
    assert model.lm_head_weight.itemsize == 2


def test_training_continues_from_adapter(task, tuned):
    task.run("train.steps=1", "train.epochs=null", name="further", adapter=str(tuned))
    start = read_run_losses(task, "tuned")[0]
    assert read_run_losses(task, "further")[0] < 0.7 * start


def test_data_commands_work_but_not_those_of_native_families(task, tuned, capsys):
    recipe = str(tuned / "recipe.yaml")
    assert command(["check", recipe]) == 0
    assert command(["show", recipe]) == 0
    assert "supervised: " in capsys.readouterr().out
    assert command(["show", recipe, "--html", str(task.folder / "page.html")]) == 2
    assert "a model of a native family" in capsys.readouterr().err
    assert command(["merge", str(tuned), str(task.folder / "merged")]) == 2
    assert "merge_and_unload" in capsys.readouterr().err
    for few in ("nf4", "fp8"):
        with pytest.raises(UserError, match=rf"tune\.quantize\.{few}"):
            task.run(name=few, tune=LORA | {"quantize": {few: ["language"]}})
