"""Which samples each step takes: a pure function, counted in samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from finesight.config import Train
from finesight.data.index_files import Index
from finesight.data.jsonl import LineSamples
from finesight.data.lines import Lines
from finesight.data.sources import Corpus
from finesight.train.course import Course, InOrder


def corpus(sizes: tuple[int, ...], weights: tuple[float, ...]) -> Corpus:
    nothing = np.empty(0, np.int64)
    files = [
        LineSamples(Lines(Path(), Index(np.arange(size + 1), nothing, ""), (0, 0)))
        for size in sizes
    ]
    return Corpus(tuple(files), weights, "fingerprint")


def course(sizes: tuple[int, ...], kept: list[int] | None = None, **train: object) -> Course:
    chosen = list(range(sum(sizes))) if kept is None else kept
    return Course(corpus(sizes, (1.0,) * len(sizes)), chosen, Train.model_validate(train))


def test_steps_run_on_over_the_ends_of_epochs() -> None:
    run = course((7,), epochs=3, batch=5)
    taken = [run.of(step) for step in range(len(run))]
    assert [len(members) for members in taken] == [5, 5, 5, 5, 1]
    row = [index for members in taken for index in members]
    for epoch in range(3):
        assert sorted(row[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert row[:7] != row[7:14]


def test_steps_limit_and_share_of_an_epoch() -> None:
    assert len(course((7,), steps=9, batch=5)) == 9
    assert course((7,), steps=9, batch=5).samples == 45
    assert course((8,), epochs=0.5, batch=3).samples == 4
    assert course((8,), batch=3).samples == 8


def test_any_step_in_any_order_is_the_same() -> None:
    forwards, backwards = course((5, 4), epochs=4, batch=3), course((5, 4), epochs=4, batch=3)
    expected = [forwards.of(step) for step in range(len(forwards))]
    assert [backwards.of(step) for step in reversed(range(len(backwards)))] == expected[::-1]


def test_the_batch_cuts_the_order_and_does_not_change_it() -> None:
    def row(batch: int) -> list[int]:
        run = course((9,), epochs=2, batch=batch)
        return [index for step in range(len(run)) for index in run.of(step)]

    assert row(4) == row(1) == row(18)


def test_unusable_samples_never_come_and_an_emptied_file_is_left_out() -> None:
    kept = [1, 3, 7, 8]
    run = course((4, 3, 2), kept=kept, epochs=2, batch=3)
    seen = Counter(index for step in range(len(run)) for index in run.of(step))
    assert seen == dict.fromkeys(kept, 2)


def test_weights_go_with_their_own_files() -> None:
    run = Course(corpus((3, 2, 4), (1.0, 5.0, 2.0)), [0, 1, 2, 5, 6, 7, 8], Train(batch=100))
    seen = Counter(run.of(0))
    assert seen == {0: 1, 1: 1, 2: 1, 5: 2, 6: 2, 7: 2, 8: 2}


def test_another_data_seed_is_another_order() -> None:
    assert course((50,), batch=50).of(0) != course((50,), batch=50, data_seed=1).of(0)


def test_in_order_takes_each_once() -> None:
    steps = InOrder([2, 3, 5, 7, 11], batch=2)
    assert [list(steps.of(step)) for step in range(len(steps))] == [[2, 3], [5, 7], [11]]
