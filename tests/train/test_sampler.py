"""Samples of each step: a pure function of seed, epoch and position, faithful to the weights."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from finesight.samples.corpus import Corpus
from finesight.samples.line_index import SampleIndex
from finesight.samples.sample import JsonlSamples
from finesight.settings.config import TrainSettings
from finesight.train.sampler import SampleOrder, SequentialSampler, TrainSampler


def epochs(order: SampleOrder, count: int) -> list[list[int]]:
    return [order.epoch_indices(epoch).tolist() for epoch in range(count)]


def test_expected_sample_order():
    """Runs resume by this order, so it is written down."""
    order = SampleOrder([5, 4, 3], [2, 0.5, 1 / 3], seed=0)
    assert epochs(order, 2) == [
        [2, 1, 4, 1, 4, 2, 3, 3, 0, 0, 6, 7, 11],
        [3, 1, 4, 1, 3, 8, 10, 2, 2, 4, 0, 5, 0],
    ]
    assert SampleOrder([8], [1.0], seed=3).epoch_indices(5).tolist() != list(range(8))
    first, second = epochs(SampleOrder([50], [1.0], seed=0), 2)
    assert first != second
    assert first != SampleOrder([50], [1.0], seed=1).epoch_indices(0).tolist()


def test_half_weight_alternates_between_halves():
    order = SampleOrder([8], [0.5], seed=4)
    halves = [set(indices) for indices in epochs(order, 6)]
    assert order.epoch_length == 4
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert first | second == set(range(8))
        assert not first & second
    assert halves[0] != halves[2]
    odd = SampleOrder([9], [0.5], seed=4)
    assert odd.epoch_length == 5
    assert {*chain(*epochs(odd, 2))} == set(range(9))


@pytest.mark.parametrize(("weight", "size"), [(1.1, 50), (1.3, 10), (0.1, 30), (2.5, 4)])
def test_fractional_weights_are_exact_over_epochs(weight, size):
    order = SampleOrder([size], [weight], seed=0)
    assert order.epoch_length == round(weight * size)
    assert {*Counter(chain(*epochs(order, 10))).values()} == {round(10 * weight)}
    assert SampleOrder([10, 3], [1.0, 0.01], seed=0).epoch_length == 11, "at least one sample"


def make_steps(
    sizes: tuple[int, ...],
    retained: list[int] | None = None,
    weights: tuple[float, ...] | None = None,
    **train: object,
) -> tuple[TrainSampler, list[list[int]]]:
    empty = np.empty(0, np.int64)
    files = [
        JsonlSamples(Path(), SampleIndex(np.arange(size + 1), empty, ""), (0, 0)) for size in sizes
    ]
    corpus = Corpus(tuple(files), weights or (1.0,) * len(sizes), "fingerprint")
    chosen = list(range(sum(sizes))) if retained is None else retained
    sampler = TrainSampler(corpus, chosen, TrainSettings.model_validate(train))
    return sampler, [list(sampler.batch_indices(step)) for step in range(len(sampler))]


def test_steps_continue_across_epoch_boundaries():
    _, taken = make_steps((7,), epochs=3, batch_size=5)
    assert [len(members) for members in taken] == [5, 5, 5, 5, 1]
    row = [*chain(*taken)]
    for epoch in range(3):
        assert sorted(row[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert row[:7] != row[7:14]
    for batch_size in (1, 21):
        assert [*chain(*make_steps((7,), epochs=3, batch_size=batch_size)[1])] == row
    assert [*chain(*make_steps((7,), epochs=3, seed=1)[1])] != row


def test_retained_samples_have_the_weight_of_their_file():
    retained = [0, 1, 2, 5, 6, 7, 8]
    _, (members,) = make_steps((3, 2, 4), retained, (1.0, 5.0, 2.0), batch_size=100)
    assert Counter(members) == {0: 1, 1: 1, 2: 1, 5: 2, 6: 2, 7: 2, 8: 2}
    _, taken = make_steps((4, 3, 2), [1, 3, 7, 8], epochs=2, batch_size=3)
    assert Counter(chain(*taken)) == dict.fromkeys([1, 3, 7, 8], 2)


def test_sequential_order_takes_each_sample_once():
    steps = SequentialSampler([2, 3, 5, 7, 11], batch_size=2)
    assert [list(steps.batch_indices(step)) for step in range(len(steps))] == [[2, 3], [5, 7], [11]]
