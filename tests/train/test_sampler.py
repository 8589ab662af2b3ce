"""Which samples each step takes: a pure function, counted in samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from finesight.config import TrainSettings
from finesight.data.corpus import Corpus
from finesight.data.line_index import SampleIndex
from finesight.data.sample import JsonlSamples
from finesight.train.sampler import SequentialSampler, TrainSampler


def corpus(sizes: tuple[int, ...], weights: tuple[float, ...]) -> Corpus:
    empty = np.empty(0, np.int64)
    files = [
        JsonlSamples(Path(), SampleIndex(np.arange(size + 1), empty, ""), (0, 0)) for size in sizes
    ]
    return Corpus(tuple(files), weights, "fingerprint")


def make_sampler(
    sizes: tuple[int, ...], retained: list[int] | None = None, **train: object
) -> TrainSampler:
    chosen = list(range(sum(sizes))) if retained is None else retained
    return TrainSampler(
        corpus(sizes, (1.0,) * len(sizes)), chosen, TrainSettings.model_validate(train)
    )


def test_steps_continue_across_epoch_boundaries() -> None:
    run = make_sampler((7,), epochs=3, batch_size=5)
    taken = [run.batch_indices(step) for step in range(len(run))]
    assert [len(members) for members in taken] == [5, 5, 5, 5, 1]
    row = [index for members in taken for index in members]
    for epoch in range(3):
        assert sorted(row[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert row[:7] != row[7:14]


def test_max_steps_and_fractional_epochs() -> None:
    assert len(make_sampler((7,), steps=9, batch_size=5)) == 9
    assert make_sampler((7,), steps=9, batch_size=5).num_samples == 45
    assert make_sampler((8,), epochs=0.5, batch_size=3).num_samples == 4
    assert make_sampler((8,), batch_size=3).num_samples == 8


def test_steps_are_random_access() -> None:
    forward_order, backward_order = (
        make_sampler((5, 4), epochs=4, batch_size=3),
        make_sampler((5, 4), epochs=4, batch_size=3),
    )
    expected = [forward_order.batch_indices(step) for step in range(len(forward_order))]
    assert [
        backward_order.batch_indices(step) for step in reversed(range(len(backward_order)))
    ] == expected[::-1]


def test_batch_size_does_not_change_the_order() -> None:
    def row(batch: int) -> list[int]:
        run = make_sampler((9,), epochs=2, batch_size=batch)
        return [index for step in range(len(run)) for index in run.batch_indices(step)]

    assert row(4) == row(1) == row(18)


def test_skipped_samples_never_occur() -> None:
    retained = [1, 3, 7, 8]
    run = make_sampler((4, 3, 2), retained=retained, epochs=2, batch_size=3)
    seen = Counter(index for step in range(len(run)) for index in run.batch_indices(step))
    assert seen == dict.fromkeys(retained, 2)


def test_weights_belong_to_their_files() -> None:
    run = TrainSampler(
        corpus((3, 2, 4), (1.0, 5.0, 2.0)), [0, 1, 2, 5, 6, 7, 8], TrainSettings(batch_size=100)
    )
    seen = Counter(run.batch_indices(0))
    assert seen == {0: 1, 1: 1, 2: 1, 5: 2, 6: 2, 7: 2, 8: 2}


def test_data_seed_changes_the_order() -> None:
    assert make_sampler((50,), batch_size=50).batch_indices(0) != make_sampler(
        (50,), batch_size=50, data_seed=1
    ).batch_indices(0)


def test_sequential_order_takes_each_sample_once() -> None:
    steps = SequentialSampler([2, 3, 5, 7, 11], batch_size=2)
    assert [list(steps.batch_indices(step)) for step in range(len(steps))] == [[2, 3], [5, 7], [11]]
