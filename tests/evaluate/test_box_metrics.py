"""Scores of boxes: grounding by hand, detection against pycocotools."""

import contextlib
import io
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finesight.evaluate.bootstrap import REASON_RARE_CLASS
from finesight.evaluate.box_metrics import compute_box_scores, match_boxes
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metrics.detection.score import score_detection
from finesight.evaluate.metrics.grounding.score import score_grounding
from finesight.samples.sample import BoxPart


def box(label: str | None, *xyxy: float, image: int = 0) -> BoxPart:
    x1, y1, x2, y2 = xyxy
    return BoxPart(image=image, label=label, xyxy=(x1, y1, x2, y2))


def case(found: Sequence[BoxPart], truth: Sequence[BoxPart]) -> EvalCase:
    return EvalCase("", tuple(found), ("",), tuple(truth))


SQUARE = box(None, 0, 0, 10, 10)
SPRAY = [SQUARE, *(box(None, 50 * i, 0, 50 * i + 10, 10) for i in range(1, 4))]
DOG, CAT = box("dog", 0, 0, 10, 10), box("cat", 20, 0, 30, 10)
SWAPPED = [box("cat", 0, 0, 10, 10), box("dog", 20, 0, 30, 10)]


@pytest.mark.parametrize(
    ("found", "truth", "scores"),
    [
        ([SQUARE], [box(None, 0, 0, 10, 20)], (1, 0.5, 1, 0)),
        ([box(None, 0, 0, 10, 9)], [box(None, 0, 0, 10, 20)], (1, 0.45, 0, 0)),
        ([], [SQUARE], (0, 0, 0, 0)),
        ([], [], (1, 1, 1, 1)),
        # Extra boxes lower the score.
        (SPRAY, [SQUARE], (1, 0.25, 0.25, 0.25)),
        # Labels count only if targets differ.
        (SWAPPED, [DOG, CAT], (1, 0, 0, 0)),
        ([box("Dog ", 0, 0, 10, 10)], [DOG], (1, 1, 1, 1)),
        ([SQUARE], [DOG], (1, 1, 1, 1)),
        ([box(None, 0, 0, 10, 10, image=1)], [SQUARE], (1, 0, 0, 0)),
    ],
)
def test_scores_of_grounded_boxes(found, truth, scores):
    names = ("parse_rate", "iou", "hit", "hit_at_0.75")
    assert compute_box_scores(found, truth) == pytest.approx(dict(zip(names, scores, strict=True)))


def test_boxes_are_matched_greedily_by_iou() -> None:
    truth = [box(None, 0, 0, 10, 10), box(None, 0, 0, 10, 8)]
    # Both found boxes cover the second target best; the better one gets it.
    found = [box(None, 0, 0, 10, 9), box(None, 0, 0, 10, 8)]
    assert match_boxes(found, truth) == [(1, 1, 1.0), (0, 0, pytest.approx(0.9))]


def test_grounding_is_the_mean_over_answers() -> None:
    cases = [case([box(None, 0, 0, 10, 7)], [SQUARE]), case([], [SQUARE])]
    assert score_grounding(cases).scores == pytest.approx(
        {"accuracy_at_0.5": 0.5, "accuracy_at_0.75": 0, "mean_iou": 0.35, "parse_rate": 0.5}
    )


def compute_reference(cases: Sequence[EvalCase]) -> list[float]:
    """Average precision at 0.5 to 0.95, 0.5 and 0.75 by pycocotools, all scores the same."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    names = sorted({b.label for one in cases for b in (*one.boxes, *one.reference_boxes)})

    def convert(several: Sequence[Sequence[BoxPart]], **more: object) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for image, boxes in enumerate(several, start=1):
            for one in boxes:
                x1, y1, x2, y2 = one.xyxy
                entry = {"image_id": image, "category_id": names.index(one.label) + 1}
                found.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1], **more})
        return [{**one, "id": number} for number, one in enumerate(found, start=1)]

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(1, len(cases) + 1)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
            "annotations": convert([one.reference_boxes for one in cases], area=1, iscrowd=0),
        }
        truth.createIndex()
        found = truth.loadRes(convert([one.boxes for one in cases], score=1.0))
        measured = evaluation.COCOeval(truth, found, "bbox")
        measured.params.areaRng, measured.params.areaRngLbl = [[0, 1e10]], ["all"]
        measured.evaluate()
        measured.accumulate()
    precision = measured.eval["precision"][:, :, :, 0, -1]
    return [float(part[part > -1].mean()) for part in (precision, precision[0], precision[5])]


def assert_agreement(cases: Sequence[EvalCase]) -> None:
    scores = score_detection(cases).scores
    own = [scores["ap"], scores["ap_50"], scores["ap_75"]]
    assert own == pytest.approx(compute_reference(cases), abs=1e-9)


def make_boxes(chance: random.Random, count: int, labels: str) -> list[BoxPart]:
    corners = [(chance.randrange(80), chance.randrange(80)) for _ in range(count)]
    return [
        box(chance.choice(labels), x, y, x + chance.randrange(1, 40), y + chance.randrange(1, 40))
        for x, y in corners
    ]


def shift_box(chance: random.Random, one: BoxPart) -> BoxPart:
    x1, y1, x2, y2 = (edge + chance.randrange(-3, 4) for edge in one.xyxy)
    return box(one.label, x1, y1, max(x1 + 1, x2), max(y1 + 1, y2))


def make_case(chance: random.Random, most: int, extra: int, labels: str) -> EvalCase:
    truth = make_boxes(chance, chance.randrange(most), labels)
    found = [shift_box(chance, one) for one in truth if chance.random() < 0.7]
    found += make_boxes(chance, chance.randrange(extra), labels)
    chance.shuffle(found)
    return case(found, truth)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1))
def test_average_precision_matches_pycocotools(seed: int) -> None:
    """Compare sets of up to eight images and three classes, with correct and wrong boxes."""
    chance = random.Random(seed)
    labels = "abc"[: chance.randint(1, 3)]
    cases = [make_case(chance, 8, 3, labels) for _ in range(chance.randint(1, 8))]
    assert_agreement([*cases, case([box("a", 0, 0, 9, 9)], [box("a", 0, 0, 9, 10)])])


def test_more_than_100_boxes_per_image() -> None:
    chance = random.Random(0)
    truth = make_boxes(chance, 130, "a")
    assert_agreement([case([shift_box(chance, one) for one in truth], truth)])


def test_hand_computed_detection_scores() -> None:
    truth = [DOG, CAT, box("cat", 40, 0, 50, 10)]
    found = [box("Dog ", 0, 0, 10, 9), box("dog", 20, 0, 30, 10), box("cat", 40, 0, 50, 10)]
    scored = score_detection([case(found, truth), case([], []), case([box("cow", 0, 0, 1, 1)], [])])
    scores = scored.scores
    assert scores["precision_at_0.5"] == pytest.approx(2 / 4)
    assert scores["recall_at_0.5"] == pytest.approx(2 / 3)
    assert scores["f1_at_0.5"] == pytest.approx(2 * 2 / (4 + 3))
    # Dog: one of one found at rank one. Cat: one of two, at rank one, up to a recall of 0.5.
    assert scores["ap_50"] == pytest.approx((1 + 51 / 101) / 2)
    assert scores["parse_rate"] == 1
    assert [one["f1"] for one in scored.per_sample] == [pytest.approx(2 / 3), 1.0, 0.0]


def test_resampled_scores_match_drawn_images() -> None:
    """Make boxes of one class per image, so that a repeated image repeats no order."""
    chance = random.Random(3)
    cases = [
        case([shift_box(chance, one)], [one, *make_boxes(chance, 1, "ab")])
        for one in make_boxes(chance, 30, "ab")
    ]
    drawn = np.bincount(np.random.default_rng(1).integers(0, 30, 30), minlength=30)
    repeated = [one for one, count in zip(cases, drawn, strict=True) for _ in range(count)]
    expected = score_detection(repeated).estimators
    for name, one in score_detection(cases).estimators.items():
        (found,) = one.score_from_sums(one.weighted_sums(drawn[None].astype(float)))
        assert found == pytest.approx(expected[name].plug_in_score), name


def test_a_class_of_few_samples_leaves_average_precision_without_an_interval() -> None:
    chance = random.Random(12)
    several = [make_case(chance, 4, 2, "ab") for _ in range(30)]
    assert score_detection(several).intervals()["ap"] is not None
    rare = [box("rare", 0, 0, 9, 9)]
    scored = score_detection([*several, case(rare, rare)])
    assert scored.intervals()["ap"] is None
    assert scored.notes()["ap"] == REASON_RARE_CLASS
    assert scored.intervals()["f1_at_0.5"] is not None
