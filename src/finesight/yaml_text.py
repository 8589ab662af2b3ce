"""YAML that others wrote: plain data of bounded size, or one kind of error."""

from __future__ import annotations

import re
from typing import Any

import yaml

DEPTH = 64
"""Groups and lists inside of each other, at most."""

REPEATED = 100_000
"""Values that aliases stand for, at most: nine lines of them can stand for a billion."""

VALUES = 100_000
"""Values of a text, names of settings included, at most: each takes up to 50 microseconds."""

BITS = 1024
"""Of a whole number, at most: of more, Python may refuse to print it."""

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def parsed(text: str | bytes) -> Any:
    """The data of a text. Raises YAMLError for whatever is wrong with it: also for a value that is
    not what it looks like (0x_, the 13th month), too much depth, and too much behind aliases."""
    loader = _Bounded(text, VALUES)
    node = loader.get_single_node()
    return None if node is None else loader.construct_document(node)


class TooManyValues(yaml.MarkedYAMLError):
    """A text has more values than are read."""


class Composed:
    """The nodes of a text, with their lines, and the data that they make.

    Args:
        text: The YAML.
        values: The most values that are read.

    Raises:
        yaml.YAMLError: As `parsed`.
    """

    def __init__(self, text: str, values: int = VALUES) -> None:
        self._loader = _Bounded(text, values)
        self.root: yaml.Node | None = self._loader.get_single_node()

    def data(self) -> Any:
        """Build the data of the nodes. Raises YAMLError for a value that is not what it looks
        like."""
        return None if self.root is None else self._loader.construct_document(self.root)


class _Bounded(yaml.SafeLoader):
    """Knows the tags of plain data alone, as SafeLoader does."""

    def __init__(self, stream: str | bytes, values: int) -> None:
        super().__init__(stream)
        self._depth = self._values = self._repeated = self._nodes = 0
        self._most = values
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """A node as the base class makes it; refuses what is too deep, and one alias too many."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before, is_alias = self._values, isinstance(event, yaml.AliasEvent)
        if self._depth >= DEPTH:
            raise _refused(f"more than {DEPTH} groups or lists inside of each other", event)
        self._nodes += 1
        if self._nodes > self._most:
            raise TooManyValues(
                problem=f"more than {self._most:,} values", problem_mark=event.start_mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            # What stands inside of itself has no size yet.
            self._values += self._sizes.get(node, 1)
            self._repeated += self._sizes.get(node, 1)
        else:
            self._values += 1
            self._sizes[node] = self._values - before
        if self._repeated > REPEATED:
            raise _refused(f"aliases that stand for more than {REPEATED} values", event)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value as the base class makes it; whatever it raises becomes a YAMLError."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _refused(f"{_shown(node.value)} cannot be read as {kind}", node) from error
        if isinstance(value, int) and value.bit_length() > BITS:
            raise _refused(f"a number of {value.bit_length()} bits", node)
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise _refused(f"{_shown(value)} has a character that no file can be named by", node)
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refused(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
