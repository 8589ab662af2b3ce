"""Metrics of answer texts: OCR, visual question answering and classification.

- OCR: character and word error rates, similarity and exact match.
- Question answering, with the best reference: exact match and word F1 as in SQuAD (Rajpurkar et al.
  2016). ANLS as in ST-VQA and DocVQA (Biten et al. 2019): 1 - edits / length of the longer text, 0
  below 0.5, ignoring case.
- Classification: accuracy, macro F1 and the confusion matrix. The answer must consist of the class
  name only; case, Unicode width and surrounding punctuation are ignored. The classes are those of
  the references; any other answer counts as `OTHER_CLASS`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from finesight.evaluate.bootstrap import (
    NON_NEGATIVE,
    ClassCounts,
    FloatArray,
    ScoreEstimator,
    count_by_class,
    estimate_macro_f1,
    estimate_ratio,
)
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics


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
    rows = []
    for reference in references:
        distance = compute_edit_distance(candidate, reference)
        max_length = max(len(candidate), len(reference))
        rows.append((distance, max_length, len(reference)))
    return min(rows, key=lambda row: row[0] / max(1, row[1]))


def compute_edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Compute the Levenshtein distance of two token sequences.

    Hyyrö's (2003) version of the bit-vector algorithm of Myers (1999): a column of the table is two
    integers of len(a) bits, so the cost is len(b) operations on them. The names are those of the
    paper: `vp` and `hp` mark vertical and horizontal differences of 1, `vn` and `hn` those of -1.
    """
    if not a:
        return len(b)
    position_masks: dict[str, int] = {}
    for i, token in enumerate(a):
        position_masks[token] = position_masks.get(token, 0) | 1 << i
    full_mask = (1 << len(a)) - 1
    last_bit = 1 << (len(a) - 1)
    vp = full_mask
    vn = 0
    distance = len(a)
    for token in b:
        equal = position_masks.get(token, 0)
        d0 = (((equal & vp) + vp) ^ vp) | equal | vn
        hp = vn | (~(d0 | vp) & full_mask)
        hn = vp & d0
        distance += bool(hp & last_bit) - bool(hn & last_bit)
        # The first row of the table increases by 1 per column, so a 1 is shifted in.
        hp = (hp << 1 | 1) & full_mask
        hn = hn << 1 & full_mask
        vp = hn | (~(d0 | hp) & full_mask)
        vn = hp & d0
    return distance


def _estimate_error_rate(edits: FloatArray, lengths: FloatArray) -> ScoreEstimator:
    """Return the estimator of an error rate: summed edits over summed reference lengths."""
    if not lengths.any():
        lengths = np.full_like(lengths, 1 / len(lengths))
    return estimate_ratio(edits, lengths, NON_NEGATIVE)


ANLS_THRESHOLD = 0.5

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_qa(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute ANLS, exact match and word F1 with the best reference, also per sample."""
    per_sample: list[MetricValues] = []
    for case in cases:
        is_exact = normalize_answer(case.answer) in map(normalize_answer, case.references)
        per_sample.append(
            {
                "anls": max(compute_anls(case.answer, reference) for reference in case.references),
                "exact": float(is_exact),
                "f1": max(compute_word_f1(case.answer, reference) for reference in case.references),
            }
        )
    return MetricResult(per_sample, mean_metrics(per_sample))


def normalize_answer(text: str) -> str:
    """Convert text to lower case without ASCII punctuation, English articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def compute_word_f1(answer: str, reference: str) -> float:
    """Compute the word F1 of two texts after normalization; 1 if both are empty."""
    answer_words = Counter(normalize_answer(answer).split())
    reference_words = Counter(normalize_answer(reference).split())
    return compute_f1(answer_words, reference_words)


def compute_f1(predicted: Counter[Any], reference: Counter[Any]) -> float:
    """Compute the F1 of counted values; 1 if both are empty."""
    num_total = predicted.total() + reference.total()
    if not num_total:
        return 1.0
    return 2 * (predicted & reference).total() / num_total


def compute_anls(answer: str, reference: str) -> float:
    """Compute the average normalized Levenshtein similarity (ANLS) of one answer.

    The result is 0 or in [0.5, 1], and 1 if both texts are empty.
    """
    answer_text = " ".join(answer.lower().split())
    reference_text = " ".join(reference.lower().split())
    max_length = max(1, len(answer_text), len(reference_text))
    similarity = 1.0 - compute_edit_distance(answer_text, reference_text) / max_length
    if similarity < ANLS_THRESHOLD:
        return 0.0
    return similarity


OTHER_CLASS = "(something else)"

MAX_CONFUSION_PAIRS = 200


def score_classification(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute accuracy and macro F1.

    `details["confusion"]` lists [reference class, predicted class, count].
    """
    references = [[*map(fold_text, case.references)] for case in cases]
    classes = set(chain.from_iterable(references))
    per_sample: list[MetricValues] = []
    labels: list[tuple[ClassCounts, ClassCounts]] = []
    pair_counts: Counter[tuple[str, str]] = Counter()
    for case, case_references in zip(cases, references, strict=True):
        answer = fold_text(case.answer)
        predicted = OTHER_CLASS
        if answer in classes:
            predicted = answer
        expected = case_references[0]
        if answer in case_references:
            expected = answer
        per_sample.append({"accuracy": float(predicted == expected)})
        labels.append((Counter([(predicted, "")]), Counter([(expected, "")])))
        pair_counts[expected, predicted] += 1
    estimators = mean_metrics(per_sample)
    groups = count_by_class(labels)
    groups.pop(OTHER_CLASS, None)
    sample_rates = estimators["accuracy"].sample_rates
    estimators["f1_macro"] = estimate_macro_f1([*groups.values()], sample_rates)
    most_frequent = sorted(pair_counts.items(), key=lambda item: (-item[1], item[0]))
    confusion = [[*pair, count] for pair, count in most_frequent[:MAX_CONFUSION_PAIRS]]
    return MetricResult(per_sample, estimators, {"confusion": confusion})
