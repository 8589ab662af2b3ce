"""Scores and references of points."""

from collections.abc import Sequence

import pytest
from case_files import load_cases

from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metrics.pointing.score import score_pointing
from finesight.evaluate.task_metrics import check_references
from finesight.samples.sample import BoxPart


def make_parts(coordinates: Sequence[Sequence[float]]) -> tuple[BoxPart, ...]:
    """Return boxes, and points with their two coordinates twice."""
    return tuple(BoxPart(xyxy=tuple((2 * list(one))[:4])) for one in coordinates)


@pytest.mark.parametrize(
    ("found", "truth", "scores"), load_cases("pointing")["test_scores_of_points"]
)
def test_scores_of_points(found, truth, scores):
    case = EvalCase("", make_parts(found), ("",), make_parts(truth), image_size=(300, 400))
    scored = score_pointing([case])
    assert scored.per_sample[0]["f1"] == pytest.approx(scores[0])
    assert scored.per_sample[0]["distance"] == pytest.approx(scores[1])


def test_points_are_no_references_of_boxes() -> None:
    point, box = BoxPart(xyxy=(5, 5, 5, 5)), BoxPart(xyxy=(1, 2, 3, 4))
    check_references("pointing", [(("",), (point,))])
    check_references("detection", [(("",), (point, box, box))])
    for metric in ("grounding", "detection"):
        with pytest.raises(UserError, match=r"none of 1 references(?s:.*)fits the .*pointing"):
            check_references(metric, [(("",), (point,))])
