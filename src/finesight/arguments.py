"""Validate arguments of the functions in `finesight.api`: paths, counts and choices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from finesight.errors import UserError

StrPath = str | Path
"""Name or path of a file, run or model; `~` stands for the home folder."""


def to_paths(paths: StrPath | Sequence[StrPath]) -> list[Path]:
    """Convert one or several file names to a list of paths.

    Raises UserError for objects other than text and paths, such as in-memory images.
    """
    is_sequence = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike)
    items: Iterable[object] = paths if is_sequence else [paths]  # type: ignore[assignment]
    return [Path(os.path.expanduser(to_name(name))) for name in items]


def to_name(value: object) -> str:
    """Convert the name or path of a file, run or model to text.

    Raises UserError for objects of other types.
    """
    if isinstance(value, str | os.PathLike):
        return str(value)
    raise UserError(
        f"a {type(value).__name__} instead of a file name",
        expected="a str or a Path",
        remedy='save in-memory data to a file, such as image.save("image.png"), and pass its name',
    )


def check_choice(name: str, value: object, literal: object) -> None:
    """Raise UserError unless the argument `name` has one of the values of a Literal type."""
    if value not in get_args(literal):
        raise UserError(
            f"{name} is {value!r}",
            where=name,
            expected=f"one of {', '.join(get_args(literal))}",
            remedy="choose one of these",
        )


def check_counts(**counts: int | None) -> None:
    """Raise UserError if one of the named counts is below 1; None is valid."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(
                f"{name} is {count}",
                where=name,
                expected="an integer of at least 1",
                remedy="correct or remove it",
            )
