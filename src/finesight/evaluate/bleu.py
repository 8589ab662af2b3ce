"""Corpus BLEU with the closest reference length (Papineni et al. 2002), as in COCO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.bootstrap import FloatArray, ScoreEstimator, safe_divide

WordSequence = Sequence[str]
NGram = tuple[str, ...]
NGramCounts = Counter[NGram]
MAX_NGRAM_ORDER = 4
_BLEU_COLUMNS = (MAX_NGRAM_ORDER, 2 * MAX_NGRAM_ORDER)


# Smoothing of the COCO evaluation: without matches of an order BLEU is small but not 0.
_BLEU_TINY = 1e-15
_BLEU_SMALL = 1e-9


def count_bleu_statistics(
    candidates: Sequence[WordSequence], references: Sequence[Sequence[WordSequence]]
) -> FloatArray:
    """Count the n-gram statistics of corpus BLEU, one row per candidate.

    Columns: matched n-grams (4 orders), candidate n-grams (4 orders), candidate length, and the
    length of the closest reference (the shorter one of two).
    """
    rows = []
    for candidate, candidate_references in zip(candidates, references, strict=True):
        num_matches = []
        num_candidate_ngrams = []
        for order in range(1, MAX_NGRAM_ORDER + 1):
            candidate_ngrams = count_ngrams(candidate, order)
            max_reference_counts: NGramCounts = Counter()
            for reference in candidate_references:
                max_reference_counts |= count_ngrams(reference, order)
            num_matches.append((candidate_ngrams & max_reference_counts).total())
            num_candidate_ngrams.append(candidate_ngrams.total())
        lengths = map(len, candidate_references)
        closest_length = min(lengths, key=lambda n: (abs(n - len(candidate)), n))
        rows.append([*num_matches, *num_candidate_ngrams, len(candidate), closest_length])
    return np.array(rows, np.float64)


def estimate_bleu(counts: FloatArray, order: int) -> ScoreEstimator:
    """Return the estimator of corpus BLEU with n-grams up to `order`.

    `counts` are the rows of `count_bleu_statistics`.
    """
    matched, offered, _ = np.split(counts, _BLEU_COLUMNS, axis=1)
    is_match = np.arange(counts.shape[1]) < MAX_NGRAM_ORDER
    means = counts.mean(axis=0)
    return ScoreEstimator(
        weighted_sums=lambda weights: weights @ counts,
        score_from_sums=lambda totals: _compute_bleu(totals, order),
        sample_rates=safe_divide(matched, offered)[:, :order].mean(axis=1),
        pseudo_sums=np.where(is_match, 0.0, means),
        pseudo_slope=np.where(is_match, np.roll(means, -MAX_NGRAM_ORDER), 0.0),
    )


def _compute_bleu(totals: FloatArray, order: int) -> FloatArray:
    """Compute BLEU from sums of rows of `count_bleu_statistics`: (R, 10) -> (R,)."""
    num_matches, num_ngrams, (length, closest_length) = np.split(totals.T, _BLEU_COLUMNS)
    precision = (num_matches + _BLEU_TINY) / (num_ngrams + _BLEU_SMALL)
    ratio = (length + _BLEU_TINY) / (closest_length + _BLEU_SMALL)
    value: FloatArray = np.prod(precision[:order], axis=0) ** (1 / order)
    value *= np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return value


def count_ngrams(sentence: WordSequence, order: int) -> NGramCounts:
    return Counter(tuple(sentence[i : i + order]) for i in range(len(sentence) - order + 1))
