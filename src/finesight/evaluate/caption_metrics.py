"""Caption metrics with one or more references: BLEU, ROUGE-L and CIDEr-D as in COCO.

Same definitions as the COCO evaluation code (Chen et al. 2015): corpus BLEU with the closest
reference length (Papineni et al. 2002), ROUGE-L with beta 1.2 (Lin 2004), CIDEr-D with n-grams up
to 4, sigma 6 and a factor of 10 (Vedantam et al. 2015). Resamples use the document frequencies of
the full set. METEOR, a Java program, is not included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.bootstrap import NON_NEGATIVE, FloatArray, ScoreEstimator, safe_divide
from finesight.evaluate.eval_case import EvalCase, MetricResult, mean_metrics
from finesight.evaluate.ptb_tokenizer import tokenize_caption

WordSequence = Sequence[str]
NGram = tuple[str, ...]
NGramCounts = Counter[NGram]

MAX_NGRAM_ORDER = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0

# Smoothing of the COCO evaluation: without matches of an order BLEU is small but not 0.
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9


def score_captions(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute CIDEr-D, ROUGE-L and BLEU-1 to BLEU-4; CIDEr-D and ROUGE-L also per sample."""
    candidates = [tokenize_caption(case.answer) for case in cases]
    references = [[tokenize_caption(reference) for reference in case.references] for case in cases]
    rouge = [
        compute_rouge_l(candidate, candidate_references)
        for candidate, candidate_references in zip(candidates, references, strict=True)
    ]
    cider = compute_cider_d(candidates, references)
    per_sample = [{"cider_d": c, "rouge_l": r} for r, c in zip(rouge, cider, strict=True)]
    counts = count_bleu_statistics(candidates, references)
    bleu_fns = {f"bleu_{n}": estimate_bleu(counts, n) for n in range(1, MAX_NGRAM_ORDER + 1)}
    # CIDEr-D is bounded by 10, but no set approaches this bound, so it is not informative.
    return MetricResult(
        per_sample, mean_metrics(per_sample, bounds={"cider_d": NON_NEGATIVE}) | bleu_fns
    )


def compute_corpus_bleu(
    candidates: Sequence[WordSequence], references: Sequence[Sequence[WordSequence]]
) -> list[float]:
    """Compute corpus BLEU-1 to BLEU-4, in [0, 1]."""
    totals = count_bleu_statistics(candidates, references).sum(axis=0, keepdims=True)
    return [float(_compute_bleu(totals, order)[0]) for order in range(1, MAX_NGRAM_ORDER + 1)]


def count_bleu_statistics(
    candidates: Sequence[WordSequence], references: Sequence[Sequence[WordSequence]]
) -> FloatArray:
    """Count the n-gram statistics of corpus BLEU, one row per candidate.

    Columns: matched n-grams (4 orders), candidate n-grams (4 orders), candidate length, and the
    length of the closest reference (the shorter one of two).
    """
    rows = []
    for candidate, candidate_references in zip(candidates, references, strict=True):
        num_matches, num_candidate_ngrams = [], []
        for order in range(1, MAX_NGRAM_ORDER + 1):
            candidate_ngrams = _count_ngrams(candidate, order)
            max_reference_counts: NGramCounts = Counter()
            for reference in candidate_references:
                max_reference_counts |= _count_ngrams(reference, order)
            num_matches.append((candidate_ngrams & max_reference_counts).total())
            num_candidate_ngrams.append(candidate_ngrams.total())
        closest_length = min((abs(len(t) - len(candidate)), len(t)) for t in candidate_references)[
            1
        ]
        rows.append([*num_matches, *num_candidate_ngrams, len(candidate), closest_length])
    return np.array(rows, np.float64)


def estimate_bleu(counts: FloatArray, order: int) -> ScoreEstimator:
    """Return the estimator of corpus BLEU with n-grams up to `order`.

    `counts` are the rows of `count_bleu_statistics`.
    """
    matched, offered = counts[:, :MAX_NGRAM_ORDER], counts[:, MAX_NGRAM_ORDER : 2 * MAX_NGRAM_ORDER]
    worst = counts.mean(axis=0)
    slope = np.zeros_like(worst)
    slope[:MAX_NGRAM_ORDER] = worst[MAX_NGRAM_ORDER : 2 * MAX_NGRAM_ORDER]
    worst[:MAX_NGRAM_ORDER] = 0.0
    return ScoreEstimator(
        weighted_sums=lambda weights: weights @ counts,
        score_from_sums=lambda totals: _compute_bleu(totals, order),
        sample_rates=safe_divide(matched, offered)[:, :order].mean(axis=1),
        pseudo_sums=worst,
        pseudo_slope=slope,
    )


def _compute_bleu(totals: FloatArray, order: int) -> FloatArray:
    """Compute BLEU from sums of rows of `count_bleu_statistics`: (R, 10) -> (R,)."""
    num_matches, num_candidate_ngrams = (
        totals[:, :order],
        totals[:, MAX_NGRAM_ORDER : MAX_NGRAM_ORDER + order],
    )
    length, closest_length = totals[:, -2], totals[:, -1]
    value: FloatArray = np.prod(
        (num_matches + _BLEU_TINY) / (num_candidate_ngrams + _BLEU_SMALL), axis=1
    ) ** (1 / order)
    ratio = (length + _BLEU_TINY) / (closest_length + _BLEU_SMALL)
    return value * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def compute_rouge_l(candidate: WordSequence, references: Sequence[WordSequence]) -> float:
    """Compute ROUGE-L, the F-measure of the longest common subsequence, in [0, 1].

    Uses the best precision and the best recall over the references, with recall weighted by beta
    1.2 squared. A text without words counts as one empty word, as in the COCO evaluation.
    """
    candidate_words = candidate or [""]
    lcs_lengths = [
        (_lcs_length(candidate_words, reference or [""]), len(reference) or 1)
        for reference in references
    ]
    precision = max(length for length, _ in lcs_lengths) / len(candidate_words)
    recall = max(length / total for length, total in lcs_lengths)
    if precision == 0.0 or recall == 0.0:
        return 0.0
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def compute_cider_d(
    candidates: Sequence[WordSequence], references: Sequence[Sequence[WordSequence]]
) -> list[float]:
    """Compute CIDEr-D of each candidate, in [0, 10]; the corpus score is the mean.

    The weight of an n-gram decreases with the number of images whose references contain it. The
    score of an image depends on the other images and is 0 for a set of one image.
    """
    reference_counts = [
        [_count_all_ngrams(reference) for reference in truths] for truths in references
    ]
    document_frequency: NGramCounts = Counter()
    for candidate_references in reference_counts:
        document_frequency.update(set().union(*candidate_references))
    log_num_images = math.log(max(1, len(candidates)))
    idf = {ngram: log_num_images - math.log(n) for ngram, n in document_frequency.items()}
    scores = []
    for candidate, candidate_references in zip(candidates, reference_counts, strict=True):
        candidate_vector = _compute_tf_idf(_count_all_ngrams(candidate), idf, log_num_images)
        similarities = [
            _cider_similarity(candidate_vector, _compute_tf_idf(t, idf, log_num_images))
            for t in candidate_references
        ]
        scores.append(CIDER_SCALE * sum(similarities) / len(similarities))
    return scores


def _count_ngrams(sentence: WordSequence, order: int) -> NGramCounts:
    return Counter(tuple(sentence[i : i + order]) for i in range(len(sentence) - order + 1))


def _count_all_ngrams(sentence: WordSequence) -> NGramCounts:
    counts: NGramCounts = Counter()
    for order in range(1, MAX_NGRAM_ORDER + 1):
        counts.update(_count_ngrams(sentence, order))
    return counts


_TfIdfWeights = list[dict[NGram, float]]


def _compute_tf_idf(
    counts: NGramCounts, idf: dict[NGram, float], default_idf: float
) -> tuple[_TfIdfWeights, list[float], int]:
    """Return the TF-IDF weights of a sentence by n-gram order, their norms, and its length.

    The length is the number of bigrams, as in the COCO evaluation.
    """
    weights: _TfIdfWeights = [{} for _ in range(MAX_NGRAM_ORDER)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, default_idf)
    norms = [math.sqrt(sum(w * w for w in order_weights.values())) for order_weights in weights]
    return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _cider_similarity(
    candidate: tuple[_TfIdfWeights, list[float], int],
    reference: tuple[_TfIdfWeights, list[float], int],
) -> float:
    candidate_weights, candidate_norms, candidate_length = candidate
    reference_weights, reference_norms, reference_length = reference
    total = 0.0
    for order in range(MAX_NGRAM_ORDER):
        # Candidate weights are clipped to the reference: repeated words do not raise the score.
        dot = sum(
            min(weight, reference_weights[order].get(ngram, 0.0))
            * reference_weights[order].get(ngram, 0.0)
            for ngram, weight in candidate_weights[order].items()
        )
        norm = candidate_norms[order] * reference_norms[order]
        total += dot / norm if norm else 0.0
    length_difference = candidate_length - reference_length
    return total / MAX_NGRAM_ORDER * math.exp(-(length_difference**2) / (2 * CIDER_SIGMA**2))


def _lcs_length(a: WordSequence, b: WordSequence) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
