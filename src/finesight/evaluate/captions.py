"""Scores of captions against one or more references: BLEU, ROUGE-L and CIDEr-D.

Defined as the COCO caption evaluation does (Chen et al. 2015): BLEU over the whole corpus with
the closest reference length (Papineni et al. 2002), ROUGE-L with beta 1.2 (Lin 2004), CIDEr-D with
n-grams to 4, sigma 6 and a factor of 10 (Vedantam et al. 2015). That evaluation splits words with
a Java tokeniser; `words` here approximates it, so figures can differ from it in the third digit
where captions hold unusual punctuation. The scorers themselves agree with it to rounding.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

LONGEST_GRAM = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0

# A clitic is split from its word as the Penn Treebank does: "don't" is "do" and "n't". Numbers
# keep their inner points and commas and the letters after them (2nd, 10-year-old), words their
# inner hyphens, apostrophes and points (u.s.).
_CLITIC = re.compile(r"(?<=[^\W\d_])(n't|'(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:/]\d+)*\w*(?:-\w+)*|\w+(?:[-'./&]\w+)*|[$%&#@+=*/]"
)


def words(caption: str) -> list[str]:
    """Lower-case words of a caption in Penn Treebank manner, punctuation dropped."""
    plain = caption.lower().replace("\u2019", "'").replace("\u2018", "'")
    return _WORD.findall(_CLITIC.sub(r" \1", plain))


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4, in [0, 1]; 0 where no n-gram of an order matches at all."""
    matched, offered = [0] * LONGEST_GRAM, [0] * LONGEST_GRAM
    length = closest = 0
    for candidate, truths in zip(candidates, references, strict=True):
        length += len(candidate)
        closest += min((abs(len(t) - len(candidate)), len(t)) for t in truths)[1]
        for order in range(LONGEST_GRAM):
            said = _grams(candidate, order + 1)
            most: Grams = Counter()
            for truth in truths:
                most |= _grams(truth, order + 1)
            matched[order] += (said & most).total()
            offered[order] += said.total()
    brevity = 0.0 if length == 0 else min(1.0, math.exp(1 - closest / length))
    scores, log_sum = [], 0.0
    for order in range(LONGEST_GRAM):
        precision = matched[order] / offered[order] if offered[order] else 0.0
        log_sum += math.log(precision) if precision else -math.inf
        scores.append(brevity * math.exp(log_sum / (order + 1)))
    return scores


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """F-measure of the longest common subsequence, in [0, 1]: the best precision and the best
    recall over the references, recall weighted by beta 1.2 squared."""
    common = [_longest_common(candidate, truth) for truth in references]
    precision = max(common) / len(candidate) if candidate else 0.0
    recall = max(c / len(t) if t else 0.0 for c, t in zip(common, references, strict=True))
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


_Weights = list[dict[tuple[str, ...], float]]


def _weighted(
    grams: Grams, rarity: dict[tuple[str, ...], float], unseen: float
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
