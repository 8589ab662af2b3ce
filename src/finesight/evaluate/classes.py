"""One of several classes: accuracy, mean F1 of the classes, and which are taken for which.

An answer has to name its class and nothing else; case, width variants and punctuation at its ends
do not matter. The classes are those of the right answers; whatever else is said counts as `OTHER`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from finesight.evaluate.answered import Case, Scored, Scores, means
from finesight.evaluate.bootstrap import (
    Array,
    Estimator,
    SampleGroup,
    divided,
    grouped_sums,
    typical_classes,
)
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
    estimators = means(each)
    estimators["f1_macro"] = _macro(classes, said, right, estimators["accuracy"].rates)
    pairs = Counter(zip(right, said, strict=True))
    listed = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN]
    return Scored(each, estimators, {"confusion": [[r, s, count] for (r, s), count in listed]})


def _macro(
    classes: Sequence[str], said: Sequence[str], right: Sequence[str], accuracies: Array
) -> Estimator:
    """Return the estimator of the mean, over the classes, of 2 * right / (wanted + said)."""
    counts: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in classes}
    for i, (s, r) in enumerate(zip(said, right, strict=True)):
        counts[r][i] = (1.0, 2.0) if s == r else (0.0, 1.0)
        if s != r and s in counts:
            counts[s][i] = (0.0, 1.0)
    seen = {name: own for name, own in counts.items() if own}
    groups = [
        SampleGroup(np.array(list(own), np.int64), np.array(list(own.values())).reshape(-1, 2))
        for own in seen.values()
    ]
    wanted = Counter(right)
    parts, rare = typical_classes([wanted[name] for name in seen], len(right))

    def value(sums: Array) -> Array:
        hits, both = np.moveaxis(sums.reshape(len(sums), len(groups), 2), 2, 0)
        return divided(divided(2 * hits, both).sum(axis=1), (both > 0).sum(axis=1) * 1.0)

    return Estimator(
        sums=grouped_sums(groups, len(right)),
        value=value,
        rates=accuracies,
        biased=True,
        worst=np.outer(parts, [0, 2]).ravel(),
        slope=np.outer(parts, [1, 0]).ravel(),
        undefined=rare,
    )
