"""Splits of rows by their images."""

import random

import pytest

from finesight.errors import UserError
from finesight.samples.image_split import split_by_image, split_last_rows


def keys(*rows: str) -> list[frozenset[str]]:
    """Make one row for each word, and one image for each letter."""
    return [frozenset(row) for row in rows]


def test_too_many_eval_rows() -> None:
    with pytest.raises(UserError, match="each of the other 1 rows"):
        split_last_rows(keys("a", "a"), 1)


@pytest.mark.parametrize("seed", range(20))
def test_split_keeps_rows_of_an_image_together(seed: int) -> None:
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    rows = [frozenset(draw.choices(letters, k=draw.choice([0, 1, 1, 1]))) for _ in range(60)]
    train, validation = split_by_image(rows, 0.8, seed)
    assert sorted(train + validation) == list(range(60))
    assert not frozenset().union(*(rows[i] for i in train)) & frozenset().union(
        *(rows[i] for i in validation)
    )
    assert len(validation) == 12


def test_transitively_shared_images_stay_together() -> None:
    # ab - bc - cd is one group, e and f are groups of their own.
    train, validation = split_by_image(keys("ab", "e", "bc", "f", "cd"), 0.6, 0)
    assert validation == [1, 3]
    assert train == [0, 2, 4]


def test_seed_determines_the_split() -> None:
    rows = keys(*"abcdefghij")
    found = {tuple(split_by_image(rows, 0.8, seed)[1]) for seed in range(10)}
    assert len(found) > 3
    assert split_by_image(rows, 0.8, 5) == split_by_image(rows, 0.8, 5)


@pytest.mark.parametrize("rows", [keys("a"), keys("a", "a", "ab")])
def test_single_group_cannot_be_split(rows: list[frozenset[str]]) -> None:
    with pytest.raises(UserError, match="in 1 group without"):
        split_by_image(rows, 0.5, 0)
