from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Sequence

import numpy as np
import pytest

from finesight.data.sample import BoxPart
from finesight.evaluate.bootstrap import REASON_RARE_CLASS
from finesight.evaluate.box_metrics import score_detection
from finesight.evaluate.eval_case import EvalCase


def box(label: str | None, *xyxy: float, image: int = 0) -> BoxPart:
    return BoxPart(image=image, label=label, xyxy=tuple(xyxy))


def case(found: Sequence[BoxPart], truth: Sequence[BoxPart]) -> EvalCase:
    return EvalCase("", tuple(found), ("",), tuple(truth))


def _oracle(cases: Sequence[EvalCase]) -> list[float]:
    """Average precision at 0.5 to 0.95, 0.5 and 0.75 by pycocotools, all scores the same."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    names = sorted({b.label for one in cases for b in (*one.boxes, *one.reference_boxes)})
    gold = {
        "images": [{"id": i} for i in range(1, len(cases) + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
        "annotations": [
            {**_as_coco(b, names), "image_id": i, "area": 1, "iscrowd": 0}
            for i, one in enumerate(cases, start=1)
            for b in one.reference_boxes
        ],
    }
    for i, annotation in enumerate(gold["annotations"], start=1):
        annotation["id"] = i
    found = [
        {**_as_coco(b, names), "image_id": i, "score": 1.0}
        for i, one in enumerate(cases, start=1)
        for b in one.boxes
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = gold
        truth.createIndex()
        measured = evaluation.COCOeval(truth, truth.loadRes(found), "bbox")
        measured.params.areaRng = [[0, 1e10]]
        measured.params.areaRngLbl = ["all"]
        measured.evaluate()
        measured.accumulate()
    precision = measured.eval["precision"][:, :, :, 0, -1]
    return [float(part[part > -1].mean()) for part in (precision, precision[0], precision[5])]


def _as_coco(one: BoxPart, names: list[str]) -> dict[str, object]:
    x1, y1, x2, y2 = one.xyxy
    return {"category_id": names.index(one.label) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}


def _boxes(chance: random.Random, count: int, labels: str) -> list[BoxPart]:
    corners = [(chance.randrange(80), chance.randrange(80)) for _ in range(count)]
    return [
        box(chance.choice(labels), x, y, x + chance.randrange(1, 40), y + chance.randrange(1, 40))
        for x, y in corners
    ]


def _shift_box(chance: random.Random, one: BoxPart) -> BoxPart:
    x1, y1, x2, y2 = (edge + chance.randrange(-3, 4) for edge in one.xyxy)
    return box(one.label, x1, y1, max(x1 + 1, x2), max(y1 + 1, y2))


def _make_case(chance: random.Random, truth: Sequence[BoxPart], labels: str) -> EvalCase:
    found = [_shift_box(chance, one) for one in truth if chance.random() < 0.7]
    found += _boxes(chance, chance.randrange(3), labels)
    chance.shuffle(found)
    return case(found, truth)


def _agree(cases: Sequence[EvalCase]) -> None:
    scores = score_detection(cases).scores
    own = [scores["ap"], scores["ap_50"], scores["ap_75"]]
    assert own == pytest.approx(_oracle(cases), abs=1e-9)


@pytest.mark.parametrize("first", range(0, 500, 50))
def test_average_precision_matches_pycocotools(first):
    """Make fifty sets of up to eight images and three classes, with correct and wrong boxes."""
    for seed in range(first, first + 50):
        chance = random.Random(seed)
        labels = "abc"[: chance.randint(1, 3)]
        cases = [
            _make_case(chance, _boxes(chance, chance.randrange(8), labels), labels)
            for _ in range(chance.randint(1, 8))
        ]
        fixed = case([box("a", 0, 0, 9, 9)], [box("a", 0, 0, 9, 10)])
        _agree([*cases, fixed])


def test_real_average_precision_matches_pycocotools(shared):
    chance = random.Random(0)
    lines = (shared / "data/captions/captions.jsonl").read_text().splitlines()
    cases = []
    for line in lines:
        objects = json.loads(line)["objects"]
        truth = [box(one["label"], *one["bbox_xyxy"]) for one in objects]
        cases.append(case([_shift_box(chance, one) for one in truth[::-1]], truth))
    _agree(cases)


def test_more_than_100_boxes_per_image():
    chance = random.Random(0)
    truth = _boxes(chance, 130, "a")
    _agree([case([_shift_box(chance, one) for one in truth], truth)])


def test_hand_computed_counts():
    truth = [box("dog", 0, 0, 10, 10), box("cat", 20, 0, 30, 10), box("cat", 40, 0, 50, 10)]
    found = [box("Dog ", 0, 0, 10, 9), box("dog", 20, 0, 30, 10), box("cat", 40, 0, 50, 10)]
    scores = score_detection(
        [case(found, truth), case([], []), case([box("cow", 0, 0, 1, 1)], [])]
    ).scores
    assert scores["precision_at_0.5"] == pytest.approx(2 / 4)
    assert scores["recall_at_0.5"] == pytest.approx(2 / 3)
    assert scores["f1_at_0.5"] == pytest.approx(2 * 2 / (4 + 3))
    # Dog: one of one found at rank one. Cat: one of two, at rank one, up to a recall of 0.5.
    assert scores["ap_50"] == pytest.approx((1 + 51 / 101) / 2)
    assert scores["parse_rate"] == 1


def test_each_answer_has_its_f1():
    one = box("a", 0, 0, 10, 10)
    each = score_detection([case([one], [one, box("a", 20, 0, 30, 10)]), case([], [])]).per_sample
    assert [scores["f1"] for scores in each] == [pytest.approx(2 / 3), 1.0]


def test_boxes_of_different_images_do_not_match():
    scores = score_detection([case([box("a", 0, 0, 9, 9, image=1)], [box("a", 0, 0, 9, 9)])]).scores
    assert (scores["ap"], scores["f1_at_0.5"]) == (0, 0)


def test_resampled_scores_match_drawn_images():
    """Make boxes of one class per image, so that a repeated image repeats no order."""
    chance = random.Random(3)
    cases = [
        case([_shift_box(chance, one)], [one, *_boxes(chance, 1, "ab")])
        for one in _boxes(chance, 30, "ab")
    ]
    scored = score_detection(cases)
    drawn = np.bincount(np.random.default_rng(1).integers(0, 30, 30), minlength=30)
    weights = drawn[None].astype(float)
    figures = {
        name: one.score_from_sums(one.weighted_sums(weights))
        for name, one in scored.estimators.items()
    }
    repeated = [one for one, count in zip(cases, drawn, strict=True) for _ in range(count)]
    expected = {
        name: one.plug_in_score for name, one in score_detection(repeated).estimators.items()
    }
    assert {name: float(value[0]) for name, value in figures.items()} == pytest.approx(expected)


def _scene(chance: random.Random) -> EvalCase:
    truth = _boxes(chance, chance.randrange(1, 4), "ab")
    found = [_shift_box(chance, one) for one in truth if chance.random() < 0.7]
    return case([*found, *_boxes(chance, chance.randrange(2), "ab")], truth)


def test_average_precision_of_a_large_set_is_precision_times_recall():
    """Its interval is around that product; on a small set, average precision itself is above it."""
    chance = random.Random(11)
    large = score_detection([_scene(chance) for _ in range(20_000)])
    small = [score_detection([_scene(chance) for _ in range(20)]) for _ in range(50)]
    for name in ("ap", "ap_50", "ap_75"):
        one = large.estimators[name]
        assert one.score == pytest.approx(one.plug_in_score, abs=0.01)
        means = np.mean([[s.scores[name], s.estimators[name].plug_in_score] for s in small], axis=0)
        assert means[0] > one.score + 0.02
        assert means[1] == pytest.approx(one.score, abs=0.02)
    assert set(large.notes()) == {"ap", "ap_50", "ap_75"}
    assert "biased upwards" in large.notes()["ap"]


def test_a_class_of_few_samples_leaves_average_precision_without_an_interval():
    chance = random.Random(12)
    several = [_scene(chance) for _ in range(30)]
    assert score_detection(several).intervals()["ap"] is not None
    rare = [box("rare", 0, 0, 9, 9)]
    scored = score_detection([*several, case(rare, rare)])
    assert scored.intervals()["ap"] is None
    assert scored.notes()["ap"] == REASON_RARE_CLASS
    assert scored.intervals()["f1_at_0.5"] is not None


def test_no_matches_score_zero():
    truth = [box("a", 0, 0, 10, 10)]
    for found in ([], [box("a", 50, 50, 60, 60)], [box("a", 10, 10, 0, 0)]):
        scores = score_detection([case(found, truth)]).scores
        assert (scores["ap"], scores["f1_at_0.5"], scores["recall_at_0.5"]) == (0, 0, 0)
