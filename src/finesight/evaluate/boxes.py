"""Boxes that a question asks for (grounding): how well those of an answer cover them."""

from __future__ import annotations

from collections.abc import Sequence

from finesight.data.boxes import iou
from finesight.data.sample import BoxPart
from finesight.evaluate.answered import Case, Scored, means


def score(cases: Sequence[Case]) -> Scored:
    """Accuracy at an IoU of 0.5 and of 0.75, mean IoU, and the share of answers with a box."""
    each = [box_scores(case.boxes, case.targets) for case in cases]
    names = {
        "accuracy_at_0.5": "hit",
        "accuracy_at_0.75": "hit_at_0.75",
        "mean_iou": "iou",
        "parse_rate": "parsed",
    }
    return Scored(each, means(each, names))


def match(found: Sequence[BoxPart], truth: Sequence[BoxPart]) -> list[tuple[int, int, float]]:
    """Pairs (index in found, index in truth, IoU), each box in at most one pair.

    Greedy, best overlap first, as detection benchmarks do; only boxes of the same picture can be
    a pair. Labels have to agree (without regard to case) only where the truth tells several apart:
    a single target is named by the question already.
    """
    several = len({name_of(t) for t in truth}) > 1
    pairs = [
        (iou(f.xyxy, t.xyxy), i, j)
        for i, f in enumerate(found)
        for j, t in enumerate(truth)
        if f.image == t.image and (not several or name_of(f) == name_of(t))
    ]
    free_found, free_truth = set(range(len(found))), set(range(len(truth)))
    chosen = []
    for overlap, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if overlap > 0 and i in free_found and j in free_truth:
            free_found.remove(i)
            free_truth.remove(j)
            chosen.append((i, j, overlap))
    return chosen


def box_scores(found: Sequence[BoxPart], truth: Sequence[BoxPart]) -> dict[str, float]:
    """`parsed` (1 if the answer holds a box at all), `iou`, `hit` and `hit_at_0.75` of one answer.

    The last three are sums over the pairs of `match` (overlaps, overlaps of at least 0.5 and of at
    least 0.75) over the larger number of boxes: a missed target and a superfluous box cost the
    same, so an answer gains nothing by naming many boxes. With one target and one box they are the
    IoU and the accuracy of referring expressions. A truth without boxes wants an empty answer.
    """
    most = max(len(found), len(truth))
    if most == 0:
        return {"parsed": 1.0, "iou": 1.0, "hit": 1.0, "hit_at_0.75": 1.0}
    overlaps = [overlap for _, _, overlap in match(found, truth)]
    return {
        "parsed": float(len(found) > 0),
        "iou": sum(overlaps) / most,
        "hit": sum(overlap >= 0.5 for overlap in overlaps) / most,
        "hit_at_0.75": sum(overlap >= 0.75 for overlap in overlaps) / most,
    }


def name_of(target: BoxPart) -> str:
    """What a box is called, without regard to case and spaces; empty without a label."""
    return " ".join((target.label or "").casefold().split())
