"""End of a run: parameter audit, exported weights and logged comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_task import TinyTask
from torch import nn

from finesight.errors import UserError
from finesight.evaluate.bootstrap import REASON_FEW_SAMPLES
from finesight.evaluate.generation_eval import load_eval_inputs
from finesight.evaluate.metric_difference import REASON_NO_PREDICTIONS, REASON_UNSAMPLED
from finesight.export.model_card import collect_uploads
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.storage import sha256_file
from finesight.train.finalize import (
    SAMPLE_SIZE,
    ParamAudit,
    RunResult,
    check_param_changes,
    compute_checksums,
)

CONSTANT = "def same(case):\n    return 0.0\n"
# Best at the second of the measurements on the way: as many answers' files are there by then.
RISES_AND_FALLS = """
from pathlib import Path

def score(case):
    done = len(list((Path(__file__).parent / "run" / "predictions").glob("*.jsonl")))
    return {"score": -abs(done - 2.0), "length": len(case.answer)}
"""

FALLS = """
from pathlib import Path

def score(case):
    return -float(len(list((Path(__file__).parent / "run" / "predictions").glob("*.jsonl"))))
"""


def _eval(task: TinyTask, text: str, function: str, **more: Any) -> dict[str, Any]:
    (task.folder / "mine.py").write_text(text)
    metric = f"{task.folder / 'mine.py'}:{function}"
    return {"metric": metric, "every": 1, "max_new_tokens": 3} | more


def _weights(run: Path, step: int) -> dict[str, Any]:
    return load_file(run / "checkpoints" / f"step-{step}" / "trainable.safetensors")


def test_worsening_run_stops_early(task: TinyTask) -> None:
    result = task.run(eval=_eval(task, FALLS, "score", patience=3))
    assert (result.steps, result.stopped_early, result.samples) == (4, True, 16)
    assert "stopping after step 4 of 6: 3 evaluations without a better score" in task.console_output
    assert [line["step"] for line in task.read_metrics() if "loss" in line] == [1, 2, 3, 4]
    assert result.weights_step == 1
    assert task.run(eval=_eval(task, FALLS, "score", patience=3), resume=True) == result


def test_best_checkpoint_weights_are_restored(task: TinyTask) -> None:
    # Step 2 has the best score, although the loss keeps falling.
    result = task.run(
        "train.keep_checkpoints=1",
        "train.save_every=1",
        eval=_eval(task, RISES_AND_FALLS, "score", patience=2),
    )
    run = task.folder / "run"
    assert (result.weights_step, result.steps, result.stopped_early) == (2, 4, True)
    assert (
        result.best_eval.step,
        result.best_eval.primary_metric,
        result.best_eval.primary_score,
    ) == (2, "score", 0.0)
    assert result.after.step == 2
    stored = _weights(run, 2)
    model = load_file(run / "model" / "model.safetensors")
    name = next(name for name in stored if name in model)
    assert (model[name] == stored[name]).all()
    assert not (model[name] == _weights(run, 4)[name]).all()
    answers = [(run / "predictions" / f"{name}.jsonl").read_text() for name in ("after", "step-2")]
    assert answers[0] == answers[1]
    assert "restoring the weights of step 2" in task.console_output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_last_weights_compete_with_best(task: TinyTask) -> None:
    result = task.run(eval=_eval(task, CONSTANT, "same", patience=50, every=4))
    # All scores are the same, so that the lowest loss decides: the last one.
    assert (result.weights_step, result.steps, result.stopped_early) == (6, 6, False)
    names = sorted(path.name for path in (task.folder / "run" / "predictions").iterdir())
    assert names == ["after.jsonl", "before.jsonl", "step-4.jsonl", "step-6.jsonl"]


def test_without_patience_last_weights_are_used(task: TinyTask) -> None:
    result = task.run("train.keep_checkpoints=1", eval=_eval(task, RISES_AND_FALLS, "score"))
    assert (result.weights_step, result.stopped_early) == (6, False)
    assert result.best_eval.step == 2
    assert "The score was better after step 2 (0.0000); its checkpoint is " in task.console_output
    assert f"finesight predict {task.folder}" not in task.console_output.partition("Try it")[0]
    steps = sorted(path.name for path in (task.folder / "run" / "checkpoints").iterdir())
    assert steps == ["step-2", "step-6"]


def test_checkpoint_of_a_stopped_run_can_be_used(task: TinyTask) -> None:
    tune = {"merger": "lora", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    metric = _eval(task, CONSTANT, "same", every=2)
    task.run("train.keep_checkpoints=3", tune=tune, eval=metric)
    run = task.folder / "run"
    trained = load_inference_model(str(run), "cpu").model.state_dict()
    for name in ("adapter", "result.json"):
        (run / name).rename(task.folder / name)
    with pytest.raises(UserError, match="the run is not finished") as caught:
        load_inference_model(str(run), "cpu")
    assert caught.value.remedy.endswith(
        f", or give its newest checkpoint, {run}/checkpoints/step-6"
    )
    for _ in range(2):  # the adapter is written once
        last = load_inference_model(f"{run}/checkpoints/step-6", "cpu")
        loaded = last.model.state_dict()
        assert trained.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], trained[name]) for name in trained)
        assert last.manifest is not None
    earlier = load_inference_model(f"{run}/checkpoints/step-2", "cpu").model.state_dict()
    assert any(not torch.equal(earlier[name], trained[name]) for name in trained)
    adapters = {path.name for path in run.glob("adapter*") if path.is_dir()}
    assert adapters == {"adapter-step-2", "adapter-step-6"}
    samples, _ = load_eval_inputs(f"{run}/checkpoints/step-2", metric="ocr")
    assert len(samples) == 3
    checkpoint = f"{run}/checkpoints/step-2"
    with collect_uploads(resolve_model_source(checkpoint), checkpoint) as files:
        card = files["README.md"].read_text()
    evaluations = [line for line in task.read_metrics() if "validation_loss" in line]
    losses = {line["step"]: line["validation_loss"] for line in evaluations}
    assert f"# {task.folder.name}-step-2\n" in card
    assert "2 steps." in card
    assert f"| validation_loss | {losses[0]:.4f} | {losses[2]:.4f} |" in card
    assert "## Recipe" in card


def test_checkpoint_without_some_lora_weights_is_rejected(task: TinyTask) -> None:
    task.run(tune={"merger": "lora", "language": "lora", "lora": {"rank": 4}})
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


def test_checkpoint_of_full_fine_tuning_is_rejected(task: TinyTask) -> None:
    task.run()
    with pytest.raises(UserError, match="is a checkpoint of full fine-tuning"):
        load_inference_model(str(task.folder / "run" / "checkpoints" / "step-6"), "cpu")


def test_final_comparison_has_intervals(task: TinyTask) -> None:
    result = task.run(eval={"metric": "ocr", "max_new_tokens": 3})
    names = [one.name for one in result.metric_differences]
    assert names[:2] == ["validation_loss", "similarity"]
    assert "exact: 0 of 3 answers correct before" in task.console_output
    loss, similarity, exact = result.metric_differences[:3]
    assert (loss.low, loss.high, loss.note) == (None, None, REASON_UNSAMPLED)
    # Of so few samples, only a difference of two proportions has an interval.
    assert (similarity.low, similarity.high, similarity.note) == (None, None, REASON_FEW_SAMPLES)
    assert exact.low is not None
    assert exact.high is not None
    assert exact.low <= exact.after - exact.before <= exact.high
    assert result.after.intervals.keys() == result.after.scores.keys()
    stored = json.loads((task.folder / "run" / "result.json").read_text())
    assert RunResult.model_validate_json(json.dumps(stored)) == result
    assert "similarity*" in task.console_output
    assert "95 % interval" in task.console_output
    assert f"validation_loss: {REASON_UNSAMPLED}" in task.console_output
    assert f"similarity, cer, wer: {REASON_FEW_SAMPLES}" in task.console_output


def test_result_of_older_version_is_read(task: TinyTask) -> None:
    task.run()
    path = task.folder / "run" / "result.json"
    stored = json.loads(path.read_text())
    for name in ("metric_differences", "best_eval", "weights_step", "stopped_early"):
        del stored[name]
    for name in ("before", "after"):
        del stored[name]["intervals"], stored[name]["details"], stored[name]["notes"]
    result = RunResult.model_validate_json(json.dumps(stored))
    assert (result.metric_differences, result.stopped_early) == ((), False)


def test_missing_predictions_drop_only_the_intervals(task: TinyTask) -> None:
    settings = {"metric": "ocr", "max_new_tokens": 3}
    task.recipe["eval"] = settings
    run = task.rewind_to_checkpoint()
    (run / "predictions" / "before.jsonl").unlink()
    result = task.run(resume=True)
    assert {one.low for one in result.metric_differences} == {None}
    assert {one.note for one in result.metric_differences} == {
        REASON_UNSAMPLED,
        REASON_NO_PREDICTIONS,
    }
    assert "similarity" in [one.name for one in result.metric_differences]


def test_scores_of_other_samples_are_not_compared(task: TinyTask) -> None:
    task.recipe["eval"] = {"metric": "ocr", "max_new_tokens": 3}
    task.rewind_to_checkpoint()
    result = task.run("eval.limit=2", resume=True)
    assert [one.name for one in result.metric_differences] == ["validation_loss"]
    assert "scores: not compared: the samples before (3) and after training (2) differ" in (
        task.console_output
    )


def test_missing_best_predictions_drop_only_the_intervals(task: TinyTask) -> None:
    settings = _eval(task, FALLS, "score", patience=2)
    task.run(eval=settings)
    run = task.folder / "run"
    (run / "result.json").unlink()
    for path in (run / "predictions").glob("*.jsonl"):
        path.unlink()
    result = task.run(eval=settings, resume=True)
    assert result.stopped_early
    assert {one.low for one in result.metric_differences} == {None}


def test_custom_metric_is_copied_into_run(task: TinyTask) -> None:
    settings = _eval(task, CONSTANT, "same", every=None)
    task.run(eval=settings)
    run = task.folder / "run"
    assert (run / "metric.py").read_text() == CONSTANT
    assert [line["primary_metric"] for line in task.read_metrics() if "primary_metric" in line] == [
        "same"
    ] * 2
    (task.folder / "mine.py").unlink()
    assert load_eval_inputs(str(run))[1].metric == f"{run / 'metric.py'}:same"


@pytest.mark.parametrize(
    ("text", "words"),
    [("def other(case): return 1\n", "no function 'same'"), ("def same(x) return", "SyntaxError")],
)
def test_broken_metric_is_rejected_before_writing(task: TinyTask, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        task.run(eval=_eval(task, text, "same"))
    assert not (task.folder / "run").exists()


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.ModuleDict({"blocks": nn.Linear(3, 5)})
        self.model = nn.ModuleDict({"layers": nn.Linear(3, 5), "norm": nn.LayerNorm(2)})
        self.to(dtype)


def watch(dtype: torch.dtype) -> tuple[Model, dict[str, torch.Tensor], ParamAudit]:
    model = Model(dtype)
    named = dict(model.named_parameters())
    masters = {n: p.detach().float() for n, p in named.items() if n.startswith("model.layers")}
    return model, masters, ParamAudit(model, masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_parts_change_and_frozen_parts_do_not(dtype: torch.dtype) -> None:
    _, masters, seen = watch(dtype)
    weight = masters["model.layers.weight"]
    before = weight.norm()
    weight.mul_(1.5)
    rows = seen.compute_changes({"model.layers.weight"})
    check_param_changes(rows)
    trained = next(row for row in rows if row.is_trained)
    assert (trained.part, trained.num_tensors, trained.num_params, trained.num_changed) == (
        "language",
        2,
        20,
        1,
    )
    start = (before**2 + masters["model.layers.bias"].norm() ** 2).sqrt()
    assert trained.relative_change == pytest.approx((0.5 * before / start).item(), rel=1e-5)
    assert {(row.part, row.num_changed) for row in rows if not row.is_trained} == {
        ("vision", 0),
        ("language", 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_frozen_parameter_is_an_internal_error(dtype: torch.dtype) -> None:
    model, masters, seen = watch(dtype)
    masters["model.layers.weight"].add_(1)
    with torch.no_grad():
        bits = model.visual["blocks"].weight.view(
            torch.int32 if dtype == torch.float32 else torch.int16
        )
        bits[2, 1] ^= 1
    with pytest.raises(RuntimeError, match="1 of 2 frozen tensors of vision changed"):
        check_param_changes(seen.compute_changes(masters))


def test_unchanged_trained_part_is_explained() -> None:
    _, masters, seen = watch(torch.float32)
    with pytest.raises(UserError, match=r"training did not change the 2[\s\S]*learning_rate"):
        check_param_changes(seen.compute_changes(masters))


def test_part_changed_only_by_weight_decay_is_explained() -> None:
    _, masters, seen = watch(torch.float32)
    masters["model.layers.weight"].mul_(0.99)
    with pytest.raises(UserError, match=r"no gradient reached the 2 trainable tensors of language"):
        check_param_changes(seen.compute_changes({"model.norm.weight"}))


def test_change_outside_the_sample_is_detected() -> None:
    masters = {"model.embed_tokens.weight": torch.zeros(2 * SAMPLE_SIZE + 1)}
    seen = ParamAudit(nn.Module(), masters)
    masters["model.embed_tokens.weight"][1] = 1e-30
    (row,) = seen.compute_changes(masters)
    assert (row.num_changed, row.relative_change) == (1, 0.0)


def test_checksums_of_empty_dict() -> None:
    assert compute_checksums({}) == {}
