"""Recipe under construction: settings by dotted name, with YAML comments and notes."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from finesight.convert.external_config import ConversionNote
from finesight.errors import escape_unprintable

SettingValue = str | bool | int | float | None | list[object] | dict[str, object]


class RecipeDraft:
    """Recipe under construction, with notes for the user and commands that import its data."""

    def __init__(self) -> None:
        self.settings: dict[str, SettingValue] = {}
        self.notes: list[ConversionNote] = []
        self.import_commands: list[str] = []
        self._comments: dict[str, str] = {}

    def set(self, name: str, value: SettingValue, comment: str = "") -> None:
        """Set a setting by its dotted name, with an optional YAML comment on its line."""
        self.settings[name] = value
        if comment:
            self._comments[name] = " ".join(escape_unprintable(comment).split())

    def add_difference(self, key: str, value: object, text: str) -> None:
        """Add a note about a setting whose effect differs in finesight, with a recommendation."""
        self.notes.append(ConversionNote("differs", key, str(value), text))

    def add_note(self, key: str, value: object, text: str) -> None:
        """Add a note about how a setting was converted."""
        self.notes.append(ConversionNote("note", key, str(value), text))

    def to_yaml(self, title: str) -> str:
        """Format the recipe as YAML with a title comment."""
        lines = [f"# {escape_unprintable(title)}"]
        for name, value in _nest_settings(self.settings).items():
            lines += self._format_lines((name,), value)
        return "\n".join(lines) + "\n"

    def _format_lines(self, key: tuple[str, ...], value: object) -> list[str]:
        indent = "  " * (len(key) - 1)
        if isinstance(value, _SettingGroup):
            nested_lines = [
                line
                for name, item in value.items()
                for line in self._format_lines((*key, name), item)
            ]
            return [f"{indent}{key[-1]}:", *nested_lines]
        comment = self._comments.get(".".join(key), "")
        return [
            f"{indent}{key[-1]}: {_format_yaml_value(value)}"
            + (f"  # {comment}" if comment else "")
        ]


class _SettingGroup(dict[str, object]):
    """Section of a recipe, written with one line per setting."""


def _nest_settings(settings: Mapping[str, SettingValue]) -> dict[str, object]:
    nested = _SettingGroup()
    for name, value in settings.items():
        node = nested
        *groups, last = name.split(".")
        for group in groups:
            inner = node.setdefault(group, _SettingGroup())
            assert isinstance(inner, _SettingGroup), f"{name} is inside another setting"
            node = inner
        node[last] = value
    return nested


def _format_yaml_value(value: object) -> str:
    """Format a value as YAML on one line."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1 << 30)
    return text.strip()[1:-1]
