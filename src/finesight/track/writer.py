"""What a tracker has to do, and how figures and captions are laid out for those that want text."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from finesight.track.records import Alert, Begin, Begun, End, Figures, Pictures


class Writer(ABC):
    """One package. Whatever a method raises ends this tracker, and nothing else; it may take as
    long as it likes, up to the lane's limit."""

    @abstractmethod
    def begin(self, begin: Begin) -> Begun:
        """Open the run, or go on with the one of `begin.id`."""

    @abstractmethod
    def figures(self, figures: Figures) -> None:
        """Record the figures of some steps."""

    @abstractmethod
    def pictures(self, pictures: Pictures) -> None:
        """Record pictures with their captions."""

    @abstractmethod
    def alert(self, alert: Alert) -> None:
        """Send an alert, or where the package has none, record it."""

    @abstractmethod
    def end(self, end: End) -> None:
        """Close the run, with all that is held back."""


def flat(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted names, for packages without nested ones."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value)
