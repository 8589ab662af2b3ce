"""Metrics before and after, and what is said of them."""

from __future__ import annotations

import pytest
from run_folders import measured_line

from finesight.evaluate.compare import Difference
from finesight.report.figures import (
    Row,
    between,
    interval_of,
    named,
    note_of,
    plain,
    remarks,
    rows,
    sentence,
    signed,
)

NONE = "no clear change"


def row(low: float | None, high: float | None, verdict: str = "better") -> Row:
    difference = Difference("similarity", 0.2, 0.9, low, high, verdict)  # type: ignore[arg-type]
    found = rows([measured_line(0, 0.2), measured_line(9, 0.9)], {"similarity": difference})
    assert found[0].name == "similarity"
    return found[0]


def test_the_headline_is_first_and_the_loss_last() -> None:
    before = measured_line(0, 0.2, scores={"stopped": 0.5, "similarity": 0.2})
    after = measured_line(9, 0.9, scores={"stopped": 1.0, "similarity": 0.9, "new": 1.0})
    found = rows([before, after], {})
    assert [one.name for one in found] == ["similarity", "stopped", "new", "held_out_loss"]
    assert [one.headline for one in found] == [True, False, False, False]
    assert [one.lower for one in found] == [False, False, False, True]
    assert found[0].before_ends == pytest.approx((0.15, 0.25))
    assert [one.verdict for one in found] == ["better", "better", "", "better"]
    assert found[2].before is None
    assert found[2].change is None


def test_less_loss_is_better_and_more_is_worse() -> None:
    lines = [measured_line(0, 0.9), measured_line(9, 0.2)]
    assert rows(lines, {})[-1].words == "worse"
    assert rows(lines[::-1], {})[-1].words == "better"


@pytest.mark.parametrize(
    ("low", "high", "verdict", "words", "said"),
    [
        (0.6, 0.8, "better", "better", "rose by 0.7000, more than chance explains: the 95 %"),
        (-0.1, 0.8, NONE, NONE, "which may be chance: the 95 % interval of the difference is −0.1"),
        (0.1, 0.8, NONE, NONE, "on too few samples to be sure"),
        (None, None, "better", "better", "How much of that is chance is not known"),
    ],
)
def test_the_verdict_is_the_comparisons(
    low: float | None, high: float | None, verdict: str, words: str, said: str
) -> None:
    found = row(low, high, verdict)
    assert found.words == words
    assert said in sentence(found)


def test_what_did_not_change_is_said_so() -> None:
    found = rows([measured_line(0, 0.2), measured_line(9, 0.2)], {})
    assert {one.words for one in found if one.name != "stopped"} == {"no change"}
    assert sentence(found[0]) == "The similarity is what it was."


def test_a_single_measurement_has_no_verdict() -> None:
    found = rows([measured_line(0, 0.2)], {})
    assert (found[0].before, found[0].after, found[0].verdict) == (0.2, None, "")
    assert "measured once" in sentence(found[0])
    assert rows([], {}) == []


@pytest.mark.parametrize("ends", [None, "ab", [1], [1, 2, 3], [None, 1], [1, float("nan")], 7])
def test_an_interval_that_is_none_is_not_shown(ends: object) -> None:
    assert interval_of({"intervals": {"similarity": ends}}, "similarity") is None
    assert interval_of({}, "similarity") is None
    assert between(None) == ""


def test_signs_and_digits() -> None:
    assert [signed(value) for value in (0.5, -0.5, 0.0, -123.45)] == [
        *("+0.5000", "−0.5000", "+0.0000", "−123.5")
    ]
    assert between((0.12345, 12.0)) == "0.123 to 12.0"
    assert [plain(value) for value in (0.12345, 46.55, 560.12)] == ["0.1235", "46.55", "560.1"]


def test_figures_are_called_what_people_call_them() -> None:
    assert [named(name) for name in ("held_out_loss", "bleu_2", "my_own")] == [
        *("held-out loss", "BLEU-2", "my_own")
    ]


def test_a_headline_that_no_answer_gave_is_said_so() -> None:
    lines = [measured_line(step, 0.2, scores={}) for step in (0, 9)]
    found = rows(lines, {})[0]
    assert (found.before, found.after) == (None, None)
    assert sentence(found) == "The similarity could not be told from these answers."


def test_notes_are_told_once_with_the_scores_that_they_are_about() -> None:
    biased, few = "biased upwards", "no interval: fewer than 6 samples"
    line = measured_line(0, 0.2) | {"scores": {"ap": 0.5, "ap_50": 0.7, "exact": 0.5}}
    line |= {"notes": {"ap": biased, "ap_50": biased}}
    after = line | {"step": 9}
    difference = Difference("exact", 0.5, 0.5, None, None, "no clear change", few)
    found = rows([line, after], {"exact": difference})
    told = remarks((row.name, note) for row in found for note in row.notes)
    assert told == [
        f"AP, AP at overlap 0.5: {biased}",
        f"exactly right: {few}",
        "held-out loss: no interval: only the sum over all samples is known",
    ]
    for notes in (None, [], "ap", {"ap": None}):
        assert note_of({"notes": notes}, "ap_50") == ""
