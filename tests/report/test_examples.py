"""Tests of the classification and selection of examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_dir_fixtures import JsonLine, make_prediction_line

from finesight.report.examples import ExampleSet, read_examples, read_incorrect_lines


def write_predictions(path: Path, lines: list[JsonLine]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compare_predictions(
    folder: Path, before: list[float], after: list[float], most: int = 100, headline: str = "x"
) -> ExampleSet:
    files = [
        write_predictions(
            folder / name,
            [make_prediction_line(f"s{i}", "a", "g", f) for i, f in enumerate(figures)],
        )
        for name, figures in (("before.jsonl", before), ("after.jsonl", after))
    ]
    return read_examples(files[0], files[1], headline, most)


def test_example_kind_follows_its_score(tmp_path: Path) -> None:
    found = compare_predictions(
        tmp_path, [0.1, 0.9, 0.5, 1.0, 0.5], [0.8, 0.7, 0.5, 1.0, 0.5 + 1e-9]
    )
    assert found.metric == "similarity"
    assert {one.latest["id"]: one.kind for one in found.displayed} == {
        **{"s0": "better", "s1": "worse", "s2": "wrong", "s3": "right", "s4": "wrong"}
    }
    assert found.counts == {"worse": 1, "better": 1, "wrong": 2, "right": 1}
    assert found.num_incorrect == 4
    assert found.is_paired
    assert found.count_hidden() == {}


@pytest.mark.parametrize(
    ("headline", "figure"),
    [
        *(("accuracy_at_0.5", "hit"), ("f1_at_0.5", "f1"), ("similarity", "similarity")),
        *(("mine", "mine"), ("bleu_4", "similarity"), (None, "similarity")),
    ],
)
def test_score_name_of_the_primary_metric(
    tmp_path: Path, headline: str | None, figure: str
) -> None:
    scores = {"exact": 1.0, "hit": 0.0, "f1": 0.5, "mine": 3.0, "similarity": 0.1}
    file = write_predictions(
        tmp_path / "a.jsonl", [make_prediction_line("s", "a", "g", 0.0, scores=scores)]
    )
    assert read_examples(file, None, headline, 9).metric == figure


def test_largest_changes_are_first_and_all_kinds_are_shown(tmp_path: Path) -> None:
    before = [0.5] * 40 + [0.9, 0.9] + [0.3] * 40 + [1.0] * 40
    after = [0.5 + i / 100 for i in range(1, 41)] + [0.2, 0.5] + [0.3] * 40 + [1.0] * 40
    found = compare_predictions(tmp_path, before, after, most=40)
    kinds = [one.kind for one in found.displayed]
    assert len(kinds) == 40
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **{"worse": 2, "better": 18, "wrong": 10, "right": 10}
    }
    assert [one.latest["id"] for one in found.displayed[:3]] == ["s40", "s41", "s39"]
    assert found.count_hidden() == {"better": 22, "wrong": 30, "right": 30}
    assert found.total == 122


def test_no_examples_with_zero_limit(tmp_path: Path) -> None:
    found = compare_predictions(tmp_path, [0.1, 0.9], [0.9, 0.1], most=0)
    assert found.displayed == []
    assert found.count_hidden() == {"worse": 1, "better": 1}


def test_equal_ids_are_paired_in_order(tmp_path: Path) -> None:
    before = [
        make_prediction_line(name, "b", "g", f) for name, f in (("a", 0.1), ("a", 0.9), ("c", 0.5))
    ]
    after = [
        make_prediction_line(name, "a", "g", f) for name, f in (("a", 0.2), ("a", 0.8), ("d", 0.5))
    ]
    files = write_predictions(tmp_path / "b", before), write_predictions(tmp_path / "a", after)
    found = read_examples(*files, "similarity", 9)
    changes = {
        (one.latest["id"], round(one.change, 3), *(line is None for line in one.predictions))
        for one in found.displayed
    }
    assert changes == {
        *{("a", 0.1, False, False), ("a", -0.1, False, False)},
        *{("d", 0.0, True, False), ("c", 0.0, False, True)},
    }


def test_single_evaluation_separates_right_from_wrong(tmp_path: Path) -> None:
    file = write_predictions(
        tmp_path / "b.jsonl",
        [make_prediction_line("a", "", "", 1.0), make_prediction_line("b", "", "", 0.5)],
    )
    found = read_examples(file, None, "similarity", 9)
    assert not found.is_paired
    assert [one.kind for one in found.displayed] == ["wrong", "right"]


def test_answer_equal_to_a_reference_is_correct(tmp_path: Path) -> None:
    """The CIDEr-D of a perfect caption of common words is below its maximum."""
    scores = {"cider_d": 7.5}
    box = {"image": 0, "label": None, "xyxy": [1, 2, 3, 4]}
    lines = [
        make_prediction_line("equal", "a circle", "a circle", 0, scores=scores),
        make_prediction_line("second", "a ball", "a", 0, scores=scores, references=["a ball"]),
        make_prediction_line("other", "a ball", "a circle", 0, scores=scores),
        make_prediction_line("box", "here", "here", 0, scores=scores, gold_boxes=[box]),
    ]
    file = write_predictions(tmp_path / "a.jsonl", lines)
    found = read_examples(file, None, "cider_d", 9)
    assert [one.latest["id"] for one in found.displayed] == ["other", "box", "equal", "second"]
    assert [one.is_incorrect for one in found.displayed] == [True, True, False, False]
    assert [line["id"] for line in read_incorrect_lines(file, "cider_d")] == ["other", "box"]


def test_truncated_line_ends_the_file(tmp_path: Path) -> None:
    file = write_predictions(tmp_path / "b.jsonl", [make_prediction_line("a", "", "", 1.0)])
    with file.open("a") as stream:
        stream.write('{"id": "b", "ans')
    assert read_examples(file, None, "similarity", 9).total == 1


def test_invalid_scores_are_ignored(tmp_path: Path) -> None:
    lines = [make_prediction_line("a", "", "", 0.0, scores={"similarity": float("nan"), "b": "x"})]
    file = write_predictions(tmp_path / "b.jsonl", lines)
    found = read_examples(file, None, "similarity", 9)
    assert (found.metric, found.counts["wrong"]) == ("", 1)
