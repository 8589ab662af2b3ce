"""Split dataset rows into training and validation rows that share no images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from finesight.errors import UserError

ImageKeys = frozenset[str]
"""Keys of the images in a row. Identical images have equal keys."""


def split_last_rows(rows: Sequence[ImageKeys], num_eval_rows: int) -> tuple[list[int], list[int]]:
    """Split off the last rows for validation; remove training rows that share an image.

    Returns:
        Indices of the training rows and of the validation rows. There are no training rows if all
            rows are for validation.

    Raises:
        UserError: There are fewer rows, or every other row shares an image with the last ones.
    """
    num_other_rows = len(rows) - num_eval_rows
    if num_other_rows < 0:
        raise UserError(
            f"there are {len(rows)} rows",
            where=f"eval_last={num_eval_rows}",
            expected=f"at most {len(rows)}",
            remedy="use fewer rows for validation",
        )
    eval_images = frozenset[str]().union(*rows[num_other_rows:])
    train = [row_index for row_index in range(num_other_rows) if not rows[row_index] & eval_images]
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

    Args:
        rows: Image keys of each row.
        train_fraction: Approximate fraction of training rows.
        seed: Seed of the random order of groups of rows.

    Returns:
        Indices of the training rows and of the validation rows, in ascending order.

    Raises:
        UserError: There are too few groups of rows for both splits.
    """
    groups = _group_rows(rows)
    num_eval_rows = max(1, round((1 - train_fraction) * len(rows)))
    eval_rows: list[int] = []
    random_values = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(groups))
    for group_index in np.argsort(random_values, kind="stable"):
        if len(eval_rows) + len(groups[group_index]) <= num_eval_rows:
            eval_rows += groups[group_index]
    if not eval_rows or len(eval_rows) == len(rows):
        raise UserError(
            f"{len(rows)} rows in {len(groups)} groups without shared images",
            where=f"train_fraction={train_fraction:g}",
            expected=f"enough groups for training and {num_eval_rows} validation rows",
            remedy="import more rows, or choose another fraction",
        )
    eval_row_set = set(eval_rows)
    return [row_index for row_index in range(len(rows)) if row_index not in eval_row_set], sorted(
        eval_rows
    )


def _group_rows(rows: Sequence[ImageKeys]) -> list[list[int]]:
    """Group rows that share images, directly or through other rows (union-find)."""
    parent = list(range(len(rows)))

    def find_root(row_index: int) -> int:
        while parent[row_index] != row_index:
            parent[row_index] = row_index = parent[parent[row_index]]
        return row_index

    first_row_by_key: dict[str, int] = {}
    for row_index, keys in enumerate(rows):
        for key in keys:
            parent[find_root(row_index)] = find_root(first_row_by_key.setdefault(key, row_index))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row_index in range(len(rows)):
        groups[find_root(row_index)].append(row_index)
    return list(groups.values())
