from __future__ import annotations

from finesight.evaluate.compare import compare


def test_better_is_told_from_worse():
    before = {"similarity": 0.25, "exact": 0.5, "cer": 0.5}
    after = {"similarity": 0.75, "exact": 0.25, "cer": 0.25, "new": 1.0}
    head, *lines = compare(before, after, "similarity").splitlines()
    assert head.split() == ["score", "before", "after", "difference"]
    assert [line.split() for line in lines] == [
        ["similarity*", "0.2500", "0.7500", "+0.5000", "better"],
        ["exact", "0.5000", "0.2500", "-0.2500", "worse"],
        ["cer", "0.5000", "0.2500", "-0.2500", "better"],
    ]


def test_nothing_changed():
    scores = {"held_out_loss": 1.5, "exact": 0.5}
    assert compare(scores, scores).count("same") == 2


def test_columns_stand_below_each_other():
    lines = compare(
        {"held_out_loss": 10.25, "f": 0.0}, {"held_out_loss": 1.5, "f": 0.0}
    ).splitlines()
    assert (
        len({line.index(word) for line, word in zip(lines[1:], ("better", "same"), strict=True)})
        == 1
    )
