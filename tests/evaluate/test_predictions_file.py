from __future__ import annotations

import json

import pytest

from finesight.data.sample import BoxPart
from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import format_prediction_line, read_predictions
from finesight.infer.prediction import Prediction


def test_predictions_roundtrip_exactly(tmp_path):
    box = BoxPart(label="dog", xyxy=(1 / 3, 2.0, 30.123456789, 40.0))
    case = EvalCase(
        "dog", (box,), ("a dog", "hound"), (box.model_copy(update={"image": 1}),), "s", False
    )
    prediction = Prediction("s", (), "Where?", "dog", "dog<end>", (box,), 4, "length")
    path = tmp_path / "answers.jsonl"
    path.write_text(format_prediction_line(prediction, case, {"iou": 1.0}) * 2)
    first, second = read_predictions(path)
    assert first.case == second.case == case
    assert first.scores == {"iou": 1.0}
    assert first.record["raw_text"] == "dog<end>"
    keys = "id image prompt answer raw_text boxes gold references gold_boxes scores num_tokens"
    assert list(first.record) == [*keys.split(), "finish_reason"]


@pytest.mark.parametrize("line", ["{}", "no", "[]", json.dumps({"answer": "a", "boxes": 3})])
def test_invalid_line_is_reported(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        read_predictions(path)
    assert caught.value.where == f"{path}:1"
