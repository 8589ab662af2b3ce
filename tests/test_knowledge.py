"""What the package's own model knows: answers that end, words that are right, boxes that land.

Bounds are well below what pretraining measured, on other pictures than those: these tests show that
the path from file to answer is whole, not how good the model is.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from finesight.config import Eval
from finesight.data.jsonl import Located, read_samples
from finesight.evaluate.evaluate import Evaluation, evaluate
from finesight.hub import TINY
from finesight.infer.load import Answerer, load_answerer
from finesight.infer.predict import predict
from finesight.quickstart import Plan, quickstart, write_recipe
from finesight.recipe import load_recipe
from finesight.synth.tasks import Task
from finesight.synth.writing import write_task

ROOT = Path(__file__).parents[1]
SEED = 7
SAMPLES = 60

Asked = Callable[[str, str, str], Evaluation]


@pytest.fixture(scope="module")
def tiny() -> Answerer:
    return load_answerer(TINY, "cpu", "fp32")


@pytest.fixture(scope="module")
def asked(tiny: Answerer, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Measures the model on fresh pictures of a task and kind, drawn with Pillow's own font."""

    def measured(task: str, kind: str, metric: str) -> Evaluation:
        samples = drawn(tmp_path_factory.mktemp("drawn") / task, task, kind)
        settings = Eval.model_validate({"metric": metric, "max_new_tokens": 120, "batch": SAMPLES})
        return evaluate(tiny.model, tiny.renderer, samples, settings)

    return measured


def drawn(folder: Path, task: str, kind: str) -> list[Located]:
    file = write_task(folder, Task(task, "built-in"), SAMPLES, SEED, kind)
    return [Located(sample, file.parent) for sample in read_samples(file)]


def test_words_are_read_and_answers_end(asked: Asked) -> None:
    found = asked("word", "word", "ocr")
    assert found.scores["exact"] > 0.9, found.as_table()
    assert found.scores["cer"] < 0.05, found.as_table()
    assert found.scores["stopped"] == 1.0, found.as_table()


def test_boxes_land(asked: Asked) -> None:
    found = asked("scene", "find_shapes", "detection")
    assert found.scores["f1_at_0.5"] > 0.9, found.as_table()
    assert found.scores["parse_rate"] > 0.95, found.as_table()


def test_words_are_found(asked: Asked) -> None:
    found = asked("words", "find", "grounding")
    assert found.scores["accuracy_at_0.5"] > 0.9, found.as_table()
    assert found.scores["stopped"] == 1.0, found.as_table()


def test_formulas_are_written(asked: Asked) -> None:
    pytest.importorskip("matplotlib")
    found = asked("formula", "formula", "latex")
    assert found.scores["exact"] > 0.7, found.as_table()


def test_scenes_are_described(asked: Asked) -> None:
    found = asked("scene", "describe", f"{ROOT / 'pretraining' / 'metric.py'}:caption")
    assert found.headline == "exact"
    assert found.scores["exact"] > 0.9, found.as_table()
    assert found.scores["stopped"] == 1.0, found.as_table()


def test_an_adapter_matters(tmp_path: Path) -> None:
    """A few steps teach a form that the model has never seen, and nothing else of it changes."""
    plan = Plan(pictures=220, held_out=20, steps=25)
    recipe = write_recipe(tmp_path / "quick", plan)
    console = Console(file=io.StringIO())
    result = quickstart(tmp_path / "quick", console, plan)
    assert result.result.before is not None
    assert result.result.after is not None
    assert result.result.before.scores["parse_rate"] == 0.0
    assert result.result.after.scores["parse_rate"] > 0.7, result.result.after
    assert result.result.after.held_out_loss < 1.5 < result.result.before.held_out_loss
    run = load_recipe(recipe).output
    held_out = tmp_path / "quick" / "data" / "eval.jsonl"
    asked = [Located(sample, held_out.parent) for sample in read_samples(held_out)[:5]]
    answers = [
        [one.answer for one in predict(who.model, who.renderer, asked, max_new_tokens=112, batch=5)]
        for who in (load_answerer(TINY, "cpu", "fp32"), load_answerer(str(run), "cpu", "fp32"))
    ]
    assert all("{" not in answer for answer in answers[0]), answers[0]
    assert any(answer.startswith("{") for answer in answers[1]), answers[1]
