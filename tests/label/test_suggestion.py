"""Tests of suggestions: confidences of fields, boxes and texts, and their order."""

import math
import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from case_files import load_cases
from image_fixtures import make_sample
from label_fixtures import draw_images

from finesight.encode.renderer import NativeRenderer
from finesight.encode.renderer_builder import build_renderer
from finesight.families.qwen2_5_vl.renderer import Qwen25VL
from finesight.families.qwen2_vl.renderer import Qwen2VL
from finesight.infer.model_loader import InferenceModel, load_inference_model
from finesight.infer.prediction import build_prediction, build_question
from finesight.infer.request import GeneratedToken
from finesight.label.suggestion import (
    build_suggestion,
    combine_scores,
    compute_label_losses,
    iter_json_leaves,
    measure_disagreement,
    rank_labels,
    suggest_labels,
)
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.samples.sample import BoxPart, LocatedSample, Message, Sample, TextPart

CASES = load_cases("suggestion")


@pytest.fixture(scope="module")
def renderer() -> NativeRenderer:
    return build_renderer(locate_model(TINY_MODEL))


def suggest(renderer, folder, answer, uncertain):
    """Build the suggestion of an answer whose tokens have the probability 1, except for some.

    Args:
        answer: Text of the completion. Box tokens are special tokens.
        uncertain: Probability of the first token of each text.
    """
    question = build_question([draw_images(folder, 1) / "0.png"], "Read.", "a")
    specials = renderer.tokenizer.list_special_tokens()
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, specials))})", answer):
        if piece in specials:
            ids.append(renderer.tokenizer.token_to_id(piece))
        else:
            ids += renderer.tokenizer.encode(piece)
    ids.append(renderer.end_ids[0])
    offsets = {answer.index(text): probability for text, probability in uncertain.items()}
    tokens, offset = [], 0
    for token in ids:
        stop = offset + len(renderer.tokenizer.id_to_bytes(token))
        inside = [p for at, p in offsets.items() if offset <= at < stop]
        tokens.append(GeneratedToken(token, math.log(inside[0]) if inside else 0.0))
        offset = stop
    prompt = renderer.tokenize_prompt(question)
    prediction = build_prediction(renderer, question, prompt, ids)
    return build_suggestion(renderer, question, replace(prediction, tokens=tuple(tokens)))


@pytest.mark.parametrize(
    ("answer", "uncertain", "parts", "confidence"), CASES["test_confidence_of_texts"]
)
def test_confidence_of_texts(renderer, tmp_path, answer, uncertain, parts, confidence):
    suggestion = suggest(renderer, tmp_path, answer, uncertain)
    found = {part.path: part.confidence for part in suggestion.parts}
    assert found == pytest.approx({tuple(path): value for path, value in parts})
    assert suggestion.confidence == pytest.approx(confidence)
    assert suggestion.content[0].text == answer
    assert suggestion.loss == pytest.approx(-math.log(confidence))


TOKEN_BOX = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
JSON_BOX = '{{"bbox_2d": [{1}, {2}, {3}, {4}], "label": "{0}"}}'


@pytest.mark.parametrize(
    ("family", "template", "separator"),
    [(Qwen2VL(), TOKEN_BOX, ""), (Qwen25VL(), JSON_BOX, ", ")],
)
def test_confidence_of_boxes(renderer, tmp_path, family, template, separator):
    renderer = copy(renderer)
    renderer.family = family
    boxes = (("shop", 101, 102, 503, 504), ("total", 205, 206, 607, 608))
    answer = separator.join(template.format(*box) for box in boxes)
    # A box has 12 digits with one token each; the 2 of bbox_2d is a digit, too.
    suggestion = suggest(renderer, tmp_path, answer, {"101": 0.5, "total": 0.25})
    num_digits = 12 + ("bbox_2d" in answer)
    expected = {(0,): 0.5 ** (1 / num_digits), (1,): 0.25}
    assert {part.path: part.confidence for part in suggestion.parts} == pytest.approx(expected)
    assert [box.label for box in suggestion.content] == ["shop", "total"]
    assert suggestion.confidence == pytest.approx(math.prod(expected.values()))


@pytest.mark.parametrize(
    ("text", "leaves"),
    [*CASES["test_json_leaves_are_located"], ("[" * 5000, [])],
)
def test_json_leaves_are_located(text, leaves):
    found = list(iter_json_leaves(text))
    assert [[".".join(map(str, one.path)), text[one.start : one.stop]] for one in found] == leaves


@pytest.fixture(scope="module")
def inference_model() -> InferenceModel:
    return load_inference_model(TINY_MODEL, device="cpu")


def test_least_certain_suggestions_come_first(inference_model, tmp_path):
    photos = draw_images(tmp_path)
    (photos / "broken.png").write_bytes(b"no image")
    prompts = ("Describe the image.", "Give shop, date and total as JSON.")
    samples = [
        build_question([photos / f"{index}.png"], prompt, f"{index}-{prompt[:4]}")
        for index in range(2)
        for prompt in prompts
    ]
    message = Message(role="user", content=samples[0].sample.messages[0].content)
    lost = message.model_copy(update={"content": (message.content[0],)})
    broken = Sample(id="broken", messages=(lost,)).map_paths(lambda _: str(photos / "broken.png"))
    samples.append(LocatedSample(broken, Path()))
    suggestions, reasons = suggest_labels(inference_model, samples, max_new_tokens=24)
    confidences = [suggestion.confidence for suggestion in suggestions]
    assert confidences == sorted(confidences)
    assert all(0 <= value <= 1 for value in confidences)
    assert (len(suggestions), list(reasons)) == (4, ["broken"])
    assert all(isinstance(one.content[0], TextPart) for one in suggestions)


BOX = BoxPart(label="a", xyxy=(0, 0, 10, 10))

OTHER = BoxPart(label="b", xyxy=(20, 20, 30, 30))
POINT = BoxPart(label="a", xyxy=(5, 5, 5, 5))


def describe(photos: Path, index: int, answer: str) -> LocatedSample:
    question = f"{index}.png", "Describe the image."
    return make_sample(f"{index}", photos, *question, answer=answer)


@pytest.mark.parametrize(
    ("label", "suggestion", "expected"),
    [
        ([BOX, OTHER], [BOX, OTHER], 0),
        ([BOX], [BOX, OTHER], 0.5),
        ([BOX, OTHER], [BOX.model_copy(update={"label": "b"}), OTHER], 0.5),
        ([TextPart(text="none")], [BOX], 1),
        ([POINT], [POINT], 0),
        ([BOX], [POINT], 1),
        ([TextPart(text='{"a": "x", "b": 1}')], [TextPart(text='{"b": 1.0, "a": "y"}')], 0.5),
        ([TextPart(text="abcd")], [TextPart(text=" abxd ")], 0.25),
        ([TextPart(text='{"a": "x"}')], [TextPart(text='{"a": "x"')], 0.1),
    ],
)
def test_disagreement(label, suggestion, expected):
    assert measure_disagreement(label, suggestion) == pytest.approx(expected)


def test_loss_of_the_own_answer_equals_that_of_the_label(inference_model, tmp_path):
    photos = draw_images(tmp_path, 2)
    questions = [describe(photos, index, "unused") for index in range(2)]
    suggestions, _ = suggest_labels(inference_model, questions, max_new_tokens=40)
    texts = {one.id: one.content[0].text for one in suggestions}
    labeled = [describe(photos, index, texts[f"{index}"]) for index in range(2)]
    losses = compute_label_losses(inference_model, labeled, batch_size=2)
    expected = [next(one.loss for one in suggestions if one.id == f"{i}") for i in range(2)]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    assert compute_label_losses(inference_model, labeled, batch_size=1) == pytest.approx(
        losses, rel=1e-3, abs=1e-3
    )


def test_wrong_labels_come_first(inference_model, tmp_path):
    photos = draw_images(tmp_path, 3)
    questions = [describe(photos, index, "unused") for index in range(3)]
    suggestions, _ = suggest_labels(inference_model, questions, max_new_tokens=40)
    texts = {int(one.id): one.content[0].text for one in suggestions}
    samples = [describe(photos, i, texts[i] if i != 1 else "two dogs") for i in range(3)]
    ranked, reasons = rank_labels(inference_model, samples, max_new_tokens=40)
    assert ranked[0].id == "1"
    assert [one.score for one in ranked[1:]] == pytest.approx([0, 0], abs=1e-6)
    assert reasons == {}


def test_score_needs_loss_disagreement_and_confidence():
    for values in ((5.0, 0.0, 1.0), (0.0, 1.0, 1.0), (5.0, 1.0, 0.0)):
        assert combine_scores(*values) == 0
    assert combine_scores(math.log(2), 1.0, 0.5) == pytest.approx(0.25)
