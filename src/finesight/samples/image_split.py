"""Splits of rows into training and validation rows without shared images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from finesight.errors import UserError, format_count

ImageKeys = frozenset[Hashable]
"""Keys of the images in a row. Identical images have equal keys."""


class SplitError(UserError):
    """Raised for rows that share so many images that no random split separates them."""


def split_last_rows(rows: Sequence[ImageKeys], num_eval_rows: int) -> tuple[list[int], list[int]]:
    """Split off the last rows for validation; remove training rows that share an image.

    Returns:
        Indices of the training rows and of the validation rows. There are no training rows if all
            rows are for validation.
    """
    num_other_rows = len(rows) - num_eval_rows
    if num_other_rows < 0:
        expected = "a dataset with rows"
        if rows:
            expected = f"at most {len(rows)}"
        raise UserError(
            f"the dataset has {format_count(len(rows), 'row')}",
            where=f"eval_last={num_eval_rows}",
            expected=expected,
            remedy="use fewer rows for validation",
        )
    eval_images = frozenset[Hashable]().union(*rows[num_other_rows:])
    train = [index for index in range(num_other_rows) if not rows[index] & eval_images]
    if num_other_rows and not train:
        raise UserError(
            f"each of the other {num_other_rows} rows shares an image with the last"
            f" {num_eval_rows}",
            where=f"eval_last={num_eval_rows}",
            expected="training rows with other images",
            remedy="use another number of rows, or train_fraction",
        )
    return train, list(range(num_other_rows, len(rows)))


def split_by_image(
    rows: Sequence[ImageKeys], train_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split rows randomly into training and validation rows without shared images.

    Rows that share an image stay together.
    """
    groups = group_rows(rows)
    num_eval_rows = max(1, round((1 - train_fraction) * len(rows)))
    eval_rows: list[int] = []
    random_values = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(groups))
    for group_index in np.argsort(random_values, kind="stable"):
        if len(eval_rows) + len(groups[group_index]) <= num_eval_rows:
            eval_rows += groups[group_index]
    if not eval_rows or len(eval_rows) == len(rows):
        num_rows = format_count(len(rows), "row")
        raise SplitError(
            f"{num_rows} in {format_count(len(groups), 'group')} without shared images",
            where=f"train_fraction={train_fraction:g}",
            expected="enough groups for training and"
            f" {format_count(num_eval_rows, 'validation row')}",
            remedy="import more rows, or choose another fraction",
        )
    return sorted(set(range(len(rows))).difference(eval_rows)), sorted(eval_rows)


def group_rows(rows: Sequence[ImageKeys]) -> list[list[int]]:
    """Group rows that share images, directly or through other rows (union-find)."""
    parent = list(range(len(rows)))

    def find_root(row_index: int) -> int:
        while parent[row_index] != row_index:
            parent[row_index] = row_index = parent[parent[row_index]]
        return row_index

    first_row_by_key: dict[Hashable, int] = {}
    for row_index, keys in enumerate(rows):
        for key in keys:
            parent[find_root(row_index)] = find_root(first_row_by_key.setdefault(key, row_index))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row_index in range(len(rows)):
        groups[find_root(row_index)].append(row_index)
    return list(groups.values())
