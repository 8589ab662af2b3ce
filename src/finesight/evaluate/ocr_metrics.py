"""OCR metrics: character and word error rates, and exact match."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.bootstrap import NON_NEGATIVE, ScoreEstimator, estimate_ratio
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics


def score_ocr(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute similarity, exact match, and character and word error rates.

    Similarity is 1 - edits / length of the longer text, for the nearest reference. Exact match is
    computed with and without text folding. Error rates are the sum of all edits divided by the sum
    of all reference lengths.
    """
    per_sample: list[MetricValues] = []
    character_errors, word_errors = [], []
    for case in cases:
        prediction, references = (
            normalize_text(case.answer),
            [normalize_text(truth) for truth in case.references],
        )
        edits, max_length, length = find_nearest_reference(prediction, references)
        word_edits, _, word_count = find_nearest_reference(
            prediction.split(), [truth.split() for truth in references]
        )
        folded = {fold_text(reference) for reference in case.references}
        per_sample.append(
            {
                "similarity": 1.0 - edits / max(1, max_length),
                "exact": float(edits == 0),
                "exact_folded": float(fold_text(case.answer) in folded),
                "cer": edits / max(1, length),
                "wer": word_edits / max(1, word_count),
            }
        )
        character_errors.append((edits, length))
        word_errors.append((word_edits, word_count))
    rate_fns = {
        "cer": _build_error_rate_fn(character_errors),
        "wer": _build_error_rate_fn(word_errors),
    }
    return MetricResult(per_sample, mean_metrics(per_sample) | rate_fns)


def normalize_text(text: str) -> str:
    """Normalize Unicode to NFC and whitespace to single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def fold_text(text: str) -> str:
    """Normalize text for comparison without case, Unicode width and outer punctuation.

    Text that is only punctuation is retained.
    """
    text = unicodedata.normalize("NFKC", normalize_text(text)).casefold()
    punctuation = "".join(c for c in set(text) if unicodedata.category(c).startswith("P"))
    return text.strip(punctuation + " ") or text


def find_nearest_reference(
    candidate: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[int, int, int]:
    """Find the reference with the smallest edit distance, relative to the longer text.

    Returns:
        Edit distance, length of the longer text, and length of the reference.
    """
    distances = [
        (
            compute_edit_distance(candidate, reference),
            max(len(candidate), len(reference)),
            len(reference),
        )
        for reference in references
    ]
    return min(distances, key=lambda edits: edits[0] / max(1, edits[1]))


def compute_edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Compute the Levenshtein distance of two token sequences.

    Hyyrö's (2003) version of the bit-vector algorithm of Myers (1999): a column of the table is two
    integers of len(a) bits, so the cost is len(b) operations on them.
    """
    if not a:
        return len(b)
    position_masks: dict[str, int] = {}
    for i, token in enumerate(a):
        position_masks[token] = position_masks.get(token, 0) | 1 << i
    full_mask, last_bit = (1 << len(a)) - 1, 1 << (len(a) - 1)
    vertical_positive, vertical_negative, distance = full_mask, 0, len(a)
    for token in b:
        equal = position_masks.get(token, 0)
        diagonal = (
            (((equal & vertical_positive) + vertical_positive) ^ vertical_positive)
            | equal
            | vertical_negative
        )
        horizontal_positive = vertical_negative | (~(diagonal | vertical_positive) & full_mask)
        horizontal_negative = vertical_positive & diagonal
        distance += bool(horizontal_positive & last_bit) - bool(horizontal_negative & last_bit)
        # The first row of the table increases by 1 per column, so a 1 is shifted in.
        horizontal_positive = (horizontal_positive << 1 | 1) & full_mask
        horizontal_negative = horizontal_negative << 1 & full_mask
        vertical_positive = horizontal_negative | (~(diagonal | horizontal_positive) & full_mask)
        vertical_negative = horizontal_positive & diagonal
    return distance


def _build_error_rate_fn(edits: Sequence[tuple[int, int]]) -> ScoreEstimator:
    """Return the estimator of an error rate: summed edits over summed reference lengths."""
    edit_counts, lengths = np.array(edits, np.float64).T
    lengths = lengths if lengths.any() else np.full_like(lengths, 1 / len(lengths))
    return estimate_ratio(edit_counts, lengths, NON_NEGATIVE)
