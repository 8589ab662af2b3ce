"""Which samples got better, and which of them are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import Line, answer_line

from finesight.report.examples import Examples, read_examples


def written(path: Path, lines: list[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compared(
    folder: Path, before: list[float], after: list[float], most: int = 100, headline: str = "x"
) -> Examples:
    files = [
        written(folder / name, [answer_line(f"s{i}", "a", "g", f) for i, f in enumerate(figures)])
        for name, figures in (("before.jsonl", before), ("after.jsonl", after))
    ]
    return read_examples(files[0], files[1], headline, most)


def test_kinds_follow_the_samples_own_figure(tmp_path: Path) -> None:
    found = compared(tmp_path, [0.1, 0.9, 0.5, 1.0, 0.5], [0.8, 0.7, 0.5, 1.0, 0.5 + 1e-9])
    assert found.figure == "similarity"
    assert {one.any["id"]: one.kind for one in found.shown} == {
        **{"s0": "better", "s1": "worse", "s2": "wrong", "s3": "right", "s4": "wrong"}
    }
    assert found.counts == {"worse": 1, "better": 1, "wrong": 2, "right": 1}
    assert found.paired
    assert found.left_out() == {}


@pytest.mark.parametrize(
    ("headline", "figure"),
    [
        *(("accuracy_at_0.5", "hit"), ("f1_at_0.5", "f1"), ("similarity", "similarity")),
        *(("mine", "mine"), ("bleu_4", "similarity"), (None, "similarity")),
    ],
)
def test_the_figure_is_what_the_headline_is_made_of(
    tmp_path: Path, headline: str | None, figure: str
) -> None:
    scores = {"exact": 1.0, "hit": 0.0, "f1": 0.5, "mine": 3.0, "similarity": 0.1}
    file = written(tmp_path / "a.jsonl", [answer_line("s", "a", "g", 0.0, scores=scores)])
    assert read_examples(file, None, headline, 9).figure == figure


def test_the_greatest_changes_come_first_and_every_kind_is_seen(tmp_path: Path) -> None:
    before = [0.5] * 40 + [0.9, 0.9] + [0.3] * 40 + [1.0] * 40
    after = [0.5 + i / 100 for i in range(1, 41)] + [0.2, 0.5] + [0.3] * 40 + [1.0] * 40
    found = compared(tmp_path, before, after, most=40)
    kinds = [one.kind for one in found.shown]
    assert len(kinds) == 40
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **{"worse": 2, "better": 18, "wrong": 10, "right": 10}
    }
    assert [one.any["id"] for one in found.shown[:3]] == ["s40", "s41", "s39"]
    assert found.left_out() == {"better": 22, "wrong": 30, "right": 30}
    assert found.total == 122


def test_none_are_shown_when_there_is_no_room(tmp_path: Path) -> None:
    found = compared(tmp_path, [0.1, 0.9], [0.9, 0.1], most=0)
    assert found.shown == []
    assert found.left_out() == {"worse": 1, "better": 1}


def test_equal_ids_are_paired_in_turn_and_single_ones_stay(tmp_path: Path) -> None:
    before = [answer_line(name, "b", "g", f) for name, f in (("a", 0.1), ("a", 0.9), ("c", 0.5))]
    after = [answer_line(name, "a", "g", f) for name, f in (("a", 0.2), ("a", 0.8), ("d", 0.5))]
    files = written(tmp_path / "b", before), written(tmp_path / "a", after)
    found = read_examples(*files, "similarity", 9)
    changes = {
        (one.any["id"], round(one.change, 3), one.before is None, one.after is None)
        for one in found.shown
    }
    assert changes == {
        *{("a", 0.1, False, False), ("a", -0.1, False, False)},
        *{("d", 0.0, True, False), ("c", 0.0, False, True)},
    }


def test_one_measurement_tells_right_from_wrong(tmp_path: Path) -> None:
    file = written(
        tmp_path / "b.jsonl", [answer_line("a", "", "", 1.0), answer_line("b", "", "", 0.5)]
    )
    found = read_examples(file, None, "similarity", 9)
    assert not found.paired
    assert [one.kind for one in found.shown] == ["wrong", "right"]


def test_a_torn_line_ends_the_file(tmp_path: Path) -> None:
    file = written(tmp_path / "b.jsonl", [answer_line("a", "", "", 1.0)])
    with file.open("a") as stream:
        stream.write('{"id": "b", "ans')
    assert read_examples(file, None, "similarity", 9).total == 1


def test_scores_that_are_no_numbers_count_for_nothing(tmp_path: Path) -> None:
    lines = [answer_line("a", "", "", 0.0, scores={"similarity": float("nan"), "b": "x"})]
    file = written(tmp_path / "b.jsonl", lines)
    found = read_examples(file, None, "similarity", 9)
    assert (found.figure, found.counts["wrong"]) == ("", 1)
