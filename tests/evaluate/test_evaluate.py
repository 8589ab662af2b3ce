from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asking import ask, noise

from finesight.config import Eval
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.evaluate.answered import Case
from finesight.evaluate.evaluate import evaluate
from finesight.evaluate.score import score
from finesight.hub import ModelFolder
from finesight.infer.predict import predict
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionLanguageModel, Renderer]:
    folder = ModelFolder(make_tiny(tmp_path_factory.mktemp("model") / "tiny"))
    return load_model(folder, torch.float32, CPU), Renderer(folder)


@pytest.fixture
def samples(tmp_path: Path) -> list[Located]:
    noise(tmp_path / "a.png", 90, 60)
    noise(tmp_path / "b.png", 60, 120, seed=1)
    with_references = ask("s1", tmp_path, "b.png", "Read it.", answer="a word")
    return [
        ask("s0", tmp_path, "a.png", "What is it?", answer="noise of many colours"),
        replace(
            with_references,
            sample=with_references.sample.model_copy(update={"references": ("a", "words")}),
        ),
        ask("s2", tmp_path, "Why?", answer="because"),
    ]


def _settings(**changes: object) -> Eval:
    return Eval.model_validate({"metric": "ocr", "max_new_tokens": 4, "batch": 2} | changes)


@pytest.mark.parametrize("metric", ["captions", "latex", "ocr"])
def test_scores_are_those_of_the_answers(loaded, samples, tmp_path, metric):
    model, renderer = loaded
    result = evaluate(model, renderer, samples, _settings(metric=metric), tmp_path / "out.jsonl")
    answers = predict(model, renderer, samples, max_new_tokens=4, batch=8)
    assert [p.raw for p in result.predictions] == [p.raw for p in answers]
    truths = [("noise of many colours",), ("a word", "a", "words"), ("because",)]
    cases = [Case(p.answer, (), t, ()) for p, t in zip(answers, truths, strict=True)]
    scored = score(metric, cases)
    stopped = sum(prediction.stopped for prediction in answers) / 3
    assert result.scores == scored.scores | {"stopped": stopped}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in lines] == scored.each
    assert [line["id"] for line in lines] == ["s0", "s1", "s2"]
    assert (lines[1]["gold"], lines[1]["references"]) == ("a word", ["a", "words"])
    assert lines[1]["image"] == str(tmp_path / "b.png")


def test_the_same_model_writes_the_same_file(loaded, samples, tmp_path):
    for name in ("one.jsonl", "two.jsonl"):
        evaluate(*loaded, samples, _settings(), tmp_path / name)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_grounding_compares_boxes(loaded, tmp_path):
    noise(tmp_path / "a.png", 90, 60)
    box = BoxPart(label="dog", xyxy=(1, 2, 30, 40))
    sample = ask("s", tmp_path, "a.png", "Where?", answer=box)
    out = tmp_path / "out.jsonl"
    result = evaluate(*loaded, [sample], _settings(metric="grounding"), out)
    assert result.scores["accuracy_at_0.5"] == 0
    expected = {"image": 0, "label": "dog", "xyxy": [1, 2, 30, 40]}
    assert json.loads(out.read_text())["gold_boxes"] == [expected]


def test_limit_takes_the_first_samples(loaded, samples):
    result = evaluate(*loaded, samples, _settings(limit=2))
    assert [prediction.id for prediction in result.predictions] == ["s0", "s1"]


def test_unreadable_pictures_are_left_out_and_counted(loaded, samples, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    result = evaluate(*loaded, samples, _settings())
    assert [prediction.id for prediction in result.predictions] == ["s1", "s2"]
    ((name, reason),) = result.unreadable
    assert name == "s0"
    assert "a.png" in reason
    assert result.as_json()["unreadable"] == 1
    assert "2 samples, 1 left out" in result.as_table()
    with pytest.raises(UserError, match=r"not one of 1 samples"):
        evaluate(*loaded, samples[:1], _settings())


@pytest.mark.parametrize(
    ("metric", "answer", "missing"),
    [("grounding", "there", "box"), ("captions", BoxPart(xyxy=(1, 2, 3, 4)), "text")],
)
def test_answers_that_the_metric_cannot_compare_are_refused(
    loaded, tmp_path, metric, answer, missing
):
    noise(tmp_path / "a.png", 90, 60)
    samples = [ask("s", tmp_path, "a.png", "Where?", answer=answer)] * 2
    with pytest.raises(UserError, match=f"not one of 2 right answers holds a {missing}"):
        evaluate(*loaded, samples, _settings(metric=metric))


def test_nothing_to_measure_on_is_refused(loaded, tmp_path):
    with pytest.raises(UserError, match="0 samples"):
        evaluate(*loaded, [], _settings())
    with pytest.raises(UserError, match="s9"):
        evaluate(*loaded, [ask("s9", tmp_path, "Why?")], _settings())
