"""Rows to train on and rows to measure on, with no picture on both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from finesight.errors import UserError

Keys = frozenset[str]
"""The pictures of a row, as keys that are equal for equal pictures."""


def hold_out_last(rows: Sequence[Keys], count: int) -> tuple[list[int], list[int]]:
    """The last `count` rows to measure on and, of the others, those to train on that show none of
    their pictures: (train, eval) as places in `rows`.

    With all rows held out there is nothing to train on. Raises UserError for more than there are,
    and when every other row shows a picture of theirs.
    """
    first = len(rows) - count
    if first < 0:
        raise UserError(
            f"{count} rows of {len(rows)}",
            where="the last rows, held out",
            expected=f"at most {len(rows)}",
            remedy="hold out fewer rows",
        )
    held_out = frozenset[str]().union(*rows[first:])
    train = [place for place in range(first) if not rows[place] & held_out]
    if first and not train:
        raise UserError(
            f"each of the other {first} rows shows a picture of the last {count}",
            where="the last rows, held out",
            expected="rows with pictures of their own to train on",
            remedy="hold out another number of rows, or a share of them",
        )
    return train, list(range(first, len(rows)))


def split_by_picture(rows: Sequence[Keys], share: float, seed: int) -> tuple[list[int], list[int]]:
    """About `share` of the rows to train on, the rest to measure on: (train, eval) in file order.

    Rows that share a picture stay together; the groups are drawn in an order given by `seed`.
    """
    groups = _groups(rows)
    wanted = max(1, round((1 - share) * len(rows)))
    held_out: list[int] = []
    draws = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(groups))
    for number in np.argsort(draws, kind="stable"):
        if len(held_out) + len(groups[number]) <= wanted:
            held_out += groups[number]
    if not held_out or len(held_out) == len(rows):
        raise UserError(
            f"{len(rows)} rows in {len(groups)} groups that share no picture",
            where=f"split {share:g}",
            expected=f"enough groups to train on and {wanted} rows to measure on",
            remedy="import more rows, or choose another share",
        )
    chosen = set(held_out)
    return [place for place in range(len(rows)) if place not in chosen], sorted(held_out)


def _groups(rows: Sequence[Keys]) -> list[list[int]]:
    """Rows joined, also over several steps, by a picture that they share (union-find)."""
    parent = list(range(len(rows)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    shown: dict[str, int] = {}
    for place, keys in enumerate(rows):
        for key in keys:
            parent[root(place)] = root(shown.setdefault(key, place))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for place in range(len(rows)):
        groups[root(place)].append(place)
    return list(groups.values())
