"""Rules for settings of another program, and notes for the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MappedSetting:
    """Setting that determines these recipe settings."""

    recipe_settings: tuple[str, ...]


@dataclass(frozen=True)
class IgnoredSetting:
    """Setting without effect on the result."""

    reason: str


@dataclass(frozen=True)
class UnsupportedSetting:
    """Setting with an effect on the result that finesight does not support.

    Values in `equivalent_values` match the behavior of finesight.
    """

    message: str
    equivalent_values: tuple[object, ...] = ()


SettingRule = MappedSetting | IgnoredSetting | UnsupportedSetting
SettingRules = Mapping[str, SettingRule]

NoteKind = Literal["differs", "unknown", "note", "ignored"]


@dataclass(frozen=True)
class ConversionNote:
    """Note for the user about one setting. `value` is as written; empty if it is not set."""

    kind: NoteKind
    key: str
    value: str
    text: str


def maps_to(*recipe_settings: str) -> MappedSetting:
    """Create a MappedSetting."""
    return MappedSetting(recipe_settings)


def ignored(reason: str, *keys: str) -> dict[str, SettingRule]:
    """Create rules for settings that are ignored for one reason."""
    return dict.fromkeys(keys, IgnoredSetting(reason))


def unsupported(
    message: str, *keys: str, equivalent_values: tuple[object, ...] = ()
) -> dict[str, SettingRule]:
    """Create rules for unsupported settings with one message."""
    return dict.fromkeys(keys, UnsupportedSetting(message, equivalent_values))
