"""Suggested labels of a model, with confidences from token probabilities, and ranking of labels.

| part | confidence |
|---|---|
| field of a JSON answer | product of the probabilities of the tokens of its value |
| box | product over the tokens outside of its numbers, times the geometric mean over its numbers |
| text | product of the probabilities of all tokens, including the end token |
| answer | product over the parts and over the tokens between them, including the end token |

The product is the probability that the model assigns to exactly this value. The last digits of a
coordinate hardly change a box, so the numbers of a box have a geometric mean.

Labeled samples are ranked by the probability that their label is wrong. A wrong label is less
probable under the model than the model's own answer, and differs from it.

| value | definition |
|---|---|
| `loss` | negative log likelihood of the label under the model, in nats |
| `excess_loss` | `loss` minus the loss of the model's own answer |
| `disagreement` | 1 - F1 of fields, 1 - overlap of boxes and points, or normalized edit distance |
| `score` | see `combine_scores` |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from finesight.encode.answer_lengths import describe_truncation
from finesight.encode.packing import pack
from finesight.encode.renderer import Renderer
from finesight.errors import UserError
from finesight.evaluate.box_metrics import compute_box_scores
from finesight.evaluate.json_metrics import count_fields, parse_form
from finesight.evaluate.text_metrics import compute_edit_distance, normalize_text
from finesight.infer.model_loader import InferenceModel
from finesight.infer.prediction import Prediction, predict
from finesight.label.label_store import (
    AnswerContent,
    SuggestedPart,
    Suggestion,
    get_text,
    list_boxes,
)
from finesight.samples.boxes import MAX_JSON_DEPTH
from finesight.samples.frames import ImageSize
from finesight.samples.image_file import DEFAULT_SIZE, CorruptImageError
from finesight.samples.sample import ContentPart, LocatedSample, TextPart


class JsonLeaf(NamedTuple):
    """A scalar in a JSON text, with its path and the offsets of its characters."""

    path: tuple[str | int, ...]
    value: Any
    start: int
    stop: int


def suggest_labels(
    inference_model: InferenceModel,
    samples: Sequence[LocatedSample],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[list[Suggestion], dict[str, str]]:
    """Generate suggested labels, least certain first.

    Args:
        log: Called with a warning if many suggestions are truncated.

    Returns:
        The suggestions, and the reason for each sample without one by ID: an unreadable image.

    Raises:
        UserError: The model has no native code, so its token probabilities are unknown.
    """
    model, renderer = inference_model.model, inference_model.renderer
    if not model.capabilities.logprobs:
        raise UserError(
            "the transformers backend has no token probabilities",
            where="label",
            expected="a model of a native family",
            remedy="use --no-suggestions",
        )
    errors: dict[int, CorruptImageError] = {}
    predictions = predict(
        model,
        renderer,
        samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
        on_corrupt_image=errors.__setitem__,
        logprobs=True,
    )
    num_truncated = sum(one.finish_reason == "length" for one in predictions)
    setting = "--max-new-tokens"
    if text := describe_truncation(num_truncated, len(predictions), max_new_tokens, setting):
        log(text)
    readable = [sample for index, sample in enumerate(samples) if index not in errors]
    suggestions = [*map(partial(build_suggestion, renderer), readable, predictions)]
    suggestions.sort(key=lambda suggestion: suggestion.confidence)
    reasons = {samples[i].sample.id: str(error).splitlines()[0] for i, error in errors.items()}
    return suggestions, reasons


def build_suggestion(
    renderer: Renderer, located_sample: LocatedSample, prediction: Prediction
) -> Suggestion:
    """Build the suggestion of a prediction whose tokens have log probabilities."""
    tokens, measure = AnswerTokens(renderer, prediction), AnswerTokens.multiply
    spans: list[tuple[tuple[str | int, ...], tuple[int, int]]] = []
    if prediction.boxes:
        found = _iter_box_spans(renderer, located_sample, prediction, tokens)
        spans = [((index,), span) for index, span in enumerate(found)]
        measure = AnswerTokens.compute_box_confidence
    elif parse_form(prediction.answer) is not None:
        leaves = iter_json_leaves(prediction.raw_text)
        spans = [(leaf.path, tokens.find_span(leaf.start, leaf.stop)) for leaf in leaves]
    parts = [SuggestedPart(path, measure(tokens, *span)) for path, span in spans]
    # Tokens may belong to two adjacent parts; those of no part are the structure of the answer.
    in_parts = {index for _, span in spans for index in range(*span)}
    structure = math.fsum(
        logprob for index, logprob in enumerate(tokens.logprobs) if index not in in_parts
    )
    confidence = math.exp(structure) * math.prod(part.confidence for part in parts)
    content: AnswerContent = prediction.boxes or (TextPart(text=prediction.answer),)
    if not parts:
        parts = [SuggestedPart((), confidence)]
    loss = -math.fsum(tokens.logprobs)
    return Suggestion(prediction.id, content, confidence, tuple(parts), loss)


class AnswerTokens:
    """Tokens of a generated answer with their log probabilities and offsets in `raw_text`.

    Attributes:
        logprobs: Log probability of each token, without those of the reasoning.
        texts: Text of each token; incomplete characters are replaced.
    """

    def __init__(self, renderer: Renderer, prediction: Prediction) -> None:
        logprobs = [token.logprob for token in prediction.tokens if token.logprob is not None]
        assert len(logprobs) == len(prediction.tokens), "a prediction without log probabilities"
        pieces = [renderer.tokenizer.id_to_bytes(token.id) for token in prediction.tokens]
        self._raw_text = prediction.raw_text
        self._raw_bytes = prediction.raw_text.encode(errors="replace")
        # The reasoning precedes the answer.
        offset = max(0, sum(map(len, pieces)) - len(self._raw_bytes))
        stops = [stop - offset for stop in accumulate(map(len, pieces))]
        first = sum(stop <= 0 for stop in stops)
        self._stops = stops[first:]
        self.logprobs = [min(0.0, logprob) for logprob in logprobs[first:]]
        self.texts = [piece.decode(errors="replace") for piece in pieces[first:]]

    def find_span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the index range of the tokens with characters in a range of `raw_text`."""
        start_byte, stop_byte = (
            len(self._raw_text[:offset].encode(errors="replace")) for offset in (start, stop)
        )
        first = sum(stop <= start_byte for stop in self._stops)
        return first, min(sum(stop < stop_byte for stop in self._stops) + 1, len(self._stops))

    def prefix(self, num_tokens: int) -> str:
        """Return the text of the first tokens."""
        return self._raw_bytes[: self._stops[num_tokens - 1]].decode(errors="replace")

    def multiply(self, start: int, stop: int) -> float:
        """Return the product of the probabilities of a range of tokens."""
        return math.exp(math.fsum(self.logprobs[start:stop]))

    def compute_box_confidence(self, start: int, stop: int) -> float:
        """Return the confidence of a box; see the table of this module."""
        is_number = [any(map(str.isdigit, self.texts[index])) for index in range(start, stop)]
        logprobs = self.logprobs[start:stop]
        numbers = [one for one, is_one in zip(logprobs, is_number, strict=True) if is_one]
        others = [one for one, is_one in zip(logprobs, is_number, strict=True) if not is_one]
        return math.exp(math.fsum(others) + math.fsum(numbers) / max(1, len(numbers)))


def _iter_box_spans(
    renderer: Renderer, located_sample: LocatedSample, prediction: Prediction, tokens: AnswerTokens
) -> Iterator[tuple[int, int]]:
    """Yield the token range of each box: from the end of the previous box to its own end.

    A box ends with the first token after which the text contains it and all boxes before it.
    """
    spans = renderer.tokenize_prompt(located_sample).spans
    image_index = prediction.boxes[0].image
    boxes = renderer.parse_boxes(prediction.raw_text, spans, image_index)
    start, num_done = 0, 0
    for num_tokens in range(1, len(tokens.logprobs) + 1):
        if num_done == len(boxes):
            return
        found = renderer.parse_boxes(tokens.prefix(num_tokens), spans, image_index)
        if found[: num_done + 1] == boxes[: num_done + 1]:
            yield start, num_tokens
            start, num_done = num_tokens, num_done + 1
    # Only a text without unique token boundaries has boxes left.
    yield from [(start, start)] * (len(boxes) - num_done)


_JSON_TOKEN = re.compile(r'[{}\[\],:]|"(?:[^"\\]|\\.)*"?|[^\s{}\[\],:"]+')


def iter_json_leaves(text: str) -> Iterator[JsonLeaf]:
    """Yield the scalars of the first JSON object or list in a text, until its first error."""
    start = min((at for at in map(text.find, "{[") if at >= 0), default=len(text))
    path: list[str | int | None] = []
    for match in _JSON_TOKEN.finditer(text, start):
        token = match[0]
        if token in "{[":
            path.append(None if token == "{" else 0)
        elif token in "}]":
            path.pop()
        elif token == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
        elif token != ":":
            try:
                # int() raises ValueError for NaN and Infinity, which are not JSON.
                value = json.loads(token, parse_constant=int)
            except ValueError:
                return
            if path[-1] is None:
                path[-1] = str(value)
            else:
                keys = tuple(key for key in path if key is not None)
                yield JsonLeaf(keys, value, match.start(), match.end())
        if not 0 < len(path) <= MAX_JSON_DEPTH:
            return


def rank_labels(
    inference_model: InferenceModel,
    samples: Sequence[LocatedSample],
    *,
    batch_size: int = 16,
    **options: Any,
) -> tuple[list[Suggestion], dict[str, str]]:
    """Suggest labels with scores for labeled samples, most probably wrong first.

    Args:
        options: Further options of `suggest_labels`, whose values are returned.
    """
    suggestions, reasons = suggest_labels(
        inference_model, samples, batch_size=batch_size, **options
    )
    samples = [sample for sample in samples if sample.sample.id not in reasons]
    losses = compute_label_losses(inference_model, samples, batch_size)
    suggestion_by_id = {suggestion.id: suggestion for suggestion in suggestions}
    ranked: list[tuple[float, Suggestion]] = []
    for sample, loss in zip(samples, losses, strict=True):
        own = suggestion_by_id[sample.sample.id]
        spans = inference_model.renderer.tokenize_prompt(sample).spans
        contents = sample.sample.messages[-1].content, own.content
        size = spans[0].original_size if spans else DEFAULT_SIZE
        disagreement = measure_disagreement(*contents, size)
        score = combine_scores(max(0.0, loss - own.loss), disagreement, own.confidence)
        ranked.append((score, replace(own, score=score)))
    return [one for _, one in sorted(ranked, key=lambda pair: -pair[0])], reasons


@torch.inference_mode()
def compute_label_losses(
    inference_model: InferenceModel, samples: Sequence[LocatedSample], batch_size: int = 16
) -> list[float]:
    """Return the negative log likelihood of the last answer of each sample, in nats."""
    model, losses = inference_model.model, list[float]()
    for start in range(0, len(samples), batch_size):
        encoded = [*map(inference_model.renderer.encode, samples[start : start + batch_size])]
        batch = pack(encoded).to(model.lm_head_weight.device)
        logits_LV = (model(batch) @ model.lm_head_weight.T).float()
        losses_L = torch.nn.functional.cross_entropy(logits_LV, batch.labels_L, reduction="none")
        counts = [sample.tokenized.num_supervised_tokens for sample in encoded]
        for sample, own in zip(encoded, torch.split(losses_L.cpu(), counts), strict=True):
            # The supervised tokens of the last answer are adjacent.
            breaks = np.flatnonzero(np.diff(np.flatnonzero(sample.tokenized.loss_mask_T)) > 1)
            losses.append(float(own[int(breaks[-1]) + 1 if len(breaks) else 0 :].sum()))
    return losses


def measure_disagreement(
    label: Sequence[ContentPart],
    suggestion: Sequence[ContentPart],
    image_size: ImageSize = DEFAULT_SIZE,
) -> float:
    """Return the difference of two answers in [0, 1]; see the table of this module."""
    label_boxes, suggested_boxes = map(list_boxes, (label, suggestion))
    if label_boxes or suggested_boxes:
        return 1 - compute_box_scores(suggested_boxes, label_boxes, image_size)["iou"]
    label_text, suggested_text = (normalize_text(get_text(one)) for one in (label, suggestion))
    label_form, suggested_form = parse_form(label_text), parse_form(suggested_text)
    if label_form is not None and suggested_form is not None:
        label_fields, suggested_fields = count_fields(label_form), count_fields(suggested_form)
        total = label_fields.total() + suggested_fields.total()
        return 1 - 2 * (label_fields & suggested_fields).total() / total if total else 0.0
    longest = max(len(label_text), len(suggested_text))
    return compute_edit_distance(label_text, suggested_text) / longest if longest else 0.0


def combine_scores(excess_loss: float, disagreement: float, confidence: float) -> float:
    """Return the score of a label in [0, 1]: disagreement x (1 - exp(-excess loss)) x confidence.

    The confidence is that of the model's own answer: only a certain model contradicts a label.
    """
    return disagreement * (1 - math.exp(-excess_loss)) * confidence
