from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model

from finesight.config import EvalSettings
from finesight.data.sample import BoxPart, LocatedSample
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase, select_eval_samples
from finesight.evaluate.generation_eval import evaluate
from finesight.evaluate.task_metrics import compute_metrics
from finesight.infer.prediction import predict
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

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
    with_references = make_sample("s1", tmp_path, "b.png", "Read it.", answer="a word")
    return [
        make_sample("s0", tmp_path, "a.png", "What is it?", answer="noise of many colours"),
        replace(
            with_references,
            sample=with_references.sample.model_copy(update={"references": ("a", "words")}),
        ),
        make_sample("s2", tmp_path, "Why?", answer="because"),
    ]


def _settings(**changes: object) -> EvalSettings:
    return EvalSettings.model_validate(
        {"metric": "ocr", "max_new_tokens": 4, "batch_size": 2} | changes
    )


@pytest.mark.parametrize("metric", ["captions", "latex", "ocr"])
def test_scores_match_the_predictions(loaded_model, samples, tmp_path, metric):
    model, renderer = loaded_model
    result = evaluate(model, renderer, samples, _settings(metric=metric), tmp_path / "out.jsonl")
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
    assert lines[1]["image"] == str(tmp_path / "b.png")


def test_predictions_file_is_deterministic(loaded_model, samples, tmp_path):
    for name in ("one.jsonl", "two.jsonl"):
        evaluate(*loaded_model, samples, _settings(), tmp_path / name)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_grounding_compares_boxes(loaded_model, tmp_path):
    write_noise_image(tmp_path / "a.png", 90, 60)
    box = BoxPart(label="dog", xyxy=(1, 2, 30, 40))
    sample = make_sample("s", tmp_path, "a.png", "Where?", answer=box)
    out = tmp_path / "out.jsonl"
    result = evaluate(*loaded_model, [sample], _settings(metric="grounding"), out)
    assert result.scores["accuracy_at_0.5"] == 0
    expected = {"image": 0, "label": "dog", "xyxy": [1, 2, 30, 40]}
    assert json.loads(out.read_text())["gold_boxes"] == [expected]


def test_limit_selects_random_samples_and_subset_is_scored_separately(loaded_model, samples):
    result = evaluate(*loaded_model, [samples[n % 3] for n in range(9)], _settings(limit=2))
    chosen = select_eval_samples(range(9), 2)
    assert chosen != [0, 1]
    assert [prediction.id for prediction in result.predictions] == [f"s{n % 3}" for n in chosen]
    assert result.subset is None
    result = evaluate(*loaded_model, samples, _settings(), subset=[0, 2])
    alone = evaluate(*loaded_model, [samples[0], samples[2]], _settings())
    assert result.subset is not None
    assert (result.subset.as_json(), len(result.predictions)) == (alone.as_json(), 3)


def test_unreadable_images_are_skipped_and_counted(loaded_model, samples, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    result = evaluate(*loaded_model, samples, _settings())
    assert [prediction.id for prediction in result.predictions] == ["s1", "s2"]
    ((name, reason),) = result.corrupt_samples
    assert name == "s0"
    assert "a.png" in reason
    assert result.as_json()["corrupt_samples"] == 1
    assert "2 samples, 1 skipped" in result.as_table()
    with pytest.raises(UserError, match=r"none of 1 samples"):
        evaluate(*loaded_model, samples[:1], _settings())


@pytest.mark.parametrize(
    ("metric", "answer", "missing"),
    [("grounding", "there", "box"), ("captions", BoxPart(xyxy=(1, 2, 3, 4)), "text")],
)
def test_answers_without_required_content_are_rejected(
    loaded_model, tmp_path, metric, answer, missing
):
    write_noise_image(tmp_path / "a.png", 90, 60)
    samples = [make_sample("s", tmp_path, "a.png", "Where?", answer=answer)] * 2
    with pytest.raises(UserError, match=f"none of 2 references has {missing} content"):
        evaluate(*loaded_model, samples, _settings(metric=metric))


def test_empty_evaluation_is_rejected(loaded_model, tmp_path):
    with pytest.raises(UserError, match="0 samples"):
        evaluate(*loaded_model, [], _settings())
    with pytest.raises(UserError, match="s9"):
        evaluate(*loaded_model, [make_sample("s9", tmp_path, "Why?")], _settings())
