"""The ends of whole runs: which weights are kept, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_run import Task

from finesight.errors import UserError
from finesight.evaluate.bootstrap import FEW
from finesight.evaluate.compare import ONE_SUM, REMOVED
from finesight.evaluate.held_out import held_out
from finesight.train.finish import RunResult

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


def _eval(task: Task, text: str, function: str, **more: Any) -> dict[str, Any]:
    (task.folder / "mine.py").write_text(text)
    metric = f"{task.folder / 'mine.py'}:{function}"
    return {"metric": metric, "every": 1, "max_new_tokens": 3} | more


def _weights(run: Path, step: int) -> dict[str, Any]:
    return load_file(run / "checkpoints" / f"step-{step}" / "trainable.safetensors")


def test_a_run_whose_score_falls_stops_and_says_so(task: Task) -> None:
    result = task.run(eval=_eval(task, FALLS, "score", patience=3))
    assert (result.steps, result.stopped_early, result.samples) == (4, True, 16)
    assert "stopping after step 4 of 6: 3 measurements without a better score" in task.screen
    assert [line["step"] for line in task.history() if "loss" in line] == [1, 2, 3, 4]
    assert result.weights_of == 1
    assert task.run(eval=_eval(task, FALLS, "score", patience=3), resume=True) == result


def test_the_weights_of_the_best_measurement_are_kept(task: Task) -> None:
    # By the score it is step 2, though the loss goes on falling.
    result = task.run(
        "train.keep=1", "train.save_every=1", eval=_eval(task, RISES_AND_FALLS, "score", patience=2)
    )
    run = task.folder / "run"
    assert (result.weights_of, result.steps, result.stopped_early) == (2, 4, True)
    assert result.best is not None
    assert (result.best.step, result.best.headline, result.best.score) == (2, "score", 0.0)
    assert result.after is not None
    assert result.after.step == 2
    stored = _weights(run, 2)
    model = load_file(run / "model" / "model.safetensors")
    name = next(name for name in stored if name in model)
    assert (model[name] == stored[name]).all()
    assert not (model[name] == _weights(run, 4)[name]).all()
    answers = [(run / "predictions" / f"{name}.jsonl").read_text() for name in ("after", "step-2")]
    assert answers[0] == answers[1]
    assert "going back to the weights of step 2" in task.screen
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_with_patience_left_the_last_weights_compete_too(task: Task) -> None:
    result = task.run(eval=_eval(task, CONSTANT, "same", patience=50, every=4))
    # All scores are the same, so that the lowest loss decides: the last one.
    assert (result.weights_of, result.steps, result.stopped_early) == (6, 6, False)
    names = sorted(path.name for path in (task.folder / "run" / "predictions").iterdir())
    assert names == ["after.jsonl", "before.jsonl", "step-4.jsonl", "step-6.jsonl"]


def test_without_patience_the_last_weights_stay_and_the_better_are_told(task: Task) -> None:
    result = task.run("train.keep=1", eval=_eval(task, RISES_AND_FALLS, "score"))
    assert (result.weights_of, result.stopped_early) == (6, False)
    assert result.best is not None
    assert result.best.step == 2
    assert "The score was better after step 2 (0.0000); its checkpoint is kept" in task.screen
    steps = sorted(path.name for path in (task.folder / "run" / "checkpoints").iterdir())
    assert steps == ["step-2", "step-6"]


def test_the_end_compares_before_and_after_with_intervals(task: Task) -> None:
    result = task.run(eval={"metric": "ocr", "max_new_tokens": 3})
    names = [one.name for one in result.differences]
    assert names[:2] == ["held_out_loss", "similarity"]
    loss, similarity, exact = result.differences[:3]
    assert (loss.low, loss.high, loss.note) == (None, None, ONE_SUM)
    # Of so few samples, only a difference of two proportions has an interval.
    assert (similarity.low, similarity.high, similarity.note) == (None, None, FEW)
    assert exact.low is not None
    assert exact.high is not None
    assert exact.low <= exact.after - exact.before <= exact.high
    assert result.after is not None
    assert result.after.intervals.keys() == result.after.scores.keys()
    stored = json.loads((task.folder / "run" / "result.json").read_text())
    assert RunResult.model_validate_json(json.dumps(stored)) == result
    assert "similarity*" in task.screen
    assert "95 % interval" in task.screen
    assert f"held_out_loss: {ONE_SUM}" in task.screen
    assert f"similarity, cer, wer: {FEW}" in task.screen


def test_a_result_of_an_earlier_release_is_read(task: Task) -> None:
    task.run()
    path = task.folder / "run" / "result.json"
    stored = json.loads(path.read_text())
    for name in ("differences", "best", "weights_of", "stopped_early"):
        del stored[name]
    for name in ("before", "after"):
        del stored[name]["intervals"], stored[name]["details"], stored[name]["notes"]
    result = RunResult.model_validate_json(json.dumps(stored))
    assert (result.differences, result.stopped_early) == ((), False)


def test_answers_that_were_tidied_away_cost_the_intervals_only(task: Task) -> None:
    settings = {"metric": "ocr", "max_new_tokens": 3}
    task.recipe["eval"] = settings
    run = task.unfinished()
    (run / "predictions" / "before.jsonl").unlink()
    result = task.run(resume=True)
    assert {one.low for one in result.differences} == {None}
    assert {one.note for one in result.differences} == {ONE_SUM, REMOVED}
    assert "similarity" in [one.name for one in result.differences]


def test_the_best_answers_that_were_tidied_away_cost_the_intervals_only(task: Task) -> None:
    settings = _eval(task, FALLS, "score", patience=2)
    task.run(eval=settings)
    run = task.folder / "run"
    (run / "result.json").unlink()
    for path in (run / "predictions").glob("*.jsonl"):
        path.unlink()
    result = task.run(eval=settings, resume=True)
    assert result.stopped_early
    assert {one.low for one in result.differences} == {None}


def test_an_own_metric_is_kept_with_the_run(task: Task) -> None:
    settings = _eval(task, CONSTANT, "same", every=None)
    task.run(eval=settings)
    run = task.folder / "run"
    assert (run / "metric.py").read_text() == CONSTANT
    assert [line["headline"] for line in task.history() if "headline" in line] == ["same"] * 2
    (task.folder / "mine.py").unlink()
    assert held_out(str(run))[1].metric == f"{run / 'metric.py'}:same"


@pytest.mark.parametrize(
    ("text", "words"),
    [("def other(case): return 1\n", "no function 'same'"), ("def same(x) return", "SyntaxError")],
)
def test_a_faulty_metric_is_refused_before_anything_is_written(
    task: Task, text: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        task.run(eval=_eval(task, text, "same"))
    assert not (task.folder / "run").exists()
