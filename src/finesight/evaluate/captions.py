"""Captions against one or more references: BLEU, ROUGE-L and CIDEr-D as COCO has them.

Defined as the code of the COCO evaluation (Chen et al. 2015) computes them: BLEU over the whole
corpus with the closest reference length (Papineni et al. 2002), ROUGE-L with beta 1.2 (Lin 2004),
CIDEr-D with n-grams to 4, sigma 6 and a factor of 10 (Vedantam et al. 2015). In resamples the
rarity of n-grams stays that of the whole set. METEOR, a Java program, is not here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.answered import Case, Scored, means
from finesight.evaluate.bootstrap import NON_NEGATIVE, Array, Estimator, divided
from finesight.evaluate.words import words

Words = Sequence[str]
Gram = tuple[str, ...]
Grams = Counter[Gram]

LONGEST_GRAM = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0

# The COCO evaluation's way around zeros: without a match of an order BLEU is small but not 0.
_TINY, _SMALL = 1e-15, 1e-9


def score(cases: Sequence[Case]) -> Scored:
    """CIDEr-D, ROUGE-L and BLEU-1 to BLEU-4 of captions; the first two of each alone as well."""
    said = [words(case.answer) for case in cases]
    truths = [[words(truth) for truth in case.truths] for case in cases]
    rouge = [rouge_l(s, t) for s, t in zip(said, truths, strict=True)]
    cider = cider_d(said, truths)
    each = [{"cider_d": c, "rouge_l": r} for r, c in zip(rouge, cider, strict=True)]
    counts = bleu_counts(said, truths)
    bleus = {f"bleu_{n}": bleu_estimator(counts, n) for n in range(1, LONGEST_GRAM + 1)}
    # CIDEr-D ends at 10, which no set comes near: its bound would say nothing.
    return Scored(each, means(each, bounds={"cider_d": NON_NEGATIVE}) | bleus)


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4, in [0, 1]."""
    totals = bleu_counts(candidates, references).sum(axis=0, keepdims=True)
    return [float(_bleu(totals, order)[0]) for order in range(1, LONGEST_GRAM + 1)]


def bleu_counts(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Array:
    """What BLEU sums up, a row for each candidate: n-grams matched (4 orders) and offered (4), its
    length, and the length of the reference that is closest to it, of two the shorter."""
    rows = []
    for candidate, truths in zip(candidates, references, strict=True):
        matched, offered = [], []
        for order in range(1, LONGEST_GRAM + 1):
            said = _grams(candidate, order)
            most: Grams = Counter()
            for truth in truths:
                most |= _grams(truth, order)
            matched.append((said & most).total())
            offered.append(said.total())
        closest = min((abs(len(t) - len(candidate)), len(t)) for t in truths)[1]
        rows.append([*matched, *offered, len(candidate), closest])
    return np.array(rows, np.float64)


def bleu_estimator(counts: Array, order: int) -> Estimator:
    """Return the estimator of BLEU up to n-grams of an order, from the rows of `bleu_counts`."""
    matched, offered = counts[:, :LONGEST_GRAM], counts[:, LONGEST_GRAM : 2 * LONGEST_GRAM]
    worst = counts.mean(axis=0)
    slope = np.zeros_like(worst)
    slope[:LONGEST_GRAM] = worst[LONGEST_GRAM : 2 * LONGEST_GRAM]
    worst[:LONGEST_GRAM] = 0.0
    return Estimator(
        sums=lambda weights: weights @ counts,
        value=lambda totals: _bleu(totals, order),
        rates=divided(matched, offered)[:, :order].mean(axis=1),
        worst=worst,
        slope=slope,
    )


def _bleu(totals: Array, order: int) -> Array:
    """BLEU of sums of the rows of `bleu_counts`: (R, 10) -> (R,)."""
    matched, offered = totals[:, :order], totals[:, LONGEST_GRAM : LONGEST_GRAM + order]
    length, closest = totals[:, -2], totals[:, -1]
    value: Array = np.prod((matched + _TINY) / (offered + _SMALL), axis=1) ** (1 / order)
    ratio = (length + _TINY) / (closest + _SMALL)
    return value * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """F-measure of the longest common subsequence, in [0, 1]: the best precision and the best
    recall over the references, recall weighted by beta 1.2 squared. A text without words counts
    as one empty word, as it does in the COCO evaluation."""
    said = candidate or [""]
    common = [(_longest_common(said, truth or [""]), len(truth) or 1) for truth in references]
    precision = max(length for length, _ in common) / len(said)
    recall = max(length / total for length, total in common)
    if precision == 0.0 or recall == 0.0:
        return 0.0
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each candidate, in [0, 10]; the corpus figure is the mean.

    The weight of an n-gram falls with the number of pictures whose references hold it, so the
    score of one picture depends on the others and is 0 when there is only one.
    """
    counted = [[_all_grams(truth) for truth in truths] for truths in references]
    pictures_with: Grams = Counter()
    for truths in counted:
        pictures_with.update(set().union(*truths))
    log_pictures = math.log(max(1, len(candidates)))
    rarity = {gram: log_pictures - math.log(n) for gram, n in pictures_with.items()}
    scores = []
    for candidate, truths in zip(candidates, counted, strict=True):
        said = _weighted(_all_grams(candidate), rarity, log_pictures)
        likeness = [_cider_pair(said, _weighted(t, rarity, log_pictures)) for t in truths]
        scores.append(CIDER_SCALE * sum(likeness) / len(likeness))
    return scores


def _grams(sentence: Words, order: int) -> Grams:
    return Counter(tuple(sentence[i : i + order]) for i in range(len(sentence) - order + 1))


def _all_grams(sentence: Words) -> Grams:
    grams: Grams = Counter()
    for order in range(1, LONGEST_GRAM + 1):
        grams.update(_grams(sentence, order))
    return grams


_Weights = list[dict[Gram, float]]


def _weighted(
    grams: Grams, rarity: dict[Gram, float], unseen: float
) -> tuple[_Weights, list[float], int]:
    """TF-IDF weights and their norm by order, and the sentence's length in bigrams (which is
    how the COCO evaluation measures length)."""
    weights: _Weights = [{} for _ in range(LONGEST_GRAM)]
    for gram, count in grams.items():
        weights[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
    norms = [math.sqrt(sum(w * w for w in by_gram.values())) for by_gram in weights]
    return weights, norms, sum(count for gram, count in grams.items() if len(gram) == 2)


def _cider_pair(
    said: tuple[_Weights, list[float], int], truth: tuple[_Weights, list[float], int]
) -> float:
    said_weights, said_norms, said_length = said
    true_weights, true_norms, true_length = truth
    total = 0.0
    for order in range(LONGEST_GRAM):
        # The candidate's weight is clipped to the reference's: repeating a word gains nothing.
        dot = sum(
            min(weight, true_weights[order].get(gram, 0.0)) * true_weights[order].get(gram, 0.0)
            for gram, weight in said_weights[order].items()
        )
        norm = said_norms[order] * true_norms[order]
        total += dot / norm if norm else 0.0
    gap = said_length - true_length
    return total / LONGEST_GRAM * math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))


def _longest_common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
