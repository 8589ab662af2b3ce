"""Types of conversion rules for settings of another program, and of notes about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MappedSetting:
    """Rule for a setting that a converter reads to set `recipe_settings`."""

    recipe_settings: tuple[str, ...]


@dataclass(frozen=True)
class IgnoredSetting:
    """Rule for a setting that does not affect the trained model, with the reason."""

    reason: str


@dataclass(frozen=True)
class UnsupportedSetting:
    """Rule for a setting that affects the trained model but has no counterpart in recipes.

    The user sees `message` unless the value is one of `equivalent_values`, which match the behavior
    of finesight.
    """

    message: str
    equivalent_values: tuple[object, ...] = ()


SettingRule = MappedSetting | IgnoredSetting | UnsupportedSetting
SettingRules = Mapping[str, SettingRule]

NoteKind = Literal["differs", "unknown", "note", "ignored"]


@dataclass(frozen=True)
class ConversionNote:
    """Note for the user about one setting.

    `value` is the value as written, empty if the setting is not set.
    """

    kind: NoteKind
    key: str
    value: str
    text: str


def maps_to(*recipe_settings: str) -> MappedSetting:
    """Create the rule of a setting that a converter maps to recipe settings."""
    return MappedSetting(recipe_settings)


def ignored(reason: str, *keys: str) -> dict[str, SettingRule]:
    """Create the rules of several settings that are ignored for the same reason."""
    return dict.fromkeys(keys, IgnoredSetting(reason))


def unsupported(
    message: str, *keys: str, equivalent_values: tuple[object, ...] = ()
) -> dict[str, SettingRule]:
    """Create the rules of several unsupported settings with the same message."""
    return dict.fromkeys(keys, UnsupportedSetting(message, equivalent_values))
