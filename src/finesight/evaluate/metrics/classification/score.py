"""Metric of classes: accuracy, macro F1 and the confusion matrix.

The answer must consist of the class name only; case, Unicode width and surrounding punctuation are
ignored. The classes are those of the references; any other answer counts as `OTHER_CLASS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from finesight.evaluate.bootstrap import ClassCounts, count_by_class, estimate_macro_f1
from finesight.evaluate.eval_case import EvalCase, MetricResult, MetricValues, mean_metrics
from finesight.evaluate.text_metrics import fold_text

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
    groups = count_by_class(labels, classes)
    sample_rates = estimators["accuracy"].sample_rates
    estimators["f1_macro"] = estimate_macro_f1(
        [*groups.values()], sample_rates, counts_predicted=True
    )
    most_frequent = sorted(pair_counts.items(), key=lambda item: (-item[1], item[0]))
    confusion = [[*pair, count] for pair, count in most_frequent[:MAX_CONFUSION_PAIRS]]
    return MetricResult(per_sample, estimators, {"confusion": confusion})
