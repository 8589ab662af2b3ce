"""End of a run: parameter audit, exported weights and logged comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_task import TinyTask

from finesight.errors import UserError
from finesight.evaluate.bootstrap import REASON_FEW_SAMPLES
from finesight.evaluate.generation_eval import load_eval_inputs
from finesight.evaluate.metric_difference import REASON_NO_PREDICTIONS, REASON_UNSAMPLED
from finesight.export.model_card import collect_uploads
from finesight.files.storage import sha256_file
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.train.finalize import RunResult

ALL_LORA = {"merger": "lora", "language": "lora", "lora": {"rank": 4, "dropout": 0.1}}
# Metrics of the number of prediction files, which grows with each evaluation.
METRICS = """
from pathlib import Path

def count():
    return float(len(list((Path(__file__).parent / "run" / "predictions").glob("*.jsonl"))))

def same(case):
    return 0.0

def falls(case):
    return -count()

def rises_and_falls(case):
    return {"score": -abs(count() - 2.0), "length": len(case.answer)}
"""


def metric(task: TinyTask, function: str, text: str = METRICS, **more: Any) -> dict[str, Any]:
    path = task.folder / "mine.py"
    path.write_text(text)
    return {"metric": f"{path}:{function}", "every": 1, "max_new_tokens": 3} | more


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_worsening_run_stops_early(task):
    settings, run = metric(task, "falls", patience=3), task.folder / "run"
    result = task.run(eval=settings)
    assert (result.steps, result.stopped_early, result.samples) == (4, True, 16)
    assert "stopping after step 4 of 6: 3 evaluations without a better score" in task.console_output
    assert [line["step"] for line in task.read_metrics() if "loss" in line] == [1, 2, 3, 4]
    assert result.weights_step == 1
    assert task.run(eval=settings, resume=True) == result
    # Missing predictions drop only the intervals.
    for path in (run / "result.json", *(run / "predictions").glob("*.jsonl")):
        path.unlink()
    again = task.run(eval=settings, resume=True)
    assert again.stopped_early
    assert {one.low for one in again.metric_differences} == {None}


@pytest.mark.parametrize(
    ("image", "limits"),
    [
        ({"min_pixels": 784, "max_pixels": 7056}, [784, 7056]),
        ({"height": 100, "width": 60}, [112 * 56, 112 * 56]),
    ],
)
def test_model_folder_has_the_pixel_limits_of_the_run(task, image, limits):
    """Other programs read them from a folder that was uploaded without a merge."""
    task.run(image=image)
    settings = json.loads((task.folder / "run" / "model" / "preprocessor_config.json").read_text())
    assert [settings["min_pixels"], settings["max_pixels"]] == limits
    base = json.loads((task.folder / "tiny" / "preprocessor_config.json").read_text())
    assert settings == base | dict(zip(("min_pixels", "max_pixels"), limits, strict=True))


def test_best_checkpoint_weights_are_restored(task):
    """Step 2 has the best score, although the loss keeps falling."""
    settings = metric(task, "rises_and_falls", patience=2)
    result = task.run("train.keep_checkpoints=1", "train.save_every=1", eval=settings)
    run = task.folder / "run"
    assert (result.weights_step, result.steps, result.stopped_early) == (2, 4, True)
    best = result.best_eval
    assert (best.step, best.primary_metric, best.primary_score) == (2, "score", 0.0)
    assert result.after.step == 2
    model = load_file(run / "model" / "model.safetensors")
    stored, last = (
        load_file(run / "checkpoints" / f"step-{step}" / "trainable.safetensors") for step in (2, 4)
    )
    name = next(name for name in stored if name in model)
    assert (model[name] == stored[name]).all()
    assert not (model[name] == last[name]).all()
    answers = {(run / "predictions" / f"{name}.jsonl").read_text() for name in ("after", "step-2")}
    assert len(answers) == 1
    assert "restoring the weights of step 2" in task.console_output
    assert list_names(run / "checkpoints") == ["step-2", "step-4"]


def test_last_weights_compete_with_best(task):
    """The scores are equal, so the lowest loss decides. The metric is copied into the run."""
    result = task.run(eval=metric(task, "same", patience=50, every=4))
    run = task.folder / "run"
    assert (result.weights_step, result.steps, result.stopped_early) == (6, 6, False)
    assert list_names(run / "predictions") == [
        f"{name}.jsonl" for name in ("after", "before", "step-4", "step-6")
    ]
    assert (run / "metric.py").read_text() == METRICS
    (task.folder / "mine.py").unlink()
    assert load_eval_inputs(str(run))[1].metric == f"{run / 'metric.py'}:same"
    with pytest.raises(UserError, match="no function 'same'"):
        task.run(eval=metric(task, "same", "def other(case): return 1\n"), name="broken")
    assert not (task.folder / "broken").exists()


def test_checkpoint_of_a_stopped_run_can_be_used(task):
    task.run("train.keep_checkpoints=3", tune=ALL_LORA, eval=metric(task, "same", every=2))
    run = task.folder / "run"
    trained = load_inference_model(str(run), "cpu").model.state_dict()
    for name in ("adapter", "result.json"):
        (run / name).rename(task.folder / name)
    with pytest.raises(UserError, match="the run is not finished") as caught:
        load_inference_model(str(run), "cpu")
    newest, checkpoint = (f"{run}/checkpoints/step-{step}" for step in (6, 2))
    assert f"give its newest checkpoint, {newest}, or resume it: " in str(caught.value.remedy)
    for _ in range(2):  # the adapter is written once
        loaded = load_inference_model(newest, "cpu").model.state_dict()
        assert trained.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    earlier = load_inference_model(checkpoint, "cpu").model.state_dict()
    assert any(not torch.equal(earlier[name], trained[name]) for name in trained)
    adapters = {path.name for path in run.glob("adapter*") if path.is_dir()}
    assert adapters == {"adapter-step-2", "adapter-step-6"}
    assert len(load_eval_inputs(checkpoint, metric="ocr")[0]) == 3
    with collect_uploads(resolve_model_source(checkpoint), checkpoint) as files:
        card = files["README.md"].read_text()
    evaluations = [line for line in task.read_metrics() if "validation_loss" in line]
    losses = {line["step"]: line["validation_loss"] for line in evaluations}
    assert f"# {task.folder.name}-step-2\n" in card
    assert "2 steps." in card
    assert f"| validation_loss | {losses[0]:.4f} | {losses[2]:.4f} |" in card


def test_checkpoint_without_some_lora_weights_is_rejected(task):
    task.run(tune=ALL_LORA)
    folder = task.folder / "run" / "checkpoints" / "step-6"
    weights = load_file(folder / "trainable.safetensors")
    removed = next(name for name in weights if name.endswith("lora_A"))
    del weights[removed]
    save_file(weights, folder / "trainable.safetensors")
    digests = json.loads((folder / "sha256.json").read_text())
    digests["trainable.safetensors"] = sha256_file(folder / "trainable.safetensors")
    (folder / "sha256.json").write_text(json.dumps(digests))
    with pytest.raises(UserError, match=rf"lacks 1 of {len(weights) + 1} LoRA weights: {removed}"):
        load_inference_model(str(folder), "cpu")
    assert not (task.folder / "run" / "adapter-step-6").exists()


def test_final_comparison_has_intervals(task):
    task.recipe["eval"] = {"metric": "ocr", "max_new_tokens": 3}
    result, run = task.run(), task.folder / "run"
    loss, similarity, exact = result.metric_differences[:3]
    assert (loss.name, similarity.name) == ("validation_loss", "similarity")
    assert (loss.low, loss.high, loss.note) == (None, None, REASON_UNSAMPLED)
    # Of so few samples, only a difference of two proportions has an interval.
    assert (similarity.low, similarity.high, similarity.note) == (None, None, REASON_FEW_SAMPLES)
    assert exact.low <= exact.after - exact.before <= exact.high
    assert result.after.intervals.keys() == result.after.scores.keys()
    for text in ("exact: 0 of 3 answers correct before", "similarity*", "95 % interval"):
        assert text in task.console_output
    assert f"similarity, cer, wer: {REASON_FEW_SAMPLES}" in task.console_output
    stored = json.loads((run / "result.json").read_text())
    assert RunResult.model_validate_json(json.dumps(stored)) == result
    # A result of an older version is read.
    for name in ("metric_differences", "best_eval", "weights_step", "stopped_early"):
        del stored[name]
    for name in ("before", "after"):
        del stored[name]["intervals"], stored[name]["details"], stored[name]["notes"]
    older = RunResult.model_validate_json(json.dumps(stored))
    assert (older.metric_differences, older.stopped_early) == ((), False)
    with pytest.raises(UserError, match="is a checkpoint of full fine-tuning"):
        load_inference_model(str(run / "checkpoints" / "step-6"), "cpu")
    # Without the predictions before training, the scores remain.
    (run / "result.json").unlink()
    (run / "predictions" / "before.jsonl").unlink()
    differences = task.run(resume=True).metric_differences
    assert {one.low for one in differences} == {None}
    assert {one.note for one in differences} == {REASON_UNSAMPLED, REASON_NO_PREDICTIONS}
    assert "similarity" in [one.name for one in differences]
