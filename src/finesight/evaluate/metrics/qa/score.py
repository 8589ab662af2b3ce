"""Metric of short answers to questions, with the best reference.

Exact match and word F1 as in SQuAD (Rajpurkar et al. 2016). ANLS as in ST-VQA and DocVQA (Biten et
al. 2019): 1 - edits / length of the longer text, 0 below 0.5, ignoring case.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.evaluate.text_metrics import compute_edit_distance, compute_f1

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
