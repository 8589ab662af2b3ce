"""All objects of a picture (detection): average precision as COCO has it, and F1.

Answers carry no confidence, so all boxes count as equally sure. Average precision then ranks boxes
as COCO's code ranks ties: by picture in the order of the data, within one as the answer names them.
It therefore depends on that order, if little; F1 does not, and stands for all here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.data.boxes import iou
from finesight.data.sample import BoxPart
from finesight.evaluate.answered import Case, Scored, Scores, means, together
from finesight.evaluate.bootstrap import Array, Weights, divided, ratios
from finesight.evaluate.boxes import box_scores, name_of

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST_BOXES = 100
"""Of one class in one picture; COCO passes over any more."""


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
    counted = together(
        {
            "f1_at_0.5": ratios(2 * right, found + wanted),
            "precision_at_0.5": ratios(right, found),
            "recall_at_0.5": ratios(right, wanted),
        }
    )
    averages = means(each, mean_iou="iou", parse_rate="parsed")
    precise = average_precision(classes)
    return Scored(each, lambda weights: counted(weights) | precise(weights) | averages(weights))


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


def average_precision(classes: Sequence[Class]) -> Callable[[Weights], dict[str, Array]]:
    """COCO's average precision: of each class and threshold the mean, over 101 recalls, of the best
    precision at that recall or beyond; then the mean over the classes that are wanted."""

    def figures(weights: Weights) -> dict[str, Array]:
        total = np.zeros((len(weights), len(THRESHOLDS)))
        present = np.zeros(len(weights))
        for one in classes:
            wanted = weights @ one.wanted
            if wanted.any():
                total += _precision(one, weights, wanted)
                present += wanted > 0
        by_threshold = divided(total, present[:, None])
        # Thresholds 0.5 and 0.75 are the first and the sixth.
        return {
            "ap": by_threshold.mean(axis=1),
            "ap_50": by_threshold[:, 0],
            "ap_75": by_threshold[:, 5],
        }

    return figures


def _precision(one: Class, weights: Weights, wanted: Array) -> Array:
    """Average precision of a class in each resample and at each threshold: (R, 10)."""
    drawn = weights[:, one.samples]
    ranked = np.cumsum(drawn, axis=1)
    result = np.zeros((len(weights), len(THRESHOLDS)))
    for t, right in enumerate(one.right):
        # Recall grows, and precision can be highest, only where a found box is right.
        places = np.flatnonzero(right)
        if not len(places):
            continue
        hits = np.cumsum(drawn[:, places], axis=1)
        precision = hits / (ranked[:, places] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = divided(hits, wanted[:, None])
        # How many of the 101 recalls are reached; none while nothing right has been drawn.
        reached = np.searchsorted(RECALLS, recall, side="right") * (hits > 0)
        steps = np.diff(reached, axis=1, prepend=0)
        result[:, t] = (steps * best).sum(axis=1) / len(RECALLS)
    return result
