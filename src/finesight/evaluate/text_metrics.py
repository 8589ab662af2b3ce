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
from typing import Any

import numpy as np

from finesight.evaluate.bootstrap import (
    NON_NEGATIVE,
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
        words, *reference_words = (text.split() for text in (prediction, *references))
        word_edits, _, word_count = find_nearest_reference(words, reference_words)
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
    lengths = [(max(len(candidate), len(one)), len(one)) for one in references]
    distances = [compute_edit_distance(candidate, reference) for reference in references]
    rows = zip(distances, *zip(*lengths, strict=True), strict=True)
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
    full_mask, last_bit = (1 << len(a)) - 1, 1 << (len(a) - 1)
    vp, vn, distance = full_mask, 0, len(a)
    for token in b:
        equal = position_masks.get(token, 0)
        d0 = (((equal & vp) + vp) ^ vp) | equal | vn
        hp, hn = vn | (~(d0 | vp) & full_mask), vp & d0
        distance += bool(hp & last_bit) - bool(hn & last_bit)
        # The first row of the table increases by 1 per column, so a 1 is shifted in.
        hp, hn = (hp << 1 | 1) & full_mask, hn << 1 & full_mask
        vp, vn = hn | (~(d0 | hp) & full_mask), hp & d0
    return distance


def _estimate_error_rate(edits: FloatArray, lengths: FloatArray) -> ScoreEstimator:
    """Return the estimator of an error rate: summed edits over summed reference lengths."""
    lengths = lengths if lengths.any() else np.full_like(lengths, 1 / len(lengths))
    return estimate_ratio(edits, lengths, NON_NEGATIVE)


ANLS_THRESHOLD = 0.5

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_qa(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute ANLS, exact match and word F1 with the best reference, also per sample."""
    per_sample: list[MetricValues] = [
        {
            "anls": max(compute_anls(case.answer, reference) for reference in case.references),
            "exact": float(normalize_answer(case.answer) in map(normalize_answer, case.references)),
            "f1": max(compute_word_f1(case.answer, truth) for truth in case.references),
        }
        for case in cases
    ]
    return MetricResult(per_sample, mean_metrics(per_sample))


def normalize_answer(text: str) -> str:
    """Convert text to lower case without ASCII punctuation, English articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def compute_word_f1(answer: str, reference: str) -> float:
    """Compute the word F1 of two texts after normalization; 1 if both are empty."""
    return compute_f1(*(Counter(normalize_answer(text).split()) for text in (answer, reference)))


def compute_f1(predicted: Counter[Any], reference: Counter[Any]) -> float:
    """Compute the F1 of counted values; 1 if both are empty."""
    num_total = predicted.total() + reference.total()
    return 2 * (predicted & reference).total() / num_total if num_total else 1.0


def compute_anls(answer: str, reference: str) -> float:
    """Compute the average normalized Levenshtein similarity (ANLS) of one answer.

    The result is 0 or in [0.5, 1], and 1 if both texts are empty.
    """
    answer_text, reference_text = (" ".join(text.lower().split()) for text in (answer, reference))
    max_length = max(1, len(answer_text), len(reference_text))
    similarity = 1.0 - compute_edit_distance(answer_text, reference_text) / max_length
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


OTHER_CLASS = "(something else)"

MAX_CONFUSION_PAIRS = 200


def score_classification(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute accuracy and macro F1.

    `details["confusion"]` lists [reference class, predicted class, count].
    """
    references = [[fold_text(reference) for reference in case.references] for case in cases]
    classes = {truth for several in references for truth in several}
    predicted, expected = [], []
    for case, case_references in zip(cases, references, strict=True):
        answer = fold_text(case.answer)
        predicted.append(answer if answer in classes else OTHER_CLASS)
        expected.append(answer if answer in case_references else case_references[0])
    per_sample: list[MetricValues] = [
        {"accuracy": float(s == r)} for s, r in zip(predicted, expected, strict=True)
    ]
    estimators = mean_metrics(per_sample)
    labels = [[Counter([(name, "")]) for name in names] for names in (predicted, expected)]
    groups = count_by_class(list(zip(*labels, strict=True)))
    groups.pop(OTHER_CLASS, None)
    sample_rates = estimators["accuracy"].sample_rates
    estimators["f1_macro"] = estimate_macro_f1([*groups.values()], sample_rates)
    counts = Counter(zip(expected, predicted, strict=True))
    pairs = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_CONFUSION_PAIRS]
    confusion = [[*pair, count] for pair, count in pairs]
    return MetricResult(per_sample, estimators, {"confusion": confusion})
