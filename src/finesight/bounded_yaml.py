"""Load untrusted YAML with limits on depth, aliases, values and integers."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 64
"""Maximum number of nested mappings and sequences."""

MAX_ALIASED_VALUES = 100_000
"""Maximum number of values that aliases expand to.

Without a limit, nine lines of aliases can expand to a billion values.
"""

MAX_VALUES = 100_000
"""Maximum number of values, including keys; parsing takes up to 50 microseconds per value."""

MAX_INT_BITS = 1024
"""Maximum size of an integer in bits; Python may refuse to print larger ones."""

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def load_yaml(text: str | bytes) -> Any:
    """Load YAML text as Python data of the standard types.

    Raises YAMLError for any error, including malformed values (0x_, month 13) and exceeded limits.
    """
    loader = _BoundedLoader(text, MAX_VALUES)
    node = loader.get_single_node()
    return None if node is None else loader.construct_document(node)


class TooManyValuesError(yaml.MarkedYAMLError):
    """Raised when a YAML text has more values than the limit."""


class ComposedYaml:
    """A parsed YAML text: its syntax tree with line numbers, and its data.

    Args:
        text: YAML text.
        values: Maximum number of values.

    Attributes:
        root: Root node of the syntax tree; None for an empty text.

    Raises:
        yaml.YAMLError: See `load_yaml`.
    """

    def __init__(self, text: str, values: int = MAX_VALUES) -> None:
        self._loader = _BoundedLoader(text, values)
        self.root: yaml.Node | None = self._loader.get_single_node()

    def data(self) -> Any:
        """Convert the syntax tree to Python data. Raises YAMLError for a malformed value."""
        return None if self.root is None else self._loader.construct_document(self.root)


class _BoundedLoader(yaml.SafeLoader):
    """A YAML loader for the standard data tags, like SafeLoader, with limits."""

    def __init__(self, stream: str | bytes, values: int) -> None:
        super().__init__(stream)
        self._depth = self._num_values = self._num_aliased = self._nodes = 0
        self._most = values
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """Parse the next node. Raises YAMLError above the limits on depth, values and aliases."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        num_before, is_alias = self._num_values, isinstance(event, yaml.AliasEvent)
        if self._depth >= MAX_DEPTH:
            raise _build_error(f"more than {MAX_DEPTH} nested groups or lists", event)
        self._nodes += 1
        if self._nodes > self._most:
            raise TooManyValuesError(
                problem=f"more than {self._most:,} values", problem_mark=event.start_mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            # A recursive node has no size yet.
            self._num_values += self._sizes.get(node, 1)
            self._num_aliased += self._sizes.get(node, 1)
        else:
            self._num_values += 1
            self._sizes[node] = self._num_values - num_before
        if self._num_aliased > MAX_ALIASED_VALUES:
            raise _build_error(
                f"aliases that expand to more than {MAX_ALIASED_VALUES} values", event
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Convert a node to a Python value, and any exception to a YAMLError."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _build_error(
                f"{_truncate_repr(node.value)} cannot be read as {kind}", node
            ) from error
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise _build_error(f"a number of {value.bit_length()} bits", node)
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise _build_error(
                f"{_truncate_repr(value)} has a character that is invalid in file names", node
            )
        return value


def _truncate_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _build_error(problem: str, location: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=location.start_mark)
