"""What may become of another program's setting, and what is told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Becomes:
    """It decides these settings of the recipe, together with others."""

    settings: tuple[str, ...]


@dataclass(frozen=True)
class Needless:
    """It changes no result, or finesight does it by itself."""

    why: str


@dataclass(frozen=True)
class Lacks:
    """It changes the result and has no counterpart, unless its value is one of `same`."""

    what: str
    same: tuple[object, ...] = ()


Rule = Becomes | Needless | Lacks
Rules = Mapping[str, Rule]

Kind = Literal["differs", "unknown", "note", "needless"]


@dataclass(frozen=True)
class Remark:
    """What the user is told about one setting: `value` as it was written, none for a note on what
    was not."""

    kind: Kind
    key: str
    value: str
    text: str


def becomes(*settings: str) -> Becomes:
    """Short for tables."""
    return Becomes(settings)


def needless(why: str, *keys: str) -> dict[str, Rule]:
    """Keys that need nothing for one reason."""
    return dict.fromkeys(keys, Needless(why))


def lacks(what: str, *keys: str, same: tuple[object, ...] = ()) -> dict[str, Rule]:
    """Keys without a counterpart, for which there is one thing to do."""
    return dict.fromkeys(keys, Lacks(what, same))
