"""A recipe as it comes to be: settings by their dotted names, each with a comment as needed."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from finesight.convert.rules import Remark
from finesight.errors import printable

Value = str | bool | int | float | None | list[object] | dict[str, object]


class Draft:
    """Settings in the order in which they are set, and the remarks that were made meanwhile."""

    def __init__(self) -> None:
        self.settings: dict[str, Value] = {}
        self.remarks: list[Remark] = []
        self.imports: list[str] = []
        self._comments: dict[str, str] = {}

    def set(self, name: str, value: Value, comment: str = "") -> None:
        """Decide a setting; the comment says why, on its line."""
        self.settings[name] = value
        if comment:
            self._comments[name] = " ".join(printable(comment).split())

    def differs(self, key: str, value: object, text: str) -> None:
        """Tell of a difference in the result that stays, and what can be done."""
        self.remarks.append(Remark("differs", key, str(value), text))

    def note(self, key: str, value: object, text: str) -> None:
        """Tell of something that was decided."""
        self.remarks.append(Remark("note", key, str(value), text))

    def text(self, title: str) -> str:
        """The recipe as YAML under a line of title."""
        lines = [f"# {printable(title)}"]
        for name, value in _nested(self.settings).items():
            lines += self._lines((name,), value)
        return "\n".join(lines) + "\n"

    def _lines(self, key: tuple[str, ...], value: object) -> list[str]:
        indent = "  " * (len(key) - 1)
        if isinstance(value, _Group):
            inner = [
                line for name, item in value.items() for line in self._lines((*key, name), item)
            ]
            return [f"{indent}{key[-1]}:", *inner]
        comment = self._comments.get(".".join(key), "")
        return [f"{indent}{key[-1]}: {_written(value)}" + (f"  # {comment}" if comment else "")]


class _Group(dict[str, object]):
    """Settings of one group, written as lines of their own."""


def _nested(settings: Mapping[str, Value]) -> dict[str, object]:
    nested = _Group()
    for name, value in settings.items():
        node = nested
        *groups, last = name.split(".")
        for group in groups:
            inner = node.setdefault(group, _Group())
            assert isinstance(inner, _Group), f"{name} is inside of a setting"
            node = inner
        node[last] = value
    return nested


def _written(value: object) -> str:
    """On one line, as YAML that is read back as the same."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1 << 30)
    return text.strip()[1:-1]
