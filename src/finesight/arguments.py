"""What a Python program gives to a function of `finesight.api`: names, counts, choices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from finesight.errors import UserError

FileName = str | Path
"""A file's, run's or model's name. `~` is the user's home."""


def paths(names: FileName | Sequence[FileName]) -> list[Path]:
    """One file or several. Raises UserError for what is no name, as each function here does for
    what is wrong."""
    several = isinstance(names, Iterable) and not isinstance(names, str | bytes | os.PathLike)
    listed: Iterable[object] = names if several else [names]  # type: ignore[assignment]
    return [Path(os.path.expanduser(named(name))) for name in listed]


def named(name: object) -> str:
    """The name of a file, a run or a model."""
    if isinstance(name, str | os.PathLike):
        return str(name)
    raise UserError(
        f"a {type(name).__name__} in place of a file's name",
        expected="a str or a Path",
        remedy='save what is in memory, a picture by image.save("picture.png"), and name the file',
    )


def check_choice(name: str, value: object, kind: object) -> None:
    """Whether a value is one of those of a Literal."""
    if value not in get_args(kind):
        raise UserError(
            f"{name} is {value!r}",
            where=name,
            expected=f"one of {', '.join(get_args(kind))}",
            remedy="choose one of these",
        )


def check_counts(**counts: int | None) -> None:
    """Whether each is above 0, where it is given."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(
                f"{name} is {count}",
                where=name,
                expected="a whole number from 1 upwards",
                remedy="correct it, or leave it out",
            )
