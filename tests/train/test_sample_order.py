"""The order of data: a pure function of seed, epoch and position, faithful to the weights."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from finesight.train.sampler import SampleOrder, stable_argsort


def epochs(order: SampleOrder, count: int) -> list[list[int]]:
    return [order.epoch_indices(epoch).tolist() for epoch in range(count)]


def test_expected_sample_order() -> None:
    # Written down so that a change of the order cannot pass unseen: runs resume by it.
    order = SampleOrder([5, 4, 3], [2, 0.5, 1 / 3], seed=0)
    assert epochs(order, 2) == [
        [2, 1, 4, 1, 4, 2, 3, 3, 0, 0, 6, 7, 11],
        [3, 1, 4, 1, 3, 8, 10, 2, 2, 4, 0, 5, 0],
    ]
    assert SampleOrder([8], [1.0], seed=3).epoch_indices(5).tolist() != list(range(8))


def test_order_is_a_function_of_position() -> None:
    order = SampleOrder([5, 4], [1.0, 0.5], seed=1)
    expected = [*chain(*epochs(order, 4))]
    assert [order.index_at(position) for position in range(28)] == expected
    requested = [27, 0, 13, 13, 6, 7, 20, 1]
    assert [SampleOrder([5, 4], [1.0, 0.5], seed=1).index_at(at) for at in requested] == [
        expected[at] for at in requested
    ]
    assert [order.index_at(at) for at in requested] == [expected[at] for at in requested]


def test_seed_and_epoch_change_the_order() -> None:
    first, second = epochs(SampleOrder([50], [1.0], seed=0), 2)
    assert first != second
    assert first != SampleOrder([50], [1.0], seed=1).epoch_indices(0).tolist()


def test_weight_one_gives_each_sample_once_per_epoch() -> None:
    for indices in epochs(SampleOrder([7, 3], [1.0, 1.0], seed=0), 5):
        assert sorted(indices) == list(range(10))


def test_weight_two_gives_each_sample_two_times_per_epoch() -> None:
    for indices in epochs(SampleOrder([7, 3], [2.0, 1.0], seed=0), 5):
        assert Counter(indices) == {i: 2 if i < 7 else 1 for i in range(10)}


def test_half_weight_alternates_between_halves() -> None:
    order = SampleOrder([8], [0.5], seed=4)
    halves = [set(indices) for indices in epochs(order, 6)]
    assert order.epoch_length == 4
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert first | second == set(range(8))
        assert not first & second
    assert halves[0] != halves[2]


def test_odd_size_with_half_weight_rounds_up() -> None:
    order = SampleOrder([9], [0.5], seed=4)
    first, second = epochs(order, 2)
    assert order.epoch_length == 5
    assert {*first, *second} == set(range(9))


@pytest.mark.parametrize(("weight", "size"), [(1.1, 50), (1.3, 10), (0.1, 30), (2.5, 4)])
def test_fractional_weights_are_exact_over_epochs(weight: float, size: int) -> None:
    order = SampleOrder([size], [weight], seed=0)
    assert order.epoch_length == round(weight * size)
    seen = Counter(chain(*epochs(order, 10)))
    assert {seen[i] for i in range(size)} == {round(10 * weight)}


def test_small_weight_still_gives_a_sample() -> None:
    assert SampleOrder([10, 3], [1.0, 0.01], seed=0).epoch_length == 11


@pytest.mark.parametrize(
    ("sizes", "weights"), [([], []), ([0], [1.0]), ([3], [0.0]), ([3, 4], [1.0])]
)
def test_empty_order_is_rejected(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(AssertionError):
        SampleOrder(sizes, weights, seed=0)


@pytest.mark.parametrize("upper", [0, 3, 2**40, 2**63])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 4096])
def test_partition_sort_matchesstable_argsort(upper: int, size: int) -> None:
    """Also where many draws agree in their upper bits, or in all."""
    raw = np.random.Philox(np.random.SeedSequence((size, upper))).random_raw(size)
    for draws in (raw, raw % np.uint64(500) + np.uint64(upper), raw | np.uint64(upper)):
        assert stable_argsort(draws).tolist() == np.argsort(draws, kind="stable").tolist()
