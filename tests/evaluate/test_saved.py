from __future__ import annotations

import json

import pytest

from finesight.data.sample import BoxPart
from finesight.errors import UserError
from finesight.evaluate.answered import Case
from finesight.evaluate.saved import line_of, read_answers
from finesight.infer.predict import Prediction


def test_what_is_written_comes_back_to_the_last_digit(tmp_path):
    box = BoxPart(label="dog", xyxy=(1 / 3, 2.0, 30.123456789, 40.0))
    case = Case(
        "dog", (box,), ("a dog", "hound"), (box.model_copy(update={"image": 1}),), "s", False
    )
    prediction = Prediction("s", (), "Where?", "dog", "dog<end>", (box,), 4, False)
    path = tmp_path / "answers.jsonl"
    path.write_text(line_of(prediction, case, {"iou": 1.0}) * 2)
    first, second = read_answers(path)
    assert first.case == second.case == case
    assert first.scores == {"iou": 1.0}
    assert first.record["raw"] == "dog<end>"
    keys = "id image prompt answer raw boxes gold references gold_boxes scores tokens stopped"
    assert list(first.record) == keys.split()


@pytest.mark.parametrize("line", ["{}", "no", "[]", json.dumps({"answer": "a", "boxes": 3})])
def test_a_line_that_is_none_is_named(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        read_answers(path)
    assert caught.value.where == f"{path}:1"
