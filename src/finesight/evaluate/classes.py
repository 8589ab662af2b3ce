"""One of several classes: accuracy, mean F1 of the classes, and which are taken for which.

An answer has to name its class and nothing else; case, width variants and punctuation at its ends
do not matter. The classes are those of the right answers; whatever else is said counts as `OTHER`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.answered import Case, Scored, Scores, means
from finesight.evaluate.bootstrap import Array, Weights, divided
from finesight.evaluate.text import folded_text

OTHER = "(something else)"

SHOWN = 200
"""Most pairs of classes that the confusion lists, the most frequent first."""


def score(cases: Sequence[Case]) -> Scored:
    """Accuracy and mean F1 of the classes that are wanted or said. `details` holds the confusion:
    [right class, class said, how often]."""
    truths = [[folded_text(truth) for truth in case.truths] for case in cases]
    classes = sorted({truth for several in truths for truth in several})
    known = set(classes)
    said, right = [], []
    for case, several in zip(cases, truths, strict=True):
        answer = folded_text(case.answer)
        said.append(answer if answer in known else OTHER)
        right.append(answer if answer in several else several[0])
    each: list[Scores] = [{"accuracy": float(s == r)} for s, r in zip(said, right, strict=True)]
    accuracy = means(each)
    number = {name: i for i, name in enumerate(classes)}
    columns = np.zeros((len(cases), 2, len(classes)))
    for i, (s, r) in enumerate(zip(said, right, strict=True)):
        columns[i, 1, number[r]] += 1
        if s in number:
            columns[i, 1, number[s]] += 1
            columns[i, 0, number[s]] += s == r

    def figures(weights: Weights) -> dict[str, Array]:
        return accuracy(weights) | {"f1_macro": _macro(columns, weights)}

    pairs = Counter(zip(right, said, strict=True))
    listed = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN]
    return Scored(each, figures, {"confusion": [[r, s, count] for (r, s), count in listed]})


def _macro(columns: Array, weights: Weights) -> Array:
    """Mean, over the classes that occur in a resample, of 2 * right / (wanted + said)."""
    samples, _, classes = columns.shape
    sums = (weights @ columns.reshape(samples, -1)).reshape(len(weights), 2, classes)
    occurs = sums[:, 1] > 0
    return divided(divided(2 * sums[:, 0], sums[:, 1]).sum(axis=1), occurs.sum(axis=1) * 1.0)
