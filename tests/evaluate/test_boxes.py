from __future__ import annotations

import pytest

from finesight.data.sample import BoxPart
from finesight.evaluate.answered import Case
from finesight.evaluate.boxes import box_scores, match, score


def box(x1: float, y1: float, x2: float, y2: float, label: str | None = None, image: int = 0):
    return BoxPart(image=image, label=label, xyxy=(x1, y1, x2, y2))


def test_one_box_for_one_target():
    assert box_scores([box(0, 0, 10, 10)], [box(0, 0, 10, 20)]) == {
        "parsed": 1,
        "iou": 0.5,
        "hit": 1,
        "hit_at_0.75": 0,
    }
    assert box_scores([box(0, 0, 10, 9)], [box(0, 0, 10, 20)])["hit"] == 0


def test_an_answer_without_a_box_scores_nothing():
    assert box_scores([], [box(0, 0, 1, 1)]) == {
        "parsed": 0,
        "iou": 0,
        "hit": 0,
        "hit_at_0.75": 0,
    }
    assert box_scores([], [])["iou"] == 1


def test_more_boxes_than_targets_gain_nothing():
    right = box(0, 0, 10, 10)
    spray = [right, *(box(50 * i, 0, 50 * i + 10, 10) for i in range(1, 4))]
    assert box_scores(spray, [right]) == {
        "parsed": 1,
        "iou": 0.25,
        "hit": 0.25,
        "hit_at_0.75": 0.25,
    }


def test_each_box_is_matched_once_and_the_best_first():
    truth = [box(0, 0, 10, 10), box(0, 0, 10, 8)]
    # Both found boxes cover the second target best; the better one gets it.
    found = [box(0, 0, 10, 9), box(0, 0, 10, 8)]
    assert match(found, truth) == [(1, 1, 1.0), (0, 0, pytest.approx(0.9))]


def test_labels_count_only_where_targets_differ():
    dog, cat = box(0, 0, 10, 10, "dog"), box(20, 0, 30, 10, "cat")
    swapped = [box(0, 0, 10, 10, "cat"), box(20, 0, 30, 10, "dog")]
    assert box_scores(swapped, [dog, cat])["iou"] == 0
    assert box_scores([box(0, 0, 10, 10, "Dog ")], [dog])["iou"] == 1
    assert box_scores([box(0, 0, 10, 10)], [dog])["iou"] == 1


def test_boxes_of_another_picture_do_not_match():
    assert box_scores([box(0, 0, 10, 10, image=1)], [box(0, 0, 10, 10)])["iou"] == 0


def test_answers_without_a_box_are_misses():
    target = box(0, 0, 10, 10)
    cases = [Case("", (box(0, 0, 10, 7),), ("",), (target,)), Case("no", (), ("",), (target,))]
    assert score(cases).scores == pytest.approx(
        {"accuracy_at_0.5": 0.5, "accuracy_at_0.75": 0, "mean_iou": 0.35, "parse_rate": 0.5}
    )
