"""All objects of a picture (detection): average precision as COCO has it, and F1.

Answers carry no confidence, so all boxes count as equally sure. Average precision then ranks boxes
as COCO's code ranks ties: by picture in the order of the data, within one as the answer names them.
It therefore depends on that order, if little; F1 does not, and stands for all here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from finesight.data.boxes import iou
from finesight.data.sample import BoxPart
from finesight.evaluate.answered import Case, Scored, Scores, means
from finesight.evaluate.bootstrap import (
    EMPTY,
    Array,
    Estimator,
    SampleGroup,
    divided,
    grouped_sums,
    ratio,
    typical_classes,
)
from finesight.evaluate.boxes import box_scores, name_of

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
ROUNDING = 1e-9
MOST_BOXES = 100
"""Of one class in one picture; COCO passes over any more."""

BIASED = "biased upwards on small sets: compare it on the same samples only"


@dataclass(frozen=True, slots=True)
class Class:
    """Boxes of one class over N samples: of each of D found ones its sample and whether it is right
    at each of 10 thresholds (10, D), in the order of rank, and how many each sample wants (N,)."""

    samples: NDArray[np.int64]
    right: NDArray[np.bool_]
    wanted: Array


def score(cases: Sequence[Case]) -> Scored:
    """F1, precision and recall at an IoU of 0.5 over all boxes, average precision over ten
    thresholds and at 0.5 and 0.75 (means over the classes of the truth), mean IoU, and the share
    of answers with a box. Labels have to agree, without regard to case."""
    classes = matched(cases)
    found, right, wanted = (np.zeros(len(cases)) for _ in range(3))
    for one in classes:
        np.add.at(found, one.samples, 1.0)
        np.add.at(right, one.samples, one.right[0].astype(np.float64))
        wanted += one.wanted
    each: list[Scores] = [
        box_scores(case.boxes, case.targets)
        | {"f1": 2 * right[i] / (found[i] + wanted[i]) if found[i] + wanted[i] else 1.0}
        for i, case in enumerate(cases)
    ]
    estimators = {
        "f1_at_0.5": ratio(2 * right, found + wanted),
        "precision_at_0.5": ratio(right, found),
        "recall_at_0.5": ratio(right, wanted),
        **average_precision(classes, len(cases)),
        **means(each, {"mean_iou": "iou", "parse_rate": "parsed"}),
    }
    return Scored(each, estimators)


def matched(cases: Sequence[Case]) -> list[Class]:
    """Found boxes and truths of each class that either names, paired as COCO's code does: each
    found box in turn takes the free truth that it covers best, if well enough."""
    names = sorted({name_of(box) for case in cases for box in (*case.boxes, *case.targets)})
    samples: dict[str, list[int]] = {name: [] for name in names}
    right: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in names}
    wanted = {name: np.zeros(len(cases)) for name in names}
    for i, case in enumerate(cases):
        found, truth = _by_class(case.boxes), _by_class(case.targets)
        for place in sorted({*found, *truth}):
            name = place[1]
            said = found[place][:MOST_BOXES]
            samples[name] += [i] * len(said)
            right[name] += _right(said, truth[place])
            wanted[name][i] += len(truth[place])
    none = np.zeros((len(THRESHOLDS), 0), np.bool_)
    return [
        Class(
            np.array(samples[name], np.int64),
            np.stack(right[name], axis=1) if right[name] else none,
            wanted[name],
        )
        for name in names
    ]


def _by_class(boxes: Sequence[BoxPart]) -> dict[tuple[int, str], list[BoxPart]]:
    """Boxes by their picture and their name."""
    grouped: dict[tuple[int, str], list[BoxPart]] = defaultdict(list)
    for box in boxes:
        grouped[box.image, name_of(box)].append(box)
    return grouped


def _right(found: Sequence[BoxPart], truth: Sequence[BoxPart]) -> list[NDArray[np.bool_]]:
    """Of each found box: whether it takes a truth, at each threshold."""
    overlaps = [[iou(box.xyxy, target.xyxy) for target in truth] for box in found]
    right = np.zeros((len(found), len(THRESHOLDS)), np.bool_)
    for t, threshold in enumerate(THRESHOLDS):
        free = set(range(len(truth)))
        for i, row in enumerate(overlaps):
            # Of equal overlaps the later truth, as in COCO's code.
            best = max(free, key=lambda j: (row[j], j), default=None)
            if best is not None and row[best] >= threshold:
                free.remove(best)
                right[i, t] = True
    return list(right)


def average_precision(classes: Sequence[Class], samples: int) -> dict[str, Estimator]:
    """Return the estimators of COCO's average precision over ten thresholds, at 0.5 and at 0.75.

    Of each class and threshold it is the mean, over 101 recalls, of the best precision at that
    recall or beyond; then the mean over the classes that are wanted. Taking the best biases it
    upwards on small sets. Since all boxes are equally sure, precision does not depend on recall,
    and on a large set average precision is precision times recall: its interval is that of this
    product, which counts alone determine.
    """
    wanted_classes = [one for one in classes if one.wanted.any()]
    groups = [_counts(one) for one in wanted_classes]
    by_threshold = [_precision(one) for one in wanted_classes]
    reported = np.mean(by_threshold, axis=0) if by_threshold else np.zeros(len(THRESHOLDS))
    width = 2 + len(THRESHOLDS)
    sizes, undefined = np.zeros(0), EMPTY
    if groups:
        counts = [int(np.count_nonzero(group.values[:, 1])) for group in groups]
        parts, undefined = typical_classes(counts, samples)
        squares = [(group.values[:, 1] ** 2).sum() for group in groups]
        sizes = parts * np.sqrt(np.divide(squares, counts))
    # The typical sample has as many boxes found as wanted.
    boxes = np.arange(width) < 2
    sums = grouped_sums(groups, samples)
    # Thresholds 0.5 and 0.75 are the first and the sixth.
    chosen = {"ap": slice(None), "ap_50": slice(0, 1), "ap_75": slice(5, 6)}
    return {
        name: Estimator(
            sums=sums,
            value=partial(_large_set, thresholds=thresholds, width=width),
            rates=_rates(groups, samples)[:, thresholds].mean(axis=1),
            worst=np.outer(sizes, boxes).ravel(),
            slope=np.outer(sizes, ~boxes).ravel(),
            biased=True,
            reported=float(reported[thresholds].mean()),
            undefined=undefined,
            note=BIASED,
        )
        for name, thresholds in chosen.items()
    }


def _counts(one: Class) -> SampleGroup:
    """Boxes found, wanted and right at each threshold, of each sample with boxes of a class."""
    counts = np.zeros((len(one.wanted), 2 + len(THRESHOLDS)))
    counts[:, 1] = one.wanted
    np.add.at(counts[:, 0], one.samples, 1.0)
    np.add.at(counts[:, 2:], one.samples, one.right.T.astype(np.float64))
    used = np.flatnonzero(counts[:, :2].any(axis=1))
    return SampleGroup(used, counts[used])


def _rates(groups: Sequence[SampleGroup], samples: int) -> Array:
    """F1 of each sample at each threshold: (N, 10)."""
    boxes, right = np.zeros((samples, 1)), np.zeros((samples, len(THRESHOLDS)))
    for group in groups:
        boxes[group.samples, 0] += group.values[:, :2].sum(axis=1)
        right[group.samples] += group.values[:, 2:]
    return np.where(boxes > 0, divided(2 * right, np.broadcast_to(boxes, right.shape)), 1.0)


def _large_set(sums: Array, thresholds: slice, width: int) -> Array:
    """Average precision of a large set of samples with such sums: (R, classes * width) -> (R,)."""
    counts = sums.reshape(len(sums), -1, width)
    found, wanted, right = counts[..., :1], counts[..., 1:2], counts[..., 2:][..., thresholds]
    precision = divided(right, np.broadcast_to(found, right.shape))
    recall = divided(right, np.broadcast_to(wanted, right.shape))
    # How many of the 101 recalls are reached; none where nothing is right.
    reached = (np.floor(100 * recall + ROUNDING) + 1) * (right > 0)
    by_class = (precision * reached / len(RECALLS)).mean(axis=2)
    return divided(by_class.sum(axis=1), (counts[..., 1] > 0).sum(axis=1) * 1.0)


def _precision(one: Class) -> Array:
    """Return the average precision of a class at each threshold: (10,)."""
    result = np.zeros(len(THRESHOLDS))
    wanted = one.wanted.sum()
    for t, right in enumerate(one.right):
        # Recall grows, and precision can be highest, only where a found box is right.
        places = np.flatnonzero(right)
        hits = np.arange(1.0, len(places) + 1)
        precision = hits / (places + 1 + np.spacing(1))
        best = np.maximum.accumulate(precision[::-1])[::-1]
        # How many of the 101 recalls are reached.
        reached = np.searchsorted(RECALLS, hits / wanted, side="right")
        result[t] = (np.diff(reached, prepend=0) * best).sum() / len(RECALLS)
    return result
