"""Ranking of labeled samples by the probability that their label is wrong.

A wrong label is less probable under the model than the model's own answer, and differs from it.

| value | definition |
|---|---|
| `loss` | negative log likelihood of the label under the model, in nats |
| `excess_loss` | `loss` minus the loss of the model's own answer |
| `disagreement` | 1 - F1 of fields, 1 - IoU of boxes, or normalized edit distance of texts |
| `score` | see `combine_scores` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from finesight.data.sample import BoxPart, ContentPart, LocatedSample
from finesight.encode.packing import pack
from finesight.encode.tokenization import EncodedSample
from finesight.evaluate.box_metrics import compute_box_scores
from finesight.evaluate.json_metrics import count_fields, parse_form
from finesight.evaluate.text_metrics import compute_edit_distance, normalize_text
from finesight.infer.model_loader import InferenceModel
from finesight.label.label_store import Suggestion, get_text
from finesight.label.suggestion import suggest_labels
from finesight.model.hf_backend import AnyModel


@dataclass(frozen=True, slots=True)
class RankedLabel:
    """Label of a sample with its probability to be wrong; see the table of this module.

    Attributes:
        suggestion: The model's own answer.
    """

    suggestion: Suggestion
    loss: float
    excess_loss: float
    disagreement: float
    score: float


def rank_labels(
    inference_model: InferenceModel,
    samples: Sequence[LocatedSample],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[RankedLabel], dict[str, str]]:
    """Rank labeled samples, most probably wrong first.

    Returns:
        The ranked labels, and the reason for each sample without a rank by ID: an unreadable image.
    """
    suggestions, reasons = suggest_labels(
        inference_model,
        samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    samples = [sample for sample in samples if sample.sample.id not in reasons]
    losses = compute_label_losses(inference_model, samples, batch_size)
    suggestion_by_id = {suggestion.id: suggestion for suggestion in suggestions}
    ranked = []
    for sample, loss in zip(samples, losses, strict=True):
        suggestion = suggestion_by_id[sample.sample.id]
        disagreement = measure_disagreement(sample.sample.messages[-1].content, suggestion.content)
        excess_loss = max(0.0, loss - suggestion.loss)
        score = combine_scores(excess_loss, disagreement, suggestion.confidence)
        ranked.append(RankedLabel(suggestion, loss, excess_loss, disagreement, score))
    ranked.sort(key=lambda one: -one.score)
    return ranked, reasons


def compute_label_losses(
    inference_model: InferenceModel, samples: Sequence[LocatedSample], batch_size: int = 16
) -> list[float]:
    """Return the negative log likelihood of the last answer of each sample, in nats."""
    model, renderer = inference_model.model, inference_model.renderer
    losses: list[float] = []
    for start in range(0, len(samples), batch_size):
        encoded = [renderer.encode(sample) for sample in samples[start : start + batch_size]]
        losses += [float(-logprobs.sum()) for logprobs in _label_logprobs(model, encoded)]
    return losses


@torch.inference_mode()
def _label_logprobs(
    model: AnyModel, encoded: Sequence[EncodedSample]
) -> Iterator[NDArray[np.float32]]:
    """Yield the log probabilities of the tokens of the last answer of each sample."""
    batch = pack(encoded).to(model.lm_head_weight.device)
    logits_LV = (model(batch) @ model.lm_head_weight.T).float()
    logprobs_L = -torch.nn.functional.cross_entropy(logits_LV, batch.labels_L, reduction="none")
    logprobs, start = logprobs_L.cpu().numpy(), 0
    for sample in encoded:
        stop = start + sample.tokenized.num_supervised_tokens
        supervised = np.flatnonzero(sample.tokenized.loss_mask_T)
        # The supervised tokens of the last answer are adjacent.
        breaks = np.flatnonzero(np.diff(supervised) > 1)
        yield logprobs[start + (int(breaks[-1]) + 1 if len(breaks) else 0) : stop]
        start = stop


def measure_disagreement(label: Sequence[ContentPart], suggestion: Sequence[ContentPart]) -> float:
    """Return the difference of two answers in [0, 1]; see the table of this module."""
    label_boxes, suggested_boxes = (
        [part for part in content if isinstance(part, BoxPart)] for content in (label, suggestion)
    )
    if label_boxes or suggested_boxes:
        return 1 - compute_box_scores(suggested_boxes, label_boxes)["iou"]
    label_text, suggested_text = (
        normalize_text(get_text(content)) for content in (label, suggestion)
    )
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
