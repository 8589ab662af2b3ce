"""Classification metrics: accuracy, macro F1 and the confusion matrix.

The answer must consist of the class name only; case, Unicode width and surrounding punctuation are
ignored. The classes are those of the references; any other answer counts as `OTHER_CLASS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.bootstrap import (
    FloatArray,
    SampleGroup,
    ScoreEstimator,
    build_grouped_sums,
    safe_divide,
    typical_classes,
)
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.evaluate.ocr_metrics import fold_text

OTHER_CLASS = "(something else)"

MAX_CONFUSION_PAIRS = 200
"""Maximum number of confusion matrix entries in `details`, the most frequent ones."""


def score_classification(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute accuracy and macro F1.

    `details["confusion"]` lists [reference class, predicted class, count].
    """
    references = [[fold_text(reference) for reference in case.references] for case in cases]
    classes = sorted({truth for several in references for truth in several})
    class_set = set(classes)
    predicted, expected = [], []
    for case, case_references in zip(cases, references, strict=True):
        answer = fold_text(case.answer)
        predicted.append(answer if answer in class_set else OTHER_CLASS)
        expected.append(answer if answer in case_references else case_references[0])
    per_sample: list[MetricValues] = [
        {"accuracy": float(s == r)} for s, r in zip(predicted, expected, strict=True)
    ]
    estimators = mean_metrics(per_sample)
    estimators["f1_macro"] = _compute_f1_macro(
        classes, predicted, expected, estimators["accuracy"].sample_rates
    )
    pairs = Counter(zip(expected, predicted, strict=True))
    confusion_pairs = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[
        :MAX_CONFUSION_PAIRS
    ]
    return MetricResult(
        per_sample, estimators, {"confusion": [[r, s, count] for (r, s), count in confusion_pairs]}
    )


def _compute_f1_macro(
    classes: Sequence[str],
    predicted: Sequence[str],
    expected: Sequence[str],
    accuracies: FloatArray,
) -> ScoreEstimator:
    """Return the estimator of macro F1: the mean of 2 * correct / (references + predictions)."""
    counts: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in classes}
    for i, (s, r) in enumerate(zip(predicted, expected, strict=True)):
        counts[r][i] = (1.0, 2.0) if s == r else (0.0, 1.0)
        if s != r and s in counts:
            counts[s][i] = (0.0, 1.0)
    seen = {name: own for name, own in counts.items() if own}
    groups = [
        SampleGroup(np.array(list(own), np.int64), np.array(list(own.values())).reshape(-1, 2))
        for own in seen.values()
    ]
    wanted = Counter(expected)
    parts, rare = typical_classes([wanted[name] for name in seen], len(expected))

    def value(sums: FloatArray) -> FloatArray:
        hits, both = np.moveaxis(sums.reshape(len(sums), len(groups), 2), 2, 0)
        return safe_divide(safe_divide(2 * hits, both).sum(axis=1), (both > 0).sum(axis=1) * 1.0)

    return ScoreEstimator(
        weighted_sums=build_grouped_sums(groups, len(expected)),
        score_from_sums=value,
        sample_rates=accuracies,
        is_biased=True,
        pseudo_sums=np.outer(parts, [0, 2]).ravel(),
        pseudo_slope=np.outer(parts, [1, 0]).ravel(),
        undefined_reason=rare,
    )
