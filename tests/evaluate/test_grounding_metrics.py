from __future__ import annotations

import pytest

from finesight.data.sample import BoxPart
from finesight.evaluate.box_metrics import compute_box_scores, match_boxes, score_grounding
from finesight.evaluate.eval_case import EvalCase


def box(x1: float, y1: float, x2: float, y2: float, label: str | None = None, image: int = 0):
    return BoxPart(image=image, label=label, xyxy=(x1, y1, x2, y2))


def test_one_box_for_one_target():
    assert compute_box_scores([box(0, 0, 10, 10)], [box(0, 0, 10, 20)]) == {
        "parse_rate": 1,
        "iou": 0.5,
        "hit": 1,
        "hit_at_0.75": 0,
    }
    assert compute_box_scores([box(0, 0, 10, 9)], [box(0, 0, 10, 20)])["hit"] == 0


def test_answer_without_box_scores_zero():
    assert compute_box_scores([], [box(0, 0, 1, 1)]) == {
        "parse_rate": 0,
        "iou": 0,
        "hit": 0,
        "hit_at_0.75": 0,
    }
    assert compute_box_scores([], [])["iou"] == 1


def test_extra_boxes_lower_the_score():
    right = box(0, 0, 10, 10)
    spray = [right, *(box(50 * i, 0, 50 * i + 10, 10) for i in range(1, 4))]
    assert compute_box_scores(spray, [right]) == {
        "parse_rate": 1,
        "iou": 0.25,
        "hit": 0.25,
        "hit_at_0.75": 0.25,
    }


def test_boxes_are_matched_greedily_by_iou():
    truth = [box(0, 0, 10, 10), box(0, 0, 10, 8)]
    # Both found boxes cover the second target best; the better one gets it.
    found = [box(0, 0, 10, 9), box(0, 0, 10, 8)]
    assert match_boxes(found, truth) == [(1, 1, 1.0), (0, 0, pytest.approx(0.9))]


def test_labels_count_only_if_targets_differ():
    dog, cat = box(0, 0, 10, 10, "dog"), box(20, 0, 30, 10, "cat")
    swapped = [box(0, 0, 10, 10, "cat"), box(20, 0, 30, 10, "dog")]
    assert compute_box_scores(swapped, [dog, cat])["iou"] == 0
    assert compute_box_scores([box(0, 0, 10, 10, "Dog ")], [dog])["iou"] == 1
    assert compute_box_scores([box(0, 0, 10, 10)], [dog])["iou"] == 1


def test_boxes_of_different_images_do_not_match():
    assert compute_box_scores([box(0, 0, 10, 10, image=1)], [box(0, 0, 10, 10)])["iou"] == 0


def test_answers_without_box_are_misses():
    target = box(0, 0, 10, 10)
    cases = [
        EvalCase("", (box(0, 0, 10, 7),), ("",), (target,)),
        EvalCase("no", (), ("",), (target,)),
    ]
    assert score_grounding(cases).scores == pytest.approx(
        {"accuracy_at_0.5": 0.5, "accuracy_at_0.75": 0, "mean_iou": 0.35, "parse_rate": 0.5}
    )
