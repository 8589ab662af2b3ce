"""Tests of the ranking of label errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from label_fixtures import draw_images

from finesight.data.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
)
from finesight.infer.model_loader import InferenceModel, load_inference_model
from finesight.label.suggestion import (
    combine_scores,
    compute_label_losses,
    measure_disagreement,
    rank_labels,
    suggest_labels,
)
from finesight.model_folder import TINY_MODEL

BOX = BoxPart(label="a", xyxy=(0, 0, 10, 10))
OTHER = BoxPart(label="b", xyxy=(20, 20, 30, 30))


@pytest.fixture(scope="module")
def inference_model() -> InferenceModel:
    return load_inference_model(TINY_MODEL, device="cpu")


def make_sample(photos: Path, index: int, answer: str) -> LocatedSample:
    question = (ImagePart(image=f"{index}.png"), TextPart(text="Describe the image."))
    messages = (
        Message(role="user", content=question),
        Message(role="assistant", content=answer),
    )
    return LocatedSample(Sample(id=f"{index}", messages=messages), photos)


@pytest.mark.parametrize(
    ("label", "suggestion", "expected"),
    [
        ([BOX, OTHER], [BOX, OTHER], 0),
        ([BOX], [BOX, OTHER], 0.5),
        ([BOX, OTHER], [BOX.model_copy(update={"label": "b"}), OTHER], 0.5),
        ([TextPart(text="none")], [BOX], 1),
        ([TextPart(text='{"a": "x", "b": 1}')], [TextPart(text='{"b": 1.0, "a": "y"}')], 0.5),
        ([TextPart(text="abcd")], [TextPart(text=" abxd ")], 0.25),
        ([TextPart(text='{"a": "x"}')], [TextPart(text='{"a": "x"')], 0.1),
    ],
)
def test_disagreement(label, suggestion, expected):
    assert measure_disagreement(label, suggestion) == pytest.approx(expected)


def test_loss_of_the_own_answer_equals_that_of_the_label(inference_model, tmp_path):
    photos = draw_images(tmp_path, 2)
    questions = [make_sample(photos, index, "unused") for index in range(2)]
    suggestions, _ = suggest_labels(inference_model, questions, max_new_tokens=40)
    texts = {one.id: one.content[0].text for one in suggestions}
    labeled = [make_sample(photos, index, texts[f"{index}"]) for index in range(2)]
    losses = compute_label_losses(inference_model, labeled, batch_size=2)
    expected = [next(one.loss for one in suggestions if one.id == f"{i}") for i in range(2)]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    assert compute_label_losses(inference_model, labeled, batch_size=1) == pytest.approx(
        losses, rel=1e-3, abs=1e-3
    )


def test_wrong_labels_come_first(inference_model, tmp_path):
    photos = draw_images(tmp_path, 3)
    questions = [make_sample(photos, index, "unused") for index in range(3)]
    suggestions, _ = suggest_labels(inference_model, questions, max_new_tokens=40)
    texts = {int(one.id): one.content[0].text for one in suggestions}
    samples = [make_sample(photos, i, texts[i] if i != 1 else "two dogs") for i in range(3)]
    ranked, reasons = rank_labels(inference_model, samples, max_new_tokens=40)
    assert ranked[0].suggestion.id == "1"
    assert [one.score for one in ranked[1:]] == pytest.approx([0, 0], abs=1e-6)
    assert reasons == {}


def test_score_needs_loss_disagreement_and_confidence():
    for values in ((5.0, 0.0, 1.0), (0.0, 1.0, 1.0), (5.0, 1.0, 0.0)):
        assert combine_scores(*values) == 0
    assert combine_scores(math.log(2), 1.0, 0.5) == pytest.approx(0.25)
