"""Quality of the bundled model: complete answers, correct words, accurate boxes.

Bounds are well below the results of pretraining, which used other images. These tests check that
the path from file to answer works, not the quality of the model.
"""

from pathlib import Path

import pytest
from synthetic_tasks.dataset_writer import write_task
from synthetic_tasks.tasks import SyntheticTask

from finesight.api import quickstart
from finesight.evaluate.generation_eval import evaluate
from finesight.infer.model_loader import InferenceModel, load_inference_model
from finesight.infer.prediction import predict
from finesight.ingest.init_operation import QuickstartSettings, write_recipe
from finesight.model_folder import TINY_MODEL
from finesight.samples.sample import LocatedSample, read_samples
from finesight.settings.config import EvalSettings
from finesight.settings.recipe import load_recipe

ROOT = Path(__file__).parents[1]
SEED = 7
SAMPLES = 60

CAPTION = f"{ROOT / 'pretraining' / 'caption_metric.py'}:caption"
BOUNDS = [
    ("word", "word", "ocr", {"exact": 0.9, "ended_with_eos": 0.999}),
    ("scene", "find_shapes", "detection", {"f1_at_0.5": 0.9, "parse_rate": 0.95}),
    ("words", "find", "grounding", {"accuracy_at_0.5": 0.9, "ended_with_eos": 0.999}),
    ("formula", "formula", "latex", {"exact": 0.7}),
    ("scene", "describe", CAPTION, {"exact": 0.9, "ended_with_eos": 0.999}),
]


@pytest.fixture(scope="module")
def tiny() -> InferenceModel:
    return load_inference_model(TINY_MODEL, "cpu", "fp32")


@pytest.mark.parametrize(("task", "kind", "metric", "bounds"), BOUNDS)
def test_scores_of_new_images(tiny, tmp_path, task, kind, metric, bounds):
    """Evaluate the model on new images, drawn with the font of Pillow."""
    if task == "formula":
        pytest.importorskip("matplotlib")
    file = write_task(tmp_path / task, SyntheticTask(task, "built-in"), SAMPLES, SEED, kind)
    samples = [LocatedSample(sample, file.parent) for sample in read_samples(file)]
    settings = EvalSettings.model_validate({"metric": metric, "max_new_tokens": 120})
    found = evaluate(tiny.model, tiny.renderer, samples, settings)
    below = {name for name, bound in bounds.items() if found.scores[name] <= bound}
    assert below == set(), found.as_table()
    if task == "word":
        assert found.scores["cer"] < 0.05, found.as_table()


def test_short_finetune_improves_json_answers(tmp_path: Path) -> None:
    """A few steps teach a form that the model has never seen, and nothing else of it changes.

    Takes long: one run of 25 steps of finesight-tiny.
    """
    plan = QuickstartSettings(num_images=210, num_eval_rows=10, steps=25)
    recipe = write_recipe(tmp_path / "quick", plan)
    result = quickstart(tmp_path / "quick", plan)
    assert result.before is not None
    assert result.after is not None
    assert result.before.scores["parse_rate"] == 0.0
    assert result.after.scores["parse_rate"] > 0.7, result.after
    assert result.after.validation_loss < 1.5 < result.before.validation_loss
    run = load_recipe(recipe).output_dir
    validation = tmp_path / "quick" / "data" / "eval.jsonl"
    requested = [LocatedSample(one, validation.parent) for one in read_samples(validation)[:5]]
    options = {"max_new_tokens": 112, "batch_size": 5}
    for name, count in ((TINY_MODEL, 0), (str(run), 1)):
        one = load_inference_model(name, "cpu", "fp32")
        predictions = predict(one.model, one.renderer, requested, **options)
        answers = [prediction.answer for prediction in predictions]
        assert min(sum(answer.startswith("{") for answer in answers), 1) == count, answers
