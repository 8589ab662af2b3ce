"""Evaluation by generation: its inputs, scores and predictions file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.eval_result import select_eval_samples
from finesight.evaluate.generation_eval import evaluate, load_eval_inputs
from finesight.evaluate.task_metrics import compute_metrics
from finesight.infer.prediction import predict
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.samples.sample import BoxPart, LocatedSample, write_samples
from finesight.settings.config import EvalSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[VisionLanguageModel, NativeRenderer]:
    folder = ModelFolder(create_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    return load_model(folder, torch.float32, CPU), NativeRenderer(folder)


@pytest.fixture
def samples(tmp_path: Path) -> list[LocatedSample]:
    write_noise_image(tmp_path / "a.png", 90, 60)
    write_noise_image(tmp_path / "b.png", 60, 120, seed=1)
    read = make_sample("s1", tmp_path, "b.png", "Read it.", answer="a word")
    return [
        make_sample("s0", tmp_path, "a.png", "What is it?", answer="noise of many colours"),
        replace(read, sample=read.sample.model_copy(update={"references": ("a", "words")})),
        make_sample("s2", tmp_path, "Why?", answer="because"),
    ]


def make_settings(**changes: object) -> EvalSettings:
    return EvalSettings.model_validate({"metric": "ocr", "max_new_tokens": 4} | changes)


@pytest.mark.parametrize("metric", ["captions", "latex", "ocr"])
def test_scores_match_the_predictions(loaded_model, samples, tmp_path, metric):
    model, renderer = loaded_model
    result = evaluate(
        model, renderer, samples, make_settings(metric=metric), (tmp_path / "out.jsonl").write_bytes
    )
    answers = predict(model, renderer, samples, max_new_tokens=4, batch_size=8)
    assert [p.raw_text for p in result.predictions] == [p.raw_text for p in answers]
    truths = [("noise of many colours",), ("a word", "a", "words"), ("because",)]
    cases = [EvalCase(p.answer, (), t, ()) for p, t in zip(answers, truths, strict=True)]
    scored = compute_metrics(metric, cases)
    share = sum(prediction.finish_reason == "stop" for prediction in answers) / 3
    assert result.scores == scored.scores | {"ended_with_eos": share}
    assert ("0 of 3 correct" in result.as_table()) == (metric != "captions")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in lines] == scored.per_sample
    assert [line["id"] for line in lines] == ["s0", "s1", "s2"]
    assert (lines[1]["gold"], lines[1]["references"]) == ("a word", ["a", "words"])
    assert lines[1]["image"] == str(samples[1].folder / "b.png")
    evaluate(
        model,
        renderer,
        samples,
        make_settings(metric=metric),
        (tmp_path / "again.jsonl").write_bytes,
    )
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_grounding_compares_boxes(loaded_model, tmp_path):
    write_noise_image(tmp_path / "a.png", 90, 60)
    box = BoxPart(label="dog", xyxy=(1, 2, 30, 40))
    sample = make_sample("s", tmp_path, "a.png", "Where?", answer=box)
    out = tmp_path / "out.jsonl"
    result = evaluate(*loaded_model, [sample], make_settings(metric="grounding"), out.write_bytes)
    assert result.scores["accuracy_at_0.5"] == 0
    expected = {"image": 0, "label": "dog", "xyxy": [1, 2, 30, 40]}
    assert json.loads(out.read_text())["gold_boxes"] == [expected]
    there = make_sample("s", tmp_path, "a.png", "Where?", answer="there")
    for metric, wrong, missing in (("grounding", there, "box"), ("captions", sample, "text")):
        with pytest.raises(UserError, match=f"none of 2 references has {missing} content"):
            evaluate(*loaded_model, [wrong] * 2, make_settings(metric=metric))


def test_limit_selects_random_samples_and_subset_is_scored_separately(loaded_model, samples):
    result = evaluate(*loaded_model, [samples[n % 3] for n in range(9)], make_settings(limit=2))
    chosen = select_eval_samples(range(9), 2)
    assert chosen != [0, 1]
    assert [prediction.id for prediction in result.predictions] == [f"s{n % 3}" for n in chosen]
    assert result.subset is None
    result = evaluate(*loaded_model, samples, make_settings(), subset=[0, 2])
    alone = evaluate(*loaded_model, [samples[0], samples[2]], make_settings())
    assert result.subset is not None
    assert (result.subset.as_json(), len(result.predictions)) == (alone.as_json(), 3)


def test_unreadable_images_are_skipped_and_counted(loaded_model, samples, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    result = evaluate(*loaded_model, samples, make_settings())
    assert [prediction.id for prediction in result.predictions] == ["s1", "s2"]
    ((name, reason),) = result.corrupt_samples
    assert name == "s0"
    assert "a.png" in reason
    assert result.as_json()["corrupt_samples"] == 1
    assert "2 samples, 1 skipped" in result.as_table()
    with pytest.raises(UserError, match=r"none of 1 samples"):
        evaluate(*loaded_model, samples[:1], make_settings())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write the recipe and the data of a run, and an empty data file."""
    for name, count in (("train", 3), ("first", 2), ("second", 5), ("empty", 0)):
        several = [make_sample(f"{name}{i}", tmp_path, "Why?", answer="so") for i in range(count)]
        write_samples(tmp_path / f"{name}.jsonl", [one.sample for one in several])
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: tiny
data:
  train: {tmp_path}/train.jsonl
  eval: [{tmp_path}/first.jsonl, {{path: {tmp_path}/second.jsonl, limit: 2}}]
eval: {{metric: latex, limit: 3, max_new_tokens: 77, batch_size: 5}}
output_dir: {tmp_path}
"""
    )
    return tmp_path


def test_run_provides_eval_data_and_settings(run):
    samples, settings = load_eval_inputs(str(run))
    assert [s.sample.id for s in samples] == ["first0", "first1", "second0", "second1"]
    assert (settings.metric, settings.limit) == ("latex", 3)
    assert settings.max_new_tokens == 77, "the former setting `batch_size` is ignored"
    options = {"metric": "ocr", "limit": 1, "max_new_tokens": 9}
    samples, settings = load_eval_inputs(str(run), data=run / "train.jsonl", **options)
    assert [s.sample.id for s in samples] == ["train0", "train1", "train2"]
    assert samples[0].folder == run
    assert options.items() <= settings.model_dump().items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "train.jsonl"}, r"metric: .* is not a run folder with a recipe"),
        ({"metric": "ocr"}, r"data: .* is not a run folder with a recipe"),
        ({"data": "empty.jsonl", "metric": "ocr"}, "contains no samples"),
        (
            {"data": "train.jsonl", "metric": "latx"},
            r"unknown metric 'latx'[\s\S]*did you mean latex\?",
        ),
        (
            {"data": "train.jsonl", "metric": "ocr", "max_new_tokens": 9_000_000},
            "max_new_tokens is 9000000",
        ),
        ({"data": "train.jsonl", "metric": print}, "unknown metric '<built-in function"),
    ],
)
def test_invalid_inputs_without_a_recipe_are_rejected(run, options, message):
    options |= {"data": run / options["data"]} if "data" in options else {}
    with pytest.raises(UserError, match=message):
        load_eval_inputs("finesight-tiny", **options)
    options = {"data": run / "train.jsonl", "metric": "a/b.py:f"}
    assert load_eval_inputs("finesight-tiny", **options)[1].metric == "a/b.py:f"
