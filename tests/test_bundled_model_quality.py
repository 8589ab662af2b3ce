"""Quality of the bundled model: complete answers, correct words, accurate boxes.

Bounds are well below the results of pretraining, which used other images. These tests check that
the path from file to answer works, not the quality of the model.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_tasks.dataset_writer import write_task
from synthetic_tasks.tasks import SyntheticTask

from finesight.config import EvalSettings
from finesight.data.sample import LocatedSample, read_samples
from finesight.evaluate.generation_eval import GenerationEvalResult, evaluate
from finesight.infer.model_loader import InferenceModel, load_inference_model
from finesight.infer.prediction import predict
from finesight.model_folder import TINY_MODEL
from finesight.quickstart_demo import QuickstartSettings, run_quickstart, write_recipe
from finesight.recipe import load_recipe

ROOT = Path(__file__).parents[1]
SEED = 7
SAMPLES = 60

EvaluateTask = Callable[[str, str, str], GenerationEvalResult]


@pytest.fixture(scope="module")
def tiny() -> InferenceModel:
    return load_inference_model(TINY_MODEL, "cpu", "fp32")


@pytest.fixture(scope="module")
def evaluate_task(tiny: InferenceModel, tmp_path_factory: pytest.TempPathFactory) -> EvaluateTask:
    """Evaluate the model on new images of a task and kind, drawn with the font of Pillow."""

    def measured(task: str, kind: str, metric: str) -> GenerationEvalResult:
        samples = generate_samples(tmp_path_factory.mktemp("drawn") / task, task, kind)
        settings = EvalSettings.model_validate(
            {"metric": metric, "max_new_tokens": 120, "batch_size": SAMPLES}
        )
        return evaluate(tiny.model, tiny.renderer, samples, settings)

    return measured


def generate_samples(folder: Path, task: str, kind: str) -> list[LocatedSample]:
    file = write_task(folder, SyntheticTask(task, "built-in"), SAMPLES, SEED, kind)
    return [LocatedSample(sample, file.parent) for sample in read_samples(file)]


def test_words_are_read_and_answers_end(evaluate_task: EvaluateTask) -> None:
    found = evaluate_task("word", "word", "ocr")
    assert found.scores["exact"] > 0.9, found.as_table()
    assert found.scores["cer"] < 0.05, found.as_table()
    assert found.scores["ended_with_eos"] == 1.0, found.as_table()


def test_box_detection_accuracy(evaluate_task: EvaluateTask) -> None:
    found = evaluate_task("scene", "find_shapes", "detection")
    assert found.scores["f1_at_0.5"] > 0.9, found.as_table()
    assert found.scores["parse_rate"] > 0.95, found.as_table()


def test_word_grounding_accuracy(evaluate_task: EvaluateTask) -> None:
    found = evaluate_task("words", "find", "grounding")
    assert found.scores["accuracy_at_0.5"] > 0.9, found.as_table()
    assert found.scores["ended_with_eos"] == 1.0, found.as_table()


def test_formula_accuracy(evaluate_task: EvaluateTask) -> None:
    pytest.importorskip("matplotlib")
    found = evaluate_task("formula", "formula", "latex")
    assert found.scores["exact"] > 0.7, found.as_table()


def test_scene_caption_accuracy(evaluate_task: EvaluateTask) -> None:
    found = evaluate_task(
        "scene", "describe", f"{ROOT / 'pretraining' / 'caption_metric.py'}:caption"
    )
    assert found.primary_metric == "exact"
    assert found.scores["exact"] > 0.9, found.as_table()
    assert found.scores["ended_with_eos"] == 1.0, found.as_table()


def test_short_finetune_improves_json_answers(tmp_path: Path) -> None:
    """A few steps teach a form that the model has never seen, and nothing else of it changes.

    Takes long: one run of 25 steps of finesight-tiny.
    """
    plan = QuickstartSettings(num_images=220, num_eval_rows=20, steps=25)
    recipe = write_recipe(tmp_path / "quick", plan)
    console = Console(file=io.StringIO())
    result = run_quickstart(tmp_path / "quick", console, plan)
    assert result.result.before is not None
    assert result.result.after is not None
    assert result.result.before.scores["parse_rate"] == 0.0
    assert result.result.after.scores["parse_rate"] > 0.7, result.result.after
    assert result.result.after.validation_loss < 1.5 < result.result.before.validation_loss
    run = load_recipe(recipe).output_dir
    validation = tmp_path / "quick" / "data" / "eval.jsonl"
    requested = [
        LocatedSample(sample, validation.parent) for sample in read_samples(validation)[:5]
    ]
    answers = [
        [
            one.answer
            for one in predict(who.model, who.renderer, requested, max_new_tokens=112, batch_size=5)
        ]
        for who in (
            load_inference_model(TINY_MODEL, "cpu", "fp32"),
            load_inference_model(str(run), "cpu", "fp32"),
        )
    ]
    assert all("{" not in answer for answer in answers[0]), answers[0]
    assert any(answer.startswith("{") for answer in answers[1]), answers[1]
