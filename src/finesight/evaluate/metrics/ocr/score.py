"""Metric of read texts: similarity, exact match, character and word error rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finesight.evaluate.bootstrap import NON_NEGATIVE, FloatArray, ScoreEstimator, estimate_ratio
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.evaluate.text_metrics import find_nearest_reference, fold_text, normalize_text


def score_ocr(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute similarity, exact match, and character and word error rates.

    Similarity is 1 - edits / length of the longer text, for the nearest reference. Exact match is
    computed with and without text folding. Error rates are the sum of all edits divided by the sum
    of all reference lengths.
    """
    per_sample: list[MetricValues] = []
    error_counts: list[tuple[int, ...]] = []
    for case in cases:
        prediction, *references = map(normalize_text, (case.answer, *case.references))
        edits, max_length, length = find_nearest_reference(prediction, references)
        reference_words = [reference.split() for reference in references]
        word_edits, _, word_count = find_nearest_reference(prediction.split(), reference_words)
        is_equal_folded = fold_text(case.answer) in map(fold_text, case.references)
        per_sample.append(
            {
                "similarity": 1.0 - edits / max(1, max_length),
                "exact": float(edits == 0),
                "exact_folded": float(is_equal_folded),
                "cer": edits / max(1, length),
                "wer": word_edits / max(1, word_count),
            }
        )
        error_counts.append((edits, length, word_edits, word_count))
    columns = np.array(error_counts, np.float64).T
    rates = {"cer": _estimate_error_rate(*columns[:2]), "wer": _estimate_error_rate(*columns[2:])}
    return MetricResult(per_sample, mean_metrics(per_sample) | rates)


def _estimate_error_rate(edits: FloatArray, lengths: FloatArray) -> ScoreEstimator:
    """Return the estimator of an error rate: summed edits over summed reference lengths."""
    if not lengths.any():
        lengths = np.full_like(lengths, 1 / len(lengths))
    return estimate_ratio(edits, lengths, NON_NEGATIVE)
